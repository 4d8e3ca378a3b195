"""What a sweep has found, against each key that it swept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from flowtrain.plotting import style
from flowtrain.plotting.options import DEFAULT, PlotOptions

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
# inches that a letter of a tick's label takes
LETTER = 0.075


@dataclass(frozen=True)
class Swept:
    """The values of one key, as numbers if all are numbers, and for each name the results of the runs of each value.

    `errors` has the standard errors of some results, NaN if unknown.
    """

    values: list[str]
    numbers: list[float] | None
    found: dict[str, list[list[float]]]
    errors: dict[str, list[list[float]]] = field(default_factory=dict)


def draw_sweep(path: Path, *, lines: Mapping[str, Swept], title: str, options: PlotOptions = DEFAULT) -> None:
    """Draw what was measured, every run a point and their means a line, to `path`: a column of panels for each key.

    Bars are standard errors.
    Tolerances and what else spans orders of magnitude have logarithmic axes.
    """
    rows = [
        name for name, (names, _) in ROWS.items() if any(n in swept.found for swept in lines.values() for n in names)
    ]
    left, gap, between = 0.85, 0.75, 0.3
    width = (style.WIDTH - left - 0.2 - gap * (len(lines) - 1)) / len(lines)
    tilted = any(s.numbers is None and not _fits(_names(s.values), width) for s in lines.values())
    bottom = 1.15 if tilted else 0.65
    with style.styled():
        figure = style.new_figure(bottom + len(rows) * (PANEL_HEIGHT + between) + 0.55, title, options)
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
        style.save(figure, path, options)


def _panel(axes: Axes, swept: Swept, names: Sequence[str], logarithmic: bool) -> None:
    x = swept.numbers or [float(i) for i in range(len(swept.values))]
    for name in names:
        words, colour, marker = LOOKS[name]
        runs = swept.found.get(name, [])
        points = [(at, v) for at, row in zip(x, runs, strict=False) for v in row if math.isfinite(v)]
        bars = [bar for row in swept.errors.get(name, []) for bar in row]
        every = [v for row in runs for v in row]
        known = [(at, v, e) for (at, v, e) in zip(_repeated(x, runs), every, bars, strict=False) if v + e < math.inf]
        if known:
            at, middle, error = zip(*known, strict=True)
            axes.errorbar(at, middle, error, fmt="none", ecolor=colour, alpha=0.6, elinewidth=1, capsize=2)
        means = [(at, float(np.nanmean(row))) for at, row in zip(x, runs, strict=False) if np.isfinite(row).any()]
        if len(points) > len(means):
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, alpha=0.45, linewidth=0)
        if means:
            # nothing lies between one word and the next
            line = "-" if swept.numbers else ""
            axes.plot(*zip(*means, strict=True), f"{line}{marker}", color=colour, markersize=4.5, label=words)
    if swept.numbers is None:
        _name(axes, swept.values)
    else:
        if _spread(x):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif all(at == round(at) for at in x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    shown = [v for name in names for row in swept.found.get(name, []) for v in row if math.isfinite(v)]
    if shown and not logarithmic:
        _zoom(axes, shown)
    if logarithmic and axes.lines and all(np.all(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    if not axes.lines:
        style.annotate(axes, "not measured")


def _repeated(x: Sequence[float], runs: Sequence[Sequence[float]]) -> list[float]:
    """The position of every run on the x axis; runs of the same value share it."""
    return [at for at, row in zip(x, runs, strict=False) for _ in row]


def _names(values: Sequence[str]) -> list[str]:
    """Words for values: of paths what they end in, where that tells them apart."""
    names = [value.rstrip("/").rpartition("/")[2] for value in values]
    return [style.literal(name, most=18) for name in (names if len(set(names)) == len(names) else values)]


def _fits(names: Sequence[str], width: float) -> bool:
    """Whether names stand side by side in so many inches."""
    return len(names) * (max(map(len, names)) + 2) * LETTER <= width


def _name(axes: Axes, values: Sequence[str]) -> None:
    """Ticks for values that are words, and no more than there is room for."""
    names, width = _names(values), axes.get_position().width * style.WIDTH
    flat = _fits(names, width)
    ticks = range(0, len(names), 1 if flat else math.ceil(2.5 * LETTER * len(names) / width))
    axes.set_xticks(
        list(ticks), [names[i] for i in ticks], rotation=0 if flat else 30, ha="center" if flat else "right"
    )
    axes.set_xlim(-0.5, len(names) - 0.5)


def _zoom(axes: Axes, values: Sequence[float]) -> None:
    """Leaves out of view what is so far above the rest that nothing else could be told apart, and says so."""
    low, middle, high = np.quantile(values, (0, 0.5, 0.75))
    top = middle + FAR * (high - low)
    beyond = sum(value > top for value in values)
    if 0 < beyond < len(values) and high > low:
        shown = [value for value in values if value <= top]
        pad = 0.05 * (max(shown) - low) or 1.0
        axes.set_ylim(low - pad, max(shown) + pad)
        axes.text(
            0.99, 0.97, f"{beyond} above", transform=axes.transAxes, color=style.MUTED, size=8, ha="right", va="bottom"
        )


def _spread(x: Sequence[float]) -> bool:
    return min(x) > 0 and max(x) >= FAR * min(x)
