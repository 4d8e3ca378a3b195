"""Figures of an evaluation: calibration, OOD detection, sample quality."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from flowtrain.evaluation.calibration import RADIUS
from flowtrain.plotting import points, scales, style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array
from flowtrain.utils.errors import FlowtrainError

CALIBRATION_COLOURS = (style.BLUE, style.ORANGE, style.GREEN)
BAND = "#E4E4E4"
# the 95% quantile of sqrt(n) sup |F_n(u) - u| for uniform u (Kolmogorov's distribution)
KOLMOGOROV = 1.358
# the largest number of points of a curve. A curve with more points looks the same
CURVE_POINTS = 400
# the largest number of latents in one pair of panels, and the number of letters for their names in the legend
TOGETHER, TOGETHER_LETTERS = 3, 51
# inches: the height of the calibration figure of few latents
CALIBRATION_HEIGHT = 3.55
# the calibration figure of many latents: the number of panels in a row, and in inches the position and height of the
# panels, the gaps between them, the room above each panel, and the room above all panels
PANELS_ACROSS, PANEL_LEFT, PANEL_BOTTOM, PANEL_HEIGHT = 3, 0.78, 0.52, 1.25
PANEL_GAP, PANEL_ABOVE, PANELS_HEAD = 0.44, 0.34, 0.9
# width in inches of a letter in the name of a panel
LETTER = 0.074


def draw_calibration(
    path: Path,
    *,
    pit: Mapping[str, Tensor],
    title: str,
    labels: Mapping[str, str] = MappingProxyType({}),
    note: str = "",
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws probability integral transforms u (n,), which are uniform on [0, 1] for a perfect model.

    Up to TOGETHER latents are drawn in one pair of panels. The panels show histograms of u, and F_n(u) - u, where
    F_n(u) is the share of the n points that are at most u. If there are more latents, each has a panel with F_n(u) - u.
    The bands are for a perfect model. The height of a bin is in its band with a probability of 95%; the count of one of
    K bins has the distribution B(n, 1/K). A whole curve F_n(u) - u is within +-1.358/sqrt(n) with a probability of 95%.

    Args:
        pit: the transforms by name: z1, z2, ... and "radius".
        labels: the names of columns, by the names of their transforms.
        note: a line below the title.

    Raises:
        FlowtrainError: different numbers of points, or values outside [0, 1].
    """
    # the radius, which combines the others, comes last and is drawn on top
    names = sorted(pit, key=lambda name: name == RADIUS)
    transforms = {name: _transforms(name, pit[name]) for name in names}
    counts = {len(u) for u in transforms.values()}
    if len(counts) != 1:
        raise FlowtrainError(
            f"cannot plot transforms of {sorted(counts)} points: give the same number for all, at least 1"
        )
    (n,) = counts
    with style.styled():
        if len(transforms.keys() - {RADIUS}) <= TOGETHER:
            figure = _calibration_together(transforms, labels, n, title, options)
        else:
            figure = _calibration_panels(transforms, labels, n, title, note, options)
        style.save(figure, path, options)


