"""Figures of the transport of a two-dimensional flow: densities, velocities, a warped grid, and paths of particles."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.plotting import points, style
from flowtrain.plotting.densities import add_colour_bar, paint, picture_limits
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, LogDensity, Range
from flowtrain.plotting.scales import LINEAR, Scale, axis_label, set_ticks
from flowtrain.utils.errors import FlowtrainError

Velocity = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]

# inches: margins, gaps, and the heights of a heading, of the names of moments, and of tick labels
LEFT, RIGHT, BOTTOM, GAP, ROW_GAP, TOP = 0.76, 0.1, 0.46, 0.1, 0.12, 0.46
HEADING, NAMES, TICKS = 0.2, 0.2, 0.22
RESOLUTION, ARROWS = 90, 15
# the largest number of letters of the title of a panel
TITLE_LETTERS = 34
# a region has no samples if the density is below this share of its peak
LEAST = 0.01
# the grid in the base: its half width, the number of lines in each direction, and the number of points on a line
REACH, LINES, ALONG = 3.0, 13, 241
# the largest number of panels with the warped grid, and the largest side of a panel in inches
GRIDS, LARGEST = 3, 2.7


def draw_transport(
    path: Path,
    *,
    data: Tensor,
    names: Sequence[str],
    log_density: LogDensity,
    velocity: Velocity | None,
    forward: Forward,
    title: str,
    columns: Sequence[str] = ("x1", "x2"),
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws how a flow transforms the base into the data, moment by moment.

    The first row shows the densities, each on a separate colour scale. The second row shows the velocities, if the flow
    has any. The last row shows a grid of the base that the flow has mapped, in larger panels for at most three moments.
    All panels have the same limits, which depend on the data (N, 2) only.

    Args:
        names: the names of the K moments.
        log_density: maps (G, 2) to (K, G), in nats.
        velocity: maps (G, 2) to (K, G, 2). None: no velocities.
        forward: maps points of the base (P, 2) to their positions at each moment, (K, P, 2).
        columns: the names of the columns.
    """
    real = points.data_points(data, width=2)
    limits = picture_limits(real.values)
    heights = points.moments_2d(log_density, limits, RESOLUTION, len(names))
    tops = np.array([points.peak(height) or 1.0 for height in heights])
    moments = list(range(len(names)))
    grids = [round(i) for i in np.linspace(0, len(names) - 1, min(GRIDS, len(names)))]
    rows = [("Density (each panel has a separate colour scale)", moments, True)]
    if velocity is not None:
        rows.append((f"Velocity (grey arrows: density below {LEAST:.0%} of its peak)", moments, False))
    rows.append(("Grid of the base, mapped by the flow (bold: axes of the base)", grids, True))
    with style.styled():
        figure, panels = square_panels(rows, names, limits, columns, title, options)
        for axes, height, top in zip(panels[0], heights, tops, strict=True):
            paint(axes, height, limits, top)
        if velocity is not None:
            at = points.grid_2d(limits, ARROWS)
            v = points.to_numpy(velocity(torch.from_numpy(at).to(torch.float32)))
            for axes, height, top in zip(panels[1], heights, tops, strict=True):
                paint(axes, height, limits, top, style.PALE_MAP)
            _arrows(panels[1], at, v, _inhabited(heights / tops[:, None, None], limits, at))
        lines = _lattice()
        moved = points.to_numpy(forward(torch.from_numpy(lines.reshape(-1, 2)).to(torch.float32)))
        placed = moved.reshape(len(names), *lines.shape)
        for axes, moment in zip(panels[-1], grids, strict=True):
            _draw_warped_lines(axes, placed[moment])
        style.save(figure, path, options)


Row = tuple[str, Sequence[int], bool]


def panel_titles(names: Sequence[str], width: float) -> tuple[list[str], float]:
    """Returns the titles of panels of this width in inches, and their size in points, which is the same for all."""
    titles = [style.abbreviated(name, TITLE_LETTERS) for name in names]
    return titles, min(9.0, width / (0.0084 * max(map(len, titles), default=1) or 1))


