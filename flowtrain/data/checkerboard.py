"""The black squares of a 4 x 4 board."""

import math

import torch
from torch import Tensor

from flowtrain.data.toy import Toy, choice, uniform

_LOG_DENSITY = -math.log(32)


def _centres() -> Tensor:
    """Centres (8, 2) of the squares of side 2 whose column and row numbers have an even sum."""
    grid = torch.arange(4)
    cells = torch.cartesian_prod(grid, grid)
    return 2.0 * cells[cells.sum(dim=1) % 2 == 0].double() - 3


_CENTRES = _centres()


class Checkerboard(Toy):
    """checkerboard: uniform on the 8 squares of side 2 in [-4, 4]^2 with floor(x1 / 2) + floor(x2 / 2) even.

    Density: 1/32 on the squares, 0 elsewhere, so log_prob is -inf outside. The squares are closed: a sample
    that float32 rounds onto an edge must not be called impossible.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py: x1 ~ U(-2, 2),
    x2 = u - 2 b + (floor(x1) mod 2) with u ~ U(0, 1) and b a fair coin, everything times 2.
    Entropy: ln 32 = 3.4657 nats.
    """

    entropy = math.log(32)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return _CENTRES[choice(generator, n, len(_CENTRES))] + 2 * uniform(generator, n, 2) - 1

    def _log_density(self, x: Tensor) -> Tensor:
        inside = ((x[:, None] - _CENTRES).abs() <= 1).all(dim=2).any(dim=1)
        return x.new_full((len(x),), -torch.inf).masked_fill(inside, _LOG_DENSITY)