def _calibration_together(
    transforms: Mapping[str, Array], labels: Mapping[str, str], n: int, title: str, options: PlotOptions
) -> Figure:
    """Draws histograms of all transforms, and their deviations from a uniform distribution."""
    bins = int(np.clip(n // 10, 5, 20))
    figure = style.new_figure(CALIBRATION_HEIGHT, title, options)
    left, right = (style.add_axes(figure, edge, 0.52, 3.72, 2.38) for edge in (0.68, 5.18))
    most = TOGETHER_LETTERS // max(1, len(transforms.keys() - {RADIUS}))
    for place, (name, u) in enumerate(transforms.items()):
        look: dict[str, Any] = {"color": CALIBRATION_COLOURS[place % TOGETHER], "linewidth": 1.4}
        look = {"color": style.INK, "linewidth": 1.6} if name == RADIUS else look
        heights, edges = points.histogram_1d(u, (0.0, 1.0), bins)
        left.stairs(heights, edges, baseline=None, label=_named(name, labels, most), **look)
        right.plot(*deviation(u), **look)
    _band(left, *bin_band(n, bins), label="95% of perfect models")
    _band(right, -KOLMOGOROV / n**0.5, KOLMOGOROV / n**0.5)
    left.axhline(1, color=style.MUTED, linewidth=0.8, zorder=0.5)
    right.axhline(0, color=style.MUTED, linewidth=0.8, zorder=0.5)
    _calibration_frame(left, right)
    style.legend_above(left, width=style.WIDTH - style.EDGE - left.get_position().x0 * style.WIDTH)
    return figure


def _calibration_panels(
    transforms: Mapping[str, Array], labels: Mapping[str, str], n: int, title: str, note: str, options: PlotOptions
) -> Figure:
    """Draws a panel for each transform with its deviation from a uniform distribution.

    The panels of latents have the same limits.
    """
    rows = math.ceil(len(transforms) / PANELS_ACROSS)
    step = PANEL_HEIGHT + PANEL_ABOVE
    figure = style.new_figure(PANEL_BOTTOM + rows * step - PANEL_ABOVE + PANELS_HEAD, title, options)
    width = (style.WIDTH - PANEL_LEFT - style.EDGE - PANEL_GAP * (PANELS_ACROSS - 1)) / PANELS_ACROSS
    band = KOLMOGOROV / n**0.5
    curves = {name: deviation(u) for name, u in transforms.items()}
    largest = {name: float(np.abs(y).max()) for name, (_, y) in curves.items()}
    # the radius has another scale, because its deviation is often much larger
    half = 1.12 * max(band, *(value for name, value in largest.items() if name != RADIUS))
    for place, (name, (u, difference)) in enumerate(curves.items()):
        row, column = divmod(place, PANELS_ACROSS)
        left, bottom = PANEL_LEFT + column * (width + PANEL_GAP), PANEL_BOTTOM + (rows - 1 - row) * step
        axes = style.add_axes(figure, left, bottom, width, PANEL_HEIGHT)
        _band(axes, -band, band)
        axes.axhline(0, color=style.MUTED, linewidth=0.8, zorder=0.5)
        axes.plot(u, difference, color=style.INK if name == RADIUS else style.BLUE, linewidth=1.4)
        end = 1.12 * max(band, largest[name]) if name == RADIUS else half
        axes.set(xlim=(-0.01, 1.01), ylim=(-end, end))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
        statistic = f"KS {largest[name]:.3f}"
        axes.set_title(statistic, loc="right", size=8, color=style.MUTED)
        axes.set_title(_named(name, labels, most=int(width / LETTER) - len(statistic) - 1), loc="left", size=8.5)
        last = place + PANELS_ACROSS >= len(curves)
        axes.tick_params(labelleft=column == 0 or name == RADIUS, labelbottom=last)
        if last:
            axes.set_xlabel("u, the quantile under the model")
    middle = (PANEL_BOTTOM + (rows * step - PANEL_ABOVE) / 2) / figure.get_size_inches()[1]
    figure.text(0.16 / style.WIDTH, middle, "share of points below u, minus u", rotation=90, va="center", size=9)
    radius_note = "the radius has a separate scale" if RADIUS in curves else ""
    words = "; ".join(filter(None, (note, "band: 95% of perfect models", radius_note)))
    top = PANEL_BOTTOM + rows * step
    figure.text(PANEL_LEFT, top + 0.1, words, transform=figure.dpi_scale_trans, color=style.MUTED, size=8.5)
    return figure


def _named(name: str, labels: Mapping[str, str], most: int) -> str:
    """Returns the name of a transform with its column, such as "price (z3)", in at most `most` characters."""
    if name not in labels:
        return style.abbreviated(name, most)
    return f"{style.abbreviated(labels[name], most - len(name) - 3)} ({name})"


def _transforms(name: str, u: Tensor) -> Array:
    """Returns u (n,) as an array in ascending order. Raises FlowtrainError for values outside [0, 1]."""
    values = points.to_numpy(u)
    # the comparison is false for NaN. 1e-6 allows for rounding errors
    if values.ndim != 1 or values.size == 0 or not (np.abs(values - 0.5) <= 0.5 + 1e-6).all():
        raise FlowtrainError(f"cannot plot the transforms {name!r}: give at least one number from 0 to 1, as (n,)")
    return np.sort(values.clip(0, 1))


def bin_band(n: int, bins: int) -> tuple[float, float]:
    """Returns the 2.5% and 97.5% quantiles of B(n, 1/bins), divided by its mean n/bins."""
    k = torch.arange(n + 1, dtype=torch.float64)
    choices = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (choices - k * math.log(bins) + (n - k) * math.log1p(-1 / bins)).exp().cumsum(0)
    low, high = torch.searchsorted(below, below.new_tensor([0.025, 0.975])).tolist()
    return low * bins / n, high * bins / n


def deviation(u: Array) -> tuple[Array, Array]:
    """Returns points (u, F_n(u) - u) at both ends of the steps of F_n, for ascending u (n,).

    Of more than CURVE_POINTS steps, only CURVE_POINTS are kept.
    """
    n = len(u)
    # the steps are chosen by rank, so that many equal u keep their vertical step and dense regions keep more steps
    rank = np.unique(np.linspace(0, n - 1, CURVE_POINTS).astype(int))
    x = np.repeat(u[rank], 2)
    share = np.stack((rank, rank + 1), axis=1).ravel() / n
    return np.concatenate(([0.0], x, [1.0])), np.concatenate(([0.0], share - x, [0.0]))


def _band(axes: Axes, low: float, high: float, label: str | None = None) -> None:
    axes.fill_between([0, 1], low, high, color=BAND, linewidth=0, zorder=0, label=label)


def _calibration_frame(left: Axes, right: Axes) -> None:
    """Sets the labels of the axes, and limits that show all bands and lines."""
    for axes, middle, least in ((left, 1.0, 0.25), (right, 0.0, 0.0)):
        low, high = axes.dataLim.intervaly
        half = max(least, 1.12 * max(middle - low, high - middle))
        axes.set(xlim=(-0.01, 1.01), ylim=(max(middle - half, -0.02 * half) if middle else -half, middle + half))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axes.set_xlabel("u, the quantile of a test point under the model")
    left.set_ylabel("density of u, 1 for a perfect model")
    right.set_ylabel("share of points below u, minus u")


# inches: the height of the figure and of its panels, and the left edge and width of each panel
OOD_HEIGHT, OOD_BOTTOM, OOD_SIDE = 3.45, 0.52, 2.2
OOD_PANELS = ((0.7, 2.42), (3.62, 2.42), (6.62, OOD_SIDE))
OOD_COLOURS = (style.DATA, style.SAMPLES)
# the styles of the ROC curves of -log p and of the typicality. Both are visible even if the curves coincide
ROC_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": style.INK, "linewidth": 2.6},
    {"color": style.ORANGE, "linewidth": 1.2},
)
# an axis is compressed if it is longer than this many times the reach of the known set
OOD_LONGEST = 20.0
# the axis of heights ends at most at this multiple of the smaller of the two peaks
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
    """Draws histograms of log p and of the typicality |log p + H| of two sets, and their ROC curves, to `path`.

    The histograms leave out the lowest and the highest 0.5% of each set. An axis is logarithmic far from the known set
    if a linear axis would make the known set too narrow. The height of a bin is the share of a set in the bin. All bins
    have the same width in the drawing.

    Args:
        names: the names of the set that the model knows and of the other set.
        log_p: log p of both sets, (n,) and (m,), in `unit`. Values that are not finite are left out of the histograms,
            and count as -inf in the ROC curves.
        entropy: H in `unit`, the mean of -log p over the known set.
        auroc: the area under the ROC curve of the score -log p.
        typicality_auroc: the area for the score |log p + H| (Nalisnick et al. 2019).

    Raises:
        FlowtrainError: no finite log p of the known set.
    """
    known, other = (finite_scores(values) for values in log_p)
    if len(known) == 0 or not abs(entropy) < points.FARTHEST:
        raise FlowtrainError(
            f"cannot plot log p of {names[0]}: {len(known)} are finite, and their entropy is {entropy}"
        )
    labels = [
        set_label(name, given.numel() - len(kept), len(kept))
        for name, given, kept in zip(names, log_p, (known, other), strict=True)
    ]
    with style.styled():
        figure = style.new_figure(OOD_HEIGHT, title, options)
        left, middle, right = (style.add_axes(figure, x, OOD_BOTTOM, w, OOD_SIDE) for x, w in OOD_PANELS)
        draw_histograms(left, (known, other), OOD_COLOURS, centre=float(np.median(known)), shown=(-entropy,))
        draw_line(left, -entropy, "-H", unit)
        typical = (np.abs(known + entropy), np.abs(other + entropy))
        draw_histograms(middle, typical, OOD_COLOURS, centre=0.0, floor=0.0)
        left.set_xlabel(axis_name("log p(x)", left, unit))
        middle.set_xlabel(axis_name("|log p(x) + H|", middle, unit))
        left.set_ylabel("share of each set per bin")
        areas = {f"{scales.MINUS}log p": auroc, "|log p + H|": typicality_auroc}
        _roc_curves(right, [points.to_numpy(values).ravel() for values in log_p], entropy, areas)
        _legend(figure, labels)
        style.save(figure, path, options)


def _roc_curves(axes: Axes, log_p: Sequence[Array], entropy: float, areas: Mapping[str, float]) -> None:
    """Draws the ROC curves of both scores, with their areas in the legend."""
    inside, outside = (np.where(np.isfinite(values), values, -np.inf) for values in log_p)
    scores = ((-inside, -outside), (np.abs(inside + entropy), np.abs(outside + entropy)))
    axes.plot([0, 1], [0, 1], color=style.HAIRLINE, linestyle=style.DASHES, linewidth=1.0)
    for (name, area), pair, look in zip(areas.items(), scores, ROC_LOOKS, strict=True):
        words = f"{name}, area {area:.3f}" if math.isfinite(area) else name
        axes.plot(*roc_curve(*pair), label=words, **look)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate", ylabel="true positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=(1, 2.5, 5, 10)))
    axes.legend(loc="lower right", fontsize=7.5, **{**style.LEGEND, "borderaxespad": 0.6})


