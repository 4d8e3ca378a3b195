"""Figures of an evaluation: calibration, OOD detection, sample quality."""

import math
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from torch import Tensor

from flowtrain.plotting import points, style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array
from flowtrain.utils.errors import FlowtrainError

CALIBRATION_HEIGHT = 3.55
RADIUS = "radius"
CALIBRATION_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
BAND = "#E4E4E4"
# the 95% quantile of Kolmogorov's distribution, of sqrt(n) sup |F_n(u) - u|
KOLMOGOROV = 1.358
# a curve of more corners looks no different
CORNERS = 400


def draw_calibration(path: Path, *, pit: Mapping[str, Tensor], title: str, options: PlotOptions = DEFAULT) -> None:
    """Draw probability integral transforms u (n,) by name, z1, z2, ... and "radius", to `path`.

    Where the model is the truth each u is uniform on [0, 1]. On the left their histograms, on the right F_n(u) - u,
    F_n the share of the n points that is at most u. The bands hold 95% of the heights of a bin, counts ~ B(n, 1/K) of
    K bins, and 95% of whole curves, +-1.358/sqrt(n).
    """
    transforms = {name: _transforms(name, u) for name, u in pit.items()}
    counts = {len(u) for u in transforms.values()}
    if len(counts) != 1:
        raise FlowtrainError(f"a calibration is drawn of one number of points, not of {sorted(counts)}")
    (n,) = counts
    bins = int(np.clip(n // 10, 5, 20))
    with style.styled():
        figure = style.new_figure(CALIBRATION_HEIGHT, title, options)
        left, right = (style.add_axes(figure, edge, 0.52, 3.72, 2.38) for edge in (0.62, 5.14))
        # the radius, which sums the others up, on top of them
        for name in sorted(transforms, key=lambda name: name == RADIUS):
            look = _calibration_look(name, list(transforms))
            heights, edges = points.histogram_1d(transforms[name], (0.0, 1.0), bins)
            left.stairs(heights, edges, baseline=None, **look)
            right.plot(*deviation(transforms[name]), **{**look, "label": None})
        _band(left, *bin_band(n, bins), label="95% of perfect models, bin by bin (left), curve by curve (right)")
        _band(right, -KOLMOGOROV / n**0.5, KOLMOGOROV / n**0.5)
        left.axhline(1, color=style.MUTED, linewidth=0.8, zorder=0.5)
        right.axhline(0, color=style.MUTED, linewidth=0.8, zorder=0.5)
        _calibration_frame(left, right)
        style.legend_above(left)
        style.save(figure, path, options)


def _transforms(name: str, u: Tensor) -> Array:
    """u in ascending order, (n,)."""
    values = points.to_numpy(u)
    # not NaN either; a rounding error past the edge is none
    if values.ndim != 1 or values.size == 0 or not (np.abs(values - 0.5) <= 0.5 + 1e-6).all():
        raise FlowtrainError(f"cannot plot the transforms {name!r}: give at least one number from 0 to 1, as (n,)")
    return np.sort(values.clip(0, 1))


def bin_band(n: int, bins: int) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of B(n, 1/bins), over the expected n/bins."""
    k = torch.arange(n + 1, dtype=torch.float64)
    choices = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (choices - k * math.log(bins) + (n - k) * math.log1p(-1 / bins)).exp().cumsum(0)
    low, high = torch.searchsorted(below, below.new_tensor([0.025, 0.975])).tolist()
    return low * bins / n, high * bins / n


def deviation(u: Array) -> tuple[Array, Array]:
    """u and F_n(u) - u at both sides of the steps of F_n, for ascending u (n,), thinned to CORNERS steps."""
    n = len(u)
    # by rank: a crowd of equal u keeps its upright step, and the places are dense where the points are
    rank = np.unique(np.linspace(0, n - 1, CORNERS).astype(int))
    x = np.repeat(u[rank], 2)
    share = np.stack((rank, rank + 1), axis=1).ravel() / n
    return np.concatenate(([0.0], x, [1.0])), np.concatenate(([0.0], share - x, [0.0]))


def _calibration_look(name: str, names: list[str]) -> dict[str, Any]:
    """Colour, width and label of a line. Many latents look alike, and the first of them speaks for all."""
    if name == RADIUS:
        return {"color": style.INK, "linewidth": 1.6, "label": "radius"}
    latents = [each for each in names if each != RADIUS]
    if len(latents) <= len(CALIBRATION_COLOURS):
        return {
            "color": CALIBRATION_COLOURS[latents.index(name)],
            "linewidth": 1.4,
            "label": style.literal(name, most=12),
        }
    return {"color": style.BLUE, "linewidth": 0.9, "alpha": 0.5, "label": "latents" if name == latents[0] else None}


def _band(axes: Axes, low: float, high: float, label: str | None = None) -> None:
    axes.fill_between([0, 1], low, high, color=BAND, linewidth=0, zorder=0, label=label)


def _calibration_frame(left: Axes, right: Axes) -> None:
    """Limits that show bands and lines, and words."""
    for axes, middle, least in ((left, 1.0, 0.25), (right, 0.0, 0.0)):
        low, high = axes.dataLim.intervaly
        half = max(least, 1.12 * max(middle - low, high - middle))
        axes.set(xlim=(-0.01, 1.01), ylim=(max(middle - half, -0.02 * half) if middle else -half, middle + half))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axes.set_xlabel("u, the quantile of a test point under the model")
    left.set_ylabel("density of u, 1 for a perfect model")
    right.set_ylabel("share of points below u, minus u")


# inches
OOD_HEIGHT, OOD_LEFT = 3.66, 0.7
OOD_COLOURS = (style.DATA, style.SAMPLES)
# the known set would be a needle on an axis that is longer than so many times its reach
OOD_LONGEST = 20.0
# a needle may not squash the other set more than so many times
TALLEST = 6.0
MOST_BINS = 80


def draw_ood(
    path: Path,
    *,
    names: tuple[str, str],
    log_p: tuple[Tensor, Tensor],
    entropy: float,
    auroc: float,
    typicality_auroc: float,
    unit: str,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw histograms of log p, on the left, and of the typicality |log p + H|, on the right, to `path`.

    The axes leave out the outermost half percent of each set, and are logarithmic far from a known set that a plain
    axis would show as a needle. A height is the share of a set in a bin, of bins that are equally wide as drawn.

    Args:
        names: of the set that the model knows and of the other.
        log_p: of both, (n,) and (m,), in `unit`; what is not finite is left out and counted beside the name.
        entropy: H in `unit`, the mean of -log p over the known set.
        auroc: area under the ROC curve of the score -log p.
        typicality_auroc: that of the score |log p + H| (Nalisnick et al. 2019).
    """
    known, other = (_finite_scores(values) for values in log_p)
    if len(known) == 0 or not abs(entropy) < points.FARTHEST:
        raise FlowtrainError(
            f"cannot plot log p of {names[0]}: {len(known)} are finite, and their entropy is {entropy}"
        )
    labels = [
        _label(name, given.numel() - len(kept), len(kept))
        for name, given, kept in zip(names, log_p, (known, other), strict=True)
    ]
    with style.styled():
        figure = style.new_figure(OOD_HEIGHT, title, options)
        left, right = (style.add_axes(figure, edge, 0.52, 3.68, 2.3) for edge in (OOD_LEFT, 5.18))
        _histograms(left, known, other, centre=float(np.median(known)), shown=(-entropy,))
        _name_line(left, -entropy, unit)
        _histograms(right, np.abs(known + entropy), np.abs(other + entropy), centre=0.0, floor=0.0)
        left.set_title(f"AUROC of -log p: {auroc:.3f}", loc="left")
        right.set_title(f"AUROC of |log p + H|: {typicality_auroc:.3f}", loc="left")
        left.set_xlabel(_axis_name("log p(x)", left, unit))
        right.set_xlabel(_axis_name("|log p(x) + H|", right, unit))
        left.set_ylabel("share of each set in a bin")
        _legend(figure, labels)
        style.save(figure, path, options)


def _finite_scores(values: Tensor) -> Array:
    array = points.to_numpy(values).ravel()
    return array[np.abs(array) < points.FARTHEST]


def _label(name: str, lost: int, kept: int) -> str:
    notes = (f"{lost:,} not finite" if lost else "", "" if kept else "nothing to draw")
    return points.noted(style.literal(name, most=40), *notes)


def _histograms(
    axes: Axes,
    known: Array,
    other: Array,
    *,
    centre: float,
    shown: tuple[float, ...] = (),
    floor: float = -math.inf,
) -> None:
    """Histograms of known (n,) and other (m,), over an axis that shows `shown` as well and ends at `floor`."""
    inner = np.array([*_ends(known), *_ends(other), *shown])
    reach = float(np.quantile(np.abs(known - centre), 0.9))
    compressed = 0 < OOD_LONGEST * reach < np.ptp(inner)
    if compressed:
        _compress(axes, centre, reach)
    scale = axes.xaxis.get_transform()
    low, high = points.robust_range(scale.transform(inner))
    low = max(low, float(scale.transform(floor)))
    places = np.linspace(low, high, _bins(known, other, np.ptp(scale.transform(_ends(known))) / (high - low)) + 1)
    edges = scale.inverted().transform(places)
    sets = [np.histogram(scale.transform(each), places)[0] / max(len(each), 1) for each in (known, other)]
    for heights, colour in zip(sets, OOD_COLOURS, strict=True):
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.4, linewidth=0)
        axes.stairs(heights, edges, color=colour, linewidth=1.1, baseline=None)
    peaks = [float(heights.max()) for heights in sets if heights.any()]
    # with room for the name of a line
    top = 1.2 * min(max(peaks), TALLEST * min(peaks))
    if top < max(peaks):
        style.annotate(axes, f"highest bin at {max(peaks):.0%}", x=1.0, y=1.045, align="right")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, top))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    if compressed:
        axes.set_xticks(points.round_values(axes.get_xlim(), points.Scale(centre, reach)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: points.short(value)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))


