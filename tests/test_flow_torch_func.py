"""torch.func over flows: grad, vmap and Jacobians agree with torch.autograd and finite differences."""

import warnings
from typing import Any

import pytest
import torch
from helpers.equations import Plain, Wave, random_field
from helpers.flows import IMAGES, VECTORS, continuous, flow_of, vectors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from flowtrain import models
from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.data.base import Samples
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import SolveOptions, ode_solver
from flowtrain.utils.errors import ConfigError, FlowtrainError

# one solver of each kind: both engines, fixed and adaptive steps, quadrature on stages and on dense output
SOLVERS: list[dict[str, Any]] = [
    {"method": "dopri5", "rtol": 1e-9},
    {"method": "dopri5", "rtol": 1e-9, "gradient": "adjoint"},
    {"method": "dopri8", "rtol": 1e-9, "gradient": "replay", "control": "all"},
    {"method": "adaptive_heun", "rtol": 1e-3},
    {"method": "rk4", "steps": 8},
    {"method": "heun3", "steps": 8},
    {"method": "implicit_adams", "steps": 8},
]


def ode_flow(settings: dict[str, Any], training: bool = False) -> Flow:
    return Flow((2,), Chain([continuous(2, ode_solver(**settings), train="exact")])).train(training)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", SOLVERS, ids=lambda s: "-".join(map(str, s.values())))
def test_grad_and_vmap_match_autograd_for_every_solver(settings: dict[str, Any], training: bool) -> None:
    flow, x = ode_flow(settings, training), torch.randn(3, 2, requires_grad=True)
    log_p = flow.log_prob(x)
    (expected,) = torch.autograd.grad(log_p.sum(), x)
    tolerance = 1e-2 if settings["method"] == "adaptive_heun" else 1e-6
    if settings.get("gradient") == "adjoint" or settings["method"] in ("heun3", "implicit_adams"):
        # the adjoint approximates the gradient of the exact solution, but torch.func differentiates the steps
        tolerance = max(tolerance, 1e-5)

    def of_row(row: Tensor) -> Tensor:
        return flow.log_prob(row.unsqueeze(0))[0]

    x = x.detach()
    assert_close(vmap(of_row)(x), log_p, tolerance)
    assert_close(grad(of_row)(x[0]), expected[0], tolerance)
    assert_close(vmap(grad(of_row))(x), expected, tolerance)


@pytest.mark.parametrize(
    ("settings", "training"), [({"method": "dopri5", "rtol": 1e-8}, True), ({"method": "rk4", "steps": 10}, False)]
)
def test_jacobian_and_hessian_match_references(settings: dict[str, Any], training: bool) -> None:
    """Second derivatives match finite differences of first derivatives, and the Jacobian matches the
    log-determinant."""
    flow, x = ode_flow(settings, training), torch.randn(2)

    def log_p(row: Tensor) -> Tensor:
        return flow.log_prob(row.unsqueeze(0))[0]

    def latents(row: Tensor) -> Tensor:
        return flow.inverse(row.unsqueeze(0))[0]

    jacobian = jacrev(latents)(x)
    assert_close(jacfwd(latents)(x), jacobian, 1e-10)
    base = flow.base_log_prob(latents(x).unsqueeze(0))[0]
    assert_close(base + torch.linalg.slogdet(jacobian)[1], log_p(x), 1e-4)
    step = 1e-4 * torch.eye(2)
    differences = [(grad(log_p)(x + e) - grad(log_p)(x - e)) / 2e-4 for e in step]
    assert_close(hessian(log_p)(x), torch.stack(differences), 1e-5)
    assert_close(jacrev(jacrev(log_p))(x), hessian(log_p)(x), 1e-8)
    # jacobians of the forward map for a whole batch
    rows = torch.randn(2, 2)
    assert_close(
        jacrev(flow.forward)(rows).diagonal(dim1=0, dim2=2).permute(2, 0, 1),
        vmap(jacrev(lambda z: flow.forward(z[None])[0]))(rows),
    )


