"""JVPs of fields agree with autograd's Jacobian, for every layer and activation and for a plain module."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import PATHS
from flowtrain.nn import mlp_field, mlp_kernels
from flowtrain.nn.divergence import Probes, TraceRule, divergence
from flowtrain.nn.mlp_field import LAYERS, MLPField, MLPRecorder
from flowtrain.nn.velocity_field import ACTIVATIONS, field_jvp
from flowtrain.ode import SolveOptions, ode_solver
from flowtrain.utils.errors import ConfigError


def random_field(d: int = 3, layer: str = "concatsquash", activation: str = "tanh") -> MLPField:
    field = MLPField(d, [5, 4], layer, activation, init_scale=None)
    for p in field.parameters():
        nn.init.normal_(p, std=0.7)
    return field


class Plain(nn.Module):
    """A field without `jvp`."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d + 1, 8), nn.Tanh(), nn.Linear(8, d))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v: Tensor = self.net(torch.cat([x, t.expand(len(x)).unsqueeze(1)], 1))
        return v


def jacobian(field: nn.Module, t: Tensor, row: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda y: field(t, y.unsqueeze(0)).squeeze(0), row)


@pytest.mark.parametrize(("layer", "activation"), list(itertools.product(LAYERS, ACTIVATIONS)))
@pytest.mark.parametrize("per_row", [False, True])
def test_jvp_matches_the_jacobian(layer: str, activation: str, per_row: bool) -> None:
    field, x = random_field(3, layer, activation), torch.randn(4, 3)
    t = torch.rand(4) if per_row else torch.rand(())
    tangents = torch.randn(2, 4, 3)
    v, je = field_jvp(field, t, x, tangents)
    torch.testing.assert_close(v, field(t, x))
    for i in range(4):
        j = jacobian(field, t[i] if per_row else t, x[i])
        torch.testing.assert_close(je[:, i], tangents[:, i] @ j.T)


@pytest.mark.parametrize("make", [random_field, Plain], ids=["own jvp", "fallback"])
def test_divergence_equals_the_jacobian_trace_at_every_node(make: Callable[[], nn.Module]) -> None:
    field = make()
    x, t = torch.randn(2, 4, 3), torch.rand(2, 1)
    v, div = divergence(field, t, x, Probes.exact(x[0]))
    assert v.shape == x.shape
    assert div.shape == (2, 4)
    for n, i in itertools.product(range(2), range(4)):
        torch.testing.assert_close(div[n, i], jacobian(field, t[n, 0], x[n, i]).trace())


