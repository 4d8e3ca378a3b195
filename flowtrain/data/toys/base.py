"""The base class of the two-dimensional toys, and quadrature for densities along a curve."""

import math
from abc import abstractmethod
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.base import Dataset, step_generator
from flowtrain.utils.arguments import whole, within_memory
from flowtrain.utils.errors import ConfigError, DataError

_TRAIN, _VAL, _TEST = 1, 2, 3
# held-out points
MOST = 10_000_000


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """U(0, 1) of that shape, in float64 on the CPU."""
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """N(0, 1) of that shape, in float64 on the CPU."""
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def choice(generator: torch.Generator, n: int, count: int) -> Tensor:
    """`n` independent draws from 0 .. count - 1, all equally likely, (n,)."""
    return torch.randint(count, (n,), generator=generator)


class Toy(Dataset):
    """A density on the plane that can be sampled and evaluated: one subclass per toy.

    Every training batch is fresh, so there is no training set to overfit, and the entropy is the lowest test
    NLL any model can reach.

    A subclass gives `sample`, `_log_density` and `entropy`.

    >>> from flowtrain.data.toys.shapes import Moons
    >>> moons = Moons()
    >>> kl_of_a_perfect_model = -moons.log_prob(moons.test).mean() - moons.entropy
    >>> bool(kl_of_a_perfect_model.abs() < 0.05)  # a mean over 10,000 points
    True

    Args:
        n_val, n_test: sizes of the held-out sets.
        seed: of the held-out sets alone; a run's own seed drives only the training batches.

    Raises:
        ConfigError: a size or seed out of range.
    """

    event_shape = (2,)
    columns = ("x1", "x2")
    entropy: float
    # Points by quadrature nodes is what a density holds, several times over: small enough to stay in the cache.
    _chunk = 128

    def __init__(self, n_val: int = 2000, n_test: int = 10_000, seed: int = 0) -> None:
        seed = whole("data.seed", seed, least=0)
        for key, n in (("data.n_val", n_val), ("data.n_test", n_test)):
            # in float64, and once more in float32
            within_memory(key, whole(key, n), 2 * (8 + 4))
            if n > MOST:
                raise ConfigError(f"{key}={n}: give at most {MOST:,}; their density alone would take hours")
        self.val = self.sample(n_val, step_generator(seed, _VAL)).float()
        self.test = self.sample(n_test, step_generator(seed, _TEST)).float()

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Fresh samples of shape (batch_size, 2), float32, keyed by (seed, step)."""
        return self.sample(batch_size, step_generator(seed, _TRAIN, step)).float()

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """True log density in nats of x (B, 2): shape (B,), float64, on the device of x, without gradient.

        NaN gives NaN and an infinite coordinate -inf. Memory does not grow with B beyond the input's own size.

        Raises:
            DataError: x of another shape.

        Example:
            >>> from flowtrain.data.toys.shapes import Checkerboard
            >>> [round(p, 4) for p in Checkerboard().log_prob(torch.tensor([[0.5, 0.5], [9.0, 9.0]])).tolist()]
            [-3.4657, -inf]
        """
        if x.ndim != 2 or x.shape[1] != 2:
            raise DataError(f"log_prob got shape {tuple(x.shape)}: a toy's points have shape (B, 2)")
        points = x.to("cpu", torch.float64)
        parts = [self._log_density_or_nan(chunk) for chunk in torch.split(points, self._chunk)]
        return torch.cat(parts).to(x.device)

    def _log_density_or_nan(self, x: Tensor) -> Tensor:
        finite = x.isfinite().all(dim=1)
        out = torch.full((len(x),), -torch.inf, dtype=torch.float64)
        out[x.isnan().any(dim=1)] = torch.nan
        out[finite] = self._log_density(x[finite])
        return out

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` independent samples, shape (n, 2), float64."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Log density in nats of finite points x (B, 2), float64 on the CPU, B at most a chunk: shape (B,)."""


_LOG_2PI = math.log(2 * math.pi)


@cache
def _unit_rule(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def gauss_legendre(edges: Tensor, order: int = 48) -> tuple[Tensor, Tensor]:
    """Nodes and weights (N,) of the `order`-point rule on each of the panels between the edges (P + 1,).

    Exact for polynomials of degree 2 order - 1 on each panel; N = P order. A few panels of high order need a
    third fewer nodes than many of low order, which crowd their nodes at every edge.
    """
    unit_nodes, unit_weights = _unit_rule(order)
    half = edges.diff()[:, None] / 2
    centre = (edges[1:] + edges[:-1])[:, None] / 2
    return (centre + half * unit_nodes).flatten(), (half * unit_weights).flatten()


def log_mixture(log_kernels: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_n exp(log_weights_n + log_kernels_bn): (B, N) and (N,) give (B,)."""
    return torch.logsumexp(log_kernels + log_weights, dim=1)


def log_uniform_mixture(log_kernels: Tensor) -> Tensor:
    """log of the mean over components: (B, N) gives (B,)."""
    return torch.logsumexp(log_kernels, dim=1) - math.log(log_kernels.shape[1])


def log_gaussians(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """log N(x; c, std^2 I) of points (B, 2) about every centre (N, 2): shape (B, N)."""
    d1 = x[:, :1] - centres[:, 0]
    d2 = x[:, 1:] - centres[:, 1]
    return -(d1.square() + d2.square()) / (2 * std**2) - _LOG_2PI - 2 * math.log(std)


def log_blurred_circles(x: Tensor, radii: Tensor, std: float) -> Tensor:
    """log density of points (B, 2) under a uniform angle on each circle (K,) plus N(0, std^2 I): shape (B, K).

    With rho = |x| and s = std the integral over the angle is a Bessel function,

        p(x) = exp(-(rho - R)^2 / (2 s^2)) i0e(rho R / s^2) / (2 pi s^2),    i0e(z) = exp(-z) I0(z).
    """
    rho = torch.hypot(x[:, :1], x[:, 1:])
    bessel: Tensor = torch.special.i0e(rho * radii / std**2)
    return bessel.log() - (rho - radii).square() / (2 * std**2) - _LOG_2PI - 2 * math.log(std)


def sample_blurred_circles(n: int, radii: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """`n` samples (n, 2): a circle at random, a uniform angle on it, then N(0, std^2 I)."""
    radius = radii[choice(generator, n, len(radii))]
    angle = 2 * math.pi * uniform(generator, n)
    return polar(radius, angle) + std * normal(generator, n, 2)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """(r cos a, r sin a): two arrays (n,) give (n, 2)."""
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
