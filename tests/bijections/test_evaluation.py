"""Couplings and autoregressive maps without gradients agree with float64 and with the direct algorithms."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from flowtrain.bijections import evaluation, sequential
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.coupling import HalfCoupling, IndexCoupling, as_slice
from flowtrain.bijections.linear import InvertibleLinear
from flowtrain.bijections.scale import ActNorm
from flowtrain.bijections.table_chain import TableChain
from flowtrain.flow import Flow
from flowtrain.models import glow, maf, nsf, realnvp
from flowtrain.nn.conditioners import MLP, ConvNet
from flowtrain.nn.residual_mlp import MaskedMLP

# the number of rows is large enough for the functions and the products for many numbers
ROWS = 300
FLOWS = {
    "realnvp": lambda: realnvp(5, layers=2, hidden=[16, 16]),
    "realnvp, without hidden layers": lambda: realnvp(5, layers=2, hidden=[]),
    "realnvp, bounded": lambda: realnvp(6, layers=2, mixing="permutation", input_bound=2.0),
    "realnvp, many columns": lambda: realnvp(300, layers=2),
    "glow": lambda: glow(6, steps=2),
    "nsf": lambda: nsf(7, layers=2, bins=5),
    "nsf, many columns": lambda: nsf(64, layers=2, input_bound=2.0),
    "maf": lambda: maf(6, layers=2),
    "maf, splines": lambda: maf(20, layers=2, transform="spline", mixing="linear"),
    "maf, bounded": lambda: maf(9, layers=2, hidden=[32, 32], passes=4, input_bound=2.0),
}


def randomized(flow: Flow) -> Flow:
    torch.manual_seed(0)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5 / max(p.shape[-1:], default=1) ** 0.5)
    return flow.eval()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_values_without_gradients_agree_with_float64(name: str, rows: int) -> None:
    flow = randomized(FLOWS[name]())
    exact = copy.deepcopy(flow).double()
    x = torch.randn(rows, *flow.event_shape)
    with torch.no_grad():
        log_p, z = flow.log_prob_and_latents(x)
        again = flow.forward(z)
    true_log_p, true_z = exact.log_prob_and_latents(x.double())
    torch.testing.assert_close(z.double(), true_z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_p.double(), true_log_p, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(again, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_values_do_not_depend_on_the_number_of_rows_mapped_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = randomized(FLOWS[name]())
    x = torch.randn(ROWS, *flow.event_shape)
    with torch.no_grad():
        log_p, z = flow.log_prob_and_latents(x)
        again = flow.forward(z)
        monkeypatch.setattr(evaluation, "ELEMENTS", dict.fromkeys(evaluation.ELEMENTS, 1))
        in_parts, z_in_parts = flow.log_prob_and_latents(x)
        torch.testing.assert_close(flow.forward(z), again)
    torch.testing.assert_close(in_parts, log_p)
    torch.testing.assert_close(z_in_parts, z)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_arguments_are_not_overwritten(name: str, rows: int) -> None:
    flow = randomized(FLOWS[name]())
    # the layers use this order inside, so a view would be possible
    x = torch.randn(*flow.event_shape, rows).T
    before = x.clone()
    with torch.no_grad():
        _, z = flow.log_prob_and_latents(x)
        kept = z.clone()
        flow.forward(z)
        flow.inverse(x)
    assert torch.equal(x, before)
    assert torch.equal(z, kept)


@pytest.mark.parametrize("name", ["realnvp", "realnvp, bounded", "glow", "maf"])
def test_operations_without_gradients_can_be_recorded(name: str) -> None:
    flow = randomized(FLOWS[name]())
    x, other = torch.randn(2, 5, *flow.event_shape)

    def to_base(x: Tensor) -> tuple[Tensor, Tensor]:
        return flow.bijection.inverse(x)

    with torch.no_grad():
        # the recorded tensors have no memory
        graph = make_fx(to_base, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(graph(other), to_base(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("channels", "rows"), [(7, 3), (300, 3), (300, 20)])
def test_permutations_of_linear_maps_are_exact(channels: int, rows: int, dtype: torch.dtype) -> None:
    order = torch.randperm(channels)
    linear, x = InvertibleLinear(channels, order).to(dtype), torch.randn(rows, channels).to(dtype)
    with torch.no_grad():
        z, _ = linear.inverse(x)
        assert torch.equal(z, x[:, order])
        assert torch.equal(linear(z)[0], x)


class Kept(Bijection):
    """The identity, which keeps its last argument."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.seen = z
        return z, z.new_zeros(len(z))

    inverse = forward


