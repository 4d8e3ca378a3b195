"""`ConvNet` by matrix products, compared with the convolutions of torch."""

import pytest
import torch
from torch import Tensor, nn

from flowtrain.nn import conv_columns
from flowtrain.nn.conditioners import ConvNet
from flowtrain.nn.conv_columns import ConvColumns

SHAPES = [(2, [16, 16], 4, (6, 4), True), (1, [8], 3, (5, 3), False), (3, [8, 12, 16], 2, (1, 2), True)]


def built(n_in: int, hidden: list[int], n_out: int, size: tuple[int, int], places: bool) -> tuple[ConvNet, Tensor]:
    torch.manual_seed(0)
    net = ConvNet(n_in, hidden, n_out, size=size if places else None).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    # a part of the channels, as in couplings
    return net, torch.randn(3, n_in + 2, *size, dtype=torch.float64)[:, 1:-1].requires_grad_()


def by_columns(net: ConvNet, x: Tensor) -> Tensor:
    parts = net.plain_parts()
    assert parts is not None
    found: Tensor = ConvColumns.apply(x, net.first.places, *parts)  # type: ignore[no-untyped-call]
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_convolutions(shape: tuple[int, list[int], int, tuple[int, int], bool]) -> None:
    net, x = built(*shape)
    inputs = [x, *net.parameters()]
    # products are used only for float32
    answers = [by_columns(net, x), net(x)]
    torch.testing.assert_close(*answers)
    grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in answers]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    # else autograd would copy the gradient of each weight
    for g, p in zip(grads[0][1:], net.parameters(), strict=True):
        assert p.dim() < 4 or p is net.first.places or g.is_contiguous(memory_format=torch.channels_last)


def test_second_derivatives_equal_convolutions() -> None:
    net, x = built(*SHAPES[0])
    found = []
    for y in (by_columns(net, x), net(x)):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sin().sum(), [x, *net.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)


def test_the_network_uses_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = built(*SHAPES[0])
    net, x = net.float(), x.detach().float()
    convolved = net.double()(x.double()).float()
    net.float()
    monkeypatch.setattr(conv_columns, "has_onednn", lambda: True)
    monkeypatch.setattr(conv_columns.F, "conv2d", lambda *_, **__: pytest.fail("a convolution was called"))
    torch.testing.assert_close(net(x), convolved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["hook", "bias", "kernel", "dilation", "activation"])
def test_changed_networks_are_not_skipped(change: str) -> None:
    net, _ = built(*SHAPES[0])
    if change == "hook":
        net.last.register_forward_hook(lambda *_: None)
    elif change == "bias":
        net.middle[0] = nn.Conv2d(16, 16, 1, bias=False)
    elif change == "kernel":
        net.middle[0] = nn.Conv2d(16, 16, 3, padding=1)
    elif change == "dilation":
        net.last = nn.Conv2d(16, 4, 3, padding="same", dilation=2)
    else:
        net.activation = nn.Tanh()
    assert net.plain_parts() is None
