"""The shrunk covariance: agreement with scikit-learn, and cases where scikit-learn's is not positive definite."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from flowtrain.bijections import linear
from flowtrain.bijections.linear import GaussianStart, gaussian_log_prob, shrunk_covariance
from flowtrain.utils.errors import DataError


def correlated(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 3.0


@pytest.mark.parametrize(("n", "d"), [(5, 3), (20, 10), (30, 50), (1000, 4)])
def test_shrunk_covariance_equals_scikit_learn_ledoit_wolf(n: int, d: int) -> None:
    x = correlated(n, d)
    mean, shrunk = shrunk_covariance(x)
    std = x.std(0, correction=0)
    expected = LedoitWolf().fit(((x - x.mean(0)) / std).numpy()).covariance_
    assert torch.allclose(mean, x.mean(0))
    assert np.allclose((shrunk / std / std[:, None]).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_shrunk_covariance_is_independent_of_units_and_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(50, 4)
    unit = torch.tensor([1e-120, 1.0, 1e6, 1e150], dtype=torch.float64)
    shift = torch.tensor([0.0, 1e6, -1e3, 0.0], dtype=torch.float64)
    _, shrunk = shrunk_covariance(x)
    monkeypatch.setattr(linear, "_COVARIANCE_CHUNK", 28)
    mean, moved = shrunk_covariance(unit * x + shift)
    assert torch.allclose(moved / unit / unit[:, None], shrunk, rtol=1e-6)
    assert torch.allclose((mean - shift) / unit, x.mean(0), rtol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(1, 2), (2, 1), (2, 300), (3, 2), (40, 100)])
def test_shrunk_covariance_of_few_rows_is_positive_definite(n: int, d: int) -> None:
    x = correlated(n, d).float()
    x = torch.cat([x, x[:, :1], torch.full((n, 1), 0.1)], 1)
    mean, shrunk = shrunk_covariance(x)
    assert shrunk.dtype == mean.dtype == torch.float64
    assert torch.linalg.eigvalsh(shrunk)[0] > 0
    assert gaussian_log_prob(x, mean, shrunk).isfinite().all()


def test_shrunk_covariance_converges_to_the_covariance() -> None:
    x = correlated(200_000, 3).float()
    _, shrunk = shrunk_covariance(x)
    exact = torch.cov(x.T.double())
    assert torch.allclose(shrunk, exact, rtol=1e-3, atol=1e-3 * exact.abs().max())


def test_constant_column_is_uncorrelated() -> None:
    x = torch.cat([correlated(30, 2), torch.full((30, 1), 1e9 / 3, dtype=torch.float64)], 1)
    _, shrunk = shrunk_covariance(x)
    assert shrunk[2].tolist() == [0, 0, 1]
    assert torch.allclose(shrunk[:2, :2], shrunk_covariance(x[:, :2])[1])


def test_empty_input_is_refused() -> None:
    with pytest.raises(DataError):
        shrunk_covariance(torch.empty(0, 2))


def test_log_prob_matches_scipy() -> None:
    x = correlated(20, 3)
    mean, shrunk = shrunk_covariance(x)
    expected = multivariate_normal(mean.numpy(), shrunk.numpy()).logpdf(x.numpy())
    assert np.allclose(gaussian_log_prob(x, mean, shrunk).numpy(), expected)


def test_gaussian_start_inverse_is_accurate_in_float64() -> None:
    torch.manual_seed(0)
    start = GaussianStart(4).float()
    root = torch.randn(4, 4, dtype=torch.float64)
    start.fit(torch.zeros(4), root @ root.T + 1e-4 * torch.eye(4, dtype=torch.float64))
    single, exact = copy.deepcopy(start), copy.deepcopy(start).double()
    z = torch.randn(50, 4, dtype=torch.float64)
    x, log_det = exact(z)
    again, log_det_back = exact.inverse(x)
    torch.testing.assert_close(again, z, rtol=1e-11, atol=1e-11)
    jacobian = torch.autograd.functional.jacobian(lambda row: exact(row.unsqueeze(0))[0][0], z[0])
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det_back, -log_det)
    # the density in float64 is close to the density in float32
    torch.testing.assert_close(exact.inverse(x)[0].float(), single.inverse(x.float())[0], rtol=1e-3, atol=1e-3)


def test_weights_give_the_moments_of_repeated_rows_and_shrink_by_effective_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, k = correlated(60, 4), torch.arange(60) % 4
    mean, shrunk = shrunk_covariance(x, k / 3)
    repeated = x.repeat_interleave(k, 0)
    assert torch.allclose(mean, repeated.mean(0))
    std = repeated.std(0, correction=0)
    assert torch.allclose(shrunk.diagonal().sqrt(), std)
    correlation, found = torch.corrcoef(repeated.T), shrunk / std / std[:, None]
    kept = found.triu(1)[0, 1] / correlation[0, 1]
    off = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(found[off], kept * correlation[off])
    # fewer effective rows than repeated rows give a stronger shrinkage
    assert float(kept) < float(shrunk_covariance(repeated)[1][0, 1] / std[0] / std[1] / correlation[0, 1])
    monkeypatch.setattr(linear, "_COVARIANCE_CHUNK", 28)
    assert torch.allclose(shrunk_covariance(x, k / 3)[1], shrunk)
    assert torch.allclose(shrunk_covariance(x, torch.full((60,), 0.5))[1], shrunk_covariance(x)[1])


def test_covariance_of_signed_weights_is_positive_definite() -> None:
    x = torch.cat([correlated(50, 3), correlated(40, 3, seed=1)])
    weights = torch.cat([torch.ones(50), torch.full((40,), -0.7)])
    mean, covariance = shrunk_covariance(x, weights)
    assert float(torch.linalg.eigvalsh(covariance).min()) > 0
    assert bool(gaussian_log_prob(x, mean, covariance).isfinite().all())
    affine = linear.Affine(3).double()
    affine.initialize(x, None, weights)
    assert bool(affine.factor().isfinite().all())
