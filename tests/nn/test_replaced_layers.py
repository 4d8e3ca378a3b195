"""Networks with layers that a user has replaced: the hand-written kernels are used only for layers that they know."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flowtrain import models
from flowtrain.flow import Flow
from flowtrain.nn.conditioners import ConvNet
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.residual_mlp import MaskedLinear
from flowtrain.nn.velocity_field import field_jvp


class Scaled(nn.Linear):
    """A linear layer of a user, whose outputs are twice as large."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def without_bias(layer: nn.Linear) -> nn.Module:
    layer.bias = None
    return layer


def scaled(layer: nn.Linear) -> nn.Module:
    found = Scaled(layer.in_features, layer.out_features)
    found.load_state_dict(layer.state_dict())
    return found


def hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda _, inputs, y: 2 * y)
    return layer


def in_sequence(layer: nn.Linear) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh())


def parametrized(layer: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(layer)


REPLACED: list[Callable[[nn.Linear], nn.Module]] = [without_bias, scaled, hooked, in_sequence, parametrized]

FLOWS: dict[str, Callable[[], Flow]] = {
    "realnvp": lambda: models.realnvp(3, layers=3, hidden=[6, 6]),
    "realnvp relu": lambda: models.realnvp(3, layers=3, hidden=[6, 6], activation="relu"),
    "nsf": lambda: models.nsf(3, layers=3, hidden=[6], bins=4),
    "maf": lambda: models.maf(3, layers=2, hidden=[6]),
    "ffjord": lambda: models.ffjord(3, hidden=[6, 6]),
    "ffjord concat": lambda: models.ffjord(3, hidden=[6, 6], field="concat"),
}


def replace_some(flow: nn.Module, change: Callable[[Any], nn.Module]) -> int:
    """Changes the linear layers whose inputs are hidden units. Returns the number of such layers."""
    places = [
        (parent, name, layer)
        for parent in flow.modules()
        for name, layer in parent.named_children()
        if type(layer) in (nn.Linear, MaskedLinear) and layer.bias is not None and layer.in_features == 6
    ]
    for parent, name, layer in places:
        if isinstance(layer, MaskedLinear) and change in (scaled, in_sequence):
            continue
        setattr(parent, name, change(layer))
    return len(places)


@pytest.mark.parametrize("change", REPLACED)
@pytest.mark.parametrize("family", FLOWS)
def test_flows_with_replaced_layers_agree_with_their_jacobian(family: str, change: Callable[[Any], nn.Module]) -> None:
    torch.manual_seed(0)
    flow = FLOWS[family]().double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.4)
    plain = flow.log_prob(x := torch.randn(5, 3)).detach()
    assert replace_some(flow, change)
    flow.eval()
    with torch.no_grad():
        log_p, z = flow.log_prob_and_latents(x)
        again = flow.forward(z)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda r: flow.inverse(r[None])[0], row) for row in x])
    expected = flow.base_log_prob(z) + torch.linalg.slogdet(jacobians)[1]
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if "ffjord" in family else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(log_p, expected, **tolerance)
    torch.testing.assert_close(again, x, **tolerance)
    if change is not parametrized and not (family == "maf" and change in (scaled, in_sequence)):
        assert (log_p - plain).abs().max() > 1e-3
    # the gradient in training mode is the derivative of the same function
    flow.train()
    weights = [p for p in flow.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in weights]
    flow.log_prob(x).sum().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(weights, direction, strict=True) if p.grad is not None)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.add_(d, alpha=step)
            values.append(flow.log_prob(x).sum())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layer", ["concatsquash", "concat", "time_embedding"])
def test_jvps_of_fields_without_biases_equal_autograd(layer: str) -> None:
    t, e = torch.tensor([0.3]), torch.randn(2, 1, 4, 3)
    fields: list[Any] = [MLPField(3, [6, 6], layer), ConvField(2, [4], layer)]
    for field, x, tangents in zip(
        fields, (torch.randn(4, 3), torch.randn(4, 2, 5, 5)), (e, torch.randn(2, 1, 4, 2, 5, 5)), strict=True
    ):
        for p in field.parameters():
            nn.init.normal_(p, std=0.4)
        for part in field.layers:
            (part.linear if isinstance(field, MLPField) else part.conv).bias = None
        v, je = field.jvp(t, x[None], tangents)
        for k, tangent in enumerate(tangents):
            expected = torch.func.jvp(lambda y, field=field: field(t, y), (x[None],), (tangent,))
            torch.testing.assert_close((v, je[k]), expected)


