"""Figures of data, samples and density: one column, two columns, pairs of columns."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from flowtrain.plotting import points, style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, LogDensity, Points, Range
from flowtrain.utils.errors import FlowtrainError

HEIGHT_1D = 3.6
DECADES_1D = 5


def draw_flow_1d(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity,
    title: str,
    resolution: int = 1000,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw data (N, 1), samples (M, 1) and exp(log_density) over one axis to `path`.

    The limits and the scale depend on the data only. For heavy-tailed data the axis is logarithmic far from the bulk,
    and densities are per unit of the axis. `log_density` maps (resolution, 1) to (resolution,) and is called once.
    `log_scale` draws densities on a logarithmic axis, DECADES deep.
    """
    real, model = points.as_points(data, samples)
    points.require_width(real, 1)
    axis = points.suited(real.values[:, 0])
    real, model = (points.along([axis], each) for each in (real, model))
    limits = points.robust_range(real.values)
    x = points.centres(limits, resolution)
    density = points.evaluate(points.density_along([axis], log_density), x[:, None])
    bins = points.fine_bins(real.values, limits, points.common_count(real.values, model.values))
    observed, edges = points.histogram_1d(real.values, limits, bins)
    sampled, _ = points.histogram_1d(model.values, limits, bins)
    with style.styled():
        figure = style.new_figure(HEIGHT_1D, title, options)
        axes = style.add_axes(figure, left=0.62, bottom=0.4, width=8.2, height=2.56)
        name = points.noted("data", real.lost())
        axes.stairs(observed, edges, fill=True, color=style.DATA_SHADES[0], linewidth=0, label=name)
        name = points.noted("samples", model.lost(), points.outside(model, [limits]))
        axes.stairs(sampled, edges, color=style.SAMPLES, linewidth=1.3, baseline=None, label=name)
        name = points.noted("model density", points.missing(density))
        axes.plot(x, np.minimum(density, 1e30), color=style.DENSITY, label=name)
        top = _top(observed, sampled, density)
        words = "density" if axis.plain else "density along the axis, logarithmic far out"
        axes.set(xlim=limits, ylim=(0, top), ylabel=words)
        axis.mark(axes.xaxis)
        if log_scale:
            axes.set_yscale("log")
            axes.set_ylim(2 * top / 10**DECADES_1D, 2 * top)
        # the legend has its place on the left
        axes.yaxis.set_offset_position("right")
        style.legend_above(axes)
        style.save(figure, path, options)


def _top(observed: Array, sampled: Array, density: Array) -> float:
    """The upper end of the density axis: a needle of the model may not squash the data more than threefold."""
    highest = max(float(sampled.max()), float(np.nanmax(density, initial=0.0)))
    return 1.08 * (min(max(highest, float(observed.max())), 3 * float(observed.max())) or 1.0)


HEIGHT_2D = 3.68
BINS_2D = 120
# nats from the top of a logarithmic scale of colours to its bottom
DEPTH_2D = 10.0


