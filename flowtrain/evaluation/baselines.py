"""Baseline likelihoods of tables: a Gaussian, a Gaussian mixture and a kernel density estimate.

All are fitted to the training rows. The number of components and the bandwidth minimize the NLL on the validation rows.
Densities are in data units, log p is in nats per sample.
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
from flowtrain.data.context import features
from flowtrain.data.tables.rows_to_score import RowsInMemory
from flowtrain.evaluation.checks import PAIRED, PAIRED_PER_COLUMN
from flowtrain.evaluation.result import Baseline, Check
from flowtrain.flow import Density
from flowtrain.utils.formatting import counted, with_error
from flowtrain.utils.weighting import average, resample, stderr

log = logging.getLogger("flowtrain")

# the settings of the Gaussian whose mean is a linear function of the features of the context
LINEAR = "linear in the context"
GAUSSIAN, MIXTURE, KERNELS = "gaussian", "gaussian_mixture", "kernel_density"
# Largest number of values (rows times columns) from which the covariance is estimated, and that are scored at once
FITTED, SCORED = 2**24, 2**22
# Largest numbers of training and validation rows for the mixture and the kernel density estimate
MOST_TRAIN, MOST_VAL = 10_000, 5_000
# Without a validation set, settings are chosen on 1 / HELD_OUT of the rows
HELD_OUT = 5
# Keys of the random streams of the noise added to whole numbers, and of the order of rows
_STREAM = 0x6761_7573
_TRAIN, _VAL, _ORDER = 1, 2, 3
# The flow is worse if the paired difference exceeds PAIRED_ERRORS of its standard errors. It is also worse if the
# difference exceeds CLEARLY nats plus CLEARLY_ERRORS standard errors of the baseline's NLL
PAIRED_ERRORS, CLEARLY, CLEARLY_ERRORS = 2.0, 0.5, 3.0

# Time limit for baselines other than the Gaussian: a fraction SHARE of the training time, between these limits
SHARE, LEAST_SECONDS, MOST_SECONDS = 0.1, 2.0, 20.0
# Fractions of the time limit
KERNELS_SHARE, MIXTURE_SHARE = 0.35, 0.65

# Numbers of components. The search stops after PATIENCE numbers without improvement
COMPONENTS, PATIENCE = (1, 2, 4, 8, 16, 32, 64, 128), 2
# Smallest number of training rows for each component
ROWS_PER_COMPONENT = 10
# Diagonal covariances are also tried if there are more columns
MANY_COLUMNS = 16
# Number of EM iterations between checks of the time, and largest number of checks
EM_STEPS, EM_ROUNDS = 20, 10
# Assumed ratio of the time of a fit to the time of the fit with the previous number of components
SLOWER = 2.5

# Bandwidths as multiples of Scott's bandwidth, and refinements as multiples of the best of them
GRID = tuple(2.0**k for k in range(-6, 3))
FINER = tuple(2.0**k for k in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75))
# Largest number of validation rows for the choice of the bandwidth, and smallest number of kernels
BANDWIDTH_ROWS, LEAST_KERNELS = 1_000, 500
# Number of (row, kernel) pairs in a chunk, which fits in the CPU cache, and smallest number of rows in a chunk
PAIRS, LEAST_ROWS = 2**18, 32
# Number of validation rows for measuring the time of a row
TIMED_ROWS = 256
# Standardized values are clamped to this, so that their squares are finite
HUGE = 1e100

LogProb = Callable[[Tensor], Tensor]


class Fitted(NamedTuple):
    """A fitted density.

    Attributes:
        log_prob: maps points (n, d) in data units to log p in nats, (n,), float64.
        settings: a description of the settings chosen by validation.
        cut: a description of what was left out to meet the time limit; empty if nothing was left out.
    """

    log_prob: LogProb
    settings: str = ""
    cut: str = ""


def has_baselines(flow: Density, data: Dataset) -> bool:
    """Returns whether the mixture and the kernel density estimate can be compared with the flow.

    The samples must be vectors from a finite training set, and the flow must not be conditional, because these
    baselines ignore the context.
    """
    return len(data.event_shape) == 1 and data.n_train is not None and not flow.conditional


def affordable_seconds(train_seconds: float) -> float:
    """Returns the time limit in seconds for the mixture and the kernel density estimate.

    The limit is a tenth of the training time, at least 2 s and at most 20 s. For less than 2 s of training it is 0,
    because importing scikit-learn takes 0.8 s.

    Example:
        >>> affordable_seconds(1.0), affordable_seconds(5.0), affordable_seconds(100.0), affordable_seconds(3600.0)
        (0.0, 2.0, 10.0, 20.0)
    """
    return 0.0 if train_seconds < LEAST_SECONDS else min(MOST_SECONDS, max(LEAST_SECONDS, SHARE * train_seconds))


def baselines(
    data: Dataset,
    points: Sequence[Tensor],
    log_p: Tensor,
    seconds: float = 0.0,
    weights: Tensor | None = None,
    context: Tensor | None = None,
) -> dict[str, Baseline] | None:
    """Fits simple densities to the training rows of a table and scores points with them.

    "gaussian" has the mean and the covariance of `shrunk_covariance`, from at most 2^24 values. "gaussian_mixture" is a
    mixture of scikit-learn. "kernel_density" has isotropic Gaussian kernels at standardized rows. Both use at most
    10,000 training rows and 5,000 validation rows. Uniform noise in [0, 1) is added to whole numbers. With a context,
    "gaussian" is N(x; b + A h(c), S) for the features h of the context c, by least squares, see `residuals`. Labels are
    not used. A density that cannot be fitted, or that needs a missing package, is left out with a log message.

    If the training rows have weights, the Gaussian has their weighted moments. The other two are fitted to rows that
    are drawn by weight (see `resample`), and are left out if weights are negative.

    Args:
        data: the data set.
        points: the points to score, (n, d), one tensor for each noise draw on whole numbers. p is averaged over the
            draws, as for the flow.
        log_p: log densities of the flow for these rows, (n,).
        seconds: the time limit for the mixture and the kernel density estimate. 0 means the Gaussian only.
        weights: the weights of these rows, (n,), or None.
        context: values of the context columns of these rows, (n, k). None without context.

    Returns:
        Baselines by name. None for images and data sets without a finite training set.
    """
    if len(data.event_shape) != 1:
        return None
    begun = time.perf_counter()
    most = max(1, FITTED // data.event_shape[0])
    rows, of_rows = data.train_rows(most), data.row_weights(most)
    if rows is None:
        return None
    rows, of_rows = _real(rows.cpu(), _TRAIN), None if of_rows is None else of_rows.cpu()
    points = [x.cpu() for x in points]
    given, settings = None if context is None else data.train_context(most), ""
    if context is not None and given is not None:
        h, h_points = (features(data.context, values.cpu(), torch.float64) for values in (given, context))
        rows, points, settings = *residuals(rows, points, h, h_points, of_rows), LINEAR
    found = {GAUSSIAN: scored(_gaussian(rows, of_rows)._replace(settings=settings), points, log_p, begun, weights)}
    if seconds <= 0:
        return found
    if of_rows is not None and bool((of_rows < 0).any()):
        log.info("baselines: the Gaussian mixture and the kernel density need weights that are not negative")
        return found
    table = StandardisedRows(*_divided(data, rows, of_rows))
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
            one = scored(fitted, points, log_p, begun, weights)
        except (ValueError, ArithmeticError, RuntimeError) as e:
            log.info("baselines: the %s could not be fitted: %s", display_name(name), e)
            continue
        if math.isnan(one.nll):
            log.info("baselines: the %s is left out because its NLL on these rows is NaN", display_name(name))
            continue
        found[name] = one
        cut += [f"{display_name(name)}: {fitted.cut}"] if fitted.cut else []
    if cut:
        log.info("baselines: time limit %.0f s; %s", seconds, "; ".join(cut))
    return found


def scored(
    fitted: Fitted, points: Sequence[Tensor], log_p: Tensor, begun: float, weights: Tensor | None = None
) -> Baseline:
    """Computes the NLL of a density at the points and compares it with the flow; see `baselines`.

    Args:
        begun: the time at which the fit began, by time.perf_counter.
    """
    size = max(1, SCORED // points[0].shape[1])
    draws = torch.stack([torch.cat([fitted.log_prob(part) for part in torch.split(x, size)]) for x in points])
    simple = draws.logsumexp(0) - math.log(len(draws))
    # a row for which log p of the flow is NaN counts as infinitely worse
    gap = torch.where(log_p.isnan(), torch.inf, simple - log_p)
    return Baseline(
        nll=-float(average(simple, weights)),
        nll_stderr=stderr(simple, weights),
        seconds=time.perf_counter() - begun,
        worse=float(average(gap, weights)),
        worse_stderr=stderr(gap, weights),
        settings=fitted.settings,
    )


def display_name(name: str) -> str:
    """Returns the name of a baseline for messages, such as "kernel density"."""
    return name.replace("_", " ")


class StandardisedRows:
    """Training and validation rows of a table, standardized to mean 0 and standard deviation 1 in training.

    The density of a column that is constant in training is unbounded. Such a column is treated as independent of the
    others with variance 1, as in `shrunk_covariance`. The attributes `train` and `val` do not contain it.

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
        """Standardizes x (n, d), in float64."""
        return ((x.double() - self.mean) / self.std).clamp(-HUGE, HUGE)

    def in_data_units(self, log_prob: LogProb) -> LogProb:
        """Converts a log density of the standardized columns that vary to a log density of rows in data units."""

        def of_points(x: Tensor) -> Tensor:
            z = self.standardised(x)
            constant = z[:, ~self.varies]
            of_constant = -0.5 * (constant.square().sum(1) + constant.shape[1] * math.log(2 * math.pi))
            return log_prob(z[:, self.varies]) + of_constant - self.std.log().sum()

        return of_points


