"""Ensembles: density and samples of a mixture of flows, and its weights from EM."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flows import images, vectors
from numpy.typing import NDArray
from scipy import integrate, optimize
from torch import Tensor

from flowtrain import Ensemble, Flow
from flowtrain.bijections import Affine, Bijection, Chain
from flowtrain.data.base import Samples
from flowtrain.data.context import ContextColumn
from flowtrain.models.ensemble import sparse_weights, stacking_weights
from flowtrain.utils.errors import DataError, FlowtrainError, NonFiniteError

NAMES = ["ffjord", "realnvp", "glow"]
WEIGHTS = [0.2, 0.5, 0.3]


def members(classes: int | None = None, standardized: bool = True) -> list[Flow]:
    return [vectors(name, standardized, classes) for name in NAMES]


def gaussian(mean: float, d: int = 2) -> Flow:
    flow = Flow((d,), Affine(d)).eval()
    torch.nn.init.constant_(flow.bijection.mean, mean)
    return flow


class Nowhere(Bijection):
    """A map whose log-determinant is NaN for positive values."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.where(x[:, 0] > 0, torch.nan, 0.0)


@pytest.mark.parametrize("classes", [None, 3])
def test_log_prob_and_gradients_equal_the_mixture_density(classes: int | None) -> None:
    flows = members(classes)
    ensemble = Ensemble(flows, [2 * w for w in WEIGHTS]).eval()
    x = torch.randn(6, 2, requires_grad=True)
    label = None if classes is None else torch.tensor([0, 1, 2, 2, 1, 0])
    found = ensemble.log_prob(x, label)
    p = sum(w * flow.log_prob(x, label).exp() for w, flow in zip(WEIGHTS, flows, strict=True))
    assert isinstance(p, Tensor)
    torch.testing.assert_close(found, p.log())
    inputs = [x, *flows[1].parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (found, p.log())), strict=True):
        torch.testing.assert_close(a, b)
    again = copy.deepcopy(ensemble)
    torch.testing.assert_close(again.log_prob(x, label), found)
    assert len(ensemble.state_dict()) == sum(len(flow.state_dict()) for flow in flows)


def test_arrays_and_data_frames_give_arrays() -> None:
    ensemble, x = Ensemble(members()).eval(), np.random.default_rng(0).normal(size=(7, 2))
    expected = ensemble.log_prob(torch.from_numpy(x)).detach().numpy()
    found = ensemble.log_prob(x)
    assert isinstance(found, np.ndarray)
    # a tensor has gradients, whose kernels round differently
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert ensemble.log_prob(x[:0]).shape == (0,)
    ensemble.record = SimpleNamespace(samples=Samples((2,), columns=("a", "b")))  # type: ignore[assignment]
    frame = SimpleNamespace(columns=["b", "c", "a"], to_numpy=lambda: x[:, [1, 1, 0]])
    np.testing.assert_array_equal(ensemble.log_prob(frame), found)
    torch.testing.assert_close(ensemble.distribution().log_prob(torch.from_numpy(x)), torch.from_numpy(expected))
    assert Ensemble(members()).float().log_prob(torch.zeros(1, 2)).dtype == torch.float32


def test_ensemble_density_integrates_to_one() -> None:
    ensemble = Ensemble([vectors("realnvp", False), gaussian(1.0), vectors("glow", False)], WEIGHTS).eval()
    t = np.linspace(-40, 40, 1201)
    grid = torch.from_numpy(np.stack(np.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2))
    with torch.no_grad():
        p = torch.cat([ensemble.log_prob(part) for part in grid.split(100_000)]).exp().numpy().reshape(len(t), len(t))
    assert integrate.trapezoid(integrate.trapezoid(p, t), t) == pytest.approx(1, abs=2e-3)


def test_members_are_sampled_by_weight() -> None:
    ensemble = Ensemble([gaussian(-50), gaussian(0), gaussian(50), gaussian(1e4)], [*WEIGHTS, 0.0]).eval()
    n = 20_000
    x = ensemble.sample(n)
    which = ((x[:, 0] + 75) / 50).long()
    assert which.max() == 2
    for i, w in enumerate(WEIGHTS):
        of_one = x[which == i]
        assert len(of_one) / n == pytest.approx(w, abs=4 * math.sqrt(w * (1 - w) / n))
        torch.testing.assert_close(of_one.mean(0), torch.full((2,), 50.0 * (i - 1)), atol=0.08, rtol=0)
        torch.testing.assert_close(of_one.std(0), torch.ones(2), atol=0.06, rtol=0)
    # the samples of the members are shuffled
    halves = [part.double().mean() for part in which.chunk(2)]
    assert abs(halves[0] - halves[1]) < 0.05
    # members are far apart, so E[-log p] is the entropy of a member plus the entropy of the weights
    entropy = math.log(2 * math.pi * math.e) - sum(w * math.log(w) for w in WEIGHTS)
    assert -ensemble.log_prob(x).mean().item() == pytest.approx(entropy, abs=0.05)


