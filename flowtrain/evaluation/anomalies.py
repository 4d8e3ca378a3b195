"""Anomaly detection: conformal p-values of rows from held-out rows, decisions, and the columns that explain them.

The score of a row x is -log p(x). Its p-value compares the score with the scores of n calibration rows, which were not
used to fit the weights of the flow:

    p(x) = (1 + number of calibration rows i with log p(x_i) <= log p(x)) / (n + 1)

If x and the calibration rows are exchangeable, then P(p(x) <= a) <= a for every a, whatever the flow is. Source: Bates,
Candes, Lei, Romano and Sesia 2023, Testing for outliers with conformal p-values, equation 2.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.evaluation.evaluate import dataset_of, in_evaluation_mode
from flowtrain.evaluation.log_likelihood import held_out, score_rows
from flowtrain.evaluation.ood_detection import auroc
from flowtrain.evaluation.result import AnomalyDetection, AnomalyRows, Evaluation
from flowtrain.flow import Context, Density, Rows
from flowtrain.utils.arguments import number, whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.process import one_thread_if_small, own_settings

log = logging.getLogger("flowtrain")

# the false positive rate if no rate is given
RATE = 0.01
# the number of columns that are listed for a flagged row
TOP = 3
# the numbers of values that a column is given in each round, see `contributions`
ROUNDS = (16, 8, 8)
# the largest number of evaluations of log p for the contributions, and the same for flows that solve ODEs. Fewer rows
# are explained if this is not enough
EVALUATIONS, ODE_EVALUATIONS = 200_000, 20_000
# the largest number of numbers in the rows that are scored at once
AT_ONCE = 4_000_000
# rates and p-values are multiples of 1 / (n + 1) up to this relative rounding error
ROUNDING = 1e-9


class Rate(NamedTuple):
    """The error rate of the decisions.

    Attributes:
        value: the largest allowed rate.
        is_discovery: whether it is the false discovery rate, the expected share of ordinary rows among the flagged
            rows. Otherwise, it is the false positive rate, the share of flagged rows among the ordinary rows.
    """

    value: float
    is_discovery: bool = False

    @property
    def key(self) -> str:
        """The name of the option."""
        return "false_discovery_rate" if self.is_discovery else "false_positive_rate"

    @classmethod
    def of(cls, false_positive_rate: Any = None, false_discovery_rate: Any = None) -> "Rate":
        """Returns the rate that is given; a false positive rate of `RATE` if none is given.

        Raises:
            ConfigError: both rates, or a rate that is not between 0 and 1.
        """
        if false_positive_rate is not None and false_discovery_rate is not None:
            raise ConfigError("false_positive_rate, false_discovery_rate: these options exclude each other; give one")
        is_discovery = false_discovery_rate is not None
        value = false_discovery_rate if is_discovery else false_positive_rate
        found = cls(RATE if value is None else value, is_discovery)
        if not number(found.key, found.value) < 1:
            raise ConfigError(f"{found.key}={found.value}: give a number below 1")
        return found

    def check(self, n: int) -> None:
        """Checks that n calibration rows are enough: the smallest p-value is 1 / (n + 1).

        Raises:
            ConfigError: the rate is below the smallest p-value.

        Example:
            >>> Rate(0.01).check(99)
            >>> Rate(0.01).check(98)
            Traceback (most recent call last):
            flowtrain.utils.errors.ConfigError: false_positive_rate=0.01 needs at least 99 calibration rows, but there \
