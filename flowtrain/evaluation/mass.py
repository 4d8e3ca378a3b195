"""int p(x) dx over a line or a plane, on a grid that refines until its own error is small."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# what a density may miss 1 by, and the grid's own error below that
MISS, ENOUGH = 1e-3, 7e-4
# points that are evaluated at most, but for the last doubling, and nodes to a side, by the number of columns
MOST, SIDE = 70_000, {1: 2**17 + 1, 2: 2**11 + 1}
FIRST = {1: 257, 2: 33}
# mass at a node below which its neighbours are left out of the next grid: all of them together are nothing
NOTHING = 1e-9


@dataclass(frozen=True)
class Mass:
    """The integral, an estimate of the grid's error, and its points."""

    value: float
    error: float
    points: int


def mass(log_prob: Callable[[Tensor], Tensor], samples: Tensor) -> Mass:
    """int exp(log_prob(x)) dx for x (B, d), d 1 or 2, by the trapezoidal rule over x_j = c_j + s_j sinh(t_j).

    On smooth densities the rule converges geometrically (Trefethen and Weideman 2014, The exponentially convergent
    trapezoidal rule); sinh takes a few far samples in at little cost to the middle. A doubled grid holds the old one,
    whose values are not computed again, and has points only where that found mass nearby or a sample lies. An integral
    of 1 ends it as soon as its error is small; another one may be that of a grid which has missed a mode, and is
    believed only after as many points as there may be.

    Args:
        log_prob: (B, d) -> (B,) in nats.
        samples: (n, d) from the density, which say where it lies.
    """
    grid = Grid.over(samples)
    n = FIRST[samples.shape[1]]
    everywhere = torch.ones((n,) * samples.shape[1], dtype=torch.bool)
    known = torch.zeros(everywhere.shape, dtype=torch.float64)
    known[everywhere] = grid.values(log_prob, everywhere)
    total, points, changes = grid.integral(known), known.numel(), list[float]()
    while True:
        here = _near((known * grid.cell(n) > NOTHING) | grid.holding(samples, n))
        n = 2 * n - 1
        every_other = (slice(None, None, 2),) * here.dim()
        here[every_other] = False
        finer = torch.zeros(here.shape, dtype=torch.float64)
        finer[every_other] = known
        finer[here] = grid.values(log_prob, here)
        before, total, known = total, grid.integral(finer), finer
        points += int(here.sum())
        changes.append(abs(total - before))
        error = left_after(changes)
        # the next doubling has about 2^d times as many
        spent = points + 2 ** here.dim() * int(here.sum()) > MOST or 2 * n - 1 > SIDE[here.dim()]
        if (error < ENOUGH and abs(1 - total) < MISS) or spent or not math.isfinite(total):
            return Mass(total, error, points)


@dataclass(frozen=True)
class Grid:
    """Nodes x_j = c_j + s_j sinh(e_j u_j), u an even grid over [-1, 1]^d."""

    centre: Tensor
    scale: Tensor
    end: Tensor

    @staticmethod
    def over(samples: Tensor) -> "Grid":
        """One that reaches half as far again as the samples (n, d)."""
        x = samples.double()
        low, centre, high = torch.quantile(x, torch.tensor([0.16, 0.5, 0.84], dtype=x.dtype, device=x.device), dim=0)
        # twice the spread: the middle, where the mass is, has points at least as dense as an even grid's
        scale = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return Grid(centre, scale, torch.asinh(1.5 * ((x - centre).abs().amax(0) / scale).clamp_min(1.0)))

    def values(self, log_prob: Callable[[Tensor], Tensor], where: Tensor) -> Tensor:
        """p(x) dx/dt at the nodes that are marked, (n,), on the CPU."""
        t = (2 * where.nonzero().to(self.end) / (len(where) - 1) - 1) * self.end
        jacobian = (self.scale * t.cosh()).log().sum(1)
        log_p = log_prob(self.centre + self.scale * t.sinh()).to(jacobian)
        return (log_p + jacobian).exp().cpu()

    def holding(self, samples: Tensor, n: int) -> Tensor:
        """Of n^d nodes, those that are next to a sample, (n, ...) bool."""
        u = torch.asinh((samples.double() - self.centre) / self.scale) / self.end
        index = ((u + 1) / 2 * (n - 1)).round().long().clamp(0, n - 1).cpu()
        held = torch.zeros((n,) * samples.shape[1], dtype=torch.bool)
        held[tuple(index.T)] = True
        return held

    def integral(self, values: Tensor) -> float:
        """int p dx from values (n, ...) at all nodes, by the trapezoidal rule.

        Nothing is left at the ends, where its weights would be halves.
        """
        return float(values.sum()) * self.cell(len(values))

    def cell(self, n: int) -> float:
        """dt of one of n^d nodes."""
        return float((2 * self.end / (n - 1)).prod())


def left_after(changes: list[float]) -> float:
    """The error of an integral after doublings of the grid that changed it by `changes`, c_1 to c_k.

    c_k q / (1 - q) with q = c_k / c_(k-1): what is left of a series whose terms go on shrinking as the last two did
    (Aitken 1926). It is exact of a rule of any order, and too large where convergence is geometric.
    """
    last = changes[-1]
    if len(changes) < 2 or not last < changes[-2]:
        return last
    return last * last / (changes[-2] - last)


def _near(coarse: Tensor) -> Tensor:
    """Of a grid of n^d nodes, those of the doubled grid that lie next to a marked one, or on it."""
    d = coarse.dim()
    marked = torch.zeros([2 * n - 1 for n in coarse.shape])
    marked[(slice(None, None, 2),) * d] = coarse.float()
    pool = F.max_pool1d if d == 1 else F.max_pool2d
    return pool(marked[None, None], 5, stride=1, padding=2)[0, 0] > 0
