"""How log-likelihoods tell a set that the model knows from another one.

Shapes: n samples of the set that the model knows, m of the other.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from flowtrain.errors import FlowtrainError
from flowtrain.plots import points, scales, style
from flowtrain.plots.points import Array

# inches
HEIGHT, LEFT = 3.66, 0.7
COLOURS = (style.DATA, style.SAMPLES)
# the known set would be a needle on an axis that is longer than so many times its reach
LONGEST = 20.0
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
    known, other = (_finite(values) for values in log_p)
    if len(known) == 0 or not abs(entropy) < points.FARTHEST:
        raise FlowtrainError(
            f"cannot plot log p of {names[0]}: {len(known)} are finite, and their entropy is {entropy}"
        )
    labels = [
        _label(name, given.numel() - len(kept), len(kept))
        for name, given, kept in zip(names, log_p, (known, other), strict=True)
    ]
    with style.styled():
        figure = style.new_figure(HEIGHT, title)
        left, right = (style.add_axes(figure, edge, 0.52, 3.68, 2.3) for edge in (LEFT, 5.18))
        _histograms(left, known, other, centre=float(np.median(known)), shown=(-entropy,))
        _name_line(left, -entropy, unit)
        _histograms(right, np.abs(known + entropy), np.abs(other + entropy), centre=0.0, floor=0.0)
        left.set_title(f"AUROC of -log p: {auroc:.3f}", loc="left")
        right.set_title(f"AUROC of |log p + H|: {typicality_auroc:.3f}", loc="left")
        left.set_xlabel(_axis_name("log p(x)", left, unit))
        right.set_xlabel(_axis_name("|log p(x) + H|", right, unit))
        left.set_ylabel("share of each set in a bin")
        _legend(figure, labels)
        style.save(figure, path)


def _finite(values: Tensor) -> Array:
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
    compressed = 0 < LONGEST * reach < np.ptp(inner)
    if compressed:
        _compress(axes, centre, reach)
    scale = axes.xaxis.get_transform()
    low, high = points.robust_range(scale.transform(inner))
    low = max(low, float(scale.transform(floor)))
    places = np.linspace(low, high, _bins(known, other, np.ptp(scale.transform(_ends(known))) / (high - low)) + 1)
    edges = scale.inverted().transform(places)
    sets = [np.histogram(scale.transform(each), places)[0] / max(len(each), 1) for each in (known, other)]
    for heights, colour in zip(sets, COLOURS, strict=True):
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
        axes.set_xticks(scales.round_values(axes.get_xlim(), scales.Scale(centre, reach)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scales.short(value)))
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
    number = f"{place:,.0f}" if 1000 <= abs(place) < 1e7 else scales.short(place)
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
    handles = [Patch(facecolor=f"{colour}66", edgecolor=colour) for colour in COLOURS]
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(LEFT, HEIGHT - 0.42),
        bbox_transform=figure.dpi_scale_trans,
        ncols=2,
        **{**style.LEGEND, "borderaxespad": 0.0},
    )
