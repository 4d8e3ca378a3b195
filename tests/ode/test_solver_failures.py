"""Invalid settings are refused, and failed solves name the time, the step size and what to try."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.equations import Wave
from torch import Tensor, nn

from flowtrain.ode import Problem, SolveOptions, ode_solver
from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.torchdiffeq_engine import Torchdiffeq, warn_of_corrector, warn_of_fehlberg2
from flowtrain.utils.errors import ConfigError, SolverError


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
def test_invalid_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ode_solver(**settings)


@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
@pytest.mark.parametrize("final", [False, True])
def test_tolerance_below_rounding_error_is_refused(engine: Any, final: bool) -> None:
    """In training the final tolerance is checked too, because solves would fail once the warm-up has reached it."""
    solver = engine("dopri5", rtol=1e-14, warmup=100)
    problem = Problem(cubic, None, torch.ones(1, 1, dtype=torch.float32), 0.0, 1.0)
    rtol, atol = solver.tolerance_at(100 if final else 0)
    with pytest.raises(ConfigError, match=r"1e-14.*float32"):
        solver.solve(problem, SolveOptions(rtol=rtol, atol=atol))
    in_double = replace(problem, x=problem.x.double())
    torch.testing.assert_close(solver.solve(in_double).x, in_double.x)
    for enough in ({"atol": 1e-6}, {"train_rtol": 1e-4}):
        loose = engine("dopri5", rtol=1e-14, **enough)
        rtol, atol = loose.tolerance_at(0)
        solved = loose.solve(problem, SolveOptions(rtol=rtol, atol=atol))
        torch.testing.assert_close(solved.x, problem.x, rtol=0, atol=1e-3)


def test_fehlberg2_accuracy_warning_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The errors of fehlberg2 exceed the tolerance by a factor that does not depend on the tolerance. Other methods do
    not exceed it."""
    warn_of_fehlberg2.cache_clear()
    wave, x = Wave(), torch.randn(20, 2)
    for _ in range(2):
        solver = ode_solver("fehlberg2", rtol=1e-4)
        error = (solver.solve(wave.problem(x)).x - x * wave.growth(0, 1)).abs().max()
        assert 10e-4 < error < 500e-4
    assert caplog.text.count("fehlberg2") == 1
    for method in ("bosh3", "adaptive_heun"):
        solved = ode_solver(method, rtol=1e-4).solve(wave.problem(x))
        assert (solved.x - x * wave.growth(0, 1)).abs().max() < 10e-4


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("method", ["implicit_adams", "fixed_adams"])
def test_non_converging_corrector_is_logged(method: str, gradient: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_corrector.cache_clear()
    problem = Problem(lambda t, x: -20 * x, None, torch.ones(1, 1, requires_grad=True), 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ode_solver(method, steps=10, gradient=gradient).solve(problem).x.sum().backward()
    assert caplog.text.count("solver.step_size") == 1


def cubic(t: Tensor, x: Tensor) -> Tensor:
    """dx/dt = 3 t^2 - 2 t, so x(1) = x(0)."""
    return (3 * t**2 - 2 * t) * torch.ones_like(x)


def explode(t: Tensor, x: Tensor) -> Tensor:
    """x' = x^2 from x = 2 is infinite at t = 1/2."""
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
def test_solver_error_message_names_time_and_remedy(
    engine: Any, field: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(SolverError, match=words) as caught:
        engine("dopri5", **settings).solve(Problem(field, None, 2 * torch.ones(1, 1), 0.0, 1.0))
    message = str(caught.value)
    for part in ("dopri5", "t=", "step size", "rtol=", "Try" if "Try" in message else "try"):
        assert part in message
    assert "\n" not in message


def test_failed_adjoint_solve_raises_a_solver_error() -> None:
    """v = sqrt|x| has an infinite Jacobian at 0, so the forward solve succeeds and the adjoint solve fails."""

    class Root(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    x = torch.zeros(1, 1, requires_grad=True)
    solution = ode_solver("dopri5", gradient="adjoint").solve(Problem(Root(), None, x, 0.0, 1.0))
    with pytest.raises(SolverError, match=r"NaN or infinite|underflow"):
        solution.x.sum().backward()


def test_assertion_error_in_a_field_is_not_a_solver_failure() -> None:
    def field(t: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("the user's own")

    with pytest.raises(AssertionError, match="the user's own"):
        Torchdiffeq("dopri5").solve(Problem(field, None, torch.ones(1, 1), 0.0, 1.0))


@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
def test_diverging_fixed_steps_raise_a_solver_error(engine: Any) -> None:
    with pytest.raises(SolverError, match="NaN or infinite"):
        engine("euler", step_size=0.01).solve(Problem(explode, None, 1e30 * torch.ones(1, 1), 0.0, 1.0))