def test_samples_are_reproducible_for_any_chunk_size() -> None:
    ensemble = Ensemble([vectors("realnvp"), vectors("glow")]).eval()

    def draw(**keys: Any) -> Tensor:
        return ensemble.sample(50, generator=torch.Generator().manual_seed(3), **keys)

    assert torch.equal(draw(), draw())
    torch.testing.assert_close(draw(chunk=7), draw())
    cold = draw(temperature=0.0)
    assert len(cold.unique(dim=0)) == 2
    x = ensemble.rsample(20)
    x.sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())
    with pytest.raises(FlowtrainError):
        ensemble.sample(0)


def test_each_sample_uses_its_label() -> None:
    flows = members(classes=3)
    ensemble = Ensemble(flows[1:], [0.4, 0.6]).eval()
    label = torch.tensor([0, 2] * 1000)
    x = ensemble.sample(2000, label=label)
    for y in (0, 2):
        expected = torch.cat([flow.sample(4000, label=y) * w for flow, w in zip(flows[1:], (0.8, 1.2), strict=True)])
        error = x[label == y].std(0) / math.sqrt(1000) + expected.std(0) / math.sqrt(8000)
        assert ((x[label == y].mean(0) - expected.mean(0)).abs() < 4 * error).all()
    assert ensemble.sample(5).shape == (5, 2)
    assert ensemble.distribution(1).sample((4,)).shape == (4, 2)
    with pytest.raises(FlowtrainError):
        ensemble.log_prob(x)


def test_members_share_the_dequantization_noise() -> None:
    flows = [images("realnvp"), images("glow")]
    ensemble = Ensemble(flows, [0.5, 0.5]).eval()
    x = torch.randint(0, 16, (4, 1, 4, 4))
    torch.manual_seed(5)
    found = ensemble.log_prob(x)
    torch.manual_seed(5)
    noisy = ensemble.dequantized(x)
    torch.testing.assert_close(found, torch.stack([f.log_prob(noisy) for f in flows]).logsumexp(0) - math.log(2))
    assert ensemble.quantized(ensemble.sample(3)).dtype == torch.uint8
    assert ensemble.bits_per_nat == flows[0].bits_per_nat
    with pytest.raises(FlowtrainError):
        ensemble.log_prob(x + 10)


def test_nan_of_a_member_counts_as_zero_density() -> None:
    broken, good = Flow((2,), Nowhere()).eval(), gaussian(0.0)
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    both, one = Ensemble([broken, good], [0.75, 0.25]).log_prob(x), good.log_prob(x)
    torch.testing.assert_close(both, one + torch.tensor([0.0, math.log(0.25)]))
    assert Ensemble([broken, broken]).log_prob(x).isnan().tolist() == [False, True]
    # a member of weight 0 is not evaluated
    torch.testing.assert_close(Ensemble([broken, good], [0.0, 3.0]).log_prob(x), one)


def test_forward_and_inverse_are_refused() -> None:
    ensemble = Ensemble([gaussian(0.0), gaussian(1.0)], names=["runs/a", "runs/b"])
    for call in (ensemble.forward, ensemble.inverse, ensemble):
        with pytest.raises(FlowtrainError, match="ensemble"):
            call(torch.zeros(1, 2))
    assert "runs/b" in repr(ensemble)


ONE = gaussian(0.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ([],),
        ([ONE, torch.nn.Linear(2, 2)],),
        ([ONE, Ensemble([ONE])],),
        ([ONE, gaussian(0.0, 3)],),
        ([ONE, Flow((2,), Affine(2), integer_valued=True)],),
        ([ONE, Flow((2,), Affine(2), noisy=(1,))],),
        ([ONE, Flow((2,), Affine(2), classes=3)],),
        ([ONE, ONE], [1.0]),
        ([ONE, ONE], [1.0, -0.5]),
        ([ONE, ONE], [0.0, 0.0]),
        ([ONE, ONE], [1.0, math.nan]),
        ([ONE, ONE], None, ["a"]),
    ],
)
def test_incompatible_members_or_weights_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(FlowtrainError):
        Ensemble(*arguments)


def test_views_share_parameters_with_the_ensemble() -> None:
    ensemble = Ensemble([vectors("ffjord"), gaussian(0.0)]).eval()
    loose = ensemble.with_solvers(lambda solver: solver.replace(rtol=1e-2, atol=1e-2))
    assert (loose.solver.rtol, ensemble.solver.rtol) == (1e-2, 1e-9)
    x = torch.randn(5, 2)
    assert 0 < (loose.log_prob(x) - ensemble.log_prob(x)).abs().max() < 0.1
    assert {id(p) for p in loose.parameters()} == {id(p) for p in ensemble.parameters()}
    whole = ensemble.with_kind(integer_valued=True)
    assert (whole.integer_valued, ensemble.integer_valued) == (True, False)
    assert whole.sample(2).shape == (2, 2)


