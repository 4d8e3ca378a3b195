"""C2ST of posteriors p(theta | x) fitted to simulations, on four tasks of the SBI benchmark.

    python scripts/bench/sbi.py --out sbi.jsonl                   # 4 tasks, 3 seeds; some hours
    python scripts/bench/sbi.py --tasks slcp --seeds 0 --out sbi.jsonl
    python scripts/bench/sbi.py --seeds 100 --observations        # NLL of new simulations only, to choose settings
    python scripts/bench/sbi.py --seeds 100 --simulated           # C2ST against exact posteriors of new simulations
    python scripts/bench/sbi.py --check                           # C2ST of exact posteriors, which should be 0.5
    python scripts/bench/sbi.py --report sbi.jsonl                # prints Markdown

For each task and seed, `--members` flows are fitted to the same `--simulations` pairs (theta, x) with `flowtrain.fit`,
with different weights and validation sets. Their mixture with equal weights is the posterior. theta is mapped to real
numbers by y = Phi^-1((theta / bound + 1) / 2), so that the prior is a standard normal distribution and no sample leaves
its box. The settings in RECIPES were chosen on new simulations (NLL, and C2ST against exact posteriors), with other
seeds than the reported ones. The observations of the benchmark were not used for this.

C2ST compares 10,000 samples with the reference posterior, see `sbi_tasks.c2st`. NLL is the mean of
-log p(theta | x) over 5,000 new simulations, in nats. Each run appends a line to the results file. Runs in the file are
not repeated. Needs scikit-learn and the files of the benchmark, in ../shared/data/sbibm or FLOWTRAIN_DATA/sbibm.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from common import lines, machine, progress, table, use_threads

OBSERVATIONS = (1, 2, 3)
SAMPLES, NEW = 10_000, 5000
# settings that differ from the defaults for tables, for each task
COMMON: dict[str, Any] = {"trainer.steps": 2000, "trainer.val_early": False}
RECIPES: dict[str, dict[str, Any]] = {
    "two_moons": {"model": "maf", **COMMON},
    # smaller batches and dropout, because larger networks would overfit
    "slcp": {
        "model": "maf",
        "model.bins": 8,
        "model.dropout": 0.2,
        "model.hidden": [64, 64],
        "model.input_bound": None,
        "model.layers": 5,
        "trainer.batch_size": 256,
        "trainer.ema": 0.99,
        "trainer.lr": 0.003,
        "trainer.optimizer": "adamw",
        "trainer.weight_decay": 0.1,
        **COMMON,
    },
    "gaussian_mixture": {"model": "nsf", **COMMON},
    # a smooth network and strong weight decay, because the posterior changes slowly with x
    "gaussian_linear_uniform": {
        "model": "maf",
        "model.layers": 1,
        "model.bins": 8,
        "model.mixing": "alternate",
        "model.activation": "swish",
        "model.input_bound": None,
        "trainer.batch_size": 256,
        "trainer.ema": 0.99,
        "trainer.lr": 0.003,
        "trainer.optimizer": "adamw",
        "trainer.weight_decay": 1.0,
        **COMMON,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--observations", nargs="*", type=int, default=list(OBSERVATIONS))
    parser.add_argument("--simulated", action="store_true", help="simulates observations instead of the benchmark's")
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--members", type=int, default=1, help="the number of flows in the mixture")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that override the recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--check", action="store_true", help="uses exact posteriors instead of flows")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="prints the table of these results")
    args = parser.parse_args()
    if args.report:
        print(report(lines(args.report)))
        return
    use_threads(args.threads)
    rows = lines(args.out) if args.out else []
    done = {(row["task"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for name in args.tasks:
            if (name, seed) in done:
                continue
            row = {"task": name, "seed": seed, **(check if args.check else measure)(name, seed, args)}
            rows.append(row)
            progress(json.dumps(row))
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(f"{machine()}\n\n{report(rows)}")


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fits the posterior of a task and returns its NLL, its C2ST for each observation, and seconds."""
    import numpy as np
    import torch
    from sbi_tasks import TASKS, c2st, observation, simulated

    from flowtrain.models.ensemble import Ensemble

    task, rng = TASKS[name], np.random.default_rng(seed)
    theta = task.prior(args.simulations, rng)
    x = task.simulate(theta, rng)
    begun = time.perf_counter()
    settings = {**RECIPES[name], **{k: yaml.safe_load(v) for k, v in (pair.split("=", 1) for pair in args.set)}}
    flow = Ensemble([fit(task.unbounded(theta), x, seed, member, settings) for member in range(args.members)])
    seconds = time.perf_counter() - begun
    # the same new simulations for all seeds
    new = np.random.default_rng(10**6)
    theta = task.prior(NEW, new)
    x = task.simulate(theta, new)
    log_p = flow.log_prob(task.unbounded(theta), context=x) + task.log_slope(theta)
    found: dict[str, Any] = {"nll": -float(log_p.mean()), "seconds": seconds, "c2st": {}}
    for number in args.observations:
        given = simulated(task, number) if args.simulated else observation(name, number)
        torch.manual_seed(seed)
        samples = task.bounded(flow.sample(SAMPLES, context=given.x).double().cpu().numpy())
        found["c2st"][str(number)] = c2st(given.reference, samples)
    return found


def fit(y: Any, x: Any, seed: int, member: int, settings: Mapping[str, Any]) -> Any:
    """Returns a flow p(y | x), fitted to rows y (n, d) and x (n, k)."""
    import flowtrain

    # the test set of a fit is not used here, so it has two rows
    data = {"data.seed": member, "data.test_fraction": 2 / len(y)}
    flow = flowtrain.fit(y, context=x, seed=100 * seed + member, progress=False, overrides={**data, **settings})
    assert flow.record is not None
    progress(f"best step {flow.record.step}, {flow.record.seconds:.0f} s")
    return flow


def check(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the C2ST of the exact posterior, which is computed from the likelihood."""
    import numpy as np
    from sbi_tasks import TASKS, c2st, observation

    found = {}
    for number in args.observations:
        given = observation(name, number)
        samples = TASKS[name].posterior(given.x, SAMPLES, np.random.default_rng(seed))
        found[str(number)] = c2st(given.reference, samples)
    return {"nll": math.nan, "seconds": math.nan, "c2st": found}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the results as Markdown: mean and range over seeds, with the published values."""
    from sbi_tasks import PUBLISHED

    cells = []
    for name in RECIPES:
        runs = [row for row in rows if row["task"] == name]
        if not runs:
            continue
        scored = [row["c2st"] for row in runs if row["c2st"]]
        means = [statistics.mean(each.values()) for each in scored]
        each = [f"{statistics.mean(c[n] for c in scored):.3f}" for n in (scored[0] if scored else ())]
        spread = f"{statistics.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})" if means else "-"
        cells.append(
            [
                name,
                spread,
                ", ".join(each) or "-",
                f"{statistics.mean(PUBLISHED[name]):.3f}",
                f"{statistics.mean(row['nll'] for row in runs):.3f}",
                f"{statistics.mean(row['seconds'] for row in runs):.0f}",
                str(len(runs)),
            ]
        )
    return table(["task", "C2ST", "observations 1, 2, 3", "published NPE", "NLL", "seconds", "seeds"], cells)


if __name__ == "__main__":
    main()
