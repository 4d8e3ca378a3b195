"""What a sweep has found, against each key that it swept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from flowtrain.plots import style

# keys, each of which has a column of panels
MOST_SWEPT = 4
# what is drawn: a row of panels each, with these measurements, and whether its axis is logarithmic
ROWS = {
    "NLL [nats]": (("val_nll", "nll"), False),
    "NFE": (("nfe",), False),
    "solver error [nats]": (("solver_error",), True),
}
LOOKS = {
    "val_nll": ("validation", style.BLUE, "o"),
    "nll": ("test", style.VERMILLION, "s"),
    "nfe": ("evaluations of the field", style.GREEN, "o"),
    "solver_error": ("error of the solver", style.PURPLE, "o"),
}
# from here on the largest and the smallest value are too far apart for a linear axis
FAR = 20
PANEL_HEIGHT = 1.75


@dataclass(frozen=True)
class Swept:
    """One key's values, as numbers where all are numbers, and of each name what the runs of each value measured."""

    values: list[str]
    numbers: list[float] | None
    found: dict[str, list[list[float]]]


def draw_sweep(path: Path, *, lines: Mapping[str, Swept], title: str) -> None:
    """Draw what was measured, every run a point and their means a line, to `path`: a column of panels for each key.

    Tolerances and what else spans orders of magnitude have logarithmic axes.
    """
    rows = [
        name for name, (names, _) in ROWS.items() if any(n in swept.found for swept in lines.values() for n in names)
    ]
    left, gap, bottom, between = 0.85, 0.75, 0.65, 0.3
    width = (style.WIDTH - left - 0.2 - gap * (len(lines) - 1)) / len(lines)
    with style.styled():
        figure = style.new_figure(bottom + len(rows) * (PANEL_HEIGHT + between) + 0.55, title)
        for i, (key, swept) in enumerate(lines.items()):
            for j, row in enumerate(reversed(rows)):
                place = (left + i * (width + gap), bottom + j * (PANEL_HEIGHT + between), width, PANEL_HEIGHT)
                axes = style.add_axes(figure, *place)
                _panel(axes, swept, *ROWS[row])
                axes.set_xlabel(style.literal(key) if j == 0 else "")
                axes.tick_params(labelbottom=j == 0)
                axes.set_ylabel(row if i == 0 else "")
                if i == 0 and len(ROWS[row][0]) > 1:
                    style.legend_above(axes)
        style.save(figure, path)


def _panel(axes: Axes, swept: Swept, names: Sequence[str], logarithmic: bool) -> None:
    x = swept.numbers or [float(i) for i in range(len(swept.values))]
    for name in names:
        words, colour, marker = LOOKS[name]
        runs = swept.found.get(name, [])
        points = [(at, v) for at, row in zip(x, runs, strict=False) for v in row if math.isfinite(v)]
        means = [(at, float(np.nanmean(row))) for at, row in zip(x, runs, strict=False) if np.isfinite(row).any()]
        if len(points) > len(means):
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, alpha=0.45, linewidth=0)
        if means:
            axes.plot(*zip(*means, strict=True), f"-{marker}", color=colour, markersize=4.5, label=words)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if swept.numbers is None:
        axes.set_xticks(x, [style.literal(value, most=14) for value in swept.values])
        axes.set_xlim(-0.5, len(x) - 0.5)
    elif _spread(x):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
    if logarithmic and axes.lines and all(np.all(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    if not axes.lines:
        style.annotate(axes, "not measured")


def _spread(x: Sequence[float]) -> bool:
    return min(x) > 0 and max(x) >= FAR * min(x)