def roc_curve(inside: Array, outside: Array) -> tuple[Array, Array]:
    """Returns the false and the true positive rates of a score at all thresholds, from (0, 0) to (1, 1), each (k,).

    Tied scores give a straight segment, so that the area counts them half. Long curves are reduced to CURVE_POINTS
    points.

    Args:
        inside: scores of the known set, (n,); higher scores are more anomalous.
        outside: scores of the other set, (m,).

    Example:
        >>> [rates.tolist() for rates in roc_curve(np.array([1.0, 2.0]), np.array([2.0, 3.0]))]
        [[0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]
    """
    if len(inside) == 0 or len(outside) == 0:
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    # np.unique sorts in ascending order
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    rates = [1 - np.searchsorted(np.sort(each), thresholds) / len(each) for each in (inside, outside)]
    false, true = (np.concatenate([[0.0], rate]) for rate in rates)
    if len(false) > CURVE_POINTS:
        # the kept points are evenly spaced along the curve. false + true is the length from (0, 0), and 2 at the end
        along = np.searchsorted(false + true, np.linspace(0, 2, CURVE_POINTS)).clip(0, len(false) - 1)
        kept = np.unique(np.concatenate([along, [0, len(false) - 1]]))
        false, true = false[kept], true[kept]
    return false, true


