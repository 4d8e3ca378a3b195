"""Figures of conditional flows: densities at several contexts, and the calibration by context."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flowtrain.evaluation.result import ContextBin
from flowtrain.plotting import points, scales, style
from flowtrain.plotting.densities import paint, picture_limits
from flowtrain.plotting.evaluation_figures import BAND, KOLMOGOROV, deviation
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, LogDensity, Points, Range
from flowtrain.plotting.scales import Scale, axis_label, set_ticks
from flowtrain.plotting.transport_figures import square_panels
from flowtrain.utils.formatting import counted, with_error

# inches: left edge, right edge, bottom edge, gap and height of the panels of one column, and the room above them
LEFT, RIGHT, BOTTOM, GAP, HEIGHT, HEAD = 0.5, 0.14, 0.55, 0.14, 1.9, 0.95
# the largest panel of one column
WIDEST = 2.8
RESOLUTION_1D, RESOLUTION_2D = 500, 90
# the number of bins of a histogram of the rows near a context
FEWEST_BINS, MOST_BINS = 8, 30
# the axis of densities ends at most at this multiple of the peak of the rows
TALLEST = 3.0
# the largest number of letters of the name of a panel
LETTERS = 34


def draw_contexts(
    path: Path,
    *,
    names: Sequence[str],
    data: Sequence[Tensor],
    log_densities: Sequence[LogDensity],
    columns: Sequence[str],
    title: str,
    near_words: str = "with the nearest contexts",
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws densities p(x | c) of one or two columns at several contexts c, with the rows whose contexts are near c.

    All panels have the same limits, which depend on the data only. Each panel has a separate scale of heights or
    colours. The axis of a heavy-tailed column has an asinh scale.

    Args:
        names: the names of the K contexts.
        data: rows (N_k, d) near each context, with d = 1 or 2.
        log_densities: for each context, a function from (G, d) to (G,), in nats.
        columns: the names of the columns.
        near_words: the words after the number of rows in the legend, which say how the rows were chosen.
    """
    near = [points.data_points(rows, width=len(columns)) for rows in data]
    values = np.concatenate([rows.values for rows in near])
    scaled = [scales.choose_scale(column) for column in values.T]
    near = [scales.on_axes(scaled, rows) for rows in near]
    functions = [scales.density_on_axes(scaled, function) for function in log_densities]
    short = [style.abbreviated(name, LETTERS) for name in names]
    draw = _contexts_1d if len(columns) == 1 else _contexts_2d
    with style.styled():
        words = f"{_row_counts(near)} {near_words}"
        style.save(draw(short, near, words, functions, scaled, columns, title, options), path, options)


def _row_counts(near: Sequence[Points]) -> str:
    """Returns the number of rows in the panels, such as "100 rows" and "50 to 100 rows"."""
    counts = [len(rows.values) + rows.dropped for rows in near]
    most = counted(max(counts), "row")
    return most if min(counts) == max(counts) else f"{min(counts):,} to {most}"


