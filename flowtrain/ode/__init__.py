"""ODE solvers: `ode_solver` picks the engine for a method and a gradient."""

import inspect
from typing import Any

import torch

from flowtrain.ode.row_errors import row_errors
from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.solver import AS_CONFIGURED, Problem, Solution, SolveOptions, Solver, Statistics, record_solves
from flowtrain.ode.step_control import StepPlan
from flowtrain.ode.tableaus import TABLEAUS, Tableau
from flowtrain.utils.arguments import choose, one_of
from flowtrain.utils.errors import ConfigError

__all__ = [
    "AS_CONFIGURED",
    "Problem",
    "Solution",
    "SolveOptions",
    "Solver",
    "Statistics",
    "StepPlan",
    "Tableau",
    "ode_solver",
    "record_solves",
    "row_errors",
]


# this list exists so that torchdiffeq is imported only if it is used. tests/ode/test_solver.py compares it with
# torchdiffeq's list
TORCHDIFFEQ_METHODS = (
    "adaptive_heun",
    "bosh3",
    "dopri5",
    "dopri8",
    "euler",
    "explicit_adams",
    "fehlberg2",
    "fixed_adams",
    "heun",
    "heun2",
    "heun3",
    "implicit_adams",
    "midpoint",
    "rk4",
    "scipy_solver",
    "tsit5",
)


def ode_solver(
    method: str = "dopri5", gradient: str = "auto", tableau: Tableau | None = None, **settings: Any
) -> Solver:
    """Builds the solver for a method.

    Methods with a tableau in tableaus.py run on flowtrain's engine. The other methods, and gradient=adjoint, run on
    torchdiffeq.

    Args:
        method: one of `configs/solver`, such as dopri5, tsit5, rk4 or euler.
        gradient: direct | replay | adjoint | auto, see `Solver`.
        settings: other arguments of `Solver`, such as rtol, or steps for methods with fixed steps.
        tableau: the tableau of a new method, for flowtrain's engine. `method` is then only a name.

    Raises:
        ConfigError: an unknown method (the message lists the methods), an unknown setting or a setting out of range.
    """
    if tableau is None:
        one_of("solver.method", method, sorted({*TABLEAUS, *TORCHDIFFEQ_METHODS}))
    known = inspect.signature(Solver.__init__).parameters
    unknown = [key for key in settings if key not in known]
    if unknown:
        names = [key for key in known if key not in ("self", "adaptive")]
        raise ConfigError(f"solver: unknown key {', '.join(unknown)}; {choose(unknown[0], names, 'valid keys are')}")
    if tableau is not None:
        if not isinstance(tableau, Tableau):
            raise ConfigError(
                f"solver.tableau={tableau}: not a Tableau. A config cannot contain one: set solver._target_ to a "
                "function that calls ode_solver(tableau=...)"
            )
        return RungeKutta(method, tableau, gradient=gradient, **settings)
    if method in TABLEAUS and gradient != "adjoint":
        return RungeKutta(method, gradient=gradient, **settings)
    # torchdiffeq creates tensors at its import. They must be on the CPU, but `load` builds flows on the meta device
    with torch.device("cpu"):
        from flowtrain.ode.torchdiffeq_engine import Torchdiffeq

    return Torchdiffeq(method, gradient=gradient, **settings)
