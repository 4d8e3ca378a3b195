"""Solvers agree with closed forms, with each other, and with finite differences."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.equations import ADAPTIVE, Wave
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from flowtrain.ode import TORCHDIFFEQ_METHODS, Problem, Solver, ode_solver
from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.tableaus import TABLEAUS
from flowtrain.ode.torchdiffeq_engine import METHODS, Torchdiffeq
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir

CONFIGS = sorted(p.stem for p in (config_dir() / "solver").glob("*.yaml"))
FIXED = [name for name, tableau in TABLEAUS.items() if tableau.e is None]


def make(name: str, **settings: Any) -> Solver:
    """Returns the solver of a config file, with a step size if it needs one."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", [f"solver={name}"]).solver)
    assert isinstance(config, dict)
    keys = {str(k): v for k, v in config.items() if k not in ("_target_", "name")}
    try:
        return ode_solver(**{**keys, **settings})
    except ConfigError:
        return ode_solver(**{**keys, "step_size": 0.01, **settings})


def test_every_torchdiffeq_method_has_a_config() -> None:
    assert set(CONFIGS) == {*METHODS, *TABLEAUS}
    assert set(TORCHDIFFEQ_METHODS) == set(METHODS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)])
def test_every_config_solves_forward_and_backward(name: str, t0: float, t1: float) -> None:
    wave, x = Wave(), torch.randn(5, 3)
    with torch.no_grad():
        solution = make(name).solve(wave.problem(x, t0, t1))
    expected = wave.growth(t0, t1)
    tolerance = 2e-2 if name == "euler" else 1e-3
    torch.testing.assert_close(solution.x, x * expected, rtol=tolerance, atol=tolerance)
    assert solution.integrals is not None
    torch.testing.assert_close(
        solution.integrals, 3 * expected.log().expand(5, 1), rtol=3 * tolerance, atol=3 * tolerance
    )
    assert solution.statistics.nfe_forward > 0