def _contexts_1d(
    names: Sequence[str],
    near: Sequence[Points],
    words: str,
    functions: Sequence[LogDensity],
    scaled: Sequence[Scale],
    columns: Sequence[str],
    title: str,
    options: PlotOptions,
) -> Figure:
    figure = style.new_figure(BOTTOM + HEIGHT + HEAD, title, options)
    count = len(names)
    width = min(WIDEST, (style.WIDTH - LEFT - RIGHT - GAP * (count - 1)) / count)
    limits = points.common_range(np.concatenate([rows.values[:, 0] for rows in near]), np.empty(0))
    x = points.centres(limits, RESOLUTION_1D)
    for i, (name, rows, function) in enumerate(zip(names, near, functions, strict=True)):
        axes = style.add_axes(figure, LEFT + i * (width + GAP), BOTTOM, width, HEIGHT)
        density = points.evaluate(function, x[:, None])
        bins = int(np.clip(points.count_bins(rows.values[:, 0], limits, len(rows.values)), FEWEST_BINS, MOST_BINS))
        observed, edges = points.histogram_1d(rows.values, limits, bins)
        axes.stairs(observed, edges, fill=True, color=style.DATA_SHADES[0], linewidth=0)
        axes.plot(x, np.minimum(density, points.FARTHEST), color=style.DENSITY)
        top = max(float(observed.max()), min(points.peak(density, 1.0), TALLEST * float(observed.max()))) or 1.0
        axes.set(xlim=limits, ylim=(0, 1.08 * top))
        axes.set_xlabel(axis_label(columns[0], set_ticks(axes.xaxis, scaled[0], gap=GAP), width))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        note = points.missing_note(density)
        axes.set_title(name, size=min(9.0, width / (0.0084 * len(name) or 1)), pad=4)
        if note:
            style.annotate(axes, note, y=0.95)
    figure.text(
        0.2 / style.WIDTH,
        (BOTTOM + HEIGHT / 2) / figure.get_size_inches()[1],
        "density (separate scale)",
        rotation=90,
        va="center",
        ha="center",
        size=9,
    )
    handles = [Line2D([], [], color=style.DENSITY), Patch(color=style.DATA_SHADES[0])]
    _legend(figure, handles, ["model density", words], BOTTOM + HEIGHT + 0.28)
    return figure


def _contexts_2d(
    names: Sequence[str],
    near: Sequence[Points],
    words: str,
    functions: Sequence[LogDensity],
    scaled: Sequence[Scale],
    columns: Sequence[str],
    title: str,
    options: PlotOptions,
) -> Figure:
    limits = picture_limits(np.concatenate([rows.values for rows in near]))
    panels = list(range(len(names)))
    rows = [
        ("Density of the model (each panel has a separate colour scale)", panels, True),
        (words, panels, False),
    ]
    figure, (above, below) = square_panels(rows, names, limits, columns, title, options, scaled)
    for axes, function in zip(above, functions, strict=True):
        heights = points.moments_2d(function, limits, RESOLUTION_2D, 1)[0]
        paint(axes, heights, limits, points.peak(heights) or 1.0)
    for axes, shown in zip(below, near, strict=True):
        size = float(np.clip(60 / math.sqrt(len(shown.values)), 2.0, 5.0))
        axes.plot(*shown.values.T, ".", color=style.DATA, markersize=size, alpha=0.6, markeredgewidth=0)
    return figure


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], bottom: float) -> None:
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(LEFT, bottom),
        bbox_transform=figure.dpi_scale_trans,
        ncols=len(labels),
        **{**style.LEGEND, "borderaxespad": 0.0},
    )


# the largest number of context columns with a panel
MOST_COLUMNS = 5
# inches: left edge, width and height of a panel, bottom edge, room above each panel, and room above all panels
PANEL_LEFT, PANEL_WIDTH, PANEL_HEIGHT, PANEL_BOTTOM, PANEL_ABOVE, PANELS_HEAD = 0.78, 4.3, 1.4, 0.5, 0.34, 0.52
CATEGORY_COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.ORANGE, style.PURPLE, style.INK)
# letters of a range or category in a legend
BIN_LETTERS = 22


