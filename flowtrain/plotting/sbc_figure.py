"""The figure of simulation-based calibration: ranks of the columns, and expected coverage."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from flowtrain.evaluation.result import Ranks, SimulationCalibration
from flowtrain.evaluation.sbc import simultaneous_band
from flowtrain.plotting import points, style
from flowtrain.plotting.evaluation_figures import BAND, deviation
from flowtrain.plotting.options import DEFAULT, PlotOptions

# inches: the height of the figure with legends of one row, the place and size of its panels, their left edges
HEIGHT, BOTTOM, PANEL_HEIGHT, PANEL_WIDTH = 3.55, 0.52, 2.38, 3.6
PANELS = (0.78, 5.18)
# inches: the width of the legend of a panel
LEGEND_WIDTH = 4.2
# the columns with the smallest p-values have these colours and a name in the legend
NAMED_COLOURS = (style.BLUE, style.ORANGE, style.GREEN)
BAND_NAME = "95% of perfect flows"
# the number of letters for their names in the legend
NAME_LETTERS = 54


def draw_sbc(
    path: Path, *, result: SimulationCalibration, ranks: Ranks, title: str, options: PlotOptions = DEFAULT
) -> None:
    """Draws the ranks of the columns as F_n(u) - u, and the expected coverage of credible regions.

    F_n(u) is the share of the n rows whose rank is at most u. The coverage is the share of the rows inside of their
    credible region. In both panels, the whole curve of a perfect flow is inside of the band with a probability of 95%.
    """
    with style.styled():
        order = sorted(range(len(result.columns)), key=lambda j: list(result.columns.values())[j].order)
        names = _legend_names(list(result.columns), order)
        figure = style.new_figure(HEIGHT + style.legend_height([BAND_NAME, *names], LEGEND_WIDTH), title, options)
        left, right = (style.add_axes(figure, edge, BOTTOM, PANEL_WIDTH, PANEL_HEIGHT) for edge in PANELS)
        # F_n(0) = 0 and F_n(1) = 1
        at, low, high = (np.concatenate(([0.0], ends.numpy(), [1.0])) for ends in simultaneous_band(result.n))
        # the least uniform columns are drawn last, on top
        for j, colour, name in list(zip_longest(order, NAMED_COLOURS[: len(order)], names))[::-1]:
            look: dict[str, Any] = {"color": colour or style.HAIRLINE, "linewidth": 1.4 if colour else 0.8}
            left.plot(*deviation(np.sort(points.to_numpy(ranks.columns[:, j]))), label=name, **look)
        left.axhline(0, color=style.MUTED, linewidth=0.8, zorder=0.5)
        left.fill_between(at, low - at, high - at, color=BAND, linewidth=0, zorder=0, label=BAND_NAME)
        right.fill_between(at, low, high, color=BAND, linewidth=0, zorder=0)
        right.plot([0, 1], [0, 1], color=style.MUTED, linewidth=0.8, zorder=0.5)
        looks = {"random balls (TARP)": (ranks.tarp, style.INK), "highest density": (ranks.density, style.VERMILLION)}
        for name, (u, colour) in looks.items():
            level, difference = deviation(np.sort(points.to_numpy(u)))
            right.plot(level, level + difference, color=colour, linewidth=1.4, label=name)
        _frame(left, right)
        for axes in (left, right):
            style.legend_above(axes, width=LEGEND_WIDTH)
        style.save(figure, path, options)


def _legend_names(names: Sequence[str], order: Sequence[int]) -> list[str]:
    """Returns the names in the legend, for the first columns in an order."""
    named = order[: len(NAMED_COLOURS)]
    return [style.abbreviated(names[j], NAME_LETTERS // len(named)) for j in named]


def _frame(left: Axes, right: Axes) -> None:
    """Sets the labels and the limits of the axes."""
    half = 1.12 * max(np.abs(left.dataLim.intervaly))
    left.set(xlim=(-0.01, 1.01), ylim=(-half, half))
    left.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    left.set_xlabel("u, the rank of a row among its samples")
    left.set_ylabel("share of rows below u, minus u")
    right.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_xlabel("probability of the region under the flow")
    right.set_ylabel("share of rows in the region")
