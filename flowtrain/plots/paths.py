"""The paths of particles of a two-dimensional flow, and the density along them.

Shapes: K moments, P particles.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from flowtrain.errors import FlowtrainError
from flowtrain.plots import points, style
from flowtrain.plots.flow2d import picture_limits
from flowtrain.plots.points import Array

HEIGHT = 4.75
# nats below the densest particles that colours tell apart
DEPTH = 6.0


def draw_paths(
    path: Path, *, data: Tensor, states: Tensor, log_densities: Tensor, at: Sequence[float], axis: str, title: str
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
        figure = style.new_figure(HEIGHT, title)
        plane = style.add_axes(figure, 0.54, 0.42, 3.72, 3.72)
        course = style.add_axes(figure, 5.05, 0.42, 3.72, 3.72)
        plane.plot(*real.values[:3000].T, ".", color=style.HAIRLINE, markersize=1.2, zorder=0)
        _coloured(plane, x, log_p, top)
        plane.plot(*x[0].T, "o", color=style.MUTED, markersize=1.8, zorder=3)
        ends: dict[str, Any] = {"c": log_p[-1], "cmap": _colours(), "vmin": top - DEPTH, "vmax": top}
        plane.scatter(x[-1, :, 0], x[-1, :, 1], s=12, linewidths=0.5, edgecolors="white", zorder=4, **ends)
        plane.set(xlim=limits[0], ylim=limits[1])
        plane.set_title(points.noted(f"{x.shape[1]} particles, from the base (grey) to the data", lost), size=9.5)
        style.round_ticks(plane, 5)
        _course(course, np.asarray(at, dtype=np.float64), log_p, top, axis)
        style.save(figure, path)


def _coloured(axes: Axes, x: Array, log_p: Array, top: float) -> None:
    """A line through x (K, P, 2) for each particle, coloured by log_p (K, P)."""
    segments = np.stack([x[:-1], x[1:]], 2).reshape(-1, 2, 2)
    lines = LineCollection(list(segments), cmap=_colours(), linewidths=0.9, alpha=0.9, capstyle="round")
    lines.set_array((log_p[:-1] + log_p[1:]).ravel() / 2)
    lines.set_clim(top - DEPTH, top)
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
