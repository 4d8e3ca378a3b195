"""The layout of a figure: no text outside of it, and no two texts over each other."""

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

# pixels by which boxes of texts may overlap: they are a little larger than the letters
SLACK = 1.0


def drawn(patch: pytest.MonkeyPatch, draw: Callable[..., Any], *arguments: Any, **named: Any) -> Figure:
    """The figure that a function draws, which writes no file."""
    saved: list[Figure] = []
    patch.setattr(style, "save", lambda figure, path, options=None: saved.append(figure))
    draw(Path("figure.png"), *arguments, **named)
    (figure,) = saved
    return figure


def catch_figures(patch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on, at half the resolution, which takes a third of the time."""
    figures: list[Figure] = []

    def save(figure: Figure, path: Path, options: Any = None) -> None:
        FigureCanvasAgg(figure).draw()
        figures.append(figure)

    patch.setattr(style, "save", save)
    patch.setattr(style, "DPI", 100)
    patch.setitem(style._RC, "figure.dpi", 100)
    return figures


def words_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """The visible words of a figure and their places in pixels."""
    return [(text.get_text(), box) for text, box in texts(figure)]


def texts(figure: Figure) -> list[tuple[Text, Bbox]]:
    """The texts that are visible in a figure, with their places in pixels."""
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
    """The labels of the ticks in view; an axis has others as well."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    for tick, place in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=False):
        if low - slack <= place <= high + slack:
            yield from (tick.label1, tick.label2)


def check_layout(figure: Figure) -> None:
    """No text of the figure lies outside of it, and no two texts overlap. Slanted texts have boxes that say nothing."""
    width, height = figure.bbox.width, figure.bbox.height
    straight = [(text, box) for text, box in texts(figure) if text.get_rotation() % 90 == 0]
    assert straight
    for text, box in straight:
        inside = box.x0 >= -SLACK and box.y0 >= -SLACK and box.x1 <= width + SLACK and box.y1 <= height + SLACK
        assert inside, f"{text.get_text()!r} lies outside of the figure: {box}"
    for (one, a), (other, b) in combinations(straight, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= SLACK or up <= SLACK, f"{one.get_text()!r} and {other.get_text()!r} overlap"
