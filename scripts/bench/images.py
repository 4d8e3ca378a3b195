"""Makes the table of images in README.md: test bits/dim and cost of the small experiments, at most ten minutes each.

    python scripts/bench/images.py                            # all three on MNIST, one after another: 35 minutes
    python scripts/bench/images.py glow --data fashion_mnist
    python scripts/bench/images.py realnvp trainer.steps=500  # with overrides for flowtrain

Each run is `flowtrain experiment=mnist_MODEL_small data=DATA`, which finds the files like any run (FLOWTRAIN_DATA,
data.root). The script prints a Markdown table with these columns:

- bits per dimension with uniform dequantization (one draw), and the standard error over the test set
- parameters
- seconds of training, with validations and pictures
- steps, and their median time in milliseconds
- NFE of the last training step
- seconds of scoring the test set
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import machine, progress, run_flowtrain, table

MODELS = ("realnvp", "glow", "ffjord")
HEAD = ("model", "bits/dim", "parameters", "seconds", "steps", "ms a step", "NFE", "seconds of scoring")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", help=f"models among {', '.join(MODELS)}, and overrides for flowtrain")
    parser.add_argument("--data", default="mnist", help="mnist | fashion_mnist")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a new temporary folder")
    return parser.parse_args()


def measure(model: str, data: str, run_dir: Path, overrides: list[str]) -> list[str]:
    """Trains a model and returns its row of the table."""
    import flowtrain

    run_flowtrain(run_dir, f"experiment=mnist_{model}_small", f"data={data}", *overrides)
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    stderr = result["nll_stderr"] * result["bits_per_dim"] / result["nll"]
    nfe = steps[-1]["nfe_forward"]
    return [
        model,
        f"{result['bits_per_dim']:.3f} ± {stderr:.3f}",
        f"{sum(p.numel() for p in flowtrain.load(run_dir).parameters()):,}",
        f"{result['train_seconds']:.0f}",
        f"{result['steps']}",
        f"{1e3 * statistics.median(row['step_seconds'] for row in steps):.0f}",
        "-" if nfe is None else f"{nfe + steps[-1]['nfe_backward']}",
        f"{result['seconds']:.0f}",
    ]


def main() -> None:
    args = arguments()
    out = args.out or Path(tempfile.mkdtemp(prefix="flowtrain-images-"))
    models = [name for name in args.chosen if name in MODELS] or MODELS
    overrides = [name for name in args.chosen if name not in MODELS]
    found = []
    for model in models:
        run_dir = out / f"{args.data}-{model}"
        found.append(measure(model, args.data, run_dir, overrides))
        progress(f"{' '.join(found[-1])}: {run_dir}")
    print(machine())
    print(f"\n{args.data}, the experiments mnist_*_small{''.join(f' {key}' for key in overrides)}\n")
    print(table(HEAD, found))


if __name__ == "__main__":
    main()
