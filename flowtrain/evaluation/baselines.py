"""Baseline likelihoods of tables: a Gaussian, a Gaussian mixture and a kernel density estimate.

All are fitted to the training rows. The number of components and the bandwidth are those with the lowest NLL on the
validation rows. The densities are those of the scored points in data units, in nats per sample.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.linear import gaussian_log_prob, shrunk_covariance
from flowtrain.data.base import Dataset, step_generator
from flowtrain.data.tables.rows_to_score import RowsInMemory
from flowtrain.evaluation.checks import PAIRED, PAIRED_PER_COLUMN
from flowtrain.evaluation.error_budget import stderr
from flowtrain.evaluation.result import Baseline, Check
from flowtrain.flow import Density
from flowtrain.utils.formatting import counted, with_error

log = logging.getLogger("flowtrain")

GAUSSIAN, MIXTURE, KERNELS = "gaussian", "gaussian_mixture", "kernel_density"
# values (rows times columns) of the training set that the covariance is estimated from, and values scored at a time
FITTED, SCORED = 2**24, 2**22
# training and validation rows that the mixture and the kernel density estimate take
MOST_TRAIN, MOST_VAL = 10_000, 5_000
# rows given without a validation set: one in so many is kept out of the fit for the choice
HELD_OUT = 5
# keys of the random streams of the noise added to whole numbers, and of the order of rows
_STREAM = 0x6761_7573
_TRAIN, _VAL, _ORDER = 1, 2, 3
# The flow is worse if the paired difference exceeds PAIRED_ERRORS of its standard errors. It is also worse if the
# difference exceeds CLEARLY nats plus CLEARLY_ERRORS standard errors of the baseline's NLL
PAIRED_ERRORS, CLEARLY, CLEARLY_ERRORS = 2.0, 0.5, 3.0

# the time for baselines other than the Gaussian: this share of the training time, within these seconds
SHARE, LEAST_SECONDS, MOST_SECONDS = 0.1, 2.0, 20.0
# shares of that time
KERNELS_SHARE, MIXTURE_SHARE = 0.35, 0.65

# numbers of components, tried in this order until PATIENCE in a row do not improve on the best
COMPONENTS, PATIENCE = (1, 2, 4, 8, 16, 32, 64, 128), 2
# training rows for each component, at least
ROWS_PER_COMPONENT = 10
# diagonal covariances are tried too if there are more columns
MANY_COLUMNS = 16
# iterations of EM between two looks at the clock, and how many times so many
EM_STEPS, EM_ROUNDS = 20, 10
# the next number of components is assumed to take this many times as long as the last
SLOWER = 2.5

# bandwidths as multiples of Scott's: the first grid, and the refinements around its best
GRID = tuple(2.0**k for k in range(-6, 3))
FINER = tuple(2.0**k for k in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75))
# validation rows that the bandwidth is chosen on, and the smallest number of kernels
BANDWIDTH_ROWS, LEAST_KERNELS = 1_000, 500
# pairs of a row and a kernel at a time, so that they stay in the cache, and the smallest number of rows at a time
PAIRS, LEAST_ROWS = 2**18, 32
# validation rows on which the time of a pair is measured
TIMED_ROWS = 256
# standardised values are clamped to this, so that their squares are finite
HUGE = 1e100

LogProb = Callable[[Tensor], Tensor]


class Fitted(NamedTuple):
    """A fitted density.

    Attributes:
        log_prob: log p in nats of points (n, d) in data units: (n,), float64.
        settings: what was chosen by validation, in words.
        cut: what the time or the number of rows has cut short, in words; empty if nothing.
    """

    log_prob: LogProb
    settings: str = ""
    cut: str = ""


def has_baselines(flow: Density, data: Dataset) -> bool:
    """Whether the mixture and the kernel density estimate are densities of the same rows as the flow.

    They are for tables of vectors. They are not for images, for data drawn anew, or for conditional flows, because
    they ignore labels.
    """
    return len(data.event_shape) == 1 and data.n_train is not None and flow.classes is None


def affordable_seconds(train_seconds: float) -> float:
    """Seconds that the mixture and the kernel density estimate may take after a training of so many seconds.

    A tenth of the training, at least 2 s and at most 20 s. After less than 2 s of training it is 0, because importing
    scikit-learn alone would take half as long.

    Example:
        >>> affordable_seconds(1.0), affordable_seconds(5.0), affordable_seconds(100.0), affordable_seconds(3600.0)
        (0.0, 2.0, 10.0, 20.0)
    """
    return 0.0 if train_seconds < LEAST_SECONDS else min(MOST_SECONDS, max(LEAST_SECONDS, SHARE * train_seconds))


def baselines(
    data: Dataset, points: Sequence[Tensor], log_p: Tensor, seconds: float = 0.0
) -> dict[str, Baseline] | None:
    """Scores simple densities fitted to the training rows of a table, by name; None for images and endless data.

    "gaussian" has the mean and the covariance of `shrunk_covariance`, from at most 2^24 values. "gaussian_mixture" is
    scikit-learn's, and is left out with a message if scikit-learn is missing. "kernel_density" has isotropic Gaussian
    kernels at standardised rows. Both take at most 10,000 training rows and 5,000 validation rows. Uniform noise in
    [0, 1) is added to whole numbers. Labels are not used. A density that cannot be fitted is left out with a message.

    Args:
        points: the scored points (n, d), one tensor for each draw of the noise on whole numbers. p is averaged over
            them, as for the flow.
        log_p: log densities of the flow at these rows, (n,).
        seconds: the time that the mixture and the kernel density estimate may take; 0: the Gaussian only.
    """
    if len(data.event_shape) != 1:
        return None
    begun = time.perf_counter()
    rows = data.train_rows(max(1, FITTED // data.event_shape[0]))
    if rows is None:
        return None
    rows = _real(rows.cpu(), _TRAIN)
    points = [x.cpu() for x in points]
    found = {GAUSSIAN: scored(_gaussian(rows), points, log_p, begun)}
    if seconds <= 0:
        return found
    table = StandardisedRows(*_divided(data, rows))
    scoring = len(points) * len(points[0])
    fits: dict[str, Callable[[], Fitted | None]] = {
        MIXTURE: lambda: _mixture(table, MIXTURE_SHARE * seconds, scoring),
        KERNELS: lambda: _kernels(table, KERNELS_SHARE * seconds, scoring),
    }
    cut = []
    for name, fit in fits.items():
        begun = time.perf_counter()
        try:
            fitted = fit()
            if fitted is None:
                continue
            one = scored(fitted, points, log_p, begun)
        except (ValueError, ArithmeticError, RuntimeError) as e:
            log.info("baselines: the %s could not be fitted: %s", words_of(name), e)
            continue
        if math.isnan(one.nll):
            log.info("baselines: the %s has no NLL on these rows", words_of(name))
            continue
        found[name] = one
        cut += [f"{words_of(name)}: {fitted.cut}"] if fitted.cut else []
    if cut:
        log.info("baselines are fitted in at most %.0f s (%s)", seconds, "; ".join(cut))
    return found


def scored(fitted: Fitted, points: Sequence[Tensor], log_p: Tensor, begun: float) -> Baseline:
    """The NLL of a density at the points, beside that of the flow; see `baselines`.

    Args:
        begun: when the fit began, by time.perf_counter.
    """
    size = max(1, SCORED // points[0].shape[1])
    draws = torch.stack([torch.cat([fitted.log_prob(part) for part in torch.split(x, size)]) for x in points])
    simple = draws.logsumexp(0) - math.log(len(draws))
    # a row without a likelihood counts as infinitely worse
    gap = torch.where(log_p.isnan(), torch.inf, simple - log_p)
    return Baseline(
        nll=-float(simple.mean()),
        nll_stderr=stderr(simple),
        seconds=time.perf_counter() - begun,
        worse=float(gap.mean()),
        worse_stderr=stderr(gap),
        settings=fitted.settings,
    )


def words_of(name: str) -> str:
    """The name of a baseline in words, such as "kernel density"."""
    return name.replace("_", " ")


class StandardisedRows:
    """Training and validation rows of a table, each column with mean 0 and standard deviation 1 in training.

    A column that is constant in training has an unbounded density. As in `shrunk_covariance`, it counts as independent
    of the others, with variance 1; `train` and `val` do not contain it.

    Args:
        train, val: rows (n, d) and (m, d) in data units.

    Attributes:
        train, val: rows (n, k) and (m, k), float64, of the k columns that vary.
    """

    def __init__(self, train: Tensor, val: Tensor) -> None:
        self.mean, covariance = shrunk_covariance(train)
        self.std = covariance.diagonal().sqrt()
        self.varies = (train != train[:1]).any(0)
        self.train, self.val = (self.standardised(rows)[:, self.varies] for rows in (train, val))

    def standardised(self, x: Tensor) -> Tensor:
        """x (n, d) in units of the standard deviations, float64."""
        return ((x.double() - self.mean) / self.std).clamp(-HUGE, HUGE)

    def in_data_units(self, log_prob: LogProb) -> LogProb:
        """log p of points in data units, from log p of the standardised columns that vary."""

        def of_points(x: Tensor) -> Tensor:
            z = self.standardised(x)
            constant = z[:, ~self.varies]
            of_constant = -0.5 * (constant.square().sum(1) + constant.shape[1] * math.log(2 * math.pi))
            return log_prob(z[:, self.varies]) + of_constant - self.std.log().sum()

        return of_points


def _gaussian(rows: Tensor) -> Fitted:
    mean, covariance = shrunk_covariance(rows)
    return Fitted(lambda x: gaussian_log_prob(x, mean, covariance))


def _mixture(table: StandardisedRows, seconds: float, scoring: int) -> Fitted | None:
    """scikit-learn's mixture of Gaussians fitted by EM, with the number of components of the lowest validation NLL.

    Covariances are full; with more than 16 columns, diagonal ones are tried too.

    Args:
        scoring: how many points will be scored.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        log.warning("baselines: the Gaussian mixture needs scikit-learn: pip install 'flowtrain[baselines]'")
        return None
    train, val = table.train.numpy(), table.val.numpy()
    if len(train) < 2 or train.shape[1] == 0:
        log.info("baselines: the Gaussian mixture needs two different training rows")
        return None
    end = time.perf_counter() + seconds
    # validation NLL, model
    best: tuple[float, Any] = (math.inf, None)
    cut = ""
    for kind in ("full", "diag") if train.shape[1] > MANY_COLUMNS else ("full",):
        waited, took, lowest = 0, 0.0, math.inf
        for k in COMPONENTS:
            if waited == PATIENCE or (k > 1 and len(train) < ROWS_PER_COMPONENT * k):
                break
            if time.perf_counter() + SLOWER * took > end:
                cut = f"stopped before {k} components"
                break
            begun = time.perf_counter()
            model = GaussianMixture(k, covariance_type=kind, max_iter=EM_STEPS, warm_start=True, random_state=0)
            nll = _fit_em(model, train, val, end)
            fitting = time.perf_counter() - begun
            model.score_samples(val)
            took = fitting + (time.perf_counter() - begun - fitting) * scoring / len(val)
            waited = 0 if nll < lowest else waited + 1
            lowest = min(lowest, nll)
            best = min(best, (nll, model), key=lambda found: found[0])
    model = best[1]
    if model is None:
        log.info("baselines: no Gaussian mixture has a finite NLL on the validation rows")
        return None
    settings = counted(model.n_components, "component") + (", diagonal" if model.covariance_type == "diag" else "")
    log_prob = table.in_data_units(lambda z: torch.from_numpy(model.score_samples(z.numpy())))
    return Fitted(log_prob, settings, cut)


