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

from flowtrain.ode.captured_solve import Capturable
from flowtrain.ode.step_control import StepPlan
from flowtrain.ode.tape import Recorder, Velocity
from flowtrain.utils.arguments import flag, number, one_of, whole
from flowtrain.utils.errors import ConfigError, SolverError
from flowtrain.utils.precision import full_precision

Integrand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

CONTROLS = ("state", "all")
# arguments of a solver, without `steps`, which only sets step_size
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
    "cuda_graphs",
)
GRADIENTS = ("auto", "direct", "replay", "adjoint")


@dataclass
class Statistics:
    """The cost of one solve.

    Attributes:
        rows: the number of rows of the batch.
        rtol: the relative tolerance of the solve.
        nfe_forward, nfe_backward: evaluations of the velocity by the solver, in the solve and in its backward pass.
            With a separate step control for each row, the mean over the rows.
        accepted, rejected: steps of the solve. With a separate step control for each row, the mean over the rows.
        integral_error: estimated error of the path integrals, (B, Q). None if the solver has no estimate.
        state_error: the sum over the steps of the norm of the estimated error of each row of the state, (B,). None
            without a separate step control for each row.
    """

    rows: int = 0
    rtol: float = math.nan
    nfe_forward: float = 0
    nfe_backward: float = 0
    accepted: float = 0
    rejected: float = 0
    integral_error: Tensor | None = None
    state_error: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """The initial value problem dx/dt = velocity(t, x) from t0 to t1, with path integrals of q along the solution.

    The state does not depend on the integrals. So a solver may evaluate the integrand after the steps, at nodes that it
    chooses.

    Attributes:
        velocity: (t, x (B, *event)) -> v (B, *event), with t scalar. If there is `rows`, t can be (B,) too.
        integrand: (t, x (*nodes, B, *event)) -> (v, q (*nodes, B, Q)), with t broadcasting against (*nodes, B); or
            None. Autograd differentiates it.
        x: the state at t0, (B, *event).
        parameters: the parameters of the velocity, which get a gradient.
        n_integrals: Q.
        noisy: whether the integrand is a random estimate.
        recorder: evaluates the velocity and its vector-Jacobian products. None uses autograd.
        step_plan: the steps of an earlier solve, from which the steps of this solve are planned; or None.
        rows: returns the problem for the rows at some positions (n,). Adaptive methods of flowtrain's engine then use a
            separate step control for each row, see row_control.py. None: the rows share the steps.
        unsolved: a mapping to which the error of each row that cannot be solved is added, by its position. The solution
            of such a row is NaN. Only solves that do not share steps use it. None: the solve raises the SolverError.
        capturable: the parts of the problem for a graph of the solve, see captured_solve.py. None: no graph is used.
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
    rows: "Callable[[Tensor], Problem] | None" = None
    unsolved: dict[int, SolverError] | None = None
    capturable: Capturable | None = None

    def has_duration(self) -> bool:
        """Whether t0 and t1 differ in the dtype of the state. torchdiffeq keeps the time in this dtype."""
        t0, t1 = torch.tensor([self.t0, self.t1], dtype=self.x.dtype).tolist()
        return bool(t0 != t1)


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        x: the state at t1, (B, *event).
        integrals: the path integrals from t0 to t1, (B, Q), or None.
        integral_error: estimated error of the quadrature, (B, Q), or None. It does not include the error of the state.
        statistics: the cost.
        steps: the accepted steps of an adaptive solve with gradients, to plan the next solve; or None.
    """

    x: Tensor
    integrals: Tensor | None
    integral_error: Tensor | None = None
    statistics: Statistics = field(default_factory=Statistics)
    steps: StepPlan | None = None


