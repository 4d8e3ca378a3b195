"""Seconds of training until the KL to the true density is first below 0.05, 0.02 and 0.01 nats, over seeds.

    python scripts/bench/time_to.py                                       # moons, the defaults, five seeds
    python scripts/bench/time_to.py --data rings solver.method=bosh3 solver.rtol=1e-3
    python scripts/bench/time_to.py model=realnvp --seeds 3 --gaps 0.1 0.05
    python scripts/bench/time_to.py --cpu --every 100 threads=1           # on a machine with other jobs

The script trains one `flowtrain` run per seed with the overrides, one after another. The seeds begin at 11, because no
setting was tuned on them. KL is the mean of log p_true - log p_model on the validation set, so it does not contain the
noise of the set's entropy. The model has the weights that the run validates, which are averaged weights if trainer.ema
is set. Seconds come from the run's own clock (metrics.jsonl), so they include validations. With --cpu, they are seconds
of CPU time, which depend less on other jobs than wall time. A validation every --every steps limits the resolution. The
script prints a Markdown table with one row per gap: median and range of the seconds, median steps, and the number of
seeds that reached the gap.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import machine, median_and_spread, progress, run_flowtrain, table

FIRST_SEED = 11


@dataclass(frozen=True)
class Run:
    """Validations (seconds, step, KL) in order, seconds of the whole training, and the KL on the test set."""

    validations: list[tuple[float, int, float]]
    seconds: float
    kl: float

    def reached(self, gap: float) -> tuple[float, int] | None:
        """Returns (seconds, step) of the first validation below `gap`, or None."""
        return next(((seconds, step) for seconds, step, kl in self.validations if kl < gap), None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides for flowtrain, such as solver.rtol=1e-4")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--data", default="moons", help="a toy with a known density")
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.05, 0.02, 0.01], help="KL thresholds in nats")
    parser.add_argument("--every", type=int, default=20, help="steps between validations")
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of wall time, for threads=1")
    # overrides may also follow options
    return parser.parse_intermixed_args()


def entropy_on_validation(run_dir: Path) -> float:
    """Returns -mean log p_true on the run's validation set. The validation NLL minus this value is the KL."""
    from flowtrain.runs import build
    from flowtrain.training import checkpoint, checkpoint_files

    data = build.build_data(checkpoint.load(checkpoint_files.find(run_dir))["config"])
    log_p = data.log_prob(data.val)
    if log_p is None:
        raise SystemExit("the true density of this data is unknown: choose a toy with --data")
    return -log_p.mean().item()


def train(seed: int, run_dir: Path, args: argparse.Namespace) -> Run:
    keys = [f"data={args.data}", f"seed={seed}", f"trainer.val_every={args.every}", "trainer.plot_every=null"]
    run_flowtrain(run_dir, *keys, *args.overrides, cpu_time=args.cpu)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    least = entropy_on_validation(run_dir)
    validations = [(r["seconds"], r["step"], r["nll"] - least) for r in rows if r["split"] == "val"]
    result = json.loads((run_dir / "result.json").read_text())
    return Run(validations, result["train_seconds"], result["kl"])


def summary(runs: list[Run], gaps: list[float]) -> str:
    rows = []
    for gap in gaps:
        reached = [r for r in (run.reached(gap) for run in runs) if r is not None]
        steps = f"{statistics.median(s for _, s in reached):.0f}" if reached else "-"
        rows.append([f"{gap:g}", *median_and_spread([s for s, _ in reached]), steps, f"{len(reached)} of {len(runs)}"])
    return table(["KL under (nats)", "seconds", "least to most", "steps", "seeds"], rows)


def bracket(values: list[float], digits: int) -> str:
    median, spread = median_and_spread(values, digits)
    return f"{median} ({spread})"


def main() -> None:
    args = arguments()
    out = Path(tempfile.mkdtemp(prefix="flowtrain-time-to-"))
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        runs.append(train(seed, out / str(seed), args))
        progress(f"seed {seed}: {runs[-1].seconds:.1f} s, test KL {runs[-1].kl:.4f}")
    print(machine())
    of = "CPU time" if args.cpu else "wall time"
    print(f"\nflowtrain data={args.data} {' '.join(args.overrides)}, validation every {args.every} steps, {of}\n")
    print(summary(runs, args.gaps))
    seconds, kl = [r.seconds for r in runs], [r.kl for r in runs]
    print(
        f"\nwhole training, seconds (least to most): {bracket(seconds, 1)}; "
        f"test KL of the best checkpoint: {bracket(kl, 4)}"
    )
    progress(f"runs: {out}")


if __name__ == "__main__":
    main()