def test_tensors_seen_by_other_bijections_are_not_overwritten() -> None:
    torch.manual_seed(0)
    kept = Kept()
    couplings = [HalfCoupling(4, i % 2 == 1, MLP(2, [8], 4)) for i in range(4)]
    chain = TableChain([*couplings[:2], kept, *couplings[2:]])
    for p in chain.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 4)
    with torch.no_grad():
        for to_base in (True, False):
            y, log_det = chain.inverse(x) if to_base else chain.forward(x)
            part = Chain(couplings[2:] if to_base else couplings[:2])
            expected, _ = part.inverse(x) if to_base else part.forward(x)
            torch.testing.assert_close(kept.seen, expected)
            whole = Chain(couplings)
            true_y, true_log_det = whole.inverse(x) if to_base else whole.forward(x)
            torch.testing.assert_close(y, true_y)
            torch.testing.assert_close(log_det, true_log_det)


@pytest.mark.parametrize("rows", [3, sequential.FEW + 1])
@pytest.mark.parametrize("d", [1, 2, 7, 40])
@pytest.mark.parametrize("settings", [{}, {"input_bound": 2.0}, {"passes": 3}, {"transform": "spline"}])
def test_samples_by_steps_equal_the_direct_algorithm(rows: int, d: int, settings: dict[str, object]) -> None:
    passes = {"passes": min(3, d)} if "passes" in settings else {}
    flow = randomized(maf(d, layers=2, hidden=[8], **{**settings, **passes})).double()  # type: ignore[arg-type]
    for part in flow.modules():
        if not isinstance(part, Autoregressive):
            continue
        z = torch.randn(rows, d, dtype=torch.float64)
        with torch.no_grad():
            found = sequential.to_data(part, z)
        assert found is not None
        torch.testing.assert_close(found, part.forward(z), rtol=1e-10, atol=1e-10)


def test_columns_that_need_the_same_units_are_computed_in_one_step() -> None:
    groups = torch.arange(100)
    steps = sequential.plan(groups, MaskedMLP(groups, [4], groups.repeat(2)), merge=True)
    assert steps is not None
    assert steps.n_elements == [1, 1, 1, 1, 96]
    assert steps.n_units == [0, 1, 1, 1, 1]


def test_a_network_with_other_groups_has_no_steps() -> None:
    groups = torch.arange(3)
    assert sequential.plan(groups.flip(0), MaskedMLP(groups, [4], groups.repeat(2)), merge=True) is None


def test_hooks_of_a_conditioner_run_without_gradients() -> None:
    coupling, calls = IndexCoupling(torch.tensor([True, False]), MLP(1, [4], 2)), []
    assert not evaluation.is_possible(torch.ones(1, 2))  # gradients are enabled
    coupling.conditioner.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        coupling.inverse(torch.ones(1, 2))
        coupling(torch.ones(1, 2))
    assert len(calls) == 2


def test_columns_are_copied_only_for_layers_that_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []

    def copied(x: Tensor) -> Tensor:
        copies.append(x.T.clone())
        return copies[-1].contiguous()

    monkeypatch.setattr(evaluation, "own_columns", copied)
    for activation, n in (("relu", 1), ("tanh", 0)):
        chain = TableChain(HalfCoupling(4, swap, MLP(2, [4], 4, activation)) for swap in (False, True))
        copies.clear()
        with torch.no_grad():
            chain.inverse(torch.randn(3, 4))
        assert len(copies) == n


def test_the_parts_of_a_coupling_follow_its_buffers() -> None:
    coupling = IndexCoupling(torch.tensor([True, False, True]), MLP(2, [4], 2))
    assert coupling.column_parts() == (slice(0, 3, 2), slice(1, 2, 1))
    other = IndexCoupling(torch.tensor([False, True, True]), MLP(2, [4], 2))
    coupling.load_state_dict(other.state_dict())
    assert coupling.column_parts() == (slice(1, 3, 1), slice(0, 1, 1))


def test_unequally_spaced_indices_are_not_a_slice() -> None:
    index = torch.tensor([0, 1, 3])
    assert as_slice(index) is index


@pytest.mark.parametrize("rows", [2, 40])
def test_a_linear_map_is_inverted_without_gradients(rows: int) -> None:
    torch.manual_seed(0)
    linear = InvertibleLinear(6)
    with torch.no_grad():
        for p in linear.parameters():
            # elements outside of the triangles must not count
            p.add_(0.3 * torch.randn_like(p))
        x = torch.randn(rows, 6)
        z, log_det = linear.inverse(x)
        again, back = linear(z)
    torch.testing.assert_close(z, linear.inverse(x)[0].detach())
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det + back, torch.zeros(rows))


