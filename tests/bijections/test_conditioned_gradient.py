"""The hand-written gradients of couplings, autoregressive maps and ActNorm, compared with autograd and differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections import ActNorm, Autoregressive, Bijection, HalfCoupling, IndexCoupling, Spline
from flowtrain.bijections.conditioned_gradient import Conditioned
from flowtrain.nn.conditioners import MLP
from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP

D = 5
MASK = torch.tensor([True, False, True, True, False])
GROUPS = torch.arange(D)
LAYERS: dict[str, Callable[[], Bijection]] = {
    "index": lambda: IndexCoupling(MASK, MLP(3, [8, 8], 4, "relu"), 0.5, input_bound=2.0),
    "index without bound": lambda: IndexCoupling(MASK, MLP(3, [8], 4, "relu")),
    "half": lambda: HalfCoupling(D, False, MLP(3, [8], 4, "relu"), input_bound=2.0),
    "swapped": lambda: HalfCoupling(D, True, ResidualMLP(2, [8], 6), input_bound=2.0),
    "spline": lambda: HalfCoupling(
        D, False, ResidualMLP(3, [8, 8], 2 * 11), input_bound=2.0, transform=Spline(bins=4, bound=1.5)
    ),
    "autoregressive": lambda: Autoregressive(GROUPS, MaskedMLP(GROUPS, [8], GROUPS.repeat(2)), input_bound=2.0),
    "spline autoregressive": lambda: Autoregressive(
        GROUPS, MaskedMLP(GROUPS, [8], GROUPS.repeat(11)), transform=Spline(bins=4, bound=1.5)
    ),
    "actnorm": lambda: ActNorm(D),
}


def built(name: str) -> tuple[Bijection, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer, torch.randn(6, D, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_autograd_and_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = built(name)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(x)

    def loss() -> Tensor:
        z, log_det = layer.inverse(x)
        return (z * weights).sum() + log_det.square().sum()

    if isinstance(layer, Conditioned):
        assert layer.by_hand(x, None) is not None
    by_hand, found = loss(), torch.autograd.grad(loss(), inputs)
    for module in ("conditioned_gradient", "scale"):
        monkeypatch.setattr(f"flowtrain.bijections.{module}.needs_autograd", lambda x: True)
    torch.testing.assert_close(by_hand, loss())
    for a, b in zip(found, torch.autograd.grad(loss(), inputs), strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.undo()
    # a central difference in a random direction
    steps = [torch.randn_like(v) for v in inputs]
    values = []
    with torch.no_grad():
        for size in (1e-6, -2e-6):
            for v, step in zip(inputs, steps, strict=True):
                v.add_(step, alpha=size)
            values.append(loss())
    slope = sum((g * s).sum() for g, s in zip(found, steps, strict=True))
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["index", "spline", "autoregressive", "actnorm"])
def test_second_derivatives(name: str) -> None:
    layer, x = built(name)
    p = next(layer.parameters())

    def first(x: Tensor) -> tuple[Tensor, ...]:
        z, log_det = layer.inverse(x)
        return torch.autograd.grad(z.square().sum() + log_det.square().sum(), [x, p], create_graph=True)

    x.requires_grad_()
    by_hand = torch.autograd.grad(sum(g.sin().sum() for g in first(x)), x)[0]  # type: ignore[union-attr]
    small = torch.zeros_like(x)
    small[2, 3] = 1e-5
    moved = [(x + sign * small).detach().requires_grad_() for sign in (1, -1)]
    values = [sum(g.detach().sin().sum() for g in first(v)) for v in moved]
    torch.testing.assert_close(by_hand[2, 3], (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["index", "half"])
def test_hooks_of_the_network_are_called(name: str) -> None:
    layer, x = built(name)
    assert isinstance(layer, Conditioned)
    assert isinstance(layer.conditioner, MLP)
    calls = []
    layer.conditioner[0].register_forward_hook(lambda *_: calls.append(1))
    layer.inverse(x)
    assert calls == [1]