def _ends(values: Array) -> Array:
    """What all but the outermost half percent on each side lie between, (2,); nothing of no values."""
    return np.quantile(values, (0.005, 0.995)) if len(values) else values


def _bins(known: Array, other: Array, share: float) -> int:
    """Bins of an axis of which the known set takes a share: enough for its shape."""
    usual = points.bins_1d(points.common_count(known, other))
    return int(np.clip(usual / max(3 * share, 1e-3), min(usual, MOST_BINS), MOST_BINS))


def _compress(axes: Axes, centre: float, reach: float) -> None:
    """Make the axis asinh((x - centre) / reach): plain within the reach of the centre, logarithmic far from it."""
    axes.set_xscale(
        "function",
        functions=(lambda x: np.arcsinh((x - centre) / reach), lambda y: centre + reach * np.sinh(y)),
    )


def _name_line(axes: Axes, place: float, unit: str) -> None:
    """A dashed line at -H, named beside it on the side that has more room."""
    axes.axvline(place, color=style.INK, linestyle=style.DASHES, linewidth=1.1)
    across = axes.transAxes.inverted().transform(axes.transData.transform((place, 0)))[0]
    side = -1 if across > 0.5 else 1
    number = f"{place:,.0f}" if 1000 <= abs(place) < 1e7 else points.short(place)
    axes.annotate(
        style.literal(f"-H = {number} {unit}"),
        (across, 0.97),
        xycoords="axes fraction",
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="top",
        size=8,
        # a needle may stand behind it
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )


