"""The continuous flow: dx/dt = v(t, x) from t = 0 (base) to t = 1 (data), solved as an ODE."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Pass, as_pass
from flowtrain.bijections.regularizers import Integral, integrands
from flowtrain.nn.divergence import Probes, TraceRule
from flowtrain.nn.velocity_field import Field, LayeredField
from flowtrain.ode import AS_CONFIGURED, Problem, Solution, SolveOptions, Solver, StepPlan, ode_solver
from flowtrain.ode.captured_solve import Capturable, SolveGraphs
from flowtrain.ode.row_control import per_row
from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.modules import parameters_of


class Continuous(Bijection):
    """The flow of the ODE dx/dt = v(t, x), with log|det dx(1)/dx(0)| = int_0^1 tr dv/dx dt.

    The log-determinant follows from the instantaneous change of variables (Chen et al. 2018, Neural ODEs, theorem 1).
    The inverse solves the ODE from t = 1 to 0, and its log-determinant is the integral from 1 to 0. In evaluation mode,
    the inverse does not solve the ODE for a row that is infinite or whose squares overflow. The result is the row
    itself, and its log-determinant is -inf. For a row with NaN, the log-determinant is NaN.

    Args:
        field: the velocity field, `forward(t, x)`; see `flowtrain.nn.velocity_field`.
        solver: solves the ODE. None: `ode_solver()`.
        trace: whether the divergence is exact or estimated, in training and at evaluation. None: `TraceRule()`.

    Example:
        >>> class Decay(nn.Module):
        ...     def forward(self, t, x):
        ...         return -x
        >>> x, log_det = Continuous(Decay())(torch.ones(1, 2))
        >>> round(float(x[0, 0]), 3), round(float(log_det), 3)  # 1 / e, and tr dv/dx = -2
        (0.368, -2.0)
    """

    def __init__(self, field: nn.Module, solver: Solver | None = None, trace: TraceRule | None = None) -> None:
        super().__init__()
        self.field = field
        self.solver = ode_solver() if solver is None else solver
        self.trace = TraceRule() if trace is None else trace
        # the times of the base and of the data
        self.times = (0.0, 1.0)
        # the plan of each direction: True is from base to data, False is from data to base
        self.step_plans = {True: StepPlan(), False: StepPlan()}
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.graphs = SolveGraphs()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without compiled functions and graphs, which use this field and cannot be pickled."""
        return {**self.__dict__, "compiled": None, "graphs": SolveGraphs()}

    def compile_field(self) -> None:
        """Compiles the evaluations of the field in training: with CUDA graphs on a GPU, to C++ on a CPU.

        Autograd differentiates a compiled field. The hand-written derivatives are not used.
        """
        mode = "reduce-overhead" if next(self.field.parameters()).is_cuda else "default"
        self.compiled = (
            torch.compile(self.field.forward, mode=mode, dynamic=False),
            torch.compile(integrands, mode=mode, dynamic=False),
        )

    def between(self, start: float, end: float) -> Self:
        """Returns this flow on another interval: forward from `start` to `end`, inverse from `end` to `start`."""
        part = copy(self)
        part.times = (start, end)
        return part

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Continuous.pass_forward, self), z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Continuous.pass_inverse, self), x, context)

    def pass_forward(self, z: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        return self._transport(z, context, self.times[0], self._end(options), options)

    def pass_inverse(self, x: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        if self.training:
            return self._transport(x, context, self._end(options), self.times[0], options)
        solved, y = _solvable(x)
        z, log_det, integrals = self._transport(y, context, self._end(options), self.times[0], options)
        log_det = torch.where(solved, log_det, torch.where(x.isnan().flatten(1).any(1), torch.nan, -torch.inf))
        return Pass(torch.where(per_row(solved, x), z, x), log_det, integrals)

    def _end(self, options: SolveOptions) -> float:
        # the end time is random only if the flow covers the interval (0, 1). The CPU's global generator draws it
        if not options.end_time or not self.training or self.times != (0.0, 1.0):
            return self.times[1]
        return 1 + options.end_time * (2 * float(torch.rand(())) - 1)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.solver.solve(self._problem(z, context, *self.times, None, AS_CONFIGURED)).x

    def map_inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.training:
            return self.solver.solve(self._problem(x, context, *self.times[::-1], None, AS_CONFIGURED)).x
        solved, y = _solvable(x)
        z = self.solver.solve(self._problem(y, context, *self.times[::-1], None, AS_CONFIGURED)).x
        return torch.where(per_row(solved, x), z, x)

    def _transport(self, x: Tensor, context: Tensor | None, t0: float, t1: float, options: SolveOptions) -> Pass:
        solution = self.solve(x, t0, t1, context, options)
        if solution.integrals is None:
            raise RuntimeError("the solver returned no integral")
        log_det, paths = solution.integrals[:, 0], solution.integrals[:, 1:]
        # path integrals run from 0 to 1 in both directions
        return Pass(solution.x, log_det, (paths if t0 < t1 else -paths,) if options.integrals else ())

    def solve(
        self,
        x: Tensor,
        t0: float,
        t1: float,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
    ) -> Solution:
        """Solves the ODE from x (B, *event) at t0 to t1.

        The integrals (B, 1 + Q) are the log-determinant and the Q path integrals of `options`.
        """
        problem = self._problem(x, context, t0, t1, self.trace.draw(x, self.training), options)
        # at evaluation, the step control includes the error of the likelihood, so that the likelihood is accurate
        solution = self.solver.solve(problem, options if self.training else replace(options, control="all"))
        if self.training and solution.steps is not None:
            self.step_plans = {**self.step_plans, t0 < t1: solution.steps}
        return solution

    def velocity(self, context: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the function v(t, x) for a context or None. After `compile_field`, it is compiled in training."""
        return self._functions(self.field, context)[0]

    def _functions(self, field: nn.Module, context: Tensor | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns the velocity and `integrands`, or the compiled functions."""
        if context is not None:
            return given(field, context), integrands
        compiled = self.compiled if self.training and not transforms_active() else None
        return compiled or (field, integrands)

    def _problem(
        self,
        x: Tensor,
        context: Tensor | None,
        t0: float,
        t1: float,
        probes: Probes | None,
        options: SolveOptions,
        prepared: nn.Module | None = None,
    ) -> Problem:
        integrals: Mapping[str, Integral] = options.integrals
        if prepared is None:
            # in training, a solve begins with a tape of the field, which does not need a prepared field
            prepared = self.field.prepared() if isinstance(self.field, Field) and not self.training else self.field
        velocity, evaluate_integrands = self._functions(prepared, context)
        # compiled integrands also need the field, and not the compiled velocity
        field = velocity if isinstance(velocity, Field) else prepared

        def integrand(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            assert probes is not None
            v, q = evaluate_integrands(field, t, y, probes, integrals)
            return v, q

        def rows(index: Tensor) -> Problem:
            given = None if context is None else context[index]
            of_rows = None if probes is None else probes.of_rows(index)
            return self._problem(x[index], given, t0, t1, of_rows, options, prepared)

        return Problem(
            velocity=velocity,
            integrand=integrand if probes is not None else None,
            x=x,
            t0=t0,
            t1=t1,
            parameters=parameters_of(self.field),
            n_integrals=1 + len(integrals),
            noisy=probes is not None and probes.noisy,
            recorder=velocity.recorder() if isinstance(velocity, Field) else None,
            # an evaluation must not depend on earlier solves
            step_plan=self.step_plans[t0 < t1] if self.training else None,
            rows=None if self.training else rows,
            unsolved=options.unsolved,
            capturable=self._capturable(x, context, t0, t1, probes, options),
        )

    def _capturable(
        self,
        x: Tensor,
        context: Tensor | None,
        t0: float,
        t1: float,
        probes: Probes | None,
        options: SolveOptions,
    ) -> Capturable | None:
        if not self.solver.cuda_graphs or not self.training or probes is None or self.compiled is not None:
            return None

        def call(inputs: Sequence[Tensor], parameters: Sequence[Tensor], function: Callable[[Problem], Any]) -> Any:
            x, tangents, *rest = inputs

            def run() -> Any:
                again = replace(probes, tangents=tangents)
                return function(self._problem(x, rest[0] if rest else None, t0, t1, again, options))

            names = [f"field.{name}" for name, _ in self.field.named_parameters()]
            return torch.func.functional_call(_FieldCall(self.field), dict(zip(names, parameters, strict=True)), (run,))

        inputs = (x, probes.tangents, *(() if context is None else (context,)))
        key = probes.weight, probes.is_basis, tuple(options.integrals.items())
        return Capturable(inputs, key, call, self.graphs)


def _solvable(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which rows of x (B, *event) are finite and have finite squares, (B,), and x with 0 in the other rows.

    A solve of the other rows would fail, and then no row of the batch would have a result.
    """
    solvable = x.flatten(1).abs().amax(1) < math.sqrt(torch.finfo(x.dtype).max)
    return solvable, torch.where(per_row(solvable, x), x, 0.0)


class _FieldCall(nn.Module):
    """Calls a function while functional_call has replaced the parameters of the field."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def given(field: nn.Module, context: Tensor) -> Field:
    """Returns the field v(t, x | context) for labels (B,) or features (B, F).

    Raises:
        ConfigError: a field without context.
    """
    if not isinstance(field, LayeredField):
        raise ConfigError(
            f"{type(field).__name__} has no context: use a field of flowtrain.nn with classes=K for p(x | context)"
        )
    return field.given(context)
