"""Figures of the data, the samples and the density of one or two columns. Colour bars of densities."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from flowtrain.data.types import ColumnType
from flowtrain.plotting import points, scales, style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, LogDensity, Range
from flowtrain.plotting.scales import Scale, axis_label, set_ticks

HEIGHT_1D = 3.9
RESOLUTION_1D = 1000
# the number of decades on a logarithmic density axis
DECADES_1D = 5


def draw_flow_1d(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity | None,
    title: str,
    column: str = "x",
    true_log_density: LogDensity | None = None,
    resolution: int = RESOLUTION_1D,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    types: Sequence[ColumnType] = (),
) -> None:
    """Draws the density of the model with histograms of data (N, 1) and samples (M, 1).

    The limits, the scale and the bins depend on the data only. The axis of heavy-tailed data has an asinh scale, and
    densities are per unit of the axis.

    Args:
        log_density: maps (resolution, 1) to (resolution,), in nats. It is called once. None: no density is drawn.
        column: the name of the column.
        true_log_density: the log density of the data if it is known.
        log_scale: whether the axis of densities is logarithmic.
        types: the type of the column, whose support the axis does not leave; () for real numbers.
    """
    real, model = points.as_points(data, samples)
    points.require_width(real, 1)
    scale = scales.scales_of(real.values, types)[0]
    real, model = (scales.on_axes([scale], each) for each in (real, model))
    limits = scale.within(points.common_range(real.values[:, 0], model.values[:, 0]))
    x = points.centres(limits, resolution)
    density = np.zeros_like(x)
    if log_density is not None:
        density = points.evaluate(scales.density_on_axes([scale], log_density), x[:, None])
    bins = scale.bars or points.count_bins(real.values[:, 0], limits, points.common_count(real.values, model.values))
    observed, edges = points.histogram_1d(real.values, limits, bins)
    sampled, _ = points.histogram_1d(model.values, limits, bins)
    with style.styled():
        figure = style.new_figure(HEIGHT_1D, title, options)
        axes = style.add_axes(figure, left=0.78, bottom=0.55, width=8.08, height=2.68)
        name = points.noted("data", real.dropped_note())
        axes.stairs(observed, edges, fill=True, color=style.DATA_SHADES[0], linewidth=0, label=name)
        name = points.noted("samples", model.dropped_note(), points.outside_note(model, [limits]))
        axes.stairs(sampled, edges, color=style.SAMPLES, linewidth=1.3, baseline=None, label=name)
        if log_density is not None:
            name = points.noted("model density", points.missing_note(density))
            axes.plot(x, np.minimum(density, 1e30), color=style.DENSITY, label=name)
        if true_log_density is not None:
            truth = points.evaluate(scales.density_on_axes([scale], true_log_density), x[:, None])
            axes.plot(x, np.minimum(truth, 1e30), color=style.GREEN, dashes=style.DASHES[1], label="true density")
        top = _top(observed, sampled, density)
        axes.set_xlim(limits)
        axes.set_xlabel(axis_label(column, set_ticks(axes.xaxis, scale, most=10), 8))
        set_density_axis(axes, top, log_scale, "per unit" if scale.plain else "per unit of the axis")
        style.legend_above(axes)
        style.save(figure, path, options)


def set_density_axis(axes: Axes, top: float, log_scale: bool, unit: str) -> None:
    """Sets limits, ticks and label of an axis of densities, which ends at `top`, or at 2 `top` if it is logarithmic."""
    if not log_scale:
        axes.set_ylim(0, top)
        axes.set_ylabel(points.noted("density", " ".join(filter(None, (set_ticks(axes.yaxis), unit)))))
        return
    axes.set_yscale("log")
    low, high = 2 * top / 10**DECADES_1D, 2 * top
    decades = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    axes.set_yticks(decades, labels=scales.decades(decades))
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.set_ylabel(points.noted("density", unit))


def _top(observed: Array, sampled: Array, density: Array) -> float:
    """Returns the upper end of the density axis, which is at most about three times the highest bin of the data."""
    highest = max(float(sampled.max()), float(np.nanmax(density, initial=0.0)))
    return 1.08 * (min(max(highest, float(observed.max())), 3 * float(observed.max())) or 1.0)


BINS_2D = 120
# the range of a logarithmic colour scale, in nats
DEPTH_2D = 10.0
# inches
LEFT_2D, BOTTOM_2D, GAP_2D, HEAD_2D = 0.78, 0.5, 0.1, 0.63
# the width of a colour bar, and the width of its tick labels together with its label
BAR, BAR_LABELS = 0.14, 0.72
# the colour scale ends at most at this many times the peak of the data
BRIGHTEST = 2.5
Extend = Literal["neither", "min", "max", "both"]


def draw_flow_2d(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity | None,
    title: str,
    columns: Sequence[str] = ("x1", "x2"),
    true_log_density: LogDensity | None = None,
    resolution: int = 120,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    types: Sequence[ColumnType] = (),
) -> None:
    """Draws data (N, 2), samples (M, 2), the density of the model and the true density in a row of square panels.

    The panels have the same limits and one colour scale, which the colour bar shows. The limits depend on the data
    only. The colour scale ends at the peak of the true density if it is known, otherwise at the peak of data and model.
    The axis of a heavy-tailed column has an asinh scale, and densities are per unit of the axes.

    Args:
        log_density: maps (resolution**2, 2) to (resolution**2,), in nats. It is called once. None: the model has no
            panel.
        columns: the names of the columns.
        true_log_density: the log density of the data if it is known. None: no fourth panel.
        log_scale: whether colours show log densities, from the top of the colour scale to DEPTH_2D nats below.
        types: the types of the columns, whose supports the axes do not leave; () for real numbers.
    """
    real, model = points.as_points(data, samples)
    points.require_width(real, 2)
    scaled = scales.scales_of(real.values, types)
    real, model = (scales.on_axes(scaled, each) for each in (real, model))
    across, up = picture_limits(real.values, model.values)
    limits = scaled[0].within(across), scaled[1].within(up)
    blur = points.blur_2d(points.common_count(real.values, model.values))
    panels = [
        (
            points.noted("data", "histogram", real.dropped_note()),
            points.histogram_2d(real.values, limits, BINS_2D, blur),
        ),
        (
            points.noted("samples", "histogram", model.dropped_note(), points.outside_note(model, limits)),
            points.histogram_2d(model.values, limits, BINS_2D, blur),
        ),
    ]
    for name, function in (("model density", log_density), ("true density", true_log_density)):
        if function is not None:
            heights = points.moments_2d(scales.density_on_axes(scaled, function), limits, resolution, 1)[0]
            panels.append((points.noted(name, points.missing_note(heights)), heights))
    peaks = [points.peak(heights) for _, heights in panels]
    # the peak of a true density is exact, but the peaks of data and model depend on noise and on the fit
    top = (peaks[-1] if true_log_density is not None else 0.0) or min(max(peaks), BRIGHTEST * peaks[0]) or 1.0
    with style.styled():
        figure, row, side = row_of_panels(len(panels), limits, scaled, columns, title, options)
        for axes, (name, heights) in zip(row, panels, strict=True):
            paint(axes, log_share(heights, top) if log_scale else heights, limits, 1.0 if log_scale else top)
            axes.set_title(name, size=10 * min(1.0, side / (0.085 * len(name))))
        left = LEFT_2D + len(panels) * (side + GAP_2D)
        brightest = max(float(np.nanmax(heights, initial=0.0)) for _, heights in panels)
        density_bar(
            figure, left, side, top, brightest > top, log_scale, "area" if all(s.plain for s in scaled) else "axes"
        )
        style.save(figure, path, options)


def picture_limits(values: Array, samples: Array | None = None) -> tuple[Range, Range]:
    """Returns the limits of x and y for data (N, 2).

    Both have the same length, unless the range of one column is more than 4 times the range of the other column. If a
    column of the data is constant, or if there are few rows, its range reaches over the samples (M, 2), too.
    """
    others = np.empty((0, 2)) if samples is None else samples
    ranges = [points.common_range(*columns) for columns in zip(values.T, others.T, strict=True)]
    spans = [high - low for low, high in ranges]
    if max(spans) <= 4 * min(spans):
        half = max(spans) / 2
        ranges = [((low + high) / 2 - half, (low + high) / 2 + half) for low, high in ranges]
    return ranges[0], ranges[1]


def row_of_panels(
    count: int,
    limits: tuple[Range, Range],
    scaled: Sequence[Scale],
    columns: Sequence[str],
    title: str,
    options: PlotOptions,
) -> tuple[Figure, list[Axes], float]:
    """Creates a row of empty square panels with room for a colour bar. Also returns the side of a panel in inches."""
    side = (style.WIDTH - LEFT_2D - count * GAP_2D - BAR - BAR_LABELS) / count
    figure = style.new_figure(BOTTOM_2D + side + HEAD_2D, title, options)
    row = []
    for i in range(count):
        axes = style.add_axes(figure, LEFT_2D + i * (side + GAP_2D), BOTTOM_2D, side, side)
        axes.set(xlim=limits[0], ylim=limits[1])
        axes.set_xlabel(axis_label(columns[0], set_ticks(axes.xaxis, scaled[0], gap=GAP_2D), side))
        note = set_ticks(axes.yaxis, scaled[1])
        axes.tick_params(length=2.5, labelleft=i == 0, left=i == 0)
        axes.spines[:].set_visible(False)
        if i == 0:
            axes.set_ylabel(axis_label(columns[1], note, side))
        row.append(axes)
    return figure, row, side


def log_share(heights: Array, top: float) -> Array:
    """Returns 1 + log(heights / top) / DEPTH_2D, which is 1 at the top of the scale, clipped from below at 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(1 + np.log(heights / top) / DEPTH_2D, 0.0))


