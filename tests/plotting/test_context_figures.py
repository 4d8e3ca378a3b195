"""Figures of conditional flows: any number of contexts and bins is drawn, and texts do not overlap."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layout import catch_figures, check_layout, words_of
from matplotlib.figure import Figure
from torch import Tensor

from flowtrain.evaluation.result import ContextBin
from flowtrain.plotting.context_figures import draw_calibration_by_context, draw_contexts
from flowtrain.plotting.options import PlotOptions
from flowtrain.utils.errors import FlowtrainError

LONG = "mean concentration of nitrogen oxides in ppb"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return catch_figures(monkeypatch)


def normal(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2 - x.shape[1] * 0.919


def contexts(rows: Sequence[Tensor], **changed: Any) -> None:
    d = rows[0].shape[1]
    given = {
        "names": [f"{LONG} = {i}" for i in range(len(rows))],
        "data": rows,
        "log_densities": [normal] * len(rows),
        "columns": (LONG, "v $\\no{ tex")[:d],
        "title": "a title +- $",
    }
    draw_contexts(Path("a.png"), **{**given, **changed})


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_densities_at_contexts_have_a_panel_each(figures: list[Figure], d: int, count: int) -> None:
    contexts([torch.randn(60, d) + i for i in range(count)], options=PlotOptions(title=count != 3))
    (figure,) = figures
    check_layout(figure)
    assert len(figure.axes) == count * d
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize(
    "rows", [torch.zeros(5, 2), 1e6 * torch.randn(80, 2), torch.randn(300, 2).exp().pow(3), torch.full((1, 2), 7.0)]
)
def test_densities_at_contexts_are_drawn_for_any_rows(figures: list[Figure], d: int, rows: Tensor) -> None:
    contexts([rows[:, :d]] * 2)
    contexts([rows[:, :d]] * 2, log_densities=[lambda x, v=v: torch.full((len(x),), v) for v in (torch.nan, torch.inf)])
    for figure in figures:
        check_layout(figure)


def test_histogram_and_curve_are_of_the_same_context(figures: list[Figure]) -> None:
    rows = [torch.randn(4000, 1) * 0.5, torch.randn(4000, 1) * 0.5 + 4]
    contexts(rows, log_densities=[lambda x, m=m: -2 * (x[:, 0] - m) ** 2 - 0.226 for m in (0.0, 4.0)])
    for axes, middle in zip(figures[0].axes, (0.0, 4.0), strict=True):
        curve, stairs = axes.lines[0], axes.patches[0]
        x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
        assert x[y.argmax()] == pytest.approx(middle, abs=0.05)
        values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
        assert edges[values.argmax()] <= middle + 0.3
        assert edges[values.argmax() + 1] >= middle - 0.3
        # both are densities
        assert (y[:-1] * np.diff(x)).sum() == pytest.approx(1, abs=0.02)
        assert (values * np.diff(edges)).sum() == pytest.approx(1, abs=0.02)


def test_densities_at_contexts_need_rows(figures: list[Figure]) -> None:
    with pytest.raises(FlowtrainError):
        contexts([torch.full((3, 2), torch.nan)])


def bins_of(columns: int, categories: int = 6) -> tuple[list[ContextBin], list[tuple[str, Tensor]]]:
    """Returns bins and their transforms: column c0 has categories, and the others have four ranges."""
    found, drawn = [], []
    for i in range(columns):
        for j in range(4 if i else categories):
            end = (-1e-5 * j, 12345.678 + j, None) if i else (None, None, f"{LONG} {j}")
            p = 0.1 + 0.01 * ((i * 7) % 10)
            found.append(ContextBin(f"c{i}", *end, 40 + j, 1234.5, 0.1, 0.123, "z2", p))
            drawn.append(("z1", torch.rand(40 + j) ** (1 + 0.2 * j)))
    return found, drawn


@pytest.mark.parametrize(("columns", "title"), [(1, True), (2, False), (5, True), (7, True)])
def test_calibration_by_context_has_a_panel_for_each_column(figures: list[Figure], columns: int, title: bool) -> None:
    bins, drawn = bins_of(columns)
    given: dict[str, Any] = {"bins": bins, "transforms": drawn, "labels": {"z1": LONG}, "unit": ("bits/dim", 0.01)}
    draw_calibration_by_context(Path("a.png"), **given, title="a title", options=PlotOptions(title=title))
    (figure,) = figures
    check_layout(figure)
    assert len(figure.axes) == min(5, columns)
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None
        assert len(legend.get_texts()) in (4, 6)
    if columns > 5:
        # of seven columns, those with the smallest p-values: 0.10, 0.11, 0.12, 0.14 and 0.15
        shown = [axes.get_title(loc="left").rpartition(" ")[2] for axes in figure.axes]
        assert shown == ["c0", "c2", "c3", "c5", "c6"]


def test_curves_are_deviations_of_each_bin(figures: list[Figure]) -> None:
    bins = [ContextBin("m", 0.0, 1.0, None, 500, 1.0, 0.1, 0.2, "radius", 0.5)] * 2
    u = torch.rand(500)
    given: dict[str, Any] = {"bins": bins, "transforms": [("radius", u), ("radius", u / 2)], "labels": {}}
    draw_calibration_by_context(Path("a.png"), **given, unit=("nats", 1.0), title="t")
    largest = [np.abs(np.asarray(line.get_ydata(), float)).max() for line in figures[0].axes[0].lines[1:]]
    assert largest[0] < 0.1
    assert largest[1] == pytest.approx(0.5, abs=0.1)
    assert any("NLL 1.00" in words for words, _ in words_of(figures[0]))
