"""Solvers that call torchdiffeq: all methods of torchdiffeq, and the adjoint gradient, whose memory is constant.

The state and the path integrals are solved as one augmented system. A callback before each forward or backward step
checks the state and the step size. It raises a SolverError with the time of the failure, because torchdiffeq would only
fail with an assertion.
"""

import logging
import warnings
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint
from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau

from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.solver import Problem, Solution, Solver, Statistics
from flowtrain.ode.tableaus import TABLEAUS, Tableau
from flowtrain.utils.arguments import one_of
from flowtrain.utils.autograd import plain_values, transforms_active
from flowtrain.utils.errors import ConfigError, SolverError

log = logging.getLogger("flowtrain")


def _tensor(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Tsit5(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
    """Tsitouras 5(4) for gradient=adjoint. torchdiffeq 0.2.5 has no tsit5."""

    order = TABLEAUS["tsit5"].order
    tableau = _ButcherTableau(
        alpha=_tensor(TABLEAUS["tsit5"].c[1:]),
        beta=[_tensor(row) for row in TABLEAUS["tsit5"].a],
        c_sol=_tensor(TABLEAUS["tsit5"].b),
        c_error=_tensor(TABLEAUS["tsit5"].e or ()),
    )
    mid = _tensor(TABLEAUS["tsit5"].mid or ())


class ImplicitAdams(AdamsBashforthMoulton):  # type: ignore[misc]
    """torchdiffeq's implicit Adams method. Its warning about the corrector is written to flowtrain's log."""

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = super()._step_func(func, t0, dt, t1, y0)
        for w in caught:
            if "did not converge" in str(w.message):
                warn_of_corrector(self.max_iters)
            else:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return step


@cache
def warn_of_corrector(iterations: int) -> None:
    """Warns once per process that the corrector of an implicit method did not converge."""
    log.warning(
        "solver implicit_adams: the corrector did not reach solver.rtol and solver.atol in %d iterations, so the "
        "solution may be inaccurate. Try a smaller solver.step_size.",
        iterations,
    )


@cache
def warn_of_fehlberg2() -> None:
    """Warns once per process that the error estimate of fehlberg2 is far too small."""
    log.warning(
        "solver=fehlberg2: its error estimate is far too small, so errors exceed the tolerance by a factor of 30 to "
        "500 at any solver.rtol. Use solver=bosh3, or divide solver.rtol by this factor."
    )


# the solver class of each method
METHODS: dict[str, type] = {
    **SOLVERS,
    "tsit5": Tsit5,
    "heun": SOLVERS["heun2"],
    "implicit_adams": ImplicitAdams,
    "fixed_adams": ImplicitAdams,
}


def registered_name(method: str) -> str:
    """Returns the name under which torchdiffeq finds the solver class of a method.

    torchdiffeq looks classes up by name in its table. flowtrain's classes are added to this table under new names when
    they are first used. The existing entries do not change.
    """
    solver = METHODS[method]
    if SOLVERS.get(method) is solver:
        return method
    name = f"flowtrain_{solver.__name__}"
    SOLVERS.setdefault(name, solver)
    return name


class Torchdiffeq(Solver):
    """A solver of torchdiffeq.

    gradient=direct differentiates through torchdiffeq's steps. gradient=adjoint solves the adjoint ODE backwards (Chen
    et al. 2018, Neural ODEs, algorithm 1). The memory of this solve does not grow with the number of steps. The result
    approximates the gradient of the continuous problem, with an error of the order of the tolerance.

    Raises:
        ConfigError: an unknown method, gradient=replay, or settings that `Solver` does not allow.
    """

    def __init__(self, method: str, **settings: Any) -> None:
        one_of("solver.method", method, sorted(METHODS))
        if settings.get("gradient") == "replay":
            raise ConfigError(
                f"solver.gradient=replay: solver={method} has only direct and adjoint; replay needs one of the solvers "
                f"{', '.join(TABLEAUS)}"
            )
        if settings.get("cuda_graphs"):
            raise ConfigError(
                f"solver.cuda_graphs=true: solver={method} with gradient={settings.get('gradient', 'auto')} runs on "
                "torchdiffeq, which chooses its steps during the solve; use solver=dopri5 with solver.gradient=direct"
            )
        adaptive = issubclass(METHODS[method], RKAdaptiveStepsizeODESolver) or method == "scipy_solver"
        super().__init__(method, adaptive=adaptive, **settings)
        if method == "fehlberg2":
            # the error estimate is about h^2 x'' / 512, but the error of x1 is of order h^3, without the factor 1/512
            warn_of_fehlberg2()

    def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
        if transforms_active():
            return self._solve_transformed(problem, statistics)
        dynamics = _Dynamics(self, problem, statistics)
        x = problem.x
        state: tuple[Tensor, ...] = (x,)
        if problem.integrand is not None:
            state = (x, x.new_zeros(len(x), problem.n_integrals))
        x1, *q = self._integrate(dynamics, state, problem)
        dynamics.backward = True
        if not bool(torch.isfinite(x1).all()):
            raise self.non_finite(problem.t1, dynamics.h)
        return Solution(x1, q[0] if q else None, statistics=statistics)

    def _solve_transformed(self, problem: Problem, statistics: Statistics) -> Solution:
        """Solves inside a transform of `torch.func`.

        The transform differentiates the steps, for any `solver.gradient`. torchdiffeq writes in place and
        branches on the values of its error estimates, and vmap does not allow either. So adaptive methods run on
        flowtrain's engine with torchdiffeq's tableau, and methods with fixed steps run in `_fixed_steps`.
        """
        if self.method == "scipy_solver":
            raise ConfigError(
                "solver=scipy_solver computes in NumPy and cannot run inside the transforms of torch.func: use another "
                "solver, for example solver=dopri5"
            )
        if not self.adaptive:
            return self._fixed_steps(problem, statistics)
        shared = {key: getattr(self, key) for key in ("rtol", "atol", "max_nfe", "control")}
        engine = RungeKutta(self.method, TABLEAUS.get(self.method) or tableau_of(METHODS[self.method]), **shared)
        return engine._solve(problem, statistics)

    def _fixed_steps(self, problem: Problem, statistics: Statistics) -> Solution:
        """Solves with torchdiffeq's fixed steps, without in-place writes."""
        dynamics = _Dynamics(self, problem, statistics)
        shape, d = problem.x.shape, problem.x.shape[1:].numel()

        def slope(t: Tensor, y: Tensor, perturb: object = None) -> Tensor:
            parts = dynamics(t, (y[:, :d].reshape(shape),))
            return torch.cat([part.flatten(1) for part in parts], 1)

        y = problem.x.flatten(1)
        if problem.integrand is not None:
            y = torch.cat([y, y.new_zeros(len(y), problem.n_integrals)], 1)
        stepper: Any = METHODS[self.method](func=slope, y0=plain_values(y), rtol=self.rtol, atol=self.atol)
        # implicit methods repeat the corrector until it has converged for every element of a vmap
        stepper._has_converged = lambda y0, y1: type(stepper)._has_converged(
            stepper, plain_values(y0), plain_values(y1)
        )
        t = torch.tensor([problem.t0, problem.t1], dtype=y.dtype, device=y.device)
        grid = _grid(t, self.steps_between(problem.t0, problem.t1))
        for start, end in pairwise(grid):
            y = y + stepper._step_func(slope, start, end - start, end, y)[0]
            statistics.accepted += 1
        if not bool(torch.isfinite(plain_values(y)).all()):
            raise self.non_finite(problem.t1, float(grid[1] - grid[0]))
        x1 = y[:, :d].reshape(shape)
        return Solution(x1, None if problem.integrand is None else y[:, d:], statistics=statistics)

    def _integrate(self, dynamics: "_Dynamics", state: tuple[Tensor, ...], problem: Problem) -> list[Tensor]:
        t = torch.tensor([problem.t0, problem.t1], dtype=state[0].dtype, device=state[0].device)
        arguments: dict[str, Any] = {
            "method": registered_name(self.method),
            "rtol": self.rtol,
            "atol": self.atol,
            "options": {},
        }
        if not self.adaptive:
            n = self.steps_between(problem.t0, problem.t1)
            # torchdiffeq's grid for a step size can end with a step of length zero in float32
            arguments["options"] = {"grid_constructor": lambda f, y, t: _grid(t, n)}
        elif self.method != "scipy_solver":
            # a step then ends at t1. By default, torchdiffeq steps over t1 and interpolates, which is far less accurate
            arguments["options"] = {"step_t": t[1:]}
            if self.control == "state":
                arguments["options"]["norm"] = lambda y: y[0].square().mean().sqrt()
        needs_gradient = torch.is_grad_enabled() and any(v.requires_grad for v in (state[0], *problem.parameters))
        if needs_gradient and self.gradient == "adjoint":
            arguments["adjoint_options"] = {**arguments["options"]}
            arguments["adjoint_options"].pop("norm", None)
            if "step_t" in arguments["options"]:
                arguments["adjoint_options"]["step_t"] = t[:1]
            return [y[-1] for y in odeint_adjoint(dynamics, state, t, adjoint_params=problem.parameters, **arguments)]
        if needs_gradient and self.method == "scipy_solver":
            raise ConfigError("solver=scipy_solver has no direct gradient: set solver.gradient=adjoint")
        try:
            return [y[-1] for y in odeint(dynamics, state, t, **arguments)]
        except MemoryError as e:
            # LSODA allocates a matrix over all components of the batch
            raise SolverError(
                f"solver={self.method}: its matrix over all {sum(y.numel() for y in state)} numbers of the batch does "
                "not fit into memory: use another solver, or a smaller batch"
            ) from e


def tableau_of(method: type) -> Tableau:
    """Returns the tableau of an adaptive Runge-Kutta method of torchdiffeq."""
    solver_class: Any = method
    alpha, beta, b, e = solver_class.tableau
    rows = tuple(tuple(row.tolist()) for row in beta)
    return Tableau(solver_class.order, (0.0, *alpha.tolist()), rows, tuple(b.tolist()), tuple(e.tolist()))


def _grid(t: Tensor, n: int) -> Tensor:
    grid = t[0] + (t[-1] - t[0]) * torch.arange(n + 1, dtype=t.dtype, device=t.device) / n
    grid[-1] = t[-1]
    return grid


class _Dynamics:
    """The function d(x, q)/dt for torchdiffeq. Its callbacks count steps and raise a SolverError if a step fails."""

    def __init__(self, solver: Torchdiffeq, problem: Problem, statistics: Statistics) -> None:
        self.solver, self.problem, self.statistics = solver, problem, statistics
        self.backward = False
        self.h = 0.0
        # torchdiffeq warns about callbacks that a method does not support
        if solver.method != "scipy_solver":
            self.callback_step = self.callback_step_adjoint = self.check_step
        if solver.adaptive and solver.method != "scipy_solver":
            self.callback_accept_step, self.callback_reject_step = self.accepted, self.rejected

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.count(t)
        x = state[0]
        if self.problem.integrand is None:
            return (self.problem.velocity(t, x),)
        v, q = self.problem.integrand(t, x)
        return v, q

    def count(self, t: Tensor) -> None:
        statistics = self.statistics
        spent = statistics.nfe_backward if self.backward else statistics.nfe_forward
        if spent >= self.solver.max_nfe:
            raise self.solver.exhausted(float(t.detach()), self.h)
        if self.backward:
            statistics.nfe_backward += 1
        else:
            statistics.nfe_forward += 1

    def check_step(self, t: Tensor, state: Any, h: Tensor) -> None:
        # the first step size has a graph, so it is detached. torchdiffeq replaces a step size of NaN by zero
        now, self.h = float(t.detach()), float(h.detach())
        if not self.solver.adaptive:
            self.statistics.accepted += 1
            return
        finite = all(bool(torch.isfinite(part).all()) for part in state)
        if self.h == 0 or not finite:
            raise self.solver.non_finite(now, self.h)
        if now + self.h == now:
            raise self.solver.underflow(now, self.h)

    def accepted(self, t: Tensor, state: Any, h: Tensor) -> None:
        self.statistics.accepted += 1

    def rejected(self, t: Tensor, state: Any, h: Tensor) -> None:
        self.statistics.rejected += 1
