"""Convolutional fields: time as a channel, JVPs that agree with autograd's Jacobian, and flows over images."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.conditioners import ConvNet, ResidualNet
from flowtrain.nn.conv_field import LAYERS, ConcatConv2d, ConcatSquashConv2d, ConvField
from flowtrain.nn.divergence import Probes, TraceRule, divergence
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.velocity_field import ACTIVATIONS, field_jvp
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import ConfigError

EVENT = (2, 4, 3)
D = 2 * 4 * 3


def random_field(layer: str = "concatsquash", activation: str = "tanh", kernel_size: int = 3) -> ConvField:
    field = ConvField(2, [5, 4], layer, activation, kernel_size)
    for p in field.parameters():
        nn.init.normal_(p, std=0.3)
    return field


class Plain(nn.Module):
    """A field of images (B, C, H, W) without `jvp`, around another field if one is given."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = random_field() if net is None else net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        assert x.dim() == 4
        v: Tensor = self.net(t, x)
        return v


class OneConvolution(nn.Module):
    """v = tanh(W * [x, t]), built from torch modules only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        channel = t.expand(len(x)).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
        return torch.tanh(self.conv(torch.cat([x, channel], 1)))


def jacobian(field: nn.Module, t: Tensor, x: Tensor) -> Tensor:
    """Returns the Jacobian (D, D) at one image x (C, H, W)."""
    j = torch.autograd.functional.jacobian(lambda y: field(t, y.unsqueeze(0)).squeeze(0), x)
    return j.reshape(x.numel(), x.numel())


@pytest.mark.parametrize("network", ["field", "pushed", "conv", "residual"])
@pytest.mark.parametrize("size", [None, (20, 20)])
def test_positions_tell_a_network_where_it_is(network: str, size: tuple[int, int] | None) -> None:
    """Without a positional bias, shifting a dot far from the border shifts the output."""
    made: nn.Module
    if network in ("field", "pushed"):
        made = ConvField(1, [4], "concat", "tanh", size=size)
    else:
        kind = ConvNet if network == "conv" else ResidualNet
        made = kind(1, [4], 1, "tanh", size=size)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    dots = torch.zeros(2, 1, 20, 20)
    dots[0, 0, 8, 8] = dots[1, 0, 9, 10] = 1
    t = torch.tensor(0.3)
    if network == "pushed":
        y = made.jvp(t, dots, torch.ones_like(dots).unsqueeze(0))[1][0]
    else:
        y = made(t, dots) if network == "field" else made(dots)
    same = torch.allclose(y[0, 0, 5:12, 5:12], y[1, 0, 6:13, 7:14])
    assert same == (size is None)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("times", ["scalar", "per row"])
def test_concat_is_the_convolution_of_the_concatenated_input(kernel_size: int, times: str) -> None:
    layer, x = ConcatConv2d(2, 4, kernel_size), torch.randn(3, *EVENT)
    t = torch.tensor(0.7) if times == "scalar" else torch.rand(3)
    channel = t.expand(3).reshape(3, 1, 1, 1).expand(3, 1, *EVENT[1:])
    weight = torch.cat([layer.conv.weight, layer.shift.weight], 1)
    expected = F.conv2d(torch.cat([x, channel], 1), weight, layer.conv.bias, padding=kernel_size // 2)
    torch.testing.assert_close(layer(t, x), expected)


@pytest.mark.parametrize("times", ["scalar", "per row"])
def test_concatsquash_is_its_equation(times: str) -> None:
    layer, x = ConcatSquashConv2d(2, 4, 3), torch.randn(3, *EVENT)
    t = torch.tensor(0.7) if times == "scalar" else torch.rand(3)
    for row in range(3):
        time = t.expand(3)[row]
        gate = torch.sigmoid(layer.gate.weight[:, 0] * time + layer.gate.bias)
        shift = layer.shift.weight[:, 0] * time
        expected = layer.conv(x[row]) * gate[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(layer(t, x)[row], expected)


@pytest.mark.parametrize(("layer", "activation"), list(itertools.product(LAYERS, ACTIVATIONS)))
@pytest.mark.parametrize("per_row", [False, True])
def test_jvp_matches_autograd(layer: str, activation: str, per_row: bool) -> None:
    field, x = random_field(layer, activation), torch.randn(4, *EVENT)
    t = torch.rand(4) if per_row else torch.rand(())
    tangents = torch.randn(2, 4, *EVENT)
    v, je = field_jvp(field, t, x, tangents)
    torch.testing.assert_close(v, field(t, x))
    for e, probe_jvps in zip(tangents, je, strict=True):
        expected = torch.func.jvp(lambda y: field(t, y), (x,), (e,))[1]
        torch.testing.assert_close(probe_jvps, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_node_has_its_own_time(layer: str) -> None:
    field, x, t = random_field(layer), torch.randn(3, 2, *EVENT), torch.rand(3, 1)
    e = torch.randn(2, 1, 2, *EVENT)
    v, je = field.jvp(t, x, e)
    torch.testing.assert_close(v, field(t, x))
    for node in range(3):
        one_v, one_je = field.jvp(t[node, 0], x[node], e[:, 0])
        torch.testing.assert_close(v[node], one_v)
        torch.testing.assert_close(je[:, node], one_je)


def test_single_image_without_batch_dimension() -> None:
    field, x, t = random_field(), torch.randn(*EVENT), torch.tensor(0.3)
    torch.testing.assert_close(field(t, x), field(t, x.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("make", [random_field, Plain, OneConvolution], ids=["own push", "fallback", "torch alone"])
def test_divergence_is_the_trace_at_every_node(make: Callable[[], nn.Module]) -> None:
    field = make()
    x, t = torch.randn(2, 3, *EVENT), torch.rand(2, 1)
    v, div = divergence(field, t, x, Probes.exact(x[0]))
    assert v.shape == x.shape
    assert div.shape == (2, 3)
    for n, i in itertools.product(range(2), range(3)):
        torch.testing.assert_close(v[n, i], field(t[n], x[n, i].unsqueeze(0)).squeeze(0))
        torch.testing.assert_close(div[n, i], jacobian(field, t[n, 0], x[n, i]).trace())


@pytest.mark.parametrize("make", [random_field, OneConvolution], ids=["own push", "fallback"])
def test_hutchinson_is_the_mean_of_its_forms(make: Callable[[], nn.Module]) -> None:
    field, x, t = make(), torch.randn(3, *EVENT), torch.tensor(0.4)
    probes = Probes.hutchinson(x, "gaussian", 4)
    assert probes.tangents.shape == (4, 3, *EVENT)
    _, div = divergence(field, t, x, probes)
    for i in range(3):
        e = probes.tangents[:, i].flatten(1)
        forms = ((e @ jacobian(field, t, x[i]).T) * e).sum(1)
        torch.testing.assert_close(div[i], forms.mean())


def test_all_signs_of_one_channel_give_the_exact_trace() -> None:
    field, x, t = ConvField(1, [3], "concat", "tanh"), torch.randn(2, 1, 2, 3), torch.tensor(0.4)
    nn.init.normal_(field.head.conv.weight)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6))).view(-1, 1, 1, 2, 3).expand(-1, 2, 1, 2, 3)
    _, estimate = divergence(field, t, x, Probes(signs, 1 / len(signs)))
    torch.testing.assert_close(estimate, divergence(field, t, x, Probes.exact(x))[1])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("per_node", [False, True])
def test_gradient_of_the_divergence_agrees_with_the_fallback(layer: str, per_node: bool) -> None:
    field, x = random_field(layer), torch.randn(2, 3, *EVENT)
    t = torch.rand(2, 1) if per_node else torch.tensor(0.3)
    probes, grads = Probes.hutchinson(x[0], "rademacher", 2), []
    for f in (field, Plain(field)):
        v, div = divergence(f, t, x, probes)
        loss = div.square().sum() + v.square().sum()
        grads.append(torch.autograd.grad(loss, list(field.parameters())))
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)
        assert own.any()


@pytest.mark.parametrize("make", [random_field, OneConvolution], ids=["own push", "fallback"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_flow_over_images_has_the_log_det_of_its_jacobian(make: Callable[[], nn.Module], direction: str) -> None:
    solver = ode_solver("dopri5", rtol=1e-8)
    flow = Continuous(make(), solver, TraceRule("exact", "exact"))
    x = torch.randn(2, 2, 4, 4)
    transport = getattr(flow, direction)
    y, log_det = transport(x)
    assert y.shape == x.shape
    assert log_det.shape == (2,)
    for i in range(2):
        j = torch.autograd.functional.jacobian(lambda z: getattr(flow, f"map_{direction}")(z), x[i : i + 1])
        torch.testing.assert_close(log_det[i], j.reshape(32, 32).slogdet()[1], rtol=1e-6, atol=1e-6)


def test_flow_over_images_comes_back_and_trains_by_hutchinson() -> None:
    flow = Continuous(random_field(), ode_solver("dopri5", rtol=1e-7), TraceRule())
    x = torch.randn(3, *EVENT)
    z, log_det = flow.inverse(x)
    torch.testing.assert_close(flow.map_forward(z), x, rtol=1e-5, atol=1e-5)
    (z.square().sum() - log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.field.parameters())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("per_node", [False, True])
def test_float32_agrees_with_float64(layer: str, channels: int, per_node: bool) -> None:
    field = ConvField(channels, [5, 4], layer, "swish")
    nn.init.normal_(field.head.conv.weight)
    x, t = torch.randn(2, 3, channels, 4, 3), torch.rand(2, 1) if per_node else torch.rand(())
    wide = divergence(field, t, x, Probes.exact(x[0]))
    plain = divergence(Plain(field.float()), t.float(), x.float(), Probes.exact(x[0].float()))
    narrow = divergence(field, t.float(), x.float(), Probes.exact(x[0].float()))
    for a, b, c in zip(narrow, plain, wide, strict=True):
        assert a.dtype == torch.float32
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_untrained_field_is_zero(layer: str) -> None:
    field, x = ConvField(2, [8], layer, "softplus"), torch.randn(2, *EVENT)
    v, je = field.jvp(torch.tensor(0.5), x, torch.randn(1, 2, *EVENT))
    assert not field(torch.tensor(0.5), x).any()
    assert not v.any()
    assert not je.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [8], "concat", "tanh"), "channels=0"),
        ((2, [8], "gated", "tanh"), "concatsquash"),
        ((2, [8], "concat", "relu"), "softplus"),
        ((2, [], "concat", "tanh"), "hidden"),
        ((2, [8], "concat", "tanh", 4), "kernel_size=4: give an odd"),
        ((2, [8], "concat", "tanh", 0), "kernel_size=0"),
    ],
)
def test_invalid_conv_field_options_are_refused(arguments: tuple[int, list[int], str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvField(*arguments)


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5, 5), (2,)])
def test_inputs_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="field of 2 channels"):
        random_field()(torch.tensor(0.5), torch.randn(shape))


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        (MLPField(3, [4], "concat", "tanh"), (2, 2, 4, 3), r"MLPField needs samples with 1 dimension.*\(2, 4, 3\)"),
        (ConvField(2, [4], "concat", "tanh"), (2, 3), r"ConvField needs samples with 3 dimension.*\(3,\)"),
    ],
)
def test_divergence_refuses_samples_of_another_kind(field: nn.Module, shape: tuple[int, ...], message: str) -> None:
    x = torch.randn(shape)
    with pytest.raises(ConfigError, match=message):
        divergence(field, torch.tensor(0.5), x, Probes.exact(x))


def test_divergence_refuses_inputs_without_batch_dimension() -> None:
    with pytest.raises(ConfigError, match="batch of vectors"):
        TraceRule().draw(torch.randn(3), training=True)


@pytest.mark.parametrize(("side", "training", "exact"), [(2, True, True), (3, True, False), (8, False, True)])
def test_auto_trace_counts_the_elements_of_an_image(side: int, training: bool, exact: bool) -> None:
    probes = TraceRule().draw(torch.randn(5, 2, side, side), training)
    leading = (2 * side * side, 1) if exact else (1, 5)
    assert probes.tangents.shape == (*leading, 2, side, side)
    assert probes.event_dims == 3