def _axis_name(what: str, axes: Axes, unit: str) -> str:
    note = "" if axes.get_xscale() == "linear" else ", logarithmic far out"
    return style.literal(f"{what} ({unit}){note}")


def _legend(figure: Figure, labels: list[str]) -> None:
    """Which colour is which set, under the title."""
    handles = [Patch(facecolor=f"{colour}66", edgecolor=colour) for colour in OOD_COLOURS]
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(OOD_LEFT, OOD_HEIGHT - 0.42),
        bbox_transform=figure.dpi_scale_trans,
        ncols=2,
        **{**style.LEGEND, "borderaxespad": 0.0},
    )


QUALITY_COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE)
Line = tuple[list[float], list[float]]


def draw_quality(
    path: Path,
    *,
    lines: Mapping[str, Line],
    exact: tuple[float, float],
    data: float,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw distance against NFE to `path`, both axes logarithmic.

    Args:
        lines: of each method, NFE and distances.
        exact: NFE and distance by the adaptive solver.
        data: the distance of two sets of data.
    """
    with style.styled():
        figure = style.new_figure(4.2, title, options)
        axes = style.add_axes(figure, 0.8, 0.55, 8.0, 2.9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for colour, (name, (nfe, distance)) in zip(cycle(QUALITY_COLOURS), lines.items(), strict=False):
            axes.plot(nfe, distance, "-o", color=colour, markersize=4, label=style.literal(name, most=40))
        axes.plot([exact[0]], [exact[1]], "D", color=style.INK, markersize=5, label="own solver")
        axes.axhline(data, color=style.MUTED, linestyle=style.DASHES, linewidth=1.1, label="data beside data")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y")
        axes.set_xlabel("evaluations of the field for a sample")
        axes.set_ylabel("sliced Wasserstein distance to data")
        style.legend_above(axes)
        style.save(figure, path, options)
