"""Adds golden checkpoints: tiny interrupted runs of the current code, and the numbers that it computes from them.

    python tests/golden/make.py LABEL [NAME ...]

The command writes tests/golden/LABEL/NAME for every case in CASES, or for the named cases. The command never overwrites
an existing golden. See README.md in this folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowtrain
from flowtrain.cli import evaluate, train
from flowtrain.training.trainer import Trainer

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"

# Settings of every run: one CPU thread, and every step in metrics.jsonl. The large learning rate moves the flows far
# from the identity within a few steps.
COMMON = [
    "device=cpu", "threads=1", "trainer.steps=12", "trainer.batch_size=16", "trainer.lr=0.05", "trainer.lr_warmup=1",
    "trainer.val_every=2", "trainer.log_every=1", "trainer.plot_every=null", "trainer.guard_every=3",
]  # fmt: skip
TABLE = ["data=array", "data.path=table.npy", "data.columns=[0,1,2,3]"]
LABELLED = ["data=array", "data.path=table.npy", "data.columns=[0,1,2,3]", "data.label=4", "model.conditional=true"]
COUNTS = ["data=array", "data.path=counts.npy", "data.columns=[0,1,2]"]
SQUARES = ["data=array", "data.path=images.npy", "data.columns=['0:16']", "data.event_shape=[1,4,4]", "data.levels=17"]
IMAGES = ["data=array", "data.path=images.npy", "data.columns=['0:64']", "data.event_shape=[1,8,8]", "data.levels=17"]
CLASSES = ["data.label=64", "model.conditional=true"]
MOONS = ["data=moons", "data.n_test=64", "data.n_val=48"]
NET = ["model.hidden=[4]"]

# arguments of `flowtrain`; a run stops after step 7 of 12, or after STEP if "stop=STEP" is given
CASES: dict[str, list[str]] = {
    "affine_table": ["model=affine", *TABLE],
    "affine_unstandardized": ["model=affine", *TABLE, "data.standardize=false", "trainer.ema=null"],
    "realnvp_table": ["model=realnvp", *TABLE, "model.layers=3", *NET],
    "realnvp_alternate": [
        "model=realnvp", *TABLE, "recipe=none", "model.layers=2", *NET, "model.mixing=alternate", "model.cap=1.5",
        "model.activation=tanh", "trainer.weight_decay=0.1", "trainer.optimizer=adamw", "trainer.clip_norm=null",
    ],
    "realnvp_batch_norm": [
        "model=realnvp", *LABELLED, "model.layers=2", *NET, "model.batch_norm=true", "trainer.ema=0.5",
        "trainer.accumulate=2",
    ],
    "realnvp_counts": ["model=realnvp", *COUNTS, "data.dequantize=true", "model.layers=2", *NET],
    "realnvp_levels": ["model=realnvp", *COUNTS, "data.levels=9", "model.layers=2", *NET, "model.actnorm=false"],
    "realnvp_images": [
        "model=realnvp", *IMAGES, *CLASSES, "recipe=none", "model.layers=1", "model.hidden=[2]", "model.scales=1",
    ],
    "realnvp_images_batch_norm": [
        "model=realnvp", *SQUARES, "recipe=none", "model.layers=1", "model.hidden=[2]", "model.scales=0",
        "model.batch_norm=true", "model.positional_bias=true",
    ],
    "realnvp_images_odd": [
        "model=realnvp", *SQUARES, "data.columns=['0:9']", "data.event_shape=[1,3,3]", "data.alpha=0.01", "recipe=none",
        "model.layers=2", *NET,
    ],
    "glow_table": [
        "model=glow", *TABLE, "model.steps=2", *NET, "model.activation=swish", "trainer.lr_decay=plateau",
        "trainer.lr_plateau_patience=1",
    ],
    "glow_labels": ["model=glow", *LABELLED, "model.steps=1", *NET, "trainer.ema=null"],
    "glow_images": [
        "model=glow", *IMAGES, "model.steps=1", "model.hidden=[2]", "model.scales=2", "model.positional_bias=true",
    ],
    "glow_images_labels": ["model=glow", *SQUARES, *CLASSES, "model.steps=1", *NET, "model.scales=1"],
    "ffjord_moons": ["model=ffjord", *MOONS, *NET],
    "ffjord_table": ["model=ffjord", *TABLE, *NET, "solver.rtol=1e-4"],
    "ffjord_rk4": [
        "model=ffjord", *LABELLED, *NET, "solver=rk4", "solver.step_size=0.25", "regularizer=rnode", "model.flows=2",
        "model.trace=hutchinson", "model.field=concat", "model.activation=softplus", "trainer.ema=0.5",
    ],
    "ffjord_adjoint": [
        "model=ffjord", *TABLE, *NET, "recipe=none", "solver=tsit5", "solver.rtol=1e-3", "solver.gradient=adjoint",
        "regularizer=steer", "model.init_scale=null", "regularizer.acceleration=0.01", "regularizer.spectral=0.001",
    ],
    "ffjord_images": [
        "model=ffjord", *SQUARES, *CLASSES, "recipe=none", "model.hidden=[2]", "model.scales=1", "solver=midpoint",
        "solver.steps=2", "model.positional_bias=true", "trainer.steps=6", "stop=3",
    ],
    "ffjord_images_adaptive": [
        "model=ffjord", *SQUARES, "recipe=none", "model.hidden=[2]", "model.scales=1", "model.full_size=false",
        "model.actnorm=false", "solver.rtol=1e-3", "trainer.steps=6", "stop=3",
    ],
    "hybrid_table": ["objective=hybrid", "model=ffjord", *TABLE, *NET, "objective.matching=4", "stop=3"],
    "hybrid_likelihood": [
        "objective=hybrid", "model=ffjord", *MOONS, *NET, "objective.matching=0.25", "solver=heun2",
        "solver.step_size=0.2",
    ],
    "nsf_table": ["model=nsf", *TABLE, "model.layers=2", *NET],
    "nsf_labels": [
        "model=nsf", *LABELLED, "recipe=none", "model.layers=2", *NET, "model.mixing=permutation", "model.bins=3",
    ],
    "maf_table": ["model=maf", *TABLE, "model.layers=2", *NET],
    "maf_affine": [
        "model=maf", *TABLE, "recipe=none", "model.layers=2", *NET, "model.transform=affine", "model.passes=2",
    ],
    "mixture_table": ["model=mixture", *TABLE, "model.components=3", "model.covariance=full", "model.prior=1"],
    "glow_images_splines": [
        "model=glow", *SQUARES, "model.steps=1", *NET, "model.scales=1", "model.coupling=spline", "model.bins=3",
    ],
    "flow_matching": ["objective=flow_matching", "model=ffjord", *MOONS, *NET],
    "rectified": ["objective=rectified", "objective.pairs=64", "objective.rtol=1e-3", "from=../flow_matching/whole"],
}  # fmt: skip


def main() -> None:
    """Makes the goldens named on the command line."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    label, names = sys.argv[1], sys.argv[2:] or list(CASES)
    if not Path(flowtrain.__file__).is_relative_to(HERE.parents[1]):
        raise SystemExit(f"flowtrain was imported from {flowtrain.__file__}: set PYTHONPATH to this checkout")
    taken = [str(HERE / label / name) for name in names if (HERE / label / name).exists()]
    if taken:
        raise SystemExit(f"these goldens exist and are never overwritten: {', '.join(taken)}. Give another label")
    if not DATA.exists():
        make_data()
    # the path is the same on every machine, so that checkpoints contain no user name
    scratch = Path(tempfile.gettempdir()) / "flowtrain-golden"
    shutil.rmtree(scratch, ignore_errors=True)
    os.environ.pop("TQDM_DISABLE", None)
    for name in names:
        arguments = list(CASES[name])
        if any(a.startswith("from=") for a in arguments) and not (scratch / "flow_matching").exists():
            make("flow_matching", CASES["flow_matching"], scratch / "flow_matching")
        make(name, arguments, scratch / name)
        keep(scratch / name, HERE / label / name)
        print(f"made {HERE / label / name}", flush=True)
    shutil.rmtree(scratch)