def draw_calibration_by_context(
    path: Path,
    *,
    bins: Sequence[ContextBin],
    transforms: Sequence[tuple[str, Tensor]],
    labels: Mapping[str, str],
    unit: tuple[str, float],
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws F_n(u) - u of a transform u for each range and category of the context, in a panel for each context column.

    F_n(u) is the share of the rows of a bin whose transform is at most u. For a perfect model, a curve is within the
    band with a probability of 95%. The band is for the smallest bin. At most MOST_COLUMNS columns are drawn, those with
    the smallest p-values.

    Args:
        bins: the bins of all context columns.
        transforms: for each bin, the name of a transform and its values (rows,).
        labels: the names of columns, by the names of their transforms.
        unit: the unit of the NLL and the factor from nats.
    """
    columns: dict[str, list[int]] = {}
    for i, one in enumerate(bins):
        columns.setdefault(one.column, []).append(i)
    names = sorted(columns, key=lambda name: min(bins[i].p_value for i in columns[name]))[:MOST_COLUMNS]
    names = [name for name in columns if name in names]
    step = PANEL_HEIGHT + PANEL_ABOVE
    hidden = len(columns) - len(names)
    with style.styled():
        height = PANEL_BOTTOM + len(names) * step + PANELS_HEAD
        figure = style.new_figure(height, title, options)
        for row, name in enumerate(names):
            axes = style.add_axes(
                figure, PANEL_LEFT, PANEL_BOTTOM + (len(names) - 1 - row) * step, PANEL_WIDTH, PANEL_HEIGHT
            )
            _draw_bins(axes, [bins[i] for i in columns[name]], [transforms[i] for i in columns[name]], labels, unit)
            last = row + 1 == len(names)
            axes.tick_params(labelbottom=last)
            if last:
                axes.set_xlabel("u, the quantile of a row under the model")
        least = min(len(transforms[i][1]) for name in names for i in columns[name])
        words = f"band: 95% of perfect models, for {counted(least, 'row')}"
        if hidden:
            words += f"; {len(names)} of {len(columns)} context columns, those with the smallest p-values"
        top = PANEL_BOTTOM + len(names) * step
        figure.text(PANEL_LEFT, top + 0.02, words, transform=figure.dpi_scale_trans, color=style.MUTED, size=8.5)
        middle = (PANEL_BOTTOM + (len(names) * step - PANEL_ABOVE) / 2) / figure.get_size_inches()[1]
        words = "share below u, minus u" if len(names) == 1 else "share of rows below u, minus u"
        figure.text(0.16 / style.WIDTH, middle, words, rotation=90, va="center", size=9)
        style.save(figure, path, options)


def _draw_bins(
    axes: Axes,
    bins: Sequence[ContextBin],
    transforms: Sequence[tuple[str, Tensor]],
    labels: Mapping[str, str],
    unit: tuple[str, float],
) -> None:
    """Draws the deviations of the bins of one context column, with a legend beside the panel."""
    curves: list[Array] = [np.sort(points.to_numpy(u).clip(0, 1)) for _, u in transforms]
    band = KOLMOGOROV / math.sqrt(min(map(len, curves)))
    axes.fill_between([0, 1], -band, band, color=BAND, linewidth=0, zorder=0)
    axes.axhline(0, color=style.MUTED, linewidth=0.8, zorder=0.5)
    largest = band
    name, scale = unit
    for i, (one, u) in enumerate(zip(bins, curves, strict=True)):
        x, y = deviation(u)
        largest = max(largest, float(np.abs(y).max()))
        shade = i / max(1, len(bins) - 1)
        colour = CATEGORY_COLOURS[i] if one.low is None else matplotlib.colormaps[style.DENSITY_MAP](0.05 + 0.8 * shade)
        nll = with_error(scale * one.nll, scale * one.nll_stderr).replace("+-", "±")
        words = f"{style.abbreviated(one.words, BIN_LETTERS)}: NLL {nll}, KS {one.ks:.3f}"
        axes.plot(x, y, color=colour, linewidth=1.4, label=words)
    limits: Range = (-1.12 * largest, 1.12 * largest)
    axes.set(xlim=(-0.01, 1.01), ylim=limits)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    transform = transforms[0][0]
    of = f"{style.abbreviated(labels[transform], 24)} ({transform})" if transform in labels else transform
    axes.set_title(f"{of} by {style.abbreviated(bins[0].column, 24)}", loc="left", size=8.5)
    look: dict[str, Any] = {**style.LEGEND, "borderaxespad": 0.0, "labelspacing": 0.35, "fontsize": 8}
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.03, 1.0), title=f"context, NLL in {name}, KS of the worst transform", **look
    )
    legend.set_alignment("left")
    legend.get_title().set(size=8, color=style.MUTED)
