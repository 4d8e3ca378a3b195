"""The double well, and the many well, a product of independent double wells."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.data.targets.grid import GridDensity
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError

# outside of [-EDGE, EDGE], the density of the first coordinate is below exp(-1000) of its maximum
EDGE = 6.0


def log_well(x1: Tensor) -> Tensor:
    """Returns -x1^4 + 6 x1^2 + x1 / 2 of each element, the log density of a double well up to a constant."""
    square = x1.square()
    # factored, because x1^4 and 6 x1^2 nearly cancel between the wells
    return square * (6 - square) + 0.5 * x1


class ManyWell(Target):
    """many_well: d/2 independent pairs of columns, each with a double well.

    log p~(x) = sum over the pairs (x1, x2) of -x1^4 + 6 x1^2 + x1 / 2 - x2^2 / 2

    The columns 1, 3, 5 ... have two wells, near -1.71 and 1.75. The right well has 84% of the probability. There are
    2^(d/2) modes, which are 65,536 for 32 columns. The attribute `modes` is None for more than 8 columns. The signs of
    the columns 1, 3, 5 ... give the mode of a sample. log Z is d/2 times log Z of a pair, by quadrature in float64.

    Source: Midgley et al. 2023, "Flow annealed importance sampling bootstrap", section 4.2, and Noe et al. 2019.

    Args:
        dim: the number of columns d, which must be even.
        loc, scale: see `Target`.

    Raises:
        ConfigError: d is not a positive even number.
    """

    def __init__(self, dim: int = 32, loc: float | Sequence[float] = 0.0, scale: float | Sequence[float] = 1.0) -> None:
        pairs = whole("target.dim", dim) // 2
        if dim % 2:
            raise ConfigError(f"target.dim={dim}: give an even number, because each well has two columns")
        self._well = GridDensity(log_well, -EDGE, EDGE)
        super().__init__(dim, loc=loc, scale=scale, log_z=pairs * (self._well.log_z + 0.5 * math.log(2 * math.pi)))
        if dim <= 8:
            # the stationary points of log_well: two maxima, and the minimum between them
            extrema = torch.tensor(np.sort(np.roots([-4.0, 0.0, 12.0, 0.5]).real))
            firsts = torch.cartesian_prod(*[extrema[[0, 2]]] * pairs).reshape(-1, pairs)
            self.modes = torch.stack([firsts, torch.zeros_like(firsts)], 2).flatten(1)

    def log_density(self, x: Tensor) -> Tensor:
        return (log_well(x[:, ::2]) - 0.5 * x[:, 1::2].square()).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        x1 = self._well.sample(n * self.dim // 2, generator).reshape(n, -1)
        return torch.stack([x1, torch.randn(x1.shape, dtype=torch.float64, generator=generator)], 2).flatten(1)


class DoubleWell(ManyWell):
    """double_well: `ManyWell` with one pair of columns, and so with two modes.

    Args:
        loc, scale: see `Target`.
    """

    def __init__(self, loc: float | Sequence[float] = 0.0, scale: float | Sequence[float] = 1.0) -> None:
        super().__init__(2, loc, scale)
