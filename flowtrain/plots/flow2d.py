"""Two-dimensional flows: the data, the samples and the density of the model, side by side."""

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from flowtrain.plots import points, scales, style
from flowtrain.plots.points import Array, LogDensity, Points, Range

HEIGHT = 3.68
BINS = 120
# nats from the top of a logarithmic scale of colours to its bottom
DEPTH = 10.0


def draw_flow_2d(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity,
    title: str,
    resolution: int = 120,
    log_scale: bool = False,
) -> None:
    """Draw data (N, 2), samples (M, 2) and exp(log_density) on a square grid, in three panels, to `path`.

    The limits come from the data alone: a stray sample must not squash the picture. `log_density` maps
    (resolution**2, 2) to (resolution**2,) and is called once. The axis of a heavy-tailed column is logarithmic far
    from the bulk, and densities are per unit of the axes. `log_scale`: colours by the logarithm, down to DEPTH under
    the top.
    """
    real, model = points.as_points(data, samples)
    points.require_width(real, 2)
    scaled = [scales.suited(column) for column in real.values.T]
    real, model = (scales.along(scaled, each) for each in (real, model))
    limits = picture_limits(real.values)
    density = points.evaluate(scales.density_along(scaled, log_density), points.grid_2d(limits, resolution)).reshape(
        resolution, resolution
    )
    blur = points.blur_2d(points.common_count(real.values, model.values))
    observed, sampled = (points.histogram_2d(each.values, limits, BINS, blur) for each in (real, model))
    top, density_top = _colour_scales(points.peak(observed), points.peak(density))
    own_scale = "" if density_top == top else "own colour scale"
    scale = f"colours by log p, {DEPTH:g} nats deep" if log_scale else ""
    density_name = points.noted("model density", points.missing(density), own_scale)
    with style.styled():
        figure = style.new_figure(HEIGHT, title)
        panels = _panels(figure, limits)
        for axes in panels:
            scaled[0].mark(axes.xaxis)
            scaled[1].mark(axes.yaxis)
        show = partial(_show, limits=limits, log_scale=log_scale)
        show(panels[0], observed, top=top, name=points.noted("data", real.lost()))
        show(panels[1], sampled, top=top, name=_samples_name(model, limits))
        show(panels[2], density, top=density_top, name=points.noted(density_name, scale))
        style.save(figure, path)


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


def _panels(figure: Figure, limits: tuple[Range, Range]) -> list[Axes]:
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


def _show(axes: Axes, heights: Array, limits: tuple[Range, Range], top: float, name: str, log_scale: bool) -> None:
    if log_scale:
        # nothing is as low as the scale goes; NaN stays
        with np.errstate(divide="ignore"):
            heights, top = np.maximum(1 + np.log(heights / top) / DEPTH, 0.0), 1.0
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