def make_data() -> None:
    """Writes the data files from a fixed seed. Like goldens, they are made once."""
    rng = np.random.default_rng(18)
    DATA.mkdir()
    label = rng.integers(0, 3, 120)
    table = (
        rng.normal(size=(120, 4)) @ rng.normal(size=(4, 4)) + 2.0 * label[:, None] * [1, 0, -1, 0] + [10, 0, -3, 500]
    )
    np.save(DATA / "table.npy", np.column_stack([table, label]).astype(np.float32))
    np.save(DATA / "counts.npy", rng.binomial(8, [0.2, 0.5, 0.7], (120, 3)).astype(np.uint8))
    label = rng.integers(0, 2, (120, 1))
    np.save(DATA / "images.npy", np.hstack([rng.binomial(16, 0.2 + 0.4 * label, (120, 64)), label]).astype(np.uint8))


def make(name: str, arguments: list[str], folder: Path) -> None:
    """Runs a case in `folder`: the interrupted run in `run`, the completed run in `whole`, and expected.json."""
    shutil.copytree(DATA, folder)
    os.chdir(folder)
    stop = next((int(a.removeprefix("stop=")) for a in arguments if a.startswith("stop=")), 7)
    command = [*(a for a in arguments if not a.startswith("stop=")), *COMMON]
    # the last value of a key counts
    command = list({a.partition("=")[0]: a for a in [*COMMON, *command[: len(command) - len(COMMON)]]}.values())
    interrupted(["flowtrain", *command, "hydra.run.dir=run"], stop)
    shutil.copytree("run", "whole")
    run_command(evaluate.main, ["floweval", "ckpt=run", "out=eval.json", "split=test", "device=cpu"])
    run_command(train.main, ["flowtrain", "resume=whole"])
    rows, labels = rows_of(command)
    saved = torch.load("run/checkpoints/last.pt", weights_only=True)["config"]
    expected = {
        "command": command,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=HERE, text=True).strip(),
        "torch": torch.__version__,
        "data": None if "path" not in saved["data"] else Path(saved["data"]["path"]).name,
        "stopped": stop,
        "steps": saved["trainer"]["steps"],
        "rows": rows.tolist(),
        "labels": labels,
        "log_p": {w: log_p(Path(f"run/checkpoints/{w}.pt"), rows, labels, torch.float32) for w in ("best", "last")},
        "log_p_float64": {
            w: log_p(Path(f"run/checkpoints/{w}.pt"), rows, labels, torch.float64) for w in ("best", "last")
        },
        "test": select_keys(json.loads(Path("eval.json").read_text())),
        "resumed": {
            "metrics": metrics(Path("whole"))[len(metrics(Path("run"))) :],
            "test": select_keys(json.loads(Path("whole/result.json").read_text())),
            "log_p": log_p(Path("whole/checkpoints/last.pt"), rows, labels, torch.float32),
        },
    }
    Path("expected.json").write_text(to_json(expected) + "\n")