def test_divergence_gradient_matches_the_autograd_fallback() -> None:
    field = random_field()

    class Hidden(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return field(t, x)

    x, t = torch.randn(6, 3), torch.tensor(0.3)
    grads = []
    for f in (field, Hidden()):
        div = divergence(f, t, x, Probes.exact(x))[1].square().sum()
        grads.append(torch.autograd.grad(div, list(field.parameters()), allow_unused=True))
    for a, b in zip(*grads, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_slopes_match_autograd(name: str) -> None:
    f = ACTIVATIONS[name]
    x = torch.linspace(-6, 6, 101, requires_grad=True)
    y, slope = f.value_and_slope(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(y, f(x))
    torch.testing.assert_close(slope, first)
    replaced, kept = f.replace(f.gain(x.device) * x.detach())
    torch.testing.assert_close(replaced, f(x).detach())
    torch.testing.assert_close(f.slope(kept), first.detach())
    torch.testing.assert_close(f.curvature(kept, f.slope(kept)), second)


def test_untrained_field_does_not_depend_on_x() -> None:
    field = MLPField(2, [8], "concat", "tanh")
    a, b = field(torch.tensor(0.5), torch.randn(2, 2))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, [8], "squash", "tanh"), "concatsquash"),
        ((2, [8], "concat", "relu"), "softplus"),
        ((2, [], "concat", "tanh"), "hidden"),
    ],
)
def test_invalid_mlp_field_options_are_refused(arguments: tuple[int, list[int], str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLPField(*arguments)


class ByAutograd(MLPField):
    """An `MLPField` that is differentiated by autograd, without kernels and tapes."""

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.jvp_rows(t, x, tangents, shift)


def with_and_without_kernels(layer: str, activation: str = "tanh") -> tuple[MLPField, MLPField]:
    """Returns two fields with context and equal random weights."""
    fields = [kind(3, [5, 4], layer, activation, classes=2, init_scale=None) for kind in (MLPField, ByAutograd)]
    for p, q in zip(*(field.parameters() for field in fields), strict=True):
        nn.init.normal_(p, std=0.5)
        q.data.copy_(p)
    return fields[0], fields[1]


@pytest.mark.parametrize(("layer", "activation"), list(itertools.product(LAYERS, ACTIVATIONS)))
def test_kernel_with_context_equals_autograd(layer: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the limit is low, so that each node is a block
    monkeypatch.setattr(mlp_kernels, "BLOCK", 1)
    features, x, t = torch.randn(4, 2, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True), torch.rand(2, 1)
    found = []
    for field in with_and_without_kernels(layer, activation):
        v, je = field_jvp(
            field.given(features), t, x, torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(0))
        )
        loss = (v.square() + je.square().sum(0)).sum((0, 2)) @ torch.arange(1.0, 5.0)
        found.append([v, je, *torch.autograd.grad(loss, [x, features, *field.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", ["direct", "replay"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("context", ["labels", "features", "features with a gradient"])
def test_solve_with_context_has_the_gradients_of_autograd(gradient: str, trace: str, context: str) -> None:
    x = torch.randn(6, 3)
    given = torch.randint(2, (6,)) if context == "labels" else torch.randn(6, 2)
    given.requires_grad_(context == "features with a gradient")
    found = []
    for field in with_and_without_kernels("concatsquash"):
        assert isinstance(field.given(given).recorder(), MLPRecorder) is not isinstance(field, ByAutograd)
        flow = Continuous(field, ode_solver("dopri5", gradient, rtol=1e-4), TraceRule(trace))
        torch.manual_seed(1)
        z, log_det, (paths,) = flow.pass_inverse(x, given, SolveOptions(integrals=PATHS))
        loss = z.square().sum(1) @ torch.arange(1.0, 7.0) - log_det.sum() + 0.1 * paths.sum()
        inputs = [*field.parameters(), *([given] if given.requires_grad else [])]
        found.append([z, log_det, paths, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_field_with_context_may_have_one_time_per_row() -> None:
    field, by_autograd = with_and_without_kernels("concat")
    t, x, labels = torch.rand(4), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    e = torch.randn(1, 4, 3)
    for a, b in zip(field.given(labels).jvp(t, x, e), by_autograd.given(labels).jvp(t, x, e), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("layer", "activation"), list(itertools.product(LAYERS, ACTIVATIONS)))
@pytest.mark.parametrize("shared", [True, False])
def test_one_time_per_row_without_gradients_equals_the_jvp_with_gradients(
    layer: str, activation: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_field, "BLOCK", 50)
    torch.manual_seed(0)
    field = random_field(3, layer, activation)
    x, t, shift = torch.randn(7, 3), torch.rand(7), torch.randn(7, 5)
    tangents = torch.randn(2, 1 if shared else 7, 3)
    kept = [v.clone() for v in (x, t, shift, tangents)]
    for given in (None, shift):
        expected = field.jvp(t, x, tangents, given)
        assert expected[0].requires_grad
        with torch.no_grad():
            found = field.jvp(t, x, tangents, given)
        torch.testing.assert_close(found, tuple(v.detach() for v in expected))
        assert found[1].shape == (2, 7, 3)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, t, shift, tangents), strict=True))


@pytest.mark.parametrize(("layer", "activation"), list(itertools.product(LAYERS, ACTIVATIONS)))
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("times", ["one", "of_rows"])
def test_prepared_field_equals_the_field(layer: str, activation: str, rows: int, times: str) -> None:
    torch.manual_seed(0)
    field = random_field(3, layer, activation)
    x, shift, e = torch.randn(rows, 3), torch.randn(rows, 5), torch.eye(3).unsqueeze(1)
    t = torch.rand(()) if times == "one" else torch.rand(rows)
    prepared = field.prepared()
    for given in (None, shift):
        expected = field(t, x, given), *field.jvp(t, x, e, given)
        with torch.no_grad():
            found = prepared(t, x, given), *prepared.jvp(t, x, e, given)
        assert all(y.requires_grad for y in expected)
        torch.testing.assert_close(found, tuple(y.detach() for y in expected))
        # with gradients, a prepared field has the gradients of the field
        again = torch.autograd.grad(prepared(t, x, given).sum(), list(field.body.parameters()))
        torch.testing.assert_close(again, torch.autograd.grad(expected[0].sum(), list(field.body.parameters())))


class Doubled(nn.Linear):
    """A linear layer of a user, which is twice the layer with the same weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["in place", "hook", "replaced"])
@torch.no_grad()
def test_solve_uses_the_current_parameters_hooks_and_modules(change: str) -> None:
    torch.manual_seed(0)
    field = random_field(3, "concatsquash")
    flow, x = Continuous(field, ode_solver("dopri5", rtol=1e-8)).eval(), torch.randn(2, 3)
    before, linear = flow.map_forward(x), field.layers[0].linear
    if change == "in place":
        linear.weight.mul_(2)
        linear.bias.mul_(2)
    elif change == "hook":
        linear.register_forward_hook(lambda module, inputs, y: 2 * y)
    else:
        doubled = Doubled(linear.in_features, linear.out_features)
        doubled.load_state_dict(linear.state_dict())
        field.layers[0].linear = doubled
    found = flow.map_forward(x)
    assert not torch.allclose(found, before)
    with torch.enable_grad():
        torch.testing.assert_close(found, flow.map_forward(x).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.map_inverse(found), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("used", ["v", "je", "both"])
def test_kernel_gradient_if_only_some_results_are_used(used: str) -> None:
    x, t = torch.randn(3, 4, 3, requires_grad=True), torch.rand(3, 1)
    found = []
    for field in with_and_without_kernels("time_embedding"):
        v, je = field.jvp(t, x, torch.eye(3).view(3, 1, 1, 3))
        loss = {"v": v.square().sum(), "je": je.square().sum(), "both": v.square().sum() + je.square().sum()}[used]
        inputs = [x, *(p for name, p in field.named_parameters() if name != "embedding")]
        found.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gates_that_underflow_to_zero_have_finite_gradients() -> None:
    field = random_field(3, "concatsquash")
    first = field.layers[0]
    assert isinstance(first, mlp_field.ConcatSquash)
    nn.init.constant_(first.gate.bias, -1e4)
    v, je = field.jvp(torch.rand(2, 1), torch.randn(2, 4, 3), torch.eye(3).view(3, 1, 1, 3))
    for gradient in torch.autograd.grad(v.sum() + je.sum(), list(field.parameters())):
        assert gradient.isfinite().all()


def test_tape_has_the_parameters_of_the_solve_after_they_are_replaced() -> None:
    """A replay records stages in the backward pass. functional_call has then restored the module's parameters."""
    field, x, times = random_field(), torch.randn(4, 3), torch.rand(2)
    recorder = field.recorder()
    assert recorder is not None
    found = []
    for replaced in (False, True):
        if replaced:
            field.head.linear.weight = nn.Parameter(torch.randn_like(field.head.linear.weight))
        tape = recorder.record(times, keep=True)
        v, at_x = tape.velocity(1, x), tape.vjp(1, torch.ones_like(x))
        gradients = recorder.gradients([tape])
        assert all(g is not None for g in gradients)
        found.append([v, at_x, *gradients])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_float32_and_float64_agree_on_large_batches() -> None:
    """oneDNN computes float32 products of this size."""
    field = MLPField(2, [64, 64], "concatsquash", "tanh")
    for p in field.parameters():
        nn.init.normal_(p, std=0.2)
    x, found = torch.randn(600, 2), []
    for dtype in (torch.float32, torch.float64):
        field = field.to(dtype)
        flow = Continuous(field, ode_solver("rk4", steps=3), TraceRule("exact"))
        z, log_det = flow(x.to(dtype))
        loss = z.square().mean() - log_det.mean()
        found.append([z, log_det, *torch.autograd.grad(loss, list(field.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
