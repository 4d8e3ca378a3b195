"""The four two-dimensional energies of Rezende and Mohamed 2015, table 1."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.data.targets.grid import GridDensity
from flowtrain.data.types import ColumnType

# the window of figure 3 of the paper is [-EDGE, EDGE]^2
EDGE = 4.0
# initial standard deviations: of the logit of a uniform distribution on the window (x1), and half of the window (x2)
UNIFORM, WINDOW = 1.8, 2.0


class Energy1(Target):
    """energy1: a ring of radius 2 with modes at its left and right ends, (-2, 0) and (2, 0).

    log p~(x) = -1/2 ((|x| - 2) / 0.4)^2 + log(exp(-1/2 ((x1 - 2) / 0.6)^2) + exp(-1/2 ((x1 + 2) / 0.6)^2))

    Source: Rezende and Mohamed 2015, "Variational inference with normalizing flows", table 1, U_1(z) = -log p~(z).

    Args:
        loc, scale: see `Target`.
    """

    # computed by the trapezoidal rule in polar coordinates
    LOG_Z = 1.8775016261097073

    def __init__(self, loc: float | Sequence[float] = 0.0, scale: float | Sequence[float] = WINDOW) -> None:
        super().__init__(2, loc=loc, scale=scale, log_z=self.LOG_Z)
        self.modes = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)

    def log_density(self, x: Tensor) -> Tensor:
        # unlike hypot, this norm has a gradient at 0
        radius: Tensor = torch.linalg.vector_norm(x, dim=1)
        return -0.5 * ((radius - 2) / 0.4).square() + self._log_ends(x[:, 0])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws samples by rejection. Proposals are from the first term of log p~, a ring without modes.

        The exponential of the second term is at most 1 + exp(-8 / 0.36), its value at x1 = 2 and x1 = -2.
        """
        ring = GridDensity(lambda r: r.log() - 0.5 * ((r - 2) / 0.4).square(), 0.0, 8.0)
        highest, found, count = math.log1p(math.exp(-8 / 0.36)), [torch.zeros(0, 2, dtype=torch.float64)], 0
        while count < n:
            m = 4 * (n - count) + 100
            r, u = ring.sample(m, generator), torch.rand(2, m, dtype=torch.float64, generator=generator)
            angle = 2 * math.pi * u[0]
            x = torch.stack([r * angle.cos(), r * angle.sin()], 1)
            kept = x[u[1].log() < self._log_ends(x[:, 0]) - highest]
            found.append(kept)
            count += len(kept)
        return torch.cat(found)[:n]

    def _log_ends(self, x1: Tensor) -> Tensor:
        return torch.logaddexp(-0.5 * ((x1 - 2) / 0.6).square(), -0.5 * ((x1 + 2) / 0.6).square())


class BranchedEnergy(Target):
    """Base class of the energies 2 to 4: curves x2 = c_k(x1) with Gaussian noise of standard deviation s_k.

    log p~(x) = log sum_k exp(-1/2 ((x2 - c_k(x1)) / s_k)^2) for -4 <= x1 <= 4, and -inf otherwise

    In the paper, x1 is unbounded. The integral over x1 is then infinite, so p~ cannot be normalized. Here, x1 has the
    type interval(-4,4), the window of the paper's figure 3. The marginal distribution of x1 is uniform, and

    Z = 8 sqrt(2 pi) sum_k s_k.

    A subclass defines the curves `centers` and the standard deviations `stds`. The default initial distribution of x1
    is close to uniform on the interval: its scale is the standard deviation of the logit of a uniform distribution.

    Source: Rezende and Mohamed 2015, table 1, U(z) = -log p~(z).

    Args:
        loc, scale: see `Target`.
    """

    stds: tuple[float, ...]

    def __init__(self, loc: float | Sequence[float] = 0.0, scale: float | Sequence[float] = (UNIFORM, WINDOW)) -> None:
        types = [ColumnType.parse(f"interval({-EDGE:g},{EDGE:g})", "target.types"), ColumnType.parse("real", "")]
        log_z = math.log(2 * EDGE * math.sqrt(2 * math.pi) * sum(self.stds))
        super().__init__(2, types, loc=loc, scale=scale, log_z=log_z)

    @abstractmethod
    def centers(self, x1: Tensor) -> tuple[Tensor, ...]:
        """Returns c_k(x1), (B,), for each branch k."""

    def log_density(self, x: Tensor) -> Tensor:
        x1, x2 = x.unbind(1)
        terms = [-0.5 * ((x2 - c) / s).square() for c, s in zip(self.centers(x1), self.stds, strict=True)]
        return torch.stack(terms).logsumexp(0).masked_fill(x1.abs() > EDGE, -math.inf)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        x1 = EDGE * (2 * torch.rand(n, dtype=torch.float64, generator=generator) - 1)
        stds = torch.tensor(self.stds, dtype=torch.float64)
        branch = torch.multinomial(stds, n, replacement=True, generator=generator)
        noise = stds[branch] * torch.randn(n, dtype=torch.float64, generator=generator)
        return torch.stack([x1, torch.stack(self.centers(x1))[branch, torch.arange(n)] + noise], 1)


def _wave(x1: Tensor) -> Tensor:
    """Returns sin(pi x1 / 2), which is w_1 in the paper."""
    return torch.sin(math.pi / 2 * x1)


class Energy2(BranchedEnergy):
    """energy2: a sine wave, c(x1) = sin(pi x1 / 2), s = 0.4. See `BranchedEnergy`."""

    stds = (0.4,)

    def centers(self, x1: Tensor) -> tuple[Tensor, ...]:
        return (_wave(x1),)


class Energy3(BranchedEnergy):
    """energy3: a sine wave with a second branch near x1 = 1. See `BranchedEnergy`.

    c_1(x1) = sin(pi x1 / 2), c_2(x1) = c_1(x1) - 3 exp(-1/2 ((x1 - 1) / 0.6)^2), s_1 = s_2 = 0.35
    """

    stds = (0.35, 0.35)

    def centers(self, x1: Tensor) -> tuple[Tensor, ...]:
        return _wave(x1), _wave(x1) - 3 * (-0.5 * ((x1 - 1) / 0.6).square()).exp()


class Energy4(BranchedEnergy):
    """energy4: a sine wave that splits into two branches at x1 = 1. See `BranchedEnergy`.

    c_1(x1) = sin(pi x1 / 2), c_2(x1) = c_1(x1) - 3 sigmoid((x1 - 1) / 0.3), s_1 = 0.4, s_2 = 0.35
    """

    stds = (0.4, 0.35)

    def centers(self, x1: Tensor) -> tuple[Tensor, ...]:
        return _wave(x1), _wave(x1) - 3 * torch.sigmoid((x1 - 1) / 0.3)