are 98. Give false_positive_rate=0.0102 or more, or hold out more validation rows (data.val_fraction)
        """
        if self.value * (n + 1) >= 1 - ROUNDING:
            return
        needed = math.ceil(1 / self.value - ROUNDING) - 1
        # 1 / (n + 1), rounded up to about three digits
        digits = 10 ** (len(str(n)) + 2)
        smallest = math.ceil(digits / (n + 1)) / digits
        raise ConfigError(
            f"{self.key}={self.value:g} needs at least {needed:,} calibration rows, but there are {n:,}. Give "
            f"{self.key}={smallest:.3g} or more, or hold out more validation rows (data.val_fraction)"
        )


class Anomalies(NamedTuple):
    """The result of `find_anomalies`: arrays with one entry for each row.

    Attributes:
        log_p: log p(x) in nats, (n,).
        p_values: conformal p-values, (n,).
        is_anomaly: whether the row is flagged, (n,).
        threshold: rows with log p below it are flagged. None if no row would be flagged.
        columns: for flagged rows, the positions of the columns that contribute most, (n, k), and -1 for other rows.
        contributions: the contributions of these columns in nats, (n, k), and NaN for other rows.
    """

    log_p: NDArray[np.float64]
    p_values: NDArray[np.float64]
    is_anomaly: NDArray[np.bool_]
    threshold: float | None
    columns: NDArray[np.int64]
    contributions: NDArray[np.float64]


def find_anomalies(
    flow: Density,
    x: Tensor | Rows,
    calibration: Tensor | Rows,
    *,
    false_positive_rate: float | None = None,
    false_discovery_rate: float | None = None,
    context: Context = None,
    calibration_context: Context = None,
    columns: int = TOP,
    batch_size: int | None = None,
    seed: int = 0,
) -> Anomalies:
    """Flags rows whose log p is unusually small, compared with calibration rows.

    The columns that contribute most are found for the rows with the smallest log p first, with up to 200,000
    evaluations of log p, or 20,000 for flows that solve ODEs; see `contributions`. Images have no contributions. If
    log p of a row cannot be computed, it counts as -inf.

    Args:
        x: rows (n, *event_shape): an array, a tensor or a data frame.
        calibration: ordinary rows that the flow was not fitted to, such as its validation rows.
        false_positive_rate: the share of ordinary rows that may be flagged. None: 0.01, unless the other rate is given.
        false_discovery_rate: the share of ordinary rows among the flagged rows that is allowed, in expectation (the
            procedure of Benjamini and Hochberg over the rows of x).
        context, calibration_context: for a conditional flow, the context of the rows, see `Flow.log_prob`.
        columns: the largest number of columns that are listed for a flagged row. 0: contributions are not computed.
        batch_size, seed: see `flowtrain.evaluate`.

    Raises:
        ConfigError: both rates, or a rate that is too small for the number of calibration rows. The message says how
            many rows it needs.
        DataError, FlowtrainError: see `flowtrain.evaluate`.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> from flowtrain.flow import Flow
        >>> flow = Flow((2,), Affine(2))
        >>> x = np.array([[0.0, 0.5], [0.0, 9.0]])
        >>> found = find_anomalies(flow, x, np.random.default_rng(0).normal(size=(99, 2)))
        >>> found.is_anomaly.tolist(), found.p_values[1].item(), found.columns[1, 0].item()
        ([False, True], 0.01, 1)
    """
    rate, columns = Rate.of(false_positive_rate, false_discovery_rate), whole("columns", columns, least=0)
    sets = (
        dataset_of(flow, x, context, seed),
        dataset_of(flow, calibration, calibration_context, seed, "calibration"),
    )
    (rows, c), (known, c_known) = (held_out(flow, data, "all") for data in sets)
    rate.check(len(known))
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    device = flow.like.device
    with own_settings(device), one_thread_if_small(flow.event_shape, device), in_evaluation_mode(flow):
        log_p = score_rows(flow, rows, c, latents=0, unsolved=len(rows), **options).log_p
        found, each = detect_anomalies(flow, rows, c, log_p, known, c_known, rate, None, options, columns)
    return Anomalies(
        log_p.numpy(),
        each.p_values.numpy(),
        each.flagged.numpy(),
        found.threshold,
        each.columns.numpy(),
        each.contributions.numpy(),
    )


def with_anomalies(
    result: Evaluation,
    flow: Density,
    data: Dataset,
    known: Dataset,
    labels: Tensor | None,
    rate: Rate,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Evaluation:
    """Returns an evaluation with the anomalies among the evaluated rows.

    Args:
        data: the data set that was evaluated.
        known: a data set whose validation rows are the calibration rows.
        labels, options: see `detect_anomalies`.
    """
    rows, calibration = held_out(flow, data, result.split), held_out(flow, known, "val")
    device = flow.like.device
    with own_settings(device), one_thread_if_small(flow.event_shape, device), in_evaluation_mode(flow):
        found, each = detect_anomalies(flow, *rows, result.scores, *calibration, rate, labels, options)
    return replace(result, anomalies=found, anomaly_rows=each)


def detect_anomalies(
    flow: Density,
    x: Tensor,
    context: Tensor | None,
    log_p: Tensor,
    calibration: Tensor,
    calibration_context: Tensor | None,
    rate: Rate,
    labels: Tensor | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    top: int = TOP,
) -> tuple[AnomalyDetection, AnomalyRows]:
    """Flags rows x (n, *event_shape) whose log p is unusually small, compared with calibration rows.

    Args:
        context, calibration_context: the contexts of both sets for a conditional flow, see `Flow.context_of`.
        log_p: log p of x in nats, (n,), float64. A value that is not a number counts as -inf.
        labels: 1 for known anomalies, 0 for ordinary rows, NaN for unknown rows, (n,), or None.
        options: batch size, draws and seed: arguments of `score_rows`.
        top: the largest number of columns that are listed for a flagged row.

    Raises:
        ConfigError: the rate is too small for the number of calibration rows.
    """
    n = len(calibration)
    rate.check(n)
    known = score_rows(flow, calibration, calibration_context, latents=0, unsolved=n, **options).log_p
    known, log_p = (torch.where(values.isnan(), -torch.inf, values) for values in (known, log_p))
    p_values = conformal_p_values(known, log_p)
    largest = largest_p_value(p_values, rate)
    # the number of calibration rows that are at most as likely as a flagged row
    most = math.floor(largest * (n + 1) + ROUNDING * n) - 1
    threshold = None if most < 0 else float(known.sort().values[most])
    flagged = torch.zeros_like(p_values, dtype=torch.bool) if threshold is None else log_p < threshold
    # a p-value is at least 1 / (n + 1), and the k-th smallest of m must be at most q k / m
    together = math.ceil(len(x) / (rate.value * (n + 1)) - ROUNDING) if rate.is_discovery else 1
    if threshold is None and together > 1:
        log.warning(
            "no row is flagged: with %d calibration rows, false_discovery_rate=%g can only flag %d or more of %d rows "
            "together; hold out more validation rows, or give false_positive_rate",
            n, rate.value, together, len(x),
        )  # fmt: skip
    columns, gains, explained = _explained(flow, x, context, log_p, flagged, calibration, options, top)
    found = AnomalyDetection(
        n=len(x),
        n_calibration=n,
        flagged=int(flagged.sum()),
        false_positive_rate=None if rate.is_discovery else rate.value,
        false_discovery_rate=rate.value if rate.is_discovery else None,
        threshold=threshold,
        explained=explained,
        **({} if labels is None else _measured(log_p, flagged, labels)),
    )
    return found, AnomalyRows(known, log_p, p_values, flagged, columns, gains, labels)


def conformal_p_values(calibration: Tensor, log_p: Tensor) -> Tensor:
    """Returns (1 + number of calibration values <= log p) / (n + 1) for each log p (m,), for calibration values (n,).

    Equal values count, so that ties make a p-value larger, never smaller.

    Example:
        >>> conformal_p_values(torch.tensor([-1.0, -2.0, -2.0]), torch.tensor([-3.0, -2.0, 0.0])).tolist()
        [0.25, 0.75, 1.0]
    """
    below = torch.searchsorted(calibration.sort().values, log_p, right=True)
    return (1 + below).double() / (1 + len(calibration))


def largest_p_value(p_values: Tensor, rate: Rate) -> float:
    """Returns the p-value up to which rows are flagged; 0 if there is none.

    For a false positive rate, it is the rate. For a false discovery rate q and p-values p_(1) <= ... <= p_(m), it is

        max {p_(k): p_(k) <= q k / m}

    (Benjamini and Hochberg 1995, Controlling the false discovery rate). Conformal p-values of different rows are
    positively dependent, and the procedure holds for them (Bates et al. 2023, theorem 2).

    Example:
        >>> p = torch.tensor([0.01, 0.9, 0.02, 0.5])
        >>> largest_p_value(p, Rate(0.05)), round(largest_p_value(p, Rate(0.05, is_discovery=True)), 4)
        (0.05, 0.02)
    """
    if not rate.is_discovery:
        return rate.value
    ordered = p_values.sort().values
    limits = rate.value * torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    small = ordered[ordered <= limits * (1 + ROUNDING)]
    return float(small[-1]) if len(small) else 0.0


def _measured(log_p: Tensor, flagged: Tensor, labels: Tensor) -> dict[str, Any]:
    """Returns the attributes of an `AnomalyDetection` that need labels (n,). Rows without a label are left out."""
    is_known = ~labels.isnan()
    score, hit, bad = -log_p[is_known], flagged[is_known], labels[is_known] == 1
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    found: dict[str, Any] = {
        "n_anomalies": n_bad,
        "n_ordinary": n_good,
        "measured_false_positive_rate": int((hit & ~bad).sum()) / n_good if n_good else None,
        "measured_true_positive_rate": int((hit & bad).sum()) / n_bad if n_bad else None,
        "measured_false_discovery_rate": int((hit & ~bad).sum()) / int(hit.sum()) if hit.any() else None,
    }
    if n_bad and n_good:
        area, error = auroc(score[~bad], score[bad])
        found |= {"auroc": area, "auroc_stderr": error, "average_precision": average_precision(score, bad)}
    return found


def average_precision(score: Tensor, is_anomaly: Tensor) -> float:
    """Returns the average precision of scores (n,), of which higher ones mean an anomaly.

    It is sum_k (R_k - R_{k-1}) P_k, with precision P_k and recall R_k of the rows with at least the k-th largest
    distinct score.

    Example:
        >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))  # (1 + 2/3) / 2
        0.8333333333333333
    """
    values, order = score.sort(descending=True)
    hits = is_anomaly[order].double().cumsum(0)
    # the last row of each group of equal scores
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    hits, rows = hits[last], (torch.arange(len(values), dtype=torch.float64) + 1)[last]
    return float((hits.diff(prepend=hits.new_zeros(1)) * hits / rows).sum() / hits[-1])


def _explained(
    flow: Density,
    x: Tensor,
    context: Tensor | None,
    log_p: Tensor,
    flagged: Tensor,
    calibration: Tensor,
    options: Mapping[str, Any],
    top: int,
) -> tuple[Tensor, Tensor, int]:
    """Returns the columns and contributions of all rows, (n, k), and the number of rows that have them."""
    top = min(top, flow.event_shape[0]) if len(flow.event_shape) == 1 else 0
    columns = torch.full((len(x), top), -1)
    gains = torch.full((len(x), top), torch.nan, dtype=torch.float64)
    rows = flagged.nonzero().flatten()
    if not top or not len(rows):
        return columns, gains, 0
    # the rows with the smallest log p first
    evaluations = ODE_EVALUATIONS if flow.ode_blocks else EVALUATIONS
    rows = rows[log_p[rows].argsort(stable=True)][: max(1, evaluations // (sum(ROUNDS) * x.shape[1]))]
    given = None if context is None else context[rows.to(context.device)]
    columns[rows], gains[rows] = contributions(flow, x[rows.to(x.device)], given, calibration, top, options)
    return columns, gains, len(rows)


@torch.no_grad()
def contributions(
    flow: Density,
    x: Tensor,
    context: Tensor | None,
    calibration: Tensor,
    top: int = TOP,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Tensor, Tensor]:
    """Returns the columns that contribute most to a small log p(x), and their contributions in nats, (n, top).

    The contribution of column j is the gain in log p if only x_j is replaced by its best value t:

        g_j(x) = max_t log p(x with x_j = t) - log p(x) = max_t log p(t | other columns) - log p(x_j | other columns)

    The second form holds because the density of the other columns cancels. Therefore g_j does not depend on the unit of
    a column. A value that is frequent in its column has a large contribution if it does not fit the other columns. For
    a normal distribution, g_j = z^2 / 2 with the number z of conditional standard deviations by which x_j is off.

    t is found on a grid that is refined: 16 quantiles of the column in the calibration rows, and twice 8 values between
    the neighbours of the best value so far. t is never outside of the range of the calibration rows, and a whole number
    if the samples are whole numbers. The cost is 32 d evaluations of log p for a row of d columns.

    Args:
        x: rows (n, d).
        context: the contexts of these rows, or None. They are not changed.
        calibration: rows (m, d).
        options: batch size, draws and seed: arguments of `score_rows`.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> from flowtrain.flow import Flow
        >>> known = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> columns, gains = contributions(Flow((2,), Affine(2)), torch.tensor([[0.1, 4.0]]), None, known, 2)
        >>> columns.tolist(), [round(gain, 1) for gain in gains[0].tolist()]  # 4^2 / 2
        ([[1, 0]], [8.0, 0.0])
    """
    ordered = calibration.sort(0).values
    places = torch.linspace(0, len(ordered) - 1, ROUNDS[0]).round().long()
    values = ordered[places].T.double().to(x.device)
    now = _scores(flow, x, context, options).unsqueeze(1)
    # the last place has itself as its upper neighbour, the first place as its lower one
    log_p = _with_values(flow, x, context, values.expand(len(x), -1, -1), options)
    best, place = log_p.max(2)
    place = place.to(x.device).unsqueeze(2)
    t, low, high = (
        values.expand(len(x), -1, -1).gather(2, (place + step).clamp(0, len(places) - 1)) for step in (0, -1, 1)
    )
    for count in ROUNDS[1:]:
        step = (high - low) / (count + 1)
        between = low + step * torch.arange(1, count + 1, device=x.device)
        if not x.is_floating_point():
            between = between.round()
        log_p = _with_values(flow, x, context, between, options)
        found, place = log_p.max(2)
        t = torch.where((found > best).unsqueeze(2).to(x.device), between.gather(2, place.unsqueeze(2).to(x.device)), t)
        best = torch.maximum(best, found)
        low, high = (t - step).clamp(values[:, :1], values[:, -1:]), (t + step).clamp(values[:, :1], values[:, -1:])
    highest, columns = torch.maximum(best, now).topk(top, dim=1)
    # if log p is -inf for all values of a column, the column explains nothing
    return columns, (highest - now).nan_to_num(nan=0.0, posinf=torch.inf)


def _with_values(
    flow: Density, x: Tensor, context: Tensor | None, values: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Returns log p of rows x (n, d) in which one column has another value: (n, d, k) for values (n, d, k)."""
    (n, d), k = x.shape, values.shape[2]
    size, column, parts = max(1, AT_ONCE // (k * d * d)), torch.arange(d), []
    for start in range(0, n, size):
        part = slice(start, start + size)
        changed = x[part, None, None, :].repeat(1, d, k, 1)
        # the indices of columns are separated by a slice, so the dimension of columns comes first
        changed[:, column, :, column] = values[part].transpose(0, 1).to(x)
        given = None if context is None else context[part].repeat_interleave(d * k, 0)
        parts.append(_scores(flow, changed.flatten(0, 2), given, options).view(-1, d, k))
    return torch.cat(parts)


def _scores(flow: Density, x: Tensor, context: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """Returns log p, (n,), with -inf if it cannot be computed."""
    log_p = score_rows(flow, x, context, latents=0, unsolved=len(x), **options).log_p
    return torch.where(log_p.isnan(), -torch.inf, log_p)
