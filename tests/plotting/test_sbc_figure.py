"""The figure of simulation-based calibration: curves, bands and layout."""

import numpy as np
import pytest
import torch
from helpers.layout import check_layout, drawn
from matplotlib.figure import Figure

from flowtrain.evaluation.result import Ranks, SimulationCalibration
from flowtrain.evaluation.sbc import coverage, rank_test, simultaneous_band
from flowtrain.plotting.sbc_figure import draw_sbc


def figure_of(monkeypatch: pytest.MonkeyPatch, n: int, names: list[str]) -> tuple[Figure, Ranks]:
    draw = torch.Generator().manual_seed(0)
    u = torch.rand(n, len(names) + 2, dtype=torch.float64, generator=draw)
    # the last column is the least uniform
    u[:, -3] = u[:, -3] ** 2
    ranks = Ranks(u[:, :-2], u[:, -2], u[:, -1] ** 0.5)
    tests = {name: rank_test(column) for name, column in zip(names, ranks.columns.T, strict=True)}
    result = SimulationCalibration(n, 200, tests, coverage(ranks.tarp), coverage(ranks.density))
    return drawn(monkeypatch, draw_sbc, result=result, ranks=ranks, title="$\\no{ tex " * 9), ranks


@pytest.mark.parametrize("n", [3, 1000])
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_layout_for_few_and_many_columns(monkeypatch: pytest.MonkeyPatch, n: int, d: int) -> None:
    check_layout(figure_of(monkeypatch, n, [f"the research department number {j}" for j in range(d)])[0])
    check_layout(figure_of(monkeypatch, n, [f"x{j}" for j in range(d)])[0])


def test_the_least_uniform_columns_are_named_and_curves_are_distribution_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figure, ranks = figure_of(monkeypatch, 500, ["a", "b", "c", "d", "e"])
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert "e" in lines
    # three named columns, two others and the line at zero
    assert (len(left.get_legend_handles_labels()[1]), len(left.lines)) == (4, 6)
    x, y = lines["e"].get_data()
    places = np.linspace(0.05, 0.95, 10)
    share = (ranks.columns[:, -1].numpy()[:, None] <= places).mean(0)
    assert np.interp(places, x, y) + places == pytest.approx(share, abs=0.01)
    curve = next(line for line in right.lines if "density" in line.get_label())
    share = (ranks.density.numpy()[:, None] <= places).mean(0)
    assert np.interp(places, *curve.get_data()) == pytest.approx(share, abs=0.01)


def test_the_band_is_the_simultaneous_band(monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = figure_of(monkeypatch, 500, ["a", "b"])
    _, low, high = simultaneous_band(500)
    corners = figure.axes[1].collections[0].get_paths()[0].vertices
    for edge in (low, high):
        assert any(np.abs(corners[:, 1] - float(edge[70])) < 1e-12)
