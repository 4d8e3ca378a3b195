"""Initialization of bijections: buffers, bounds, and parameters fitted to the first data."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.flows import perturbed
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.columns import OnColumns
from flowtrain.bijections.linear import Affine, ContextShift, FromGaussian, Permutation
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.bijections.squeeze import Squeeze
from flowtrain.models.realnvp import realnvp
from flowtrain.utils.errors import DataError, FlowtrainError


def test_state_dict_contains_the_permutation() -> None:
    """If the permutation were not a buffer, a loaded flow would draw another permutation."""
    torch.manual_seed(1)
    trained = perturbed(realnvp((9,), mixing="permutation").bijection)
    torch.manual_seed(2)
    loaded = realnvp((9,), mixing="permutation").bijection
    x = torch.randn(5, 9)
    assert not torch.allclose(loaded.inverse(x)[0], trained.inverse(x)[0])
    loaded.load_state_dict(trained.state_dict())
    torch.testing.assert_close(loaded.inverse(x), trained.inverse(x), rtol=0, atol=0)


def test_actnorm_initialization_standardizes_the_latents() -> None:
    x = 3 * torch.randn(5000, 4) + torch.arange(4)
    bijection = perturbed(Chain([ActNorm(4), Permutation(torch.randperm(4)), Affine(4)]))
    bijection.initialize(x)
    z = bijection.map_inverse(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActNorm(3),
        lambda: BatchNorm(3),
        lambda: Affine(3),
        lambda: Chain([Affine(3), ActNorm(3)]),
        lambda: realnvp((3,), layers=2, hidden=(4,), batch_norm=True).bijection,
        lambda: FromGaussian(Affine(3), 3, diagonal=True),
    ],
)
def test_integer_weights_initialize_as_repeated_rows(make: Callable[[], Bijection]) -> None:
    x, k = 3 * torch.randn(50, 3) @ torch.randn(3, 3) + 5, torch.randint(0, 4, (50,))
    torch.manual_seed(0)
    weighted = make()
    repeated = copy.deepcopy(weighted)
    kept = k > 0
    z = weighted.initialize(x[kept], None, k[kept] / 1.7)
    expected = repeated.initialize(x.repeat_interleave(k, 0))
    for key, value in weighted.state_dict().items():
        torch.testing.assert_close(value, repeated.state_dict()[key], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z.repeat_interleave(k[kept], 0), expected, rtol=1e-9, atol=1e-9)


def test_integer_weights_give_the_regression_on_the_context_of_repeated_rows() -> None:
    x, c, k = torch.randn(50, 3), torch.randn(50, 2), torch.randint(1, 4, (50,))
    x[:, :2] += c
    weighted = OnColumns(ContextShift(2, classes=2), [0, 2])
    repeated = copy.deepcopy(weighted)
    weighted.initialize(x, c, k / 3)
    repeated.initialize(x.repeat_interleave(k, 0), c.repeat_interleave(k, 0))
    torch.testing.assert_close(weighted.inner.embedding, repeated.inner.embedding)
    assert float(weighted.inner.embedding[0, 0].detach()) == pytest.approx(1.0, abs=0.5)


def test_images_are_initialized_with_weights() -> None:
    x, k = torch.randn(20, 2, 4, 4).cumsum(-1), torch.randint(1, 4, (20,))
    weighted = Squeeze(ActNorm(8))
    repeated = copy.deepcopy(weighted)
    weighted.initialize(x, None, k.double())
    repeated.initialize(x.repeat_interleave(k, 0))
    torch.testing.assert_close(weighted.state_dict(), repeated.state_dict())


def test_chunked_initialization_equals_initialization_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, label = torch.randn(30, 1, 4, 4), torch.arange(30) % 3
    flow = perturbed(realnvp((1, 4, 4), layers=2, hidden=(4,), conditional=True, classes=3).bijection)
    whole = flow.initialize(x, label)
    monkeypatch.setattr("flowtrain.bijections.base.PART", 7 * 16)
    torch.testing.assert_close(flow.initialize(x, label), whole)


class CountedShift(Bijection):
    """A shift that counts the rows passed to its inverse."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.rows = shift, 0

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z + self.shift, z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.rows += len(x)
        return x - self.shift, x.new_zeros(len(x))


@pytest.mark.parametrize(("shift", "rows"), [(0.0, 7), (1.0, 30)])
def test_identity_check_uses_only_the_first_rows(monkeypatch: pytest.MonkeyPatch, shift: float, rows: int) -> None:
    monkeypatch.setattr("flowtrain.bijections.base.PART", 7 * 2)
    x, seen = torch.randn(30, 2), CountedShift(shift)
    torch.testing.assert_close(seen.initialize(x), x - shift, rtol=0, atol=0)
    assert seen.rows == rows


