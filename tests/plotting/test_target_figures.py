"""The figures of a target and a flow: limits, densities, weights, shares of modes, and layout."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layout import check_layout, drawn, words_of
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal

from flowtrain.data.types import ColumnType
from flowtrain.plotting.target_figures import draw_modes, draw_target_1d, draw_target_2d, draw_weights

pytestmark = pytest.mark.filterwarnings("error")


def normal(mean: float, width: float) -> Any:
    return lambda x: Normal(mean, width).log_prob(x).sum(1)


def ends(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def figure_1d(patch: pytest.MonkeyPatch, **changed: Any) -> Figure:
    given = {"target": torch.randn(500, 1), "samples": 0.5 + torch.randn(400, 1), "cover": ends([-4.0], [4.0])}
    given |= {"log_density": normal(0.5, 1.0), "target_log_density": normal(0.0, 1.0), "title": "a title"}
    return drawn(patch, draw_target_1d, **{**given, **changed})


def figure_2d(patch: pytest.MonkeyPatch, **changed: Any) -> Figure:
    given = {"target": torch.randn(500, 2), "samples": torch.randn(400, 2), "cover": ends([-4.0, -3.0], [4.0, 3.0])}
    given |= {"log_density": normal(0.0, 1.2), "target_log_density": normal(0.0, 1.0), "title": "a title"}
    return drawn(patch, draw_target_2d, **{**given, **changed})


def figure_of_weights(patch: pytest.MonkeyPatch, log_w: Tensor, **changed: Any) -> Figure:
    given = {"log_z": 0.0, "ess": 0.5, "pareto_k": 0.4, "tail": 0.5, "title": "a title"}
    return drawn(patch, draw_weights, log_w=log_w, **{**given, **changed})


def test_curve_of_the_target_is_its_density(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_1d(monkeypatch)
    check_layout(figure)
    (axes,) = figure.axes
    truth, flow = (np.asarray(line.get_data()) for line in axes.get_lines())
    np.testing.assert_allclose(truth[1], np.exp(-0.5 * truth[0] ** 2) / math.sqrt(2 * math.pi), rtol=1e-4)
    assert abs(flow[0][flow[1].argmax()] - 0.5) < 0.02
    assert axes.get_xlim()[0] < -4
    assert axes.get_xlim()[1] > 4


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize("figure_of", [figure_1d, figure_2d])
def test_layout_on_both_scales(monkeypatch: pytest.MonkeyPatch, figure_of: Any, log_scale: bool) -> None:
    check_layout(figure_of(monkeypatch, log_scale=log_scale))


def test_axes_cover_the_points_and_not_more_than_the_support(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(500, 2) * torch.tensor([3.0, 1.0])
    types = [ColumnType.parse("positive"), ColumnType.parse("interval(0,1)")]
    asked: list[Tensor] = []

    def log_density(points: Tensor) -> Tensor:
        asked.append(points)
        return torch.zeros(len(points))

    given = {"target": x, "samples": x, "types": types, "cover": ends([0.01, 0.01], [3.0, 0.99])}
    figure = figure_2d(monkeypatch, target_log_density=log_density, log_density=log_density, **given)
    check_layout(figure)
    for axes in figure.axes[:3]:
        assert axes.get_xlim()[0] == 0
        assert axes.get_xlim()[1] > 3
        assert axes.get_ylim() == (0, 1)
    assert all(bool((points > 0).all() and (points[:, 1] < 1).all()) for points in asked)


def test_both_panels_have_one_colour_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow with half of the density of the target has half of its colour value."""
    figure = figure_2d(monkeypatch, log_density=lambda x: normal(0.0, 1.0)(x) - math.log(2))
    target, flow = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:2])
    middle = target.shape[0] // 2
    assert 0.8 < target.max() <= 1
    np.testing.assert_allclose(flow[middle, middle // 2], target[middle, middle // 2] / 2, rtol=1e-5)


def test_legend_counts_densities_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    log_density = lambda x: torch.where(x[:, 0] > 0, math.nan, 0.0)  # noqa: E731
    figure = figure_2d(monkeypatch, target_log_density=log_density)
    assert any("50.0% not finite" in words for words, _ in words_of(figure))
    check_layout(figure)


@pytest.mark.parametrize(
    "log_w",
    [
        torch.randn(5000),
        torch.zeros(1000),
        torch.tensor([0.3]),
        torch.cat([torch.randn(500), torch.tensor([-math.inf, -1e5, 9.0])]),
        torch.full((10,), -math.inf),
    ],
    ids=["normal", "exact", "one", "tails", "none"],
)
def test_weights_are_drawn(monkeypatch: pytest.MonkeyPatch, log_w: Tensor) -> None:
    figure = figure_of_weights(monkeypatch, log_w)
    check_layout(figure)
    low, high = figure.axes[0].get_xlim()
    assert low < 0 < high


def test_histograms_of_weights_contain_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    log_w = torch.cat([torch.full((90,), -0.1), torch.full((10,), 1.0)])
    (axes,) = figure_of_weights(monkeypatch, log_w).axes
    plain, weighted = (patch.get_data() for patch in axes.patches[:2])
    bottom = 0.5 / 100
    found = sorted(plain.values[plain.values > bottom])
    np.testing.assert_allclose(found, [0.1, 0.9])
    part = 10 * math.e / (10 * math.e + 90 * math.exp(-0.1))
    np.testing.assert_allclose(sorted(weighted.values[weighted.values > bottom]), [part, 1 - part], rtol=1e-6)
    assert plain.edges[0] < -0.1
    assert plain.edges[-1] > 1


def test_bars_of_modes_are_sorted_and_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, truth = [0.1, 0.6, 0.0, 0.3], [0.25, 0.3, 0.25, 0.2]
    figure = drawn(monkeypatch, draw_modes, shares=shares, true_shares=truth, title="a title")
    check_layout(figure)
    flow, exact = ([bar.get_height() for bar in bars] for bars in figure.axes[0].containers)
    assert flow == [0.6, 0.3, 0.1, 0.0]
    assert exact == [0.3, 0.2, 0.25, 0.25]
    assert any("1 of 4 modes" in words for words, _ in words_of(figure))


@pytest.mark.parametrize("count", [1, 2, 40, 500])
@pytest.mark.parametrize("known", [False, True])
def test_any_number_of_modes(monkeypatch: pytest.MonkeyPatch, count: int, known: bool) -> None:
    shares = [2 * (i + 1) / (count * (count + 1)) for i in range(count)]
    figure = drawn(
        monkeypatch, draw_modes, shares=shares, true_shares=[1 / count] * count if known else None, title="a title"
    )
    check_layout(figure)
    (axes,) = figure.axes
    assert all(place == round(place) for place in axes.get_xticks())
    if count <= 60:
        heights = [bar.get_height() for bar in axes.containers[0]]
    else:
        heights = list(axes.patches[0].get_data().values)
    assert sum(heights) == pytest.approx(1)
    assert axes.get_ylim()[1] > max(heights)


def test_figures_are_written(tmp_path: Path) -> None:
    draw_modes(tmp_path / "modes.png", shares=[0.5, 0.5], true_shares=None, title="a title")
    assert (tmp_path / "modes.png").stat().st_size > 1000
