"""One-dimensional densities on a grid: integral, and samples by the inverse cumulative distribution function."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# the number of cells of a grid. The trapezoidal rule is accurate to rounding errors for the smooth densities of this
# folder, which are negligible at the ends of the interval
CELLS = 2**16


class GridDensity:
    """A density p~ on an interval, known up to a constant, on a grid of 65,536 equal cells in float64.

    Args:
        log_density: log p~ in nats, (B,) -> (B,).
        low, high: the ends of the interval. The density outside must be negligible.

    Attributes:
        log_z: the logarithm of the integral of p~ by the trapezoidal rule, in nats.
    """

    def __init__(self, log_density: Callable[[Tensor], Tensor], low: float, high: float) -> None:
        self._low, self._cell = low, (high - low) / CELLS
        log_p = log_density(torch.linspace(low, high, CELLS + 1, dtype=torch.float64))
        top = log_p.max()
        p = (log_p - top).exp()
        cells = (p[1:] + p[:-1]) / 2
        self.log_z = float(top + (cells.sum() * self._cell).log())
        self._up_to = torch.cat([p.new_zeros(1), cells.cumsum(0)])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n samples (n,), float64, on the CPU. Their distribution inside of a cell is uniform."""
        u = self._up_to[-1] * torch.rand(n, dtype=torch.float64, generator=generator)
        cell = (torch.searchsorted(self._up_to, u, right=True) - 1).clamp(0, CELLS - 1)
        within = (u - self._up_to[cell]) / (self._up_to[cell + 1] - self._up_to[cell])
        return self._low + self._cell * (cell + within)


def log_normal(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Returns log N(x; mean, std^2) of each element of x, in nats."""
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    return -0.5 * ((x - mean) / std).square() - log_std - 0.5 * math.log(2 * math.pi)
