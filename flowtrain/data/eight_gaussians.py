"""Eight Gaussians on a circle."""

import math

import torch
from torch import Tensor

from flowtrain.data.curve import log_gaussians, log_uniform_mixture, polar
from flowtrain.data.toy import Toy, choice, normal

# FFJORD divides by 1.414, not by the square root of 2.
_STD = 0.5 / 1.414
_ANGLES = math.pi / 4 * torch.arange(8, dtype=torch.float64)
_CENTRES = polar(torch.full_like(_ANGLES, 4 / 1.414), _ANGLES)


class EightGaussians(Toy):
    """8gaussians: one of 8 centres at radius 4 and angles k pi / 4, plus N(0, 0.5^2 I), everything / 1.414.

    Density: p(x) = 1/8 sum_k N(x; c_k, s^2 I), s = 0.5 / 1.414.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py.
    Entropy: 2.8319 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.831880

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return _CENTRES[choice(generator, n, len(_CENTRES))] + _STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        return log_uniform_mixture(log_gaussians(x, _CENTRES, _STD))
