"""Every bijection through one test: shapes, round trip, log-determinant against the autograd Jacobian in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.permutation import Permutation
from flowtrain.bijections.scale import ActNorm, Standardize
from flowtrain.divergence import TraceRule
from flowtrain.errors import DataError
from flowtrain.fields.mlp import MLPField
from flowtrain.models.realnvp import realnvp
from flowtrain.solvers import Problem, Solution, Solver, Statistics, ode_solver, record_solves


def perturbed(module: Bijection, std: float = 0.4) -> Bijection:
    """With random parameters: at its start a bijection may be the identity, which hides mistakes."""
    for p in module.parameters():
        with torch.no_grad():
            p.add_(std * torch.randn_like(p))
    return module


def standardize(d: int) -> Bijection:
    bijection = Standardize(d)
    bijection.fit(torch.randn(d), torch.rand(d) + 0.5)
    return bijection


def continuous(d: int, solver: Solver | None = None, **rule: object) -> Continuous:
    field = MLPField(d, [8, 8], "concatsquash", "tanh")
    perturbed(field, 0.5)  # type: ignore[arg-type]
    return Continuous(field, solver or ode_solver("dopri5", rtol=1e-9), TraceRule(**rule))  # type: ignore[arg-type]


def stack(d: int, **arguments: object) -> Bijection:
    return perturbed(realnvp((d,), layers=3, hidden=(8,), **arguments).bijection)  # type: ignore[arg-type]


BIJECTIONS: dict[str, Callable[[int], Bijection]] = {
    "affine": lambda d: perturbed(Affine(d)),
    "actnorm": lambda d: perturbed(ActNorm(d)),
    "standardize": standardize,
    "permutation": lambda d: Permutation(torch.randperm(d)),
    "realnvp alternate": lambda d: stack(d),
    "realnvp permutation": lambda d: stack(d, mixing="permutation", actnorm=False),
    "continuous dopri5": continuous,
    "continuous rk4": lambda d: continuous(d, ode_solver("rk4", step_size=0.02)),
    "continuous dopri8": lambda d: continuous(d, ode_solver("dopri8", rtol=1e-10)),
    "continuous torchdiffeq": lambda d: continuous(d, ode_solver("dopri5", "adjoint", rtol=1e-10)),
    "chain": lambda d: Chain([perturbed(Affine(d)), continuous(d), standardize(d)]),
}


@pytest.mark.parametrize("name", list(BIJECTIONS))
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_bijection(name: str, d: int, training: bool) -> None:
    if d == 1 and "realnvp" in name:
        pytest.skip("couplings need two halves")
    bijection = BIJECTIONS[name](d).train(training)
    z = torch.randn(4, d)
    x, log_det = bijection.forward(z)
    back, back_log_det = bijection.inverse(x)
    assert x.shape == z.shape
    assert log_det.shape == back_log_det.shape == (4,)
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bijection.map_forward(z), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bijection.map_inverse(x), back, rtol=1e-6, atol=1e-6)
    assert x.sub(z).abs().max() > 1e-3 or name == "permutation"

    def one(y: Tensor) -> Tensor:
        return bijection.forward(y.unsqueeze(0))[0].squeeze(0)

    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(one, z[i])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[i], rtol=1e-6, atol=1e-6)


class LinearField(nn.Module):
    """v = A x: the flow is expm(A) and its log-determinant is tr A, whatever x."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


@pytest.mark.parametrize(
    "solver", [ode_solver("dopri5", rtol=1e-9), ode_solver("dopri5", rtol=1e-9, gradient="adjoint")]
)
def test_linear_field_has_the_closed_form_and_its_sign(solver: Solver) -> None:
    """Fails when the sign of the trace, or the direction of time, is wrong."""
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
    """Noise per evaluation, the classic mistake, makes an adaptive solver reject for ever: its NFE gives it away."""
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


def test_evaluation_controls_the_log_det_whatever_training_does() -> None:
    seen: list[str] = []

    class Spy(Solver):
        def _solve(self, problem: Problem, statistics: Statistics) -> Solution:
            seen.append(self.control)
            return Solution(problem.x, torch.zeros(len(problem.x), 1))

    flow = continuous(2, Spy("spy", adaptive=True, control="state"))
    flow.train().inverse(torch.randn(2, 2))
    flow.eval().inverse(torch.randn(2, 2))
    assert seen == ["state", "all"]


def test_permutation_and_masks_are_saved() -> None:
    """Fails when a permutation is not a buffer: the flow then loads with another one drawn afresh."""
    torch.manual_seed(1)
    trained = perturbed(realnvp((9,), mixing="permutation").bijection)
    torch.manual_seed(2)
    loaded = realnvp((9,), mixing="permutation").bijection
    x = torch.randn(5, 9)
    assert not torch.allclose(loaded.inverse(x)[0], trained.inverse(x)[0])
    loaded.load_state_dict(trained.state_dict())
    torch.testing.assert_close(loaded.inverse(x), trained.inverse(x), rtol=0, atol=0)


def test_actnorm_initialization_standardizes_the_base_side() -> None:
    x = 3 * torch.randn(5000, 4) + torch.arange(4)
    bijection = perturbed(Chain([ActNorm(4), Permutation(torch.randperm(4)), Affine(4)]))
    bijection.initialize(x)
    z = bijection.map_inverse(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-9, rtol=0)


def test_affine_initialization_is_the_maximum_likelihood_gaussian() -> None:
    x = torch.randn(400, 3) @ torch.randn(3, 3) + 5
    bijection = Affine(3)
    bijection.initialize(x)
    factor = bijection.factor()
    torch.testing.assert_close(factor @ factor.T, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-4)
    z, log_det = bijection.inverse(x)
    standard = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    gaussian = torch.distributions.MultivariateNormal(bijection.mean, scale_tril=factor)
    torch.testing.assert_close(standard.log_prob(z) + log_det, gaussian.log_prob(x))


def test_affine_initialization_survives_columns_that_depend_on_each_other() -> None:
    x = torch.randn(100, 1).expand(100, 3)
    bijection = Affine(3)
    bijection.initialize(x)
    assert torch.isfinite(bijection.inverse(x)[0]).all()


def test_standardize_refuses_a_constant_column() -> None:
    with pytest.raises(DataError, match=r"\[1\]"):
        Standardize(2).fit(torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_coupling_scale_is_bounded() -> None:
    coupling = next(iter(realnvp((2,), layers=1, actnorm=False, cap=1.5).bijection))  # type: ignore[call-overload]
    with torch.no_grad():
        for p in coupling.parameters():
            p.mul_(0).add_(50.0)
    assert coupling.forward(torch.randn(10, 2))[1].abs().max() <= 1.5
