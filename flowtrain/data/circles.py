"""Two concentric circles."""

import torch
from torch import Tensor

from flowtrain.data.curve import log_blurred_circles, log_uniform_mixture, sample_blurred_circles
from flowtrain.data.toy import Toy

_RADII = torch.tensor([3.0, 1.5], dtype=torch.float64)
_STD = 0.24


class Circles(Toy):
    """circles: radius 1 or 0.5 with equal chance, uniform angle, plus N(0, 0.08^2 I), everything times 3.

    In data units radii 3 and 1.5 with noise of standard deviation 0.24.

    Density: p(x) = 1/2 sum_R exp(-(|x| - R)^2 / (2 s^2)) i0e(|x| R / s^2) / (2 pi s^2), s = 0.24.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py, with the angles drawn at random.
    Entropy: 3.2681 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 3.268136

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return sample_blurred_circles(n, _RADII, _STD, generator)

    def _log_density(self, x: Tensor) -> Tensor:
        return log_uniform_mixture(log_blurred_circles(x, _RADII, _STD))