def finite_scores(values: Tensor) -> Array:
    """Returns the finite values, (n,), as an array."""
    array = points.to_numpy(values).ravel()
    return array[np.abs(array) < points.FARTHEST]


def set_label(name: str, lost: int, kept: int) -> str:
    """Returns the label of a set in a legend: its name and its numbers of rows."""
    rows = f"{kept + lost:,} row{'' if kept + lost == 1 else 's'}"
    notes = (rows, f"{lost:,} not finite" if lost else "", "" if kept else "nothing to draw")
    return points.noted(style.literal(name, most=40), *notes)


def draw_histograms(
    axes: Axes,
    sets: Sequence[Array],
    colours: Sequence[str],
    *,
    centre: float,
    shown: tuple[float, ...] = (),
    floor: float = -math.inf,
) -> None:
    """Draws histograms of several sets of values, (n,) each.

    Args:
        sets: the values. The first set is the known one, from which the axis is chosen. The width of the bins depends
            on the numbers of values in the first two sets.
        colours: the colours of the sets.
        centre: the centre of a compressed axis.
        shown: values that the axis must show.
        floor: the lowest value of the axis.
    """
    known = sets[0]
    inner = np.array([*(value for each in sets for value in _outer_quantiles(each)), *shown])
    reach = float(np.quantile(np.abs(known - centre), 0.9))
    compressed = 0 < OOD_LONGEST * reach < np.ptp(inner)
    if compressed:
        _compress(axes, centre, reach)
    scale = axes.xaxis.get_transform()
    low, high = points.robust_range(scale.transform(inner))
    low = max(low, float(scale.transform(floor)))
    known_share = np.ptp(scale.transform(_outer_quantiles(known))) / (high - low)
    places = np.linspace(low, high, _bins(sets, known_share) + 1)
    edges = scale.inverted().transform(places)
    shares_of = [np.histogram(scale.transform(each), places)[0] / max(len(each), 1) for each in sets]
    for heights, colour in zip(shares_of, colours, strict=True):
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.4, linewidth=0)
        axes.stairs(heights, edges, color=colour, linewidth=1.1, baseline=None)
    peaks = [float(heights.max()) for heights in shares_of if heights.any()]
    # the factor 1.2 leaves room for the text beside a line
    top = 1.2 * min(max(peaks), TALLEST * min(peaks))
    if top < max(peaks):
        style.annotate(axes, f"highest bin at {max(peaks):.0%}", x=1.0, y=1.045, align="right")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, top))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    shares = np.array(axes.get_yticks())
    decimals = 0 if np.allclose(100 * shares, np.round(100 * shares)) else 1
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))
    if compressed:
        axes.set_xticks(scales.round_values(axes.get_xlim(), scales.Scale(centre, reach)))
        axes.xaxis.set_major_formatter(style.TickNumbers())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))


