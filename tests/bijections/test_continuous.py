"""The log-determinant of continuous flows: its sign, and the noise of its estimate."""

import pytest
import torch
from helpers.flows import continuous
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import Problem, Solution, Solver, Statistics, ode_solver, record_solves


class LinearField(nn.Module):
    """v = A x, whose flow is expm(A) and whose log-determinant is tr A for any x."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


@pytest.mark.parametrize(
    "solver", [ode_solver("dopri5", rtol=1e-9), ode_solver("dopri5", rtol=1e-9, gradient="adjoint")]
)
def test_linear_field_has_the_closed_form_and_its_sign(solver: Solver) -> None:
    """Detects a wrong sign of the trace and a wrong direction of time."""
    a = torch.tensor([[0.7, -0.4], [1.1, 0.5]])
    flow = Continuous(LinearField(a), solver, TraceRule())
    z = torch.randn(3, 2)
    x, log_det = flow.forward(z)
    torch.testing.assert_close(x, z @ torch.linalg.matrix_exp(a).T)
    torch.testing.assert_close(log_det, torch.full((3,), 1.2))
    torch.testing.assert_close(flow.inverse(x)[1], torch.full((3,), -1.2))
    # d log_det / dA is the identity
    (grad,) = torch.autograd.grad(flow.forward(z)[1].mean(), flow.field.a)
    torch.testing.assert_close(grad, torch.eye(2))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("engine", ["dopri5", "dopri8"])
def test_noise_is_drawn_once_for_a_solve(noise: str, engine: str) -> None:
    """With new noise for each evaluation, an adaptive solver would reject steps endlessly, which its NFE shows."""
    exact, estimated = (
        continuous(6, ode_solver(engine, rtol=1e-7, max_nfe=2000), train=rule, noise=noise).train()
        for rule in ("exact", "hutchinson")
    )
    estimated.load_state_dict(exact.state_dict())
    drawn = []
    original = TraceRule.draw
    spent = []

    def counted(self: TraceRule, x: Tensor, training: bool) -> object:
        drawn.append(training)
        return original(self, x, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraceRule, "draw", counted)
        for flow in (exact, estimated):
            flow.solver.control = "all"
            with record_solves() as solves:
                flow.inverse(torch.randn(16, 6))
            spent.append(solves[0].nfe_forward)
    assert len(drawn) == 2
    assert spent[1] <= 2 * spent[0]


def test_hutchinson_log_det_is_unbiased_over_solves() -> None:
    flow = continuous(5, ode_solver("dopri5", rtol=1e-6), evaluate="hutchinson").eval()
    x = torch.randn(1, 5)
    exact = Continuous(flow.field, flow.solver, TraceRule()).eval().inverse(x)[1]
    with torch.no_grad():
        estimates = flow.inverse(x.expand(4000, 5))[1]
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 4000**0.5
    assert estimates.std() > 0.01


def test_more_noise_samples_lower_the_variance() -> None:
    x = torch.randn(1, 5).expand(2000, 5)
    one = continuous(5, ode_solver("dopri5", rtol=1e-5), evaluate="hutchinson").eval()
    eight = Continuous(one.field, one.solver, TraceRule(evaluate="hutchinson", noise_samples=8)).eval()
    with torch.no_grad():
        ratio = one.inverse(x)[1].var() / eight.inverse(x)[1].var()
    assert 6 < ratio < 11


def test_evaluation_controls_the_error_of_the_log_det() -> None:
    seen: list[str] = []

    class Spy(Solver):
        def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
            seen.append(self.control)
            return Solution(problem.x, torch.zeros(len(problem.x), 1))

    flow = continuous(2, Spy("spy", adaptive=True, control="state"))
    flow.train().inverse(torch.randn(2, 2))
    flow.eval().inverse(torch.randn(2, 2))
    assert seen == ["state", "all"]