def residuals(
    rows: Tensor, points: Sequence[Tensor], h: Tensor, h_points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Subtracts a linear regression on features h: x - A (h - mean h), with A by least squares on the training rows.

    The map from x to the residual has slope 1, so p(x | context) is the density of the residual.

    Args:
        rows: training rows, (n, d).
        points: points to score, (m, d) each.
        h: features of the training rows, (n, F).
        h_points: features of the points, (m, F).
        weights: weights of the training rows, (n,), or None.

    Returns:
        The residuals of the training rows, and of the points, in float64.
    """
    w = h.new_ones(len(h), 1) if weights is None else weights.to(h).unsqueeze(1)
    x = rows.double()
    mean, center = ((w * each).sum(0) / w.sum() for each in (h, x))
    moments = (w * (h - mean)).T @ torch.cat([h - mean, x - center], 1)
    # gelsd also solves for columns that are constant or depend on each other, such as one-hot features
    slope = torch.linalg.lstsq(moments[:, : h.shape[1]], moments[:, h.shape[1] :], driver="gelsd").solution
    return x - (h - mean) @ slope, [point.double() - (h_points - mean) @ slope for point in points]


def _gaussian(rows: Tensor, weights: Tensor | None = None) -> Fitted:
    mean, covariance = shrunk_covariance(rows, weights)
    return Fitted(lambda x: gaussian_log_prob(x, mean, covariance))


def _mixture(table: StandardisedRows, seconds: float, scoring: int) -> Fitted | None:
    """Fits a Gaussian mixture of scikit-learn by EM. The number of components minimizes the validation NLL.

    Covariances are full. With more than 16 columns, diagonal covariances are also tried.

    Args:
        seconds: the time limit.
        scoring: the number of points that will be scored.

    Returns:
        None if scikit-learn is missing, or if no mixture can be fitted.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        log.warning(
            "baselines: the Gaussian mixture needs scikit-learn; install it: pip install 'flowtrain[baselines]'"
        )
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
    """Runs EM until it converges or until the time `end`. Returns the validation NLL, or infinity if EM fails."""
    with warnings.catch_warnings():
        # scikit-learn warns that EM has not converged, and of fewer distinct rows than components
        warnings.simplefilter("ignore")
        try:
            for _ in range(EM_ROUNDS):
                model.fit(train)
                if model.converged_ or time.perf_counter() > end:
                    break
            nll = -float(model.score(val))
        except ValueError:
            # a covariance is not positive definite
            return math.inf
    return nll if math.isfinite(nll) else math.inf


def _kernels(table: StandardisedRows, seconds: float, scoring: int) -> Fitted | None:
    """Fits a kernel density estimate. The bandwidth h minimizes the validation NLL.

    p(z) = 1/m sum_i N(z; z_i, h^2 I) over m standardized training rows z_i. h is searched on a grid around Scott's
    m^(-1/(d+4)), which is then refined around its best value.

    `sklearn.neighbors.KernelDensity` is not used, because its tree loses digits in the tails. In version 1.9.1 with 5
    columns, log p of points at 3 standard deviations was wrong by up to 600 nats. scikit-learn agrees with
    `kernel_log_probs` if all rows are in one leaf of the tree.

    Args:
        seconds: the time limit, which may reduce the number of kernels.
        scoring: the number of points that will be scored.

    Returns:
        None if no column varies.
    """
    d = table.train.shape[1]
    if d == 0:
        log.info("baselines: the kernel density estimate needs two different training rows")
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
    """Measures the seconds to score a row. The first of two passes, which allocates memory, does not count."""
    for _ in range(2):
        begun = time.perf_counter()
        kernel_log_probs(x, centers, [1.0])
    return (time.perf_counter() - begun) / len(x)


def kernel_log_probs(x: Tensor, centers: Tensor, widths: Sequence[float]) -> Tensor:
    """Returns log 1/m sum_i N(x; c_i, h^2 I) in nats at x (n, d) for centers c (m, d) and widths h: (len(widths), n).

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


def check_baseline(nll: float, nll_stderr: float, simple: Baseline | None, d: int) -> Check | None:
    """Checks that the NLL of the flow is not higher than the NLL of a Gaussian.

    The flow is worse if the paired difference exceeds 2 of its standard errors and also 0.01 nats plus 1e-4 nats per
    column, a gap that is tolerated because training is not perfect. It is also worse if the difference exceeds 0.5 nats
    plus 3 standard errors of the Gaussian's NLL. This second rule detects a flow that gives single rows a huge -log p,
    which makes the standard error of the difference large.

    Args:
        nll, nll_stderr: the NLL of the flow and its standard error.
        simple: the Gaussian baseline, or None.
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
        f"the NLL of the flow is {with_error(nll, nll_stderr)} nats. A Gaussian fitted to the training rows"
        f"{simple.settings and f' ({simple.settings})'} has {with_error(simple.nll, simple.nll_stderr)} nats. The flow "
        f"is worse by {with_error(simple.worse, simple.worse_stderr)} nats. The model may be too large for the number "
        "of rows, the "
        "training too short (trainer.steps), or the learning rate too high (trainer.lr)",
    )


