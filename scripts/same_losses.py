"""Checks that a change of the code changes no number: short seeded runs with this checkout and with another checkout.

    git clone -q . /tmp/base && git -C /tmp/base checkout -q HEAD~1 && python scripts/same_losses.py /tmp/base

For each run it compares, bit by bit, every row of metrics.jsonl except for seconds, and the content of last.pt except
for the config: weights, averages, optimizer and step plans. If FLOWTRAIN_DATA is set, one of the runs uses its MNIST.
The script takes four minutes on one core, prints a line for each run, and exits with 1 if anything differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from harm.compare import rows, value_differences

from flowtrain.training.old_checkpoints import upgraded

HERE = Path(__file__).resolve().parents[1]
SHORT = ["trainer.steps=40", "trainer.val_every=20", "trainer.plot_every=null", "trainer.batch_size=64"]
SHORT += ["trainer.log_every=1", "data.n_val=200", "data.n_test=200", "threads=1", "device=cpu"]
RUNS = [
    "model=ffjord data=moons",
    "model=ffjord data=moons model.trace=hutchinson solver.gradient=adjoint trainer.steps=10",
    "model=ffjord data=pinwheel solver=rk4 solver.step_size=1.0 trainer.lr=0.05 trainer.guard_every=5",
    "model=ffjord data=moons objective=hybrid objective.matching=0.5",
    "model=ffjord data=moons objective=flow_matching",
    "model=ffjord data=rings regularizer=rnode",
    "model=realnvp data=checkerboard model.batch_norm=true",
    "model=realnvp data=checkerboard trainer.accumulate=2 trainer.ema=null",
    "model=glow data=8gaussians trainer.optimizer=adamw trainer.clip_norm=0.5",
    "model=affine data=moons trainer.lr_decay=plateau trainer.lr_plateau_patience=1 trainer.patience=9",
]
IMAGES = ["model=realnvp data=mnist model.hidden=[4] model.scales=1 trainer.steps=3 trainer.val_every=3"]


def python(checkout: Path, *arguments: str) -> str:
    """Returns the output of Python in a process that imports the flowtrain of the checkout.

    Raises:
        SystemExit: the process failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    # the working directory comes before PYTHONPATH
    ended = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"stopped: python {' '.join(arguments)} in {checkout} failed: {ended.stderr[-1000:]}")
    return ended.stdout.strip()


def check_imported(checkout: Path) -> None:
    """Checks that the checkout has its own flowtrain.

    Raises:
        SystemExit: another flowtrain would be imported. The message gives its path.
    """
    found = python(checkout, "-c", "import flowtrain; print(flowtrain.__file__)")
    if not Path(found).is_relative_to(checkout):
        raise SystemExit(f"stopped: {checkout} is not a checkout of flowtrain. Python would import {found}")


def differences(keys: str, base: Path, out: Path) -> list[str]:
    """Returns the differences between the runs of both checkouts."""
    folders = []
    for name, checkout in (("here", HERE), ("base", base)):
        folders.append(out / name)
        python(checkout, "-m", "flowtrain", *SHORT, *keys.split(), f"hydra.run.dir={folders[-1]}")
    written = [rows(folder) for folder in folders]
    wrong = [] if written[0] == written[1] and len(written[0]) > 3 else ["metrics.jsonl differs"]
    # renamed keys are compared under their present names
    last = [upgraded(torch.load(folder / "checkpoints/last.pt", weights_only=True)) for folder in folders]
    return wrong + value_differences(*({k: v for k, v in saved.items() if k != "config"} for saved in last), "last.pt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the other checkout")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="number of simultaneous runs"
    )
    args = parser.parse_args()
    base = args.base.resolve()
    for checkout in (HERE, base):
        check_imported(checkout)
    wanted = [*RUNS, *(IMAGES if os.environ.get("FLOWTRAIN_DATA") else [])]
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda job: differences(job[1], base, Path(out, str(job[0]))), enumerate(wanted))
        differ = 0
        for keys, wrong in zip(wanted, found, strict=True):
            print(f"{'; '.join(wrong[:3]) or 'identical'}: {keys}", flush=True)
            differ += bool(wrong)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