def square_panels(
    rows: Sequence[Row],
    names: Sequence[str],
    limits: tuple[Range, Range],
    columns: Sequence[str],
    title: str,
    options: PlotOptions,
    scaled: Sequence[Scale] = (LINEAR, LINEAR),
) -> tuple[Figure, list[list[Axes]]]:
    """Creates square panels with the same limits.

    Args:
        rows: for each row its heading, the positions of its panels in `names`, and whether the panels are named.
        scaled: the scales of x and y.
    """
    sides = [min(LARGEST, (style.WIDTH - LEFT - RIGHT - GAP * (len(row[1]) - 1)) / len(row[1])) for row in rows]
    # a row below with the same number of panels shows the same moments
    ticked = [i + 1 == len(rows) or len(rows[i][1]) != len(rows[i + 1][1]) for i in range(len(rows))]
    heads = [HEADING + NAMES * row[2] for row in rows]
    feet = [TICKS * labelled for labelled in ticked[:-1]]
    figure = style.new_figure(
        BOTTOM + sum(heads) + sum(sides) + sum(feet) + ROW_GAP * (len(rows) - 1) + TOP, title, options
    )
    bottom = figure.get_size_inches()[1] - TOP + (0 if options.title else style.TITLE_HEIGHT)
    panels = []
    for i, ((heading, moments, is_named), side) in enumerate(zip(rows, sides, strict=True)):
        look: dict[str, Any] = {"size": 9.5, "va": "top", "transform": figure.dpi_scale_trans}
        figure.text(LEFT, bottom, heading, **look)
        bottom -= heads[i] + side
        line = []
        for column, moment in enumerate(moments):
            axes = style.add_axes(figure, LEFT + column * (side + GAP), bottom, side, side)
            _frame(axes, limits, columns, scaled, column == 0, ticked[i], i + 1 == len(rows))
            if is_named:
                titles, size = panel_titles(names, side)
                axes.set_title(titles[moment], size=size, pad=4)
            line.append(axes)
        panels.append(line)
        bottom -= (TICKS if ticked[i] else 0) + ROW_GAP
    return figure, panels


def _frame(
    axes: Axes,
    limits: tuple[Range, Range],
    columns: Sequence[str],
    scaled: Sequence[Scale],
    first: bool,
    ticked: bool,
    last: bool,
) -> None:
    """Sets limits, ticks and names. Only the first panel of a row has labels on its y axis."""
    side = axes.get_window_extent().width / style.DPI
    axes.set(xlim=limits[0], ylim=limits[1])
    notes = [
        set_ticks(axis, scale, most=5, size=7, gap=GAP)
        for axis, scale in zip((axes.xaxis, axes.yaxis), scaled, strict=True)
    ]
    axes.tick_params(length=2.5, left=first, labelleft=first, bottom=ticked, labelbottom=ticked)
    axes.spines[:].set_visible(True)
    if last:
        axes.set_xlabel(axis_label(columns[0], notes[0], side), size=8.5)
    if first:
        axes.set_ylabel(axis_label(columns[1], notes[1], side), size=8.5)
        axes.yaxis.set_label_coords(-0.5 / side, 0.5)


def _inhabited(heights: Array, limits: tuple[Range, Range], at: Array) -> NDArray[np.bool_]:
    """Whether densities (K, R, R) with a peak of 1 are above LEAST at the points `at` (G, 2), shape (K, G)."""
    lows, highs = np.array(limits).T
    x, y = np.clip(((at - lows) / (highs - lows) * RESOLUTION).astype(int), 0, RESOLUTION - 1).T
    return np.nan_to_num(heights[:, x, y]) > LEAST


def _arrows(panels: Sequence[Axes], at: Array, v: Array, inhabited: NDArray[np.bool_]) -> None:
    """Draws v (K, G, 2) at the points `at` (G, 2) as arrows of one scale for all moments, grey outside `inhabited`."""
    speed = np.sqrt((v**2).sum(-1))
    seen = speed[inhabited & np.isfinite(speed)]
    top = (float(np.quantile(seen, 0.98)) if seen.size else 0.0) or 1.0
    # velocities outside regions with samples are not trained, and may be much larger
    v = v * np.minimum(1.0, top / np.maximum(speed, 1e-12))[..., None]
    scale = top * ARROWS * 0.62
    for axes, one, here in zip(panels, v, inhabited, strict=True):
        for where, colour in ((~here, style.HAIRLINE), (here, style.INK)):
            axes.quiver(*at[where].T, *one[where].T, color=colour, angles="xy", scale=scale, width=0.008, headwidth=4)


def _lattice() -> Array:
    """Returns the lines of the grid in the base, (2, LINES, ALONG, 2).

    The first coordinate is constant on each line of the first family, and the second coordinate in the second family.
    """
    across, along = np.linspace(-REACH, REACH, LINES), np.linspace(-REACH, REACH, ALONG)
    first = np.stack(np.meshgrid(across, along, indexing="ij"), -1)
    return np.stack([first, first[..., ::-1]])