def to_json(content: dict[str, Any]) -> str:
    """Returns JSON with one line for each key."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) + "\n}"


def interrupted(arguments: list[str], stop: int) -> None:
    """Runs `flowtrain` and sends it SIGTERM one step before `stop`, so that it ends after step `stop`."""
    step = Trainer.train_step

    def signalled(self: Trainer) -> Any:
        row = step(self)
        if self.step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    Trainer.train_step = signalled  # type: ignore[method-assign]
    try:
        run_command(train.main, arguments, code=143)
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]


def run_command(command: Any, arguments: list[str], code: int = 0) -> None:
    """Runs a command in this process and checks its exit code."""
    sys.argv = arguments
    try:
        command()
    except SystemExit as e:
        if int(e.code or 0) != code:
            raise RuntimeError(f"{' '.join(arguments)}: exit code {e.code}") from e


def rows_of(command: list[str]) -> tuple[np.ndarray, list[int] | None]:
    """Returns 16 rows in data units, some of them outside the data, and labels if the flow is conditional."""
    flow = flowtrain.load("run/checkpoints/last.pt")
    rng = np.random.default_rng(7)
    keys = dict(a.split("=", 1) for a in command)
    labels = None if flow.classes is None else rng.integers(0, flow.classes, 16).tolist()
    if "data.path" not in keys:
        return (rng.normal(size=(16, 2)) * np.where(np.arange(16) < 10, 1.0, 10.0)[:, None]).round(3), labels
    table = np.load(keys["data.path"]).astype(np.float64)
    size = int(np.prod(flow.event_shape))
    x = table[rng.permutation(len(table))[:16], :size]
    if flow.integer_valued:
        x = x + rng.uniform(0.001, 0.999, x.shape)
    else:
        # move the last rows far from the data, where flows extrapolate
        x = x + rng.normal(size=x.shape) * x.std(0) * np.where(np.arange(16) < 10, 0.3, 10.0)[:, None]
    return x.round(3).reshape(16, *flow.event_shape), labels


@torch.no_grad()
def log_p(path: Path, rows: Any, labels: list[int] | None, dtype: torch.dtype) -> list[float]:
    """Returns log p of the rows under a checkpoint."""
    flow = flowtrain.load(path).to(dtype)
    label = None if labels is None else torch.tensor(labels)
    return flow.log_prob(torch.as_tensor(rows, dtype=dtype), label).tolist()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl without timings."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def select_keys(result: dict[str, Any]) -> dict[str, Any]:
    """Selects the compared keys of eval.json or result.json."""
    return {key: result[key] for key in ("nll", "nll_stderr", "n", "split", "step", "bits_per_dim")}


def keep(made: Path, place: Path) -> None:
    """Copies the files of a golden: expected.json, and the interrupted run as run.tar.xz."""
    place.mkdir(parents=True)
    with tarfile.open(place / "run.tar.xz", "w:xz") as archive:
        for name in ("checkpoints/best.pt", "checkpoints/last.pt", "checkpoints/teacher.pt", "metrics.jsonl"):
            if (made / "run" / name).exists():
                archive.add(made / "run" / name, name)
    shutil.copy(made / "expected.json", place / "expected.json")


if __name__ == "__main__":
    main()