@pytest.mark.parametrize("name", FIXED)
def test_order_of_convergence(name: str) -> None:
    wave, x, errors = Wave(), torch.ones(1, 1), []
    for n in (40, 80):
        solution = ode_solver(name, step_size=0.6 / n).solve(wave.problem(x, 0.0, 0.6))
        assert solution.statistics.accepted == n
        assert solution.integrals is not None
        exact = wave.growth(0, 0.6)
        errors.append([(solution.x - exact).abs().item(), (solution.integrals - exact.log()).abs().item()])
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) == pytest.approx(TABLEAUS[name].order, abs=0.35)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_order_of_convergence_of_the_adaptive_methods(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adaptive tableaus reach their order with fixed steps, on an equation that is nonlinear in x."""
    monkeypatch.setitem(TABLEAUS, "fixed", dataclasses.replace(TABLEAUS[name], e=None))

    def field(t: Tensor, x: Tensor) -> Tensor:
        return x * x * torch.cos(t)

    errors = []
    for n in (4, 8):
        x = RungeKutta("fixed", step_size=1 / n).solve(Problem(field, None, torch.full((1, 1), 0.5), 0.0, 1.0)).x
        errors.append(abs(x.item() - 1 / (2 - math.sin(1))))
    # only a lower bound is tested, because fifth-order errors change sign near these steps and fall faster
    assert math.log2(errors[0] / errors[1]) > TABLEAUS[name].order - 0.3


@pytest.mark.parametrize("name", list(TABLEAUS))
def test_tableaus_satisfy_the_order_conditions(name: str) -> None:
    """Checks row sums and the order conditions of quadrature: sum b c^k = 1 / (k + 1) for k < order."""
    tableau = TABLEAUS[name]
    b, c = torch.tensor(tableau.b), torch.tensor(tableau.c)
    for row, time in zip(tableau.a, tableau.c[1:], strict=True):
        assert sum(row) == pytest.approx(time, abs=1e-14)
    for k in range(tableau.order):
        assert (b * c**k).sum().item() == pytest.approx(1 / (k + 1), abs=1e-14)
    if tableau.e is not None:
        e = torch.tensor(tableau.e)
        for k in range(tableau.order - 1):
            assert (e * c**k).sum().item() == pytest.approx(0, abs=1e-13)
        assert abs((e * c ** (tableau.order - 1)).sum().item()) > 1e-6


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("control", ["state", "all"])
def test_error_follows_the_tolerance(name: str, control: str) -> None:
    wave, x = Wave(), torch.randn(20, 2)
    for rtol in (1e-4, 1e-6, 1e-8):
        solution = ode_solver(name, rtol=rtol, control=control).solve(wave.problem(x))
        assert solution.integrals is not None
        assert (solution.x - x * wave.growth(0, 1)).abs().max() < 20 * rtol
        assert (solution.integrals - 2 * wave.growth(0, 1).log()).abs().max() < 20 * rtol


def nonlinear() -> nn.Module:
    torch.manual_seed(1)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            y: Tensor = self.net(torch.cat([x, t.expand(x.shape[:-1]).unsqueeze(-1)], -1))
            return 3 * y

    return Field()


def loss_of(solver: Solver, field: nn.Module, x: Tensor) -> Tensor:
    def integrand(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        v = field(t, y)
        return v, v.square().sum(-1, keepdim=True)

    solution = solver.solve(Problem(field, integrand, x, 1.0, 0.0, tuple(field.parameters())))
    assert solution.integrals is not None
    return (solution.x.square().sum(1) + solution.integrals[:, 0]).mean()


@pytest.mark.parametrize(
    "solver",
    [
        RungeKutta("dopri5", rtol=1e-9),
        RungeKutta("tsit5", rtol=1e-9, control="all"),
        RungeKutta("rk4", step_size=0.01),
        Torchdiffeq("dopri5", rtol=1e-9),
        Torchdiffeq("dopri5", rtol=1e-9, gradient="adjoint"),
        Torchdiffeq("tsit5", rtol=1e-9, gradient="adjoint"),
        Torchdiffeq("rk4", step_size=0.01, gradient="adjoint"),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.method}-{s.gradient}",
)
def test_engines_agree_in_value_and_gradient(solver: Solver) -> None:
    field, x = nonlinear(), torch.randn(7, 2, requires_grad=True)
    inputs = [x, *field.parameters()]
    reference = loss_of(Torchdiffeq("dopri8", rtol=1e-11), field, x)
    expected = torch.autograd.grad(reference, inputs)
    loss = loss_of(solver, field, x)
    torch.testing.assert_close(loss, reference, rtol=1e-7, atol=1e-7)
    for a, b in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"method": "rk4", "step_size": 0.25}, {"method": "euler", "step_size": 0.5}])
def test_direct_gradient_matches_finite_differences_of_the_solution(settings: dict[str, Any]) -> None:
    """On such coarse steps the adjoint's gradient would be inaccurate. Finite differences use the discrete solution."""
    field, x, solver = nonlinear(), torch.randn(4, 2), ode_solver(**settings)
    weight = next(field.parameters())
    (grad,) = torch.autograd.grad(loss_of(solver, field, x), weight)
    step = 1e-6
    for index in [(0, 0), (5, 2), (11, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
                values.append(loss_of(solver, field, x))
                weight[index] -= sign * step
        assert grad[index].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_both_engines_end_exactly_at_the_final_time(method: str) -> None:
    """Stepping past t1 and interpolating back would add an error far above the tolerance."""
    wave, x = Wave(), torch.randn(50, 2)
    for rtol in (1e-3, 1e-5):
        solution = Torchdiffeq(method, rtol=rtol).solve(wave.problem(x))
        assert (solution.x - x * wave.growth(0, 1)).abs().max() < 5 * rtol


def test_path_integral_equals_the_augmented_solve() -> None:
    """Quadrature on the nodes equals integrating the integrand as part of the state."""
    field, x = nonlinear(), torch.randn(3, 2)

    def integrand(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        v = field(t, y)
        return v, v.square().sum(-1, keepdim=True)

    def augmented(t: Tensor, y: Tensor) -> Tensor:
        v, q = integrand(t, y[:, :2])
        return torch.cat([v, q], 1)

    solver = ode_solver("rk4", step_size=0.2)
    nodes = solver.solve(Problem(field, integrand, x, 0.0, 1.0))
    whole = solver.solve(Problem(augmented, None, torch.cat([x, torch.zeros(3, 1)], 1), 0.0, 1.0)).x
    assert nodes.integrals is not None
    torch.testing.assert_close(torch.cat([nodes.x, nodes.integrals], 1), whole, rtol=1e-12, atol=1e-12)
