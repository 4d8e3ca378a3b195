"""Flows of more than two dimensions: every pair of the first few columns, data against samples."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from flowtrain.plots import points, scales, style
from flowtrain.plots.points import Array, Range

HEIGHT = 9.2
BINS = 60
MASSES = (0.9, 0.6, 0.3)
# fewer points than this make contours of noise
FEWEST = 200
# smallest distance between two ticks of a compressed axis, as a share of its length; panels are small
APART = 0.25


def draw_pairs(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    columns: tuple[str, ...],
    title: str,
    most: int = 5,
) -> None:
    """Draw the first `most` columns of data (N, d) and samples (M, d) against each other to `path`.

    The diagonal holds the histogram of each column, the triangle under it the smallest regions that hold 30, 60
    and 90 percent of the points of each pair. The limits come from the data alone. The axis of a heavy-tailed column
    is logarithmic far from the bulk, and densities are per unit of the axes.
    """
    real, model = points.as_points(data, samples)
    width = real.values.shape[1]
    count = min(width, max(most, 1))
    scaled = [scales.suited(column) for column in real.values.T[:count]] + [scales.Scale()] * (width - count)
    real, model = (scales.along(scaled, each) for each in (real, model))
    limits = [points.robust_range(column) for column in real.values.T[:count]]
    names = [style.literal(columns[i] if i < len(columns) else f"x{i + 1}", most=80 // count) for i in range(count)]
    with style.styled():
        side = (style.WIDTH - 0.85) / count
        figure = style.new_figure(HEIGHT, title)
        for row in range(count):
            for column in range(row + 1):
                box = (0.7 + column * side, 0.62 + (count - 1 - row) * side, 0.93 * side, 0.93 * side)
                axes = style.add_axes(figure, *box)
                if row == column:
                    _histograms(axes, real.values[:, row], model.values[:, row], limits[row])
                else:
                    pair = (limits[column], limits[row])
                    _regions(axes, real.values[:, [column, row]], model.values[:, [column, row]], pair)
                _label(axes, row, column, names)
                scaled[column].mark(axes.xaxis, APART)
                if row != column:
                    scaled[row].mark(axes.yaxis, APART)
        notes = [f"first {count} of {width} columns"] if count < width else []
        if count > 1 and len(real.values) >= FEWEST:
            notes.append("regions of " + ", ".join(f"{mass:.0%}" for mass in sorted(MASSES)) + " of the points")
        if not all(each.plain for each in scaled):
            notes.append("axes of heavy-tailed columns are logarithmic far out")
        _legend(figure, (points.noted("data", real.lost()), points.noted("samples", model.lost())), notes)
        style.save(figure, path)


def _histograms(axes: Axes, real: Array, model: Array, limits: Range) -> None:
    bins = points.fine_bins(real, limits, points.common_count(real, model), BINS)
    observed, edges = points.histogram_1d(real, limits, bins)
    sampled, _ = points.histogram_1d(model, limits, bins)
    axes.stairs(observed, edges, fill=True, color=style.DATA_SHADES[0], linewidth=0)
    axes.stairs(sampled, edges, color=style.SAMPLES, linewidth=1.2, baseline=None)
    axes.set(xlim=limits, ylim=(0, 1.12 * min(max(observed.max(), sampled.max()), 3 * observed.max())))


def _regions(axes: Axes, real: Array, model: Array, limits: tuple[Range, Range]) -> None:
    """Data (N, 2) as filled regions and samples (M, 2) as outlines; as dots where there are too few points."""
    # contours follow the counting noise more closely than colours do
    blur = 1.5 * points.blur_2d(points.common_count(real, model))
    grid = [points.centres(edge, BINS) for edge in limits]
    for values, filled in ((real, True), (model, False)):
        heights = points.histogram_2d(values, limits, BINS, blur)
        levels = _levels(heights)
        if len(values) < FEWEST or len(levels) < len(MASSES):
            colour = style.DATA if filled else style.SAMPLES
            axes.plot(values[:2000, 0], values[:2000, 1], ".", color=colour, markersize=3, alpha=0.6)
        elif filled:
            axes.contourf(*grid, heights.T, levels=[*levels, 2 * heights.max()], colors=style.DATA_SHADES)
        else:
            axes.contour(*grid, heights.T, levels=levels, colors=style.SAMPLES, linewidths=1.0)
    axes.set(xlim=limits[0], ylim=limits[1])


def _levels(heights: Array) -> list[float]:
    """The rising heights above which the MASSES lie, those that can be told apart."""
    levels = sorted({points.peak(heights, 1 - mass) for mass in MASSES})
    return [level for level in levels if heights.min() < level < heights.max()]


def _label(axes: Axes, row: int, column: int, names: Sequence[str]) -> None:
    """Ticks and names at the outer edges only."""
    last = row == len(names) - 1
    style.round_ticks(axes, 3)
    axes.tick_params(labelbottom=last, labelleft=column == 0)
    if last:
        axes.set_xlabel(names[column])
    if row == column:
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False, labelleft=False)
    elif column == 0:
        axes.set_ylabel(names[row])
        # one column of names, however wide the tick labels are
        axes.yaxis.set_label_coords(-0.52 / (axes.get_position().width * style.WIDTH), 0.5)


def _legend(figure: Figure, names: tuple[str, str], notes: list[str]) -> None:
    """What the colours mean, in the empty corner."""
    handles = [Patch(color=style.DATA_SHADES[1]), Line2D([], [], color=style.SAMPLES)]
    right, top = style.WIDTH - style.EDGE, HEIGHT - 0.5
    inches = figure.dpi_scale_trans
    layout = {**style.LEGEND, "borderaxespad": 0.0, "labelspacing": 0.4}
    figure.legend(
        handles,
        names,
        loc="upper right",
        bbox_to_anchor=(right, top),
        bbox_transform=inches,
        fontsize=10,
        **layout,
    )
    figure.text(right, top - 0.55, "\n".join(notes), transform=inches, color=style.MUTED, size=8, ha="right", va="top")
