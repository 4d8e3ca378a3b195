"""The figure of anomaly detection: log p of ordinary and of new rows, and the threshold."""

import math
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch
from torch import Tensor

from flowtrain.evaluation.result import AnomalyDetection, AnomalyRows
from flowtrain.plotting import style
from flowtrain.plotting.evaluation_figures import axis_name, draw_histograms, draw_line, finite_scores, set_label
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.errors import FlowtrainError

# inches: the height of the figure, and the left and lower edge, the width and the height of the panel
HEIGHT, LEFT, BOTTOM, WIDTH, PANEL_HEIGHT = 3.75, 0.78, 0.52, 8.04, 2.3
# the colours of the calibration rows, the new rows without known anomalies, and the known anomalies
COLOURS = (style.DATA, style.SAMPLES, style.INK)


def draw_anomalies(
    path: Path,
    *,
    found: AnomalyDetection,
    rows: AnomalyRows,
    unit: tuple[str, float],
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws histograms of log p of the calibration rows and of the new rows to `path`, with the threshold.

    If there are labels, the new rows and the known anomalies among them have separate histograms. Histograms are drawn
    as in `draw_ood`.

    Args:
        unit: the unit of log p, and the number of these units per nat.

    Raises:
        FlowtrainError: no calibration row has a finite log p.
    """
    words, scale = unit
    sets: dict[str, Tensor] = {"validation rows": rows.calibration, "new rows": rows.log_p}
    if rows.labels is not None:
        bad = rows.labels == 1
        sets = {
            "validation rows": rows.calibration,
            "other new rows": rows.log_p[~bad],
            "known anomalies": rows.log_p[bad],
        }
    sets = {name: scale * values for name, values in sets.items()}
    kept = {name: finite_scores(values) for name, values in sets.items()}
    known = kept["validation rows"]
    if len(known) == 0:
        raise FlowtrainError("cannot plot anomalies: log p of no validation row is finite")
    labels = [set_label(name, len(sets[name]) - len(kept[name]), len(kept[name])) for name in sets]
    with style.styled():
        figure = style.new_figure(HEIGHT, title, options)
        axes = style.add_axes(figure, LEFT, BOTTOM, WIDTH, PANEL_HEIGHT)
        threshold = found.threshold if found.threshold is not None and math.isfinite(found.threshold) else None
        shown = () if threshold is None else (scale * threshold,)
        draw_histograms(axes, [*kept.values()], COLOURS[: len(kept)], centre=float(np.median(known)), shown=shown)
        if threshold is not None:
            draw_line(axes, scale * threshold, "threshold", words)
        axes.set_xlabel(axis_name("log p(x)", axes, words))
        axes.set_ylabel("share of each set per bin")
        handles = [Patch(facecolor=f"{colour}66", edgecolor=colour) for colour in COLOURS[: len(kept)]]
        figure.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(LEFT, BOTTOM + PANEL_HEIGHT + 0.34),
            bbox_transform=figure.dpi_scale_trans,
            ncols=3,
            **{**style.LEGEND, "borderaxespad": 0.0},
        )
        style.save(figure, path, options)
