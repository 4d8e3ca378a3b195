"""Checks of the layout of figures: words neither overlap nor end outside the figure."""

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from flowtrain.plotting import style
from flowtrain.plotting.options import DEFAULT, PlotOptions


def catch_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on. No file is written."""
    figures: list[Figure] = []

    def save(figure: Figure, path: Path, options: PlotOptions = DEFAULT) -> None:
        FigureCanvasAgg(figure).draw()
        figures.append(figure)

    monkeypatch.setattr(style, "save", save)
    # half the resolution takes a third of the time
    monkeypatch.setattr(style, "DPI", 100)
    monkeypatch.setitem(style._RC, "figure.dpi", 100)
    return figures


def words_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """The visible words of a figure that has been drawn, and their places in pixels."""
    found: list[Text] = figure.findobj(Text)  # type: ignore[assignment]
    texts = [text for text in found if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


def layout_faults(figure: Figure) -> list[str]:
    """Words of a drawn figure that overlap others or lie outside the figure."""
    words = words_of(figure)
    width, height = figure.canvas.get_width_height()
    faults = [
        f"{text!r} is outside the figure"
        for text, box in words
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    for (one, a), (other, b) in combinations(words, 2):
        if a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1:
            faults.append(f"{one!r} overlaps {other!r}")
    return faults
