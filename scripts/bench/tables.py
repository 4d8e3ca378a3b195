"""Test NLL and time of every density estimator on the development tables, each in the same wall time.

    python scripts/bench/tables.py --out results.jsonl --python /path/to/venv/bin/python   # all; many hours
    python scripts/bench/tables.py --tables gas earth/flood --methods gmm nsf --seeds 0 --seconds 20 --out results.jsonl
    python scripts/bench/tables.py --tables rings moons --methods nsf maf --out results.jsonl
    python scripts/bench/tables.py --report results.jsonl    # prints Markdown

The peers are zuko's NSF and MAF, and scikit-learn's GaussianMixture and KernelDensity. `--python` names the interpreter
of an environment with these packages (pip install zuko scikit-learn). The default is the current interpreter. Each
method runs in a new process with `--threads` threads. The seconds include the whole fit with validation, but not
imports and scoring.

Each run appends a line to the results file: table, method, seed, the mean test NLL in nats, its standard error, the
validation NLL, and seconds. The log p of every test row is saved in a folder beside it. Runs that are in the file are
not repeated, so a stopped measurement continues. A failing run adds a line with `error`; delete the line to try again.

Preparation, the same for all methods. gas is used without changes; the steps are for the other tables:

1. Constant columns are removed, and all but one of repeated rows.
2. The rows are shuffled and split 80/10/10 into training, validation and test rows by the seed.
3. Uniform noise U[0, r) is added to rounded columns. A column is rounded if at most 95% of its values are distinct. To
   find its resolution r, the most frequent value is subtracted from all others. A gap between neighbouring distinct
   values qualifies if at least 95% of these differences are multiples of it. r is the largest qualifying gap, or the
   median of the gaps if no gap qualifies. The smallest gap is not used: it is a tenth of the step of a column of
   thyroid, and in pendigits it is 7e-16, from rounding errors.

The `±` of the report is the standard error of the mean NLL over rows and seeds. Differences are paired. Their standard
error treats the values of one row in several seeds as dependent (clustered by row).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import lines, machine, progress, table

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ADBENCH = ("pendigits", "mammography", "annthyroid", "Wilt", "landsat", "thyroid")
TABLES = ("gas", "optdigits", "earth/flood", "earth/volerup", *(f"adbench/{name}" for name in ADBENCH))
TOYS = ("rings", "checkerboard", "2spirals", "moons")
PEERS = ("gaussian", "gmm", "kde", "zuko_nsf", "zuko_maf")
OURS = ("realnvp", "glow", "nsf", "maf", "mixture", "ffjord", "ffjord_hybrid", "auto")
# `mixture` and `ffjord` are measured on request
DEFAULT = (*PEERS, *(name for name in OURS if name not in ("mixture", "ffjord")))
TOY_METHODS = ("nsf", "maf")

# a column is rounded if at most this share of its values are distinct
DISTINCT = 0.95
# the resolution explains at least this share of the values, with this relative tolerance
MULTIPLES, TOLERANCE = 0.95, 0.01

Array = np.ndarray[Any, np.dtype[np.float64]]


class Split(NamedTuple):
    """Rows of a table, and the positions of the test rows in the table without repeated rows."""

    train: Array
    val: Array
    test: Array
    places: np.ndarray[Any, np.dtype[np.int64]]


class Scores(NamedTuple):
    """The scores of a fitted density: log p of each test row and the mean NLL of the validation rows in nats."""

    log_p: Array
    val_nll: float
    seconds: float
    more: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- tables


def read(name: str, data: Path = DATA) -> Array:
    """Reads the rows of a table without a predefined split."""
    folder, _, rest = name.rpartition("/")
    if name == "optdigits":
        parts = [np.loadtxt(data / name / f"{name}.{kind}", delimiter=",") for kind in ("tra", "tes")]
        return np.concatenate(parts)[:, :64]
    if folder == "earth":
        lines = (data / f"{name}.csv").read_text().splitlines()
        return np.array([line.split(",")[:2] for line in lines if line[:1] in "-0123456789"], dtype=np.float64)
    return np.asarray(np.load(data / folder / f"{rest}.npz", allow_pickle=True)["X"], dtype=np.float64)


def resolution(column: Array) -> float:
    """Returns r, the width of the noise for a column, or 0 if the column is not rounded. See the script's docstring."""
    values, counts = np.unique(column, return_counts=True)
    if len(values) > DISTINCT * len(column):
        return 0.0
    gaps = np.diff(values)
    gaps = gaps[gaps > 1e-9 * (values[-1] - values[0])]
    mode = values[counts.argmax()]
    from_mode = column[column != mode] - mode
    for r in np.unique(gaps.round(12))[::-1]:
        steps = from_mode / r
        if np.mean(np.abs(steps - steps.round()) <= TOLERANCE) >= MULTIPLES:
            return float(r)
    return float(np.median(gaps))


