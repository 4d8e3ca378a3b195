"""int p(x) dx over a line or a plane, on a grid that refines until its own error is small."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# the grid is fine enough with this error, below what a density may miss 1 by, or with as many points as patience allows
ENOUGH = 7e-4
MOST = {1: 20_000, 2: 70_000}
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
    whose values are not computed again, and has points only where that found mass nearby.

    Args:
        log_prob: (B, d) -> (B,) in nats.
        samples: (n, d) from the density, which say where it lies.
    """
    d = samples.shape[1]
    x = samples.double()
    low, centre, high = torch.quantile(x, torch.tensor([0.16, 0.5, 0.84], dtype=x.dtype, device=x.device), dim=0)
    # twice the spread: the middle, where the mass is, has points at least as dense as an even grid's
    scale = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    end = torch.asinh(1.5 * ((x - centre).abs().amax(0) / scale).clamp_min(1.0))
    n = FIRST[d]
    known = _values(log_prob, _nodes(n, d), centre, scale, end).view((n,) * d)
    total = _trapezoid(known, end)
    points, changes = n**d, []
    while True:
        here = _near(known * _cell(n, end) > NOTHING)
        n = 2 * n - 1
        finer = torch.zeros((n,) * d, dtype=torch.float64)
        finer[(slice(None, None, 2),) * d] = known
        here[(slice(None, None, 2),) * d] = False
        finer[here] = _values(log_prob, _nodes(n, d)[here.flatten()], centre, scale, end)
        before, total, known = total, _trapezoid(finer, end), finer
        points += int(here.sum())
        changes.append(abs(total - before))
        error = left_after(changes)
        if error < ENOUGH or (2 * n - 1) ** d > MOST[d] or not math.isfinite(total):
            return Mass(total, error, points)


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


def _nodes(n: int, d: int) -> Tensor:
    """An even grid over [-1, 1]^d, (n^d, d)."""
    line = torch.linspace(-1, 1, n, dtype=torch.float64)
    return torch.cartesian_prod(*[line] * d).view(-1, d)


def _values(log_prob: Callable[[Tensor], Tensor], nodes: Tensor, centre: Tensor, scale: Tensor, end: Tensor) -> Tensor:
    """p(x) dx/dt at the nodes, (n,), on the CPU."""
    t = nodes.to(end.device) * end
    x = centre + scale * t.sinh()
    jacobian = (scale * t.cosh()).log().sum(1)
    return (log_prob(x).double().to(end.device) + jacobian).exp().cpu()


def _trapezoid(values: Tensor, end: Tensor) -> float:
    """Nothing is left at the ends, where a trapezoid's weights would be halves."""
    return float(values.sum()) * _cell(values.shape[0], end)


def _cell(n: int, end: Tensor) -> float:
    """dt of one node."""
    return float((2 * end / (n - 1)).prod())
