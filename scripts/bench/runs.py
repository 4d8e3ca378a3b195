"""Test NLL, KL, NFE and seconds of any `flowtrain` commands, over seeds.

    python scripts/bench/runs.py experiment=rings experiment=pinwheel --seeds 5
    python scripts/bench/runs.py "data=moons" "data=moons regularizer=rnode"

Each argument is the command line of one `flowtrain`, which runs once per seed. The seeds begin at 11, because no
setting was tuned on them. The script prints a Markdown table with a row for each command. The row has the median and
the range over seeds of the test NLL, the KL (if the true density is known), the NFE at evaluation, and the seconds of
training with validations and pictures. `--jobs` is the number of simultaneous runs, each with one thread.
"""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import machine, median_and_spread, progress, run_flowtrain, table

FIRST_SEED = 11
HEAD = ("flowtrain", "NLL (nats)", "KL (nats)", "least to most", "NFE", "seconds", "least to most")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", help="overrides for flowtrain, all of a command in one argument")
    parser.add_argument("--seeds", type=int, choices=range(1, 1001), default=3, metavar="N", help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="number of simultaneous runs"
    )
    return parser.parse_args()


def measure(command: str, seed: int, run_dir: Path) -> dict[str, Any]:
    run_flowtrain(run_dir, *command.split(), f"seed={seed}", "threads=1")
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    progress(f"{command} seed={seed}: NLL {result['nll']:.4f}, {result['train_seconds']:.0f} s, {run_dir}")
    return result


def row(command: str, results: list[dict[str, Any]]) -> list[str]:
    def over(key: str, digits: int) -> tuple[str, str]:
        return median_and_spread([r[key] for r in results if r[key] is not None], digits)

    # the spreads of NLL and KL agree up to the noise of the test set
    kl, spread = over("kl", 4) if results[0]["kl"] is not None else ("-", over("nll", 3)[1])
    return [command, over("nll", 3)[0], kl, spread, over("nfe", 0)[0], *over("train_seconds", 0)]


def main() -> None:
    args = arguments()
    out = Path(tempfile.mkdtemp(prefix="flowtrain-runs-"))
    jobs = [
        (command, seed) for command in args.commands for seed in range(args.first_seed, args.first_seed + args.seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda job: measure(*job[1], out / str(job[0])), enumerate(jobs)))
    print(machine())
    print(f"\n{args.seeds} seeds each, {args.jobs} simultaneous runs, one thread per run\n")
    found = {c: [r for (name, _), r in zip(jobs, results, strict=True) if name == c] for c in args.commands}
    print(table(HEAD, [row(command, each) for command, each in found.items()]))


if __name__ == "__main__":
    main()
