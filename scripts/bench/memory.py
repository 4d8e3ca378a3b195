"""Peak memory of one training step against the number of solver steps, with a convolutional field, on the CPU.

    python scripts/bench/memory.py                            # rk4, 4 to 64 steps, batch 16
    python scripts/bench/memory.py --batch 8 --steps 4 16 64 --only replay

Each cell is measured in a new process. The process first makes a training step with two solver steps on two rows,
because torch loads some of its code at the first use. Then it makes the measured step. The script prints a Markdown
table of the increase of the peak resident memory (ru_maxrss) in MiB. A value is the median of --repeats processes, with
the spread if they differ by more than 5 %. glibc returns large blocks at once (MALLOC_MMAP_THRESHOLD_), so that only
live memory counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

from common import cores, machine, peak_bytes, progress, table, use_threads

try:
    import resource
except ImportError as e:
    raise SystemExit("this script needs Python's module resource, which this system lacks") from e

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", default="", help="engines whose name contains this word, such as replay")
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--hidden", default="64,64,64")
    parser.add_argument("--activation", default="softplus")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "STEPS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def peak() -> float:
    """Returns the peak resident memory of this process in MiB."""
    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) / 2**20


def measure(args: argparse.Namespace) -> None:
    """Runs in the child process: prints the increase of the peak by one step in MiB, or why it was not measured."""
    use_threads(args.threads)
    from conv import contestants, conv_problem
    from steps import Skip

    from flowtrain.utils.errors import FlowtrainError

    name, steps = args.child
    make = contestants()[name]
    shape = {"side": args.side, "channels": 1, "hidden": args.hidden, "activation": args.activation, "head": 1.0}
    try:
        make(conv_problem(batch=2, **shape, method="rk4", step_size=1 / 2))()
        step = make(conv_problem(batch=args.batch, **shape, method="rk4", step_size=1 / int(steps)))
        before = peak()
        step()
    except (Skip, FlowtrainError) as e:
        print(f"left out: {str(e).splitlines()[0]}")
        return
    print(f"{peak() - before:.1f}")


def cell(name: str, steps: int, args: argparse.Namespace) -> str:
    """Returns the measurement of a child process, or its failure."""
    keys = ("batch", "side", "hidden", "activation", "threads")
    options = [word for key in keys for word in (f"--{key}", str(getattr(args, key)))]
    command = [sys.executable, __file__, *options, "--child", name, str(steps)]
    found: list[float] = []
    for _ in range(args.repeats):
        done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            # the kernel kills processes that exceed the memory
            return "killed" if done.returncode == -9 else f"failed ({done.returncode})"
        answer = done.stdout.strip().splitlines()[-1]
        if answer.startswith("left out"):
            return answer
        found.append(float(answer))
        progress(f"{name}, {steps} steps: {answer} MiB")
    return words(found)


def words(found: Sequence[float]) -> str:
    median = statistics.median(found)
    differ = max(found) - min(found) > 0.05 * median
    return f"{median:.0f}" + (f" ({min(found):.0f} to {max(found):.0f})" if differ else "")


def main() -> None:
    args = arguments()
    if args.child:
        return measure(args)
    from conv import contestants

    rows, skipped = [], []
    for name in (n for n in contestants() if args.only in n):
        row = [name]
        for steps in args.steps:
            row.append(cell(name, steps, args))
            if row[-1].startswith("left out"):
                skipped.append(f"{name} {row[-1]}")
                break
        else:
            rows.append(row)
    print(f"{machine()}; {args.threads} threads")
    print(
        f"\nMiB above the start of a training step: 1x{args.side}x{args.side}, batch {args.batch}, hidden "
        f"{args.hidden.replace(',', '-')}, {args.activation}, rk4\n"
    )
    print(table(["engine", *(f"{n} steps" for n in args.steps)], rows))
    print("\n".join(skipped))
    return None


if __name__ == "__main__":
    main()
