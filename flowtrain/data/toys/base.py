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

# keys of the random numbers of each set
_TRAIN, _VAL, _TEST = 1, 2, 3
# largest number of points in a held-out set
MOST_POINTS = 10_000_000


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Returns samples of U(0, 1) of this shape, in float64 on the CPU."""
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Returns samples of N(0, 1) of this shape, in float64 on the CPU."""
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def choice(generator: torch.Generator, n: int, count: int) -> Tensor:
    """Returns `n` independent draws from 0 .. count - 1, all equally likely, (n,)."""
    return torch.randint(count, (n,), generator=generator)


class Toy(Dataset):
    """Base class of the toys: densities on the plane that can be sampled and evaluated.

    Every training batch has new samples, so a model cannot overfit a training set. The entropy is the lowest expected
    test NLL of any model.

    A subclass defines `sample`, `_log_density` and `entropy`.

    >>> from flowtrain.data.toys.shapes import Moons
    >>> moons = Moons()
    >>> kl_of_a_perfect_model = -moons.log_prob(moons.test).mean() - moons.entropy
    >>> bool(kl_of_a_perfect_model.abs() < 0.05)  # a mean over 10,000 points
    True

    Args:
        n_val, n_test: sizes of the held-out sets.
        seed: the seed of the held-out sets. The training batches use the seed of the run.

    Raises:
        ConfigError: a size or seed out of range.
    """

    event_shape = (2,)
    columns = ("x1", "x2")
    entropy: float
    # A density is evaluated in chunks of points, so that its arrays (points, quadrature nodes) fit in the CPU cache
    _chunk = 128

    def __init__(self, n_val: int = 2000, n_test: int = 10_000, seed: int = 0) -> None:
        seed = whole("data.seed", seed, least=0)
        for key, n in (("data.n_val", n_val), ("data.n_test", n_test)):
            # two coordinates, in float64 and in float32
            within_memory(key, whole(key, n), 2 * (8 + 4))
            if n > MOST_POINTS:
                raise ConfigError(
                    f"{key}={n}: give at most {MOST_POINTS:,}; evaluating the density of more points takes hours"
                )
        self.val = self.sample(n_val, step_generator(seed, _VAL)).float()
        self.test = self.sample(n_test, step_generator(seed, _TEST)).float()

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Returns new samples of shape (batch_size, 2), float32, keyed by (seed, step)."""
        return self.sample(batch_size, step_generator(seed, _TRAIN, step)).float()

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the true log density of x (B, 2) in nats: shape (B,), float64, on the device of x, without gradient.

        A point with NaN gives NaN. A point with an infinite coordinate gives -inf. The memory needed beyond input and
        output does not depend on B.

        Raises:
            DataError: x of another shape.

        Example:
            >>> from flowtrain.data.toys.shapes import Checkerboard
            >>> [round(p, 4) for p in Checkerboard().log_prob(torch.tensor([[0.5, 0.5], [9.0, 9.0]])).tolist()]
            [-3.4657, -inf]
        """
        if x.ndim != 2 or x.shape[1] != 2:
            raise DataError(f"log_prob got shape {tuple(x.shape)}; give points of shape (B, 2)")
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
        """Returns `n` independent samples, shape (n, 2), float64."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Returns the log density in nats of finite points x (B, 2): shape (B,).

        x is float64 on the CPU, with B at most `_chunk`.
        """


_LOG_2PI = math.log(2 * math.pi)


@cache
def _unit_rule(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def gauss_legendre(edges: Tensor, order: int = 48) -> tuple[Tensor, Tensor]:
    """Returns nodes and weights (N,) of the Gauss-Legendre rule with `order` points on each of P panels, N = P order.

    The rule is exact for polynomials of degree 2 order - 1 on each panel. A few panels of high order need a third fewer
    nodes than many panels of low order, because nodes cluster at the edges of each panel.

    Args:
        edges: the edges of the panels, (P + 1,).
        order: the number of nodes in a panel.
    """
    unit_nodes, unit_weights = _unit_rule(order)
    half = edges.diff()[:, None] / 2
    centre = (edges[1:] + edges[:-1])[:, None] / 2
    return (centre + half * unit_nodes).flatten(), (half * unit_weights).flatten()


def log_mixture(log_kernels: Tensor, log_weights: Tensor) -> Tensor:
    """Returns log sum_n exp(log_weights_n + log_kernels_bn): (B, N) and (N,) give (B,)."""
    return torch.logsumexp(log_kernels + log_weights, dim=1)


def log_uniform_mixture(log_kernels: Tensor) -> Tensor:
    """Returns the log density of a mixture with equal weights, from the log densities of its components.

    Shapes: (B, N) to (B,) for N components.
    """
    return torch.logsumexp(log_kernels, dim=1) - math.log(log_kernels.shape[1])


def log_gaussians(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """Returns log N(x; c, std^2 I) of points x (B, 2) for centres c (N, 2): shape (B, N)."""
    d1 = x[:, :1] - centres[:, 0]
    d2 = x[:, 1:] - centres[:, 1]
    return -(d1.square() + d2.square()) / (2 * std**2) - _LOG_2PI - 2 * math.log(std)


def log_blurred_circles(x: Tensor, radii: Tensor, std: float) -> Tensor:
    """Returns the log density of points x (B, 2) under each of K blurred circles: shape (B, K).

    A blurred circle is a uniform distribution on a circle of radius R plus noise N(0, s^2 I) with s = std. With
    rho = |x| the integral over the angle is a Bessel function,

        p(x) = exp(-(rho - R)^2 / (2 s^2)) i0e(rho R / s^2) / (2 pi s^2),    i0e(z) = exp(-z) I0(z).
    """
    rho = torch.hypot(x[:, :1], x[:, 1:])
    bessel: Tensor = torch.special.i0e(rho * radii / std**2)
    return bessel.log() - (rho - radii).square() / (2 * std**2) - _LOG_2PI - 2 * math.log(std)


def sample_blurred_circles(n: int, radii: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Draws `n` samples (n, 2): a random circle, a uniform angle on it, plus noise N(0, std^2 I)."""
    radius = radii[choice(generator, n, len(radii))]
    angle = 2 * math.pi * uniform(generator, n)
    return polar(radius, angle) + std * normal(generator, n, 2)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """Converts polar coordinates r (n,) and a (n,) to (r cos a, r sin a), (n, 2)."""
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
