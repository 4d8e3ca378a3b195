"""Moves of weighted samples by Hamiltonian Monte Carlo, which find a part of a target that the flow misses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.evaluation.log_weights import WeightedSamples
from flowtrain.flow import Density, rows_at_a_time
from flowtrain.models.support import support_of
from flowtrain.utils.errors import DataError, SolverError
from flowtrain.utils.process import seeded
from flowtrain.utils.weighting import effective_rows

# the number of chains as a share of the number of samples, and the smallest number of chains
CHAINS, FEWEST = 0.1, 100
# the number of moves of a chain, and of leapfrog steps of a move
MOVES, LEAPFROG = 20, 10
# the smallest and the largest step size in standard deviations of the samples. Each move of a chain draws a step size
# between them, because a density can have parts of different widths
LEAST_STEP, LARGEST_STEP = 0.01, 1.0


class Moved(NamedTuple):
    """The result of `moved_samples`.

    Attributes:
        missed: log Z with the moved samples, minus log Z without them, in nats.
        stderr: the standard error of `missed`.
    """

    missed: float
    stderr: float


def moved_samples(
    flow: Density, target: Target, drawn: WeightedSamples, log_w: Tensor, seed: int, batch_size: int | None = None
) -> Moved | None:
    """Moves weighted samples of a flow q, and estimates the part of log Z that the flow misses.

    m start points are drawn from the samples of the flow with probabilities proportional to their weights. If the flow
    misses a part M of the target p = p~ / Z, the start points are samples of p outside of M. The moves leave p
    invariant. Without a missed part, the end points are therefore also samples of p. With a missed part, some end
    points are in M. Bridge sampling (Meng and Wong 1996) estimates Z from samples of q and of p, with w = p~ / q:

        Z = E_q[w h] / E_p[h],  h = 1 / (1 + w / Z_q)

    Z_q is the estimate from the weights. h is between 0 and 1, about 1/2 where q = p, and about 0 in M. Samples of p in
    M therefore increase the estimate. `missed` is log mean(h) over the start points minus log mean(h) over the end
    points. Both means are of the same chains, so the error of `missed` is small. The chains do not reach all of M, so
    `missed` is usually a lower bound.

    A move is a trajectory of Hamiltonian Monte Carlo on the real line, which `ToSupport` maps to the support of the
    target. If the log density has no gradient, a move consists of Metropolis proposals. m is n / 10, but at most the
    effective sample size.

    Args:
        drawn: samples of the flow.
        log_w: their log weights (n,) in nats. Unusable weights are -inf.
        seed: the seed of the moves.
        batch_size: the number of chains that are moved at once. None means a number that depends on d.

    Returns:
        The result, or None if m is below 100, or if log q of the end points cannot be computed.
    """
    w = (log_w - log_w.max()).exp()
    m = int(min(CHAINS * len(w), effective_rows(w)))
    if m < FEWEST:
        return None
    log_z = float(log_w.logsumexp(0)) - math.log(len(log_w))
    device = flow.like.device
    support = support_of(target.types)
    support = None if support is None else support.to(device)
    size = batch_size or max(1, rows_at_a_time(flow.event_shape) // 4)
    with seeded(seed, device):
        shares = w.cumsum(0) / w.sum()
        offsets = (torch.arange(m, dtype=w.dtype) + torch.rand(1, dtype=w.dtype)) / m
        chosen = torch.searchsorted(shares, offsets).clamp_(max=len(w) - 1)
        u = drawn.x[chosen].to(device)
        u = u if support is None else support.map_inverse(u)
        width = u.std(0)
        width = torch.where(width > 0, width, 1.0)
        chains = Chains(target, support, width)
        ends = torch.cat([chains.moved(part) for part in torch.split(u, size)])
    x = ends if support is None else support.map_forward(ends)
    try:
        log_q = torch.cat([flow.log_prob(part) for part in torch.split(x, size)])
    except SolverError:
        return None
    log_p = torch.cat([target(part) for part in torch.split(x, size)])
    before = torch.sigmoid(log_z - log_w[chosen])
    after = torch.sigmoid(log_z - (log_p.double() - log_q.double())).cpu()
    # a flow with an ODE can fail for single rows
    after = torch.where(after.isnan(), before, after)
    first, last = float(before.mean()), float(after.mean())
    if last == 0:
        return Moved(math.inf, math.nan)
    error = float((after / last - before / first).std()) / math.sqrt(m)
    return Moved(math.log(first) - math.log(last), error)


class Chains:
    """Markov chains that leave a target invariant.

    Args:
        target: the target.
        support: the map from the real line to the support of the target, or None.
        width: the standard deviations of the samples on the real line, (d,).
    """

    def __init__(self, target: Target, support: torch.nn.Module | None, width: Tensor) -> None:
        self.target, self.support, self.width = target, support, width

    def moved(self, u: Tensor) -> Tensor:
        """Returns the end points (n, d) of chains that start at points u (n, d) of the real line."""
        try:
            log_f, slope = self.at(u)
        except DataError:
            # the log density has no gradient
            return self._moved_without_gradient(u)
        for _ in range(MOVES):
            step = self._steps(u)
            v = torch.randn_like(u)
            energy = log_f - 0.5 * v.square().sum(1)
            y, log_y, slope_y = u, log_f, slope
            for _ in range(LEAPFROG):
                v = v + 0.5 * step * slope_y
                y = y + step * v
                # a divergent trajectory is rejected, because v stays NaN or infinite
                y = torch.where(y.isfinite(), y, u)
                log_y, slope_y = self.at(y)
                v = v + 0.5 * step * slope_y
            accepted = self._accepted(log_y - 0.5 * v.square().sum(1) - energy)
            u, log_f = torch.where(accepted[:, None], y, u), torch.where(accepted, log_y, log_f)
            slope = torch.where(accepted[:, None], slope_y, slope)
        return u

    def at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log density of the target at u (n, d) as a density on the real line, (n,), and its gradient."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_f = self._log_density(u)
            # a constant density has no graph
            [slope] = torch.autograd.grad(log_f.sum(), u) if log_f.requires_grad else [torch.zeros_like(u)]
        return log_f.detach(), slope

    def _log_density(self, u: Tensor) -> Tensor:
        x, log_det = (u, torch.zeros_like(u[:, 0])) if self.support is None else self.support(u)
        found: Tensor = self.target(x).to(u) + log_det
        return found

    def _moved_without_gradient(self, u: Tensor) -> Tensor:
        log_f = self._log_density(u)
        # as many evaluations of the density as with Hamiltonian Monte Carlo
        for _ in range(MOVES * LEAPFROG):
            y = u + self._steps(u) * torch.randn_like(u)
            log_y = self._log_density(y)
            accepted = self._accepted(log_y - log_f)
            u, log_f = torch.where(accepted[:, None], y, u), torch.where(accepted, log_y, log_f)
        return u

    def _steps(self, u: Tensor) -> Tensor:
        """Returns a step size for each chain and each column, (n, d)."""
        factor = LEAST_STEP * (LARGEST_STEP / LEAST_STEP) ** torch.rand_like(u[:, :1])
        return factor * self.width

    def _accepted(self, log_ratio: Tensor) -> Tensor:
        log_ratio = torch.where(log_ratio.isnan(), -math.inf, log_ratio)
        return torch.rand_like(log_ratio).log() < log_ratio
