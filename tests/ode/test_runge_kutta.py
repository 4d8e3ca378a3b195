"""The steps of a solve: their number, their choice, their counts, and where they end."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.equations import Wave, random_field
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import Problem, SolveOptions, Solver, StepPlan, ode_solver, record_solves
from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.torchdiffeq_engine import Torchdiffeq


def test_solve_reuses_the_steps_of_the_previous_solve() -> None:
    torch.manual_seed(1)
    field, x = random_field(), torch.randn(200, 2)
    flow = Continuous(field, ode_solver("dopri5"), TraceRule("exact"))
    nfe = []
    for _ in range(3):
        with record_solves() as solves:
            flow.inverse(x)
        nfe.append(solves[0].nfe_forward)
    assert nfe[2] <= nfe[1] < nfe[0]
    assert not flow.step_plans[True].steps


def test_evaluation_does_not_depend_on_previous_solves() -> None:
    field, x = random_field(), torch.randn(50, 2)
    flow = Continuous(field, ode_solver("dopri5"), TraceRule("exact")).eval()
    before = flow.inverse(x)[1]
    flow.train().inverse(10 * x)
    assert flow.step_plans[False].steps
    assert torch.equal(flow.eval().inverse(x)[1], before)


def test_planned_step_is_rejected_when_its_error_exceeds_the_tolerance() -> None:
    field, x = random_field(std=1.5), torch.randn(50, 2)
    problem = Problem(field, None, x, 0.0, 1.0, step_plan=StepPlan(((1.0, 1.0),)))
    with record_solves() as solves, torch.no_grad():
        far = ode_solver("dopri5").solve(problem).x
    assert solves[0].rejected
    near = ode_solver("dopri5", rtol=1e-9).solve(Problem(field, None, x, 0.0, 1.0)).x
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


def linear(a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: x @ a


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (3, 1, 2, 2)])
def test_states_of_unusual_shapes_are_solved(method: str, shape: tuple[int, ...]) -> None:
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    x = torch.randn(shape, requires_grad=True)
    solution = ode_solver(method, rtol=1e-8).solve(Problem(linear(a), None, x, 0.0, 1.0))
    expected = x @ torch.linalg.matrix_exp(a)
    torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(solution.x.square().sum(), x)[0], torch.autograd.grad(expected.square().sum(), x)[0]
    )


def test_statistics_count_steps_and_evaluations() -> None:
    wave, x = Wave(), torch.randn(3, 2)
    with record_solves() as solves:
        ode_solver("dopri5").solve(wave.problem(x))
        adjoint = ode_solver("dopri5", gradient="adjoint")
        solution = adjoint.solve(wave.problem(x))
        solution.x.sum().backward()
    direct, backwards = solves
    # two evaluations choose the first step, and the last stage of each step is the first stage of the next
    assert direct.nfe_forward == 2 + 6 * (direct.accepted + direct.rejected)
    assert direct.nfe_backward == 0
    assert backwards.nfe_forward > 0
    assert backwards.accepted > 0
    assert backwards.nfe_backward > 0


def test_rejected_steps_are_counted() -> None:
    class Kink(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return x * torch.where(t < 0.5, 0.0, 60.0) * (t - 0.5)

    solution = ode_solver("dopri5", rtol=1e-6).solve(Problem(Kink(), None, torch.ones(1, 1), 0.0, 1.0))
    assert solution.statistics.rejected > 0
    assert solution.x.item() == pytest.approx(math.exp(60 * 0.125), rel=1e-4)


@pytest.mark.parametrize("step_size", [0.1, 0.3, 1 / 3, 5.0])
@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
def test_fixed_steps_end_exactly_at_the_final_time(engine: type[Solver], step_size: float) -> None:
    times: list[float] = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        times.append(float(t))
        return torch.ones_like(x)

    solver = engine("euler", step_size=step_size)  # type: ignore[call-arg,arg-type]
    x = solver.solve(Problem(field, None, torch.zeros(1, 1, dtype=torch.float32), 0.0, 1.0)).x
    assert x.item() == pytest.approx(1, abs=1e-6)
    assert len(times) == max(1, math.ceil(1 / step_size - 1e-9))


@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_error_control_of_integrals_is_optional(engine: Any, method: str) -> None:
    """An integrand much rougher than the state costs steps only if its error is controlled too."""

    def integrand(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v = -x
        return v, (30 * torch.sin(40 * t)).expand(x.shape[:-1]).unsqueeze(-1)

    problem = Problem(lambda t, x: -x, integrand, torch.ones(2, 1), 0.0, 1.0)
    state, everything = (engine(method, control=c).solve(problem) for c in ("state", "all"))
    assert everything.statistics.accepted > 2 * state.statistics.accepted
    exact = 30 * (1 - math.cos(40)) / 40
    assert everything.integrals is not None
    assert everything.integrals[0, 0].item() == pytest.approx(exact, abs=1e-3)


def test_warmup_is_geometric_and_ends() -> None:
    solver = ode_solver("dopri5", rtol=1e-5, atol=1e-7, warmup=100, warmup_rtol=1e-1)
    assert solver.tolerance_at(0) == pytest.approx((1e-1, 1e-3))
    assert solver.tolerance_at(50) == pytest.approx((1e-3, 1e-5))
    assert solver.tolerance_at(100) == solver.tolerance_at(10_000) == (1e-5, 1e-7)
    assert ode_solver("dopri5", rtol=1e-4).atol == 1e-4
    assert ode_solver("dopri5", rtol=1e-2, warmup=9, warmup_rtol=1e-3).tolerance_at(0) == (1e-2, 1e-2)
    assert ode_solver("dopri5", warmup=None).tolerance_at(0) == (1e-5, 1e-5)
    assert ode_solver("rk4", step_size=0.1, warmup=None).warmup == 0


def test_options_of_a_solve_leave_the_solver_unchanged() -> None:
    solver = ode_solver("dopri5")
    x = torch.ones(1, 1)
    problem = Problem(lambda t, y: torch.cos(20 * t) * y, None, x, 0.0, 1.0)
    fine, coarse = solver.solve(problem), solver.solve(problem, SolveOptions(rtol=1e-1, atol=1e-1))
    assert coarse.statistics.nfe_forward < fine.statistics.nfe_forward
    assert (solver.rtol, solver.atol) == (1e-5, 1e-5)
    assert solver.replace(rtol=1e-2, control="all").control == "all"
    assert (solver.rtol, solver.control) == (1e-5, "state")
    with pytest.raises(TypeError, match="nonsense"):
        solver.replace(nonsense=1)
