"""Validation curves of several runs in one figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flowtrain.plotting import style
from flowtrain.plotting.curves import Rows, is_finite, series_of

# inches
LEFT, BOTTOM, TALL, GAP, ABOVE, LEGEND_LINE = 0.72, 0.5, 2.9, 0.35, 0.5, 0.2
COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.ORANGE, style.PURPLE, style.INK, style.MUTED)
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
# the largest number of runs whose lines differ in colour or style
MOST_RUNS = len(COLOURS) * len(LINES)


def draw_runs(path: Path, *, runs: Mapping[str, Rows], title: str) -> None:
    """Draws the validation NLL of each run against the step and against the seconds of training.

    The NLL is in bits per dimension if every validation row contains this unit, else in nats. Rows without a finite NLL
    are left out.

    Args:
        runs: the rows of metrics.jsonl by the name of the run; at least one row of one run has a validation NLL.
    """
    rows = {name: [row for row in metrics if row.get("split") == "val"] for name, metrics in runs.items()}
    in_bits = all(is_finite(row.get("bits_per_dim")) for validations in rows.values() for row in validations)
    key, unit = ("bits_per_dim", "bits/dim") if in_bits else ("nll", "nats")
    columns = 3 if max(map(len, runs)) <= 32 else 2 if max(map(len, runs)) <= 50 else 1
    legend = LEGEND_LINE * -(-len(runs) // columns)
    with style.styled():
        figure = style.new_figure(BOTTOM + TALL + legend + ABOVE, title)
        width = (style.WIDTH - LEFT - GAP - style.EDGE) / 2
        by_step = style.add_axes(figure, LEFT, BOTTOM, width, TALL)
        by_time = style.add_axes(figure, LEFT + width + GAP, BOTTOM, width, TALL)
        values = []
        for i, (name, validations) in enumerate(rows.items()):
            look: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": LINES[i // len(COLOURS) % len(LINES)],
                "label": style.literal(name, most=60),
            }
            values.append(_curve(by_step, validations, "step", key, look))
            _curve(by_time, validations, "seconds", key, look)
        limits = _limits([each for each in values if len(each)])
        for axes, label in ((by_step, "step"), (by_time, "seconds of training")):
            axes.grid(axis="y")
            axes.set_xlabel(label)
            axes.set_ylim(*limits)
            # room for the marks of step 0
            axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        by_step.set_ylabel(f"validation NLL ({unit})")
        by_time.tick_params(labelleft=False)
        handles, labels = by_step.get_legend_handles_labels()
        by_step.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **style.LEGEND)
        style.save(figure, path)


def _curve(axes: Axes, rows: Rows, x: str, y: str, look: Mapping[str, Any]) -> np.ndarray:
    """Draws a curve, and returns its values of y. If several rows have the same x, the last one counts."""
    found = series_of(rows, y, x)
    every = max(1, len(found.values) // 25)
    axes.plot(found.steps, found.values, marker="o", markersize=3, markevery=every, **look)
    return found.values


def _limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the range of the NLL axis. Steep starts and divergences may lie outside this range.

    Let q be the largest third quartile of a curve. The range begins at the lowest value. It ends at the highest value,
    or at most as far above q as the lowest value is below q.
    """
    low = min(float(values.min()) for values in curves)
    high = max(float(values.max()) for values in curves)
    bulk = max(float(np.quantile(values, 0.75)) for values in curves)
    high = min(high, bulk + (bulk - low)) if bulk > low else high
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin
