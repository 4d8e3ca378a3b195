"""Sliced Wasserstein distances against closed forms."""

import math

import pytest
import torch

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Chain
from flowtrain.data.moons import Moons
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow
from flowtrain.quality import quality, sliced_wasserstein


def test_a_shift_moves_every_projection_by_its_cosine() -> None:
    """SW_2^2(x, x + c) = E <a, c>^2 = |c|^2 / d."""
    x, c = torch.randn(500, 3), torch.tensor([1.0, -2.0, 0.5])
    found = sliced_wasserstein(x, x + c, projections=20_000)
    assert found == pytest.approx(float(c.norm()) / math.sqrt(3), rel=0.02)


def test_gaussians_of_two_scales() -> None:
    """W_2 of N(0, 1) and N(0, s^2) is |s - 1|, and so is every projection's, whatever the order of the rows."""
    x = torch.randn(20_000, 2)
    y = 1.5 * torch.randn(20_000, 2)
    assert sliced_wasserstein(x, y) == pytest.approx(0.5, rel=0.05)
    assert sliced_wasserstein(x, x[torch.randperm(len(x))]) == 0


def test_it_is_symmetric_seeded_and_leaves_randomness_alone() -> None:
    x, y = torch.randn(50, 1, 2, 2), torch.randn(50, 1, 2, 2)
    state = torch.get_rng_state()
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(y, x), rel=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_discrete_flow_takes_no_steps() -> None:
    with pytest.raises(ConfigError, match="takes no steps"):
        quality(Flow((2,), Chain([Affine(2)])), Moons(n_val=10, n_test=10), [1])