def density_bar(figure: Figure, left: float, side: float, top: float, clipped: bool, log_scale: bool, per: str) -> None:
    """Draws the colour bar of densities up to `top`, with an arrow if it is `clipped`.

    Args:
        clipped: whether some densities are larger than `top`.
        per: area, or axes if densities are per unit of the scaled axes.
    """
    unit = f"per unit {'area' if per == 'area' else 'of the axes'}"
    if log_scale:
        limits, extend = (math.log(top) - DEPTH_2D, math.log(top)), ("both" if clipped else "min")
        add_colour_bar(figure, left, BOTTOM_2D, side, limits, "log density", f"nats, {unit}", extend)
    else:
        extend = "max" if clipped else "neither"
        add_colour_bar(figure, left, BOTTOM_2D, side, (0.0, top), "density", unit, extend)


def add_colour_bar(
    figure: Figure,
    left: float,
    bottom: float,
    height: float,
    limits: Range,
    name: str,
    unit: str,
    extend: str = "neither",
    colours: Colormap = matplotlib.colormaps[style.DENSITY_MAP],
) -> None:
    """Draws a vertical colour bar with its label, placed in inches.

    Args:
        limits: the values of the first and the last colour.
        extend: the ends with an arrow for values outside the limits: neither, min, max or both.
    """
    axes = style.add_axes(figure, left, bottom, BAR, height)
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), colours), cax=axes, extend=extend)
    bar.outline.set_visible(False)
    note = set_ticks(axes.yaxis)
    axes.tick_params(length=2.5)
    axes.set_ylabel(points.noted(name, " ".join(filter(None, (note, unit)))))


def paint(
    axes: Axes,
    heights: Array,
    limits: tuple[Range, Range],
    top: float,
    colours: Colormap = matplotlib.colormaps[style.DENSITY_MAP],
) -> AxesImage:
    """Paints heights (K, K), first index along x, in colours from 0 to `top`; NaN in grey."""
    # the heights are first divided by `top`, because imshow would overflow for heights near the largest float
    return axes.imshow(
        np.minimum(heights.T / top, 1.0),
        extent=(*limits[0], *limits[1]),
        origin="lower",
        aspect="auto",
        cmap=colours.with_extremes(bad=style.HAIRLINE),
        vmin=0,
        vmax=1,
        interpolation="bilinear",
    )
