"""Dropout: the factors, and networks that use them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from flowtrain.nn.conditioners import MLP
from flowtrain.nn.dropout import dropout_factors
from flowtrain.nn.residual_mlp import ResidualMLP


def dropped(hidden: list[int], rate: float = 0.4) -> MLP:
    torch.manual_seed(0)
    net = MLP(3, hidden, 4, dropout=rate)
    for p in net.parameters():
        nn.init.normal_(p)
    return net


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_have_mean_one_and_the_given_share_of_zeros(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factors = dropout_factors(rate, 64, torch.zeros(4001, 2, dtype=dtype))
    assert factors is not None
    assert factors.shape == (64, 4001)
    assert factors.dtype == dtype
    n = factors.numel()
    error = (rate * (1 - rate) / n) ** 0.5
    assert abs((factors == 0).double().mean().item() - rate) < 5 * error
    assert abs(factors.double().mean().item() - 1) < 5 * error / (1 - rate)
    assert factors.max().item() == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_factors_are_independent() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4096, 1)
    found = [dropout_factors(0.3, 32, x), dropout_factors(0.3, 32, x)]
    rows = torch.stack([each for each in found if each is not None]).flatten(1) - 1
    variance, n = rows.square().mean(), rows.shape[1]
    # neighbours that share one random number, neighbouring hidden units, and two draws
    pairs = [(rows[0, :-k], rows[0, k:]) for k in (1, 2, 3, 4, 4096)] + [(rows[0], rows[1])]
    for a, b in pairs:
        assert abs((a * b).mean() / variance).item() < 5 / n**0.5


def test_factors_of_edge_cases() -> None:
    x = torch.zeros(7, 2)
    assert dropout_factors(0.0, 3, x) is None
    assert dropout_factors(1e-9, 3, x) is None
    all_dropped = dropout_factors(1.0, 3, x)
    assert all_dropped is not None
    assert not all_dropped.any()
    for width, rows in ((3, 1), (1, 3), (5, 0)):
        factors = dropout_factors(0.5, width, torch.zeros(rows, 2))
        assert factors is not None
        assert factors.shape == (width, rows)


def test_factors_are_on_the_device_of_the_inputs() -> None:
    x = torch.zeros(9, 2)
    with torch.device("meta"):
        factors = dropout_factors(0.5, 8, x)
    assert factors is not None
    assert factors.device == x.device


def test_seed_determines_the_factors() -> None:
    x = torch.zeros(9, 2)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(dropout_factors(0.5, 8, x))
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("hidden", [[], [8], [8, 5]])
def test_gradient_of_an_mlp_matches_finite_differences(hidden: list[int]) -> None:
    net = dropped(hidden)
    names = [name for name, _ in net.named_parameters()]

    def answer(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(0)
        return functional_call(net, dict(zip(names, weights, strict=True)), (x,))  # type: ignore[no-any-return]

    given = (torch.randn(6, 3).requires_grad_(), *net.parameters())
    assert torch.autograd.gradcheck(answer, given)
    assert torch.autograd.gradgradcheck(answer, given)


def test_mlp_equals_its_formula() -> None:
    net, x = dropped([8, 5]), torch.randn(6, 3)
    torch.manual_seed(0)
    factors = net.drops(x)
    torch.manual_seed(0)
    found = net(x)
    linears = [one for one in net if isinstance(one, nn.Linear)]
    h = x
    for (linear, _), factor in zip(pairwise(linears), factors, strict=True):
        assert factor is not None
        assert 0 < (factor == 0).sum() < factor.numel()
        h = linear(h).relu() * factor.T
    torch.testing.assert_close(found, linears[-1](h))


def test_mean_of_an_mlp_with_one_hidden_layer_is_its_value_in_evaluation() -> None:
    net, x = dropped([16], 0.25), torch.randn(1, 3)
    torch.manual_seed(0)
    values = net(x.expand(20_000, 3))
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - net.eval()(x)[0]).abs() < 5 * error).all()


def test_mode_and_hooks_of_each_dropout_module_have_an_effect() -> None:
    net, x = dropped([8, 8]), torch.randn(5, 3)
    first, second = (one[1] for one in net if isinstance(one, nn.Sequential))
    first.eval()
    assert [factor is None for factor in net.drops(x)] == [True, False]
    second.eval()
    assert torch.equal(net(x), net(x))
    assert net.plain_layers() is not None
    second.train()
    assert net.plain_layers() is None
    assert net.plain_layers(dropout=True) is not None
    calls = []
    second.register_forward_hook(lambda *_: calls.append(1))
    net(x)
    assert calls == [1]


def test_vmap_draws_different_factors() -> None:
    net, x = dropped([64]), torch.randn(1, 3).expand(4, 3)
    by_row = vmap(lambda row: net(row.unsqueeze(0))[0], randomness="different")(x)
    assert not torch.equal(by_row[0], by_row[1])


def test_gradients_and_networks_in_vmap_have_different_factors() -> None:
    net, x = ResidualMLP(3, [64], 4, dropout=0.4), torch.randn(1, 3)
    nn.init.normal_(net.last.weight)

    def answer(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(net, weights, (row.unsqueeze(0),)).sum()  # type: ignore[no-any-return]

    weights = dict(net.named_parameters())
    gradients = vmap(grad(answer), (None, 0), randomness="different")(weights, x.expand(4, 3))
    assert not torch.equal(gradients["last.weight"][0], gradients["last.weight"][1])
    stacked, _ = stack_module_state([net, net])  # type: ignore[arg-type]
    values = vmap(answer, (0, None), randomness="different")(stacked, x[0])
    assert values[0] != values[1]
