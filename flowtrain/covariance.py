"""Shrunk covariance: a Gaussian fitted to few rows or to correlated columns (Ledoit and Wolf 2004)."""

import math

import torch
from torch import Tensor

from flowtrain.errors import DataError

# number of values converted to float64 at a time: 32 MiB
_CHUNK = 2**22


def shrunk_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and shrunk covariance (d, d) of rows x (n, d), in float64 on the device of x.

    The correlation matrix R is shrunk towards the identity, Sigma = D ((1 - s) R + s I) D with D the standard
    deviations. The result therefore does not depend on the units of the columns. The intensity s minimises the expected
    squared Frobenius error (Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance
    matrices), as `sklearn.covariance.LedoitWolf` computes it for standardised columns. It is at least 1/n: the estimate
    of Ledoit and Wolf is zero for two rows, and the result must be positive definite for any number of rows.

    A constant column counts as uncorrelated with the others and has variance 1. All moments are over n, not n - 1.

    Raises:
        DataError: x has no rows.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
        >>> mean, covariance = shrunk_covariance(x)
        >>> mean.tolist()
        [1.5, 15.0]
        >>> [round(c, 3) for c in covariance.diagonal().tolist()]  # not shrunk
        [1.25, 125.0]
        >>> 0 < float(covariance[0, 1]) < 12.5  # shrunk
        True
    """
    n, d = x.shape
    if n == 0:
        raise DataError("a covariance needs at least one row, and there are none")
    # values are divided by the largest of their column, because squares overflow float64 above 1e154
    largest = x.abs().amax(0).double()
    unit = torch.where(largest > 0, largest, 1.0)
    parts = torch.split(x, max(1, _CHUNK // max(1, d)))
    mean = torch.stack([(part.double() / unit).sum(0) for part in parts]).sum(0) / n
    square = torch.stack([(part.double() / unit - mean).square().sum(0) for part in parts]).sum(0) / n
    # rounding gives a constant column a standard deviation of about float64's epsilon
    flat = square.sqrt() <= 64 * torch.finfo(torch.float64).eps * mean.abs()
    std = torch.where(flat, 1.0, square.sqrt())

    correlation = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    fourth = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in parts:
        z = ((part.double() / unit - mean) / std).masked_fill(flat, 0.0)
        correlation += z.T @ z
        fourth += z.square().sum(1).square().sum()
    correlation /= n
    shrunk = (1 - _intensity(correlation, fourth / n, n)) * correlation
    shrunk.fill_diagonal_(1.0)
    scale = torch.where(flat, 1.0, unit * std)
    return unit * mean, scale[:, None] * shrunk * scale


def gaussian_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Log density in nats of N(mean, covariance) at rows x (n, d): (n,), float64.

    Example:
        >>> gaussian_log_prob(torch.zeros(1, 2), torch.zeros(2), torch.eye(2)).tolist()
        [-1.8378770664093453]
    """
    # columns are divided by their standard deviations so that the factorisation neither overflows nor underflows
    scale = covariance.double().diagonal().sqrt()
    factor = torch.linalg.cholesky(covariance.double() / scale[:, None] / scale)
    z = torch.linalg.solve_triangular(factor, ((x.double() - mean) / scale).T, upper=False)
    constant = 0.5 * len(scale) * math.log(2 * math.pi) + factor.diagonal().log().sum() + scale.log().sum()
    log_p: Tensor = -0.5 * z.square().sum(0) - constant
    return log_p


def _intensity(correlation: Tensor, fourth: Tensor, n: int) -> Tensor:
    """The shrinkage intensity, in [1/n, 1]; `fourth` is the mean of |z|^4 over the standardised rows z.

    b^2 / d^2 in the notation of Ledoit and Wolf: b^2 = (mean |z|^4 - |R|^2) / n is the squared error of R, and
    d^2 = |R - I|^2 its distance to the target.
    """
    distance = (correlation - correlation.diag().diag()).square().sum()
    error = (fourth - correlation.square().sum()) / n
    # the target is exact if there is no correlation
    return (error / distance).clamp(1 / n, 1.0) if distance > 0 else torch.ones_like(error)
