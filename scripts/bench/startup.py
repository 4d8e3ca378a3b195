"""Measures the time of help and of refused commands, beside `python -c "import torch"`.

In each round, `import torch` and every command run once, one after another. The ratio of a round is the time of a
command divided by the time of `import torch` in the same round. On a machine that other programs use, wall time says
little, so the time of the CPU (user and system) is measured, too.

    python scripts/bench/startup.py --rounds 7
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

COMMANDS = (
    ("flowtrain", "model=nope"),
    ("flowtrain", "trainer.stepss=3"),
    ("flowtrain", "--help"),
    ("flowtrain", "--help", "all"),
    ("flowtrain", "runs"),
    ("floweval",),
    ("floweval", "nope"),
    ("floweval", "--help"),
    ("flowsample", "x", "y"),
    ("flowsample", "--help"),
    ("flowexport", "nope"),
    ("flowexport", "--help"),
)
# what a console script does, for checkouts that are not installed
SCRIPT = "import sys; from flowtrain.cli import entry_points; getattr(entry_points, sys.argv[0])()"


def program(command: Sequence[str]) -> list[str]:
    """Returns the arguments of the process that runs a command."""
    name, *arguments = command
    return [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; {SCRIPT}", *arguments]


def measured(program: Sequence[str], folder: str) -> tuple[float, float]:
    """Runs a program in a folder. Returns its wall time and its CPU time in seconds."""
    begun = time.perf_counter()
    process = subprocess.Popen(program, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        raise SystemExit(f"{' '.join(program)} ended with exit code {process.returncode}")
    return seconds, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: 7)")
    arguments = parser.parse_args()
    programs = {" ".join(command): program(command) for command in COMMANDS}
    torch_alone = [sys.executable, "-c", "import torch"]
    alone: list[tuple[float, float]] = []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        # the first round reads the files into the cache of the disk, and is not counted
        for i in range(arguments.rounds + 1):
            base = measured(torch_alone, folder)
            times = {name: measured(each, folder) for name, each in programs.items()}
            if i > 0:
                alone.append(base)
                for name, taken in times.items():
                    found[name].append(taken)
    wall, cpu = (statistics.median(seconds) for seconds in zip(*alone, strict=True))
    print(f"import torch: {wall:.2f} s, {cpu:.2f} s of CPU; load {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds\n")
    print("| command | CPU (s) | CPU, ratio (least to most) | wall (s) | wall, ratio (least to most) |")
    print("|---|---:|---|---:|---|")
    for name, taken in found.items():
        cells = [f"`{name}`"]
        for which in (1, 0):
            ratios = [one[which] / base[which] for one, base in zip(taken, alone, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells += [f"{statistics.median(one[which] for one in taken):.2f}", spread]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
