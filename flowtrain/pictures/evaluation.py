"""Figures of an evaluation."""

from collections.abc import Callable
from pathlib import Path

from flowtrain import plots
from flowtrain.evaluation import Evaluation
from flowtrain.pictures.shared import spared


def draw_evaluation(result: Evaluation, title: str, data: str, place: Callable[[str], Path]) -> list[Path]:
    """Calibration, and of two sets how likelihood tells them apart.

    Args:
        data: the name of the data.
        place: where a figure of some name goes.

    Returns:
        The files.
    """
    drawn = []
    words = f"{title}, latents of {result.calibration.n:,} samples ({result.rows_words})"
    with spared("calibration"):
        plots.draw_calibration(place("calibration"), pit=result.pit, title=words)
        drawn.append(place("calibration"))
    if result.ood is None or result.sets is None:
        return drawn
    unit, scale = result.unit
    with spared("ood"):
        plots.draw_ood(
            place("ood"),
            names=(data, result.ood.name),
            log_p=(scale * result.sets[0], scale * result.sets[1]),
            entropy=scale * result.ood.entropy,
            auroc=result.ood.auroc,
            typicality_auroc=result.ood.typicality_auroc,
            unit=unit,
            title=f"{title}, beside {result.ood.name}",
        )
        drawn.append(place("ood"))
    return drawn
