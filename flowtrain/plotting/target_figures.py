"""Figures of a target and a flow: densities of one or two columns, importance weights, and samples by mode."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from torch import Tensor

from flowtrain.data.types import ColumnType
from flowtrain.evaluation.targets import FOUND
from flowtrain.plotting import points, scales, style
from flowtrain.plotting.densities import (
    GAP_2D,
    HEIGHT_1D,
    LEFT_2D,
    RESOLUTION_1D,
    density_bar,
    log_share,
    paint,
    picture_limits,
    row_of_panels,
    set_density_axis,
)
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, LogDensity, Range
from flowtrain.plotting.scales import MINUS, Scale, axis_label, set_ticks

RESOLUTION_2D = 160
# the upper limit of the colour scale, as a multiple of the peak of the target
BRIGHTEST = 2.5
# the upper limit of the axis of densities, as a multiple of the peak of the target
HIGHEST = 1.5
# the largest number of modes that are drawn as bars. More modes are drawn as steps
MOST_BARS = 60
# inches: the height of the figures of weights and modes, and the position of their axes
HEIGHT, LEFT, BOTTOM, WIDE, TALL = 3.9, 0.78, 0.55, 8.08, 2.68
# the colour of the Pareto tail
PALE = "#ECECEC"
# the number of bins of a histogram of log weights
WEIGHT_BINS = 100


def draw_target_1d(
    path: Path,
    *,
    target: Tensor,
    samples: Tensor,
    cover: Tensor,
    log_density: LogDensity,
    target_log_density: LogDensity,
    title: str,
    column: str = "x1",
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    types: Sequence[ColumnType] = (),
) -> None:
    """Draws the densities of a target and a flow of one column, and a histogram of samples of the flow.

    Args:
        target: points of the target (N, 1), which determine the scale of the axis.
        samples: samples of the flow (M, 1).
        cover: points (K, 1) that the axis must contain.
        log_density, target_log_density: the normalized log densities of flow and target, (G, 1) to (G,), in nats.
        column: the name of the column.
        log_scale: whether the axis of densities is logarithmic.
        types: the type of the column, which limits the axis to its support. () for real numbers.
    """
    real, model = points.as_points(target, samples)
    points.require_width(real, 1)
    scale = scales.scales_of(real.values, types)[0]
    model = scales.on_axes([scale], model)
    limits = scale.within(points.robust_range(scale.places(points.to_numpy(cover))[:, 0]))
    x = points.centres(limits, RESOLUTION_1D)
    truth, density = (
        points.evaluate(scales.density_on_axes([scale], each), x[:, None]) for each in (target_log_density, log_density)
    )
    bins = points.count_bins(model.values[:, 0], limits, len(model.values))
    sampled, edges = points.histogram_1d(model.values, limits, bins)
    with style.styled():
        figure = style.new_figure(HEIGHT_1D, title, options)
        axes = style.add_axes(figure, LEFT, BOTTOM, WIDE, TALL)
        name = points.noted("target density", points.missing_note(truth))
        axes.fill_between(x, np.minimum(truth, 1e30), color=style.DATA_SHADES[0], linewidth=0, label=name)
        axes.plot(x, np.minimum(truth, 1e30), color=style.DATA, linewidth=1.0)
        name = points.noted("samples", model.dropped_note(), points.outside_note(model, [limits]))
        axes.stairs(sampled, edges, color=style.SAMPLES, linewidth=1.1, baseline=None, label=name)
        name = points.noted("flow density", points.missing_note(density))
        axes.plot(x, np.minimum(density, 1e30), color=style.DENSITY, linewidth=1.3, linestyle=style.DASHES, label=name)
        highest = float(np.nanmax(truth, initial=0.0))
        other = max(float(np.nanmax(density, initial=0.0)), float(sampled.max()))
        top = 1.08 * (min(max(highest, other), HIGHEST * highest) or other or 1.0)
        axes.set_xlim(limits)
        axes.set_xlabel(axis_label(column, set_ticks(axes.xaxis, scale, most=10), WIDE))
        set_density_axis(axes, top, log_scale, "per unit" if scale.plain else "per unit of the axis")
        style.legend_above(axes)
        style.save(figure, path, options)


def draw_target_2d(
    path: Path,
    *,
    target: Tensor,
    samples: Tensor,
    cover: Tensor,
    log_density: LogDensity,
    target_log_density: LogDensity,
    title: str,
    columns: Sequence[str] = ("x1", "x2"),
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    types: Sequence[ColumnType] = (),
) -> None:
    """Draws the density of a target, the density of a flow and samples of the flow in a row of square panels.

    The panels have the same limits and the same colour scale.

    Args:
        target: points of the target (N, 2), which determine the scales of the axes.
        samples: samples of the flow (M, 2).
        cover: points (K, 2) that the axes must contain.
        log_density, target_log_density: the normalized log densities of flow and target, (G, 2) to (G,), in nats.
        columns: the names of the columns.
        log_scale: whether colours show log densities.
        types: the types of the columns, which limit the axes to their supports. () for real numbers.
    """
    real, model = points.as_points(target, samples)
    points.require_width(real, 2)
    scaled = scales.scales_of(real.values, types)
    model = scales.on_axes(scaled, model)
    limits = limits_of(cover, scaled)
    panels = []
    for name, function in (("target density", target_log_density), ("flow density", log_density)):
        heights = points.moments_2d(scales.density_on_axes(scaled, function), limits, RESOLUTION_2D, 1)[0]
        panels.append((points.noted(name, points.missing_note(heights)), heights))
    outside = points.outside_note(model, limits)
    heights = points.histogram_2d(model.values, limits, RESOLUTION_2D, points.blur_2d(len(model.values)))
    panels.append((points.noted("samples", "histogram", model.dropped_note(), outside), heights))
    peaks = [points.peak(heights) for _, heights in panels]
    top = (min(max(peaks[:2]), BRIGHTEST * peaks[0]) if peaks[0] else max(peaks)) or 1.0
    with style.styled():
        figure, row, side = row_of_panels(len(panels), limits, scaled, columns, title, options)
        for axes, (name, heights) in zip(row, panels, strict=True):
            paint(axes, log_share(heights, top) if log_scale else heights, limits, 1.0 if log_scale else top)
            axes.set_title(name, size=10 * min(1.0, side / (0.085 * len(name))))
        left = LEFT_2D + len(panels) * (side + GAP_2D)
        clipped = max(float(np.nanmax(heights, initial=0.0)) for _, heights in panels) > top
        density_bar(figure, left, side, top, clipped, log_scale, "area" if all(s.plain for s in scaled) else "axes")
        style.save(figure, path, options)


def limits_of(cover: Tensor, scaled: Sequence[Scale]) -> tuple[Range, Range]:
    """Returns limits of x and y, on axes with these scales, that contain points (K, 2) and stay in the supports."""
    places = scales.on_axes(scaled, points.Points(points.to_numpy(cover), 0))
    across, up = picture_limits(places.values)
    return scaled[0].within(across), scaled[1].within(up)


def draw_weights(
    path: Path,
    *,
    log_w: Tensor,
    log_z: float,
    ess: float,
    pareto_k: float | None,
    tail: float | None,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws two histograms of log w - log Z of samples of a flow: unweighted, and weighted by w.

    If the flow equals the target, all values are 0. The weighted histogram shows how much each range of weights
    contributes to the estimate of Z. The axis of log weights contains 0 and the values from the 0.5% quantile to the
    largest one. The axis of shares is logarithmic, because few samples are in the Pareto tail.

    Args:
        log_w: log weights (n,) in nats, -inf for weights of 0.
        log_z: the estimate of log Z in nats.
        ess: the effective sample size as a share of the samples.
        pareto_k: the shape of the Pareto tail. None if unknown.
        tail: the log weight at which the Pareto tail begins, in nats. None if unknown.
    """
    every = points.to_numpy(log_w) - log_z
    values = np.sort(every[np.isfinite(every)])
    dropped, n = len(every) - len(values), max(len(every), 1)
    low, high = _range_of_weights(values)
    counts, edges = np.histogram(values, bins=WEIGHT_BINS, range=(low, high))
    shares = np.exp(values - values[-1]) if len(values) else values
    weighted = np.histogram(values, edges, weights=shares)[0] / max(float(shares.sum()), 1e-300)
    below = float((values < low).sum()) / n
    notes = [f"{below:.1%} below the axis" if below >= 0.001 else "", f"{dropped:,} zero" if dropped else ""]
    names = [points.noted(f"{len(every):,} samples", f"ESS {ess:.1%}", *notes), "weighted by w", "w = Z"]
    if tail is not None and low < tail - log_z < high:
        count = int((values >= tail - log_z).sum())
        names.append(points.noted("Pareto tail", f"{count:,} weights", "" if pareto_k is None else f"k {pareto_k:.2f}"))
    with style.styled():
        figure = style.new_figure(HEIGHT + style.legend_height(names, WIDE), title, options)
        axes = style.add_axes(figure, LEFT, BOTTOM, WIDE, TALL)
        look: dict[str, Any] = {"fill": True, "color": style.DATA_SHADES[1], "linewidth": 0}
        # a logarithmic axis has no zero
        bottom = 0.5 / n
        axes.stairs(np.maximum(counts / n, bottom), edges, baseline=bottom, label=names[0], **look)
        axes.stairs(
            np.maximum(weighted, bottom),
            edges,
            color=style.SAMPLES,
            linewidth=1.2,
            baseline=None,
            label="weighted by w",
        )
        axes.axvline(0, color=style.INK, linestyle=style.DASHES, linewidth=1.1, label=names[2])
        if len(names) > 3:
            axes.axvspan(float(tail or 0.0) - log_z, high, color=PALE, linewidth=0, zorder=0, label=names[3])
        axes.set_yscale("log")
        decades = [10.0**k for k in range(math.ceil(math.log10(bottom)), 1)]
        axes.set_yticks(decades, labels=scales.decades(decades))
        axes.minorticks_off()
        axes.set(xlim=(low, high), ylim=(bottom, 1.5))
        axes.set_xlabel(
            axis_label(f"log w {MINUS} log Z", ", ".join(filter(None, (set_ticks(axes.xaxis), "nats"))), WIDE)
        )
        axes.set_ylabel("share per bin")
        style.legend_above(axes)
        style.save(figure, path, options)


