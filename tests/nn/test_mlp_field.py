"""JVPs of fields agree with autograd's Jacobian, for every layer and activation and for a plain module."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.nn.divergence import Probes, divergence
from flowtrain.nn.mlp_field import LAYERS, MLPField
from flowtrain.nn.velocity_field import ACTIVATIONS, field_jvp
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


@pytest.mark.parametrize("make", [random_field, Plain], ids=["own push", "fallback"])
def test_divergence_is_the_trace_at_every_node(make: Callable[[], nn.Module]) -> None:
    field = make()
    x, t = torch.randn(2, 4, 3), torch.rand(2, 1)
    v, div = divergence(field, t, x, Probes.exact(x[0]))
    assert v.shape == x.shape
    assert div.shape == (2, 4)
    for n, i in itertools.product(range(2), range(4)):
        torch.testing.assert_close(div[n, i], jacobian(field, t[n, 0], x[n, i]).trace())


def test_gradient_of_the_fallback_matches_the_jvp() -> None:
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
def test_slope_and_curvature_are_derivatives(name: str) -> None:
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


def test_untrained_field_is_zero_up_to_time() -> None:
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