def _outer_quantiles(values: Array) -> Array:
    """Returns the 0.5% and 99.5% quantiles, (2,); empty if there are no values."""
    return np.quantile(values, (0.005, 0.995)) if len(values) else values


def _bins(sets: Sequence[Array], share: float) -> int:
    """Returns the number of bins of an axis. It is larger if the known set covers only a small share of the axis."""
    usual = points.bins_1d(points.common_count(*sets[:2]))
    return int(np.clip(usual / max(3 * share, 1e-3), min(usual, MOST_BINS), MOST_BINS))


def _compress(axes: Axes, centre: float, reach: float) -> None:
    """Scales the axis by asinh((x - centre) / reach): linear near the centre, logarithmic far from it."""
    axes.set_xscale(
        "function",
        functions=(lambda x: np.arcsinh((x - centre) / reach), lambda y: centre + reach * np.sinh(y)),
    )


def draw_line(axes: Axes, place: float, name: str, unit: str) -> None:
    """Draws a dashed line at a place, with its name and value on the side that has more room."""
    axes.axvline(place, color=style.INK, linestyle=style.DASHES, linewidth=1.1)
    across = axes.transAxes.inverted().transform(axes.transData.transform((place, 0)))[0]
    side = -1 if across > 0.5 else 1
    number = f"{place:,.0f}" if 1000 <= abs(place) < 1e7 else scales.short(place)
    axes.annotate(
        style.literal(f"{name} = {number} {unit}".replace("-", scales.MINUS)),
        (across, 0.97),
        xycoords="axes fraction",
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="top",
        size=8,
        # a white box keeps the text readable in front of a bar
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )


