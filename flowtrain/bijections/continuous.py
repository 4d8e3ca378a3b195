"""The continuous flow, dx/dt = v(t, x) from t = 0 (base) to t = 1 (data), and its regularizers."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Pass
from flowtrain.nn.divergence import Probes, TraceRule, probe_jvps
from flowtrain.nn.fields import Field, LayeredField
from flowtrain.ode import AS_CONFIGURED, Problem, Solution, SolveOptions, Solver, StepPlan
from flowtrain.utils.arguments import number
from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError


class PathPoint(NamedTuple):
    """Points of paths, and what is known of the field there.

    Attributes:
        field: v(t, x).
        t: their times, broadcasting against (*nodes, B).
        x, v: the points and their velocities, (*nodes, B, *event).
        je: dv/dx e for each of the probes e, (k, *nodes, B, *event).
        probes: of the trace: the basis, or random tangents.
    """

    field: nn.Module
    t: Tensor
    x: Tensor
    v: Tensor
    je: Tensor
    probes: Probes

    def squared(self, y: Tensor) -> Tensor:
        """|y|^2 of each point, (*nodes, B), for y like x."""
        return y.square().sum(tuple(range(-self.probes.event_dims, 0)))


# q of a path integral, (*nodes, B), and a penalty on a field
Integral = Callable[[PathPoint], Tensor]
Penalty = Callable[[nn.Module], Tensor]


def kinetic(at: PathPoint) -> Tensor:
    """q = |v|^2, (*nodes, B)."""
    return at.squared(at.v)


def jacobian(at: PathPoint) -> Tensor:
    """q = |dv/dx|_F^2, (*nodes, B), or its estimate: the sum over the probes of w |dv/dx e|^2."""
    return at.probes.contract(at.je.square())


def bending(at: PathPoint) -> Tensor:
    """q = |dv/dt + dv/dx v|^2, (*nodes, B)."""
    return at.squared(acceleration(at.field, at.t, at.x, at.v, at.probes.event_dims))


# the path integrals, by the names of their weights
PATHS: Mapping[str, Integral] = {"kinetic": kinetic, "jacobian": jacobian, "acceleration": bending}


@dataclass(frozen=True)
class Regularizer:
    """What a training loss has added to its nats per sample: sum_r w_r mean int_0^1 q_r dt + w sum_l s(W_l)^2.

    A subclass adds terms of its own: to `integrals` or to `penalties`, by the name of the field that is their weight.

    Attributes:
        kinetic: weight of q = |v|^2 (Finlay et al. 2020, How to train your neural ODE, eq. 5: optimal transport).
        jacobian: of q = |dv/dx|_F^2 (ibid., eq. 10), estimated with the probes of the trace where that is.
        acceleration: of q = |dv/dt + dv/dx v|^2, the second derivative of a path (Kelly et al. 2020, Learning
            differential equations that are easy to solve, eq. 1, K = 2): 0 for straight lines of constant speed.
        spectral: of s(W)^2, the squared largest singular value of each weight of the field, of a convolution as the
            matrix (n_out, n_in kh kw) (Yoshida and Miyato 2017, Spectral norm regularization, eq. 5).
        end_time: b in [0, 1): paths of training end at T ~ U(1 - b, 1 + b) (Ghosh et al. 2020, STEER, eq. 6).

    Raises:
        ConfigError: a weight below 0, or an end time that is no such b.
    """

    kinetic: float = 0.0
    jacobian: float = 0.0
    acceleration: float = 0.0
    spectral: float = 0.0
    end_time: float = 0.0

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            number(f"regularizer.{key}", value, inclusive=True)
        if self.end_time >= 1:
            raise ConfigError(f"regularizer.end_time={self.end_time}: give a number below 1, so that time has an end")

    def integrals(self) -> Mapping[str, Integral]:
        """q of every path integral there is, by the name of its weight."""
        return PATHS

    def penalties(self) -> Mapping[str, Penalty]:
        """Every penalty on a field there is, by the name of its weight."""
        return {"spectral": spectral}

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.paths or self.on_fields or self.end_time)

    @property
    def paths(self) -> dict[str, Integral]:
        """The path integrals that are asked for."""
        return self._weighted(self.integrals())

    @property
    def on_fields(self) -> dict[str, Penalty]:
        """The penalties on fields that are asked for."""
        return self._weighted(self.penalties())

    def _weighted(self, terms: Mapping[str, Any]) -> dict[str, Any]:
        return {name: term for name, term in terms.items() if getattr(self, name)}

    def without_paths(self) -> "Regularizer":
        """What is left of it where no path is solved."""
        return replace(self, end_time=0.0, **dict.fromkeys(self.paths, 0.0))

    def options(self, options: SolveOptions) -> SolveOptions:
        """The options of a training pass that returns the path integrals and draws the end time."""
        return replace(options, integrals=self.paths, end_time=self.end_time) if self.active else options


def integrands(
    field: nn.Module, t: Tensor, x: Tensor, probes: Probes, paths: Mapping[str, Integral]
) -> tuple[Tensor, Tensor]:
    """(v, q) with q (*nodes, B, 1 + len(paths)): the divergence, and the integrand of each of `paths`.

    Shapes: as in `flowtrain.nn.divergence.divergence`.
    """
    v, e, je = probe_jvps(field, t, x, probes)
    at = PathPoint(field, t, x, v, je, probes)
    return v, torch.stack([probes.contract(e * je), *(q(at) for q in paths.values())], -1)


def acceleration(field: nn.Module, t: Tensor, x: Tensor, v: Tensor, event_dims: int) -> Tensor:
    """dv/dt + dv/dx v, the derivative of v along its own path; shapes as in `integrands`."""
    shape = x.shape
    if not isinstance(field, Field):
        # any other module takes rows
        outer = shape[: x.dim() - event_dims]
        x, v = (y.reshape(-1, *shape[len(outer) :]) for y in (x, v))
        t = t.expand(outer).reshape(-1)
    along: Tensor = torch.func.jvp(field, (t, x), (torch.ones_like(t), v))[1]
    return along.reshape(shape)


def spectral(field: nn.Module) -> Tensor:
    """The sum of squared largest singular values of the field's weights, each as a matrix of its outputs."""
    weights = [p for p in field.parameters() if p.dim() > 1 and p.requires_grad]
    return torch.stack([torch.linalg.matrix_norm(w.flatten(1), ord=2).square() for w in weights]).sum()


