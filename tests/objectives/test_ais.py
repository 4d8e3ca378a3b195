"""Annealed importance sampling: unbiased weights, invariance and order of the transitions, gradients, supports."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.flows import VECTORS, flow_of
from torch import Tensor

from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Samples
from flowtrain.data.targets.base import FunctionTarget
from flowtrain.data.types import ColumnType
from flowtrain.flow import Flow
from flowtrain.objectives.ais import Annealing
from flowtrain.ode import AS_CONFIGURED
from flowtrain.utils.errors import ConfigError, DataError

MEAN, SD, LOG_Z = 0.8, 0.8, 1.7


def shifted(x: Tensor) -> Tensor:
    """Z times a Gaussian density with mean MEAN and standard deviation SD in each of two columns."""
    log_p = -0.5 * ((x - MEAN) / SD).square() - math.log(SD) - 0.5 * math.log(2 * math.pi)
    return log_p.sum(1) + LOG_Z


def banana(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0].square() + (x[:, 1] - x[:, 0].square()).square())


def standard_normal(d: int = 2) -> Flow:
    flow = Flow((d,), Standardize((d,), False, ())).double()
    flow.bijection.fit(torch.zeros(d), torch.ones(d), None)
    return flow


def annealing(log_density: Any = shifted, **settings: Any) -> Annealing:
    return Annealing(
        standard_normal(), FunctionTarget(log_density, 2), **{"step_size": 0.3, "transition": "hmc", **settings}
    )


def gaussian_between(b: float) -> tuple[float, float]:
    """Returns mean and standard deviation of the density proportional to N(0, 1)^(1 - b) N(MEAN, SD^2)^b."""
    precision = (1 - b) + b / SD**2
    return b * MEAN / SD**2 / precision, precision**-0.5


def log_integral(alpha: float) -> float:
    """Returns the logarithm of the integral of p~^alpha q^(1 - alpha) over two columns, by a sum over a grid."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    log_q = -0.5 * x.square() - 0.5 * math.log(2 * math.pi)
    log_p = -0.5 * ((x - MEAN) / SD).square() - math.log(SD) - 0.5 * math.log(2 * math.pi)
    one = torch.logsumexp(alpha * log_p + (1 - alpha) * log_q, 0).item() + math.log(24 / 20_000)
    return 2 * one + alpha * LOG_Z


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("transition", ["hmc", "metropolis"])
def test_weights_are_unbiased(alpha: float, transition: str) -> None:
    torch.manual_seed(0)
    found = annealing(alpha=alpha, transition=transition, intermediate=3, leapfrog=3).draw(20_000)
    w = (found.log_w - log_integral(alpha)).exp()
    assert abs(w.mean().item() - 1) < 4 * w.std().item() / math.sqrt(len(w))
    # the weighted mean of x is the mean of the Gaussian p~^alpha q^(1 - alpha)
    errors = w[:, None] * (found.x - gaussian_between(alpha)[0])
    assert bool((errors.mean(0).abs() < 4 * errors.std(0) / math.sqrt(len(w))).all())
    torch.testing.assert_close(found.log_q, standard_normal().log_prob(found.x))


def test_annealing_reduces_the_variance_of_the_weights() -> None:
    spread = []
    for intermediate in (1, 8):
        torch.manual_seed(0)
        spread.append(annealing(intermediate=intermediate, alpha=1.0, step_size=0.5).draw(4000).log_w.std().item())
    assert spread[1] < 0.8 * spread[0]


@pytest.mark.parametrize(("transition", "step"), [("hmc", 1.0), ("metropolis", 1.0)])
def test_transitions_leave_the_intermediate_density_invariant(transition: str, step: float) -> None:
    """40 to 95% of the proposals are accepted, so an error in the acceptance ratio would change the moments."""
    torch.manual_seed(0)
    chains = annealing(transition=transition, intermediate=3, step_size=step, leapfrog=3)
    mean, sd = gaussian_between(2 * 2 / 4)
    start = mean + sd * torch.randn(20_000, 2)
    points = chains.at(start)
    rates = []
    for _ in range(5):
        points, rate = chains.move(points, 2)
        rates.append(float(rate))
    assert 0.4 < min(rates) <= max(rates) < 0.95
    z = (points.u - mean) / sd
    n = z.numel()
    assert abs(z.mean().item()) < 4 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / n)
    # the chains have moved
    assert abs(float(torch.corrcoef(torch.stack([start.flatten(), points.u.flatten()]))[0, 1])) < 0.7
    torch.testing.assert_close(points.log_p, shifted(points.u))


def test_energy_error_of_a_trajectory_has_order_two() -> None:
    errors = []
    for leapfrog in (8, 16):
        chains = annealing(banana, leapfrog=leapfrog, step_size=1.2 / leapfrog)
        points = chains.at(torch.randn(200, 2, generator=torch.Generator().manual_seed(1)))
        torch.manual_seed(0)
        step = float(chains.step_sizes[1]) * chains.target.scale
        errors.append(chains._leapfrog(points, 0.8, step, AS_CONFIGURED)[1].abs().mean().item())
    assert 3.5 < errors[0] / errors[1] < 4.5


TYPES = ("positive", "interval(-1,2)", "circular(4)", "real")


def in_four_types(name: str = "nsf") -> Annealing:
    types = tuple(ColumnType.parse(each) for each in TYPES)
    torch.manual_seed(0)
    flow = flow_of(VECTORS[name], Samples((4,), types=types), []).double()

    def log_density(x: Tensor) -> Tensor:
        log_p = -x[:, 0] - 0.5 * x[:, 1].square() + (0.5 * math.pi * x[:, 2]).cos() - 0.5 * (x[:, 3] - x[:, 0]).square()
        return torch.where((x[:, 0] > 0) & (x[:, 1].abs() < 2), log_p, -math.inf)

    return Annealing(flow, FunctionTarget(log_density, 4, types), transition="hmc", step_size=0.2)