def warn_if_better(nll: float, nll_stderr: float, simple: Mapping[str, Baseline], d: int) -> None:
    """Warns if the flow is worse than a baseline other than the Gaussian, by the rule of `check_baseline`.

    Args:
        d: the number of columns.
    """
    better = [
        f"{display_name(name)} ({one.settings}) {with_error(one.nll, one.nll_stderr)} nats, the flow is worse by "
        f"{with_error(one.worse, one.worse_stderr)}"
        for name, one in simple.items()
        if name != GAUSSIAN and math.isfinite(one.nll_stderr) and one.worse > _limit(one, d)
    ]
    if better:
        log.warning(
            "a baseline has a lower NLL than the flow, which has %s nats: %s. Train longer (trainer.steps, or "
            "trainer.time_limit of model=auto), or choose another model (model=mixture is a Gaussian mixture, "
            "model=auto makes an ensemble of several models)",
            with_error(nll, nll_stderr),
            "; ".join(better),
        )


def _limit(simple: Baseline, d: int) -> float:
    """Returns the largest paired difference in nats at which the flow is not worse; see `check_baseline`."""
    limit = CLEARLY + CLEARLY_ERRORS * simple.nll_stderr
    if math.isfinite(simple.worse_stderr):
        limit = min(limit, max(PAIRED + PAIRED_PER_COLUMN * d, PAIRED_ERRORS * simple.worse_stderr))
    return limit


