"""Masked autoregressive maps: the dependencies of elements, the number of passes, and the order of the groups."""

import pytest
import torch
from torch import Tensor

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.spline import Spline
from flowtrain.nn.residual_mlp import MaskedMLP

GROUPS = {
    "sequential": [0, 1, 2, 3],
    "reversed": [3, 2, 1, 0],
    "coupling": [0, 0, 1, 1],
    "three groups": [1, 0, 2, 1],
    "one group": [0, 0, 0, 0],
}


def make_bijection(
    groups: list[int], classes: int | None = None, splines: bool = False, bound: float | None = None
) -> Autoregressive:
    order, spline = torch.tensor(groups), Spline(4, 3.0)
    net = MaskedMLP(order, [12, 12], order.repeat(spline.size if splines else 2), "relu", classes)
    found = Autoregressive(order, net, input_bound=bound, transform=spline if splines else None)
    for p in found.parameters():
        p.data.add_(0.4 * torch.randn_like(p))
    return found


@pytest.mark.parametrize("splines", [False, True])
@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("bound", [None, 2.0])
def test_jacobian_is_triangular_in_the_group_order(name: str, splines: bool, bound: float | None) -> None:
    groups = GROUPS[name]
    bijection = make_bijection(groups, splines=splines, bound=bound)
    x = torch.randn(6, 4)
    z, log_det = bijection.inverse(x)
    jacobian = torch.autograd.functional.jacobian(lambda y: bijection.inverse(y)[0].sum(0), x)
    assert isinstance(jacobian, Tensor)
    rows = jacobian.transpose(0, 1)
    torch.testing.assert_close(torch.linalg.slogdet(rows)[1], log_det)
    order = torch.tensor(groups)
    allowed = (order.unsqueeze(1) > order) | torch.eye(4, dtype=torch.bool)
    depends = (rows != 0).any(0)
    assert torch.equal(depends, allowed)
    back, back_log_det = bijection(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_log_det, -log_det)


@pytest.mark.parametrize("name", list(GROUPS))
def test_forward_uses_one_network_pass_per_group(name: str) -> None:
    bijection, calls = make_bijection(GROUPS[name]), []
    bijection.conditioner.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4)
    bijection.inverse(x)
    assert len(calls) == 1
    bijection(x)
    assert len(calls) == 1 + len(set(GROUPS[name]))


def test_infinite_values_do_not_reach_earlier_groups() -> None:
    """In a masked product, infinite values of a later element would become NaN as 0 * inf."""
    bijection = make_bijection([0, 1, 2, 3])
    z = torch.tensor([[0.1, 0.2, 0.3, torch.inf]])
    x = bijection(z)[0]
    assert x[0, :3].isfinite().all()


@pytest.mark.parametrize("groups", [[0], [0, 0], [0, 1]])
def test_every_group_depends_on_the_label(groups: list[int]) -> None:
    bijection = make_bijection(groups, classes=3)
    x, label = torch.randn(3, len(groups)), torch.tensor([0, 1, 2])
    z = bijection.inverse(x, label)[0]
    torch.testing.assert_close(bijection(z, label)[0], x)
    others = bijection.inverse(x, torch.tensor([1, 2, 0]))[0]
    assert ((others - z).abs() > 1e-3).all()


def by_groups(bijection: Autoregressive, z: Tensor) -> tuple[Tensor, Tensor]:
    return bijection.group_by_group(z, lambda x: bijection.theta(x, None), bijection.linear_term)


@pytest.mark.parametrize("splines", [False, True])
@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("bound", [None, 2.0])
def test_implicit_gradient_equals_the_gradient_of_all_passes(name: str, splines: bool, bound: float | None) -> None:
    bijection = make_bijection(GROUPS[name], splines=splines, bound=bound)
    z = torch.randn(6, 4, requires_grad=True)
    cotangents = [torch.randn(6, 4), torch.randn(6)]
    wanted = [z, *bijection.parameters()]
    found = bijection(z)
    # the result has one node of autograd instead of a graph of all passes
    assert type(found[0].grad_fn).__name__ == "ToDataBackward"
    expected = by_groups(bijection, z)
    torch.testing.assert_close(found, expected)
    gradients, others = (
        torch.autograd.grad(pair, wanted, cotangents, allow_unused=True, materialize_grads=True)
        for pair in (found, expected)
    )
    torch.testing.assert_close(gradients, others)


def test_implicit_gradient_can_be_differentiated_again() -> None:
    bijection = make_bijection(GROUPS["three groups"], splines=True, bound=2.0)
    z = torch.randn(3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(bijection, (z,))
    assert torch.autograd.gradgradcheck(bijection, (z,))


def test_implicit_gradient_in_float32_with_strong_dependencies() -> None:
    """The entries of J^-1 are products of many large entries of J, and the iteration needs all passes."""
    bijection = make_bijection(list(range(12)))
    for p in bijection.parameters():
        p.data.mul_(2)
    z = torch.randn(50, 12)
    exact = z.clone().requires_grad_()
    [expected] = torch.autograd.grad(sum(v.sum() for v in by_groups(bijection, exact)), exact)
    bijection.float()
    single = z.float().requires_grad_()
    [found] = torch.autograd.grad(sum(v.sum() for v in bijection(single)), single)
    error = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 1e-5
    assert error.max() < 1e-2