def prepared(name: str, seed: int, data: Path = DATA) -> Split:
    """Returns the split of a table for a seed."""
    if name == "gas":
        parts = [
            np.loadtxt(data / name / f"{kind}.csv", delimiter=",", skiprows=1) for kind in ("train", "val", "test")
        ]
        return Split(*parts, np.arange(len(parts[2])))
    x = read(name, data)
    x = np.unique(x[:, x.std(0) > 0], axis=0)
    rng = np.random.default_rng(seed)
    x = x + rng.uniform(size=x.shape) * np.array([resolution(column) for column in x.T])
    places, n = rng.permutation(len(x)), len(x)
    train, val, test = np.split(places, [int(0.8 * n), int(0.9 * n)])
    return Split(x[train], x[val], x[test], test)


# ----------------------------------------------------------------------------------------------------------- peers


def standardised(split: Split) -> tuple[list[Array], float]:
    """Returns the parts in standard deviations of the training rows, and the log-determinant to add to log p."""
    mean, std = split.train.mean(0), split.train.std(0)
    return [(part - mean) / std for part in split[:3]], -float(np.log(std).sum())


def gaussian(split: Split, seconds: float, seed: int) -> Scores:
    """Fits the Gaussian with the mean and the covariance of the training rows."""
    begun = time.perf_counter()
    (train, val, test), log_det = standardised(split)
    mean, factor = train.mean(0), np.linalg.cholesky(np.cov(train.T, bias=True).reshape(2 * [train.shape[1]]))

    def log_p(x: Array) -> Array:
        z = np.linalg.solve(factor, (x - mean).T)
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi) + np.log(np.diag(factor)).sum()
        return -0.5 * (z**2).sum(0) - constant + log_det

    return Scores(log_p(test), -float(log_p(val).mean()), time.perf_counter() - begun, {})


COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# added to the diagonals of the covariances of standardized rows; scikit-learn's default is 1e-6
REG_COVAR = (1e-6, 1e-3)


def gmm(split: Split, seconds: float, seed: int) -> Scores:
    """Fits GaussianMixture with full covariances. Validation chooses components and `reg_covar` within the time."""
    from sklearn.mixture import GaussianMixture

    begun = time.perf_counter()
    (train, val, test), log_det = standardised(split)
    best, chosen, failures = (-math.inf, None), {}, dict.fromkeys(REG_COVAR, 0)
    peaks = dict.fromkeys(REG_COVAR, -math.inf)
    for k in COMPONENTS:
        for reg in REG_COVAR:
            # the next fit takes about as long as all earlier fits together
            if failures[reg] >= 3 or len(train) < 2 * k or time.perf_counter() - begun > 0.8 * seconds:
                continue
            found = GaussianMixture(k, reg_covar=reg, random_state=seed, max_iter=200).fit(train)
            score = float(found.score(val))
            failures[reg] = 0 if score > peaks[reg] else failures[reg] + 1
            peaks[reg] = max(peaks[reg], score)
            if score > best[0]:
                best, chosen = (score, found), {"components": k, "reg_covar": reg}
    taken = time.perf_counter() - begun
    return Scores(best[1].score_samples(test) + log_det, -best[0] - log_det, taken, chosen)


