"""Samples of vectors beside data, with the density of up to two columns."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowtrain import plots
from flowtrain.data.base import Dataset
from flowtrain.flow import Flow
from flowtrain.pictures.shared import where_inside
from flowtrain.scores import marginal

POINTS = 10_000


def draw(flow: Flow, data: Dataset, path: Path, title: str, samples: Tensor | None, log_scale: bool) -> None:
    """See `flowtrain.pictures.draw`."""
    if samples is None:
        samples = flow.sample(POINTS if flow.event_shape[0] <= 2 else 2000)

    def density(x: Tensor) -> Tensor:
        return where_inside(flow, x, partial(marginal, flow), -torch.inf)

    plots.draw_flow(
        path,
        data=flow.dequantized(data.test[:POINTS]),
        samples=samples,
        log_density=lambda x: torch.cat([density(part) for part in torch.split(x, 2000)]),
        columns=data.columns,
        title=title,
        log_scale=log_scale,
    )