class ScaledConv(nn.Conv2d):
    """A convolution of a user, whose outputs are twice as large."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def scaled_conv(conv: nn.Conv2d) -> nn.Module:
    found = ScaledConv(conv.in_channels, conv.out_channels, 3, padding="same", bias=conv.bias is not None)
    found.load_state_dict(conv.state_dict())
    return found


def grouped(conv: nn.Conv2d) -> nn.Module:
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, groups=2)


def conv_field(layer: str, classes: int | None = None) -> ConvField:
    field = ConvField(2, [4, 4], layer, classes=classes, size=(5, 3))
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    return field


def assert_jvp_equals_autograd(field: nn.Module, x: Tensor) -> None:
    """Compares `field_jvp` with forward-mode differentiation of calls of the field, for one time and for many."""
    tangents = torch.randn(2, *x.shape)
    for t in (torch.tensor(0.3), torch.rand(len(x))):
        v, je = field_jvp(field, t, x, tangents, x.dim() - 1)
        torch.testing.assert_close(v, field(t, x))
        for e, found in zip(tangents, je, strict=True):
            expected = torch.func.jvp(lambda y, t=t: field(t, y), (x,), (e,))[1]  # type: ignore[misc]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change", [without_bias, scaled_conv, hooked, in_sequence, parametrized, grouped])
@pytest.mark.parametrize("layer", ["concatsquash", "concat", "time_embedding"])
def test_convolutional_fields_call_replaced_convolutions(layer: str, change: Callable[[Any], nn.Module]) -> None:
    field, x = conv_field(layer), torch.randn(3, 2, 5, 3)
    plain, doubled = deepcopy(field), deepcopy(field)
    field.body[1].conv = change(field.body[1].conv)
    for p in doubled.body[1].conv.parameters():
        p.data.mul_(2)
    assert_jvp_equals_autograd(field, x)
    t = torch.tensor(0.3)
    if change in (scaled_conv, hooked):
        torch.testing.assert_close(field(t, x), doubled(t, x))
    assert torch.allclose(field(t, x), plain(t, x)) == (change is parametrized)


@pytest.mark.parametrize("change", [scaled_conv, hooked])
def test_the_convolution_of_time_is_called(change: Callable[[Any], nn.Module]) -> None:
    field, x = conv_field("concat"), torch.randn(3, 2, 5, 3)
    doubled = deepcopy(field)
    field.body[0].shift = change(field.body[0].shift)
    doubled.body[0].shift.weight.data.mul_(2)
    for t in (torch.tensor(0.3), torch.rand(3)):
        torch.testing.assert_close(field(t, x), doubled(t, x))
    assert_jvp_equals_autograd(field, x)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_jvps_use_the_hooks_and_the_forward_of_a_layer(kind: str) -> None:
    field: Any = conv_field("concatsquash") if kind == "conv" else MLPField(2, [4, 4])
    x = torch.randn(3, 2, 5, 3) if kind == "conv" else torch.randn(3, 2)
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    hooked_field = deepcopy(field)
    hooked(hooked_field.head)
    assert_jvp_equals_autograd(hooked_field, x)
    of_layer: Any = type(field.head)

    class Doubled(of_layer):  # type: ignore[misc]
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return 2 * super().forward(t, x)

    field.head.__class__ = Doubled
    assert_jvp_equals_autograd(field, x)
    t = torch.tensor(0.3)
    torch.testing.assert_close(field(t, x), hooked_field(t, x))


@pytest.mark.parametrize("base", [MLPField, ConvField])
def test_jvps_use_the_forward_of_a_subclass_of_a_field(base: Any) -> None:
    class Doubled(base):  # type: ignore[misc]
        def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return 2 * super().forward(t, x, shift)

    field, x = Doubled(2, [4], classes=3), torch.randn(3, 2, 5, 3) if base is ConvField else torch.randn(3, 2)
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    assert_jvp_equals_autograd(field, x)
    assert_jvp_equals_autograd(field.given(torch.tensor([0, 2, 1])), x)


@pytest.mark.parametrize("place", ["field", "layer", "convolution"])
def test_convolutional_fields_with_context_use_hooks(place: str) -> None:
    field, x = conv_field("concatsquash", classes=3), torch.randn(3, 2, 5, 3)
    hooked({"field": field, "layer": field.head, "convolution": field.head.conv}[place])  # type: ignore[arg-type]
    given = field.given(torch.tensor([0, 2, 1]))
    assert_jvp_equals_autograd(given, x)
    # several times for all rows, as at the nodes of a quadrature
    times, nodes = torch.rand(4, 1), torch.randn(4, *x.shape)
    v, je = field_jvp(given, times, nodes, nodes[None], 3)
    for i in range(4):
        expected = field_jvp(given, times[i, 0], nodes[i], nodes[None, i], 3)
        torch.testing.assert_close((v[i], je[:, i]), expected)


def test_a_convolutional_network_calls_a_hooked_activation() -> None:
    net = ConvNet(2, [4], 2).float()
    nn.init.normal_(net.last.weight)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        before = net(x)
        net.activation.register_forward_hook(lambda _, inputs, y: 2 * y)
        torch.testing.assert_close(net(x) - net.last.bias.view(-1, 1, 1), 2 * (before - net.last.bias.view(-1, 1, 1)))


@pytest.mark.parametrize("options", [{}, {"circular": [0]}, {"context": 2}])
def test_log_prob_and_its_gradient_use_the_hooks_of_a_field(options: dict[str, Any]) -> None:
    flow = models.ffjord(2, hidden=[6], **options).eval()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.4)
    context = torch.randn(4, 2) if "context" in options else None
    [field] = [m for m in flow.modules() if isinstance(m, MLPField)]
    # the field v(t, x) / 2 is also the field with a last layer of half the size
    halved = deepcopy(flow)
    [other] = [m for m in halved.modules() if isinstance(m, MLPField)]
    for p in (other.layers[-1].linear.weight, other.layers[-1].linear.bias, other.layers[-1].shift.weight):
        p.data.mul_(0.5)
    field.register_forward_hook(lambda _, inputs, y: 0.5 * y)
    x = torch.randn(4, 2)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x, context), halved.log_prob(x, context), rtol=1e-4, atol=1e-4)
    gradients = []
    for one in (flow.train(), halved.train()):
        x.requires_grad_()
        gradients += torch.autograd.grad(one.log_prob(x, context).sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
