"""`TableChain`, compared with the chain of the same bijections, finite differences and the Jacobian."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections import ActNorm, Autoregressive, Chain, IndexCoupling, TableChain
from flowtrain.bijections.table_chain import MOST_COLUMNS
from flowtrain.models.glow import glow
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.models.realnvp import realnvp
from flowtrain.nn.conditioners import MLP

D = 5
FLOWS: dict[str, Callable[[], nn.Module]] = {
    "realnvp": lambda: realnvp(D, layers=3, hidden=[8, 8], mixing="permutation", input_bound=5.0),
    "realnvp without W": lambda: realnvp(D, layers=3, hidden=[8], cap=0.5, actnorm=False),
    "glow": lambda: glow(D, steps=3, hidden=[8]),
    "nsf": lambda: nsf(D, layers=3, hidden=[8, 8], bins=4, input_bound=5.0),
    "nsf with permutations": lambda: nsf(D, layers=3, hidden=[8], bins=4, mixing="permutation"),
    "nsf with halves": lambda: nsf(D, layers=3, hidden=[8], bins=4, mixing="alternate", input_bound=5.0),
    "maf": lambda: maf(D, layers=3, hidden=[8], input_bound=5.0, mixing="linear"),
    "maf with splines": lambda: maf(D, layers=2, hidden=[8], bins=4, transform="spline", mixing="linear"),
    "realnvp with dropout": lambda: realnvp(D, layers=3, hidden=[8, 8], input_bound=5.0, dropout=0.3),
    "nsf with dropout": lambda: nsf(D, layers=3, hidden=[8, 8], bins=4, input_bound=5.0, dropout=0.3),
    "maf with dropout": lambda: maf(D, layers=2, hidden=[8], input_bound=5.0, mixing="linear", dropout=0.3),
    "maf without linear maps": lambda: maf(D, layers=3, hidden=[8, 8]),
    "maf with W": lambda: maf(D, layers=3, hidden=[8], input_bound=5.0),
    "maf with two groups": lambda: maf(D, layers=2, hidden=[8], passes=2, bins=4, transform="spline"),
    "maf with dropout, without linear maps": lambda: maf(D, layers=3, hidden=[8, 8], dropout=0.3),
}


def built(name: str) -> tuple[TableChain, Tensor]:
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    chain = flow.bijection
    assert isinstance(chain, TableChain)
    return chain, torch.randn(6, D, dtype=torch.float64)


@pytest.mark.parametrize("name", FLOWS)
def test_values_and_gradients_equal_the_chain_of_the_same_bijections(name: str) -> None:
    chain, x = built(name)
    x.requires_grad_()
    inputs = [x, *chain.parameters()]
    answers = []
    assert chain.in_one_operation(x) is not None
    for one in (chain, Chain(list(chain))):
        # both draw the same factors of dropout
        torch.manual_seed(1)
        z, log_det = one.inverse(x)
        loss = (z * torch.linspace(1, 2, z.shape[1], dtype=z.dtype)).sin().sum() + log_det.square().sum()
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        # a gradient of zero may be missing
        answers.append(
            [z, log_det, *(torch.zeros_like(v) if g is None else g for g, v in zip(grads, inputs, strict=True))]
        )
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["realnvp", "nsf with halves", "maf", "maf with W"])
def test_log_determinant_and_round_trip(name: str) -> None:
    chain, x = built(name)
    z, log_det = chain.inverse(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: chain.inverse(v)[0].sum(0), x).transpose(0, 1)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(chain(z)[0], x)
    torch.testing.assert_close(chain.map_inverse(x), z)


@pytest.mark.parametrize("name", ["realnvp", "nsf", "maf with splines", "maf with W"])
def test_second_derivatives_equal_finite_differences(name: str) -> None:
    chain, x = built(name)

    def first(x: Tensor) -> Tensor:
        z, log_det = chain.inverse(x)
        (found,) = torch.autograd.grad(z.square().sum() + log_det.square().sum(), x, create_graph=True)
        return found.sin().sum()

    x.requires_grad_()
    (found,) = torch.autograd.grad(first(x), x)
    small = torch.zeros_like(x)
    small[2, 3] = 1e-5
    values = [first((x + sign * small).detach().requires_grad_()).detach() for sign in (1, -1)]
    torch.testing.assert_close(found[2, 3], (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["realnvp", "maf with W"])
def test_several_cotangents_at_a_time(name: str) -> None:
    chain, x = built(name)
    x.requires_grad_()
    z, _ = chain.inverse(x)
    cotangents = torch.randn(3, *z.shape, dtype=z.dtype)
    (batched,) = torch.autograd.grad(z, x, cotangents, retain_graph=True, is_grads_batched=True)
    for one, found in zip(cotangents, batched, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(z, x, one, retain_graph=True)[0])


def test_values_without_gradients_equal_the_chain() -> None:
    chain, x = built("nsf")
    with torch.no_grad():
        without = chain.inverse(x)
    for a, b in zip(without, chain.inverse(x), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_autoregressive_maps_are_not_skipped() -> None:
    chain, x = built("maf without linear maps")
    calls = []
    layer = next(one for one in chain if isinstance(one, Autoregressive))
    layer.conditioner.last.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,operator]
    assert chain.in_one_operation(x) is None
    chain.inverse(x)
    assert calls == [1]


def test_one_operation_agrees_with_float64_far_from_0() -> None:
    flow = maf(3, layers=2, hidden=[8]).float()
    x = (1e4 + torch.randn(50, 3)).float()
    flow.bijection.initialize(x)
    for p in flow.bijection.bijections[0].parameters():  # type: ignore[union-attr,index]
        nn.init.normal_(p, std=0.3)
    exact = copy.deepcopy(flow).double()
    torch.testing.assert_close(flow.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-4, atol=1e-4)


def test_hooks_are_not_skipped() -> None:
    chain, x = built("realnvp")
    calls = []
    coupling = next(one for one in chain if isinstance(one, IndexCoupling))
    coupling.conditioner[0].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
    assert chain.by_matrices(x) is None
    chain.inverse(x)
    assert calls == [1]


@pytest.mark.parametrize("name", [name for name in FLOWS if name.endswith("dropout")])
def test_second_derivatives_use_the_same_factors_of_dropout(name: str) -> None:
    chain, x = built(name)
    x.requires_grad_()
    z, log_det = chain.inverse(x)
    loss = z.square().sum() + log_det.square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (found,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(found, first)


def test_dropout_is_off_in_evaluation() -> None:
    chain, x = built("realnvp with dropout")
    assert not torch.equal(chain.inverse(x)[0], chain.inverse(x)[0])
    chain.eval()
    z, log_det = chain.inverse(x)
    without = realnvp(D, layers=3, hidden=[8, 8], input_bound=5.0).double().bijection
    for p, q in zip(without.parameters(), chain.parameters(), strict=True):
        p.data = q.data
    without.load_state_dict({**without.state_dict(), **dict(chain.named_buffers())})
    for a, b in zip(without.inverse(x), (z, log_det), strict=True):
        torch.testing.assert_close(a, b)


def test_unsupported_chains_do_not_use_matrices() -> None:
    x = torch.randn(3, MOST_COLUMNS + 1)
    mask = torch.arange(MOST_COLUMNS + 1) % 2 == 0
    wide = TableChain([IndexCoupling(mask, MLP(17, [8], 32, "relu"))])
    norms = TableChain([ActNorm(MOST_COLUMNS)])
    assert wide.by_matrices(x) is None
    assert norms.by_matrices(x[:, 1:]) is None
    without_linear_maps = maf(D, layers=2, hidden=[8]).bijection
    assert isinstance(without_linear_maps, TableChain)
    assert without_linear_maps.by_matrices(x[:, :D]) is None
    assert without_linear_maps.in_one_operation(x[:, :D]) is not None
    assert wide.in_one_operation(x) is None
    assert norms.in_one_operation(x[:, 1:]) is None
    torch.testing.assert_close(wide.inverse(x)[0], x)
    torch.testing.assert_close(norms.inverse(x[:, 1:])[0], x[:, 1:])


def test_empty_batches() -> None:
    chain, x = built("nsf")
    z, log_det = chain.inverse(x[:0])
    assert z.shape == (0, D)
    assert log_det.shape == (0,)
