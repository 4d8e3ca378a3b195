"""Anomaly detection on twelve tables of ADBench: flows by -log p, beside detectors of scikit-learn.

    python scripts/bench/anomalies.py --out anomalies.jsonl                  # 5 seeds, 60 s a fit; many hours
    python scripts/bench/anomalies.py --sets glass WBC --methods nsf knn --seeds 0 --seconds 20 --out anomalies.jsonl
    python scripts/bench/anomalies.py --report anomalies.jsonl               # prints Markdown
    python scripts/bench/anomalies.py --disturbed Pima thyroid --seconds 20  # names of disturbed columns

Each run appends a line to the results file: set, method, seed, AUROC, average precision, seconds, and for flows the
number of false positives at rates of 0.05 and 0.01. Runs that are in the file are not repeated. A failing run adds a
line with `error`; delete the line to try again.

Protocol (one class): the ordinary rows are shuffled by the seed. Half of them are for fitting, the rest and all
anomalies are the test rows. Flows use a fifth of the rows for fitting as validation rows, which are then the
calibration rows of the p-values. Other methods fit all of them. Constant columns are removed. Uniform noise is added to
rounded columns, as in tables.py, with the resolution of the rows for fitting. The other methods get columns in
standard deviations of the rows for fitting.

The methods of scikit-learn have their default settings, and the k-nearest-neighbour distance has k = 5. `ecod` is ECOD
(Li et al. 2022, ECOD: unsupervised outlier detection using empirical cumulative distribution functions), written here.

Given n calibration rows, the false positive rate of a valid detector at the rate a has the distribution
Beta(k, n + 1 - k) with k = floor(a (n + 1)) (Bates et al. 2023, section 2.1), so the number of false positives is
beta-binomial. The report compares the number over all seeds with the 95% interval of the sum of such numbers.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, progress, table, use_threads
from tables import DATA, lines, resolution

# by the number of rows
SETS = ("glass", "WBC", "Pima", "vowels", "cardio", "thyroid", "Wilt", "satimage-2", "landsat", "pendigits",
        "annthyroid", "mammography")  # fmt: skip
FLOWS = ("auto", "nsf", "realnvp", "ffjord", "mixture")
RATES = (0.05, 0.01)
Array = np.ndarray[Any, np.dtype[np.float64]]


def split(name: str, seed: int, data: Path = DATA) -> tuple[Array, Array, Array]:
    """Returns rows for fitting, and test rows with their labels, 1 for anomalies."""
    with np.load(data / "adbench" / f"{name}.npz", allow_pickle=True) as file:
        x, y = np.asarray(file["X"], np.float64), np.asarray(file["y"]).ravel()
    rng = np.random.default_rng(seed)
    ordinary = rng.permutation(np.flatnonzero(y == 0))
    fitted, rest = np.split(ordinary, [len(ordinary) // 2])
    test = np.concatenate([rest, np.flatnonzero(y == 1)])
    # the standard deviation of equal numbers may be 1e-17
    x = x[:, np.ptp(x[fitted], axis=0) > 0]
    x = x + rng.uniform(size=x.shape) * np.array([resolution(column) for column in x[fitted].T])
    return x[fitted], x[test], y[test].astype(np.float64)


# ------------------------------------------------------------------------------------------------------------ peers


def isolation_forest(x: Array, test: Array, seed: int) -> Array:
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(random_state=seed).fit(x).score_samples(test)


def lof(x: Array, test: Array, seed: int) -> Array:
    from sklearn.neighbors import LocalOutlierFactor

    return -LocalOutlierFactor(n_neighbors=min(20, len(x) - 1), novelty=True).fit(x).score_samples(test)


def ocsvm(x: Array, test: Array, seed: int) -> Array:
    from sklearn.svm import OneClassSVM

    return -OneClassSVM().fit(x).score_samples(test)


def envelope(x: Array, test: Array, seed: int) -> Array:
    from sklearn.covariance import EllipticEnvelope

    return -EllipticEnvelope(random_state=seed).fit(x).score_samples(test)


def knn(x: Array, test: Array, seed: int) -> Array:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=5).fit(x).kneighbors(test)[0][:, -1]


def ecod(x: Array, test: Array, seed: int) -> Array:
    """Returns the larger sum, over columns, of -log tail probabilities: left, right, or by the sign of the skewness."""
    n, tails = len(x) + 1, np.empty((2, *test.shape))
    skew = ((x - x.mean(0)) ** 3).mean(0)
    for j in range(x.shape[1]):
        ordered = np.sort(x[:, j])
        # the row itself counts, so that no tail is empty
        tails[0, :, j] = -np.log((np.searchsorted(ordered, test[:, j], side="right") + 1) / n)
        tails[1, :, j] = -np.log((n - np.searchsorted(ordered, test[:, j], side="left")) / n)
    by_skew = np.where(skew < 0, tails[0], tails[1])
    return np.max([tails[0].sum(1), tails[1].sum(1), by_skew.sum(1)], axis=0)


PEERS: dict[str, Callable[[Array, Array, int], Array]] = {
    "iforest": isolation_forest,
    "lof": lof,
    "ocsvm": ocsvm,
    "envelope": envelope,
    "knn": knn,
    "ecod": ecod,
}


# ------------------------------------------------------------------------------------------------------------- runs


def fitted_flow(name: str, x: Array, test: Array, y: Array, seed: int, seconds: float) -> tuple[Array, dict[str, Any]]:
    """Fits a flow. Returns the scores of the test rows, and the false positives at each rate."""
    import flowtrain
    from flowtrain.evaluation import find_anomalies

    n = len(x) // 5
    known, rows = x[:n], x[n:]
    # a test set inside of the rows for fitting is not needed
    flow = flowtrain.fit(rows, model=name, val=known, test=known, minutes=seconds / 60, seed=seed, progress=False)
    found = find_anomalies(flow, test, known, false_positive_rate=0.5, columns=0)
    p = found.p_values[y == 0]
    counts = {str(rate): int((p <= rate * (1 + 1e-9)).sum()) for rate in RATES}
    return -found.log_p, {"n_calibration": n, "n_ordinary": len(p), "false_positives": counts}


def measure(name: str, method: str, seed: int, seconds: float, data: Path = DATA) -> dict[str, Any]:
    """Makes one run and returns its line."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    x, test, y = split(name, seed, data)
    begun = time.perf_counter()
    more: dict[str, Any] = {}
    if method in PEERS:
        mean, std = x.mean(0), x.std(0)
        scores = PEERS[method]((x - mean) / std, (test - mean) / std, seed)
    else:
        scores, more = fitted_flow(method, x, test, y, seed, seconds)
    scores = np.clip(np.nan_to_num(scores, nan=np.inf), -1e300, 1e300)
    return {
        "set": name,
        "method": method,
        "seed": seed,
        "auroc": float(roc_auc_score(y, scores)),
        "average_precision": float(average_precision_score(y, scores)),
        "seconds": time.perf_counter() - begun,
        "limit": None if method in PEERS else seconds,
        **more,
    }


