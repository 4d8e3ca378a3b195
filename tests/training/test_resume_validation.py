"""Complete checkpoints with a correct checksum but invalid values are refused in one line, and nothing is trained."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run

from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.runs.build import build_flow
from flowtrain.runs.load import restore
from flowtrain.training import checkpoint
from flowtrain.training.checkpoint import checksum

pytestmark = pytest.mark.usefixtures("without_figures")

Change = Callable[[dict[str, Any]], object]
MODELS = {"realnvp": ["model=realnvp", "model.layers=2", "model.hidden=[4]"], "ffjord": ["model.hidden=[4]"]}
KEYS = ["trainer.steps=4", "trainer.batch_size=8", "trainer.plot_every=null", "data.n_val=8", "data.n_test=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(run: Run, runs: Path) -> Callable[[str], Path]:
    """Returns a function that trains four steps of a model once and restores last.pt in its run directory."""

    def of(model: str) -> Path:
        folder = runs / model
        if not folder.exists():
            assert run("flowtrain", *MODELS[model], *KEYS, f"hydra.run.dir={folder}")[0] == 0
            (folder / "kept.pt").write_bytes((folder / "checkpoints/last.pt").read_bytes())
        for path in (folder / "checkpoints").iterdir():
            path.unlink()
        (folder / "checkpoints/last.pt").write_bytes((folder / "kept.pt").read_bytes())
        return folder

    return of


def changed(path: Path, change: Change) -> None:
    content = checkpoint.load(path)
    change(content)
    torch.save({**content, "checksum": checksum(content)}, path)


def put(keys: str, value: Any) -> Change:
    def change(content: Any) -> None:
        *path, last = keys.split(".")
        for key in path:
            content = content[int(key) if key.isdigit() else key]
        content[int(last) if last.isdigit() else last] = value

    return change


def gone(key: str) -> Change:
    return lambda content: content.pop(key)


STATES: dict[str, Change] = {
    **{f"no {key}": gone(key) for key in ("lr", "seconds", "stale", "best", "val_nll")},
    **{f"{key} x": put(key, "x") for key in ("optimizer", "lr", "seconds", "best", "trouble", "ema", "histories")},
    "short moments": put("optimizer.state.0.exp_avg", torch.zeros(3)),
    "long moments": put("optimizer.state.0.exp_avg_sq", torch.zeros(1000)),
    "whole moments": put("optimizer.state.0.exp_avg", torch.zeros(4, 1, dtype=torch.int64)),
    "moments of none": put("optimizer.state", {99: {}}),
    "no moments": put("optimizer.state.0", {}),
    "state x": put("optimizer.state", "x"),
    "a step of nan": put("optimizer.state.0.step", torch.tensor(math.nan)),
    "a step of many": put("optimizer.state.0.step", torch.zeros(5)),
    "best of a word": put("best", {"nll": "x", "step": 3}),
    "best of minus infinity": put("best", {"nll": -math.inf, "step": 3}),
    "negative scale": put("lr.scale", -1.0),
    "no scale": put("lr.scale", 0.0),
    "scale x": put("lr.scale", "x"),
    "negative rewinds": put("trouble.rewinds", -3000),
    "negative halvings": put("trouble.halvings", -5),
    "rewinds x": put("trouble.rewinds", "x"),
    "updates x": put("ema.updates", "x"),
    "updates of nan": put("ema.updates", math.nan),
    "an average of another shape": lambda c: c["ema"].update(
        {next(k for k in c["ema"] if k != "updates"): torch.ones(7)}
    ),
    "negative seconds": put("seconds", -1.0),
    "seconds of nan": put("seconds", math.nan),
    "stale x": put("stale", "x"),
    "step -1": put("step", -1),
    "threads": put("config.threads", 10**6),
    "points": put("config.data.n_test", 2**28),
    "objective x": put("config.objective", "x"),
    "regularizer null": put("config.regularizer", None),
}
CONTINUOUS: dict[str, Change] = {
    "guard x": put("guard", "x"),
    "guard of nothing": put("guard", {}),
    "tightenings x": put("guard.tightenings", "x"),
    "many tightenings": put("guard.tightenings", 10**6),
    "steps of nan": put("histories", [[[math.nan, math.nan]]]),
    "steps x": put("histories", [[["x", 1.0]]]),
    "more steps than memory": put("histories", [[[1.0, 1e-300]]]),
}


@pytest.mark.parametrize("name", STATES)
def test_resume_refuses_invalid_state(name: str, run: Run, trained: Callable[[str], Path]) -> None:
    refuse(run, trained("realnvp"), STATES[name])


@pytest.mark.parametrize("name", CONTINUOUS)
def test_resume_of_a_continuous_flow_refuses_invalid_state(name: str, run: Run, trained: Callable[[str], Path]) -> None:
    refuse(run, trained("ffjord"), CONTINUOUS[name])


def refuse(run: Run, folder: Path, change: Change) -> None:
    rows = (folder / "metrics.jsonl").read_bytes()
    changed(folder / "checkpoints/last.pt", change)
    code, out, err = run("flowtrain", f"resume={folder}", "trainer.steps=8")
    lines = [line for line in err.splitlines() if "parameters, 2 samples" not in line]
    assert (code, out) == (2, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("flowtrain: ")
    assert (folder / "metrics.jsonl").read_bytes() == rows


def first(kind: Callable[[torch.Tensor], bool], make: Callable[[torch.Tensor], Any], part: str = "weights") -> Change:
    """Changes the first tensor for which `kind` is true."""

    def change(content: dict[str, Any]) -> None:
        name = next(k for k, v in content[part].items() if isinstance(v, torch.Tensor) and kind(v))
        content[part][name] = make(content[part][name])

    return change


WHOLE = {
    "an index out of range": first(
        lambda v: v.dtype == torch.int64 and v.numel() > 0, lambda v: torch.full_like(v, 9999)
    ),
    "a negative index": first(lambda v: v.dtype == torch.int64 and v.numel() > 0, lambda v: torch.full_like(v, -7)),
    "whole weights": first(torch.is_floating_point, lambda v: v.long()),
    "complex weights": first(torch.is_floating_point, lambda v: v + 0j),
    "an average that is none": put("ema", "x"),
    "averages in a list": put("ema", [1]),
    "an average of another model": put("ema.elsewhere", torch.zeros(3)),
    "no classes": put("samples.classes", -1),
    "alpha of nan": put("samples.alpha", math.nan),
    "columns of a number": put("samples.columns", 5),
    "discrete x": put("samples.integer_valued", "x"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_command_refuses_invalid_weights(
    name: str, run: Run, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = trained("realnvp")
    changed(folder / "checkpoints/last.pt", WHOLE[name])
    for command, key in (("floweval", "ckpt"), ("flowsample", "ckpt"), ("flowtrain", "from"), ("flowtrain", "resume")):
        code, out, err = run(command, f"{key}={folder}")
        assert (code, out) == (2, ""), (command, err)
        assert len(err.splitlines()) == 1, (command, err)


def test_a_tensor_without_memory_is_refused(run: Run, trained: Callable[[str], Path]) -> None:
    folder = trained("realnvp")
    path = folder / "checkpoints/last.pt"
    content = torch.load(path, weights_only=True)
    name = next(iter(content["weights"]))
    content["weights"][name] = content["weights"][name].to("meta")
    torch.save(content, path)
    code, _, err = run("floweval", f"ckpt={folder}")
    assert (code, len(err.splitlines())) == (2, 1), err


LINES = [b"5", b"{}", b"[]", b'{"step": "x", "split": "train"}', b"\xff\xfe", b"[" * 100_000, b"\0" * 40]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_damaged_metrics_line_does_not_affect_others(line: bytes, run: Run, trained: Callable[[str], Path]) -> None:
    folder = trained("realnvp")
    path = folder / "metrics.jsonl"
    before = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([before[0], line, *before[1:]]) + b"\n")
    code, _, err = run("flowtrain", f"resume={folder}")
    assert code == 0, err
    assert f"metrics.jsonl: 1 of {len(before) + 1} lines are damaged" in err
    assert path.read_bytes().splitlines() == before


@pytest.mark.parametrize(
    "name", [".lock", ".holder", "metrics.jsonl", "flowtrain.log", "result.json", "checkpoints/best.pt"]
)
def test_nothing_is_written_through_a_link(name: str, run: Run, trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("realnvp")
    victim, link = tmp_path / "victim", folder / name
    victim.write_text("kept")
    saved = link.read_bytes() if link.exists() else None
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    try:
        code, out, err = run("flowtrain", f"resume={folder}")
        assert (code, out) == (2, "")
        assert f"{name} is a link" in err
        assert victim.read_text() == "kept"
    finally:
        link.unlink()
        if saved is not None:
            link.write_bytes(saved)


def test_large_batch_count_is_not_an_index() -> None:
    """Batch norms over images count batches without a limit, so a large count is valid."""
    samples = Samples((1, 4, 4), integer_valued=True, levels=256)
    config = compose_defaults(["model=realnvp", "data=mnist", "model.hidden=[4]", "model.batch_norm=true"])
    weights = build_flow(config, samples).state_dict()
    counts = [name for name in weights if name.endswith("num_batches_tracked")]
    assert counts
    described = {"config": config, "event_shape": [1, 4, 4], "samples": asdict(samples)}
    saved = {**described, "step": 0, "ema": None, "weights": weights}
    restore({**saved, "weights": {**weights, **{name: torch.tensor(10**6) for name in counts}}}, torch.device("cpu"))
