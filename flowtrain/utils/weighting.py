"""Means and standard errors of weighted rows, and rows drawn by their weights.

Rows of weight 0 contribute nothing, even if their values are not finite. Only the ratios of the weights matter. Weights
may be negative, except in `resample`.
"""

import math

import torch
from torch import Tensor

from flowtrain.utils.errors import FlowtrainError


def average(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns sum_i w_i v_i / sum_i w_i of values (n,), or their mean without weights. The result is a scalar tensor.

    Example:
        >>> average(torch.tensor([1.0, 4.0, torch.inf]), torch.tensor([2.0, 1.0, 0.0]))
        tensor(2.)
    """
    if weights is None:
        return values.mean()
    w = weights.to(values)
    return _products(w, values).sum() / w.sum()


def stderr(values: Tensor, weights: Tensor | None = None) -> float:
    """Returns the standard error of `average` of values (n,); NaN if there is at most one (effective) row.

    Without weights, it is the standard deviation divided by sqrt(n). With weights it is

        sqrt(m / (m - 1)) * sqrt(sum_i w_i^2 (v_i - mean)^2) / |sum_i w_i|

    with m = `effective_rows`. The second factor is the error of a ratio of sums over independent rows (Owen 2013, Monte
    Carlo theory, methods and examples, eq. 9.8). The first factor makes both formulas equal if all weights are equal.
    """
    if weights is None:
        return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    w, m = weights.to(values), effective_rows(weights)
    if not m > 1:
        return math.nan
    apart = _products(w, values - average(values, w))
    return math.sqrt(m / (m - 1)) * float(apart.square().sum().sqrt() / w.sum().abs())


def effective_rows(weights: Tensor) -> float:
    """Returns the effective number of rows, (sum_i w_i)^2 / sum_i w_i^2; 0 if all weights are 0.

    Source: Kish 1965, Survey sampling.

    Example:
        >>> effective_rows(torch.tensor([2.0, 2.0, 0.0])), round(effective_rows(torch.tensor([3.0, 1.0])), 4)
        (2.0, 1.6)
    """
    w = weights.double()
    largest = float(w.abs().max()) if len(w) else 0.0
    if not largest > 0:
        return 0.0
    w = w / largest
    return float(w.sum().square() / w.square().sum())


def resample(weights: Tensor, n: int | None = None, seed: int = 0) -> Tensor:
    """Draws rows with probabilities in proportion to their weights, by systematic resampling.

    Row i occurs n w_i / sum_j w_j times, rounded up or down at random. Each row therefore occurs once if all weights
    are equal and n is the number of rows. Negative weights count as 0.

    Source: Douc et al. 2005, Comparison of resampling schemes for particle filtering.

    Args:
        weights: (N,).
        n: the number of rows to draw. None means N.
        seed: the seed of the rounding.

    Returns:
        The positions of the rows in increasing order, (n,), int64, on the CPU.

    Example:
        >>> resample(torch.tensor([2.0, 0.0, 1.0, 1.0]))
        tensor([0, 0, 2, 3])
    """
    w = weights.detach().double().cpu().clamp_min(0)
    n = len(w) if n is None else n
    # a random order, because rows in the order of a file may have periodic weights
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    ends = w[order].cumsum(0)
    # with 1/2 in place of a random offset, equal weights give equal counts in spite of rounding errors
    places = (torch.arange(n, dtype=torch.float64) + 0.5) * (ends[-1] / n)
    return order[torch.searchsorted(ends, places, right=True).clamp_max(len(w) - 1)].sort().values


def equal_rows(values: Tensor, weights: Tensor, n: int) -> Tensor:
    """Returns n values of equal weight with approximately the distribution function of weighted values (N,).

    The result contains the quantiles (k + 1/2) / n, k = 0 .. n - 1, of the weighted distribution function. If weights
    are negative, the running maximum of this function is used.

    Example:
        >>> equal_rows(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0]), 4)
        tensor([1., 3., 3., 3.])
    """
    ordered, order = values.sort()
    w = weights.to(device=values.device, dtype=torch.float64)[order]
    below = (w.cumsum(0) / w.sum()).cummax(0).values
    places = (torch.arange(n, dtype=torch.float64, device=values.device) + 0.5) / n
    return ordered[torch.searchsorted(below, places, right=True).clamp_max(len(values) - 1)]


def cancelled(x: Tensor, weights: Tensor) -> Tensor:
    """Returns weights (n,) of rows x (n, d) without negative weights. Their sum does not change.

    For each row of negative weight, its nearest rows join a cell until the sum of their weights is not negative. The
    sum is then distributed over the cell in proportion to the absolute values of the weights. The columns are divided
    by their standard deviations. The time is of order n log n for each row of negative weight.

    Source: Andersen, Guetschow, Maier and Prestel 2020, A positive resampler for Monte Carlo events with negative
    weights, section 2.

    Raises:
        FlowtrainError: the sum of the weights is not positive.

    Example:
        >>> cancelled(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([-1.0, 2.0, 1.0]))
        tensor([0.3333, 0.6667, 1.0000])
    """
    if not float(weights.sum()) > 0:
        raise FlowtrainError("the sum of the weights is not positive: give other rows")
    z = x / x.std(0, correction=0).clamp_min(torch.finfo(x.dtype).tiny)
    w = weights.clone()
    for i in (weights < 0).nonzero().flatten().tolist():
        if w[i] < 0:
            distance = (z - z[i]).square().sum(1)
            # the row is the first of its cell, even if other rows are equal
            distance[i] = -1
            near = distance.argsort(stable=True)
            enough = (w[near].cumsum(0) >= 0).nonzero().flatten()
            # rounding can leave a negative sum of all rows
            cell = near[: int(enough[0]) + 1] if len(enough) else near
            size = w[cell].abs()
            w[cell] = size * (w[cell].sum().clamp_min(0) / size.sum())
    return w


def _products(w: Tensor, values: Tensor) -> Tensor:
    return torch.where(w == 0, torch.zeros_like(values), w * values)
