"""Corner plots: histograms of single columns and regions of pairs of columns, by class if there are labels."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.tables.columns import default_names
from flowtrain.data.types import ColumnType
from flowtrain.plotting import points, scales, style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import Array, Points, Range
from flowtrain.plotting.scales import set_ticks
from flowtrain.utils.errors import FlowtrainError

# the number of columns that are shown if none are chosen
SHOWN = 5
# inches: the margins, the gaps between panels, the room above them, and the height of a single panel
LEFT, BOTTOM, GAP, HEAD, SINGLE = 1.06, 0.78, 0.1, 0.46, 2.7
# inches from the left edge of a panel to the name of its row
NAME = 0.54
# the size of tick labels in points
TICKS = 7.5
# the number of bins along each axis
BINS = 60
# the shares of the points in the regions
MASSES = (0.9, 0.6, 0.3)
# the share of the samples of a class in its region
CLASS_MASS = 0.6
# contours of fewer points than this would show mostly noise
FEWEST, FEWEST_OF_CLASS = 200, 50
# the largest number of rows that are drawn as dots
DOTS = 2000
# the largest number of classes that have a colour, because more colours cannot be told apart
MOST_CLASSES = 10
# Petroff 2021, Accessible color sequences for data visualization
CLASS_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """The labels of data (N,) and samples (M,), each a whole number, and the name of the label.

    Attributes:
        samples: None if the classes of the samples are unknown.
    """

    data: Tensor
    samples: Tensor | None
    name: str = "class"


@dataclass(frozen=True)
class _Group:
    """Rows of the data and of the samples that have one colour: all rows, or the rows of one class."""

    name: str
    colour: str
    data: NDArray[np.bool_]
    samples: NDArray[np.bool_] | None


def draw_corner(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    columns: tuple[str, ...],
    title: str,
    classes: Classes | None = None,
    options: PlotOptions = DEFAULT,
    types: Sequence[ColumnType] = (),
    names: tuple[str, str] = ("data", "samples"),
    cover: Tensor | None = None,
) -> None:
    """Draws columns of data (N, d) and samples (M, d) against each other.

    The diagonal shows the histogram of each column. The panels below show, for each pair of columns, the smallest
    regions with 30, 60 and 90 percent of the points. Regions of the data are filled in blue, and regions of the samples
    are outlined. With `classes`, the data are drawn as dots with a colour for each class, and an outline is the region
    with 60 percent of the samples of a class.

    The columns are `options.columns`, or the first 5. Axes range from the 0.5% to the 99.5% quantile of the data, or of
    the samples if a column of the data is constant or has few values. An axis starts or ends at an end of the support
    that is near. The axis of a heavy-tailed column has an asinh scale, and densities are per unit of the axes.

    Args:
        columns: the names of all columns. If empty, they are c0, c1, ...
        types: the types of all columns; () for real numbers.
        names: the names of data and samples in the legend.
        cover: points (K, d) that the axes must contain. None: the limits depend on data and samples, as above.
    """
    real, model = points.as_points(data, samples)
    width = real.values.shape[1]
    chosen = options.positions((width,), columns) or list(range(min(width, SHOWN)))
    groups = _groups(classes, data, samples)
    scaled = scales.scales_of(real.values[:, chosen], [types[i] for i in chosen] if types else ())
    real, model = (scales.on_axes(scaled, Points(each.values[:, chosen], each.dropped)) for each in (real, model))
    within = real, model
    if cover is not None:
        within = (
            scales.on_axes(scaled, Points(points.to_numpy(cover)[:, chosen], 0)),
            Points(np.empty((0, len(chosen))), 0),
        )
    limits = [_limits(*each) for each in zip(within[0].values.T, within[1].values.T, scaled, strict=True)]
    shown_columns = [(columns or default_names(range(width)))[i] for i in chosen]
    count = len(chosen)
    shown = "" if count == width else f"{count if options.columns else f'first {count}'} of {width} columns"
    if shown:
        title = f"{title}, {shown}"
    with style.styled():
        side = (style.WIDTH - LEFT - style.EDGE - GAP * (count - 1)) / count
        height = SINGLE if count == 1 else side
        figure = style.new_figure(
            BOTTOM + count * height + (count - 1) * GAP + HEAD + 0.34 * (count == 1), title, options
        )
        for row in range(count):
            for column in range(row + 1):
                bottom = BOTTOM + (count - 1 - row) * (height + GAP)
                axes = style.add_axes(figure, LEFT + column * (side + GAP), bottom, side, height)
                pair = [column, row]
                if row == column:
                    _histograms(axes, real.values[:, row], model.values[:, row], limits[row], groups, scaled[row])
                else:
                    around = (limits[column], limits[row])
                    _regions(axes, real.values[:, pair], model.values[:, pair], around, groups)
                _label(axes, row, column, shown_columns, [scaled[column], scaled[row]])
        # without a title, the legend says which columns are shown
        _legend(
            figure,
            groups,
            (real, model),
            names,
            classes,
            count,
            BOTTOM + count * (height + GAP) - GAP,
            "" if options.title else shown,
        )
        style.save(figure, path, options)


def _limits(real: Array, model: Array, scale: scales.Scale) -> Range:
    """Returns the limits of an axis: quantiles of the data, or an end of the support if it is near a quantile."""
    wide, narrow = points.common_range(real, model), points.common_range(real, model, margin=0.0)
    within = scale.within(wide)
    return within[0] if within[0] > wide[0] else narrow[0], within[1] if within[1] < wide[1] else narrow[1]


def _groups(classes: Classes | None, data: Tensor, samples: Tensor) -> list[_Group]:
    """Returns a single group of all rows, or a group for each of the most frequent classes, ordered by label."""
    kept, kept_samples = (points.is_finite(points.to_numpy(each)) for each in (data, samples))
    everything = _Group("", style.SAMPLES, np.ones(kept.sum(), dtype=bool), np.ones(kept_samples.sum(), dtype=bool))
    if classes is None:
        return [everything]
    labels, drawn = _numbers(classes.data), None if classes.samples is None else _numbers(classes.samples)
    if len(labels) != len(kept) or (drawn is not None and len(drawn) != len(kept_samples)):
        raise FlowtrainError(f"cannot plot {len(kept)} rows by {len(labels)} labels: give one label for each row")
    found, counts = np.unique(labels[kept], return_counts=True)
    frequent = sorted(found[np.argsort(-counts, kind="stable")][:MOST_CLASSES].tolist())
    return [
        _Group(str(y), CLASS_COLOURS[i], labels[kept] == y, None if drawn is None else drawn[kept_samples] == y)
        for i, y in enumerate(frequent)
    ]


def _numbers(labels: Tensor) -> Labels:
    return np.asarray(labels.detach().cpu().numpy(), dtype=np.int64)


def _histograms(
    axes: Axes, real: Array, model: Array, limits: Range, groups: Sequence[_Group], scale: scales.Scale
) -> None:
    bins = scale.bars or points.count_bins(real, limits, points.common_count(real, model), BINS)
    total, edges = points.histogram_1d(real, limits, bins)
    highest, samples = total.max(), [group.samples for group in groups]
    if len(groups) == 1 or samples[0] is None:
        below = np.zeros_like(total)
        for group in groups:
            share, _ = points.histogram_1d(real[group.data], limits, bins)
            share = below + share * group.data.mean()
            colour = style.DATA_SHADES[0] if len(groups) == 1 else group.colour
            axes.stairs(
                share, edges, baseline=below, fill=True, color=colour, linewidth=0, alpha=1 / len(groups) ** 0.2
            )
            below = share
        sampled, _ = points.histogram_1d(model, limits, bins)
        axes.stairs(sampled, edges, color=style.SAMPLES, linewidth=1.2, baseline=None)
        top = min(max(highest, sampled.max()), 3 * highest)
    else:
        top = 0.0
        for group in groups:
            assert group.samples is not None
            pair = [
                points.histogram_1d(each[rows], limits, bins)[0] * rows.mean()
                for each, rows in ((real, group.data), (model, group.samples))
            ]
            axes.stairs(pair[0], edges, fill=True, color=group.colour, linewidth=0, alpha=0.3)
            axes.stairs(pair[1], edges, color=group.colour, linewidth=1.2, baseline=None)
            top = max(top, pair[0].max(), min(pair[1].max(), 3 * pair[0].max()))
    axes.set(xlim=limits, ylim=(0, 1.12 * (top or 1.0)))


def _regions(axes: Axes, real: Array, model: Array, limits: tuple[Range, Range], groups: Sequence[_Group]) -> None:
    """Draws data (N, 2) as filled regions, or as dots by class, and samples (M, 2) as outlines."""
    if len(groups) == 1 and not groups[0].name:
        _filled_regions(axes, real, model, limits)
    else:
        colours = np.full(len(real), style.HAIRLINE, dtype=object)
        for group in groups:
            colours[group.data] = group.colour
        shown = real[:DOTS]
        axes.scatter(
            shown[:, 0],
            shown[:, 1],
            c=colours[:DOTS].tolist(),
            s=float(np.clip(3000 / len(shown), 3, 9)),
            linewidths=0,
            alpha=0.55,
            rasterized=True,
        )
        for group in groups:
            if group.samples is not None:
                _outline(axes, model[group.samples], limits, group.colour)
        if groups[0].samples is None:
            _outline(axes, model, limits, style.SAMPLES, MASSES)
    axes.set(xlim=limits[0], ylim=limits[1])


def _filled_regions(axes: Axes, real: Array, model: Array, limits: tuple[Range, Range]) -> None:
    """Draws regions of all data and outlines of all samples, or dots if there are too few points."""
    # contours show the counting noise more clearly than colours, so they need more blur
    blur = 1.5 * points.blur_2d(points.common_count(real, model))
    grid = [points.centres(edge, BINS) for edge in limits]
    for values, filled in ((real, True), (model, False)):
        heights = points.histogram_2d(values, limits, BINS, blur)
        levels = _levels(heights, MASSES)
        if len(values) < FEWEST or len(levels) < len(MASSES):
            colour = style.DATA if filled else style.SAMPLES
            axes.plot(values[:DOTS, 0], values[:DOTS, 1], ".", color=colour, markersize=3, alpha=0.6)
        elif filled:
            axes.contourf(*grid, heights.T, levels=[*levels, 2 * heights.max()], colors=style.DATA_SHADES)
        else:
            axes.contour(*grid, heights.T, levels=levels, colors=style.SAMPLES, linewidths=1.0)


def _outline(
    axes: Axes,
    values: Array,
    limits: tuple[Range, Range],
    colour: str,
    masses: Sequence[float] = (CLASS_MASS,),
) -> None:
    """Draws the outlines of the regions with shares `masses` of values (N, 2), or crosses if there are few values."""
    bins = 2 * BINS
    if len(values) >= FEWEST_OF_CLASS:
        # the blur follows Scott's rule
        spreads = [min(float(column.std()), _robust_std(column)) * len(values) ** (-1 / 6) for column in values.T]
        cells = [(high - low) / bins for low, high in limits]
        blur = tuple(float(np.clip(s / cell, 1.0, 12.0)) for s, cell in zip(spreads, cells, strict=True))
        heights = points.histogram_2d(values, limits, bins, (blur[0], blur[1]))
        levels = _levels(heights, masses)
        if levels:
            grid = [points.centres(edge, bins) for edge in limits]
            axes.contour(*grid, heights.T, levels=levels, colors=colour, linewidths=1.2)
            return
    axes.plot(values[:DOTS, 0], values[:DOTS, 1], "x", color=colour, markersize=4, markeredgewidth=0.9)


def _robust_std(values: Array) -> float:
    """Returns the standard deviation of a Gaussian with the interquartile range of values (N,)."""
    first, third = np.quantile(values, (0.25, 0.75))
    return float(third - first) / 1.349


def _levels(heights: Array, masses: Sequence[float]) -> list[float]:
    """Returns the distinct heights, in ascending order, above which shares `masses` of the points lie."""
    levels = sorted({points.peak(heights, 1 - mass) for mass in masses})
    return [level for level in levels if heights.min() < level < heights.max()]


def _label(axes: Axes, row: int, column: int, names: Sequence[str], scaled: Sequence[scales.Scale]) -> None:
    """Sets the ticks of a panel. Panels at the left and lower edges of the figure also get the names of columns."""
    box, shared = axes.get_window_extent(), _common_prefix(names)
    room = [length / style.DPI for length in (box.width, box.height)]
    note = set_ticks(axes.xaxis, scaled[0], most=5, size=TICKS, gap=GAP)
    if row == len(names) - 1:
        axes.set_xlabel(folded(points.noted(names[column], note), room[0], shared))
    if row == column:
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
    else:
        note = set_ticks(axes.yaxis, scaled[1], most=5, size=TICKS, gap=GAP)
        if column == 0:
            axes.set_ylabel(folded(points.noted(names[row], note), room[1], shared))
            # the names of all rows have the same distance from their panels, whatever the width of the tick labels
            axes.yaxis.set_label_coords(-NAME / room[0], 0.5)
    axes.tick_params(labelbottom=row == len(names) - 1, labelleft=column == 0)


def _common_prefix(names: Sequence[str]) -> int:
    """Returns the length of the common prefix of all names; 0 for a single name."""
    if len(names) < 2:
        return 0
    first, last = min(names), max(names)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def folded(name: str, room: float, shared: int = 0, lines: int = 3) -> str:
    """Returns a name in several lines of `room` inches. In a name that is too long, … replaces some letters.

    Args:
        shared: the length of the common prefix of all names. The letters are removed from the prefix if it is long
            enough, otherwise from the middle of the name.

    Example:
        >>> start = "mean concentration of component number "
        >>> print(folded(f"{start}12 in micrograms per litre", 1.4, len(start)))
        mean con…t number
        12 in micrograms
        per litre
    """
    across = max(4, int(room / 0.08))
    text = " ".join(name.split())
    parts, lost = textwrap.wrap(text, across), 0
    while len(parts) > lines:
        lost += 1
        middle = (shared if shared >= lost + 8 else len(text)) // 2
        start = middle - lost // 2
        parts = textwrap.wrap(f"{text[:start]}…{text[start + lost :]}", across)
    return "\n".join(style.literal(part, most=2 * across) for part in parts)


def _legend(
    figure: Figure,
    groups: Sequence[_Group],
    both: tuple[Points, Points],
    names: tuple[str, str],
    classes: Classes | None,
    count: int,
    top: float,
    note: str,
) -> None:
    """Draws the legend in the empty corner at the upper right, or above a single panel.

    Args:
        top: the upper edge of the panels in inches.
    """
    real, model = both
    names = points.noted(names[0], real.dropped_note()), points.noted(names[1], model.dropped_note())
    samples = Line2D([], [], color=style.SAMPLES)
    shares = ", ".join(f"{mass:.0%}" for mass in sorted(MASSES))
    known = groups[0].samples is not None
    if classes is None:
        handles: list[Any] = [Patch(color=style.DATA_SHADES[1]), samples]
        words = f"regions with {shares} of the points" if len(real.values) >= FEWEST else ""
    else:
        dots = Line2D([], [], color=style.MUTED, marker=".", linestyle="")
        handles = [dots, Line2D([], [], color=style.MUTED) if known else samples]
        of = f"{CLASS_MASS:.0%} of the samples of a class" if known else f"{shares} of the samples"
        words = f"outlines: regions with {of}"
    right = style.WIDTH - style.EDGE
    look: dict[str, Any] = {**style.LEGEND, "borderaxespad": 0.0, "labelspacing": 0.4, "fontsize": 10}
    place: dict[str, Any] = {"loc": "upper right", "bbox_transform": figure.dpi_scale_trans}
    if count == 1:
        figure.legend(handles, names, bbox_to_anchor=(right, top + 0.22), ncols=2, **place, **look)
        return
    figure.legend(handles, names, bbox_to_anchor=(right, top), **place, **look)
    muted: dict[str, Any] = {"color": style.MUTED, "size": 8, "ha": "right", "va": "top"}
    lines = [line for line in (words, note) if line]
    figure.text(right, top - 0.5, "\n".join(lines), transform=figure.dpi_scale_trans, **muted)
    if classes is not None:
        total = len(np.unique(_numbers(classes.data)))
        name = classes.name if total <= len(groups) else f"{classes.name}, {len(groups)} of {total}"
        look |= {"title": style.literal(name, most=30), "title_fontsize": 10, "fontsize": 9}
        look |= {"ncols": 2 if len(groups) > 5 else 1, "bbox_to_anchor": (right, top - 0.6 - 0.16 * len(lines))}
        figure.legend(
            [Patch(color=group.colour) for group in groups], [group.name for group in groups], **place, **look
        )
