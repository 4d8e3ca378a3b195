"""Explicit Runge-Kutta: one stepping loop for every tableau, path integrals as quadratures on its nodes.

With stage points x_i at t_i and weights h b_i, an integral of q along the solution is sum h b_i q(t_i, x_i):
the same number as an augmented solve on the same steps would give. With control=state all nodes of the accepted
steps are evaluated in one batched call at the end; with control=all the nodes of each attempted step in one call,
whose embedded error joins the step control. NFE counts evaluations of the velocity, not these. The gradient is the
exact one of the discrete solution: autograd through the accepted steps, with the step sizes held constant.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.errors import ConfigError
from flowtrain.solvers.base import Problem, Solution, Solver, Statistics
from flowtrain.solvers.tableaus import TABLEAUS, Tableau

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
# a step whose error is NaN or infinite is retried shorter; a state that stays so this often will not recover
NON_FINITE_RETRIES = 8


@dataclass
class Step:
    """One attempted step: its stage points and slopes, and where it ends."""

    t: float
    h: float
    points: list[Tensor]
    slopes: list[Tensor]
    x1: Tensor


class RungeKutta(Solver):
    """Fixed steps or adaptive ones, as the tableau has an error estimate or not; `gradient` is direct.

    Step control: accept when the RMS of error / (atol + rtol max(|x0|, |x1|)) is at most 1, the next step
    0.9 ratio^(-1/order) times as long (Hairer, Norsett and Wanner, Solving ODEs I, II.4), the last two balanced.
    """

    def __init__(self, method: str, **settings: Any) -> None:
        if method not in TABLEAUS:
            raise ConfigError(f"solver.method={method}: choose one of {', '.join(TABLEAUS)}")
        self.tableau = TABLEAUS[method]
        super().__init__(method, adaptive=self.tableau.e is not None, **settings)
        if self.gradient != "direct":
            raise ConfigError(f"solver.gradient={self.gradient}: this engine differentiates its own steps (direct)")

    def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
        run = _Run(self, problem, statistics)
        if self.adaptive:
            run.adaptive()
        else:
            run.fixed()
        return Solution(run.x, run.integrals(), statistics)


class _Run:
    """The moving parts of one solve: time, state, the slope there, the nodes so far."""

    def __init__(self, solver: RungeKutta, problem: Problem, statistics: Statistics) -> None:
        self.solver, self.problem, self.statistics = solver, problem, statistics
        self.tableau: Tableau = solver.tableau
        self.t, self.x = problem.t0, problem.x
        self.slope: Tensor | None = None
        self.along = problem.integrand is not None and solver.control == "all" and solver.adaptive
        self.total: Tensor | None = None
        self.node_times: list[float] = []
        self.node_points: list[Tensor] = []
        self.node_weights: list[float] = []

    def velocity(self, t: float, h: float, x: Tensor) -> Tensor:
        if self.statistics.nfe_forward >= self.solver.max_nfe:
            raise self.solver.exhausted(t, h)
        self.statistics.nfe_forward += 1
        return self.problem.velocity(torch.full((), t, dtype=x.dtype, device=x.device), x)

    def attempt(self, h: float) -> Step:
        """The stages of a step of size h from here."""
        tableau, t, x = self.tableau, self.t, self.x
        if self.slope is None:
            self.slope = self.velocity(t, h, x)
        points, slopes = [x], [self.slope]
        for c, row in zip(tableau.c[1:], tableau.a, strict=True):
            point = combine(x, h, row, slopes)
            points.append(point)
            slopes.append(self.velocity(t + c * h, h, point))
        x1 = points[-1] if tableau.first_same_as_last else combine(x, h, tableau.b, slopes)
        return Step(t, h, points, slopes, x1)

    def accept(self, step: Step, t1: float, integral: Tensor | None) -> None:
        self.statistics.accepted += 1
        if self.along and integral is not None:
            self.total = integral if self.total is None else self.total + integral
        elif self.problem.integrand is not None:
            for c, b, point in zip(self.tableau.c, self.tableau.b, step.points, strict=True):
                if b:
                    self.node_times.append(step.t + c * step.h)
                    self.node_points.append(point)
                    self.node_weights.append(step.h * b)
        self.slope = step.slopes[-1] if self.tableau.first_same_as_last else None
        self.t, self.x = t1, step.x1

    def fixed(self) -> None:
        t0, t1 = self.problem.t0, self.problem.t1
        n = self.solver.steps_between(t0, t1)
        h = (t1 - t0) / n
        for i in range(n):
            self.accept(self.attempt(h), t0 + (i + 1) * h, None)
        if not bool(torch.isfinite(self.x).all()):
            raise self.solver.non_finite(t1, h)

    def adaptive(self) -> None:
        t1 = self.problem.t1
        smallest = 2 * torch.finfo(self.x.dtype).eps * max(1.0, abs(self.problem.t0), abs(t1))
        # from near the origin the guess can fall below what time can resolve, which is no failure yet
        h = math.copysign(max(abs(self.first_step()), 10 * smallest), t1 - self.t)
        broken = 0
        while self.t != t1:
            left = t1 - self.t
            last = abs(h) >= abs(left) * (1 - 1e-9)
            # two equal steps to the end rather than a long one and a sliver
            h = left if last else left / 2 if 2 * abs(h) > abs(left) else h
            if abs(h) < smallest and not last:
                raise self.solver.non_finite(self.t, h) if broken else self.solver.underflow(self.t, h)
            step = self.attempt(h)
            ratio, integral = self.error_ratio(step)
            if ratio <= 1:
                self.accept(step, t1 if last else self.t + h, integral)
                broken = 0
            else:
                self.statistics.rejected += 1
                broken = 0 if math.isfinite(ratio) else broken + 1
                if broken > NON_FINITE_RETRIES:
                    raise self.solver.non_finite(self.t, h)
            h *= self.factor(ratio)

    def factor(self, ratio: float) -> float:
        if not math.isfinite(ratio):
            return SHRINK
        grow = 1.0 if ratio > 1 else GROW
        ideal: float = SAFETY * max(ratio, 1e-10) ** (-1 / self.tableau.order)
        return min(grow, max(SHRINK, ideal))

    def first_step(self) -> float:
        """A first step from two slopes, after Hairer, Norsett and Wanner, II.4, 'starting step size'.

        Their floor of 1e-6 is 1e-3 here: an untrained field is zero, which would trigger it in every first solve.
        """
        self.slope = self.velocity(self.t, 0.0, self.x)
        with torch.no_grad():
            return self.step_from(self.slope)

    def step_from(self, slope: Tensor) -> float:
        x, span = self.x, self.problem.t1 - self.problem.t0
        scale = self.solver.atol + self.solver.rtol * x.abs()
        size, speed = rms(x / scale), rms(slope / scale)
        h0 = (torch.where((size < 1e-5) | (speed < 1e-5), torch.full_like(size, 1e-3), 0.01 * size / speed)).item()
        if not math.isfinite(h0):
            raise self.solver.non_finite(self.t, h0)
        h0 = math.copysign(min(h0, abs(span)), span)
        ahead = self.velocity(self.t + h0, h0, x + h0 * slope)
        bend = rms((ahead - slope) / scale) / abs(h0)
        steepest = torch.maximum(speed, bend).item()
        if not math.isfinite(steepest):
            return h0
        h1 = (0.01 / steepest) ** (1 / self.tableau.order) if steepest > 1e-15 else abs(span)
        return math.copysign(min(100 * abs(h0), h1, abs(span)), span)

    def error_ratio(self, step: Step) -> tuple[float, Tensor | None]:
        """Error over tolerance, in one transfer to the host; with control=all also the step's integrals."""
        e = self.tableau.e or ()
        solver = self.solver
        with torch.no_grad():
            error = combine(torch.zeros_like(step.x1), step.h, e, step.slopes)
            ratio = rms(error / (solver.atol + solver.rtol * torch.maximum(self.x.abs(), step.x1.abs())))
        integral = None
        if self.along:
            used = [i for i, b in enumerate(self.tableau.b) if b or e[i]]
            times = [step.t + self.tableau.c[i] * step.h for i in used]
            q = self.integrand_at(times, [step.points[i] for i in used])
            integral = weighted(q, [step.h * self.tableau.b[i] for i in used])
            with torch.no_grad():
                error = weighted(q, [step.h * e[i] for i in used])
                total = integral if self.total is None else self.total + integral
                ratio = torch.maximum(ratio, rms(error / (solver.atol + solver.rtol * total.abs())))
        return float(ratio), integral

    def integrand_at(self, times: list[float], points: list[Tensor]) -> Tensor:
        """q at every node in one batched call, (nodes, B, Q)."""
        if self.problem.integrand is None:
            raise RuntimeError("integrals were asked for without an integrand")
        t = torch.tensor(times, dtype=self.x.dtype).to(self.x.device, non_blocking=True).unsqueeze(1)
        return self.problem.integrand(t, torch.stack(points))[1]

    def integrals(self) -> Tensor | None:
        if self.problem.integrand is None or self.along:
            return self.total
        return weighted(self.integrand_at(self.node_times, self.node_points), self.node_weights)


def combine(x: Tensor, h: float, weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
    """x + h sum_j w_j k_j; as many weights as count, zeros skipped."""
    for w, k in zip(weights, slopes, strict=False):
        if w:
            x = torch.add(x, k, alpha=h * w)
    return x


def weighted(q: Tensor, weights: list[float]) -> Tensor:
    """sum_i w_i q_i over the nodes of q (nodes, B, Q)."""
    w = torch.tensor(weights, dtype=q.dtype).to(q.device, non_blocking=True)
    return (w @ q.flatten(1)).view(q.shape[1:])


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
