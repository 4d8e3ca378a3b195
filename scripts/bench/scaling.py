"""Compares two processes with one by measurement, and predicts 8, 64 and 512 ranks from a model of communication.

    python scripts/bench/scaling.py                    # moons by FFJORD, MNIST by RealNVP; a few minutes
    python scripts/bench/scaling.py --only moons --steps 60 --repeats 5

Three setups are measured alternately with the same global batch: one process with one thread, two processes with one
thread (torchrun, Gloo), and one process with two threads. Speed is the ratio of median step times. The losses of the
same steps are compared.

The model gives the seconds per step for N ranks and a gradient of G bytes, where c is the measured step:

    compute         c / N if the global batch is constant, c if the batch per rank is constant
    communication   2 (N - 1) / N G / bandwidth + 2 log2(N) latency (volume of a ring, depth of a tree, as in NCCL)
    waiting         compute (E[max of N NFE] / E[NFE] - 1), drawn from the NFE of the measured steps: each rank solves
                    its own share, and all wait for the slowest

Communication does not overlap with computation: gradients are sent after all are computed, see
flowtrain.training.update.average_gradients.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import machine, median_and_spread, progress, table

import flowtrain

RANKS = (8, 64, 512)
# bytes per second, seconds
LINKS = {"NVLink and InfiniBand, 25 GB/s, 5 us": (25e9, 5e-6), "Ethernet, 10 Gbit/s, 50 us": (1.25e9, 50e-6)}
SETUPS = {
    "moons": ["model=ffjord", "data=moons", "trainer.batch_size=512"],
    "mnist": ["model=realnvp", "data=mnist", "trainer.batch_size=32"],
}
# the first steps of a run, which are not timed
WARM = 5


class Measured(NamedTuple):
    """One run: seconds of each timed step, NLL and NFE of every step, and the number of parameters."""

    seconds: list[float]
    nll: list[float]
    nfe: list[int]
    parameters: int


def run(setup: str, steps: int, processes: int, threads: int) -> Measured:
    keys = [*SETUPS[setup], f"trainer.steps={steps}", f"trainer.val_every={steps}", "trainer.log_every=1"]
    keys += ["trainer.plot_every=null", "data.n_test=100", "data.n_val=100", f"threads={threads}", "solver.warmup=0"]
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, "-m", "flowtrain", *keys, f"hydra.run.dir={folder}/r"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"stopped: {' '.join(command[1:])} failed:\n{done.stderr}")
        lines = Path(folder, "r/metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
        parameters = sum(p.numel() for p in flowtrain.load(f"{folder}/r").parameters())
    nfe = [row["nfe_forward"] + row["nfe_backward"] for row in rows if row["nfe_forward"] is not None]
    return Measured([row["step_seconds"] for row in rows[WARM:]], [row["nll"] for row in rows], nfe[WARM:], parameters)


def measure(setup: str, steps: int, repeats: int) -> Measured:
    """Prints the measurements of a setup and returns one for a single process."""
    kinds = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread": (2, 1), "1 process, 2 threads": (1, 2)}
    found: dict[str, list[Measured]] = {name: [] for name in kinds}
    for i in range(repeats):
        for name, (processes, threads) in kinds.items():
            progress(f"{setup}: {name}, {i + 1} of {repeats}")
            found[name].append(run(setup, steps, processes, threads))
    alone = found["1 process, 1 thread"]
    rows = []
    for name, runs in found.items():
        times = [statistics.median(r.seconds) for r in runs]
        ratios = [statistics.median(a.seconds) / t for a, t in zip(alone, times, strict=True)]
        apart = max(abs(a - b) for a, b in zip(alone[0].nll, runs[0].nll, strict=True))
        step, speed = median_and_spread([1e3 * t for t in times]), median_and_spread(ratios, 2)
        rows.append([name, *(f"{middle} ({spread})" for middle, spread in (step, speed)), f"{apart:.1e}"])
    print(f"\n{setup}: {' '.join(SETUPS[setup])}, {steps} steps, {alone[0].parameters:,} parameters\n")
    print(table(("", "step [ms]", "speed", f"NLL difference in {steps} steps"), rows))
    return alone[0]


def print_prediction(setup: str, one: Measured) -> None:
    compute, size = statistics.median(one.seconds), 4 * one.parameters
    rows = []
    for link, (bandwidth, latency) in LINKS.items():
        for n in RANKS:
            sent = 2 * (n - 1) / n * size / bandwidth + 2 * math.log2(n) * latency
            slowest = expected_max(one.nfe, n)
            held, own = (share * slowest + sent for share in (compute / n, compute))
            cells = [1e3 * compute / n, 1e3 * sent, slowest - 1, compute / held / n, compute / own]
            rows.append([link, str(n), *(f"{c:.3g}" for c in cells[:2]), *(f"{c:.0%}" for c in cells[2:])])
    print(f"\n{setup}, predicted: gradient {size / 1e6:.2f} MB, step {1e3 * compute:.1f} ms on one rank\n")
    head = ("link", "ranks", "compute of a share [ms]", "communication [ms]", "waiting", "efficiency, fixed batch")
    print(table((*head, "efficiency, fixed batch per rank"), rows))


def expected_max(nfe: list[int], n: int) -> float:
    """Returns E[max of n] / E[one] for draws from the measured NFE, or 1 if nothing is solved."""
    if not nfe:
        return 1.0
    draw = random.Random(0)
    return statistics.mean(max(draw.choices(nfe, k=n)) for _ in range(2000)) / statistics.mean(nfe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SETUPS)
    parser.add_argument("--steps", type=int, default=40, help=f"more than {WARM}")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.steps <= WARM:
        parser.error(f"--steps {args.steps}: give more than {WARM}, because the first {WARM} steps are not timed")
    print(machine())
    for setup in [args.only] if args.only else SETUPS:
        print_prediction(setup, measure(setup, args.steps, args.repeats))


if __name__ == "__main__":
    main()
