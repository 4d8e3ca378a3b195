"""Tails of importance weights: the shape of known tails, and the mass beyond the largest weight."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flowtrain.evaluation.pareto import generalized_pareto, weight_tail


def draws(k: float, n: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Exact draws of a generalized Pareto distribution, by SciPy."""
    return torch.tensor(stats.genpareto.rvs(k, scale=scale, size=n, random_state=np.random.default_rng(seed)))


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_shape_of_generalized_pareto_draws(k: float) -> None:
    x = draws(k, 4000, scale=2.5)
    found, scale = generalized_pareto(x)
    # the standard error of the maximum likelihood estimate is (1 + k) / sqrt(n)
    assert found == pytest.approx(k, abs=4 * (1 + k) / 4000**0.5)
    assert scale == pytest.approx(2.5, rel=0.12)
    likely, _, _ = stats.genpareto.fit(x.numpy(), floc=0)
    assert found == pytest.approx(likely, abs=0.01)
    # values times 2^10 have the same shape, and 2^10 times the scale
    again, larger = generalized_pareto(1024 * x)
    assert again == pytest.approx(found, abs=1e-9)
    assert larger == pytest.approx(1024 * scale, rel=1e-9)


def test_tail_has_the_largest_weights_and_a_prior() -> None:
    n, m = 2000, 135  # ceil(3 sqrt(2000))
    w = draws(0.5, n) + 1
    tail = weight_tail(w[torch.randperm(n)])
    assert tail is not None
    order = np.sort(w.numpy())
    assert (tail.cutoff, tail.largest) == (order[-m - 1], order[-1])
    k, scale = generalized_pareto(torch.tensor(order[-m:] - order[-m - 1]))
    assert (tail.k, tail.scale) == (pytest.approx((m * k + 5) / (m + 10)), pytest.approx(scale))


@pytest.mark.parametrize("k", [0.2, 0.5])
def test_missed_mass_above_the_largest_weight_agrees_in_the_median(k: float) -> None:
    """The median over repetitions agrees with E[(w - mean) 1(w > w_max)], which is known for Pareto weights."""
    n, expected, found = 1000, [], []
    for seed in range(200):
        w = draws(k, n, seed)
        tail = weight_tail(w)
        assert tail is not None
        m = float(w.max())
        survival = (1 + k * m) ** (-1 / k)
        expected.append(survival * (m + (1 + k * m) / (1 - k) - 1 / (1 - k)))
        found.append(tail.missed(1 / (1 - k)))
    assert np.median(found) == pytest.approx(np.median(expected), rel=0.35)


def test_few_weights_have_no_tail_and_equal_weights_have_k_zero() -> None:
    assert weight_tail(torch.rand(20)) is None
    equal = weight_tail(torch.full((100,), 3.0))
    assert equal is not None
    assert (equal.k, equal.missed(3.0)) == (0.0, 0.0)
    # weights of 0 are allowed
    mixed = weight_tail(torch.cat([torch.zeros(500), draws(0.3, 500)]))
    assert mixed is not None
    assert np.isfinite(mixed.k)
