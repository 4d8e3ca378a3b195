"""Figures from tensors and plain rows. They know no trainer, model or config, and need no display."""

from pathlib import Path

from torch import Tensor

from flowtrain.errors import FlowtrainError
from flowtrain.plots.animation import KINDS, animate_flow_2d, animate_images, can_write_mp4, check_writable
from flowtrain.plots.calibration import draw_calibration
from flowtrain.plots.curves import draw_curves
from flowtrain.plots.flow1d import draw_flow_1d
from flowtrain.plots.flow2d import draw_flow_2d
from flowtrain.plots.images import draw_panels, draw_rows
from flowtrain.plots.ood import draw_ood
from flowtrain.plots.pairs import draw_pairs
from flowtrain.plots.passage import draw_passage
from flowtrain.plots.paths import draw_paths
from flowtrain.plots.points import LogDensity
from flowtrain.plots.quality import draw_quality
from flowtrain.plots.sweep import MOST_SWEPT, Swept, draw_sweep

__all__ = [
    "KINDS",
    "MOST_SWEPT",
    "Swept",
    "animate_flow_2d",
    "animate_images",
    "can_write_mp4",
    "check_writable",
    "draw_calibration",
    "draw_curves",
    "draw_flow",
    "draw_flow_1d",
    "draw_flow_2d",
    "draw_ood",
    "draw_pairs",
    "draw_panels",
    "draw_passage",
    "draw_paths",
    "draw_quality",
    "draw_rows",
    "draw_sweep",
]


def draw_flow(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity,
    columns: tuple[str, ...],
    title: str,
    log_scale: bool = False,
) -> None:
    """Draw data (N, d) against samples (M, d) to `path`, in the way that suits d.

    Up to two columns the model's density is drawn as well, from one call of `log_density`, (G, d) to (G,).
    Beyond, it is not called: a slice through a density of many columns shows next to nothing. `log_scale` shows
    two columns, and the density of one, by their logarithm.
    """
    if data.ndim != 2:
        raise FlowtrainError(f"cannot plot data of shape {tuple(data.shape)}: give it as (rows, columns)")
    if data.shape[1] == 1:
        draw_flow_1d(path, data=data, samples=samples, log_density=log_density, title=title, log_scale=log_scale)
    elif data.shape[1] == 2:
        draw_flow_2d(path, data=data, samples=samples, log_density=log_density, title=title, log_scale=log_scale)
    else:
        draw_pairs(path, data=data, samples=samples, columns=columns, title=title)
