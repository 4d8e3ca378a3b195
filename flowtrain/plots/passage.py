"""How a two-dimensional flow gets from the base to the data: densities, velocities and a warped grid, moment by moment.

Shapes: K moments, G grid points, P points of the base.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.plots import points, style
from flowtrain.plots.flow2d import paint, picture_limits
from flowtrain.plots.points import Array, LogDensity, Range

Velocity = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]

# inches
LEFT, BOTTOM, GAP, ROW_GAP, HEAD, RIGHT = 0.72, 0.36, 0.1, 0.1, 0.62, 0.08
RESOLUTION, ARROWS = 90, 15
# of its peak, the density below which no samples come
LEAST = 0.01
# the base's grid: how far out its lines lie, and how many there are each way
REACH, LINES, ALONG = 3.0, 13, 241


def draw_passage(
    path: Path,
    *,
    data: Tensor,
    names: Sequence[str],
    log_density: LogDensity,
    velocity: Velocity | None,
    forward: Forward,
    title: str,
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
        figure, panels = _panels(rows, names, limits, title)
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
        style.save(figure, path)


def _panels(
    rows: Sequence[str], names: Sequence[str], limits: tuple[Range, Range], title: str
) -> tuple[Figure, list[list[Axes]]]:
    """Square panels, a row for each name of `rows` and a column for each moment, with the same limits."""
    side = (style.WIDTH - LEFT - RIGHT - GAP * (len(names) - 1)) / len(names)
    height = BOTTOM + len(rows) * (side + ROW_GAP) - ROW_GAP + HEAD
    figure = style.new_figure(height, title)
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
