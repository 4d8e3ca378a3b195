"""The figure of a sweep: results against each key that was swept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from flowtrain.plotting import style
from flowtrain.plotting.options import DEFAULT, PlotOptions

# the largest number of keys that are drawn; each has a column of panels
MOST_SWEPT = 4
# the rows of panels: their quantities, and whether the axis is logarithmic
ROWS = {
    "NLL (nats)": (("val_nll", "nll"), False),
    "NFE": (("nfe",), False),
    "solver error (nats)": (("solver_error",), True),
}
LOOKS = {
    "val_nll": ("validation", style.BLUE, "o"),
    "nll": ("test", style.VERMILLION, "s"),
    "nfe": ("NFE", style.GREEN, "o"),
    "solver_error": ("solver error", style.PURPLE, "o"),
}
# an axis is logarithmic if the largest value is at least this many times the smallest
FAR = 8
# an NLL is outside the frame if its distance above the median is more than this many times the difference between the
# third quartile and the minimum
OUTLYING = 20
# inches: the height of panels, the vertical and horizontal gaps between them, the room above them, the left margin
PANEL_HEIGHT, BETWEEN, GAP, HEAD, LEFT = 1.9, 0.22, 0.75, 0.7, 0.85
# the width of a letter of a tick label in inches
LETTER = 0.075
# points by which validation and test are drawn to the left and to the right of their value
APART = 2.5


@dataclass(frozen=True)
class Swept:
    """The results of the runs of a sweep by the values of one key.

    Attributes:
        values: the values as text, in the order of the axis.
        numbers: the values as numbers; None if one is not a number.
        found: for each quantity, the results of the runs of each value.
        errors: for some quantities, the standard errors of these results; NaN if unknown.
    """

    values: list[str]
    numbers: list[float] | None
    found: dict[str, list[list[float]]]
    errors: dict[str, list[list[float]]] = field(default_factory=dict)


def draw_sweep(path: Path, *, lines: Mapping[str, Swept], title: str, options: PlotOptions = DEFAULT) -> None:
    """Draws the results of a sweep to `path`, with a column of panels for each key and a row for each quantity.

    Each run is a point with its standard error as a bar. Lines connect the means of the runs with the same value.
    Axes of positive values are logarithmic if they span a factor of at least FAR.
    """
    rows = [
        name for name, (names, _) in ROWS.items() if any(n in swept.found for swept in lines.values() for n in names)
    ]
    width = (style.WIDTH - LEFT - 0.2 - GAP * (len(lines) - 1)) / len(lines)
    tilted = any(not _fits(_names(swept.values), width) for swept in lines.values() if swept.numbers is None)
    bottom = 1.15 if tilted else 0.55
    height = bottom + len(rows) * (PANEL_HEIGHT + BETWEEN) - BETWEEN + HEAD
    repeated = any(len(runs) > 1 for swept in lines.values() for found in swept.found.values() for runs in found)
    with style.styled():
        figure = style.new_figure(height, title, options)
        for i, (key, swept) in enumerate(lines.items()):
            for j, row in enumerate(reversed(rows)):
                place = (LEFT + i * (width + GAP), bottom + j * (PANEL_HEIGHT + BETWEEN), width, PANEL_HEIGHT)
                axes = style.add_axes(figure, *place)
                _panel(axes, swept, *ROWS[row])
                axes.set_xlabel(style.literal(key, most=int(width / LETTER)) if j == 0 else "")
                axes.tick_params(labelbottom=j == 0)
                axes.set_ylabel(row if i == 0 else "")
                if i == 0 and len(ROWS[row][0]) > 1:
                    style.legend_above(axes)
        words = "bars: one standard error" + ("; large marks: mean of the runs with the same value" if repeated else "")
        right, top = style.WIDTH - 0.2, height - HEAD + 0.1
        figure.text(right, top, words, transform=figure.dpi_scale_trans, color=style.MUTED, size=8, ha="right")
        style.save(figure, path, options)


def _panel(axes: Axes, swept: Swept, names: Sequence[str], logarithmic: bool) -> None:
    x = swept.numbers or [float(i) for i in range(len(swept.values))]
    beside = APART if len(names) > 1 else 0.0
    for name, side in zip(names, (-beside, beside), strict=False):
        words, colour, marker = LOOKS[name]
        runs = swept.found.get(name, [])
        points = [(at, v) for at, row in zip(x, runs, strict=False) for v in row if math.isfinite(v)]
        bars = [bar for row in _errors(swept, name) for bar in row]
        every = [v for row in runs for v in row]
        known = [(at, v, e) for (at, v, e) in zip(_repeated(x, runs), every, bars, strict=False) if v + e < math.inf]
        # the distance is in points, so that it is the same on every axis
        scale = axes.figure.dpi_scale_trans
        look: dict[str, Any] = {"color": colour, "transform": axes.transData + ScaledTranslation(side / 72, 0, scale)}
        if known:
            at, middle, error = zip(*known, strict=True)
            axes.errorbar(at, middle, error, fmt="none", alpha=0.6, elinewidth=1, capsize=2, **look)
        means = [(at, float(np.nanmean(row))) for at, row in zip(x, runs, strict=False) if np.isfinite(row).any()]
        if len(points) > len(means):
            axes.plot(*zip(*points, strict=True), marker, markersize=3, alpha=0.45, linewidth=0, **look)
        if means:
            # values that are not numbers have no order, so no line connects them
            line = "-" if swept.numbers else ""
            axes.plot(*zip(*means, strict=True), f"{line}{marker}", markersize=4.5, label=words, **look)
    pairs = [
        (v, e)
        for name in names
        for row, errors in zip(swept.found.get(name, []), _errors(swept, name), strict=True)
        for v, e in zip(row, errors, strict=True)
        if math.isfinite(v)
    ]
    shown = [value for value, _ in pairs]
    _set_value_ticks(axes, swept, x)
    if shown and logarithmic and min(shown) > 0:
        style.make_logarithmic(axes.yaxis, shown)
    elif shown:
        _set_y_limits(axes, shown, [error for _, error in pairs])
    axes.grid(axis="y")
    if not shown:
        style.annotate(axes, "not measured")


def _set_value_ticks(axes: Axes, swept: Swept, x: Sequence[float]) -> None:
    """Sets ticks at the values of the key if there is room for their labels, otherwise round ticks."""
    # matplotlib ignores lines with another transform when it chooses limits
    low, high = min(x), max(x)
    if swept.numbers is None:
        _set_named_ticks(axes, swept.values)
        return
    if _needs_log_axis(x):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        room = (high / low) ** 0.04
        axes.set_xlim(low / room, high * room)
    else:
        room = 0.04 * (high - low) or 1.0
        axes.set_xlim(low - room, high + room)
    labels, width = _names(swept.values), axes.get_position().width * style.WIDTH
    positions = axes.transAxes.inverted().transform(axes.transData.transform([(at, 0.0) for at in x]))[:, 0] * width
    if (np.diff(positions) > (max(map(len, labels)) + 1) * LETTER).all():
        axes.set_xticks(list(x), labels)
    else:
        axes.xaxis.set_major_formatter(style.TickNumbers())
        if not _needs_log_axis(x):
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=all(at == round(at) for at in x)))


def _errors(swept: Swept, name: str) -> list[list[float]]:
    """Returns the standard errors of the results of a quantity, NaN if unknown."""
    runs = swept.found.get(name, [])
    return swept.errors[name] if runs and name in swept.errors else [[math.nan] * len(row) for row in runs]


def _repeated(x: Sequence[float], runs: Sequence[Sequence[float]]) -> list[float]:
    """Returns the position of each run on the x axis; runs with the same value share it."""
    return [at for at, row in zip(x, runs, strict=False) for _ in row]


def _names(values: Sequence[str]) -> list[str]:
    """Returns the labels of values; for paths, their last parts if these differ."""
    names = [value.rstrip("/").rpartition("/")[2] for value in values]
    return [style.literal(name, most=18) for name in (names if len(set(names)) == len(names) else values)]


def _fits(names: Sequence[str], width: float) -> bool:
    """Whether names fit side by side into `width` inches."""
    return len(names) * (max(map(len, names)) + 2) * LETTER <= width


def _set_named_ticks(axes: Axes, values: Sequence[str]) -> None:
    """Sets ticks for values that are not numbers, as many as there is room for."""
    names, width = _names(values), axes.get_position().width * style.WIDTH
    flat = _fits(names, width)
    ticks = range(0, len(names), 1 if flat else math.ceil(2.5 * LETTER * len(names) / width))
    axes.set_xticks(
        list(ticks), [names[i] for i in ticks], rotation=0 if flat else 30, ha="center" if flat else "right"
    )
    axes.set_xlim(-0.5, len(names) - 0.5)


def _set_y_limits(axes: Axes, values: Sequence[float], errors: Sequence[float]) -> None:
    """Sets the limits of the y axis. Values far above the others are outside the axes; a note gives their number.

    Args:
        errors: the standard error of each value; NaN if unknown.
    """
    low, middle, high = np.quantile(values, (0, 0.5, 0.75))
    top = middle + OUTLYING * (high - low) if high > low else math.inf
    shown = [(v, e if math.isfinite(e) else 0.0) for v, e in zip(values, errors, strict=True) if v <= top]
    ends = [v + side * e for v, e in shown for side in (-1, 1)]
    pad = 0.06 * (max(ends) - min(ends)) or 0.5
    axes.set_ylim(min(ends) - pad, max(ends) + pad)
    if len(shown) < len(values):
        words, size = f"{len(values) - len(shown)} above", 8
        axes.text(0.99, 0.97, words, transform=axes.transAxes, color=style.MUTED, size=size, ha="right", va="top")


def _needs_log_axis(x: Sequence[float]) -> bool:
    return min(x) > 0 and max(x) >= FAR * min(x)
