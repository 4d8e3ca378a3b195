"""Trains on a file of 50 million rows of 8 columns, 1.6 GB, with memory that does not grow with the file.

    python scripts/bench/big_data.py                        # writes the file to a temporary folder; a few minutes
    python scripts/bench/big_data.py --rows 5000000 --steps 200
    python scripts/bench/big_data.py --model affine --batch 32768 --steps 3000   # two epochs over all rows

For the whole file and for a tenth of it, the script prints the largest resident memory of `flowtrain` in a new process,
the seconds until its first step, and the median time of a step. For the tenth, it also measures a run that reads the
whole file into memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine, peak_bytes, progress, table
from numpy.lib.format import write_array_header_1_0

try:
    import resource
except ImportError as e:
    raise SystemExit("this script needs Python's module resource, which this system lacks") from e

COLUMNS = 8
# rows written at once
PART = 2**18


def write(path: Path, rows: int) -> None:
    """Writes eight columns with a nonlinear dependence between neighbours."""
    progress(f"writing {rows:,} rows, {4 * COLUMNS * rows / 1e9:.2f} GB")
    rng = np.random.default_rng(0)
    # the file is not memory-mapped, because mapped pages would count as memory of this process and of its children
    with path.open("wb") as out:
        write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (rows, COLUMNS)})
        for start in range(0, rows, PART):
            x = rng.standard_normal((min(PART, rows - start), COLUMNS), np.float32)
            x[:, 1:] += 0.5 * x[:, :-1] ** 2
            x.tofile(out)


def run(path: Path, folder: Path, model: str, steps: int, batch: int, *keys: str) -> tuple[float, float, float]:
    """Returns the largest resident memory in GiB, seconds until training began, and median seconds of a step."""
    keys = (*keys, "data=array", f"data.path={path}", f"model={model}", f"trainer.steps={steps}")
    keys += (
        f"trainer.batch_size={batch}",
        "trainer.log_every=1",
        f"trainer.val_every={steps}",
        "trainer.val_size=5000",
    )
    keys += (
        "trainer.plot_every=null",
        "data.val_fraction=0.001",
        "data.test_fraction=0.001",
        f"hydra.run.dir={folder}",
    )
    begun = time.time()
    child = subprocess.Popen([sys.executable, "-m", "flowtrain", *keys], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit("stopped: flowtrain failed with the message above")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["split"] == "train"]
    log = (folder / "flowtrain.log").read_text().splitlines()
    # the description of the run, which is printed when training begins
    (ready,) = (line[:19] for line in log if " INFO flowtrain: " in line)
    start = time.mktime(time.strptime(ready, "%Y-%m-%d %H:%M:%S")) - begun
    return peak_bytes(used) / 2**30, start, statistics.median(row["step_seconds"] for row in trained[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--model", default="realnvp")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, tenth = folder / "whole.npy", folder / "tenth.npy"
        write(whole, args.rows)
        write(tenth, args.rows // 10)
        for words, path, keys in (
            (f"{args.rows:,} rows, streamed", whole, ["data.memory_map=true"]),
            (f"{args.rows // 10:,} rows, streamed", tenth, ["data.memory_map=true"]),
            (f"{args.rows // 10:,} rows in memory", tenth, ["data.memory_map=false"]),
        ):
            progress(words)
            memory, start, step = run(path, folder / f"run{len(found)}", args.model, args.steps, args.batch, *keys)
            size = path.stat().st_size / 1e9
            found.append([words, f"{size:.2f} GB", f"{memory:.2f} GiB", f"{start:.1f} s", f"{1e3 * step:.2f} ms"])
    print(f"{machine()}\n")
    print(f"{args.model}, {args.steps} steps of {args.batch} rows: {args.steps * args.batch / args.rows:.2f} epochs\n")
    print(table(("", "file", "resident memory", "start", "step"), found))


if __name__ == "__main__":
    main()
