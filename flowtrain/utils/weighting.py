"""Means and standard errors of weighted rows, and rows drawn by their weights.

Rows of weight 0 contribute nothing, even if their values are not finite. Only the ratios of the weights matter. Weights
may be negative, except in `resample`.
"""

import math

import torch
from torch import Tensor


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
        >>> effective_rows(torch.tensor([2.0, 2.0, 0.0])), effective_rows(torch.tensor([3.0, 1.0]))
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


def _products(w: Tensor, values: Tensor) -> Tensor:
    return torch.where(w == 0, torch.zeros_like(values), w * values)
