"""Recipes of flows whose log p is known in closed form, and of flows with one deliberate error each."""

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import Solver


def composed(event_shape: tuple[int, ...], maps: int = 3) -> Flow:
    """Returns a flow of several affine maps."""
    return Flow(event_shape, Chain([Affine(math.prod(event_shape)) for _ in range(maps)]))


class LinearField(nn.Module):
    """v(x) = A x + b, for which log|det dx(1)/dx(0)| is tr A at every point."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(d, d))
        self.b = nn.Parameter(torch.zeros(d))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T + self.b


def linear(
    event_shape: tuple[int, ...], *, solver: Solver, eval_trace: str = "auto", noise: str = "rademacher"
) -> Flow:
    """Returns the flow along a linear field."""
    rule = TraceRule("auto", eval_trace, noise)
    return Flow(event_shape, Chain([Continuous(LinearField(event_shape[0]), solver, rule)]))


class MixtureMap(Bijection):
    """z_j = Phi^-1(F_j(x_j)), where F_j is the distribution function of a mixture of Gaussians.

    Since log dz/dx = log f(x) - log N(z), rounding of z cancels, and log p(x) is sum_j log f_j(x_j).
    """

    def __init__(self, d: int, parts: int) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros(d, parts))
        self.mean = nn.Parameter(torch.zeros(d, parts))
        self.log_std = nn.Parameter(torch.zeros(d, parts))

    def _log_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log w_k and the standardized distance to component k, (B, d, parts)."""
        return self.log_weight.log_softmax(-1), (x.unsqueeze(-1) - self.mean) * (-self.log_std).exp()

    def log_density(self, x: Tensor) -> Tensor:
        weight, u = self._log_terms(x)
        return (weight - u.square() / 2 - self.log_std - math.log(2 * math.pi) / 2).logsumexp(-1)

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, u = self._log_terms(x)
        # use the smaller tail, whose logarithm is accurate
        below = (weight + torch.special.log_ndtr(u)).logsumexp(-1).exp()
        above = (weight + torch.special.log_ndtr(-u)).logsumexp(-1).exp()
        tail = torch.minimum(below, above).clamp_min(torch.finfo(x.dtype).tiny)
        z = torch.where(below < above, 1.0, -1.0).to(x) * torch.special.ndtri(tail)
        log_det = self.log_density(x) + z.square() / 2 + math.log(2 * math.pi) / 2
        return z, log_det.sum(1)

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = torch.full_like(z, -100.0), torch.full_like(z, 100.0)
        with torch.no_grad():
            for _ in range(80):
                middle = (low + high) / 2
                below = self.inverse(middle)[0] < z
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x = (low + high) / 2
        return x, -self.inverse(x)[1]


def mixture(event_shape: tuple[int, ...], parts: int = 3) -> Flow:
    """Returns a flow over independent mixtures of Gaussians, one for each column."""
    return Flow(event_shape, Chain([MixtureMap(event_shape[0], parts)]))


class Scaled(Bijection):
    """A bijection that reports wrong log-determinants: those of the inner bijection, multiplied by `factor`."""

    def __init__(self, inner: Bijection, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.forward(z, label)
        return x, self.factor * log_det

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse(x, label)
        return z, self.factor * log_det


def scaled(event_shape: tuple[int, ...], factor: float = 1.01) -> Flow:
    """Returns an incorrect flow: affine, with a scaled log-determinant."""
    return Flow(event_shape, Chain([Scaled(Affine(math.prod(event_shape)), factor)]))


class Folded(Bijection):
    """A map that is not a bijection: forward gives |z| and inverse gives x, so two latents give the same point."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.abs(), z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.abs(), x.new_zeros(len(x))


def folded(event_shape: tuple[int, ...]) -> Flow:
    """Returns an incorrect flow, whose map is not invertible."""
    return Flow(event_shape, Chain([Folded()]))