@dataclass(frozen=True)
class SolveOptions:
    """Options for the ODE solves of one pass through a flow. They are passed along with x and are not stored.

    Attributes:
        rtol, atol, step_size, max_nfe, control: replace the settings of the solver. None keeps the solver's setting.
        integrals: path integrals to return besides the log-determinant, by name; see `regularizers.Integral`.
        end_time: b in [0, 1). In training, the solve is between 0 and T ~ U(1 - b, 1 + b) instead of between 0 and 1
            (Ghosh et al. 2020, STEER, eq. 6).
        unsolved: see `Problem.unsolved`.
    """

    rtol: float | None = None
    atol: float | None = None
    step_size: float | None = None
    max_nfe: int | None = None
    control: str | None = None
    integrals: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    end_time: float = 0.0
    unsolved: dict[int, SolverError] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are not None. They replace settings of the solver."""
        found = {key: getattr(self, key) for key in ("rtol", "atol", "step_size", "max_nfe", "control")}
        return {key: value for key, value in found.items() if value is not None}


AS_CONFIGURED = SolveOptions()


# the lists to which a solve adds its statistics
_RECORDED: ContextVar[tuple[list[Statistics], ...]] = ContextVar("recorded solves", default=())


@contextmanager
def record_solves(also_outside: bool = False) -> Iterator[list[Statistics]]:
    """Collects the statistics of every solve that starts inside this context.

    A backward pass adds to the statistics of its forward solve.

    Args:
        also_outside: whether the contexts around this context collect these solves too.
    """
    found: list[Statistics] = []
    token = _RECORDED.set((*(_RECORDED.get() if also_outside else ()), found))
    try:
        yield found
    finally:
        _RECORDED.reset(token)


def unchanged_solution(problem: Problem, statistics: Statistics) -> Solution:
    """Returns the solution for an empty batch or an interval of length 0: the state is unchanged, the integrals are 0.

    The autograd graph of the result reaches x and the parameters. So a backward pass sets gradients of 0, as with
    `nn.Linear` for an empty batch.
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
    """An ODE solver and its settings.

    A step is accepted if the RMS of error / (atol + rtol |x|) over all components and rows of the batch is at most 1.
    In evaluation mode, adaptive methods of flowtrain's engine control the steps of each row separately, see
    row_control.py.
    The settings of a solver never change. `replace` returns a solver with other settings.

    Args:
        method: name of the method.
        rtol: relative tolerance (adaptive methods).
        atol: absolute tolerance. None: the same as rtol.
        step_size: step size of a fixed-step method. Such a method needs `step_size` or `steps`.
        steps: the number of steps for t from 0 to 1, in place of step_size = 1 / steps.
        max_nfe: the largest number of evaluations of the velocity in one solve.
        control: `state`: in training, the step control ignores the path integrals. `all`: it includes them, as it
            always does at evaluation.
        gradient: direct | replay | adjoint, see `RungeKutta` and `Torchdiffeq`. auto: replay for images, direct for
            vectors.
        train_rtol: relative tolerance in training (adaptive methods), at least rtol. None: the same as rtol. atol is
            multiplied by train_rtol / rtol.
        warmup: number of training steps over which the tolerance is tightened geometrically from `warmup_rtol` to
            train_rtol. None: the trainer chooses it.
        warmup_rtol: relative tolerance at the start of the warm-up. atol is multiplied by the same ratio.
        cuda_graphs: whether training solves with planned steps are captured in CUDA graphs, see captured_solve.py.

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
        cuda_graphs: bool = False,
    ) -> None:
        self.method = method
        self.adaptive = adaptive
        self.rtol = number("solver.rtol", rtol)
        self.atol = self.rtol if atol is None else number("solver.atol", atol)
        if step_size is not None and steps is not None:
            raise ConfigError(
                f"solver.steps={steps} and solver.step_size={step_size} both set the step size: give one of them"
            )
        if steps is not None:
            step_size = 1 / whole("solver.steps", steps)
        self.step_size = None if step_size is None else number("solver.step_size", step_size)
        self.max_nfe = whole("solver.max_nfe", max_nfe)
        self.control = one_of("solver.control", control, CONTROLS)
        self.gradient = one_of("solver.gradient", gradient, GRADIENTS)
        self.train_rtol = max(self.rtol, number("solver.train_rtol", self.rtol if train_rtol is None else train_rtol))
        self.warmup = None if warmup is None and adaptive else whole("solver.warmup", warmup or 0, least=0)
        self.warmup_rtol = number("solver.warmup_rtol", warmup_rtol)
        self.cuda_graphs = flag("solver.cuda_graphs", cuda_graphs)
        if not adaptive and self.step_size is None:
            raise ConfigError(
                f"solver={method} uses fixed steps and needs a step size: set solver.step_size, "
                "for example solver.step_size=0.05 (t runs from 0 to 1), or solver.steps=20"
            )
        if not adaptive and self.warmup:
            raise ConfigError(f"solver={method} uses fixed steps and has no tolerance to warm up: remove solver.warmup")
        if adaptive and self.step_size is not None:
            raise ConfigError(
                f"solver={method} chooses its own steps: remove solver.step_size and solver.steps, or set solver.rtol"
            )

    def tolerance_at(self, step: float, tightenings: int = 0, warmup: int | None = None) -> tuple[float, float]:
        """Returns (rtol, atol) for a training step.

        During the warm-up rtol is warmup_rtol (train_rtol / warmup_rtol)^(step / warmup), and then train_rtol. The
        result is divided by 10^tightenings, but is never below the solver's rtol. atol follows in the same ratio.

        Args:
            step: the training step.
            tightenings: how often the solver guard has tightened the tolerance.
            warmup: replaces the solver's number of warm-up steps.

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
        """Returns this solver with other settings (rtol, atol, control, step_size, max_nfe).

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
        """All settings, as arguments of `ode_solver` that build the same solver.

        Example:
            >>> from flowtrain.ode import ode_solver
            >>> settings = ode_solver("rk4", steps=10).settings
            >>> settings["method"], settings["step_size"], settings["rtol"], settings["atol"]
            ('rk4', 0.1, 1e-05, None)
        """
        found = {key: getattr(self, key) for key in SETTINGS}
        # None means that the setting follows rtol
        found["atol"] = None if self.atol == self.rtol else self.atol
        found["train_rtol"] = None if self.train_rtol == self.rtol else self.train_rtol
        return found

    def describe(self) -> dict[str, Any]:
        """Returns the settings for reports: method, rtol and atol, or method and step_size for fixed steps."""
        if self.adaptive:
            return {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        return {"method": self.method, "rtol": None, "atol": None, "step_size": self.step_size}

    def solve(self, problem: Problem, options: SolveOptions = AS_CONFIGURED) -> Solution:
        """Solves `problem`. For an empty batch, or if t0 = t1, returns `unchanged_solution`.

        Args:
            options: replaces settings of the solver for this solve.

        Raises:
            SolverError: step size underflow, more than max_nfe evaluations, or a state that is not finite.
            ConfigError: a tolerance far below the machine epsilon of the dtype.
        """
        # a program traced by torch.export accepts any number of rows
        statistics = Statistics(rows=0 if torch.compiler.is_exporting() else len(problem.x))
        for recorded in _RECORDED.get():
            recorded.append(statistics)
        # for the same reason, the program must not branch on this number
        if not torch.compiler.is_exporting() and (not len(problem.x) or not problem.has_duration()):
            return unchanged_solution(problem, statistics)
        solver = self.replace(**options.settings)
        solver.check_tolerance(problem.x.dtype)
        statistics.rtol = solver.rtol
        with full_precision(problem.x.device):
            solution = solver._solve(problem, statistics)
        if solution.integral_error is not None:
            statistics.integral_error = solution.integral_error.detach()
        return solution

    @abstractmethod
    def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
        """Solves a problem with t0 != t1 and adds its cost to `statistics`."""

    def steps_between(self, t0: float, t1: float) -> int:
        """Returns the smallest number of equal steps from t0 to t1 that are not longer than step_size."""
        if self.step_size is None:
            raise RuntimeError(f"{self.method} is adaptive")
        return max(1, math.ceil(abs(t1 - t0) / self.step_size - 1e-9))

    def check_tolerance(self, dtype: torch.dtype) -> None:
        """Checks that steps in the dtype of the state can meet the tolerance, now and at the end of training.

        The rounding errors of the velocities alone would exceed a tolerance that is too small, and a solve would use up
        max_nfe.

        Raises:
            ConfigError: rtol and atol are both below 1e-4 times the machine epsilon, which is 1.2e-7 in float32.
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
        """Returns an error that names the method, the time, the step size, the tolerance and what to try."""
        how = f"rtol={self.rtol:.3g}, atol={self.atol:.3g}" if self.adaptive else f"step_size={self.step_size:g}"
        return SolverError(f"solver {self.method}: {what} at t={t:.6g} (step size {h:.3g}, {how}). {advice}")

    def underflow(self, t: float, h: float) -> SolverError:
        """Returns the error for a step so short that both its ends round to the same time."""
        return self.failure(
            "the step size underflowed",
            t,
            h,
            "The velocity field is too stiff or too rough for this tolerance. Try a larger solver.rtol, a smaller "
            "trainer.lr, a smaller trainer.clip_norm, or model.activation=softplus.",
        )

    def exhausted(self, t: float, h: float) -> SolverError:
        """Returns the error for a solve that has used max_nfe evaluations."""
        return self.failure(
            f"max_nfe={self.max_nfe} evaluations were not enough",
            t,
            h,
            "Try a larger solver.rtol or a larger solver.max_nfe. In training, a smaller trainer.lr or a larger "
            "trainer.weight_decay keeps the velocity field smooth.",
        )

    def non_finite(self, t: float, h: float) -> SolverError:
        """Returns the error for a state that is NaN or infinite."""
        return self.failure(
            "the state is NaN or infinite",
            t,
            h,
            "Look for NaN or very large values in the input. In training, try a smaller trainer.lr or "
            "trainer.clip_norm. With fixed steps, try a smaller solver.step_size.",
        )