def _draw_warped_lines(axes: Axes, lines: Array) -> None:
    """Draws both families of lines (2, LINES, ALONG, 2) in two colours, with the middle lines in bold."""
    for family, colour in zip(lines, (style.BLUE, style.VERMILLION), strict=True):
        widths = [1.5 if i == LINES // 2 else 0.7 for i in range(LINES)]
        axes.add_collection(LineCollection(list(family), colors=colour, linewidths=widths, alpha=0.85))


# inches: the height of the figure, the side of the plane, and the height of the panels
PATHS_HEIGHT, SIDE = 4.78, 3.55
# range of the colours, in nats
PATHS_DEPTH = 6.0
# the largest number of rows that are drawn as dots
DOTS = 3000
BASE, SAMPLE, DATA = style.INK, style.VERMILLION, style.DATA_SHADES[0]


def draw_paths(
    path: Path,
    *,
    data: Tensor,
    states: Tensor,
    log_densities: Tensor,
    at: Sequence[float],
    axis: str,
    title: str,
    columns: Sequence[str] = ("x1", "x2"),
    options: PlotOptions = DEFAULT,
    name: str = "data",
) -> None:
    """Draws the paths of particles from the base to the data.

    The left panel shows states (K, P, 2) in the plane, over the data (N, 2). The colour of a path is the log density at
    the particle, log_densities (K, P) in nats. The right panel shows this log density from moment to moment.

    Args:
        at: the K moments, as numbers.
        axis: the name of these numbers.
        columns: the names of the columns.
        name: the name of the data in the legend.

    Raises:
        FlowtrainError: the data do not have two columns, or no path is finite.
    """
    real = points.data_points(data, width=2)
    x, log_p = points.to_numpy(states), points.to_numpy(log_densities)
    kept = np.asarray(np.isfinite(x).all((0, 2)) & np.isfinite(log_p).all(0))
    if not kept.any():
        raise FlowtrainError(f"cannot draw paths of particles: none of the {len(kept)} paths is finite")
    x, log_p = x[:, kept], log_p[:, kept]
    lost = f"{int((~kept).sum())} not finite" if not kept.all() else ""
    limits = picture_limits(np.concatenate([real.values, x[0]]))
    top = float(np.quantile(log_p, 0.98))
    with style.styled():
        figure = style.new_figure(PATHS_HEIGHT, title, options)
        plane = style.add_axes(figure, LEFT, 0.52, SIDE, SIDE)
        plane.plot(*real.values[:DOTS].T, ".", color=DATA, markersize=1.5, zorder=0)
        _draw_coloured_paths(plane, x, log_p, top)
        plane.plot(*x[0].T, "o", color=BASE, markersize=2.4, zorder=3)
        plane.plot(*x[-1].T, "o", color=SAMPLE, markersize=4.2, markeredgecolor="white", markeredgewidth=0.5, zorder=4)
        plane.set(xlim=limits[0], ylim=limits[1])
        plane.set_xlabel(axis_label(columns[0], set_ticks(plane.xaxis), SIDE))
        plane.set_ylabel(axis_label(columns[1], set_ticks(plane.yaxis), SIDE))
        # the legend shows separate markers, because the dots of the data are too small
        for colour, words in (
            (BASE, "base"),
            (SAMPLE, points.noted("samples", f"{x.shape[1]} paths", lost)),
            (style.DATA_SHADES[1], name),
        ):
            plane.plot([], [], "o", color=colour, markersize=4.5, label=words)
        style.legend_above(plane)
        limits_of_colours = (top - PATHS_DEPTH, top)
        left = LEFT + SIDE + 0.12
        add_colour_bar(figure, left, 0.52, SIDE, limits_of_colours, "log density", "nats", "both", _colours())
        course = style.add_axes(figure, left + 1.5, 0.52, style.WIDTH - left - 1.5 - 0.14, SIDE)
        _draw_log_densities(course, np.asarray(at, dtype=np.float64), log_p, top, axis)
        style.save(figure, path, options)


def _draw_coloured_paths(axes: Axes, x: Array, log_p: Array, top: float) -> None:
    """Draws a line through x (K, P, 2) for each particle, coloured by log_p (K, P)."""
    segments = np.stack([x[:-1], x[1:]], 2).reshape(-1, 2, 2)
    lines = LineCollection(list(segments), cmap=_colours(), linewidths=0.9, alpha=0.9, capstyle="round")
    lines.set_array((log_p[:-1] + log_p[1:]).ravel() / 2)
    lines.set_clim(top - PATHS_DEPTH, top)
    axes.add_collection(lines)


def _colours() -> matplotlib.colors.Colormap:
    # the lightest yellow cannot be seen on white
    shades = matplotlib.colormaps[style.DENSITY_MAP](np.linspace(0.0, 0.92, 256))
    return matplotlib.colors.ListedColormap(shades)


def _draw_log_densities(axes: Axes, at: Array, log_p: Array, top: float, axis: str) -> None:
    """Draws the log density of each particle against the moments, and the mean."""
    _draw_coloured_paths(axes, np.stack([np.broadcast_to(at[:, None], log_p.shape), log_p], -1), log_p, top)
    axes.plot(at, log_p.mean(1), color=style.INK, linewidth=2.0, label="mean of all particles")
    low = float(np.quantile(log_p, 0.01))
    high = float(log_p.max())
    margin = 0.06 * (high - low) or 0.5
    axes.set(xlim=(at[0], at[-1]), ylim=(low - margin, high + margin))
    if (at == at.round()).all():
        # steps of a flow that is not continuous in time
        every = -(-len(at) // 9)
        axes.set_xticks(at[::every], labels=[f"{place:.0f}" for place in at[::every]], fontsize=8.0)
        axes.set_xlabel(axis)
    else:
        axes.set_xlabel(points.noted(axis, set_ticks(axes.xaxis, most=9)))
    axes.set_ylabel(
        points.noted("log density at the particle", " ".join(filter(None, (set_ticks(axes.yaxis), "nats"))))
    )
    axes.grid(axis="y")
    style.legend_above(axes)
