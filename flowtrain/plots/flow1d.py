"""One-dimensional flows: the data, the samples and the density of the model in one picture."""

from pathlib import Path

import numpy as np
from torch import Tensor

from flowtrain.plots import points, scales, style
from flowtrain.plots.points import Array, LogDensity

HEIGHT = 3.6
DECADES = 5


def draw_flow_1d(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity,
    title: str,
    resolution: int = 1000,
    log_scale: bool = False,
) -> None:
    """Draw data (N, 1), samples (M, 1) and exp(log_density) over one axis to `path`.

    The limits and the scale depend on the data only. For heavy-tailed data the axis is logarithmic far from the bulk,
    and densities are per unit of the axis. `log_density` maps (resolution, 1) to (resolution,) and is called once.
    `log_scale` draws densities on a logarithmic axis, DECADES deep.
    """
    real, model = points.as_points(data, samples)
    points.require_width(real, 1)
    axis = scales.suited(real.values[:, 0])
    real, model = (scales.along([axis], each) for each in (real, model))
    limits = points.robust_range(real.values)
    x = points.centres(limits, resolution)
    density = points.evaluate(scales.density_along([axis], log_density), x[:, None])
    bins = points.fine_bins(real.values, limits, points.common_count(real.values, model.values))
    observed, edges = points.histogram_1d(real.values, limits, bins)
    sampled, _ = points.histogram_1d(model.values, limits, bins)
    with style.styled():
        figure = style.new_figure(HEIGHT, title)
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
            axes.set_ylim(2 * top / 10**DECADES, 2 * top)
        # the legend has its place on the left
        axes.yaxis.set_offset_position("right")
        style.legend_above(axes)
        style.save(figure, path)


def _top(observed: Array, sampled: Array, density: Array) -> float:
    """The upper end of the density axis: a needle of the model may not squash the data more than threefold."""
    highest = max(float(sampled.max()), float(np.nanmax(density, initial=0.0)))
    return 1.08 * (min(max(highest, float(observed.max())), 3 * float(observed.max())) or 1.0)
