"""Four concentric rings."""

import torch
from torch import Tensor

from flowtrain.data.curve import log_blurred_circles, log_uniform_mixture, sample_blurred_circles
from flowtrain.data.toy import Toy

_RADII = torch.tensor([3.0, 2.25, 1.5, 0.75], dtype=torch.float64)
_STD = 0.08


class Rings(Toy):
    """rings: radius 3, 2.25, 1.5 or 0.75 with equal chance, uniform angle, plus N(0, 0.08^2 I).

    The noise comes after the scaling by 3, unlike in circles, so the rings are thin.

    Density: p(x) = 1/4 sum_R exp(-(|x| - R)^2 / (2 s^2)) i0e(|x| R / s^2) / (2 pi s^2), s = 0.08.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py, with the angles drawn at random.
    Entropy: 2.6232 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.623183

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return sample_blurred_circles(n, _RADII, _STD, generator)

    def _log_density(self, x: Tensor) -> Tensor:
        return log_uniform_mixture(log_blurred_circles(x, _RADII, _STD))
