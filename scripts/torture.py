"""Kills and damages runs, gives flowtrain invalid input, and counts failures. The expected number of failures is zero.

    python scripts/torture.py                                        # at most half an hour
    python scripts/torture.py --kills 500 --corruptions 20000 --configs 5000 --arrays 20000 --minutes 600
    python scripts/torture.py --kills 0 --configs 0                  # 0 skips a part

- kills: training runs of realnvp and ffjord are killed with SIGKILL and resumed. The random moments are during startup,
  training, validation, the writing of a checkpoint, and the final evaluation. metrics.jsonl, last.pt, best.pt and
  result.json of every completed run must equal the files of an uninterrupted run bit by bit, except for seconds.
- corruptions: checkpoints are loaded after bits were flipped, or bytes were removed, zeroed, inserted or swapped.
Damaged checkpoints must be refused in one line or give the original flow bit by bit.
- configs: random options of every config group, and random keys with valid and invalid values. Two steps must be
  trained, or one line must explain the error.
- arrays: damaged and unusual .npy, .npz and text files, with the same rule.

All parts except the kills run each case in a forked process with limits on memory and time, so a crash is counted and
does not stop the script. All random choices depend on --seed only, except for the exact moment of a kill. --minutes
limits the total time: a part that runs out of time reports how many cases it tried. The script prints a Markdown table.
The report lists each failure with the command or the file that reproduces it. With failures, the exit code is 1.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not hasattr(os, "fork"):
    raise SystemExit("this script needs os.fork, which this system lacks: run it on Linux or macOS")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]
# set before torch is imported, because a thread pool must not be forked. One thread is enough for these small problems
os.environ["OMP_NUM_THREADS"] = "1"

from common import machine, table  # noqa: E402
from harm.arrays import arrays  # noqa: E402
from harm.checkpoints import corruptions  # noqa: E402
from harm.configs import TEACHER, configs, write_files  # noqa: E402
from harm.kills import MODELS, RUN, kills, whole_run  # noqa: E402
from harm.part import Part  # noqa: E402

HEAD = ("part", "tried", "outcomes", "failures")
# the end of each part, as a share of the total time
SHARES = {"kills of realnvp": 0.3, "kills of ffjord": 0.6, "corruptions": 0.68, "configs": 0.9, "array files": 1.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=count, default=50, metavar="N", help="number of kills of each model")
    parser.add_argument("--corruptions", type=count, default=500, metavar="N")
    parser.add_argument("--configs", type=count, default=200, metavar="N")
    parser.add_argument("--arrays", type=count, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="limit of the total time")
    return parser.parse_args()


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return value


def main() -> int:
    args = arguments()
    begun = time.monotonic()
    out = Path(tempfile.mkdtemp(prefix="flowtrain-torture-"))
    os.environ["FLOWTRAIN_DATA"] = str(write_files(out))
    wholes = {model: whole_run([*RUN, *keys], out / f"whole_{model}") for model, keys in MODELS.items()}
    (out / TEACHER).symlink_to(wholes["ffjord"].folder)
    files = [w.folder / "checkpoints" / name for w in wholes.values() for name in ("last.pt", "best.pt")]
    tortures: dict[str, tuple[int, Callable[[Part], None]]] = {
        **{f"kills of {model}": (args.kills, partial(kills, whole)) for model, whole in wholes.items()},
        "corruptions": (args.corruptions, partial(corruptions, files)),
        "configs": (args.configs, configs),
        "array files": (args.arrays, arrays),
    }
    parts = []
    for name, (n, torture) in tortures.items():
        until = begun + 60 * args.minutes * SHARES[name]
        part = Part(name, n, until, out, random.Random(f"{args.seed} {name}"))
        torture(part)
        parts.append(part)
    print(machine())
    print(f"\n{(time.monotonic() - begun) / 60:.0f} minutes, seed {args.seed}\n")
    print(table(HEAD, [part.row() for part in parts if part.wanted]))
    wrong = [f"- {part.name}: {words}" for part in parts for words in part.wrong]
    if not wrong:
        shutil.rmtree(out)
        return 0
    print("\n".join([f"\nFailures, kept in {out}:\n", *wrong]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
