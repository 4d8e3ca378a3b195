"""Hand-written gradients with create_graph=True, if an input of an operation depends on another input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.coupling import IndexCoupling
from flowtrain.bijections.scale import ActNorm
from flowtrain.bijections.spline import Spline
from flowtrain.models import nsf
from flowtrain.nn.conditioners import MLP, ConvNet
from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP

# a module, and a function that uses it
Case = tuple[nn.Module, Callable[[Tensor], Tensor]]

ORDER = torch.arange(4)


def autoregressive(classes: int | None = None, splines: bool = False) -> Autoregressive:
    size, transform = (Spline(4, 3.0).size, Spline(4, 3.0)) if splines else (2, None)
    net = MaskedMLP(ORDER, [8], ORDER.repeat(size), classes=classes)
    return Autoregressive(ORDER, net, input_bound=2.0, transform=transform)


def conditional(splines: bool) -> Case:
    module, context = autoregressive(2, splines), torch.randn(3, 2)
    return module, lambda x: torch.cat([*module.inverse(x, context)[:1], module(x, context)[0]], 1)


def twice(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Case:
    return module, lambda x: function(function(x))


def cases() -> dict[str, Callable[[], Case]]:
    def of(make: Callable[[], nn.Module], inverse: bool = False) -> Callable[[], Case]:
        def made() -> Case:
            module = make()
            found = module.inverse if inverse else module
            return twice(module, lambda x: y[0] if isinstance(y := found(x), tuple) else y)

        return made

    return {
        "MLP": of(lambda: MLP(4, [8], 4)),
        "ResidualMLP": of(lambda: ResidualMLP(4, [8], 4)),
        "ActNorm": of(lambda: ActNorm(4), inverse=True),
        "Coupling": of(lambda: IndexCoupling(torch.tensor([True, True, False, False]), MLP(2, [8], 4)), inverse=True),
        "Autoregressive to base": of(autoregressive, inverse=True),
        "Autoregressive to data": of(autoregressive),
        "nsf to base": of(lambda: nsf(4, layers=2, hidden=[8]).bijection, inverse=True),
        "affine with a context": lambda: conditional(False),
        "splines with a context": lambda: conditional(True),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_create_graph_does_not_change_a_gradient(name: str) -> None:
    """The same weights are used upstream of the input, or the parameters of a spline depend on its input."""
    module, function = cases()[name]()
    module.eval()
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x = torch.randn(3, 4, requires_grad=True)
    y = function(x)
    wanted, cotangent = [x, *module.parameters()], torch.randn_like(y)
    expected = torch.autograd.grad(y, wanted, cotangent, allow_unused=True, materialize_grads=True)
    y = function(x)
    found = torch.autograd.grad(y, wanted, cotangent, create_graph=True, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)


def test_create_graph_does_not_change_the_gradient_of_a_convolution() -> None:
    net = ConvNet(3, [8, 8], 3).float()
    for p in net.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x, cotangent = torch.randn(2, 3, 4, 4).float(), torch.randn(2, 3, 4, 4).float()
    wanted = list(net.parameters())
    expected = torch.autograd.grad(net(net(x)), wanted, cotangent)
    found = torch.autograd.grad(net(net(x)), wanted, cotangent, create_graph=True)
    torch.testing.assert_close(found, expected)
