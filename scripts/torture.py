"""Kills, damages and misleads flowtrain, and counts what is lost: nothing should be.

    python scripts/torture.py                                        # half an hour at the most
    python scripts/torture.py --kills 500 --corruptions 20000 --configs 5000 --arrays 20000 --minutes 600
    python scripts/torture.py --kills 0 --configs 0                  # 0 leaves a part out

- kills: a training run of realnvp and one of ffjord are killed (SIGKILL) at random moments and resumed each time: in
  start-up, training, validation, while a checkpoint is written, in the final evaluation. Whenever a run has ended, what
  it wrote is compared to the last bit with a run that was never stopped: metrics.jsonl, last.pt, best.pt and
  result.json, but for seconds.
- corruptions: checkpoints with flipped bits, cut short, zeroed, with bytes inserted, swapped, ... are loaded: refused
  with one line, or the flow is the right one to the bit.
- configs: random options of every config group, random keys with sane and insane values: two steps are trained, or one
  line says what was wrong.
- arrays: damaged and odd .npy, .npz and text files, likewise.

All but the kills run in a forked process each, with limits on memory and time, so that a crash is counted and ends
nothing else. What is drawn depends on --seed alone, but for where exactly a kill falls. --minutes bounds the whole: a
part whose time is over says how much it has tried. Prints a Markdown table; what went wrong follows it, with the
command or the file that shows it, and makes the exit code 1.
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
    raise SystemExit("this script needs os.fork, which this system does not have: run it on Linux or macOS")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]
# before torch is imported: no pool of threads may be there to be forked, and one is all that such sizes need
os.environ["OMP_NUM_THREADS"] = "1"

from common import machine, table  # noqa: E402
from harm.arrays import arrays  # noqa: E402
from harm.checkpoints import corruptions  # noqa: E402
from harm.configs import TEACHER, configs, write_files  # noqa: E402
from harm.kills import MODELS, RUN, kills, whole_run  # noqa: E402
from harm.part import Part  # noqa: E402

HEAD = ("harm", "tried", "what came of it", "lost or wrong")
# by when each part is over, as a share of the whole time
SHARES = {"kills of realnvp": 0.3, "kills of ffjord": 0.6, "corruptions": 0.68, "configs": 0.9, "array files": 1.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=count, default=50, metavar="N", help="of each model")
    parser.add_argument("--corruptions", type=count, default=500, metavar="N")
    parser.add_argument("--configs", type=count, default=200, metavar="N")
    parser.add_argument("--arrays", type=count, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="of the whole, at the most")
    return parser.parse_args()


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("give 0 or more")
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
    print("\n".join([f"\nWrong, and kept in {out}:\n", *wrong]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
