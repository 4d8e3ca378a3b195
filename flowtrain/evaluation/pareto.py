"""Fits a generalized Pareto distribution to the largest importance weights: Pareto k, and the mass above them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# the smallest number of weights to which a tail is fitted
LEAST = 5
# the tail has at most this share of n weights, and at most this multiple of sqrt(n) weights
SHARE, ROOTS = 0.2, 3.0
# the weight of the prior of k: this number of observations of k = 1/2
PRIOR = 10
# the largest k in `Tail.missed`. The mean excess is infinite for k >= 1
MOST_K = 0.9


class Tail(NamedTuple):
    """The tail of n weights: a generalized Pareto distribution of the weights above `cutoff`.

    Attributes:
        k: the shape. For k > 0, the moments of order less than 1/k are finite.
        scale: the scale sigma, in units of the weights.
        cutoff: the largest weight that is not in the tail.
        largest: the largest weight.
        size: the number M of weights in the tail.
        n: the number of all weights.
    """

    k: float
    scale: float
    cutoff: float
    largest: float
    size: int
    n: int

    def missed(self, mean: float) -> float:
        """Returns E[(w - mean) 1(w > w_max)], the error of a sample mean without weights above the largest one, w_max.

        It is P(w > w_max) (w_max + (sigma + k (w_max - u)) / (1 - k) - mean), with the cutoff u and
        P(w > w_max) = (1 + k (w_max - u) / sigma)^(-1/k) M / n. The fraction is the mean excess of a generalized Pareto
        distribution, for which k above 0.9 counts as 0.9.

        Args:
            mean: the mean of the n weights.
        """
        if not self.scale > 0:
            return 0.0
        y = (self.largest - self.cutoff) / self.scale
        if 1 + self.k * y <= 0:
            # the distribution ends below w_max
            return 0.0
        beyond = math.exp(-y if abs(self.k) < 1e-6 else -math.log1p(self.k * y) / self.k) * self.size / self.n
        k = min(self.k, MOST_K)
        return beyond * (self.largest + self.scale * (1 + k * y) / (1 - k) - mean)


def weight_tail(weights: Tensor) -> Tail | None:
    """Fits the tail of nonnegative weights (n,). Returns None if the tail would have fewer than 5 weights.

    The tail consists of the M = ceil(min(n / 5, 3 sqrt(n))) largest weights. Equal weights have k = 0 and scale 0.

    Source: Vehtari et al. 2024, Pareto smoothed importance sampling, section 2 and appendix C.
    """
    n = len(weights)
    size = math.ceil(min(SHARE * n, ROOTS * math.sqrt(n)))
    if size < LEAST:
        return None
    # the smallest of these M + 1 values is the cutoff
    top = weights.double().topk(size + 1).values.flip(0)
    cutoff, excesses = float(top[0]), top[1:] - top[0]
    largest = float(top[-1])
    if not float(excesses[-1]) > 1e-12 * largest:
        return Tail(0.0, 0.0, cutoff, largest, size, n)
    k, scale = generalized_pareto(excesses[excesses > 0])
    return Tail((size * k + PRIOR / 2) / (size + PRIOR), scale, cutoff, largest, size, n)


def generalized_pareto(x: Tensor) -> tuple[float, float]:
    """Estimates the shape k and the scale sigma of p(x) = (1 + k x / sigma)^(-1/k - 1) / sigma from x > 0, (n,).

    The estimate is the posterior mean of b = -k / sigma under a prior that depends weakly on x.

    Source: Zhang and Stephens 2009, A new and efficient estimation method for the generalized Pareto distribution.

    Example:
        >>> u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        >>> k, scale = generalized_pareto((u**-0.5 - 1) / 0.5)  # quantiles of k = 0.5, sigma = 1
        >>> round(k, 2), round(scale, 2)
        (0.5, 1.0)
    """
    x = x.double().sort().values
    n = len(x)
    m = 30 + int(math.sqrt(n))
    j = torch.arange(1, m + 1, dtype=x.dtype)
    quartile = x[int(n / 4 + 0.5) - 1 if n > 1 else 0]
    b = 1 / x[-1] + (1 - (m / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-b.unsqueeze(1) * x).mean(1)
    log_likelihood = n * ((-b / k).log() - k - 1)
    b_mean = (log_likelihood.softmax(0) * b).sum()
    found = torch.log1p(-b_mean * x).mean()
    return float(found), float(-found / b_mean)
