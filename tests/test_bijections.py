"""Every bijection through one test: shapes, round trip, log-determinant against the autograd Jacobian in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.coupling import CheckerboardCoupling, HalfCoupling
from flowtrain.bijections.linear import InvertibleLinear
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.permutation import Permutation
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.bijections.squeeze import OnHalf, Squeezed
from flowtrain.conditioners.conv import ConvNet
from flowtrain.divergence import TraceRule
from flowtrain.errors import DataError
from flowtrain.fields.mlp import MLPField
from flowtrain.models.ffjord import ffjord
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.solvers import Problem, Solution, Solver, Statistics, ode_solver, record_solves


def perturbed(module: Bijection, std: float = 0.4) -> Bijection:
    """With random parameters: at its start a bijection may be the identity, which hides mistakes."""
    for p in module.parameters():
        with torch.no_grad():
            p.add_(std * torch.randn_like(p))
    return module


def standardize(d: int) -> Bijection:
    bijection = Standardize((d,))
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
    "batchnorm": lambda d: settled(BatchNorm(d), (d,)),
    "linear": lambda d: perturbed(InvertibleLinear(d), 0.1),
    "logit": lambda d: Logit(17, 0.05),
    "realnvp alternate": lambda d: stack(d),
    "realnvp permutation": lambda d: stack(d, mixing="permutation", actnorm=False),
    "realnvp batchnorm": lambda d: settled(stack(d, batch_norm=True), (d,)),
    "glow": lambda d: perturbed(glow((d,), steps=2, hidden=(8,)).bijection, 0.1),
    "continuous dopri5": continuous,
    "continuous rk4": lambda d: continuous(d, ode_solver("rk4", step_size=0.02)),
    "continuous dopri8": lambda d: continuous(d, ode_solver("dopri8", rtol=1e-10)),
    "continuous torchdiffeq": lambda d: continuous(d, ode_solver("dopri5", "adjoint", rtol=1e-9)),
    "chain": lambda d: Chain([perturbed(Affine(d)), continuous(d), standardize(d)]),
}


def settled(bijection: Bijection, event_shape: tuple[int, ...]) -> Bijection:
    """Initialised, and in evaluation mode for good: a batch norm in training is a map of batches, not of rows."""
    bijection.initialize(3 * torch.randn(64, *event_shape) + 1)
    bijection.eval()
    bijection.train = lambda mode=True: bijection  # type: ignore[method-assign]
    return bijection


def net(n_in: int, n_out: int) -> nn.Module:
    return ConvNet(n_in, [6], n_out, "tanh")


IMAGES: dict[str, tuple[Callable[[int, int, int], Bijection], list[tuple[int, int, int]]]] = {
    "affine": (lambda c, h, w: perturbed(Affine(c * h * w)), [(2, 2, 3)]),
    "actnorm of channels": (lambda c, h, w: perturbed(ActNorm(c)), [(3, 2, 3)]),
    "actnorm of pixels": (lambda c, h, w: perturbed(ActNorm((c, h, w))), [(3, 2, 3)]),
    "batchnorm": (lambda c, h, w: settled(BatchNorm(c), (c, h, w)), [(3, 2, 3)]),
    "permutation": (lambda c, h, w: Permutation(torch.randperm(c)), [(4, 2, 3)]),
    "linear": (lambda c, h, w: perturbed(InvertibleLinear(c), 0.1), [(1, 3, 2), (4, 2, 3)]),
    "logit": (lambda c, h, w: Logit(256, 1e-2), [(1, 3, 2)]),
    "squeezed": (lambda c, h, w: Squeezed(perturbed(ActNorm(4 * c))), [(1, 2, 4), (2, 4, 2)]),
    "on half": (lambda c, h, w: OnHalf(perturbed(Affine(c // 2 * h * w))), [(2, 2, 3), (4, 3, 1)]),
    "half": (lambda c, h, w: perturbed(HalfCoupling(c, False, net((c + 1) // 2, c // 2 * 2))), [(2, 3, 4), (3, 3, 2)]),
    "half, swapped": (
        lambda c, h, w: perturbed(HalfCoupling(c, True, net(c // 2, (c + 1) // 2 * 2))),
        [(2, 3, 4), (3, 3, 2)],
    ),
    "checkerboard": (
        lambda c, h, w: perturbed(CheckerboardCoupling((h, w), False, net(c, 2 * c))),
        [(1, 3, 3), (2, 3, 2), (1, 1, 5)],
    ),
    "checkerboard, swapped": (
        lambda c, h, w: perturbed(CheckerboardCoupling((h, w), True, net(c, 2 * c))),
        [(1, 3, 3), (2, 1, 2)],
    ),
    "realnvp": (
        lambda c, h, w: perturbed(realnvp((c, h, w), layers=2, hidden=(6,), positions=True).bijection, 0.2),
        [(1, 4, 4), (1, 3, 5), (2, 2, 4), (1, 8, 8)],
    ),
    "realnvp batchnorm": (
        lambda c, h, w: settled(
            perturbed(realnvp((c, h, w), layers=2, hidden=(6,), batch_norm=True, scales=(h + 1) % 2).bijection, 0.2),
            (c, h, w),
        ),
        [(1, 4, 4), (1, 3, 5)],
    ),
    "glow": (
        lambda c, h, w: perturbed(
            glow((c, h, w), steps=2, hidden=(6, 6), scales=2 if h > 2 else 0, positions=True).bijection, 0.1
        ),
        [(1, 4, 8), (2, 2, 3)],
    ),
    "ffjord": (
        lambda c, h, w: perturbed(
            ffjord(
                (c, h, w),
                solver=ode_solver("dopri5", rtol=1e-9),
                hidden=(6,),
                scales=1 if h % 2 == 0 else 0,
                actnorm=True,
                positions=True,
                trace="exact",
            ).bijection,
            0.1,
        ),
        [(1, 2, 4), (2, 3, 1)],
    ),
}
IMAGE_CASES = [(name, shape) for name, (_, shapes) in IMAGES.items() for shape in shapes]


@pytest.mark.parametrize(("name", "shape"), IMAGE_CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_bijection_of_images(name: str, shape: tuple[int, int, int], training: bool) -> None:
    bijection = IMAGES[name][0](*shape).train(training)
    check(bijection, torch.randn(2, *shape), moves=name != "permutation")


LABELLED = {
    "realnvp": lambda shape, **rest: realnvp(shape, layers=2, hidden=(6,), **rest),
    "glow": lambda shape, **rest: glow(shape, steps=2, hidden=(6,), **rest),
    "ffjord": lambda shape, **rest: ffjord(
        shape, solver=ode_solver("dopri5", rtol=1e-9), hidden=(6,), trace="exact", **rest
    ),
}


@pytest.mark.parametrize("model", list(LABELLED))
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_conditional_bijection_is_one_for_each_label(model: str, shape: tuple[int, ...], training: bool) -> None:
    scales = {"scales": 1} if shape == (1, 2, 2) else {}
    flow = LABELLED[model](shape, conditional=True, classes=3, positions=True, **scales)
    bijection = perturbed(flow.bijection, 0.2).train(training)
    z, label = torch.randn(3, *shape), torch.tensor([2, 0, 2])
    check(bijection, z, label)
    x = bijection.map_forward(z, label)
    # the rows do not see each other's labels
    for i in range(3):
        torch.testing.assert_close(bijection.map_forward(z[i : i + 1], label[i : i + 1])[0], x[i])
    assert (bijection.map_forward(z, torch.tensor([1, 1, 1])) - x).abs().amin(0).amax() > 1e-3


@pytest.mark.parametrize("name", list(BIJECTIONS))
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_bijection(name: str, d: int, training: bool) -> None:
    if d == 1 and name.startswith(("realnvp", "glow")):
        pytest.skip("couplings need two halves")
    check(BIJECTIONS[name](d).train(training), torch.randn(2, d), moves="permutation" not in name)


def check(bijection: Bijection, z: Tensor, label: Tensor | None = None, moves: bool = True) -> None:
    """Shapes, the round trip, and the log-determinant beside that of the autograd Jacobian, for z (B, *event)."""
    x, log_det = bijection.forward(z, label)
    back, back_log_det = bijection.inverse(x, label)
    assert x.shape == z.shape
    assert log_det.shape == back_log_det.shape == (len(z),)
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bijection.map_forward(z, label), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bijection.map_inverse(x, label), back, rtol=1e-6, atol=1e-6)
    assert x.sub(z).abs().max() > 1e-3 or not moves
    d = z[0].numel()
    for i in range(len(z)):
        one = None if label is None else label[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda y, one=one: bijection.forward(y.unsqueeze(0), one)[0].squeeze(0), z[i]
        )
        found = torch.linalg.slogdet(jacobian.reshape(d, d))[1]
        torch.testing.assert_close(found, log_det[i], rtol=1e-6, atol=1e-6)


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


def test_initialization_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, label = torch.randn(30, 1, 4, 4), torch.arange(30) % 3
    flow = perturbed(realnvp((1, 4, 4), layers=2, hidden=(4,), conditional=True, classes=3).bijection)
    whole = flow.initialize(x, label)
    monkeypatch.setattr("flowtrain.bijections.base.PART", 7 * 16)
    torch.testing.assert_close(flow.initialize(x, label), whole)


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
        Standardize((2,)).fit(torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_coupling_scale_is_bounded() -> None:
    coupling = next(iter(realnvp((2,), layers=1, actnorm=False, cap=1.5).bijection))  # type: ignore[call-overload]
    with torch.no_grad():
        for p in coupling.parameters():
            p.mul_(0).add_(50.0)
    assert coupling.forward(torch.randn(10, 2))[1].abs().max() <= 1.5
