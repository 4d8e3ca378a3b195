"""Figures of a two-dimensional flow in time: densities, velocities, a warped grid, and paths of particles."""

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
from flowtrain.plotting.densities import paint, picture_limits
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, LogDensity, Range
from flowtrain.utils.errors import FlowtrainError

Velocity = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]

# inches
LEFT, BOTTOM, GAP, ROW_GAP, HEAD, RIGHT = 0.72, 0.36, 0.1, 0.1, 0.62, 0.08
RESOLUTION, ARROWS = 90, 15
# of its peak, the density below which no samples come
LEAST = 0.01
# the base's grid: how far out its lines lie, and how many there are each way
REACH, LINES, ALONG = 3.0, 13, 241


def draw_transport(
    path: Path,
    *,
    data: Tensor,
    names: Sequence[str],
    log_density: LogDensity,
    velocity: Velocity | None,
    forward: Forward,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw a row of densities, one of velocities where there are any, and one of the base's grid, to `path`.

    The limits come from the data (N, 2) alone, and each density has a colour scale of its own.

    Args:
        names: of the K moments.
        log_density: (G, 2) to (K, G), in nats.
        velocity: (G, 2) to (K, G, 2).
        forward: points of the base (P, 2) to where they are at each moment, (K, P, 2).
    """
    real = points.data_points(data, width=2)
    limits = picture_limits(real.values)
    heights = points.moments_2d(log_density, limits, RESOLUTION, len(names))
    tops = np.array([points.peak(height) or 1.0 for height in heights])
    rows = ["density", *([] if velocity is None else ["velocity"]), "grid of the base"]
    with style.styled():
        figure, panels = _panels(rows, names, limits, title, options)
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
        for axes, placed in zip(panels[-1], moved.reshape(len(names), *lines.shape), strict=True):
            _warped(axes, placed)
        style.save(figure, path, options)


def _panels(
    rows: Sequence[str], names: Sequence[str], limits: tuple[Range, Range], title: str, options: PlotOptions
) -> tuple[Figure, list[list[Axes]]]:
    """Square panels, a row for each name of `rows` and a column for each moment, with the same limits."""
    side = (style.WIDTH - LEFT - RIGHT - GAP * (len(names) - 1)) / len(names)
    height = BOTTOM + len(rows) * (side + ROW_GAP) - ROW_GAP + HEAD
    figure = style.new_figure(height, title, options)
    panels = []
    for row, word in enumerate(rows):
        bottom = BOTTOM + (len(rows) - 1 - row) * (side + ROW_GAP)
        line = []
        for column, name in enumerate(names):
            axes = style.add_axes(figure, LEFT + column * (side + GAP), bottom, side, side)
            axes.set(xlim=limits[0], ylim=limits[1])
            # labels at the very edge would run into those of the next panel
            style.round_ticks(axes, 4, prune="both")
            first, last = column == 0, row == len(rows) - 1
            axes.tick_params(length=2.5, labelsize=7, left=first, labelleft=first, bottom=last, labelbottom=last)
            # powers of ten are said once, where the panel above leaves room
            axes.yaxis.offsetText.set(visible=first and last, size=6)
            axes.xaxis.offsetText.set(visible=last and column == len(names) - 1, size=6)
            axes.spines[:].set_visible(True)
            if row == 0:
                axes.set_title(name, size=9.5)
            if column == 0:
                axes.set_ylabel(word)
                axes.yaxis.set_label_coords(-0.42 / side, 0.5)
            line.append(axes)
        panels.append(line)
    return figure, panels


def _inhabited(heights: Array, limits: tuple[Range, Range], at: Array) -> NDArray[np.bool_]:
    """Where of `at` (G, 2) densities (K, R, R), of which 1 is the peak, are not next to nothing, (K, G)."""
    lows, highs = np.array(limits).T
    x, y = np.clip(((at - lows) / (highs - lows) * RESOLUTION).astype(int), 0, RESOLUTION - 1).T
    return np.nan_to_num(heights[:, x, y]) > LEAST


def _arrows(panels: Sequence[Axes], at: Array, v: Array, inhabited: NDArray[np.bool_]) -> None:
    """v (K, G, 2) at the points `at` (G, 2) as arrows of one scale for all moments, pale where no samples come."""
    speed = np.sqrt((v**2).sum(-1))
    seen = speed[inhabited & np.isfinite(speed)]
    top = (float(np.quantile(seen, 0.98)) if seen.size else 0.0) or 1.0
    # where no samples come it may be as fast as it likes
    v = v * np.minimum(1.0, top / np.maximum(speed, 1e-12))[..., None]
    scale = top * ARROWS * 0.62
    for axes, one, here in zip(panels, v, inhabited, strict=True):
        for where, colour in ((~here, style.HAIRLINE), (here, style.INK)):
            axes.quiver(*at[where].T, *one[where].T, color=colour, angles="xy", scale=scale, width=0.008, headwidth=4)


def _lattice() -> Array:
    """The lines of the base's grid, (2, LINES, ALONG, 2): those along its second coordinate, then its first."""
    across, along = np.linspace(-REACH, REACH, LINES), np.linspace(-REACH, REACH, ALONG)
    first = np.stack(np.meshgrid(across, along, indexing="ij"), -1)
    return np.stack([first, first[..., ::-1]])


def _warped(axes: Axes, lines: Array) -> None:
    """Both families of lines (2, LINES, ALONG, 2), each in a colour of its own, the middle ones strongly."""
    for family, colour in zip(lines, (style.BLUE, style.VERMILLION), strict=True):
        widths = [1.5 if i == LINES // 2 else 0.7 for i in range(LINES)]
        axes.add_collection(LineCollection(list(family), colors=colour, linewidths=widths, alpha=0.85))


PATHS_HEIGHT = 4.75
# nats below the densest particles that colours tell apart
PATHS_DEPTH = 6.0


def draw_paths(
    path: Path,
    *,
    data: Tensor,
    states: Tensor,
    log_densities: Tensor,
    at: Sequence[float],
    axis: str,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw where particles go, states (K, P, 2), coloured by log_densities (K, P) in nats, to `path`.

    On the left the plane, from grey dots at the base to the data, over the data (N, 2); on the right the density that
    each particle is in, moment by moment, which is also the scale of the colours.

    Args:
        at: the K moments, as numbers.
        axis: what those are.

    Raises:
        FlowtrainError: data of other columns, or no path that is finite.
    """
    real = points.data_points(data, width=2)
    x, log_p = points.to_numpy(states), points.to_numpy(log_densities)
    kept = np.asarray(np.isfinite(x).all((0, 2)) & np.isfinite(log_p).all(0))
    if not kept.any():
        raise FlowtrainError(f"cannot draw where particles go: none of the {len(kept)} paths is finite")
    x, log_p = x[:, kept], log_p[:, kept]
    lost = f"{int((~kept).sum())} paths not finite" if not kept.all() else ""
    limits = picture_limits(np.concatenate([real.values, x[0]]))
    top = float(np.quantile(log_p, 0.98))
    with style.styled():
        figure = style.new_figure(PATHS_HEIGHT, title, options)
        plane = style.add_axes(figure, 0.54, 0.42, 3.72, 3.72)
        course = style.add_axes(figure, 5.05, 0.42, 3.72, 3.72)
        plane.plot(*real.values[:3000].T, ".", color=style.HAIRLINE, markersize=1.2, zorder=0)
        _coloured(plane, x, log_p, top)
        plane.plot(*x[0].T, "o", color=style.MUTED, markersize=1.8, zorder=3)
        ends: dict[str, Any] = {"c": log_p[-1], "cmap": _colours(), "vmin": top - PATHS_DEPTH, "vmax": top}
        plane.scatter(x[-1, :, 0], x[-1, :, 1], s=12, linewidths=0.5, edgecolors="white", zorder=4, **ends)
        plane.set(xlim=limits[0], ylim=limits[1])
        plane.set_title(points.noted(f"{x.shape[1]} particles, from the base (grey) to the data", lost), size=9.5)
        style.round_ticks(plane, 5)
        _course(course, np.asarray(at, dtype=np.float64), log_p, top, axis)
        style.save(figure, path, options)


def _coloured(axes: Axes, x: Array, log_p: Array, top: float) -> None:
    """A line through x (K, P, 2) for each particle, coloured by log_p (K, P)."""
    segments = np.stack([x[:-1], x[1:]], 2).reshape(-1, 2, 2)
    lines = LineCollection(list(segments), cmap=_colours(), linewidths=0.9, alpha=0.9, capstyle="round")
    lines.set_array((log_p[:-1] + log_p[1:]).ravel() / 2)
    lines.set_clim(top - PATHS_DEPTH, top)
    axes.add_collection(lines)


def _colours() -> matplotlib.colors.Colormap:
    # its lightest yellow is not to be seen on white
    shades = matplotlib.colormaps[style.DENSITY_MAP](np.linspace(0.0, 0.92, 256))
    return matplotlib.colors.ListedColormap(shades)


def _course(axes: Axes, at: Array, log_p: Array, top: float, axis: str) -> None:
    """log p of each particle against the moments, with their mean."""
    axes.grid(axis="y")
    _coloured(axes, np.stack([np.broadcast_to(at[:, None], log_p.shape), log_p], -1), log_p, top)
    axes.plot(at, log_p.mean(1), color=style.INK, linewidth=2.0, label="mean of all particles")
    low = float(np.quantile(log_p, 0.01))
    high = float(log_p.max())
    margin = 0.06 * (high - low) or 0.5
    axes.set(xlim=(at[0], at[-1]), ylim=(low - margin, high + margin), xlabel=axis)
    axes.set_ylabel("log density at the particle (nats)")
    style.legend_above(axes)