def _fit_em(model: Any, train: Any, val: Any, end: float) -> float:
    """Fits a mixture with a warm start until EM converges or `end`: the validation NLL, infinite if EM fails."""
    with warnings.catch_warnings():
        # of EM that has not converged yet, and of fewer different rows than components
        warnings.simplefilter("ignore")
        try:
            for _ in range(EM_ROUNDS):
                model.fit(train)
                if model.converged_ or time.perf_counter() > end:
                    break
            nll = -float(model.score(val))
        except ValueError:
            # a covariance that is not positive definite
            return math.inf
    return nll if math.isfinite(nll) else math.inf


def _kernels(table: StandardisedRows, seconds: float, scoring: int) -> Fitted | None:
    """A kernel density estimate, with the bandwidth of the lowest validation NLL.

    p(z) = 1/m sum_i N(z; z_i, h^2 I) over standardised training rows z_i. `sklearn.neighbors.KernelDensity` has the
    same density, but its tree loses digits in the tails: in 5 columns, log p of points at 3 standard deviations was
    off by up to 600 nats (1.9.1). It agrees with `kernel_log_probs` if all rows are in one leaf. h is taken from a grid
    around Scott's m^(-1/(d+4)), which is refined around its best.

    Args:
        scoring: how many points will be scored.
    """
    d = table.train.shape[1]
    if d == 0:
        log.info("baselines: the kernel density needs two different training rows")
        return None
    val = table.val[:BANDWIDTH_ROWS]
    per_row = _seconds_per_row(val[:TIMED_ROWS], table.train)
    share = seconds / (per_row * (scoring + len(val) * (len(GRID) + len(FINER))))
    m = min(len(table.train), max(LEAST_KERNELS, int(share * len(table.train))))
    train = table.train[:m]
    scott = m ** (-1 / (d + 4))
    found: dict[float, float] = {}
    for factors in (GRID, FINER):
        around = min(found, key=found.__getitem__) if found else scott
        widths = [around * factor for factor in factors]
        found |= dict(zip(widths, (-kernel_log_probs(val, train, widths).mean(1)).tolist(), strict=True))
    width = min(found, key=found.__getitem__)
    log_prob = table.in_data_units(lambda z: kernel_log_probs(z, train, [width])[0])
    cut = f"{m:,} of {len(table.train):,} rows" if m < len(table.train) else ""
    return Fitted(log_prob, f"bandwidth {width:.2g} sd", cut)


