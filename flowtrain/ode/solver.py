"""The base class of ODE solvers, with the problem that it solves and the solution that it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowtrain.ode.step_control import StepPlan
from flowtrain.ode.tape import Recorder, Velocity
from flowtrain.utils.arguments import number, one_of, whole
from flowtrain.utils.errors import ConfigError, SolverError
from flowtrain.utils.precision import full_precision

Integrand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

CONTROLS = ("state", "all")
# of a solver, besides `steps`, which sets the step size
SETTINGS = (
    "method",
    "rtol",
    "atol",
    "step_size",
    "max_nfe",
    "control",
    "gradient",
    "train_rtol",
    "warmup",
    "warmup_rtol",
)
GRADIENTS = ("auto", "direct", "replay", "adjoint")


@dataclass
class Statistics:
    """What one solve cost. NFE counts evaluations of the velocity by the solver, backward ones apart.

    `integral_error` (B, Q) estimates the error of the path integrals; None if the solver has no estimate.
    """

    nfe_forward: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    integral_error: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """dx/dt = velocity(t, x) from t0 to t1, and path integrals of q along the solution.

    The integrals never feed back into the state, so a solver is free to evaluate them all together
    on its own nodes.

    Attributes:
        velocity: (t scalar, x (B, *event)) -> v (B, *event).
        integrand: (t, x (*nodes, B, *event)), t broadcasting against (*nodes, B) -> (v, q (*nodes, B, Q)); or None.
            Its own gradient is autograd's.
        x: the state at t0, (B, *event).
        parameters: what the gradient of the velocity must reach.
        n_integrals: Q.
        noisy: whether the integrand is a random estimate.
        recorder: how the velocity and its vector-Jacobian products are evaluated; None leaves it to autograd.
        step_plan: the steps of the last solve of this kind, by which those of this one are planned; or None.
    """

    velocity: Velocity
    integrand: Integrand | None
    x: Tensor
    t0: float
    t1: float
    parameters: tuple[nn.Parameter, ...] = ()
    n_integrals: int = 1
    noisy: bool = False
    recorder: Recorder | None = None
    step_plan: StepPlan | None = None

    def lasts(self) -> bool:
        """Whether t0 and t1 differ in the dtype of the state, in which torchdiffeq keeps the time."""
        t0, t1 = torch.tensor([self.t0, self.t1], dtype=self.x.dtype).tolist()
        return bool(t0 != t1)


@dataclass(frozen=True)
class Solution:
    """The state at t1 (B, *event), the integrals from t0 to t1 (B, Q) or None, the cost.

    `integral_error` (B, Q) estimates the error of the quadrature from its own nodes, not that of the state. `steps` are
    the accepted steps of an adaptive solve with a gradient, for the next solve of its kind.
    """

    x: Tensor
    integrals: Tensor | None
    integral_error: Tensor | None = None
    statistics: Statistics = field(default_factory=Statistics)
    steps: StepPlan | None = None


@dataclass(frozen=True)
class SolveOptions:
    """Options for the ODE solves of one pass through a flow. They travel down with x; nothing stores them.

    Attributes:
        rtol, atol, step_size, max_nfe, control: in place of the solver's own settings; None keeps the solver's.
        integrals: path integrals to return besides the log-determinant, by name; see `regularizers.Integral`.
        end_time: b in [0, 1). In training, a solve from 0 to 1 or back ends or begins at T ~ U(1 - b, 1 + b) instead
            of 1 (Ghosh et al. 2020, STEER, eq. 6).
    """

    rtol: float | None = None
    atol: float | None = None
    step_size: float | None = None
    max_nfe: int | None = None
    control: str | None = None
    integrals: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    end_time: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that replace those of the solver."""
        found = {key: getattr(self, key) for key in ("rtol", "atol", "step_size", "max_nfe", "control")}
        return {key: value for key, value in found.items() if value is not None}


AS_CONFIGURED = SolveOptions()


_RECORDED: ContextVar[list[Statistics] | None] = ContextVar("recorded solves", default=None)


@contextmanager
def record_solves() -> Iterator[list[Statistics]]:
    """Counts work for reports: collects the statistics of every solve begun inside.

    A backward solve adds to the statistics of its forward solve.
    """
    found: list[Statistics] = []
    token = _RECORDED.set(found)
    try:
        yield found
    finally:
        _RECORDED.reset(token)


def unmoved(problem: Problem, statistics: Statistics) -> Solution:
    """The solution for an empty batch or an interval of length 0: the state is unchanged, and integrals are 0.

    The state and the integrals have a graph to x and to the parameters. A backward pass then sets gradients of 0, as
    `nn.Linear` does for an empty batch.
    """
    # empty sums are 0 even if a parameter is NaN
    zeros = [p.flatten()[:0].sum() for p in problem.parameters if p.requires_grad]
    zero = sum(zeros, problem.x.new_zeros(()))
    x1 = problem.x + zero.to(problem.x.dtype)
    if problem.integrand is None:
        return Solution(x1, None, statistics=statistics)
    rows = x1.unsqueeze(-1)[..., :0].sum(tuple(range(1, x1.dim() + 1)))
    integrals = rows.unsqueeze(1).expand(-1, problem.n_integrals)
    return Solution(x1, integrals, torch.zeros_like(integrals), statistics)


