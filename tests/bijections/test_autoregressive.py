"""Masked autoregressive maps: the dependencies of elements, the number of passes, and the order of the groups."""

import pytest
import torch
from torch import Tensor

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.spline import Spline
from flowtrain.nn.residual_mlp import MaskedMLP

GROUPS = {
    "in turn": [0, 1, 2, 3],
    "reversed": [3, 2, 1, 0],
    "coupling": [0, 0, 1, 1],
    "three": [1, 0, 2, 1],
    "one": [0, 0, 0, 0],
}


def made(
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
def test_elements_depend_on_smaller_groups_alone(name: str, splines: bool, bound: float | None) -> None:
    groups = GROUPS[name]
    bijection = made(groups, splines=splines, bound=bound)
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
def test_there_are_as_many_passes_as_groups(name: str) -> None:
    bijection, calls = made(GROUPS[name]), []
    bijection.conditioner.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4)
    bijection.inverse(x)
    assert len(calls) == 1
    bijection(x)
    assert len(calls) == 1 + len(set(GROUPS[name]))


def test_garbage_in_later_groups_does_not_reach_earlier_ones() -> None:
    """In a masked product, infinite values of a later element would become NaN as 0 * inf."""
    bijection = made([0, 1, 2, 3])
    z = torch.tensor([[0.1, 0.2, 0.3, torch.inf]])
    x = bijection(z)[0]
    assert x[0, :3].isfinite().all()


@pytest.mark.parametrize("groups", [[0], [0, 0], [0, 1]])
def test_every_group_depends_on_the_label(groups: list[int]) -> None:
    bijection = made(groups, classes=3)
    x, label = torch.randn(3, len(groups)), torch.tensor([0, 1, 2])
    z = bijection.inverse(x, label)[0]
    torch.testing.assert_close(bijection(z, label)[0], x)
    others = bijection.inverse(x, torch.tensor([1, 2, 0]))[0]
    assert ((others - z).abs() > 1e-3).all()