def _seconds_per_row(x: Tensor, centers: Tensor) -> float:
    """Seconds to score one of the rows x, after a first pass, which also allocates memory."""
    for _ in range(2):
        begun = time.perf_counter()
        kernel_log_probs(x, centers, [1.0])
    return (time.perf_counter() - begun) / len(x)


def kernel_log_probs(x: Tensor, centers: Tensor, widths: Sequence[float]) -> Tensor:
    """log 1/m sum_i N(x; c_i, h^2 I) in nats at x (n, d) for centers (m, d) and several widths h: (len(widths), n).

    Example:
        >>> round(float(kernel_log_probs(torch.zeros(1, 2), torch.zeros(5, 2), [1.0])), 4)  # -log(2 pi)
        -1.8379
    """
    (m, d), squares = centers.shape, centers.square().sum(1)
    found = []
    for part in torch.split(x, max(LEAST_ROWS, PAIRS // m)):
        distances = torch.addmm(part.square().sum(1, keepdim=True) + squares, part, centers.T, alpha=-2).clamp_(min=0)
        found.append(torch.stack([torch.logsumexp(distances * (-0.5 / h**2), 1) for h in widths]))
    constant = [math.log(m) + 0.5 * d * math.log(2 * math.pi * h**2) for h in widths]
    return torch.cat(found, 1) - x.new_tensor(constant)[:, None]


def of_baseline(nll: float, nll_stderr: float, simple: Baseline | None, d: int) -> Check | None:
    """Is the flow no worse than a Gaussian?

    It is worse if the paired difference exceeds both 2 of its standard errors and 0.01 nats plus 1e-4 nats per column,
    a gap that training may leave. It is also worse if the difference exceeds 0.5 nats plus 3 standard errors of the
    Gaussian's own NLL: a row with a huge -log p makes the difference uncertain, but not small.

    Args:
        d: the number of columns.
    """
    if simple is None:
        return None
    if not math.isfinite(simple.nll_stderr):
        return Check("baseline", None, None, None, "at least two rows are needed")
    limit, worse = _limit(simple, d), max(0.0, simple.worse)
    if worse <= limit:
        return Check("baseline", worse, limit, True)
    return Check(
        "baseline",
        worse,
        limit,
        False,
        f"the NLL of the flow is {with_error(nll, nll_stderr)} nats. A Gaussian with the mean and covariance of the "
        f"training rows has {with_error(simple.nll, simple.nll_stderr)} nats. The flow is worse by "
        f"{with_error(simple.worse, simple.worse_stderr)} nats. The model may be too large for the number of rows, the "
        "training too short (trainer.steps), or the learning rate too high (trainer.lr)",
    )


def warn_if_better(nll: float, nll_stderr: float, simple: Mapping[str, Baseline], d: int) -> None:
    """Warns if the flow is worse than a baseline other than the Gaussian, by the rule of `of_baseline`.

    Args:
        d: the number of columns.
    """
    better = [
        f"{words_of(name)} ({one.settings}) {with_error(one.nll, one.nll_stderr)} nats, the flow is worse by "
        f"{with_error(one.worse, one.worse_stderr)}"
        for name, one in simple.items()
        if name != GAUSSIAN and math.isfinite(one.nll_stderr) and one.worse > _limit(one, d)
    ]
    if better:
        log.warning(
            "a baseline has a lower NLL than the flow, which has %s nats: %s. Train longer (trainer.steps), choose "
            "another model (model=mixture is a Gaussian mixture), or evaluate an ensemble of several models "
            "(floweval ckpt=[RUN1,RUN2])",
            with_error(nll, nll_stderr),
            "; ".join(better),
        )


def _limit(simple: Baseline, d: int) -> float:
    """The largest paired difference in nats at which the flow does not count as worse; see `of_baseline`."""
    limit = CLEARLY + CLEARLY_ERRORS * simple.nll_stderr
    if math.isfinite(simple.worse_stderr):
        limit = min(limit, max(PAIRED + PAIRED_PER_COLUMN * d, PAIRED_ERRORS * simple.worse_stderr))
    return limit


def _divided(data: Dataset, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Training rows, of all `rows` (n, d) in random order, and validation rows: (k, d) and (m, d)."""
    if not isinstance(data, RowsInMemory):
        # the validation rows of a file may be sorted
        val = _real(data.val.cpu(), _VAL)
        return rows[:MOST_TRAIN], val[_order(len(val))[:MOST_VAL]]
    rows = rows[_order(len(rows))]
    held = min(MOST_VAL, math.ceil(len(rows) / HELD_OUT))
    return rows[held:][:MOST_TRAIN] if len(rows) > 1 else rows, rows[:held]


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=step_generator(0, _STREAM, _ORDER))


def _real(x: Tensor, which: int) -> Tensor:
    """x + u with seeded uniform noise u if x (n, d) is whole numbers, else x unchanged."""
    if x.is_floating_point():
        return x
    u = torch.rand(x.shape, dtype=torch.float64, generator=step_generator(0, _STREAM, which))
    return x + u
