"""Checks of the layout of a figure: all texts lie inside the figure, and no two texts overlap."""

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from flowtrain.plotting import style

# pixels by which the boxes of two texts may overlap, because a box is a little larger than the letters
SLACK = 1.0


def drawn(patch: pytest.MonkeyPatch, draw: Callable[..., Any], *arguments: Any, **named: Any) -> Figure:
    """Returns the figure that a function draws. No file is written."""
    saved: list[Figure] = []
    patch.setattr(style, "save", lambda figure, path, options=None: saved.append(figure))
    draw(Path("figure.png"), *arguments, **named)
    (figure,) = saved
    return figure


def catch_figures(patch: pytest.MonkeyPatch) -> list[Figure]:
    """Returns a list to which every figure is added that is saved from now on.

    The figures have half the usual resolution, which saves two thirds of the time.
    """
    figures: list[Figure] = []

    def save(figure: Figure, path: Path, options: Any = None) -> None:
        FigureCanvasAgg(figure).draw()
        figures.append(figure)

    patch.setattr(style, "save", save)
    patch.setattr(style, "DPI", 100)
    patch.setitem(style._RC, "figure.dpi", 100)
    return figures


def words_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """Returns the visible texts of a figure as strings, and their boxes in pixels."""
    return [(text.get_text(), box) for text, box in texts(figure)]


def texts(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Returns the visible texts of a figure as Matplotlib objects, and their boxes in pixels."""
    FigureCanvasAgg(figure).draw()
    found = []
    for text in _texts(figure):
        if text.get_visible() and text.get_text().strip():
            found.append((text, text.get_window_extent()))
    return found


def _texts(figure: Figure) -> Iterator[Text]:
    yield from figure.texts
    for legend in figure.legends:
        yield from (legend.get_title(), *legend.get_texts())
    for axes in figure.axes:
        yield from axes.texts
        yield from (axes.title, axes._left_title, axes._right_title)  # type: ignore[attr-defined]
        legend = axes.get_legend()
        if legend is not None:
            yield from legend.get_texts()
        for axis in (axes.xaxis, axes.yaxis):
            if axes.axison and axis.get_visible():
                yield axis.label
                yield from _tick_labels(axis)


def _tick_labels(axis: Axis) -> Iterator[Text]:
    """Yields the labels of the ticks in view. An axis also has ticks that are not in view."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    for tick, place in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=False):
        if low - slack <= place <= high + slack:
            yield from (tick.label1, tick.label2)


def check_layout(figure: Figure) -> None:
    """Asserts that all texts lie inside the figure and that no two texts overlap.

    Slanted texts are not checked, because their boxes are much larger than the letters.
    """
    width, height = figure.bbox.width, figure.bbox.height
    straight = [(text, box) for text, box in texts(figure) if text.get_rotation() % 90 == 0]
    assert straight
    for text, box in straight:
        inside = box.x0 >= -SLACK and box.y0 >= -SLACK and box.x1 <= width + SLACK and box.y1 <= height + SLACK
        assert inside, f"{text.get_text()!r} lies outside the figure: {box}"
    for (one, a), (other, b) in combinations(straight, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= SLACK or up <= SLACK, f"{one.get_text()!r} and {other.get_text()!r} overlap"
