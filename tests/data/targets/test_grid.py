"""Densities on a grid, for a Gaussian whose integral and distribution function are known."""

import math

import pytest
import torch
from scipy import stats

from flowtrain.data.targets.grid import GridDensity, log_normal


def test_integral_and_samples_of_a_gaussian() -> None:
    grid = GridDensity(lambda x: 7 - 0.5 * ((x - 1) / 0.5).square(), -9.0, 9.0)
    assert grid.log_z == pytest.approx(7 + math.log(0.5 * math.sqrt(2 * math.pi)), abs=1e-12)
    x = grid.sample(20_000, torch.Generator().manual_seed(0))
    assert stats.kstest(x.numpy(), stats.norm(1, 0.5).cdf).pvalue > 1e-3
    # points are also random inside of a cell
    assert len(x.unique()) == len(x)


def test_log_normal_equals_scipy() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert log_normal(x, 0.5, 2.0).tolist() == pytest.approx(stats.norm.logpdf(x.numpy(), 0.5, 2.0).tolist())
    std = torch.linspace(1, 2, 7, dtype=torch.float64)
    assert log_normal(x, x + 1, std).tolist() == pytest.approx(stats.norm.logpdf(-1, 0, std.numpy()).tolist())