def _range_of_weights(values: Array) -> Range:
    """Returns the limits of the axis of log weights for sorted values (n,). The limits contain 0."""
    if len(values) == 0:
        return -1.0, 1.0
    low, high = min(float(np.quantile(values, 0.005)), 0.0), max(float(values[-1]), 0.0)
    # if the flow equals the target, the weights differ only by rounding
    margin = max(0.04 * (high - low), 1e-6)
    return low - margin, high + margin


def draw_modes(
    path: Path,
    *,
    shares: Sequence[float],
    true_shares: Sequence[float] | None,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws the share of the samples of a flow at each of k modes, beside the shares of exact samples.

    The modes are sorted by the share of the samples of the flow, the largest share first.

    Args:
        shares: the shares of the samples of the flow, (k,).
        true_shares: the shares of the exact samples, (k,). None: unknown. A line at 1 / k is then drawn instead.
    """
    flow = np.asarray(shares, dtype=np.float64)
    count = len(flow)
    truth = np.full(count, 1 / count) if true_shares is None else np.asarray(true_shares, dtype=np.float64)
    order = np.argsort(-flow, kind="stable")
    flow, truth = flow[order], truth[order]
    missed = int((flow < FOUND * truth).sum())
    place = np.arange(1, count + 1)
    with style.styled():
        figure = style.new_figure(HEIGHT, title, options)
        axes = style.add_axes(figure, LEFT, BOTTOM, WIDE, TALL)
        name = points.noted("samples of the flow", f"{missed} of {count} modes below {FOUND:.0%} of the true share")
        if count <= MOST_BARS:
            beside = 0.0 if true_shares is None else 0.2
            axes.bar(place - beside, flow, 0.4 if beside else 0.8, color=style.SAMPLES, linewidth=0, label=name)
            if true_shares is not None:
                axes.bar(place + beside, truth, 0.4, color=style.DATA, linewidth=0, label="exact samples")
        else:
            edges = np.arange(count + 1) + 0.5
            axes.stairs(flow, edges, fill=True, color=style.SAMPLES, linewidth=0, label=name)
            if true_shares is not None:
                axes.stairs(truth, edges, color=style.DATA, linewidth=0.8, baseline=None, label="exact samples")
        if true_shares is None:
            look: dict[str, Any] = {"color": style.INK, "linestyle": style.DASHES, "linewidth": 1.1}
            axes.axhline(1 / count, label="equal shares", **look)
        axes.set(xlim=(0.4, count + 0.6), ylim=(0, 1.08 * max(float(flow.max()), float(truth.max()), 1e-12)))
        # for one mode, MaxNLocator would choose fractions
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True) if count > 1 else FixedLocator([1]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("mode, by share of samples")
        axes.set_ylabel("share of samples")
        style.legend_above(axes)
        style.save(figure, path, options)
