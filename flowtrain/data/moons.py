"""Two interleaved half circles."""

import math

import torch
from torch import Tensor

from flowtrain.data.curve import gauss_legendre, log_gaussians, log_mixture, log_uniform_mixture
from flowtrain.data.toy import Toy, choice, normal, uniform

_STD = 0.2


def _half_circles(angle: Tensor) -> Tensor:
    """The points (2, n, 2) of both moons at angles (n,) in [0, pi], in data units."""
    upper = torch.stack((2 * angle.cos() - 1, 2 * angle.sin() - 0.2), dim=1)
    lower = torch.stack((1 - 2 * angle.cos(), 0.8 - 2 * angle.sin()), dim=1)
    return torch.stack((upper, lower))


class Moons(Toy):
    """moons: x = 2 m + (-1, -0.2) with m on one of two half circles plus noise.

    m = (cos a, sin a) or (1 - cos a, 1/2 - sin a) with equal chance, a ~ U(0, pi), plus N(0, 0.1^2 I): in data
    units two half circles of radius 2 with noise of standard deviation 0.2.

    Density: p(x) = 1/2 sum_m 1/pi integral_0^pi N(x; c_m(a), 0.2^2 I) da, by quadrature over a.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py, with the angles drawn at random.
    Entropy: 2.3939 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.393879

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        both = _half_circles(math.pi * uniform(generator, n))
        moon = choice(generator, n, 2)
        return both[moon, torch.arange(n)] + _STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        angle, weight = gauss_legendre(torch.linspace(0, math.pi, 3, dtype=torch.float64))
        moons = [log_mixture(log_gaussians(x, c, _STD), (weight / math.pi).log()) for c in _half_circles(angle)]
        return log_uniform_mixture(torch.stack(moons, dim=1))
