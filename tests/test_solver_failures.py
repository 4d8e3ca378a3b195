"""Settings that are refused, and solves that fail with a message that says where and what to try."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowtrain.errors import ConfigError, SolverError
from flowtrain.solvers import Problem, ode_solver
from flowtrain.solvers.runge_kutta import RungeKutta
from flowtrain.solvers.torchdiffeq_engine import Torchdiffeq


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "rk4"}, "solver.step_size"),
        ({"method": "rk5"}, "dopri5"),
        ({"method": "dopri5", "step_size": 0.1}, "chooses its own"),
        ({"method": "dopri5", "rtol": 0.0}, "solver.rtol"),
        ({"method": "dopri5", "rtol": "tight"}, "solver.rtol"),
        ({"method": "dopri5", "atol": -1.0}, "solver.atol"),
        ({"method": "dopri5", "gradient": "magic"}, "adjoint"),
        ({"method": "dopri5", "control": "none"}, "state"),
        ({"method": "dopri5", "max_nfe": 0}, "max_nfe"),
    ],
)
def test_settings_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ode_solver(**settings)


def explode(t: Tensor, x: Tensor) -> Tensor:
    """x' = x^2 from 2 is infinite at t = 1/2."""
    return x * x


def broken(t: Tensor, x: Tensor) -> Tensor:
    return torch.where(t > 0.3, torch.nan, 1.0) * torch.ones_like(x)


def stiff(t: Tensor, x: Tensor) -> Tensor:
    return -2000 * (x - torch.cos(t))


@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
@pytest.mark.parametrize(
    ("field", "settings", "words"),
    [
        (explode, {}, "underflow"),
        (broken, {}, "NaN or infinite"),
        (stiff, {"max_nfe": 50}, "max_nfe=50"),
    ],
)
def test_failures_say_where_and_what_to_try(engine: Any, field: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SolverError, match=words) as caught:
        engine("dopri5", **settings).solve(Problem(field, None, 2 * torch.ones(1, 1), 0.0, 1.0))
    message = str(caught.value)
    for part in ("dopri5", "t=", "step size", "rtol=", "Try" if "Try" in message else "try"):
        assert part in message
    assert "\n" not in message


def test_a_failing_adjoint_solve_is_explained() -> None:
    """v = sqrt|x| stands still at 0, where its Jacobian is infinite: forward all is well, backward nothing is."""

    class Root(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    x = torch.zeros(1, 1, requires_grad=True)
    solution = ode_solver("dopri5", gradient="adjoint").solve(Problem(Root(), None, x, 0.0, 1.0))
    with pytest.raises(SolverError, match=r"NaN or infinite|underflow"):
        solution.x.sum().backward()


def test_an_assertion_in_a_users_field_is_not_taken_for_a_solver_failure() -> None:
    def field(t: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("the user's own")

    with pytest.raises(AssertionError, match="the user's own"):
        Torchdiffeq("dopri5").solve(Problem(field, None, torch.ones(1, 1), 0.0, 1.0))


@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
def test_fixed_steps_that_diverge_are_an_error(engine: Any) -> None:
    with pytest.raises(SolverError, match="NaN or infinite"):
        engine("euler", step_size=0.01).solve(Problem(explode, None, 1e30 * torch.ones(1, 1), 0.0, 1.0))
