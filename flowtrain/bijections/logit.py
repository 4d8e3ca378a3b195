"""The logit transform of bounded values, and dequantization (Dinh et al. 2017, Real NVP, section 4.1)."""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection
from flowtrain.utils.autograd import plain_values
from flowtrain.utils.errors import FlowtrainError


class Logit(Bijection):
    """The elementwise map z = logit p with p = alpha + (1 - 2 alpha) x / levels, for x in [0, levels].

    log|det dz/dx| = sum log((1 - 2 alpha) / levels) - log p - log(1 - p). x is in the units of the data. One integer
    value is then a unit cube, and -log p(x) / (D log 2) of the dequantized x is in bits per dimension.

    Args:
        levels: number of values of the integer-valued data, which are 0 .. levels - 1.
        alpha: keeps p away from 0 and 1.

    Raises:
        FlowtrainError: in evaluation mode, x outside of the domain of the logit.

    Example:
        >>> z, log_det = Logit(levels=256, alpha=0.05).inverse(torch.tensor([[128.0]]))
        >>> z, round(float(log_det), 4)  # p = 1/2: log(0.9 / 256) + 2 log 2
        (tensor([[0.]]), -4.2642)
    """

    def __init__(self, levels: int, alpha: float = 1e-5) -> None:
        super().__init__()
        self.levels, self.alpha = levels, alpha

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        # the smaller of the two sigmoids is accurate, so x is computed from the nearer end of the interval
        x = self.levels * torch.where(z < 0, p - self.alpha, 1 - self.alpha - q) / (1 - 2 * self.alpha)
        return x, -self._log_det(p, q)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slope = (1 - 2 * self.alpha) / self.levels
        # 1 - p is computed from the distance to the upper end, which avoids cancellation
        p, q = self.alpha + slope * x, self.alpha + slope * (self.levels - x)
        # training data were checked when they were read, and a check here would wait for the device
        rounding = torch.finfo(x.dtype)
        if torch.compiler.is_exporting():
            # an exported program cannot raise an error, so z and the density of x outside of the domain are NaN
            outside = torch.minimum(p, q) < -2 * rounding.eps
            p, q = (torch.where(outside, torch.nan, y.clamp_min(rounding.tiny)) for y in (p, q))
        elif not self.training and x.numel():
            if bool((plain_values(torch.minimum(p, q)) < -2 * rounding.eps).any()):
                low, high = plain_values(x).min(), plain_values(x).max()
                raise FlowtrainError(
                    f"x has values from {low:g} to {high:g}, but this flow is for values from 0 to {self.levels}"
                )
            # samples far out in the tails are rounded to the ends of the interval
            p, q = p.clamp_min(rounding.tiny), q.clamp_min(rounding.tiny)
        return p.log() - q.log(), self._log_det(p, q)

    def _log_det(self, p: Tensor, q: Tensor) -> Tensor:
        d = math.prod(p.shape[1:])
        return d * math.log((1 - 2 * self.alpha) / self.levels) - (p.log() + q.log()).flatten(1).sum(1)


def dequantize(x: Tensor, like: Tensor, u: Tensor | None = None) -> Tensor:
    """Returns x + u with u ~ U[0, 1), for whole numbers x of any shape, in the dtype of `like`.

    Args:
        u: the noise, with the shape of x. None: it is drawn with the global generator of x's device.
    """
    x = x.to(like.dtype)
    # x + u can be rounded to x + 1, which belongs to the next whole number
    return torch.minimum(x + (torch.rand_like(x) if u is None else u), torch.nextafter(x + 1, x))
