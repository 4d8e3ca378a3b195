"""Compares RealNVP, Glow, FFJORD, flow matching and rectified flow on the same data, in one table.

    python scripts/compare.py                       # all toys, gas and optdigits: 50 runs
    python scripts/compare.py moons gas --methods ffjord flow_matching
    python scripts/compare.py --out DIR             # again with the same DIR: finished runs are not repeated

Each row is a run of `flowtrain` with the defaults of its model or objective and one seed. Rectified flow starts from
the flow matching run on the same data. The script writes compare.md, compare.json and compare.png into --out
(outputs/compare) and prints the Markdown. `--jobs` is the number of simultaneous runs, each with one thread. The data
are found as by flowtrain (FLOWTRAIN_DATA, or ../shared/data beside the checkout).

The table has these columns:

- log p(x): closed form or ODE
- test NLL in nats and its standard error, and KL to the true density if it is known
- seconds of training, with validations and pictures; for rectified flow without the training of its teacher
- seconds to draw 10,000 samples with one thread
- NFE of a likelihood and of a sample
- parameters
- sliced Wasserstein distance of 10,000 samples (or of as many as there are test rows) to the test rows, drawn with the
  flow's own solver and with four Euler steps
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from common import machine, progress, run_flowtrain, table  # noqa: E402

TOYS = ("moons", "circles", "rings", "8gaussians", "swissroll", "checkerboard", "pinwheel", "2spirals")
REAL = ("gas", "optdigits")
METHODS = {
    "realnvp": ["model=realnvp"],
    "glow": ["model=glow"],
    "ffjord": ["model=ffjord"],
    "flow_matching": ["model=ffjord", "objective=flow_matching"],
    "rectified": ["objective=rectified"],
}
HEAD = (
    "data",
    "method",
    "log p(x)",
    "NLL (nats)",
    "KL (nats)",
    "training s",
    "10,000 samples s",
    "NFE of log p",
    "NFE of a sample",
    "parameters",
    "sliced W2",
    "sliced W2, 4 Euler steps",
)
SAMPLES = 10_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help=f"data sets among {', '.join((*TOYS, *REAL))}; default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "compare")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="number of simultaneous runs"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="overrides for every run, such as trainer.steps=9; use a new --out with them",
    )
    args = parser.parse_args()
    unknown = set(args.data) - {*TOYS, *REAL}
    if unknown:
        parser.error(f"unknown data: {', '.join(sorted(unknown))}. Choose from {', '.join((*TOYS, *REAL))}")
    if "rectified" in args.methods and "flow_matching" not in args.methods:
        parser.error("rectified starts from flow_matching: name both in --methods")
    args.methods = [method for method in METHODS if method in args.methods]
    return args


def keys_of(data: str) -> list[str]:
    """Returns the overrides that choose a data set."""
    if data in TOYS:
        return [f"data={data}"]
    root = Path(os.environ.get("FLOWTRAIN_DATA", ROOT.parent / "shared" / "data")) / data
    files = {"path": "train.csv", "val_path": "val.csv", "test_path": "test.csv"}
    extra = []
    if data == "optdigits":
        files = {"path": "optdigits.tra", "test_path": "optdigits.tes"}
        extra = ["data.columns=[0:64]", "data.dequantize=true"]
    missing = [root / name for name in files.values() if not (root / name).is_file()]
    if missing:
        raise SystemExit(f"file not found: {missing[0]}. Set FLOWTRAIN_DATA to the folder that contains {data}/")
    return ["data=array", *(f"data.{key}={root / name}" for key, name in files.items()), *extra]


def train(data: str, methods: Sequence[str], out: Path, extra: Sequence[str]) -> None:
    """Trains the methods on one data set one after another, skipping finished runs."""
    for method in methods:
        run_dir = out / "runs" / f"{data}-{method}"
        if (run_dir / "result.json").is_file():
            continue
        begins = method == "rectified"
        keys = [f"from={out / 'runs' / f'{data}-flow_matching'}"] if begins else keys_of(data)
        # the run `from` determines model and data
        more = [key for key in extra if not (begins and key.startswith(("model.", "data.")))]
        # delete interrupted runs: their seconds would include the pause
        shutil.rmtree(run_dir, ignore_errors=True)
        run_flowtrain(run_dir, *METHODS[method], *keys, *more, "threads=1")
        progress(f"{data} {method}: {json.loads((run_dir / 'result.json').read_text())['nll']:.3f} nats")


def measure(data: str, method: str, run_dir: Path) -> dict[str, Any]:
    """Returns the results of a finished run. Sampling is timed here, with one thread and no other work."""
    import torch

    import flowtrain
    from flowtrain.evaluation.log_likelihood import nfe_of_pass
    from flowtrain.evaluation.sample_quality import sliced_wasserstein
    from flowtrain.ode import ode_solver, record_solves
    from flowtrain.runs.build import build_data
    from flowtrain.training import checkpoint, checkpoint_files

    torch.set_num_threads(1)
    flow = flowtrain.load(run_dir)
    config = checkpoint.load(checkpoint_files.find(run_dir))["config"]
    torch.manual_seed(0)
    test = flow.dequantized(build_data(config).test)[:SAMPLES]
    result = json.loads((run_dir / "result.json").read_text())

    def drawn(n: int, flow: Any = flow) -> torch.Tensor:
        torch.manual_seed(0)
        return flow.sample(n)

    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        with record_solves() as solves:
            samples = drawn(SAMPLES)
        seconds.append(time.perf_counter() - begun)
    coarse = None
    if flow.solver is not None:
        by_euler = flow.with_solver(ode_solver("euler", steps=4))
        coarse = sliced_wasserstein(drawn(len(test), by_euler), test)
    return {
        "data": data,
        "method": method,
        "likelihood": "closed form" if flow.solver is None else f"ODE, rtol {flow.solver.rtol:g}",
        **{key: result[key] for key in ("nll", "nll_stderr", "entropy", "kl", "kl_stderr", "nfe", "train_seconds")},
        "sample_seconds": statistics.median(seconds),
        "sample_nfe": nfe_of_pass(flow, solves),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "sliced_wasserstein": sliced_wasserstein(samples[: len(test)], test),
        "sliced_wasserstein_4": coarse,
    }


def cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    kl = "-" if row["kl"] is None else f"{row['kl']:.3f} ± {row['kl_stderr']:.3f}"
    return [
        row["data"],
        row["method"].replace("_", " "),
        row["likelihood"],
        f"{row['nll']:.3f} ± {row['nll_stderr']:.3f}",
        kl,
        number("train_seconds", ".0f"),
        number("sample_seconds", ".2f"),
        number("nfe", ".0f"),
        number("sample_nfe", ".0f"),
        number("parameters", ",d"),
        number("sliced_wasserstein", ".3f"),
        number("sliced_wasserstein_4", ".3f"),
    ]


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws three dot plots with a line for each data set: distance to the best likelihood, and costs."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from flowtrain.plotting import style

    colours = dict(zip(METHODS, (style.BLUE, style.GREEN, style.VERMILLION, style.ORANGE, style.PURPLE), strict=True))
    names = list(dict.fromkeys(row["data"] for row in rows))
    best = {name: min(row["nll"] for row in rows if row["data"] == name) for name in names}
    least = 1e-3
    panels = (
        ("nats above the entropy, or above the best", lambda row: max(least, gap_of(row, best[row["data"]]))),
        ("training, s", lambda row: row["train_seconds"]),
        ("10,000 samples, s", lambda row: row["sample_seconds"]),
    )
    with style.styled():
        height = 1.35 + 0.34 * len(names)
        figure = style.new_figure(height, "Likelihood and cost of each flow")
        for i, (words, value) in enumerate(panels):
            axes = style.add_axes(figure, 1.15 + 2.63 * i, 0.55, 2.38, height - 1.3)
            for method, colour in colours.items():
                mine = [row for row in rows if row["method"] == method]
                places = [names.index(row["data"]) for row in mine]
                label = method.replace("_", " ")
                axes.plot([value(row) for row in mine], places, "o", color=colour, markersize=5, alpha=0.9, label=label)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
            axes.grid(True)
            axes.set_xlabel(words)
            if i == 0:
                style.legend_above(axes, width=style.WIDTH - 1.3)
        style.save(figure, path)


def gap_of(row: dict[str, Any], best: float) -> float:
    """Returns the KL to the true density if it is known, or the difference from the best NLL on the same data."""
    return float(row["nll"] - best if row["kl"] is None else row["kl"])


def main() -> None:
    args = arguments()
    out = args.out.absolute()
    names = list(dict.fromkeys(args.data)) or [*TOYS, *REAL]
    for name in names:
        # report missing files before training
        keys_of(name)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: train(name, args.methods, out, args.set), names))
    rows = [measure(name, method, out / "runs" / f"{name}-{method}") for name in names for method in args.methods]
    text = "\n".join(
        [machine(), "", f"{args.jobs} runs at a time, one thread each", "", table(HEAD, [cells(row) for row in rows])]
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(text + "\n")
    (out / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(out / "compare.png", rows)
    print(text)
    progress(f"written to {out}: compare.md, compare.json, compare.png")


if __name__ == "__main__":
    main()