class FixedCoupling(HalfCoupling):
    def theta(self, a: Tensor, context: Tensor | None) -> Tensor:
        return torch.full_like(super().theta(a, context), 0.3)


class FixedAutoregressive(Autoregressive):
    def theta(self, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.full_like(super().theta(x, context), 0.3)


class Doubled(InvertibleLinear):
    def weight(self) -> Tensor:
        return 2 * super().weight()


GROUPS = torch.arange(4)


SUBCLASSES: dict[str, Callable[[], Bijection]] = {
    "coupling": lambda: FixedCoupling(4, False, MLP(2, [8], 4, "relu")),
    "autoregressive": lambda: FixedAutoregressive(GROUPS, MaskedMLP(GROUPS, [8], GROUPS.repeat(2))),
    "linear": lambda: Doubled(4),
}


@pytest.mark.parametrize("name", SUBCLASSES)
@pytest.mark.parametrize("rows", [3, ROWS])
def test_methods_of_a_subclass_are_used_without_gradients(name: str, rows: int) -> None:
    bijection = SUBCLASSES[name]()
    x = torch.randn(rows, 4)
    expected = bijection.forward(x)[0].detach(), bijection.inverse(x)[0].detach()
    with torch.no_grad():
        found = bijection.forward(x)[0], bijection.inverse(x)[0]
    torch.testing.assert_close(found, expected)


class Moved:
    """A mixin that adds 1 on the side of the data."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, context)  # type: ignore[misc]
        return x + 1, log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().inverse(x - 1, context)  # type: ignore[misc]
        return found


class MovedNorm(Moved, ActNorm): ...


class MovedLinear(Moved, InvertibleLinear): ...


class MovedChain(Moved, TableChain): ...


class LinearWithOwnInverse(InvertibleLinear):
    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, context)
        return x + 1, log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(x - 1, context)


MOVED: dict[str, Callable[[], Bijection]] = {
    "norm": lambda: MovedNorm(4),
    "linear": lambda: MovedLinear(4),
    "chain": lambda: MovedChain([ActNorm(4), HalfCoupling(4, False, MLP(2, [8], 4))]),
    "without a mixin": lambda: LinearWithOwnInverse(4),
}


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_maps_without_log_determinants_use_the_methods_of_a_subclass(name: str, with_gradients: bool) -> None:
    bijection, x = MOVED[name](), torch.randn(3, 4)
    with torch.set_grad_enabled(with_gradients):
        torch.testing.assert_close(bijection.map_forward(x), bijection.forward(x)[0])
        torch.testing.assert_close(bijection.map_inverse(x), bijection.inverse(x)[0])
        torch.testing.assert_close(bijection.map_forward(bijection.map_inverse(x)), x)


class Unflattened(Bijection):
    """Maps vectors at the base (B, 8) to images (B, 2, 2, 2)."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.view(-1, 2, 2, 2), z.new_zeros(len(z))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, 8), x.new_zeros(len(x))


# torch warns about the transpose of images
@pytest.mark.filterwarnings("error")
def test_layers_of_images_in_a_chain_of_vectors() -> None:
    torch.manual_seed(0)
    layers = [
        HalfCoupling(8, False, MLP(4, [8], 8)),
        Unflattened(),
        ActNorm(2),
        HalfCoupling(2, True, ConvNet(1, [4], 2)),
    ]
    chain, plain = TableChain(layers), Chain(layers)
    for p in chain.parameters():
        nn.init.normal_(p, std=0.3)
    z = torch.randn(3, 8)
    with torch.no_grad():
        x = chain.forward(z)
        torch.testing.assert_close(x, plain.forward(z))
        torch.testing.assert_close(chain.inverse(x[0]), plain.inverse(x[0]))


def test_the_steps_of_samples_follow_the_network() -> None:
    one = Autoregressive(GROUPS, MaskedMLP(GROUPS, [8], GROUPS.repeat(2)))
    with torch.no_grad():
        one.forward(torch.randn(5, 4))
    one.conditioner = MaskedMLP(GROUPS, [16, 16], GROUPS.repeat(2))
    for p in one.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(5, 4)
    with torch.no_grad():
        again = one.forward(one.inverse(x)[0])[0]
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
