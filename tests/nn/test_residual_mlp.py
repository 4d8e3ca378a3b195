"""Residual MLPs: the hand-written gradient, masks, labels and dropout."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP
from flowtrain.utils.errors import ConfigError

G = torch.arange(3)
NETS: dict[str, Callable[[], ResidualMLP]] = {
    "dense": lambda: ResidualMLP(3, [5, 5], 4),
    "wide input": lambda: ResidualMLP(9, [4], 30),
    "tanh": lambda: ResidualMLP(3, [5], 4, "tanh"),
    "labels": lambda: ResidualMLP(3, [5], 4, classes=2),
    "masked": lambda: MaskedMLP(G, [6, 6], G.repeat(2)),
    "masked, labels": lambda: MaskedMLP(G, [6], G.repeat(2), classes=2),
    "masked, one group": lambda: MaskedMLP(0 * G, [6], 0 * G),
    "dropout": lambda: ResidualMLP(3, [8, 8], 4, dropout=0.4),
}


def perturbed(name: str) -> ResidualMLP:
    net = NETS[name]()
    for p in net.parameters():
        p.data = torch.randn_like(p)
    return net


def inputs_of(net: ResidualMLP, rows: int) -> tuple[Tensor, Tensor | None]:
    n_in = net.first.in_features - (net.classes or 0)
    return torch.randn(rows, n_in), None if net.classes is None else torch.arange(rows) % net.classes


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_gradient_matches_finite_differences(name: str, rows: int) -> None:
    net = perturbed(name).train()
    x, label = inputs_of(net, rows)
    names = [key for key, _ in net.named_parameters()]

    def answer(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(0)
        return functional_call(net, dict(zip(names, weights, strict=True)), (x, label))  # type: ignore[no-any-return]

    given = (x.requires_grad_(), *net.parameters())
    assert answer(*given).shape == (rows, net.last.out_features)
    assert torch.autograd.gradcheck(answer, given)
    if rows == 7:
        # create_graph and torch.func use ordinary operations instead of the hand-written gradient
        assert torch.autograd.gradgradcheck(answer, given)
        if net.dropout:
            # torch.func draws other factors
            return
        whole = torch.autograd.grad(answer(*given).square().sum(), x)[0]
        plain = tuple(v.detach() for v in given)
        torch.testing.assert_close(grad(lambda x: answer(x, *plain[1:]).square().sum())(plain[0]), whole)


@pytest.mark.parametrize("name", ["dense", "masked", "labels"])
def test_vmap_over_rows_equals_the_batch(name: str) -> None:
    net = perturbed(name)
    x, label = inputs_of(net, 4)
    rows = (x,) if label is None else (x, label)
    by_row = vmap(lambda *row: net(*(v.unsqueeze(0) for v in row))[0])(*rows)
    torch.testing.assert_close(by_row, net(*rows))


def test_output_equals_the_residual_formula() -> None:
    net, x = perturbed("dense"), torch.randn(6, 3)
    h = net.first(x)
    for one, two in (net.blocks[:2], net.blocks[2:]):
        h = h + two(one(h.relu()).relu())
    torch.testing.assert_close(net(x), net.last(h.relu()))


def test_untrained_network_outputs_zero() -> None:
    for make in NETS.values():
        net = make()
        x, label = inputs_of(net, 5)
        assert not net(x, label).any()


def test_dropout_acts_in_training_only() -> None:
    net = perturbed("dropout")
    x, _ = inputs_of(net, 2000)
    net.eval()
    still = net(x)
    assert torch.equal(net(x), still)
    net.train()
    torch.manual_seed(0)
    first = net(x)
    assert not torch.equal(first, net(x))
    torch.manual_seed(0)
    assert torch.equal(net(x), first)
    # no_grad uses ordinary operations, which draw the same noise
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(net(x), first)


def test_autocast_output_is_bfloat16() -> None:
    net, x = perturbed("dense").float(), torch.randn(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


def test_copies_and_loaded_weights_give_equal_outputs() -> None:
    for name in NETS:
        net = perturbed(name).eval()
        x, label = inputs_of(net, 3)
        other = NETS[name]().eval()
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x, label), net(x, label))
        assert torch.equal(copy.deepcopy(net)(x, label), net(x, label))


def test_blocks_of_different_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.hidden=\[4, 5\]"):
        ResidualMLP(2, [4, 5], 2)
    with pytest.raises(ConfigError):
        ResidualMLP(2, [], 2)
