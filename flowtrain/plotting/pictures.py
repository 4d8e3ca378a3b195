"""Draws the figures of a flow: samples, evaluation, and others that depend on the kind of data."""

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import Evaluation
from flowtrain.evaluation.calibration import DENSITY, RADIUS
from flowtrain.flow import Density, Flow
from flowtrain.plotting import image_pictures, target_pictures, vector_pictures
from flowtrain.plotting.anomaly_figure import draw_anomalies
from flowtrain.plotting.context_figures import draw_calibration_by_context
from flowtrain.plotting.drawing import as_drawn, drawing, warn_if_plotting_fails
from flowtrain.plotting.evaluation_figures import draw_calibration, draw_ood
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.sbc_figure import draw_sbc
from flowtrain.plotting.transport_pictures import draw_transport_pictures
from flowtrain.utils.formatting import counted

# the name, in the figure of the calibration, of the only transform that an ensemble has
RANKS = "rank of log p"


def draw_evaluation(
    result: Evaluation,
    data: Dataset,
    title: str,
    name: str,
    path_of: Callable[[str], Path],
    options: PlotOptions = DEFAULT,
) -> list[Path]:
    """Draws the calibration, for a conditional flow also by context, and what else is included.

    These are SBC, anomalies and OOD detection.

    Args:
        title: the model and the data.
        name: the name of the data.
        path_of: returns the path of a figure from its name.

    Returns:
        The files that were written.
    """
    drawn: list[Path] = []
    found = result.calibration
    words = f"{title}, calibration on {counted(found.n, 'row')} ({result.rows_words})"
    labels = {f"z{i + 1}": column for i, column in enumerate(data.columns)}
    pit = {RANKS if name == DENSITY else name: u for name, u in result.pit.items()}
    with warn_if_plotting_fails("calibration"):
        note = calibration_note(
            len(pit.keys() - {RADIUS}), math.prod(data.event_shape), "column" if data.columns else "latent"
        )
        draw_calibration(path_of("calibration"), pit=pit, title=words, labels=labels, note=note, options=options)
        drawn += options.files(path_of("calibration"))
    if found.by_context:
        with warn_if_plotting_fails("calibration by context"):
            draw_calibration_by_context(
                path_of("calibration_by_context"),
                bins=found.by_context,
                transforms=[(RANKS if name == DENSITY else name, u) for name, u in result.context_pit],
                labels=labels,
                unit=result.unit,
                title=f"{title}, calibration by context ({result.rows_words})",
                options=options,
            )
            drawn += options.files(path_of("calibration_by_context"))
    if result.sbc is not None and result.ranks is not None:
        with warn_if_plotting_fails("sbc"):
            words = f"{title}, {counted(result.sbc.n, 'row')} among {counted(result.sbc.samples, 'sample')} each"
            draw_sbc(path_of("sbc"), result=result.sbc, ranks=result.ranks, title=words, options=options)
            drawn += options.files(path_of("sbc"))
    if result.anomalies is not None and result.anomaly_rows is not None:
        with warn_if_plotting_fails("anomalies"):
            count = f"{result.anomalies.flagged:,} of {counted(result.anomalies.n, 'row')}"
            draw_anomalies(
                path_of("anomalies"),
                found=result.anomalies,
                rows=result.anomaly_rows,
                unit=result.unit,
                title=f"{title}, anomalies: {count} ({result.anomalies.rate_words})",
                options=options,
            )
            drawn += options.files(path_of("anomalies"))
    if result.ood is None or result.sets is None:
        return drawn
    unit, scale = result.unit
    with warn_if_plotting_fails("ood"):
        draw_ood(
            path_of("ood"),
            names=(name, result.ood.name),
            log_p=(scale * result.sets[0], scale * result.sets[1]),
            entropy=scale * result.ood.entropy,
            auroc=result.ood.auroc,
            typicality_auroc=result.ood.typicality_auroc,
            unit=unit,
            title=f"{title}, OOD detection of {result.ood.name}",
            options=options,
        )
        drawn += options.files(path_of("ood"))
    return drawn


def calibration_note(shown: int, latents: int, what: str) -> str:
    """Returns a note on the latents that the figure of the calibration shows; empty if it shows all.

    Example:
        >>> calibration_note(8, 30, "column"), calibration_note(8, 8, "column")
        ('8 of 30 columns, those with the largest deviations', '')
    """
    if not 0 < shown < latents:
        return ""
    return f"{shown} of {latents:,} {what}s, those with the largest deviations"


def draw(
    flow: Density,
    data: Dataset,
    path: Path,
    title: str,
    samples: Tensor | None = None,
    label: int | None = None,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    context: Tensor | None = None,
) -> None:
    """Draws data beside samples of a flow: densities of one or two columns, a corner plot of more columns, or images.

    For a target, the density of the target replaces the data, see `flowtrain.plotting.target_pictures.draw`.

    The random state of torch is unchanged. Samples of a conditional flow that this function draws have the labels or
    the contexts of the data.

    Args:
        samples: samples of the flow. None: this function draws them.
        label: the class of `samples`. Only data of this class are drawn.
        log_scale: whether densities of one or two columns are shown on a logarithmic scale.
        context: for a flow with context columns, the context of `samples`: (1, k) for all, or (n, k). With one context,
            only the data with the nearest contexts are drawn.
    """
    if isinstance(data, TargetData):
        target_pictures.draw(flow, data.target, path, title, samples, log_scale, options)
        return
    data = as_drawn(data)
    with drawing(flow) as flow:
        if len(flow.event_shape) == 3:
            image_pictures.draw(flow, data, path, title, samples, label, options)
        else:
            vector_pictures.draw(flow, data, path, title, samples, label, log_scale, options, context)


def draw_other_figures(
    flow: Flow, data: Dataset, path_of: Callable[[str], Path], title: str, options: PlotOptions = DEFAULT
) -> list[Path]:
    """Draws the figures of a flow other than samples and evaluation.

    For images, these are reconstructions, interpolations, temperatures and classes. For two columns, they show the
    transport from the base to the data.

    Args:
        path_of: returns the path of a figure from its name.

    Returns:
        The files that were written.
    """
    data = as_drawn(data)
    if len(flow.event_shape) == 3:
        return image_pictures.draw_other_figures(flow, data, path_of, title, options)
    return draw_transport_pictures(flow, data, path_of, title, options) if flow.event_shape == (2,) else []
