"""log Z, effective sample size and KL of flows that are fitted to targets, densities known up to a constant.

    python scripts/bench/targets.py --out targets.jsonl                     # 8 targets, 2 models, 3 seeds; hours
    python scripts/bench/targets.py --targets funnel --models nsf --seeds 0 --out targets.jsonl
    python scripts/bench/targets.py --report targets.jsonl                  # prints Markdown

A fit trains for at most `--minutes` on `--threads` threads, with the settings in RECIPES. `flowtrain.evaluate_target`
then evaluates the flow with 20,000 samples. log Z of these targets is known. "within" is the number of seeds whose log
Z is within 3 errors of the known value. The results file has a line for each run. Runs in the file are not
repeated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from common import lines, machine, progress, table, use_threads

MODELS = ("nsf", "ffjord")
TARGETS = ("energy1", "energy2", "energy3", "energy4", "double_well", "gaussian_mixture", "funnel", "many_well")
# settings that differ from the recipes of the commands, for each target and model
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("gaussian_mixture", "nsf"): {"objective": "weighted_forward_kl", "target.scale": 1.0},
    # annealing is off, because p~^beta with a small beta has most of its mass far from the mass of p~
    ("funnel", "maf"): {"objective.anneal": 0.0},
    ("many_well", "nsf"): {"objective": "weighted_forward_kl", "objective.intermediate": 2, "objective.chains": 512},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0, help="the time limit of a training")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that override the recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="prints the table of these results")
    args = parser.parse_args()
    if args.report:
        print(report(lines(args.report)))
        return
    use_threads(args.threads)
    rows = lines(args.out) if args.out else []
    done = {(row["target"], row["model"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for target in args.targets:
            for model in args.models:
                if (target, model, seed) in done:
                    continue
                row = {"target": target, "model": model, "seed": seed, **measure(target, model, seed, args)}
                rows.append(row)
                progress(json.dumps(row))
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(f"{machine()}\n\n{report(rows)}")


def measure(target: str, model: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fits a flow to a target. Returns the evaluation, and the settings, steps and seconds of the training."""
    import flowtrain
    from flowtrain.runs.build import build_target
    from flowtrain.runs.compose import compose

    given = {k: yaml.safe_load(v) for k, v in (pair.split("=", 1) for pair in args.set)}
    settings = {**RECIPES.get((target, model), {}), "trainer.time_limit": 60 * args.minutes, **given}
    objective = settings.pop("objective", "reverse_kl")
    begun = time.perf_counter()
    flow = flowtrain.fit_target(target, model=model, objective=objective, seed=seed, progress=False, overrides=settings)
    seconds = time.perf_counter() - begun
    assert flow.record is not None
    # the samples of the evaluation differ from the samples of the validations
    keys = {key: value for key, value in settings.items() if key.startswith("target.")}
    density = build_target(compose({"target": target, **keys}).config)
    found = flowtrain.evaluate_target(flow, density, seed=10**6 + seed)
    keep = ("log_z", "log_z_stderr", "ess", "pareto_k", "elbo_gap", "forward_ess", "kl_forward", "modes_found")
    return {
        "objective": objective,
        "set": given,
        "steps": max(row["step"] for row in flow.record.metrics),
        "best": flow.record.step,
        "seconds": seconds,
        "truth": density.log_z,
        "modes": None if density.modes is None else len(density.modes),
        **{key: getattr(found, key) for key in keep},
    }


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the results as Markdown: means over seeds, and the range of the effective sample size."""
    cells = []
    for target in TARGETS:
        for model in dict.fromkeys(row["model"] for row in rows):
            runs = [row for row in rows if (row["target"], row["model"]) == (target, model)]
            if not runs:
                continue
            errors = [row["log_z"] - row["truth"] for row in runs]
            stated = [row["log_z_stderr"] for row in runs]
            within = sum(abs(error) <= 3 * one for error, one in zip(errors, stated, strict=True))
            ess = [row["ess"] for row in runs]
            cells.append(
                [
                    target,
                    model,
                    runs[0]["objective"],
                    f"{statistics.mean(errors):+.4f}",
                    f"{statistics.mean(stated):.4f}",
                    f"{within} of {len(runs)}",
                    f"{statistics.mean(ess):.3f} ({min(ess):.3f} to {max(ess):.3f})",
                    mean_of(runs, "pareto_k", 2),
                    mean_of(runs, "elbo_gap", 4),
                    mean_of(runs, "forward_ess", 3),
                    modes(runs),
                    f"{statistics.mean(row['seconds'] for row in runs):.0f}",
                ]
            )
    head = ["target", "model", "objective", "log Z - truth", "error", "within", "ESS", "k", "KL(q, p)", "forward ESS"]
    return table([*head, "modes", "seconds"], cells)


def mean_of(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    """Returns the mean of a value over runs as text, or "-" without values."""
    values = [row[key] for row in rows if row[key] is not None]
    return f"{statistics.mean(values):.{digits}f}" if values else "-"


def modes(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the smallest number of modes found in a run, and the number of modes; "-" if the modes are unknown."""
    found = [row["modes_found"] for row in rows if row["modes_found"] is not None]
    return f"{min(found)} of {rows[0]['modes']}" if found else "-"


if __name__ == "__main__":
    main()