class Solver(ABC):
    """An ODE solver and its settings. Tolerances are relative and absolute, per component, in RMS over the batch.

    The settings of a solver never change; `replace` makes another solver.

    Args:
        method: name of the method.
        rtol: relative tolerance (adaptive methods).
        atol: absolute tolerance; None follows rtol.
        step_size: step of fixed-step methods, which are refused without it; t runs over an interval of 1.
        steps: in its place, how many: step_size = 1 / steps.
        max_nfe: evaluations of the velocity that one solve may spend.
        control: `state` leaves the path integrals out of the step control while training, `all` takes them in.
        gradient: direct | replay | adjoint, see the solvers; auto replays images and is direct elsewhere.
        train_rtol: relative tolerance of training (adaptive methods), at least rtol; None follows rtol; atol is
            loosened alike.
        warmup: steps over which training tightens the tolerance geometrically from `warmup_rtol` to train_rtol;
            None leaves it to the trainer.
        warmup_rtol: where the warm-up begins; atol is loosened in the same ratio.

    Raises:
        ConfigError: a setting out of range, or a fixed-step method without a step size.

    Example:
        >>> import torch
        >>> from flowtrain.ode import ode_solver
        >>> decay = Problem(velocity=lambda t, x: -x, integrand=None, x=torch.ones(1, 1), t0=0.0, t1=1.0)
        >>> solution = ode_solver("rk4", steps=10).solve(decay)
        >>> round(float(solution.x), 4), solution.statistics.nfe_forward
        (0.3679, 40)
    """

    adaptive: bool

    def __init__(
        self,
        method: str,
        adaptive: bool,
        rtol: float = 1e-5,
        atol: float | None = None,
        step_size: float | None = None,
        steps: int | None = None,
        max_nfe: int = 10_000,
        control: str = "state",
        gradient: str = "auto",
        train_rtol: float | None = None,
        warmup: int | None = None,
        warmup_rtol: float = 1e-3,
    ) -> None:
        self.method = method
        self.adaptive = adaptive
        self.rtol = number("solver.rtol", rtol)
        self.atol = self.rtol if atol is None else number("solver.atol", atol)
        if step_size is not None and steps is not None:
            raise ConfigError(f"solver.steps={steps} and solver.step_size={step_size} say the same: give one of them")
        if steps is not None:
            step_size = 1 / whole("solver.steps", steps)
        self.step_size = None if step_size is None else number("solver.step_size", step_size)
        self.max_nfe = whole("solver.max_nfe", max_nfe)
        self.control = one_of("solver.control", control, CONTROLS)
        self.gradient = one_of("solver.gradient", gradient, GRADIENTS)
        self.train_rtol = max(self.rtol, number("solver.train_rtol", self.rtol if train_rtol is None else train_rtol))
        self.warmup = None if warmup is None and adaptive else whole("solver.warmup", warmup or 0, least=0)
        self.warmup_rtol = number("solver.warmup_rtol", warmup_rtol)
        if not adaptive and self.step_size is None:
            raise ConfigError(
                f"solver={method} takes fixed steps and was given no step size: set solver.step_size, "
                "for example solver.step_size=0.05 (t runs from 0 to 1), or solver.steps=20"
            )
        if not adaptive and self.warmup:
            raise ConfigError(
                f"solver={method} takes fixed steps and has no tolerance to warm up: remove solver.warmup"
            )
        if adaptive and self.step_size is not None:
            raise ConfigError(
                f"solver={method} chooses its own steps: remove solver.step_size and solver.steps, or set solver.rtol"
            )

    def tolerance_at(self, step: float, tightenings: int = 0, warmup: int | None = None) -> tuple[float, float]:
        """(rtol, atol) for a training step, never tighter than the final ones.

        rtol_w (rtol_t / rtol_w)^(step / warmup), then rtol_t = train_rtol; divided by 10^tightenings.

        Args:
            warmup: in place of the solver's own number of warm-up steps.

        Example:
            >>> from flowtrain.ode import ode_solver
            >>> solver = ode_solver("dopri5", rtol=1e-5, warmup=100)
            >>> [f"{solver.tolerance_at(step)[0]:.0e}" for step in (0, 50, 100)]
            ['1e-03', '1e-04', '1e-05']
        """
        looser = self.train_rtol / self.rtol
        warmup = (self.warmup if warmup is None else warmup) or 0
        if step < warmup and self.warmup_rtol > self.train_rtol:
            looser *= (self.warmup_rtol / self.train_rtol) ** (1 - step / warmup)
        looser = max(1.0, looser / 10**tightenings)
        return self.rtol * looser, self.atol * looser

    def replace(self, **settings: Any) -> Self:
        """The same solver with other settings (rtol, atol, control, step_size, max_nfe).

        Example:
            >>> from flowtrain.ode import ode_solver
            >>> ode_solver("dopri5", rtol=1e-5).replace(rtol=1e-3).rtol
            0.001
        """
        if not settings:
            return self
        unknown = [key for key in settings if not hasattr(self, key)]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}")
        other = copy(self)
        other.__dict__.update(settings)
        return other

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, as arguments of `ode_solver` that make this solver again.

        Example:
            >>> from flowtrain.ode import ode_solver
            >>> settings = ode_solver("rk4", steps=10).settings
            >>> settings["method"], settings["step_size"], settings["rtol"], settings["atol"]
            ('rk4', 0.1, 1e-05, None)
        """
        found = {key: getattr(self, key) for key in SETTINGS}
        # those that follow rtol go on doing so
        found["atol"] = None if self.atol == self.rtol else self.atol
        found["train_rtol"] = None if self.train_rtol == self.rtol else self.train_rtol
        return found

    def describe(self) -> dict[str, Any]:
        """method, rtol, atol for reports; a fixed-step method has a step size in place of tolerances."""
        if self.adaptive:
            return {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        return {"method": self.method, "rtol": None, "atol": None, "step_size": self.step_size}

    def solve(self, problem: Problem, options: SolveOptions = AS_CONFIGURED) -> Solution:
        """Solves `problem`. For an empty batch, or if t0 = t1, see `unmoved`.

        Args:
            options: settings of this solve in place of the solver's own.

        Raises:
            SolverError: step size underflow, more than max_nfe evaluations, or a state that is not finite.
            ConfigError: a tolerance far below the rounding of the dtype.
        """
        statistics = Statistics()
        recorded = _RECORDED.get()
        if recorded is not None:
            recorded.append(statistics)
        # a program that torch.export traces takes any number of rows, so it must not depend on that number
        if not torch.compiler.is_exporting() and (not len(problem.x) or not problem.lasts()):
            return unmoved(problem, statistics)
        solver = self.replace(**options.settings)
        solver.check_tolerance(problem.x.dtype)
        with full_precision(problem.x.device):
            solution = solver._solve(problem, statistics)
        if solution.integral_error is not None:
            statistics.integral_error = solution.integral_error.detach()
        return solution

    @abstractmethod
    def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
        """The solve itself; adds to `statistics` as it goes."""

    def steps_between(self, t0: float, t1: float) -> int:
        """How many equal fixed steps, none longer than step_size, lead from t0 to t1."""
        if self.step_size is None:
            raise RuntimeError(f"{self.method} is adaptive")
        return max(1, math.ceil(abs(t1 - t0) / self.step_size - 1e-9))

    def check_tolerance(self, dtype: torch.dtype) -> None:
        """Refuses tolerances that no step can meet in the dtype of the state, including those at the end of training.

        The rounding errors of the velocities alone would exceed such a tolerance, and a solve would use up max_nfe.

        Raises:
            ConfigError: rtol and atol are both below 1e-4 of the rounding error, which is 1.2e-7 in float32.
        """
        eps = torch.finfo(dtype).eps
        last = self.train_rtol, self.atol * self.train_rtol / self.rtol
        tolerance = min(max(self.rtol, self.atol), max(last))
        if self.adaptive and tolerance < 1e-4 * eps:
            raise ConfigError(
                f"solver.rtol={tolerance:.3g}: {str(dtype).removeprefix('torch.')} has a precision of {eps:.2g}, so no "
                f"step can meet this tolerance; give one above {10 * eps:.0e}"
            )

    def failure(self, what: str, t: float, h: float, advice: str) -> SolverError:
        """One message naming the method, the time, the step size, the tolerance and what to try."""
        how = f"rtol={self.rtol:.3g}, atol={self.atol:.3g}" if self.adaptive else f"step_size={self.step_size:g}"
        return SolverError(f"solver {self.method}: {what} at t={t:.6g} (step size {h:.3g}, {how}). {advice}")

    def underflow(self, t: float, h: float) -> SolverError:
        """The failure of a step too short for time to tell its ends apart."""
        return self.failure(
            "the step size underflowed",
            t,
            h,
            "The field is too stiff or too rough for this tolerance: try a looser solver.rtol, a smaller trainer.lr, "
            "a smaller trainer.clip_norm, or model.activation=softplus.",
        )

    def exhausted(self, t: float, h: float) -> SolverError:
        """The failure of a solve that has spent max_nfe evaluations."""
        return self.failure(
            f"max_nfe={self.max_nfe} evaluations were not enough",
            t,
            h,
            "Try a looser solver.rtol, a larger solver.max_nfe, or train with a smaller trainer.lr or more "
            "trainer.weight_decay so that the field stays smooth.",
        )

    def non_finite(self, t: float, h: float) -> SolverError:
        """The failure of a state that is NaN or infinite."""
        return self.failure(
            "the state is NaN or infinite",
            t,
            h,
            "Look for NaN or huge values in the input; in training try a smaller trainer.lr or trainer.clip_norm; "
            "with fixed steps, a smaller solver.step_size.",
        )
