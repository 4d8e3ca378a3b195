"""The training loop of this checkout compared with another checkout of flowtrain, in turns, and its largest costs.

    git worktree add /tmp/before COMMIT
    python scripts/bench/training_steps.py --other /tmp/before
    python scripts/bench/training_steps.py --other /tmp/before --cases nsf maf --turns 40
    python scripts/bench/training_steps.py --other /tmp/before --cases nsf --set model.dropout=0.2
    python scripts/bench/training_steps.py --profile nsf    # the operations with the largest CPU time

Each checkout trains the same run in a process of its own, on one thread. The processes take turns of a few steps, so
that only one of them computes. The measured time is the CPU time of the process (`time.process_time`), which hardly
depends on other jobs. Everything in the loop counts (batches, metrics, solver guard), except validations and pictures.
The ratio is the time of the other checkout divided by the time of this checkout, in the same turn. Both checkouts make
the same steps, so the last column tells whether their losses are equal to the last bit.

With `--data DIR`, DIR contains gas/train.csv and mnist/*-ubyte.gz.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import keep_freed_memory, machine, progress, table, use_threads

ROOT = Path(__file__).resolve().parents[2]
# FFJORD and Glow are measured with Adam, because older commits have no Muon
ADAM = {"trainer.optimizer": "adam", "trainer.lr": 0.015, "trainer.batch_size": 512}
# Glow is measured with the affine couplings that older commits have by default
AFFINE = {"model.coupling": "affine", "trainer.optimizer": "adam", "trainer.lr": 0.004}
# settings, steps before the first turn, steps of a turn
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "realnvp": ({"model": "realnvp", "data": "gas"}, 20, 20),
    "nsf": ({"model": "nsf", "data": "gas"}, 20, 10),
    "maf": ({"model": "maf", "data": "gas"}, 10, 10),
    "flow_matching": ({"data": "moons", "objective": "flow_matching"}, 50, 100),
    "ffjord": ({"data": "moons", **ADAM}, 300, 10),
    "glow": ({"model": "glow", "data": "mnist", **AFFINE}, 3, 2),
    "realnvp moons": ({"model": "realnvp", "data": "moons"}, 50, 30),
}
# more steps than any measurement makes, so that schedules hardly move
STEPS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="another checkout")
    parser.add_argument("--cases", nargs="*", default=[*CASES][:-1], choices=list(CASES))
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--profile", choices=list(CASES), help="a case whose operations are listed")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of each case")
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker or args.profile:
        use_threads(1)
        keep_freed_memory()
        work(args.worker or args.profile, args.data.resolve(), args.set, bool(args.profile))
        return
    if args.other is None:
        parser.error("give --other, a checkout to compare with, or --profile")
    rows = []
    for case in args.cases:
        mine, its, equal = compare(case, [ROOT, args.other.resolve()], args.data.resolve(), args.set, args.turns)
        ratios = sorted(b / a for a, b in zip(mine, its, strict=True))
        spread = f"{ratios[len(ratios) // 10]:.2f} to {ratios[-1 - len(ratios) // 10]:.2f}"
        times = [f"{statistics.median(one):.2f}" for one in (its, mine)]
        rows.append([case, *times, f"{statistics.median(ratios):.2f}", spread, "yes" if equal else "no"])
        print(rows[-1], file=sys.stderr)
    print(f"{machine()}\n")
    print(table(["case", "other, ms", "this, ms", "ratio", "10% to 90%", "equal losses"], rows))


def compare(
    case: str, roots: list[Path], data: Path, more: list[str], turns: int
) -> tuple[list[float], list[float], bool]:
    """Returns the milliseconds of CPU time for each step, by turn, of both checkouts; and whether losses are equal."""
    command = [sys.executable, __file__, "--worker", case, "--data", str(data), "--set", *more]
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for root in roots
    ]
    found: list[list[list[str]]] = [[] for _ in roots]
    for turn in range(-1, turns):
        # each checkout is first in every second turn
        for i in (0, 1) if turn % 2 else (1, 0):
            worker = workers[i]
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = worker.stdout.readline().split()
            if not answer:
                raise SystemExit(f"stopped: {case} failed in {roots[i]}")
            if turn >= 0:
                found[i].append(answer)
        progress(f"{case}: turn {turn + 1} of {turns}")
    for worker in workers:
        worker.kill()
        worker.wait()
    mine, its = ([float(ms) for ms, _ in one] for one in found)
    return mine, its, [loss for _, loss in found[0]] == [loss for _, loss in found[1]]


def work(case: str, data: Path, more: list[str], profile: bool) -> None:
    """Trains one case. Waits for a line of standard input before each turn, and answers with milliseconds and loss."""
    settings, warm, steps = CASES[case]
    settings = {**settings, **{key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in more)}}
    if settings["data"] == "gas":
        settings |= {"data": "array", "data.path": str(data / "gas" / "train.csv")}
    if settings["data"] == "mnist":
        settings["data.root"] = str(data / "mnist")
    trainer = trainer_of(settings)
    update, take, losses = trainer.update, trainer.update.take, []

    def taken(*arguments: Any) -> Any:
        row, batch = take(*arguments)
        losses.append(row.get("matching", row["nll"]))
        return row, batch

    update.take = taken
    begun, profiler = 0.0, None

    def after_step() -> None:
        nonlocal begun, profiler
        step = trainer.step
        if step < warm or (step - warm) % steps:
            return
        if profile:
            profiler = profiled(profiler, step - warm, 5 * steps)
            return
        spent = time.process_time() - begun
        if step > warm:
            print(f"{1e3 * spent / steps:.6f} {float(losses[-1]).hex()}", flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        begun = time.process_time()

    trainer.after_step = after_step
    trainer.fit()


def trainer_of(settings: dict[str, Any]) -> Any:
    """Builds the trainer of a run with these settings, without validations and pictures during the measured steps."""
    from flowtrain.runs.compose import compose
    from flowtrain.runs.prepare import prepare

    quiet = {
        "trainer.steps": STEPS,
        "trainer.plot_every": None,
        "trainer.val_every": STEPS,
        "trainer.val_early": False,
        "threads": 1,
        "device": "cpu",
    }
    # the recipe of a table sets these
    quiet = {key: value for key, value in quiet.items() if settings["data"] != "array" or key != "trainer.val_every"}
    run_dir = Path(tempfile.mkdtemp(prefix="training_steps_"))
    return prepare(compose({**settings, **quiet}).config, run_dir, None, (), None, time.perf_counter())


def profiled(profiler: Any, done: int, steps: int) -> Any:
    """Starts the profiler, or prints its table after some steps and ends the process."""
    import torch

    if profiler is None:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        profiler.__enter__()
    elif done >= steps:
        profiler.__exit__(None, None, None)
        print(f"{done} steps")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
        raise SystemExit
    return profiler


if __name__ == "__main__":
    main()
