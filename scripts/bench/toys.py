"""The README's table of toys: KL to the true density and training time, for FFJORD and RealNVP.

    python scripts/bench/toys.py            # all eight, one after another; about 20 minutes on 2 cores
    python scripts/bench/toys.py moons rings

Each run is the plain command `flowtrain model=MODEL data=TOY`; prints a Markdown table.
"""

import json
import sys
import tempfile
from pathlib import Path

from common import run_flowtrain

TOYS = ("moons", "circles", "rings", "8gaussians", "swissroll", "checkerboard", "pinwheel", "2spirals")
MODELS = ("ffjord", "realnvp")


def measure(model: str, toy: str, out: Path) -> tuple[str, str]:
    """(KL +- standard error, training seconds) of one run, in words."""
    run_dir = out / f"{model}-{toy}"
    run_flowtrain(run_dir, f"model={model}", f"data={toy}")
    result = json.loads((run_dir / "result.json").read_text())
    return f"{result['kl']:.3f} ± {result['kl_stderr']:.3f}", f"{result['train_seconds']:.0f}"


def main() -> None:
    toys = sys.argv[1:] or TOYS
    out = Path(tempfile.mkdtemp(prefix="flowtrain-toys-"))
    print("| toy |" + "".join(f" {model} KL (nats) | seconds |" for model in MODELS))
    print("|---|" + "---|---|" * len(MODELS))
    for toy in toys:
        cells = [cell for model in MODELS for cell in measure(model, toy, out)]
        print(f"| {toy} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nruns, with their pictures: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
