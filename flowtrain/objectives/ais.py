"""Annealed importance sampling from a flow, with Hamiltonian Monte Carlo or Metropolis transitions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.flow import Flow
from flowtrain.models.support import support_of
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.arguments import number, one_of, share, whole

TRANSITIONS = ("auto", "hmc", "metropolis")
# transition=auto means metropolis for at most this many columns
FEW_COLUMNS = 8
# the initial step size in units of `Target.scale`, by transition
STEPS = {"hmc": 0.2, "metropolis": 1.0}
# the acceptance rate to which step sizes are adapted, by transition. The optimum in many dimensions is 0.65 for HMC
# (Beskos et al. 2013) and 0.234 for Metropolis (Roberts, Gelman and Gilks 1997)
ACCEPTANCE = {"hmc": 0.65, "metropolis": 0.234}
# the standard deviation of the logarithm of the random factor of a Metropolis proposal
SPREAD = 1.0
# the change of the logarithm of the step size for a difference of 1 from the chosen acceptance rate
ADAPTATION = 0.5
# limits of the step size, as multiples of the initial step size
LEAST_STEP, LARGEST_STEP = 1e-4, 1e4


class Points(NamedTuple):
    """Points with the log densities of flow and target, and their gradients with respect to u.

    Attributes:
        u: the points on the real line, (n, d).
        x: the points in the support of the target, (n, d).
        log_q, log_p: log q of the flow and log p~ of the target, as densities of u, (n,), in nats.
        slope_q, slope_p: the gradients of log_q and log_p, (n, d). None for Metropolis transitions.
    """

    u: Tensor
    x: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_q: Tensor | None = None
    slope_p: Tensor | None = None


class Drawn(NamedTuple):
    """The result of annealed importance sampling.

    Attributes:
        x: the samples, (n, d), in the support of the target.
        log_w: the log weights of the samples, (n,), in nats. NaN if the sample or a density on its chain is not finite.
        log_q: log q(x) of the flow, (n,), in nats.
        acceptance: the mean acceptance rate at each intermediate distribution, (K,), on the CPU.
    """

    x: Tensor
    log_w: Tensor
    log_q: Tensor
    acceptance: Tensor


class Annealing:
    """Annealed importance sampling (AIS, Neal 2001) from a flow q to g = p~^alpha q^(1 - alpha).

    The intermediate distributions are f_k = q^(1 - b_k) g^(b_k) = q^(1 - alpha b_k) p~^(alpha b_k) with b_k = k /
    (K + 1) for k = 1 to K, f_0 = q and f_{K+1} = g. A chain starts at x_0 ~ q. Its k-th transition leaves f_k invariant
    and maps x_{k-1} to x_k. The weight w of x_K is the product over k = 1 to K + 1 of f_k(x_{k-1}) / f_{k-1}(x_{k-1}).
    E[w h(x_K)] is the integral of g h for every function h, so E[w] is the integral of g (Neal 2001, section 2).

    Transitions act on the real line, which `ToSupport` maps to the support of the target. Step sizes are in units of
    `Target.scale`. Autograd computes the gradients of both densities. Parameters get no gradient.

    Args:
        flow: the flow q, with an exact trace.
        target: the target.
        alpha: alpha, at least 1. g is p~ for alpha = 1, and p~^2 / q for alpha = 2.
        intermediate: K, the number of intermediate distributions.
        transition: hmc | metropolis | auto. auto is metropolis for at most 8 columns (FEW_COLUMNS), else hmc.
        moves: the number of transitions at each intermediate distribution.
        leapfrog: the number of leapfrog steps of an HMC transition.
        step_size: the initial step size. For hmc, it is the size of a leapfrog step. For metropolis, it is the standard
            deviation of a proposal, and each proposal multiplies it by a random factor exp(N(0, 1)). None: 0.2 for hmc,
            1 for metropolis.
        acceptance: the acceptance rate to which `adapt` adapts step sizes. None: 0.65 for hmc, 0.234 for metropolis.

    Attributes:
        step_sizes: the step size at each intermediate distribution, (K,), float64, on the CPU.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        flow: Flow,
        target: Target,
        alpha: float = 2.0,
        intermediate: int = 4,
        transition: str = "auto",
        moves: int = 1,
        leapfrog: int = 4,
        step_size: float | None = None,
        acceptance: float | None = None,
    ) -> None:
        self.flow, self.target = flow, target
        self.alpha = number("objective.alpha", alpha, least=1.0, inclusive=True)
        self.intermediate = whole("objective.intermediate", intermediate)
        chosen = one_of("objective.transition", transition, TRANSITIONS)
        automatic = "metropolis" if target.dim <= FEW_COLUMNS else "hmc"
        self.transition = automatic if chosen == "auto" else chosen
        self.moves = whole("objective.moves", moves)
        self.leapfrog = whole("objective.leapfrog", leapfrog)
        self.first_step = number("objective.step_size", STEPS[self.transition] if step_size is None else step_size)
        self.acceptance = share(
            "objective.acceptance", ACCEPTANCE[self.transition] if acceptance is None else acceptance
        )
        self.step_sizes = torch.full((self.intermediate,), self.first_step, dtype=torch.float64)
        support = support_of(target.types)
        self.support = None if support is None else support.to(flow.like.device)

    def draw(self, n: int, options: SolveOptions = AS_CONFIGURED) -> Drawn:
        """Draws n samples with log weights. Random numbers come from the global generator of torch.

        Args:
            n: the number of samples.
            options: options of the ODE solves.
        """
        with torch.no_grad():
            x, log_q, _ = self.flow.sample_pass(self.flow.base.rsample(n, like=self.flow.like), options=options)
            start = x if self.support is None else self.support.inverse(x)[0]
        usable = start.isfinite().all(1)
        points = self.at(torch.where(usable[:, None], start, torch.zeros_like(start)), options)
        log_w, accepted = torch.zeros_like(points.log_q), []
        for k in range(1, self.intermediate + 1):
            log_w = log_w + self.alpha * (points.log_p - points.log_q) / (self.intermediate + 1)
            rates = []
            for _ in range(self.moves):
                points, rate = self.move(points, k, options)
                rates.append(rate)
            accepted.append(torch.stack(rates).mean())
        log_w = log_w + self.alpha * (points.log_p - points.log_q) / (self.intermediate + 1)
        usable = usable & log_w.isfinite() & points.log_q.isfinite() & points.x.isfinite().all(1)
        # log q as a density of x
        log_q = points.log_q if self.support is None else points.log_q - self.support(points.u)[1]
        return Drawn(points.x, torch.where(usable, log_w, math.nan), log_q, torch.stack(accepted).cpu().double())

    def at(self, u: Tensor, options: SolveOptions = AS_CONFIGURED) -> Points:
        """Returns the densities at points u (n, d) on the real line, and for HMC also the gradients.

        Raises:
            DataError: the log density of the target has no gradient, which HMC needs.
        """
        with torch.set_grad_enabled(self.transition == "hmc"):
            u = u.detach().requires_grad_(self.transition == "hmc")
            x, log_det = (u, 0.0) if self.support is None else self.support(u)
            log_q = self.flow.density_pass(x, options=options).log_p + log_det
            log_p = self.target(x).to(log_q) + log_det
            if self.transition != "hmc":
                return Points(u, x, log_q, log_p)
            # both gradients use the graph of `support`
            [slope_q] = torch.autograd.grad(log_q.sum(), u, retain_graph=self.support is not None)
            # a constant density has no graph
            [slope_p] = torch.autograd.grad(log_p.sum(), u) if log_p.requires_grad else [torch.zeros_like(u)]
        return Points(u.detach(), x.detach(), log_q.detach(), log_p.detach(), slope_q, slope_p)

    def move(self, points: Points, k: int, options: SolveOptions = AS_CONFIGURED) -> tuple[Points, Tensor]:
        """Applies one transition that leaves f_k invariant. Returns the new points and the mean acceptance rate.

        A proposal is rejected if it is not finite, or if one of its densities is NaN.
        """
        b = self.alpha * k / (self.intermediate + 1)
        step = float(self.step_sizes[k - 1]) * self.target.scale.to(points.u)
        if self.transition == "hmc":
            proposed, log_ratio = self._leapfrog(points, b, step, options)
        else:
            # a random factor for each chain, so that some proposals reach other modes
            factor = (SPREAD * torch.randn_like(points.u[:, :1])).exp()
            proposed = self._evaluated(points.u + step * factor * torch.randn_like(points.u), points, options)
            log_ratio = _log_f(proposed, b) - _log_f(points, b)
        log_ratio = torch.where(log_ratio.isnan(), -math.inf, log_ratio)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        kept = [
            None if new is None or old is None else torch.where(accepted.view(-1, *(1,) * (new.dim() - 1)), new, old)
            for new, old in zip(proposed, points, strict=True)
        ]
        return Points(*kept), log_ratio.clamp(max=0.0).exp().mean()  # type: ignore[arg-type]

    def _leapfrog(self, points: Points, b: float, step: Tensor, options: SolveOptions) -> tuple[Points, Tensor]:
        """Proposes the end of a trajectory of the Hamiltonian H = |v|^2 / 2 - log f with a new velocity v ~ N(0, I).

        Returns the end and the log of the acceptance ratio, which is the decrease of H along the trajectory.
        """
        v = torch.randn_like(points.u)
        before = _log_f(points, b) - 0.5 * v.square().sum(1)
        now = points
        v = v + 0.5 * step * _slope(now, b)
        for i in range(self.leapfrog):
            now = self._evaluated(now.u + step * v, points, options)
            v = v + (0.5 if i == self.leapfrog - 1 else 1.0) * step * _slope(now, b)
        return now, _log_f(now, b) - 0.5 * v.square().sum(1) - before

    def _evaluated(self, u: Tensor, points: Points, options: SolveOptions) -> Points:
        """Returns the densities at u (n, d). log q is NaN for rows of u that are not finite.

        These rows are evaluated at the rows of `points` instead, because solvers and networks need finite numbers.
        """
        finite = u.isfinite().all(1)
        found = self.at(torch.where(finite[:, None], u, points.u), options)
        return found._replace(log_q=torch.where(finite, found.log_q, math.nan))

    def adapt(self, acceptance: Sequence[float]) -> None:
        """Adapts the step sizes to the chosen acceptance rate.

        Args:
            acceptance: the acceptance rates (K,) of the last draw.
        """
        rates = torch.tensor(list(acceptance), dtype=torch.float64)
        found = self.step_sizes * (ADAPTATION * (rates - self.acceptance)).exp()
        self.step_sizes = found.clamp(LEAST_STEP * self.first_step, LARGEST_STEP * self.first_step)


def _log_f(points: Points, b: float) -> Tensor:
    return (1 - b) * points.log_q + b * points.log_p


def _slope(points: Points, b: float) -> Tensor:
    assert points.slope_q is not None
    assert points.slope_p is not None
    return (1 - b) * points.slope_q + b * points.slope_p
