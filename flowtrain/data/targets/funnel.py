"""Neal's funnel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.data.targets.grid import log_normal
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError

# standard deviation of v
STD = 3.0
# the least v in exp(v), so that exp(v) and its reciprocal are normal numbers in float32. P(v < LOWEST) is 1e-62
LOWEST = -50.0


class Funnel(Target):
    """funnel: v ~ N(0, 3^2) and x_i ~ N(0, exp(v)), i = 1 ... d - 1.

    p(v, x) = N(v; 0, 9) prod_i N(x_i; 0, exp(v)), and log Z = 0. The first column is v. For v < -50, the variance of
    x_i is exp(-50), so that gradients are finite in float32.

    Source: Neal 2003, "Slice sampling", section 8.

    Args:
        dim: the number of columns d, at least 2.
        loc, scale: see `Target`.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, dim: int = 10, loc: float | Sequence[float] = 0.0, scale: float | Sequence[float] = 1.0) -> None:
        dim = whole("target.dim", dim)
        if dim < 2:
            raise ConfigError("target.dim=1: the funnel has at least 2 columns")
        super().__init__(dim, columns=("v", *(f"x{i}" for i in range(1, dim))), loc=loc, scale=scale, log_z=0.0)

    def log_density(self, x: Tensor) -> Tensor:
        v, rest = x[:, 0], x[:, 1:]
        log_std = v.clamp(min=LOWEST)[:, None] / 2
        return log_normal(v, 0.0, STD) + (log_normal(rest * (-log_std).exp(), 0.0, 1.0) - log_std).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        v = STD * z[:, :1]
        return torch.cat([v, (v.clamp(min=LOWEST) / 2).exp() * z[:, 1:]], 1)
