"""The Swiss roll seen from its end."""

import math

import torch
from torch import Tensor

from flowtrain.data.curve import gauss_legendre, log_gaussians, log_mixture, polar
from flowtrain.data.toy import Toy, normal, uniform

_STD = 0.2
_FIRST, _LAST = 1.5 * math.pi, 4.5 * math.pi


class SwissRoll(Toy):
    """swissroll: x = (a cos a, a sin a) / 5 plus noise, a = 1.5 pi (1 + 2 u), u ~ U(0, 1).

    The noise is N(0, I) before the division by 5, so its standard deviation is 0.2 in data units.

    Density: p(x) = 1/(3 pi) integral of N(x; (a cos a, a sin a) / 5, 0.2^2 I) da over [1.5 pi, 4.5 pi], by
    quadrature over a.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py: columns 0 and 2 of scikit-learn's Swiss roll.
    Entropy: 2.6696 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.669646

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        angle = _FIRST + (_LAST - _FIRST) * uniform(generator, n)
        return polar(angle / 5, angle) + _STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        angle, weight = gauss_legendre(torch.linspace(_FIRST, _LAST, 6, dtype=torch.float64))
        return log_mixture(log_gaussians(x, polar(angle / 5, angle), _STD), (weight / (_LAST - _FIRST)).log())
