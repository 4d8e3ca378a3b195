"""The continuous flow: transport along a velocity field from t = 0 (base) to t = 1 (data)."""

from collections.abc import Callable
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.derivatives import transforms_active
from flowtrain.divergence import Probes, TraceRule
from flowtrain.errors import ConfigError
from flowtrain.fields.base import Field
from flowtrain.fields.layered import LayeredField
from flowtrain.regularizers import Regularizer, integrands, record_paths
from flowtrain.solvers import History, Problem, Solution, Solver


class Continuous(Bijection):
    """dx/dt = v(t, x); log|det dx(1)/dx(0)| = int_0^1 tr dv/dx dt.

    The instantaneous change of variables (Chen et al. 2018, Neural ODEs, theorem 1) along the solution. The inverse
    solves from t = 1 to 0, and the same signed integral is its log-determinant.

    Args:
        field: `forward(t, x)`; see `flowtrain.fields.base`.
        solver: how the ODE is solved.
        trace: exact or estimated divergence, in training and at evaluation.

    Example:
        >>> from flowtrain.solvers import ode_solver
        >>> class Decay(nn.Module):
        ...     def forward(self, t, x):
        ...         return -x
        >>> x, log_det = Continuous(Decay(), ode_solver("dopri5"), TraceRule())(torch.ones(1, 2))
        >>> round(float(x[0, 0]), 3), round(float(log_det), 3)  # 1 / e, and tr dv/dx = -2
        (0.368, -2.0)
    """

    def __init__(self, field: nn.Module, solver: Solver, trace: TraceRule) -> None:
        super().__init__()
        self.field = field
        self.solver = solver
        self.trace = trace
        self.regularizer = Regularizer()
        # at the base and at the data
        self.times = (0.0, 1.0)
        # by whether time runs forward, from base to data
        self.histories = {True: History(), False: History()}
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def compile_field(self) -> None:
        """Compiles the field's evaluations in training: with CUDA graphs on a GPU, to C++ on a CPU.

        A compiled field is differentiated by autograd, not by hand.
        """
        mode = "reduce-overhead" if next(self.field.parameters()).is_cuda else "default"
        self.compiled = (
            torch.compile(self.field.forward, mode=mode, dynamic=False),
            torch.compile(integrands, mode=mode, dynamic=False),
        )

    def between(self, start: float, end: float) -> Self:
        """The same flow on another interval: forward solves from `start` to `end`, inverse from `end` to `start`."""
        part = copy(self)
        part.times = (start, end)
        return part

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transport(z, label, self.times[0], self._end())

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transport(x, label, self._end(), self.times[0])

    def _end(self) -> float:
        # the regularizer may draw a random end time, but only if the flow covers the whole interval (0, 1)
        return self.regularizer.end() if self.training and self.times == (0.0, 1.0) else self.times[1]

    def map_forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.solver.solve(self._problem(z, label, *self.times, None)).x

    def map_inverse(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.solver.solve(self._problem(x, label, *self.times[::-1], None)).x

    def _transport(self, x: Tensor, label: Tensor | None, t0: float, t1: float) -> tuple[Tensor, Tensor]:
        solution = self.solve(x, t0, t1, label)
        if solution.integrals is None:
            raise RuntimeError("the solver returned no integral")
        if record_paths.open is not None and self.training:
            # int_0^1 whichever way it was solved
            record_paths.open.append(solution.integrals[:, 1:] if t0 < t1 else -solution.integrals[:, 1:])
        return solution.x, solution.integrals[:, 0]

    def solve(self, x: Tensor, t0: float, t1: float, label: Tensor | None = None) -> Solution:
        """The solution from x (B, *event) at t0, its integrals (B, 1 + Q): the log-determinant, and the path
        integrals that the regularizer asks for while they are recorded."""
        problem = self._problem(x, label, t0, t1, self.trace.draw(x, self.training))
        # an evaluated likelihood must be as exact as the tolerance says: its error takes part in the step control
        control = self.solver.control if self.training else "all"
        with self.solver.using(control=control):
            return self.solver.solve(problem)

    def velocity(self, label: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """v(t, x), of labels (B,) where the flow is conditional; compiled in training where that was asked for."""
        return self._functions(label)[0]

    def _functions(self, label: Tensor | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The velocity, and `integrands`."""
        if label is not None:
            return given(self.field, label), integrands
        compiled = self.compiled if self.training and not transforms_active() else None
        return compiled or (self.field, integrands)

    def _problem(self, x: Tensor, label: Tensor | None, t0: float, t1: float, probes: Probes | None) -> Problem:
        velocity, along = self._functions(label)
        # compiled integrands too take the field itself
        field = velocity if isinstance(velocity, Field) else self.field
        names = self.regularizer.paths if self.training and record_paths.open is not None else {}

        def integrand(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            assert probes is not None
            v, q = along(field, t, y, probes, names)
            return v, q

        return Problem(
            velocity=velocity,
            integrand=integrand if probes is not None else None,
            x=x,
            t0=t0,
            t1=t1,
            parameters=tuple(self.field.parameters()),
            n_integrals=1 + len(names),
            noisy=probes is not None and probes.noisy,
            recorder=velocity.recorder() if isinstance(velocity, Field) else None,
            # an evaluation is the same whatever was solved before it
            history=self.histories[t0 < t1] if self.training else None,
        )


def given(field: nn.Module, label: Tensor) -> Field:
    """The field at labels (B,).

    Raises:
        ConfigError: a field that takes none.
    """
    if not isinstance(field, LayeredField):
        raise ConfigError(f"{type(field).__name__} takes no labels: use a field of flowtrain.fields for p(x | label)")
    return field.given(label)
