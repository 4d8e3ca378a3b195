"""EM (expectation maximization) for Gaussian mixtures, in float64.

The logarithm of w_k N(x; m_k, S_k) is linear in the features 1, x_i and x_i x_j of a row x. An E step is therefore the
product of the features (n, p) with coefficients (p, K). The sufficient statistics of an M step are the product of the
responsibilities (K, n) with the same features. No intermediate result has n K d elements.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Largest number of feature values that are computed at a time
PART = 2**22
# The features of all rows are kept between steps if they have at most this number of values
KEPT = 2**25


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture sum_k w_k N(m_k, S_k), k = 1 .. K.

    Attributes:
        log_weights: log w_k, (K,).
        means: m_k, (K, d).
        covariances: S_k, (K, d, d), or the variances (K, d) of a diagonal mixture.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    def scale_tril(self) -> Tensor:
        """Returns the Cholesky factors of the covariances, (K, d, d)."""
        if self.covariances.dim() == 2:
            return torch.diag_embed(self.covariances.sqrt())
        factor: Tensor = torch.linalg.cholesky(self.covariances)
        return factor


@dataclass(frozen=True)
class Prior:
    """An inverse-Wishart prior on each covariance: p(S) ∝ exp(-rows / 2 (log|S| + tr(target S^-1))).

    The prior has the same effect as `rows` additional rows in each component whose covariance is the target (Fraley and
    Raftery 2007, Bayesian regularization for normal mixture estimation and model-based clustering).

    Attributes:
        rows: the strength of the prior; 0 means no prior.
        target: (d, d), or (d,) for a diagonal mixture.
    """

    rows: float
    target: Tensor


def fit_mixture(
    x: Tensor,
    components: int,
    diagonal: bool = False,
    *,
    prior_rows: float = 0.0,
    steps: int = 200,
    tolerance: float = 1e-6,
    floor: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Mixture:
    """Fits a Gaussian mixture to rows by EM (Dempster et al. 1977), which starts from the clusters of k-means.

    Args:
        x: rows (n, d), float64, whose columns should have standard deviations near 1.
        components: the number of components.
        diagonal: whether covariances are diagonal.
        prior_rows: the strength of the `Prior`. Its target is the pooled covariance within the clusters.
        steps: the largest number of EM steps.
        tolerance: EM ends when a step increases the objective by less, in nats. The objective is the mean
            log-likelihood plus the log prior divided by n.
        floor: the smallest eigenvalue of a covariance. Without it the likelihood is unbounded, because a component on a
            single row has variance 0.
        generator: the random generator of k-means, on the CPU. None means the global generator.
    """
    rows = _Rows(x, diagonal)
    shares = nn.functional.one_hot(clusters(x, components, generator), components).to(x)
    sums = sum_features(rows, shares)
    within = m_step(sums, diagonal, 0.0)
    weights = within.log_weights.exp().view(-1, *[1] * (within.covariances.dim() - 1))
    prior = Prior(prior_rows, (weights * within.covariances).sum(0))
    before = -math.inf
    for _ in range(max(1, steps)):
        mixture = m_step(sums, diagonal, floor, prior)
        now, sums = e_step(rows, mixture)
        now += log_prior(mixture, prior) / len(x)
        if not now - before >= tolerance:
            break
        before = now
    return mixture


class _Rows:
    """The features of rows x (n, d), in chunks. The features are kept between steps if they are small."""

    def __init__(self, x: Tensor, diagonal: bool) -> None:
        self.n, self.diagonal = len(x), diagonal
        width = 1 + 2 * x.shape[1] if diagonal else 1 + x.shape[1] * (x.shape[1] + 3) // 2
        self._parts = torch.split(x, max(1, PART // width))
        self._kept = [features(part, diagonal) for part in self._parts] if len(x) * width <= KEPT else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept or (features(part, self.diagonal) for part in self._parts))


def features(x: Tensor, diagonal: bool) -> Tensor:
    """Returns the features 1, x_i and x_i x_j, i >= j, of each row of x (n, d); only i = j for a diagonal mixture."""
    if diagonal:
        products = x.square()
    else:
        i, j = torch.tril_indices(x.shape[1], x.shape[1], device=x.device)
        products = x[:, i] * x[:, j]
    return torch.cat([torch.ones_like(x[:, :1]), x, products], 1)


def coefficients(mixture: Mixture) -> Tensor:
    """Returns the coefficients (K, p) of the features in log w_k N(x; m_k, S_k)."""
    means, covariances = mixture.means, mixture.covariances
    d = means.shape[1]
    if covariances.dim() == 2:
        precisions = 1 / covariances
        linear, log_det = precisions * means, covariances.log().sum(1)
        products = -0.5 * precisions
    else:
        factors = mixture.scale_tril()
        log_det = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1)
        precisions = torch.cholesky_inverse(factors)
        linear = (precisions @ means.unsqueeze(-1)).squeeze(-1)
        i, j = torch.tril_indices(d, d, device=means.device)
        # the feature x_i x_j represents both x_i x_j and x_j x_i
        products = precisions[:, i, j] * torch.where(i == j, -0.5, -1.0)
    constant = mixture.log_weights - 0.5 * (log_det + d * math.log(2 * math.pi) + (means * linear).sum(1))
    return torch.cat([constant.unsqueeze(1), linear, products], 1)


def e_step(rows: _Rows, mixture: Mixture) -> tuple[float, Tensor]:
    """The E step. Returns the mean log-likelihood in nats, and sums (K, p) of features weighted by responsibilities."""
    theta = coefficients(mixture).T
    total, sums = 0.0, torch.zeros_like(theta.T)
    for part in rows:
        terms = part @ theta
        # computed in place, with one exponential for both log p and the responsibilities
        largest = terms.amax(1, keepdim=True)
        shares = terms.sub_(largest).exp_()
        scale = shares.sum(1, keepdim=True)
        total += float((largest + scale.log()).sum())
        sums.addmm_(shares.div_(scale).T, part)
    return total / rows.n, sums


def sum_features(rows: _Rows, shares: Tensor) -> Tensor:
    """Returns the sums (K, p) of the features of rows, weighted by responsibilities (n, K)."""
    parts, begin = [], 0
    for part in rows:
        parts.append(shares[begin : begin + len(part)].T @ part)
        begin += len(part)
    return torch.stack(parts).sum(0)


def m_step(sums: Tensor, diagonal: bool, floor: float, prior: Prior | None = None) -> Mixture:
    """The M step. Returns the mixture that maximizes the objective for sums (K, p) of the features.

    With N_k rows of covariance C_k in component k, S_k = (N_k C_k + rows target) / (N_k + rows).
    """
    # keeps the weight of a component without rows positive, so that its logarithm is finite
    total = sums[:, 0] + 10 * torch.finfo(sums.dtype).eps
    # p = 1 + 2 d, or 1 + d (d + 3) / 2
    p = sums.shape[1]
    d = (p - 1) // 2 if diagonal else (math.isqrt(8 * p + 1) - 3) // 2
    means, products = sums[:, 1 : d + 1] / total.unsqueeze(1), sums[:, d + 1 :] / total.unsqueeze(1)
    if diagonal:
        covariances = products - means.square()
    else:
        i, j = torch.tril_indices(d, d, device=sums.device)
        covariances = sums.new_empty(len(sums), d, d)
        covariances[:, i, j] = products
        covariances[:, j, i] = products
        covariances -= means.unsqueeze(2) * means.unsqueeze(1)
    if prior is not None and prior.rows > 0:
        share = (prior.rows / (total + prior.rows)).view(-1, *[1] * (covariances.dim() - 1))
        covariances = (1 - share) * covariances + share * prior.target
    return Mixture((total / total.sum()).log(), means, floor_eigenvalues(covariances, floor))


def log_prior(mixture: Mixture, prior: Prior) -> float:
    """Returns the log prior density of all covariances, up to a constant."""
    if prior.rows == 0:
        return 0.0
    s = mixture.covariances
    if s.dim() == 2:
        value = s.log().sum() + (prior.target / s).sum()
    else:
        factors = mixture.scale_tril()
        value = 2 * factors.diagonal(dim1=1, dim2=2).log().sum()
        value = value + (torch.cholesky_inverse(factors) * prior.target).sum()
    return -0.5 * prior.rows * float(value)


def floor_eigenvalues(covariances: Tensor, floor: float) -> Tensor:
    """Raises the eigenvalues of covariances (K, d, d), or variances (K, d), to at least `floor`.

    The result maximizes the likelihood under the constraint that no eigenvalue is below `floor`.
    """
    if covariances.dim() == 2:
        return covariances.clamp_min(floor)
    margin = floor * torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    # covariance - margin is positive definite if all eigenvalues are above the floor
    low = torch.linalg.cholesky_ex(covariances - margin).info != 0
    if bool(low.any()):
        values, vectors = torch.linalg.eigh(covariances[low])
        covariances = covariances.clone()
        covariances[low] = vectors * values.clamp_min(floor).unsqueeze(1) @ vectors.mT
    return covariances


def clusters(x: Tensor, k: int, generator: torch.Generator | None = None, steps: int = 10) -> Tensor:
    """Clusters the rows x (n, d) by k-means. Returns the cluster of each row, 0 .. k - 1, (n,).

    The centres start from k-means++ (Arthur and Vassilvitskii 2007, k-means++: the advantages of careful seeding).

    Args:
        generator: a random generator on the CPU. None means the global generator.
        steps: the largest number of steps of Lloyd's algorithm.
    """

    def draw(weights: Tensor) -> int:
        return int(torch.multinomial(weights.cpu(), 1, generator=generator))

    nearest = torch.ones(len(x), dtype=x.dtype, device=x.device)
    centres = []
    for i in range(k):
        # if fewer than k rows are distinct, any row is drawn
        centres.append(x[draw(nearest if bool((nearest > 0).any()) else torch.ones_like(nearest))])
        distance = (x - centres[-1]).square().sum(1)
        nearest = distance if i == 0 else torch.minimum(nearest, distance)
    means = torch.stack(centres)
    found = torch.cdist(x, means).argmin(1)
    for _ in range(steps):
        share = nn.functional.one_hot(found, k).to(x)
        count = share.sum(0).unsqueeze(1)
        means = torch.where(count > 0, share.T @ x / count.clamp_min(1), means)
        again = torch.cdist(x, means).argmin(1)
        if torch.equal(again, found):
            break
        found = again
    return found