def draw_flow_2d(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity,
    title: str,
    resolution: int = 120,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw data (N, 2), samples (M, 2) and exp(log_density) on a square grid, in three panels, to `path`.

    The limits come from the data alone: a stray sample must not squash the picture. `log_density` maps
    (resolution**2, 2) to (resolution**2,) and is called once. The axis of a heavy-tailed column is logarithmic far
    from the bulk, and densities are per unit of the axes. `log_scale`: colours by the logarithm, down to DEPTH under
    the top.
    """
    real, model = points.as_points(data, samples)
    points.require_width(real, 2)
    scaled = [points.suited(column) for column in real.values.T]
    real, model = (points.along(scaled, each) for each in (real, model))
    limits = picture_limits(real.values)
    density = points.evaluate(points.density_along(scaled, log_density), points.grid_2d(limits, resolution)).reshape(
        resolution, resolution
    )
    blur = points.blur_2d(points.common_count(real.values, model.values))
    observed, sampled = (points.histogram_2d(each.values, limits, BINS_2D, blur) for each in (real, model))
    top, density_top = _colour_scales(points.peak(observed), points.peak(density))
    own_scale = "" if density_top == top else "own colour scale"
    scale = f"colours by log p, {DEPTH_2D:g} nats deep" if log_scale else ""
    density_name = points.noted("model density", points.missing(density), own_scale)
    with style.styled():
        figure = style.new_figure(HEIGHT_2D, title, options)
        panels = _panels_2d(figure, limits)
        for axes in panels:
            scaled[0].mark(axes.xaxis)
            scaled[1].mark(axes.yaxis)
        show = partial(_show_2d, limits=limits, log_scale=log_scale)
        show(panels[0], observed, top=top, name=points.noted("data", real.lost()))
        show(panels[1], sampled, top=top, name=_samples_name(model, limits))
        show(panels[2], density, top=density_top, name=points.noted(density_name, scale))
        style.save(figure, path, options)


def picture_limits(values: Array) -> tuple[Range, Range]:
    """Limits of x and y for data (N, 2): one scale for both, unless their units differ too much for that."""
    ranges = [points.robust_range(column) for column in values.T]
    spans = [high - low for low, high in ranges]
    if max(spans) <= 4 * min(spans):
        half = max(spans) / 2
        ranges = [((low + high) / 2 - half, (low + high) / 2 + half) for low, high in ranges]
    return ranges[0], ranges[1]


def _colour_scales(data: float, model: float) -> tuple[float, float]:
    """The tops of the colour scales, for the points and for the density, from the peaks of data and model.

    One scale makes colours comparable, but would show a flat model as nothing, and dim the data for a needle.
    """
    if model == 0 or data == 0 or data / 4 <= model <= 2.5 * data:
        return (max(data, model) or 1.0,) * 2
    return data, model


def _samples_name(model: Points, limits: tuple[Range, Range]) -> str:
    return points.noted("samples", model.lost(), points.outside(model, limits))


def _panels_2d(figure: Figure, limits: tuple[Range, Range]) -> list[Axes]:
    """Three empty square panels in a row, with the same limits."""
    side, gap, left, bottom = 2.67, 0.14, 0.54, 0.38
    panels = []
    for column in range(3):
        axes = style.add_axes(figure, left + column * (side + gap), bottom, side, side)
        axes.set(xlim=limits[0], ylim=limits[1])
        style.round_ticks(axes, 5)
        axes.tick_params(length=2.5, labelleft=column == 0, left=column == 0)
        axes.spines[:].set_visible(False)
        panels.append(axes)
    return panels


def _show_2d(axes: Axes, heights: Array, limits: tuple[Range, Range], top: float, name: str, log_scale: bool) -> None:
    if log_scale:
        # nothing is as low as the scale goes; NaN stays
        with np.errstate(divide="ignore"):
            heights, top = np.maximum(1 + np.log(heights / top) / DEPTH_2D, 0.0), 1.0
    paint(axes, heights, limits, top)
    axes.set_title(name, size=10 * min(1.0, 36 / len(name)))


def paint(
    axes: Axes,
    heights: Array,
    limits: tuple[Range, Range],
    top: float,
    colours: Colormap = matplotlib.colormaps[style.DENSITY_MAP],
) -> AxesImage:
    """Paint heights (K, K), first index along x, on a colour scale from 0 to `top`; NaN in grey."""
    # divided by the top first: a height near the largest float would overflow in the resampling
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


HEIGHT_PAIRS = 9.2
BINS_PAIRS = 60
MASSES = (0.9, 0.6, 0.3)
# fewer points than this make contours of noise
FEWEST = 200
# smallest distance between two ticks of a compressed axis, as a share of its length; panels are small
APART_PAIRS = 0.25


def draw_pairs(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    columns: tuple[str, ...],
    title: str,
    most: int = 5,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw the first `most` columns of data (N, d) and samples (M, d) against each other to `path`.

    The diagonal holds the histogram of each column, the triangle under it the smallest regions that hold 30, 60
    and 90 percent of the points of each pair. The limits come from the data alone. The axis of a heavy-tailed column
    is logarithmic far from the bulk, and densities are per unit of the axes.
    """
    real, model = points.as_points(data, samples)
    width = real.values.shape[1]
    count = min(width, max(most, 1))
    scaled = [points.suited(column) for column in real.values.T[:count]] + [points.Scale()] * (width - count)
    real, model = (points.along(scaled, each) for each in (real, model))
    limits = [points.robust_range(column) for column in real.values.T[:count]]
    names = [style.literal(columns[i] if i < len(columns) else f"x{i + 1}", most=80 // count) for i in range(count)]
    with style.styled():
        side = (style.WIDTH - 0.85) / count
        figure = style.new_figure(HEIGHT_PAIRS, title, options)
        for row in range(count):
            for column in range(row + 1):
                box = (0.7 + column * side, 0.62 + (count - 1 - row) * side, 0.93 * side, 0.93 * side)
                axes = style.add_axes(figure, *box)
                if row == column:
                    _pair_histograms(axes, real.values[:, row], model.values[:, row], limits[row])
                else:
                    pair = (limits[column], limits[row])
                    _regions(axes, real.values[:, [column, row]], model.values[:, [column, row]], pair)
                _pair_label(axes, row, column, names)
                scaled[column].mark(axes.xaxis, APART_PAIRS)
                if row != column:
                    scaled[row].mark(axes.yaxis, APART_PAIRS)
        notes = [f"first {count} of {width} columns"] if count < width else []
        if count > 1 and len(real.values) >= FEWEST:
            notes.append("regions of " + ", ".join(f"{mass:.0%}" for mass in sorted(MASSES)) + " of the points")
        if not all(each.plain for each in scaled):
            notes.append("axes of heavy-tailed columns are logarithmic far out")
        _pair_legend(figure, (points.noted("data", real.lost()), points.noted("samples", model.lost())), notes)
        style.save(figure, path, options)


def _pair_histograms(axes: Axes, real: Array, model: Array, limits: Range) -> None:
    bins = points.fine_bins(real, limits, points.common_count(real, model), BINS_PAIRS)
    observed, edges = points.histogram_1d(real, limits, bins)
    sampled, _ = points.histogram_1d(model, limits, bins)
    axes.stairs(observed, edges, fill=True, color=style.DATA_SHADES[0], linewidth=0)
    axes.stairs(sampled, edges, color=style.SAMPLES, linewidth=1.2, baseline=None)
    axes.set(xlim=limits, ylim=(0, 1.12 * min(max(observed.max(), sampled.max()), 3 * observed.max())))


def _regions(axes: Axes, real: Array, model: Array, limits: tuple[Range, Range]) -> None:
    """Data (N, 2) as filled regions and samples (M, 2) as outlines; as dots where there are too few points."""
    # contours follow the counting noise more closely than colours do
    blur = 1.5 * points.blur_2d(points.common_count(real, model))
    grid = [points.centres(edge, BINS_PAIRS) for edge in limits]
    for values, filled in ((real, True), (model, False)):
        heights = points.histogram_2d(values, limits, BINS_PAIRS, blur)
        levels = _levels(heights)
        if len(values) < FEWEST or len(levels) < len(MASSES):
            colour = style.DATA if filled else style.SAMPLES
            axes.plot(values[:2000, 0], values[:2000, 1], ".", color=colour, markersize=3, alpha=0.6)
        elif filled:
            axes.contourf(*grid, heights.T, levels=[*levels, 2 * heights.max()], colors=style.DATA_SHADES)
        else:
            axes.contour(*grid, heights.T, levels=levels, colors=style.SAMPLES, linewidths=1.0)
    axes.set(xlim=limits[0], ylim=limits[1])


def _levels(heights: Array) -> list[float]:
    """The rising heights above which the MASSES lie, those that can be told apart."""
    levels = sorted({points.peak(heights, 1 - mass) for mass in MASSES})
    return [level for level in levels if heights.min() < level < heights.max()]


def _pair_label(axes: Axes, row: int, column: int, names: Sequence[str]) -> None:
    """Ticks and names at the outer edges only."""
    last = row == len(names) - 1
    style.round_ticks(axes, 3)
    axes.tick_params(labelbottom=last, labelleft=column == 0)
    if last:
        axes.set_xlabel(names[column])
    if row == column:
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False, labelleft=False)
    elif column == 0:
        axes.set_ylabel(names[row])
        # one column of names, however wide the tick labels are
        axes.yaxis.set_label_coords(-0.52 / (axes.get_position().width * style.WIDTH), 0.5)


def _pair_legend(figure: Figure, names: tuple[str, str], notes: list[str]) -> None:
    """What the colours mean, in the empty corner."""
    handles = [Patch(color=style.DATA_SHADES[1]), Line2D([], [], color=style.SAMPLES)]
    right, top = style.WIDTH - style.EDGE, HEIGHT_PAIRS - 0.5
    inches = figure.dpi_scale_trans
    layout = {**style.LEGEND, "borderaxespad": 0.0, "labelspacing": 0.4}
    figure.legend(
        handles,
        names,
        loc="upper right",
        bbox_to_anchor=(right, top),
        bbox_transform=inches,
        fontsize=10,
        **layout,
    )
    figure.text(right, top - 0.55, "\n".join(notes), transform=inches, color=style.MUTED, size=8, ha="right", va="top")


def draw_flow(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity,
    columns: tuple[str, ...],
    title: str,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw data (N, d) against samples (M, d) to `path`, in the way that suits d.

    Up to two columns the model's density is drawn as well, from one call of `log_density`, (G, d) to (G,).
    Beyond, it is not called: a slice through a density of many columns shows next to nothing. `log_scale` shows
    two columns, and the density of one, by their logarithm.
    """
    if data.ndim != 2:
        raise FlowtrainError(f"cannot plot data of shape {tuple(data.shape)}: give it as (rows, columns)")
    if data.shape[1] == 1:
        draw_flow_1d(
            path, data=data, samples=samples, log_density=log_density, title=title, log_scale=log_scale, options=options
        )
    elif data.shape[1] == 2:
        draw_flow_2d(
            path, data=data, samples=samples, log_density=log_density, title=title, log_scale=log_scale, options=options
        )
    else:
        draw_pairs(path, data=data, samples=samples, columns=columns, title=title, options=options)