def test_gradients_agree_with_finite_differences() -> None:
    chains = in_four_types()
    u = torch.randn(6, 4)
    points = chains.at(u)
    for i in range(4):
        ahead, behind = (chains.at(u + h * torch.eye(4)[i]) for h in (1e-6, -1e-6))
        for log_density, slope in (("log_q", points.slope_q), ("log_p", points.slope_p)):
            assert slope is not None
            expected = (getattr(ahead, log_density) - getattr(behind, log_density)) / 2e-6
            torch.testing.assert_close(slope[:, i], expected, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in chains.flow.parameters())
    assert not any(part.requires_grad for part in points if part is not None)


@pytest.mark.parametrize("transition", ["hmc", "metropolis"])
def test_samples_are_in_the_support(transition: str) -> None:
    """The target is e^LOG_Z times another flow over the same columns."""
    chains = in_four_types()
    other = deepcopy(chains.flow)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    target = FunctionTarget(lambda x: other.log_prob(x) + LOG_Z, 4, chains.target.types)
    chains = Annealing(chains.flow, target, alpha=1.0, transition=transition, intermediate=3, step_size=0.3)
    found = chains.draw(5000)
    low, high = zip(*(one.support for one in target.types), strict=True)
    assert bool(((found.x >= torch.tensor(low)) & (found.x <= torch.tensor(high))).all())
    torch.testing.assert_close(found.log_q, chains.flow.log_prob(found.x), rtol=1e-6, atol=1e-6)
    w = (found.log_w - LOG_Z).exp()
    assert w.std() > 0.05
    assert abs(w.mean().item() - 1) < 4 * w.std().item() / math.sqrt(len(w))


def test_rows_that_are_not_finite_are_marked() -> None:
    """The density is NaN on one half of the plane, and infinite far away. Chains that start there stay there."""

    def log_density(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] < 0, math.nan, shifted(x))

    torch.manual_seed(0)
    chains = annealing(log_density)
    found = chains.draw(2000)
    usable = found.log_w.isfinite()
    assert 0.3 < usable.double().mean().item() < 0.7
    assert bool((found.x[usable, 0] >= 0).all())
    assert bool(found.log_w[~usable].isnan().all())
    assert bool(found.acceptance.isfinite().all())


def test_a_diverging_trajectory_is_rejected() -> None:
    chains = annealing(lambda x: -x.square().square().sum(1), step_size=1e8, leapfrog=20)
    points = chains.at(torch.randn(50, 2))
    moved, rate = chains.move(points, 2)
    assert float(rate) == 0
    assert torch.equal(moved.u, points.u)


def test_adapt_changes_step_sizes_by_the_acceptance_rate() -> None:
    chains = annealing(intermediate=3, acceptance=0.6)
    chains.adapt([1.0, 0.6, 0.0])
    assert chains.step_sizes[0] > 0.3
    assert float(chains.step_sizes[1]) == pytest.approx(0.3)
    assert chains.step_sizes[2] < 0.3


@pytest.mark.parametrize("transition", ["hmc", "metropolis"])
def test_acceptance_rate_reaches_the_chosen_rate(transition: str) -> None:
    torch.manual_seed(0)
    chains = annealing(banana, transition=transition, intermediate=2, step_size=0.02)
    rates = []
    for _ in range(60):
        rates.append(chains.draw(100).acceptance)
        chains.adapt(rates[-1].tolist())
    late = torch.stack(rates[30:]).mean(0)
    torch.testing.assert_close(late, torch.full_like(late, chains.acceptance), rtol=0, atol=0.1)


def test_step_sizes_are_in_units_of_the_scale() -> None:
    torch.manual_seed(0)
    target = FunctionTarget(lambda x: 0.0 * x.sum(1), 2, scale=[1.0, 20.0])
    chains = Annealing(standard_normal(), target, alpha=1.0, intermediate=1, transition="metropolis", step_size=0.01)
    start = torch.zeros(40_000, 2)
    # alpha k / (K + 1) = 1 / 2, and the density is nearly flat over a step
    moved = chains.move(chains.at(start), 1)[0].u.abs().median(0).values
    torch.testing.assert_close(moved[1] / moved[0], torch.tensor(20.0), rtol=0.1, atol=0)
    torch.testing.assert_close(moved[0], torch.tensor(0.006), rtol=0.2, atol=0)


def test_a_target_without_gradient_needs_metropolis() -> None:
    def log_density(x: Tensor) -> Tensor:
        return shifted(x.detach())

    with pytest.raises(DataError, match="metropolis"):
        annealing(log_density).draw(10)
    assert bool(annealing(log_density, transition="metropolis").draw(10).log_w.isfinite().all())


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.5}, {"intermediate": 0}, {"transition": "gibbs"}, {"leapfrog": 0}, {"step_size": 0}, {"moves": 0},
     {"acceptance": 1.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"objective.{next(iter(settings))}"):
        annealing(**settings)


@pytest.mark.parametrize(("d", "transition", "step"), [(8, "metropolis", 1.0), (9, "hmc", 0.2)])
def test_automatic_transition(d: int, transition: str, step: float) -> None:
    chains = Annealing(standard_normal(d), FunctionTarget(lambda x: -x.square().sum(1), d))
    assert (chains.transition, chains.step_sizes.tolist()) == (transition, [step] * 4)
    assert bool(chains.draw(20).log_w.isfinite().all())