def kde(split: Split, seconds: float, seed: int) -> Scores:
    """Fits KernelDensity with a Gaussian kernel on standardized rows. The bandwidth is chosen by validation."""
    from sklearn.neighbors import KernelDensity

    begun = time.perf_counter()
    (train, val, test), log_det = standardised(split)
    found: dict[float, float] = {}

    def score(exponent: float) -> float:
        if exponent not in found:
            found[exponent] = float(KernelDensity(bandwidth=10**exponent).fit(train).score(val)) / len(val)
        return found[exponent]

    for exponent in np.linspace(-2.5, 0.5, 7):
        score(float(exponent))
    step = 0.25
    while step > 0.01 and time.perf_counter() - begun < 0.7 * seconds:
        best = max(found, key=lambda e: found[e])
        score(best - step)
        score(best + step)
        step /= 2
    best = max(found, key=lambda e: found[e])
    taken = time.perf_counter() - begun
    log_p = KernelDensity(bandwidth=10**best).fit(train).score_samples(test) + log_det
    return Scores(log_p, -found[best] - log_det, taken, {"bandwidth": 10**best})


# settings of zuko by the smallest number of training rows, see scripts/bench/README.md
ZUKO: dict[str, dict[int, dict[str, Any]]] = {
    "NSF": {5000: {"lr": 4e-3, "hidden": (128, 128)}, 0: {"lr": 4e-3, "hidden": (64, 64)}},
    "MAF": {5000: {"lr": 4e-3, "hidden": (64, 64)}, 0: {"lr": 4e-3, "hidden": (128, 128)}},
}
# number of validations without improvement after which training stops
PATIENCE = 15