def disturbed(name: str, seconds: float, data: Path = DATA, most: int = 300) -> list[list[str]]:
    """Returns table rows: how often the disturbed column of an ordinary test row is named, see `--disturbed`."""
    import flowtrain
    from flowtrain.evaluation import find_anomalies

    x, test, y = split(name, 0, data)
    known, rng, cells = x[: len(x) // 5], np.random.default_rng(0), []
    flow = flowtrain.fit(x[len(known) :], model="nsf", val=known, test=known, minutes=seconds / 60, progress=False)
    rows = test[y == 0][:most]
    each, column = np.arange(len(rows)), rng.integers(0, x.shape[1], len(rows))
    for how in ("shuffled", "shifted"):
        new = rows.copy()
        if how == "shuffled":
            new[each, column] = x[rng.integers(0, len(x), len(rows)), column]
        else:
            new[each, column] += 5 * x.std(0)[column] * rng.choice([-1, 1], len(rows))
        found = find_anomalies(flow, new, known, false_positive_rate=0.05)
        named = found.columns[found.is_anomaly] == column[found.is_anomaly, None]
        shares = (found.is_anomaly.mean(), named[:, 0].mean(), named.any(1).mean())
        cells.append([name, str(x.shape[1]), how, *(f"{share:.0%}" for share in shares)])
    return cells


# ----------------------------------------------------------------------------------------------------------- report


def band(runs: list[dict[str, Any]], rate: float, draws: int = 100_000) -> tuple[float, float]:
    """Returns the 95% interval of the false positive rate over several runs, by simulation."""
    rng, total = np.random.default_rng(0), np.zeros(draws)
    for run in runs:
        k = int(rate * (run["n_calibration"] + 1) + 1e-9)
        total += rng.binomial(run["n_ordinary"], rng.beta(k, run["n_calibration"] + 1 - k, draws))
    low, high = np.quantile(total, (0.025, 0.975)) / sum(run["n_ordinary"] for run in runs)
    return float(low), float(high)


def report(path: Path, chosen: Sequence[int]) -> str:
    """Returns Markdown tables: AUROC and average precision with mean ranks, false positive rates, and errors.

    Args:
        chosen: the seeds.
    """
    every = [row for row in lines(path) if row["seed"] in chosen]
    good = [row for row in every if "error" not in row]
    sets = [name for name in SETS if any(row["set"] == name for row in good)]
    methods = [m for m in (*FLOWS, *PEERS) if any(row["method"] == m for row in good)]

    def of(name: str, method: str) -> list[dict[str, Any]]:
        return [row for row in good if (row["set"], row["method"]) == (name, method)]

    parts = []
    for key, title in (("auroc", "AUROC"), ("average_precision", "Average precision")):
        means = {(s, m): np.mean([row[key] for row in of(s, m)]) for s in sets for m in methods if of(s, m)}
        cells = []
        for s in sets:
            best = max(means[s, m] for m in methods if (s, m) in means)
            marks = {m: "**" if means.get((s, m)) == best else "" for m in methods}
            cells.append([s, *(f"{marks[m]}{means[s, m]:.3f}{marks[m]}" if (s, m) in means else "-" for m in methods)])
        complete = [s for s in sets if all((s, m) in means for m in methods)]
        if complete:
            from scipy.stats import rankdata

            ranks = rankdata([[-means[s, m] for m in methods] for s in complete], axis=1).mean(0)
            cells.append([f"mean rank, {len(complete)} sets", *(f"{rank:.1f}" for rank in ranks)])
        seeds = sorted({row["seed"] for row in good})
        parts += [f"{title}, mean over the seeds {', '.join(map(str, seeds))}", table(["set", *methods], cells)]
    flows = [m for m in methods if m in FLOWS]
    for rate in RATES:
        cells, inside, of_all = [], 0, 0
        for s in sets:
            runs = {m: of(s, m) for m in flows if of(s, m)}
            n = min((run["n_calibration"] for each in runs.values() for run in each), default=0)
            if rate * (n + 1) < 1 - 1e-9:
                continue
            shown = []
            for m in flows:
                if m not in runs:
                    shown.append("-")
                    continue
                low, high = band(runs[m], rate)
                share = sum(run["false_positives"][str(rate)] for run in runs[m]) / sum(
                    run["n_ordinary"] for run in runs[m]
                )
                of_all, good_one = of_all + 1, low <= share <= high
                inside += good_one
                shown.append(f"{share:.3f}{'' if good_one else ' !'}")
            low, high = band(next(iter(runs.values())), rate)
            cells.append([s, str(n), f"{low:.3f} to {high:.3f}", *shown])
        if cells:
            words = f"False positive rate at {rate}: {inside} of {of_all} inside of their 95% interval; ! is outside"
            parts += [words, table(["set", "calibration rows", "95% interval", *flows], cells)]
    failed = [
        f"- {row['method']} on {row['set']}, seed {row['seed']}: {row['error']}" for row in every if "error" in row
    ]
    return "\n\n".join([*parts, f"Runs that failed: {len(failed) or 'none'}", "\n".join(failed)]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="SET")
    parser.add_argument("--methods", nargs="+", choices=(*FLOWS, *PEERS), default=(*FLOWS, *PEERS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, default=60, help="time limit of the fit of each flow")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the tables")
    parser.add_argument("--out", type=Path, default=Path("anomalies.jsonl"))
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="prints the tables of these results")
    words = "instead: disturbs a column of ordinary rows of these sets, and counts how often nsf names it"
    parser.add_argument("--disturbed", nargs="+", choices=SETS, metavar="SET", help=words)
    args = parser.parse_args()
    if args.report:
        print(report(args.report, args.seeds))
        return
    use_threads(args.threads)
    if args.disturbed:
        cells = [row for name in args.disturbed for row in disturbed(name, args.seconds, args.data)]
        print(table(["set", "columns", "how", "flagged", "named first", "among three"], cells))
        return
    done = {(row["set"], row["method"], row["seed"]) for row in lines(args.out)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.sets:
            for method in args.methods:
                if (name, method, seed) in done:
                    continue
                try:
                    row = measure(name, method, seed, args.seconds, args.data)
                except Exception as e:
                    # the report lists failed runs
                    row = {
                        "set": name,
                        "method": method,
                        "seed": seed,
                        "error": f"{type(e).__name__}: {str(e).splitlines()[0]}",
                    }
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                progress(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    print(f"{machine()}\n\n{report(args.out, args.seeds)}")


if __name__ == "__main__":
    main()