class Continuous(Bijection):
    """dx/dt = v(t, x); log|det dx(1)/dx(0)| = int_0^1 tr dv/dx dt.

    The instantaneous change of variables (Chen et al. 2018, Neural ODEs, theorem 1) along the solution. The inverse
    solves from t = 1 to 0, and the same signed integral is its log-determinant.

    Args:
        field: `forward(t, x)`; see `flowtrain.nn.fields`.
        solver: how the ODE is solved.
        trace: exact or estimated divergence, in training and at evaluation.

    Example:
        >>> from flowtrain.ode import ode_solver
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
        # at the base and at the data
        self.times = (0.0, 1.0)
        # by whether time runs forward, from base to data
        self.histories = {True: StepPlan(), False: StepPlan()}
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: compiled functions are bound to this field, and cannot be pickled."""
        return {**self.__dict__, "compiled": None}

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
        return self.pass_forward(z, label)[:2]

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.pass_inverse(x, label)[:2]

    def pass_forward(self, z: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        return self._transport(z, label, self.times[0], self._end(options), options)

    def pass_inverse(self, x: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        return self._transport(x, label, self._end(options), self.times[0], options)

    def _end(self, options: SolveOptions) -> float:
        # a random end time, from the global generator of the CPU, only if the flow covers the whole interval (0, 1)
        if not options.end_time or not self.training or self.times != (0.0, 1.0):
            return self.times[1]
        return 1 + options.end_time * (2 * float(torch.rand(())) - 1)

    def map_forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.solver.solve(self._problem(z, label, *self.times, None)).x

    def map_inverse(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.solver.solve(self._problem(x, label, *self.times[::-1], None)).x

    def _transport(self, x: Tensor, label: Tensor | None, t0: float, t1: float, options: SolveOptions) -> Pass:
        solution = self.solve(x, t0, t1, label, options)
        if solution.integrals is None:
            raise RuntimeError("the solver returned no integral")
        log_det, paths = solution.integrals[:, 0], solution.integrals[:, 1:]
        # int_0^1 whichever way it was solved
        return Pass(solution.x, log_det, (paths if t0 < t1 else -paths,) if options.integrals else ())

    def solve(
        self,
        x: Tensor,
        t0: float,
        t1: float,
        label: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
    ) -> Solution:
        """Solves from x (B, *event) at t0. The integrals (B, 1 + Q) are the log-determinant and those of `options`."""
        problem = self._problem(x, label, t0, t1, self.trace.draw(x, self.training), options.integrals)
        # an evaluated likelihood must be as exact as the tolerance says: its error takes part in the step control
        return self.solver.solve(problem, options if self.training else replace(options, control="all"))

    def velocity(self, label: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """v(t, x), of labels (B,) where the flow is conditional; compiled in training where that was asked for."""
        return self._functions(label)[0]

    def _functions(self, label: Tensor | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The velocity, and `integrands`."""
        if label is not None:
            return given(self.field, label), integrands
        compiled = self.compiled if self.training and not transforms_active() else None
        return compiled or (self.field, integrands)

    def _problem(
        self,
        x: Tensor,
        label: Tensor | None,
        t0: float,
        t1: float,
        probes: Probes | None,
        integrals: Mapping[str, Integral] = MappingProxyType({}),
    ) -> Problem:
        velocity, along = self._functions(label)
        # compiled integrands too take the field itself
        field = velocity if isinstance(velocity, Field) else self.field

        def integrand(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            assert probes is not None
            v, q = along(field, t, y, probes, integrals)
            return v, q

        return Problem(
            velocity=velocity,
            integrand=integrand if probes is not None else None,
            x=x,
            t0=t0,
            t1=t1,
            parameters=tuple(self.field.parameters()),
            n_integrals=1 + len(integrals),
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
        raise ConfigError(f"{type(field).__name__} takes no labels: use a field of flowtrain.nn for p(x | label)")
    return field.given(label)