def zuko(kind: str) -> Callable[..., Scores]:
    """Returns a fit of zuko's flow: standardized rows, Adam, cosine schedule, gradient clipping and early stopping."""

    def fit(split: Split, seconds: float, seed: int, **given: Any) -> Scores:
        import torch
        import zuko

        begun = time.perf_counter()
        torch.manual_seed(seed)
        parts, log_det = standardised(split)
        train, val, test = (torch.from_numpy(part).float() for part in parts)
        n, d = train.shape
        tiers = ZUKO[kind]
        settings = {"transforms": 5, "bins": 8, **tiers[max(least for least in tiers if n >= least)], **given}
        lr, more = settings["lr"], {"bins": settings["bins"]} if kind == "NSF" else {}
        flow = getattr(zuko.flows, kind)(
            d, transforms=settings["transforms"], hidden_features=settings["hidden"], **more
        )
        optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
        batch, step, best, weights, since = min(512, n), 0, math.inf, flow.state_dict(), 0
        every = max(20, min(100, n // batch * 5))
        while (share := (time.perf_counter() - begun) / seconds) < 1 and since < PATIENCE:
            if step % (n // batch) == 0:
                order = torch.randperm(n)
            rows = order[step % (n // batch) * batch :][:batch]
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * share)) * min(1, (step + 1) / 50)
            optimizer.zero_grad()
            loss = -flow().log_prob(train[rows]).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            if norm.isfinite():
                optimizer.step()
            step += 1
            if step % every == 0:
                nll = -float(log_prob(flow, val).mean())
                since = 0 if nll < best else since + 1
                if nll < best:
                    best, weights = nll, {k: v.clone() for k, v in flow.state_dict().items()}
        if not math.isfinite(best):
            best = -float(log_prob(flow, val).mean())
        else:
            flow.load_state_dict(weights)
        taken = time.perf_counter() - begun
        return Scores(log_prob(flow, test) + log_det, best - log_det, taken, {**settings, "steps": step})

    def log_prob(flow: Any, x: Any) -> Array:
        import torch

        with torch.no_grad():
            return torch.cat([flow().log_prob(part) for part in x.split(2000)]).double().numpy()

    return fit


# ------------------------------------------------------------------------------------------------------------ ours


def ours(method: str) -> Callable[..., Scores]:
    """Returns a function that fits flowtrain's default within the time, and makes the checks of an evaluation."""

    def fit(split: Split, seconds: float, seed: int, overrides: Sequence[str] = ()) -> Scores:
        import torch

        import flowtrain

        model, *keys = ("ffjord", "objective=hybrid") if method == "ffjord_hybrid" else (method,)
        begun = time.perf_counter()
        flow = flowtrain.fit(
            split.train,
            model=model,
            val=split.val,
            test=split.test,
            minutes=seconds / 60,
            seed=seed,
            device="cpu",
            progress=False,
            overrides=[f"threads={torch.get_num_threads()}", *keys, *overrides],
        )
        taken = time.perf_counter() - begun
        found = flowtrain.evaluate(flow, split.test, trained_on=split.train, thorough=False)
        rows = [row for row in flow.record.metrics if row["split"] == "val"]
        best = min(rows, key=lambda row: row["nll"], default={"nll": math.nan, "step": 0})
        more = {
            "steps": max((row["step"] for row in flow.record.metrics), default=0),
            "best_step": best["step"],
            "stopped_by": flow.record.stopped_by,
            "failed": [check.name for check in found.failed],
            "members": [[m.path, round(m.weight, 4)] for m in found.members or ()],
        }
        return Scores(found.scores.double().numpy(), best["nll"], taken, more)

    return fit


def toy(name: str, method: str, seconds: float, seed: int) -> dict[str, Any]:
    """Returns the KL of a model to a toy in nats, the mean of log p_true - log p_model over test samples."""
    import flowtrain
    from flowtrain.cli.config_files import compose_defaults
    from flowtrain.runs.build import build_data

    begun = time.perf_counter()
    # the time limit, not the number of steps, ends training
    keys = [f"threads={os.environ['OMP_NUM_THREADS']}", "trainer.steps=1000000", "data.n_test=10000"]
    flow = flowtrain.fit(name, model=method, minutes=seconds / 60, seed=seed, progress=False, overrides=keys)
    taken = time.perf_counter() - begun
    data = build_data(compose_defaults([f"data={name}", "data.n_test=10000"]))
    found = flowtrain.evaluate(flow, data, thorough=False)
    names = ("nll", "nll_stderr", "kl", "kl_stderr")
    failed = [check.name for check in found.failed]
    return {
        **{name: getattr(found, name) for name in names},
        "failed": failed,
        "seconds": taken,
        "steps": flow.record.step,
    }


METHODS: dict[str, Callable[..., Scores]] = {
    "gaussian": gaussian,
    "gmm": gmm,
    "kde": kde,
    "zuko_nsf": zuko("NSF"),
    "zuko_maf": zuko("MAF"),
    **{name: ours(name) for name in OURS},
}


# --------------------------------------------------------------------------------------------------------- measuring


def measure(name: str, method: str, seed: int, seconds: float, threads: int, log_p: Path, data: Path) -> dict[str, Any]:
    """Returns the results of one run in this process, and saves log p of the test rows to a file."""
    import torch

    torch.set_num_threads(threads)
    if name in TOYS:
        return toy(name, method, seconds, seed)
    split = prepared(name, seed, data)
    found = METHODS[method](split, seconds, seed)
    log_p.parent.mkdir(parents=True, exist_ok=True)
    np.savez(log_p, log_p=found.log_p, places=split.places)
    n, d = split.train.shape
    return {
        "n": n,
        "d": d,
        "nll": -float(found.log_p.mean()),
        "nll_stderr": float(found.log_p.std(ddof=1)) / math.sqrt(len(found.log_p)),
        "val_nll": found.val_nll,
        "seconds": found.seconds,
        **found.more,
    }


def scores_file(out: Path, row: dict[str, Any]) -> Path:
    """Returns the path for log p of the test rows of a run."""
    return out.with_suffix("") / f"{row['table'].replace('/', '_')}-{row['method']}-{row['seed']}.npz"


def run_apart(args: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Makes one run in a new process and returns its line of results."""
    python = args.python if key["method"] in PEERS else sys.executable
    threads = {f"{name}_NUM_THREADS": str(args.threads) for name in ("OMP", "MKL", "OPENBLAS")}
    job = {**key, "seconds": args.seconds, "threads": args.threads, "data": str(args.data)}
    command = [python, str(Path(__file__)), "--worker", json.dumps({**job, "log_p": str(scores_file(args.out, key))})]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **threads}, timeout=10 * args.seconds + 300
        )
    except subprocess.TimeoutExpired as e:
        return {**key, "error": f"no result after {e.timeout:.0f} s"}
    if done.returncode:
        words = (done.stderr or "").strip().splitlines()
        return {**key, "error": words[-1] if words else f"exit status {done.returncode}"}
    return {**key, "limit": args.seconds, **json.loads(done.stdout.splitlines()[-1])}


def work(job: dict[str, Any]) -> None:
    """Makes one run and prints its results as the last line."""
    try:
        found = measure(
            job["table"],
            job["method"],
            job["seed"],
            job["seconds"],
            job["threads"],
            Path(job["log_p"]),
            Path(job["data"]),
        )
    except Exception as e:
        traceback.print_exc()
        # the parent reads the error from the last line of stderr
        raise SystemExit(f"{type(e).__name__}: {' '.join(str(e).split())}") from e
    print(json.dumps(found))


# ------------------------------------------------------------------------------------------------------------ report


class Difference(NamedTuple):
    """The mean of NLL - NLL of another method over rows and seeds, in nats, and its standard error."""

    mean: float
    error: float

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= 2 * self.error:
            return "tie"
        return "win" if self.mean < 0 else "loss"


def clustered(values: Sequence[Array], places: Sequence[np.ndarray[Any, Any]]) -> Difference:
    """Returns the mean of values by seed and its standard error, where values at the same place are dependent.

    With residuals e = v - mean, the standard error is sqrt(sum over places of (sum of e at the place)^2) / N, see
    Liang and Zeger 1986.
    """
    every, where = np.concatenate(list(values)), np.concatenate(list(places))
    _, index = np.unique(where, return_inverse=True)
    sums = np.bincount(index, weights=every - every.mean())
    return Difference(float(every.mean()), float(np.sqrt((sums**2).sum())) / len(every))


def log_ps(path: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[Array, np.ndarray[Any, Any]]]:
    """Returns log p of the test rows and their places, for each run."""
    found = []
    for row in rows:
        with np.load(scores_file(path, row)) as saved:
            found.append((saved["log_p"], saved["places"]))
    return found


def report(path: Path) -> str:
    """Returns Markdown tables: NLL, seconds, differences of auto to the best peer, failed checks, errors and toys."""
    rows = lines(path)
    good = [row for row in rows if "error" not in row]
    tables = [name for name in TABLES if any(row["table"] == name for row in good)]
    methods = [m for m in (*PEERS, *OURS) if any(row["method"] == m for row in good if row["table"] in TABLES)]

    def of(name: str, method: str) -> list[dict[str, Any]]:
        found = [row for row in good if (row["table"], row["method"]) == (name, method)]
        return sorted(found, key=lambda row: row["seed"])

    def mean(name: str, method: str) -> Difference:
        scores = log_ps(path, of(name, method))
        return clustered([-log_p for log_p, _ in scores], [places for _, places in scores])

    parts = []
    nlls = {(name, m): mean(name, m) for name in tables for m in methods if of(name, m)}
    if tables:
        cells = []
        for name in tables:
            own = {m: nlls[name, m] for m in methods if (name, m) in nlls}
            size = next(row for row in good if row["table"] == name)
            least = min(own, key=lambda m: own[m].mean)
            shown = [
                f"{'**' * (m == least)}{own[m].mean:.3f}{'**' * (m == least)} ± {own[m].error:.3f}" if m in own else "-"
                for m in methods
            ]
            cells.append([name, f"{size['n']} x {size['d']}", *shown])
        parts += ["Test NLL in nats, mean over seeds", table(["table", "training rows", *methods], cells)]
        times = [
            [
                name,
                *(f"{statistics.mean(r['seconds'] for r in of(name, m)):.0f}" if of(name, m) else "-" for m in methods),
            ]
            for name in tables
        ]
        parts += ["Seconds of a fit", table(["table", *methods], times)]
    paired = [cell for name in tables if (cell := _paired(path, name, methods, nlls, of)) is not None]
    if paired:
        counts = ", ".join(f"{sum(cell[-1] == v for cell in paired)} {v}" for v in ("win", "tie", "loss"))
        head = ["table", "best peer", "NLL of auto - NLL of the peer", "2 standard errors", "result"]
        parts += [f"Paired differences over rows and seeds: {counts}", table(head, paired)]
    worse = [
        f"- {m} on {name}: {nlls[name, m].mean:.3f}, the Gaussian {nlls[name, 'gaussian'].mean:.3f}"
        for name, m in nlls
        if m in OURS and (name, "gaussian") in nlls and nlls[name, m].mean > nlls[name, "gaussian"].mean
    ]
    failed = [
        f"- {row['method']} on {row['table']}, seed {row['seed']}: {', '.join(row['failed'])}"
        for row in good
        if row.get("failed")
    ]
    errors = [
        f"- {row['method']} on {row['table']}, seed {row['seed']}: {row['error']}" for row in rows if "error" in row
    ]
    for title, found in (("Worse than the Gaussian", worse), ("Failed checks", failed), ("Runs that failed", errors)):
        if methods or found:
            parts += [f"{title}: {len(found) or 'none'}", "\n".join(found)]
    toys = [
        [name, m, f"{statistics.mean(r['kl'] for r in of(name, m)):.4f}",
         f"{math.sqrt(sum(r['kl_stderr'] ** 2 for r in of(name, m))) / len(of(name, m)):.4f}",
         f"{statistics.mean(r['seconds'] for r in of(name, m)):.0f}", str(len(of(name, m)))]
        for name in TOYS for m in OURS if of(name, m)
    ]  # fmt: skip
    if toys:
        parts += ["Toys", table(["toy", "model", "KL, nats", "standard error", "seconds", "seeds"], toys)]
    return "\n\n".join(part for part in parts if part)


def _paired(
    path: Path,
    name: str,
    methods: Sequence[str],
    nlls: dict[tuple[str, str], Difference],
    of: Callable[[str, str], list[dict[str, Any]]],
) -> list[str] | None:
    """Returns a table row with the difference of auto to the peer with the lowest mean NLL, or None without both."""
    peers = [m for m in methods if m in PEERS and (name, m) in nlls]
    if not peers or (name, "auto") not in nlls:
        return None
    best = min(peers, key=lambda m: nlls[name, m].mean)
    mine, other = of(name, "auto"), of(name, best)
    seeds = {row["seed"] for row in mine} & {row["seed"] for row in other}
    if not seeds:
        return None
    a, b = (log_ps(path, [row for row in rows if row["seed"] in seeds]) for rows in (mine, other))
    found = clustered([q - p for (p, _), (q, _) in zip(a, b, strict=True)], [places for _, places in a])
    return [name, best, f"{found.mean:.3f}", f"{2 * found.error:.3f}", found.verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=(*TABLES, *TOYS), default=TABLES, metavar="TABLE")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60, help="time limit of each fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="an interpreter with zuko and scikit-learn")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the tables")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="prints the tables of these results")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    if args.report:
        print(report(args.report))
        return
    names = ("table", "method", "seed")
    done = {tuple(row[name] for name in names) for row in lines(args.out)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.tables:
            for method in args.methods:
                key = dict(zip(names, (name, method, seed), strict=True))
                if tuple(key.values()) in done or (name in TOYS and method not in TOY_METHODS):
                    continue
                row = run_apart(args, key)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                progress(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    print(f"{machine()}\n\n{report(args.out)}")


if __name__ == "__main__":
    main()