def _divided(data: Dataset, rows: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns training rows (k, d) and validation rows (m, d) for the mixture and the kernel density estimate.

    Args:
        rows: all training rows, (n, d). The training rows are split if the data set has no validation set.
        weights: the weights of the training rows, (n,), or None. With weights, rows are drawn by weight after the
            split.
    """
    if not isinstance(data, RowsInMemory):
        # the validation rows of a file may be sorted, so a random subset is used
        order = _order(len(data.val))[:MOST_VAL]
        train, val = slice(MOST_TRAIN), _real(data.val.cpu(), _VAL)[order]
        of_val = None if data.val_weights is None else data.val_weights[order]
        return _drawn(rows[train], None if weights is None else weights[train]), _drawn(val, of_val)
    order = _order(len(rows))
    held = min(MOST_VAL, math.ceil(len(rows) / HELD_OUT))
    parts = order[held:][:MOST_TRAIN] if len(rows) > 1 else order, order[:held]
    train_rows, val_rows = (_drawn(rows[part], None if weights is None else weights[part]) for part in parts)
    return train_rows, val_rows


def _drawn(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Returns n rows that are drawn by weight from the n rows, or the unchanged rows without weights."""
    return rows if weights is None else rows[resample(weights)]


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=step_generator(0, _STREAM, _ORDER))


def _real(x: Tensor, which: int) -> Tensor:
    """Adds seeded uniform noise to x (n, d) if it has whole numbers; otherwise returns x unchanged."""
    if x.is_floating_point():
        return x
    u = torch.rand(x.shape, dtype=torch.float64, generator=step_generator(0, _STREAM, which))
    return x + u
