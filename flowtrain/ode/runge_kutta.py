"""Explicit Runge-Kutta solvers. One stepping loop serves all tableaus.

The path integrals are not components of the ODE. They are quadratures along its solution, see quadrature.py. The
gradient is exact for the accepted steps with constant step sizes, see discrete_adjoint.py. NFE counts evaluations of
the velocity in the stages, but not evaluations of the integrand.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowtrain.ode.captured_solve import Capturable, PlannedSteps
from flowtrain.ode.discrete_adjoint import AcceptedStep, AcceptedSteps, differentiable
from flowtrain.ode.exported_steps import take_steps
from flowtrain.ode.quadrature import Nodes, gauss_nodes, has_dense_output, stage_nodes
from flowtrain.ode.row_control import solve_rows
from flowtrain.ode.solver import Problem, Solution, Solver, Statistics
from flowtrain.ode.step_control import NON_FINITE_RETRIES, StepPlan, step_end, step_factor
from flowtrain.ode.tableaus import TABLEAUS, Tableau
from flowtrain.ode.tape import (
    AutogradRecorder,
    Stage,
    Weights,
    compute_stages,
    compute_stages_functional,
    on_device,
    record,
    weighted_sum,
)
from flowtrain.utils.arguments import one_of
from flowtrain.utils.autograd import plain_max, plain_values, transforms_active
from flowtrain.utils.cuda_graphs import CapturedCall, GraphMemory
from flowtrain.utils.errors import ConfigError

# the number of elements of x in a batch of nodes. With gradient=replay, the integrand is evaluated in such batches
REPLAYED_NUMBERS = 2**15


class RungeKutta(Solver):
    """An explicit Runge-Kutta solver. It is adaptive if the tableau has an error estimate, else it has fixed steps.

    Step control: a step from x0 to x1 is accepted if ratio = RMS of error / (atol + rtol max(|x0|, |x1|)) is at most 1.
    The next step is 0.9 ratio^(-1/order) times as long (Hairer, Norsett and Wanner, Solving ODEs I, II.4). The last two
    steps have equal length. In training, the steps are planned from the previous solve, see `StepPlan`. A rejected step
    cancels the rest of the plan.

    Gradients: `direct` keeps the stages of all steps for the backward pass. `replay` recomputes them step by step and
    needs less memory. See discrete_adjoint.py.

    Args:
        method: a name in `TABLEAUS`, or any name if `tableau` is given.
        tableau: the coefficients of the method.
        settings: the other arguments of `Solver`.

    Raises:
        ConfigError: an unknown method, gradient=adjoint, or settings that `Solver` does not allow.
    """

    def __init__(self, method: str, tableau: Tableau | None = None, **settings: Any) -> None:
        if tableau is None:
            one_of("solver.method", method, TABLEAUS)
        self.tableau = tableau or TABLEAUS[method]
        super().__init__(method, adaptive=self.tableau.e is not None, **settings)
        if self.gradient == "adjoint":
            raise ConfigError(
                f"solver.gradient=adjoint: RungeKutta({method!r}) has only the gradients direct and replay"
            )
        wrong = {
            f"solver={method} has fixed steps: use an adaptive method such as dopri5": not self.adaptive,
            "solver.gradient=replay does not keep the stages: use solver.gradient=direct": self.gradient == "replay",
            "solver.control=all needs the integrals of each step: use solver.control=state": self.control == "all",
        }
        if self.cuda_graphs and any(wrong.values()):
            reasons = "; ".join(reason for reason, applies in wrong.items() if applies)
            raise ConfigError(f"solver.cuda_graphs=true captures solves with planned steps, but {reasons}")

    def replays(self, x: Tensor) -> bool:
        """Whether the backward pass of a solve from x (B, *event) recomputes the stages instead of keeping them."""
        return self.gradient == "replay" or (self.gradient == "auto" and x.dim() > 2)

    def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
        if torch.compiler.is_exporting():
            if self.adaptive:
                raise ConfigError(
                    f"solver={self.method} adapts its steps to the data, which torch.export cannot trace: call "
                    "flow.export, or use a solver with fixed steps"
                )
            return take_steps(self.tableau, problem, self.steps_between(problem.t0, problem.t1), statistics)
        if transforms_active():
            functional_run = _FunctionalRun(self, problem, statistics)
            functional_run.advance()
            return functional_run.solution()
        if self.adaptive and problem.rows is not None:
            return solve_rows(self, self.tableau, problem, statistics, self.replays(problem.x))
        if self.cuda_graphs and problem.capturable is not None and torch.is_grad_enabled():
            found = self._solve_captured(problem, problem.capturable, statistics)
            if found is not None:
                return found
        run = _Run(self, problem, statistics, torch.is_grad_enabled())
        with torch.no_grad():
            run.advance()
        return replace(run.solution(), steps=run.next_plan)

    def _solve_captured(self, problem: Problem, capturable: Capturable, statistics: Statistics) -> Solution | None:
        """Returns the solution from a CUDA graph, or None if there is no graph or a planned step is rejected.

        A rejected solve is not counted in `statistics`, because it is repeated.
        """
        plan = problem.step_plan.plan(problem.t0, problem.t1) if problem.step_plan is not None else []
        parameters, same = problem.parameters, self.tableau.first_same_as_last
        nfe = 1 + len(plan) * (len(self.tableau.b) - 1) if same else len(plan) * len(self.tableau.b)
        trained = any(y.requires_grad for y in (problem.x, *parameters))
        fixed = any(y.requires_grad for y in capturable.inputs[1:]) or self.control == "all" or self.replays(problem.x)
        if not plan or not trained or fixed or problem.recorder is None or nfe > self.max_nfe:
            return None
        planned = self._planned(problem, plan)
        inputs = (planned.packed(problem.x), *capturable.inputs)
        key = self._graph_key(planned, inputs, problem, capturable)

        def make(memory: GraphMemory) -> CapturedCall:
            weights = Weights(self.tableau, problem.x)

            def solve(inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
                def run(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
                    return _PlannedRun(self, problem, planned.on_device(inputs[0]), weights).results()

                found: tuple[list[Tensor], list[Tensor]] = capturable.call(inputs[1:], parameters, run)
                return found

            on_device = inputs[0].to(problem.x.device)
            return CapturedCall(solve, (on_device, *inputs[1:]), parameters, memory)

        call = capturable.graphs.find(key, problem.x.device, make)
        if call is None:
            return None
        (x1, integrals), (error, ratios) = call(inputs, parameters)
        # the only synchronization with the device
        values = ratios.tolist()
        if not all(ratio <= 1 for ratio in values):
            return None
        statistics.nfe_forward += nfe
        statistics.accepted += len(plan)
        h = planned.h.tolist()
        steps = [(abs(a), abs(a * step_factor(ratio, self.tableau.order))) for a, ratio in zip(h, values, strict=True)]
        return Solution(x1, integrals, error, statistics, StepPlan(tuple(steps)))

    def _planned(self, problem: Problem, plan: list[float]) -> PlannedSteps:
        starts = [problem.t0, *plan[:-1]]
        steps = [(t, end - t) for t, end in zip(starts, plan, strict=True)]
        return PlannedSteps(
            tolerance=np.array([self.atol, self.rtol]),
            h=np.array([h for _, h in steps]),
            times=np.array([[t + c * h for c in self.tableau.c] for t, h in steps]),
            nodes=_quadrature(self, steps, problem.noisy),
        )

    def _graph_key(
        self, planned: PlannedSteps, inputs: Sequence[Tensor], problem: Problem, capturable: Capturable
    ) -> Hashable:
        """Returns everything that is constant in a graph of this solve."""
        return (
            planned.structure,
            self.method,
            self.tableau,
            problem.noisy,
            problem.n_integrals,
            capturable.key,
            tuple((y.shape, y.dtype, y.device, y.requires_grad) for y in inputs),
            tuple((p.data_ptr(), p.shape, p.dtype, p.device, p.requires_grad) for p in problem.parameters),
        )


@dataclass
class TriedStep:
    """An attempted step of size h.

    Attributes:
        slopes: k_i, (stages, B, *event).
        stages: the recorded stages.
        points: x_i of each stage, (B, *event).
        x1: the state at the end of the step.
        integral, error: with solver.control=all, the path integrals over the step and their error, (B, Q).
    """

    h: float | Tensor
    slopes: Tensor
    stages: list[Stage]
    points: list[Tensor]
    x1: Tensor
    integral: Tensor | None = None
    error: Tensor | None = None


class _Run:
    """The state of one solve.

    Attributes:
        t, x: the current time and state.
        first: the slope at (t, x) with its stage, if it is already known.
        steps: the accepted steps, if a gradient or a quadrature needs them.
        total, error: the path integrals so far and their error, if they are computed step by step.
        next_plan: the accepted steps of an adaptive solve with gradients, from which the next solve is planned.
    """

    compute_stages = staticmethod(compute_stages)

    def __init__(
        self,
        solver: RungeKutta,
        problem: Problem,
        statistics: Statistics,
        graph: bool,
        weights: Weights | None = None,
    ) -> None:
        self.solver, self.problem, self.statistics, self.graph = solver, problem, statistics, graph
        self.atol: float | Tensor = solver.atol
        self.rtol: float | Tensor = solver.rtol
        self.tableau: Tableau = solver.tableau
        self.recorder = problem.recorder or AutogradRecorder(problem.velocity, problem.parameters)
        self.replay = solver.replays(problem.x)
        self.t, self.x = problem.t0, problem.x.detach()
        self.first: tuple[Tensor, Stage | None] | None = None
        # the stages of the planned steps that have not been attempted
        self.recorded: list[list[Stage]] = []
        self.steps: list[AcceptedStep] = []
        self.integrand = problem.integrand
        # with control=all the error of the integrals is part of the step control
        self.controls_all = self.integrand is not None and solver.control == "all" and solver.adaptive
        self.nodes_are_stages = _uses_stages(solver)
        # without a gradient the integrals are summed step by step, and no nodes are kept
        self.sums_integrals = self.integrand is not None and self.nodes_are_stages and not graph
        self.total: Tensor | None = None
        self.error: Tensor | None = None
        self.weights = weights or Weights(self.tableau, self.x)
        self.next_plan: StepPlan | None = None

    def velocity(self, stage: Stage, t: float, h: float | Tensor, x: Tensor) -> Tensor:
        if self.statistics.nfe_forward >= self.solver.max_nfe:
            raise self.solver.exhausted(t, float(h))
        self.statistics.nfe_forward += 1
        v = stage.velocity(x)
        if v.shape != x.shape:
            raise ConfigError(
                f"the velocity field returned the shape {tuple(v.shape)} for x of shape {tuple(x.shape)}: "
                "it must return the shape of x"
            )
        return v

    def advance(self) -> None:
        """Takes the steps from t0 to t1."""
        if self.solver.adaptive:
            self.adaptive()
        else:
            self.fixed()

    def record(self, times: Sequence[float] | Tensor, keep: bool) -> list[Stage]:
        return record(self.recorder, times, self.x, keep)

    def stage_times(self, h: Any) -> Any:
        """Returns the times of the stages of a step of size h from the current state."""
        return [self.t + c * h for c in self.tableau.c]

    def record_plan(self, ends: list[float]) -> None:
        """Records the stages of steps to the given ends on one tape, because a tape has an overhead."""
        # a replay needs the tapes of the steps one after another
        if self.replay or not ends:
            return
        starts = [self.t, *ends[:-1]]
        times = [[t + c * (end - t) for c in self.tableau.c] for t, end in zip(starts, ends, strict=True)]
        shared = int(self.tableau.first_same_as_last)
        self.record_steps([*times[0][:shared], *(t for of_step in times for t in of_step[shared:])])

    def record_steps(self, times: Sequence[float] | Tensor) -> None:
        """Records the stages of several steps on one tape. The time of a stage that two steps share is given once."""
        shared = int(self.tableau.first_same_as_last)
        stages, n = self.record(times, keep=self.graph), len(self.tableau.c) - shared
        self.recorded = [stages[i : i + n + shared] for i in range(0, len(times) - shared, n)]

    def attempt(self, h: float | Tensor) -> TriedStep:
        """Computes a step of size h from the current state, without accepting it."""
        tableau, x, times = self.tableau, self.x, self.stage_times(h)
        if self.replay and self.steps:
            # a replay keeps the stages of only one step for the backward pass
            self.steps[-1].stages = None
        recorded = self.recorded.pop(0) if self.recorded else None
        if self.first is None and recorded is not None:
            self.first = self.velocity(recorded[0], times[0], h, x), recorded[0]
        if self.first is None:
            # this stage has a separate tape, because it is used again after a rejected attempt
            first = self.record(times[:1], keep=self.graph)[0]
            self.first = self.velocity(first, times[0], h, x), first
        stages = recorded or self.record(times, keep=self.graph)
        stages[0] = self.first[1] or stages[0]

        def velocity(i: int, x: Tensor) -> Tensor:
            return self.velocity(stages[i], times[i], h, x)

        points, slopes = self.compute_stages(x, h, self.weights, self.first[0], velocity)
        x1 = points[-1] if tableau.first_same_as_last else x + weighted_sum(h * self.weights.b, slopes)
        return TriedStep(h, slopes, stages, points, x1)

    def accept(self, tried: TriedStep, t1: float) -> None:
        self.statistics.accepted += 1
        same = self.tableau.first_same_as_last
        if self.controls_all:
            self.add(tried.integral, tried.error)
        elif self.sums_integrals:
            self.add(*self.integrals_of(tried))
        if self.graph or (self.integrand is not None and not self.sums_integrals):
            self.steps.append(AcceptedStep(self.t, tried.h, self.x, tried.slopes, tried.stages))
        # in a replay, the backward pass of the previous step computes the vjp of the slope that both steps share
        self.first = (tried.slopes[-1], None if self.replay else tried.stages[-1]) if same else None
        self.t, self.x = t1, tried.x1

    def add(self, integral: Tensor | None, error: Tensor | None) -> None:
        assert integral is not None
        assert error is not None
        self.total = integral if self.total is None else self.total + integral
        self.error = error if self.error is None else self.error + error

    def fixed(self) -> None:
        t0, t1 = self.problem.t0, self.problem.t1
        n = self.solver.steps_between(t0, t1)
        h = (t1 - t0) / n
        for i in range(n):
            self.accept(self.attempt(h), t0 + (i + 1) * h)
        finite = torch.isfinite(plain_values(self.x))
        if bool(finite.all()):
            return
        unsolved = self.problem.unsolved
        if unsolved is None or self.graph:
            raise self.solver.non_finite(t1, h)
        lost = (~finite).flatten(1).any(1)
        for row in lost.nonzero().flatten().tolist():
            unsolved.setdefault(row, self.solver.non_finite(t1, h))
        for result in (self.x, self.total):
            if result is not None:
                result[lost] = torch.nan

    def adaptive(self) -> None:
        t1 = self.problem.t1
        smallest = 2 * torch.finfo(self.x.dtype).eps * max(1.0, abs(self.problem.t0), abs(t1))
        plan = self.problem.step_plan.plan(self.t, t1) if self.problem.step_plan is not None else []
        self.record_plan(plan)
        h = 0.0 if plan else self.first_step_size(10 * smallest)
        taken: list[tuple[float, float]] = []
        non_finite_tries = 0
        while self.t != t1:
            end = plan[len(taken)] if plan else step_end(self.t, t1, h)
            if not plan and abs(h) < smallest and end != t1:
                raise self.solver.non_finite(self.t, h) if non_finite_tries else self.solver.underflow(self.t, h)
            h = end - self.t
            tried = self.attempt(h)
            ratio = self.error_ratio(tried)
            next_h = h * step_factor(ratio, self.tableau.order)
            if ratio <= 1:
                taken.append((abs(h), abs(next_h)))
                self.accept(tried, end)
                non_finite_tries = 0
            else:
                self.statistics.rejected += 1
                non_finite_tries = 0 if math.isfinite(ratio) else non_finite_tries + 1
                if non_finite_tries > NON_FINITE_RETRIES:
                    raise self.solver.non_finite(self.t, h)
                # the steps of the last solve do not suit this solve
                plan, self.recorded = [], []
            h = next_h
        if self.graph:
            # solves without gradients, such as the accurate solves of the solver guard, must not change the plan
            self.next_plan = StepPlan(tuple(taken))

    def first_step_size(self, smallest: float) -> float:
        """Returns the first step size, with its sign."""
        # near the origin the estimate can be below the rounding error of t. The solve must not fail with an underflow
        return math.copysign(max(abs(self.estimate_first_step()), smallest), self.problem.t1 - self.problem.t0)

    def estimate_first_step(self) -> float:
        """Estimates the first step size from two slopes (Hairer, Norsett and Wanner, II.4, 'starting step size').

        If the state or the slope is nearly zero, the estimate begins with a step of 1e-3. The book uses 1e-6. This is
        too short for an untrained flow, whose field is zero.
        """
        x, span = self.x, self.problem.t1 - self.problem.t0
        stage = self.record([self.t], keep=self.graph)[0]
        slope = self.velocity(stage, self.t, 0.0, x)
        self.first = slope, stage
        scale = self.solver.atol + self.solver.rtol * x.abs()
        size, speed = rms(x / scale), rms(slope / scale)
        h0 = -plain_max(-torch.where((size < 1e-5) | (speed < 1e-5), torch.full_like(size, 1e-3), 0.01 * size / speed))
        if not math.isfinite(h0):
            raise self.solver.non_finite(self.t, h0)
        h0 = math.copysign(min(h0, abs(span)), span)
        ahead = self.velocity(self.record([self.t + h0], keep=False)[0], self.t + h0, h0, x + h0 * slope)
        curvature = rms((ahead - slope) / scale) / abs(h0)
        largest = plain_max(torch.maximum(speed, curvature))
        if not math.isfinite(largest):
            return h0
        h1 = (0.01 / largest) ** (1 / self.tableau.order) if largest > 1e-15 else abs(span)
        return min(100 * abs(h0), h1, abs(span))

    def error_ratio(self, tried: TriedStep) -> float:
        """Returns the ratio of the error to the tolerance, with a single synchronization with the device."""
        return plain_max(self.ratio(tried))

    def ratio(self, tried: TriedStep) -> Tensor:
        """Returns the ratio of the error to the tolerance, a scalar."""
        error = weighted_sum(tried.h * self.weights.e, tried.slopes)
        scale = self.atol + self.rtol * torch.maximum(self.x.abs(), tried.x1.abs())
        ratio = rms(error / scale)
        if self.controls_all:
            tried.integral, tried.error = self.integrals_of(tried)
            total = tried.integral if self.total is None else self.total + tried.integral
            ratio = torch.maximum(ratio, rms(tried.error / (self.atol + self.rtol * total.abs())))
        return ratio

    def integrals_of(self, tried: TriedStep) -> tuple[Tensor, Tensor]:
        """Returns the integrals over one step, with the stages as nodes, and their error, each (B, Q)."""
        nodes = stage_nodes(self.tableau, [(self.t, float(tried.h))])
        q = self.integrand_at(nodes.times, torch.stack([tried.points[i] for i in self.tableau.used]))
        return nodes.integrate(q), nodes.error(q.detach())

    def integrand_at(self, times: Sequence[float] | Tensor, points: Tensor) -> Tensor:
        """Returns q at every node, (nodes, B, Q). A replay calls the integrand for a few nodes at a time."""
        assert self.integrand is not None
        integrand = self.integrand
        t = on_device(times, self.x).unsqueeze(1)
        if not self.replay:
            return integrand(t, points)[1]

        def q(t: Tensor, x: Tensor) -> Tensor:
            return integrand(t, x)[1]

        size = max(1, REPLAYED_NUMBERS // self.x.numel())
        parts = [*zip(torch.split(t, size), torch.split(points, size), strict=True)]
        # the backward pass begins with the last parts. Their graphs are kept, because they need less memory than the
        # stages of one step. The graphs of the other parts are recomputed
        kept = min(len(self.tableau.b) // 3, len(parts) - 1) if torch.is_grad_enabled() else len(parts)
        replayed = parts[: len(parts) - kept]
        # the probes of the trace are drawn before the solve, so q is deterministic
        again = [checkpoint(q, t, x, use_reentrant=False, preserve_rng_state=False) for t, x in replayed]
        return torch.cat([*again, *(q(t, x) for t, x in parts[len(replayed) :])])

    def nodes(self) -> Nodes:
        return _quadrature(self.solver, [(s.t, float(s.h)) for s in self.steps], self.problem.noisy)

    def solution(self) -> Solution:
        if not self.graph and (self.integrand is None or self.sums_integrals):
            return Solution(self.x, self.total, self.error, self.statistics)
        nodes = self.nodes() if self.integrand is not None else None
        tableau, counts = self.tableau, self.statistics
        accepted = AcceptedSteps(self.recorder, tableau, self.weights, self.steps, self.x, nodes, counts, self.replay)
        x1, points = differentiable(accepted, self.problem.x) if self.graph else (self.x, accepted.points())
        accepted.forget_slopes()
        if nodes is None:
            return Solution(x1, None, None, self.statistics)
        q = self.integrand_at(nodes.times, points)
        return Solution(x1, nodes.integrate(q), nodes.error(q.detach()), self.statistics)


class _FunctionalRun(_Run):
    """A solve with differentiable operations of torch, for grad, vmap and jvp of `torch.func`, also nested.

    Step sizes are Python numbers, so every derivative treats them as constants, as in discrete_adjoint.py. The elements
    of a vmap share the steps, because the step control uses the largest error of all elements. No step is recomputed,
    so the memory of a gradient grows with the number of steps.
    """

    compute_stages = staticmethod(compute_stages_functional)

    def __init__(self, solver: RungeKutta, problem: Problem, statistics: Statistics) -> None:
        # the recorder of a field uses hand-written kernels, which torch.func cannot transform
        super().__init__(solver, replace(problem, recorder=None), statistics, graph=False)
        self.x = problem.x
        self.replay = False

    def solution(self) -> Solution:
        if self.integrand is None or self.sums_integrals:
            return super().solution()
        nodes = self.nodes()
        points = [
            s.x + weighted_sum(s.h * on_device(r, s.x), s.slopes) for s, r in zip(self.steps, nodes.rows, strict=True)
        ]
        q = self.integrand_at(nodes.times, torch.cat(points))
        return Solution(self.x, nodes.integrate(q), nodes.error(q.detach()), self.statistics)


class _PlannedRun(_Run):
    """A solve with given steps. Times, step sizes and tolerance are tensors, whose values the host never reads."""

    def __init__(self, solver: RungeKutta, problem: Problem, planned: PlannedSteps, weights: Weights) -> None:
        super().__init__(solver, problem, Statistics(), graph=True, weights=weights)
        self.planned = planned
        self.atol, self.rtol = planned.tolerance.unbind()

    def stage_times(self, h: Any) -> Tensor:
        times: Tensor = self.planned.times[len(self.steps)]
        return times

    def nodes(self) -> Nodes:
        return self.planned.nodes

    @torch.no_grad()
    def advance(self) -> None:
        self.ratios = []
        times, shared = self.planned.times, int(self.tableau.first_same_as_last)
        self.record_steps(torch.cat([times[0, :shared], times[:, shared:].flatten()]))
        for h in self.planned.h.unbind():
            tried = self.attempt(h)
            self.ratios.append(self.ratio(tried))
            self.accept(tried, self.t)

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns x1 and the integrals, and without gradient the error of the integrals and the ratios (n,)."""
        self.advance()
        found = self.solution()
        assert found.integrals is not None
        assert found.integral_error is not None
        return [found.x, found.integrals], [found.integral_error, torch.stack(self.ratios)]


def _uses_stages(solver: RungeKutta) -> bool:
    """Whether the nodes of the path integrals are the stages."""
    return solver.control == "all" or not solver.adaptive or not has_dense_output(solver.tableau)


def _quadrature(solver: RungeKutta, steps: list[tuple[float, float]], noisy: bool) -> Nodes:
    if _uses_stages(solver):
        return stage_nodes(solver.tableau, steps)
    return gauss_nodes(solver.tableau, steps, noisy)


def rms(x: Tensor) -> Tensor:
    """Returns sqrt(mean x^2) over all elements, a scalar."""
    return x.square().mean().sqrt()
