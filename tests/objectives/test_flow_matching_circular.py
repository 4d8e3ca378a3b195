"""Flow matching with circular columns: shortest lines, optimal coupling on the circle, and reflow."""

import math
from itertools import permutations

import pytest
import torch

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.models.ffjord import ffjord
from flowtrain.objectives.flow_matching import FlowMatching, Rectified, draw_pairs, optimal
from flowtrain.ode import ode_solver
from flowtrain.utils.circle import wrap
from flowtrain.utils.errors import ConfigError


def test_optimal_coupling_minimizes_the_squared_distance_on_the_circle() -> None:
    z, x = torch.randn(6, 2), torch.randn(6, 2)
    z[:, 1], x[:, 1] = wrap(3 * z[:, 1]), wrap(3 * x[:, 1])

    def cost(paired: torch.Tensor) -> float:
        return float((paired[:, 0] - x[:, 0]).square().sum() + wrap(paired[:, 1] - x[:, 1]).square().sum())

    best = min(cost(z[list(order)]) for order in permutations(range(6)))
    assert cost(optimal(z, x, circular=[1])) == pytest.approx(best)
    assert cost(optimal(z, x)) > best + 1e-3


def test_points_next_to_the_seam_are_neighbours() -> None:
    z, x = torch.tensor([[3.1], [0.0]]), torch.tensor([[0.1], [-3.1]])
    assert optimal(z, x, circular=[0]).tolist() == [[0.0], [3.1]]


@pytest.mark.parametrize("coupling", ["independent", "optimal"])
@pytest.mark.parametrize("classes", [None, 2])
def test_lines_are_the_shortest_on_the_circle(coupling: str, classes: int | None) -> None:
    flow = ffjord(2, circular=[1], hidden=[4], conditional=classes is not None, classes=classes)
    objective = FlowMatching(flow, Regularizer(), coupling)
    x = torch.cat([torch.randn(50, 1), 7 * torch.randn(50, 1)], 1)
    label = None if classes is None else torch.arange(50) % 2
    x0, x1, _ = objective.pairs(x, label)
    assert (x1 - x0)[:, 1].abs().max() <= math.pi + 1e-12
    assert x1[:, 1].abs().max() > math.pi
    torch.testing.assert_close(wrap(x1[:, 1]), wrap(x[:, 1]))
    assert torch.equal(x1[:, 0], x[:, 0])
    # an untrained field is zero, so the loss is the mean squared length of the lines
    torch.manual_seed(0)
    loss, _ = objective(x, label)
    torch.manual_seed(0)
    x0, x1, _ = objective.pairs(x, label)
    torch.testing.assert_close(loss, (x1 - x0).square().sum(1).mean())


def turning(speed: float) -> torch.nn.Module:
    """Returns a flow that moves every angle at the same speed."""
    flow = ffjord(1, circular=[0], hidden=[4], field="concat", solver=ode_solver("dopri5", rtol=1e-8))
    with torch.no_grad():
        flow.ode_blocks[0].field.head.linear.bias.fill_(speed)
    return flow


def test_reflow_keeps_the_number_of_turns_of_a_path() -> None:
    """A path of length 4 is longer than the shortest line between its ends, which has length 2 pi - 4."""
    teacher = turning(4.0)
    x0, x1, _ = draw_pairs(teacher, 20, 1e-6)
    torch.testing.assert_close(x1 - x0, torch.full_like(x0, 4.0))
    objective = Rectified(turning(4.0), Regularizer(), teacher, seed=0, pairs=20)
    assert float(objective(x0[:10])[0].detach()) < 1e-8


def test_reflow_needs_the_same_circular_columns() -> None:
    with pytest.raises(ConfigError, match="circular"):
        Rectified(ffjord(2, circular=[0], hidden=[4]), Regularizer(), ffjord(2, circular=[1], hidden=[4]), 0, pairs=2)