def axis_name(what: str, axes: Axes, unit: str) -> str:
    """Returns the label of an axis whose scale may be compressed."""
    note = "" if axes.get_xscale() == "linear" else ", logarithmic far out"
    return style.literal(f"{what} ({unit}){note}")


def _legend(figure: Figure, labels: list[str]) -> None:
    """Draws the legend of the two sets below the title."""
    handles = [Patch(facecolor=f"{colour}66", edgecolor=colour) for colour in OOD_COLOURS]
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(OOD_PANELS[0][0], OOD_BOTTOM + OOD_SIDE + 0.32),
        bbox_transform=figure.dpi_scale_trans,
        ncols=2,
        **{**style.LEGEND, "borderaxespad": 0.0},
    )


QUALITY_COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE)


class Distances(NamedTuple):
    """The distances of samples to the data by one method, with their standard errors, at several NFE; each (k,)."""

    nfe: list[float]
    values: list[float]
    errors: list[float]


def draw_quality(
    path: Path,
    *,
    lines: Mapping[str, Distances],
    exact: tuple[float, float, float],
    data: tuple[float, float],
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws distances against NFE to `path`, both axes logarithmic. Bars and the band are one standard error.

    Args:
        lines: the distances of each method.
        exact: NFE, distance and standard error with the solver of the flow.
        data: the distance between two sets of data and its standard error. Even samples of a perfect model would have
            about this distance.
    """
    with style.styled():
        figure = style.new_figure(4.2, title, options)
        axes = style.add_axes(figure, 0.86, 0.55, 7.96, 2.9)
        middle, error = data
        if math.isfinite(error):
            axes.axhspan(_above_zero(middle, error), middle + error, color=BAND, linewidth=0, zorder=0)
        axes.axhline(
            middle,
            color=style.MUTED,
            linestyle=style.DASHES,
            linewidth=1.1,
            label="two sets of data (validation and test)",
        )
        bars: dict[str, Any] = {"elinewidth": 1.0, "capsize": 2.5, "markersize": 4}
        named = {
            name: (line, colour) for (name, line), colour in zip(lines.items(), cycle(QUALITY_COLOURS), strict=False)
        }
        for name, (line, colour) in named.items():
            label = style.literal(name, most=40)
            axes.errorbar(line.nfe, line.values, _bars(line), fmt="-o", color=colour, label=label, **bars)
        own = Distances(*([value] for value in exact))
        axes.errorbar(own.nfe, own.values, _bars(own), fmt="D", color=style.INK, label="solver of the flow", **bars)
        every = [value for line in (*lines.values(), own) for value in line.values]
        style.make_logarithmic(axes.xaxis, [nfe for line in (*lines.values(), own) for nfe in line.nfe], base=2)
        style.make_logarithmic(axes.yaxis, [value for value in (*every, middle) if value > 0])
        axes.grid(axis="y")
        axes.set_xlabel("NFE per sample (evaluations of the velocity field)")
        axes.set_ylabel("sliced Wasserstein distance (units of the data)")
        style.legend_above(axes)
        style.save(figure, path, options)


def _above_zero(value: float, error: float) -> float:
    """Returns the lower end of an error bar, above zero, because the axis is logarithmic."""
    return max(value - error, 0.05 * value)


def _bars(line: Distances) -> tuple[list[float], list[float]]:
    """Returns the lengths of error bars below and above, 0 where the error is unknown."""
    errors = [error if math.isfinite(error) else 0.0 for error in line.errors]
    return [value - _above_zero(value, error) for value, error in zip(line.values, errors, strict=True)], errors