class LogProb(nn.Module):
    """A module whose forward is log p, as functional_call needs."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


@pytest.mark.parametrize("settings", [SOLVERS[0], SOLVERS[4], SOLVERS[5]], ids=lambda s: s["method"])
def test_per_sample_gradients_and_vmap_over_weights(settings: dict[str, Any]) -> None:
    model, x = LogProb(ode_flow(settings)), torch.randn(3, 2)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        log_p: Tensor = functional_call(model, weights, (row.unsqueeze(0),))
        return log_p[0]

    rows = vmap(grad(loss), (None, 0))(weights, x)
    expected = torch.autograd.grad(model(x[1:2]).sum(), list(weights.values()))
    for name, share in zip(weights, expected, strict=True):
        assert_close(rows[name][1], share)
    halved = {name: w.detach() / 2 for name, w in weights.items()}
    both = {name: torch.stack([w.detach(), halved[name]]) for name, w in weights.items()}
    side_by_side = vmap(lambda weights: functional_call(model, weights, (x,)))(both)
    assert_close(side_by_side, torch.stack([model(x), functional_call(model, halved, (x,))]))


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((name, None) for name in VECTORS), *((name, 3) for name in ("ffjord", "realnvp", "glow", "nsf", "maf"))],
)
def test_every_vector_flow_supports_torch_func(name: str, classes: int | None) -> None:
    flow, x = vectors(name, classes=classes), torch.randn(3, 2, requires_grad=True)
    labels = [] if classes is None else [torch.tensor([2, 0, 1])]
    log_p = flow.log_prob(x, *labels)
    (expected,) = torch.autograd.grad(log_p.sum(), x)

    def of_row(row: Tensor, *label: Tensor) -> Tensor:
        return flow.log_prob(row.unsqueeze(0), *(y.unsqueeze(0) for y in label))[0]

    assert_close(vmap(of_row)(x.detach(), *labels), log_p)
    assert_close(vmap(grad(of_row))(x.detach(), *labels), expected)
    if labels:
        with pytest.raises(FlowtrainError, match="label=7"):
            vmap(of_row)(x.detach(), labels[0] + 5)


@pytest.mark.parametrize("name", list(IMAGES))
def test_every_image_flow_supports_torch_func(name: str) -> None:
    samples = Samples((1, 4, 4), integer_valued=True, levels=16)
    flow = flow_of(IMAGES[name], samples, ["solver=rk4", "solver.steps=3"])
    x = (14 * torch.rand(2, 1, 4, 4) + 1).requires_grad_()
    (expected,) = torch.autograd.grad(flow.log_prob(x).sum(), x)

    def of_row(row: Tensor) -> Tensor:
        return flow.log_prob(row.unsqueeze(0))[0]

    assert_close(vmap(grad(of_row))(x.detach()), expected)
    whole = torch.randint(0, 16, (2, 1, 4, 4))
    assert vmap(of_row, randomness="different")(whole).shape == (2,)
    for bad in (whole + 16, whole + 16.5):
        with pytest.raises(FlowtrainError, match="from 0 to"):
            vmap(of_row, randomness="different")(bad)


def test_forward_mode_matches_reverse_mode() -> None:
    flow, x, e = ode_flow({"method": "rk4", "steps": 5}), torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    expected = (torch.autograd.grad(flow.log_prob(x).sum(), x)[0] * e).sum(1)
    x = x.detach()
    assert_close(jvp(flow.log_prob, (x,), (e,))[1], expected, 1e-10)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(flow.log_prob(forward_ad.make_dual(x, e))).tangent
    assert tangent is not None
    assert_close(tangent, expected, 1e-10)


def test_vmap_over_vjps_matches_a_loop() -> None:
    """vmap over torch.autograd.grad works: the hand-written gradients compute a VJP for each lane."""
    for plain in (False, True):
        field = random_field(std=0.4)
        made = Continuous(Plain(field) if plain else field, ode_solver("dopri5"), TraceRule("exact"))
        x = torch.randn(3, 2, requires_grad=True)
        z, log_det = made.inverse(x)
        total = torch.cat([z, log_det.unsqueeze(1)], 1)
        cotangents = torch.randn(2, 3, 3)

        def vjp(cotangent: Tensor, total: Tensor = total, x: Tensor = x) -> Tensor:
            return torch.autograd.grad(total, x, cotangent, retain_graph=True)[0]

        assert_close(vmap(vjp)(cotangents), torch.stack([vjp(c) for c in cotangents]), 1e-12)
        with pytest.raises(FlowtrainError, match=r"torch\.func"):
            torch.autograd.grad(total, x, cotangents, is_grads_batched=True)


def test_trace_noise_follows_the_vmap_randomness() -> None:
    flow = Flow((2,), Chain([continuous(2, ode_solver("rk4", steps=3), evaluate="hutchinson")])).eval()
    x = torch.randn(1, 2).expand(20, 2)

    def of_row(row: Tensor) -> Tensor:
        return flow.log_prob(row.unsqueeze(0))[0]

    assert vmap(of_row, randomness="same")(x).std() < 1e-9
    assert vmap(of_row, randomness="different")(x).std() > 1e-4


def test_path_integral_gradients_match_autograd() -> None:
    flow = continuous(2, ode_solver("rk4", steps=4)).train()
    options = Regularizer(kinetic=0.1, jacobian=0.1, acceleration=0.1).options(SolveOptions())

    def penalty(x: Tensor) -> Tensor:
        return flow.pass_inverse(x, options=options).integrals[0].sum(1)

    x = torch.randn(3, 2, requires_grad=True)
    (expected,) = torch.autograd.grad(penalty(x).sum(), x)
    assert_close(vmap(grad(lambda row: penalty(row.unsqueeze(0))[0]))(x.detach()), expected)


def test_every_vmap_lane_meets_the_tolerance() -> None:
    """One lane is hard and the others are trivial, so steps chosen for the mean error would be too long for it."""
    wave, solver, x = Wave(), ode_solver("bosh3", rtol=1e-5), torch.zeros(400, 1, 1)
    x[7] = 1
    found = vmap(lambda row: solver.solve(wave.problem(row)).x)(x)
    torch.testing.assert_close(found, x * wave.growth(0, 1), rtol=0, atol=2e-5)


def test_scipy_solver_is_refused() -> None:
    flow = ode_flow({"method": "scipy_solver", "rtol": 1e-6, "gradient": "adjoint"})
    with pytest.raises(ConfigError, match="scipy_solver"):
        grad(lambda row: flow.log_prob(row.unsqueeze(0))[0])(torch.randn(2))


def test_solver_errors_are_raised_inside_vmap() -> None:
    flow = ode_flow({"method": "rk4", "steps": 2})
    with torch.no_grad():
        next(flow.parameters()).fill_(torch.nan)
    with pytest.raises(FlowtrainError, match="NaN or infinite"):
        vmap(lambda row: flow.inverse(row.unsqueeze(0))[0])(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_a_compiled_log_prob_gives_no_warning() -> None:
    flow = models.affine(2).eval()
    x = torch.randn(5, 2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        # the backend only affects the generated code
        found = torch.compile(flow.log_prob, backend="eager")(x)
        torch.testing.assert_close(found, flow.log_prob(x))


def test_the_loss_of_a_continuous_flow_can_be_compiled() -> None:
    flow = models.ffjord(2, hidden=[4])
    x = torch.randn(5, 2)
    flow.log_prob(x).mean().backward()
    plain = [parameter.grad for parameter in flow.parameters()]
    flow.zero_grad()
    with warnings.catch_warnings():
        # the compiler warns about the parts that it leaves out
        warnings.simplefilter("ignore")
        torch.compile(flow.log_prob, backend="eager")(x).mean().backward()
    # the steps of the second solve are planned from the first, so the errors of the solves differ
    torch.testing.assert_close([parameter.grad for parameter in flow.parameters()], plain, rtol=0, atol=1e-4)
