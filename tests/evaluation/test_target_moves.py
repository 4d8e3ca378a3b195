"""Moved samples: the missed part of log Z against closed forms, and no missed part for flows that cover the target."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.support import ToSupport
from flowtrain.data.targets.base import FunctionTarget, Target
from flowtrain.data.targets.funnel import Funnel
from flowtrain.data.types import ColumnType
from flowtrain.evaluation import evaluate_target
from flowtrain.evaluation.log_weights import weighted_samples
from flowtrain.evaluation.target_moves import Moved, moved_samples
from flowtrain.flow import Flow

pytestmark = pytest.mark.usefixtures("propagate_logs")


class ToFunnel(Bijection):
    """The map from N(0, I) to the funnel, or to its part with v > `least`: v = least + softplus(3 z_1 - least)."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = 3 * z[:, 0] - self.least
        s = (self.least + F.softplus(y)) / 2
        x = torch.cat([2 * s[:, None], s[:, None].exp() * z[:, 1:]], 1)
        return x, math.log(3) + F.logsigmoid(y) + (z.shape[1] - 1) * s

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = x[:, 0] / 2
        # NaN for v < least, where the density is 0
        y = torch.log(torch.expm1(2 * s - self.least))
        z = torch.cat([(y[:, None] + self.least) / 3, (-s[:, None]).exp() * x[:, 1:]], 1)
        log_det = -math.log(3) - F.logsigmoid(y) - (x.shape[1] - 1) * s
        return z.nan_to_num(0.0), log_det.nan_to_num(-math.inf)


def lognormal() -> Flow:
    types = [ColumnType.parse("positive", "types")]
    return Flow((1,), Chain([Affine(1), ToSupport([0.0], [math.inf])]), types=types)


def normal(d: int, std: float) -> Flow:
    flow = Flow((d,), Affine(d))
    with torch.no_grad():
        flow.bijection.log_diagonal.fill_(math.log(std))  # type: ignore[union-attr,operator]
    return flow


def log_normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(1)


def without_gradient(x: Tensor) -> Tensor:
    return log_normal(x).detach()


def moved(flow: Flow, target: Target, seed: int = 0, n: int = 20_000) -> Moved:
    with torch.no_grad():
        drawn = weighted_samples(flow, target, n, seed)
        found = moved_samples(flow, target, drawn, drawn.log_w, seed)
    assert found is not None
    return found


@pytest.mark.parametrize("log_density", [log_normal, without_gradient])
def test_positive_flow_misses_half_of_a_normal_density(log_density: Callable[[Tensor], Tensor]) -> None:
    found = moved(lognormal(), FunctionTarget(log_density, 1))
    assert found.missed == pytest.approx(math.log(2), abs=4 * found.stderr)
    assert found.stderr < 0.05


@pytest.mark.parametrize("log_density", [log_normal, without_gradient])
def test_covered_density_has_no_missed_part(log_density: Callable[[Tensor], Tensor]) -> None:
    found = [moved(normal(3, 1.3), FunctionTarget(log_density, 3), seed, 5000) for seed in range(30)]
    scores = torch.tensor([one.missed / one.stderr for one in found])
    assert abs(float(scores.mean())) < 3 / math.sqrt(30)
    assert 0.6 < float(scores.std()) < 1.5


def test_covered_density_with_bounds_has_no_missed_part() -> None:
    """The gamma density x exp(-x) for x > 0."""
    target = FunctionTarget(lambda x: x[:, 0].log() - x[:, 0], 1, types=["positive"])
    found = [moved(lognormal(), target, seed, 5000) for seed in range(20)]
    scores = torch.tensor([one.missed / one.stderr for one in found])
    assert abs(float(scores.mean())) < 3 / math.sqrt(20)


def test_check_fails_for_a_missed_neck_and_passes_for_the_whole_funnel(caplog: pytest.LogCaptureFixture) -> None:
    whole = evaluate_target(Flow((10,), ToFunnel(-30.0)), Funnel(), 20_000)
    assert whole.failed == []
    caplog.clear()
    missed = evaluate_target(Flow((10,), ToFunnel(-3.0)), Funnel(), 20_000)
    checks = {one.name: one for one in missed.checks}
    # the part with v < -3 has 16% of the mass, and ESS, k and samples in the tails do not show that it is missing
    assert missed.log_z == pytest.approx(math.log(0.8413), abs=0.01)
    assert missed.ess > 0.9
    assert checks["pareto_k"].passed
    assert checks["tails"].passed
    assert checks["moves"].passed is False
    assert checks["moves"].value is not None
    assert 0.02 < checks["moves"].value < -missed.log_z
    assert "moves" in caplog.text


def test_too_few_effective_samples() -> None:
    target = FunctionTarget(lambda x: -50 * (x - 5).square().sum(1), 4)
    with torch.no_grad():
        drawn = weighted_samples(normal(4, 1.0), target, 500, 0)
        assert moved_samples(normal(4, 1.0), target, drawn, drawn.log_w, 0) is None
