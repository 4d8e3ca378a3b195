"""Sliced Wasserstein distances against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.data.moons import Moons
from flowtrain.divergence import TraceRule
from flowtrain.errors import ConfigError
from flowtrain.fields.layered import Given
from flowtrain.fields.mlp import MLPField
from flowtrain.flow import Flow
from flowtrain.quality import quality, sliced_wasserstein
from flowtrain.solvers import ode_solver


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


def test_samples_are_of_the_classes_of_the_data() -> None:
    """A field that moves class 0 to -5 and class 1 to 5, and data that are nearly all of class 0."""
    field = MLPField(2, [8], "concat", "tanh", classes=2)
    flow = Flow((2,), Chain([Continuous(ByClass(field), ode_solver("dopri5"), TraceRule("exact"))]), classes=2)
    data = Moons(n_val=400, n_test=400)
    data.classes = 2
    label = (torch.arange(400) % 20 == 0).long()
    data.val_labels = data.test_labels = label
    shift = (10.0 * label - 5).unsqueeze(1)
    data.val, data.test = torch.randn(400, 2) + shift, torch.randn(400, 2) + shift
    found = quality(flow, data, [1])
    assert found.exact.sliced_wasserstein < 0.4
    assert found.data < 0.4
    # and afterwards the flow has its own solver again
    assert flow.solver is not None
    assert flow.solver.method == "dopri5"


class ByClass(MLPField):
    def __init__(self, field: MLPField) -> None:
        super().__init__(2, [8], "concat", "tanh", classes=2)

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        assert shift is not None
        return shift[..., :2] + 0 * x

    def given(self, label: Tensor) -> Given:
        return Given(self, (10.0 * label - 5).unsqueeze(1).expand(-1, 2))


def test_a_discrete_flow_takes_no_steps() -> None:
    with pytest.raises(ConfigError, match="takes no steps"):
        quality(Flow((2,), Chain([Affine(2)])), Moons(n_val=10, n_test=10), [1])