def likelihood(w: NDArray[Any], p: NDArray[Any]) -> float:
    return float(-np.log(p @ w).mean())


@pytest.mark.parametrize("seed", range(4))
def test_stacking_weights_maximize_the_likelihood(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # each of the first members fits some rows well, and the last two fit no row well
    log_p = rng.normal(size=(60, 5)) + np.array([0.0, 0.3, -0.2, -4.0, -9.0]) - 300 * rng.random((60, 1))
    found = np.array(stacking_weights(torch.from_numpy(log_p)))
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    best = optimize.minimize(
        likelihood,
        np.full(5, 0.2),
        args=(p,),
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert best.success
    assert likelihood(found, p) < best.fun + 1e-5
    np.testing.assert_allclose(found, best.x, atol=0.01)
    assert found.sum() == pytest.approx(1)
    assert found[4] == 0


def test_stacking_weights_equal_the_closed_form() -> None:
    # only the first member covers the first 7 rows, and only the second covers the other 3
    log_p = torch.full((10, 3), -torch.inf)
    log_p[:7, 0], log_p[7:, 1] = -1.0, -1e4
    log_p[3, 1] = torch.nan
    assert stacking_weights(log_p) == pytest.approx([0.7, 0.3, 0.0], abs=1e-9)
    assert stacking_weights(log_p[:7]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_rows_without_a_finite_member_score_are_refused(value: float) -> None:
    log_p = torch.zeros(10, 2)
    log_p[4] = value
    with pytest.raises(NonFiniteError, match="4"):
        stacking_weights(log_p)
    with pytest.raises(NonFiniteError):
        stacking_weights(log_p[:0])


@pytest.mark.parametrize("change", [lambda e: e.double(), copy.copy, lambda e: e.train().eval()])
def test_ensemble_supports_module_conversions(change: Callable[[Ensemble], Ensemble]) -> None:
    ensemble = Ensemble([vectors("realnvp"), Flow((2,), Chain([Affine(2)]))]).eval()
    x = torch.randn(3, 2)
    torch.testing.assert_close(change(ensemble).log_prob(x), ensemble.log_prob(x))
    assert not any(m.training for m in change(ensemble).modules())


def test_sparse_weights_drop_useless_members() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    near = torch.distributions.Normal(0.02, 1.0)
    log_p = torch.stack([normal.log_prob(x), near.log_prob(x), torch.full_like(x, -math.inf)], 1)
    weights = sparse_weights(log_p)
    assert sorted(weights) == [0.0, 0.0, 1.0]
    assert weights[2] == 0.0
    # two members that cover different rows are both kept
    half = torch.where(x < 0, normal.log_prob(x), -math.inf)
    other = torch.where(x < 0, -math.inf, normal.log_prob(x))
    share = (x < 0).double().mean().item()
    assert sparse_weights(torch.stack([half, other], 1)) == pytest.approx([share, 1 - share], abs=1e-6)
    with pytest.raises(NonFiniteError):
        sparse_weights(torch.full((3, 2), -math.inf))


@pytest.mark.parametrize("fit", [stacking_weights, sparse_weights])
def test_weighted_rows_give_the_weights_of_repeated_rows(fit: Callable[..., list[float]]) -> None:
    log_p, k = torch.randn(40, 3), torch.randint(0, 4, (40,))
    log_p[k == 0] = -torch.inf
    assert fit(log_p, k / 2.0) == pytest.approx(fit(log_p.repeat_interleave(k, 0)), abs=1e-4)
    with pytest.raises(DataError):
        fit(log_p, k - 1.0)


class Shift(Bijection):
    """The map x = z + c."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return z + context, z.new_zeros(len(z))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return x - context, x.new_zeros(len(x))


def test_members_standardise_the_context_each_in_its_way() -> None:
    columns = [(ContextColumn("a", mean=mean, std=std),) for mean, std in ((0.0, 1.0), (4.0, 2.0))]
    ensemble = Ensemble([Flow((1,), Shift(), context=column) for column in columns])
    c = torch.tensor([[6.0], [8.0]])
    log_p = ensemble.log_prob(torch.zeros(2, 1), c)
    # the first member has the mean c, the second has (c - 4) / 2
    normal = torch.distributions.Normal(torch.cat([c, (c - 4) / 2], 1), 1.0)
    torch.testing.assert_close(log_p, normal.log_prob(torch.zeros(2, 1)).logsumexp(1) - math.log(2))
    other = Flow((1,), Shift(), context=(ContextColumn("b"),))
    with pytest.raises(FlowtrainError, match="context"):
        Ensemble([ensemble.flows[0], other])