@pytest.mark.parametrize("batch_norm", [False, True])
def test_initialization_is_the_same_without_the_identity_shortcut(
    monkeypatch: pytest.MonkeyPatch, batch_norm: bool
) -> None:
    monkeypatch.setattr("flowtrain.bijections.base.PART", 7 * 16)
    x, label = torch.randn(30, 1, 4, 4), torch.arange(30) % 3
    model = realnvp((1, 4, 4), layers=2, hidden=(4,), conditional=True, classes=3, batch_norm=batch_norm).bijection
    other = copy.deepcopy(model)
    z = model.initialize(x, label)
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    torch.testing.assert_close(other.initialize(x, label), z, rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_affine_initialization_equals_the_maximum_likelihood_gaussian() -> None:
    x = torch.randn(400, 3) @ torch.randn(3, 3) + 5
    bijection = Affine(3)
    bijection.initialize(x)
    factor = bijection.factor()
    torch.testing.assert_close(factor @ factor.T, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-4)
    z, log_det = bijection.inverse(x)
    standard = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    gaussian = torch.distributions.MultivariateNormal(bijection.mean, scale_tril=factor)
    torch.testing.assert_close(standard.log_prob(z) + log_det, gaussian.log_prob(x))


def test_affine_initialization_is_finite_for_collinear_columns() -> None:
    x = torch.randn(100, 1).expand(100, 3)
    bijection = Affine(3)
    bijection.initialize(x)
    assert torch.isfinite(bijection.inverse(x)[0]).all()


def test_standardize_refuses_a_constant_column() -> None:
    with pytest.raises(DataError, match=r"\[1\]"):
        Standardize((2,)).fit(torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_coupling_scale_is_bounded() -> None:
    coupling = next(iter(realnvp((2,), layers=1, actnorm=False, cap=1.5).bijection))  # type: ignore[call-overload]
    with torch.no_grad():
        for p in coupling.parameters():
            p.mul_(0).add_(50.0)
    assert coupling.forward(torch.randn(10, 2))[1].abs().max() <= 1.5


def bijections_with_statistics(d: int) -> dict[str, Bijection]:
    return {
        "actnorm": ActNorm(d),
        "batchnorm": BatchNorm(d),
        "affine": Affine(d),
        "chain": Chain([Affine(d), BatchNorm(d), ActNorm(d)]),
    }


@pytest.mark.parametrize("name", list(bijections_with_statistics(2)))
def test_failed_initialization_leaves_the_bijection_unchanged(name: str) -> None:
    bijection = perturbed(bijections_with_statistics(2)[name])
    before = {k: v.clone() for k, v in bijection.state_dict().items()}
    hostile = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [4.0, torch.inf]])
    for x, words in ((torch.zeros(0, 2), "no rows"), (hostile, "NaN or infinite")):
        with pytest.raises(FlowtrainError, match=words):
            bijection.initialize(x)
    for key, value in bijection.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", list(bijections_with_statistics(2)))
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initialization_from_equal_rows_uses_unit_scale(name: str, rows: int, dtype: torch.dtype) -> None:
    bijection = bijections_with_statistics(2)[name].to(dtype)
    x = torch.tensor([[0.1, -3e6]], dtype=dtype).expand(rows, 2)
    z = bijection.initialize(x)
    torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=0.5)
    moved, log_det = bijection.eval().inverse(x + 1)
    torch.testing.assert_close(moved, z + 1, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-4)


def test_empty_batch_does_not_change_running_statistics() -> None:
    flow = perturbed(realnvp((4,), layers=2, hidden=(4,), batch_norm=True).bijection).train()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    z, log_det = flow.inverse(torch.zeros(0, 4))
    (z.sum() + log_det.sum()).backward()
    for key, value in flow.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in flow.parameters() if p.grad is not None)


def test_constant_column_does_not_affect_other_columns() -> None:
    x = torch.stack([torch.full((500,), 2.0), 3 * torch.randn(500) + 1], 1)
    for name, bijection in bijections_with_statistics(2).items():
        bijection.initialize(x)
        z = bijection.eval().inverse(x)[0]
        torch.testing.assert_close(z[:, 0], torch.zeros(500), rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(z[:, 1].std(correction=0), torch.tensor(1.0), rtol=1e-4, atol=0, msg=name)


def test_standardize_refuses_a_nan_mean() -> None:
    standardize = Standardize((2,))
    with pytest.raises(DataError, match="mean"):
        standardize.fit(torch.tensor([1.0, torch.nan]), torch.ones(2))
    assert torch.equal(standardize.mean, torch.zeros(2))
