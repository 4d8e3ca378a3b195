"""Weighted means, standard errors and resampled rows, compared with repeated rows and with repeated experiments."""

import numpy as np
import pytest
import torch

from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.weighting import average, cancelled, effective_rows, equal_rows, resample, stderr


def test_an_integer_weight_counts_as_repeated_rows() -> None:
    values, k = torch.randn(60), torch.randint(0, 5, (60,))
    repeated = values.repeat_interleave(k)
    assert float(average(values, k / 7.0)) == pytest.approx(float(repeated.mean()), rel=1e-12)
    rows = resample(k / 7.0, int(k.sum()))
    torch.testing.assert_close(rows, torch.arange(60).repeat_interleave(k))


def test_rows_of_weight_0_have_no_effect() -> None:
    values, weights = torch.randn(20), torch.rand(20) + 0.1
    worse = torch.cat([values, torch.tensor([torch.inf, torch.nan, -torch.inf])])
    extended = torch.cat([weights, torch.zeros(3)])
    assert float(average(worse, extended)) == pytest.approx(float(average(values, weights)))
    assert stderr(worse, extended) == pytest.approx(stderr(values, weights))
    assert effective_rows(extended) == pytest.approx(effective_rows(weights))
    assert int(resample(extended).max()) < 20


def test_equal_weights_give_the_unweighted_standard_error() -> None:
    values = torch.randn(11)
    assert stderr(values, torch.full((11,), 3.0)) == pytest.approx(stderr(values), rel=1e-12)
    assert effective_rows(torch.full((11,), 1e200)) == pytest.approx(11)
    assert np.isnan(stderr(values[:1], torch.ones(1)))
    assert np.isnan(stderr(values, (torch.arange(11) == 3).double()))


@pytest.mark.parametrize("signed", [False, True])
def test_standard_error_is_the_deviation_over_repeated_experiments(signed: bool) -> None:
    """The weights depend on the values, as importance weights do."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        x = rng.normal(size=200)
        w = np.exp(0.7 * x) - (0.6 * (rng.random(200) < 0.3) if signed else 0.0)
        means.append(float(average(torch.from_numpy(x), torch.from_numpy(w))))
        errors.append(stderr(torch.from_numpy(x), torch.from_numpy(w)))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.06)


def test_resampling_keeps_equal_weights_and_rounds_others() -> None:
    torch.testing.assert_close(resample(torch.full((1000,), 0.1)), torch.arange(1000))
    weights = torch.rand(500) ** 4
    counts = torch.bincount(resample(weights, 2000), minlength=500)
    assert float((counts - 2000 * weights / weights.sum()).abs().max()) < 1 + 1e-9
    # rows with periodic weights, of which only a part is drawn, are not aliased
    periodic = torch.bincount(resample(torch.ones(4000), 1000) % 4, minlength=4)
    assert int(periodic.min()) > 150


def test_equal_rows_have_the_weighted_distribution() -> None:
    """Standard normal values with weights exp(x) have the distribution N(1, 1)."""
    x = torch.randn(20_000)
    found = equal_rows(x, x.exp(), 5000)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(found.std()) == pytest.approx(1.0, abs=0.1)
    # a background that is subtracted leaves the signal
    signal, background = torch.randn(20_000), 4 * torch.rand(10_000)
    values = torch.cat([signal, background, 4 * torch.rand(10_000)])
    w = torch.cat([torch.ones(30_000), -torch.ones(10_000)])
    assert float((equal_rows(values, w, 1000) < 0).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_cancelled_weights_are_not_negative_and_keep_their_sum_in_each_region() -> None:
    x = torch.cat([torch.randn(400, 2), 100 + torch.randn(200, 2)])
    w = torch.where(torch.arange(600) % 4 == 0, -0.7, 1.0)
    found = cancelled(x, w)
    assert float(found.min()) >= 0
    for region in (slice(0, 400), slice(400, 600)):
        assert float(found[region].sum()) == pytest.approx(float(w[region].sum()))
    with pytest.raises(FlowtrainError):
        cancelled(x, -w)
