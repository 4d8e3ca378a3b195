"""Chooses the rows, densities and classes for the figures of samples beside the data of a table."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.tables.columns import default_names
from flowtrain.evaluation.log_likelihood import held_out, marginal
from flowtrain.flow import Density
from flowtrain.plotting.context_pictures import log_density_at, rows_near
from flowtrain.plotting.corner import Classes, draw_corner
from flowtrain.plotting.densities import draw_flow_1d, draw_flow_2d
from flowtrain.plotting.drawing import evaluate_inside_range, first_test_samples
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import EVERYWHERE, LogDensity, Range
from flowtrain.utils.errors import FlowtrainError

# the numbers of rows of the data, of samples of one or two columns, and of samples of more columns
POINTS, SAMPLES, SAMPLES_OF_MANY = 10_000, 10_000, 2000


def draw(
    flow: Density,
    data: Dataset,
    path: Path,
    title: str,
    samples: Tensor | None,
    label: int | None,
    log_scale: bool,
    options: PlotOptions = DEFAULT,
    context: Tensor | None = None,
) -> None:
    """Draws rows of a table beside samples; see `flowtrain.plotting.pictures.draw`."""
    if flow.context:
        _draw_with_context(flow, data, path, title, samples, log_scale, options, context)
        return
    label = None if flow.classes is None else label
    real, _ = first_test_samples(flow, data, POINTS, label)
    width = flow.event_shape[0]
    drawn = None
    if samples is None:
        n = SAMPLES if width <= 2 else SAMPLES_OF_MANY
        drawn = None if flow.classes is None or label is not None else flow.drawn_labels(n)
        samples = flow.sample(n, label=label if drawn is None else drawn)
    classes = None
    if width > 2 and data.test_labels is not None and label is None:
        classes = Classes(data.test_labels[:POINTS], drawn, data.samples.label or "class")

    def density(x: Tensor) -> Tensor:
        function = partial(marginal, flow) if label is None else partial(flow.log_prob, label=label)
        return evaluate_inside_range(flow, x, function, -torch.inf)

    draw_flow(
        path,
        data=flow.dequantized(real),
        samples=samples,
        log_density=lambda x: torch.cat([density(part) for part in torch.split(x, 2000)]),
        true_log_density=None if label is not None else true_log_density(data),
        columns=data.columns,
        classes=classes,
        title=title,
        log_scale=log_scale,
        options=options,
        supports=[one.support for one in flow.types],
    )


def _draw_with_context(
    flow: Density,
    data: Dataset,
    path: Path,
    title: str,
    samples: Tensor | None,
    log_scale: bool,
    options: PlotOptions,
    context: Tensor | None,
) -> None:
    """Draws rows beside samples of a flow with context columns.

    Samples with one context (1, k) are drawn with p(x | c), beside rows with similar contexts. Otherwise no density is
    drawn. Samples that this function draws have the contexts of the rows.
    """
    one = context if samples is not None and context is not None and context.numel() == len(flow.context) else None
    real = data.test[:POINTS].to(flow.like.device) if one is None else rows_near(flow, data, one.flatten())
    if samples is None:
        _, known = held_out(flow, data, "test")
        assert known is not None
        known, n = known[:POINTS], SAMPLES if flow.event_shape[0] <= 2 else SAMPLES_OF_MANY
        # the rows may be sorted, so the contexts are evenly spaced
        at = torch.arange(n, device=known.device) * len(known) // n
        samples = flow.sample(n, context=known[at])
        title = f"{title}, samples with the contexts of the data"
    elif one is not None:
        title = f"{title}, data with the nearest contexts"
    draw_flow(
        path,
        data=flow.dequantized(real),
        samples=samples,
        log_density=None if one is None else partial(log_density_at, flow, context=one.reshape(1, -1)),
        columns=data.columns,
        title=title,
        log_scale=log_scale,
        options=options,
        supports=[one.support for one in flow.types],
    )


def true_log_density(data: Dataset) -> LogDensity | None:
    """Returns the log density of the data, which maps (B, d) to (B,), in nats; None if it is not known."""
    if data.integer_valued or data.log_prob(data.test[:1]) is None:
        return None

    def log_density(x: Tensor) -> Tensor:
        log_p = data.log_prob(x)
        assert log_p is not None
        return log_p

    return log_density


def draw_flow(
    path: Path,
    *,
    data: Tensor,
    samples: Tensor,
    log_density: LogDensity | None,
    columns: tuple[str, ...],
    title: str,
    true_log_density: LogDensity | None = None,
    classes: Classes | None = None,
    log_scale: bool = False,
    options: PlotOptions = DEFAULT,
    supports: Sequence[Range] = (),
) -> None:
    """Draws data (N, d) and samples (M, d) in the figure for their number of columns d.

    One and two columns are drawn with the density of the model, and with the true density if it is known. More than two
    columns are drawn as a corner plot without densities, because a slice through a density of many columns shows almost
    nothing.

    Args:
        log_density: maps (G, d) to (G,), in nats. It is called once for one or two columns, otherwise never. None: the
            density of the model is not drawn.
        columns: the names of the columns. If empty, they are c0, c1, ...
        classes: the classes of the rows, for a corner plot.
        log_scale: whether densities of one and two columns are drawn on a logarithmic scale.
        supports: the range of values of each column, which the axes do not leave; () if it is not limited.
    """
    if data.ndim != 2:
        raise FlowtrainError(f"cannot plot data of shape {tuple(data.shape)}: give it as (rows, columns)")
    width = data.shape[1]
    if width > 2:
        draw_corner(path, data=data, samples=samples, columns=columns, title=title, classes=classes, options=options)
        return
    names = list(columns) or default_names(range(width))
    arguments: dict[str, Any] = {
        "data": data,
        "samples": samples,
        "log_density": log_density,
        "true_log_density": true_log_density,
        "title": title,
        "log_scale": log_scale,
        "options": options,
    }
    ranges = list(supports) or [EVERYWHERE] * width
    if width == 1:
        draw_flow_1d(path, column=names[0], support=ranges[0], **arguments)
    else:
        draw_flow_2d(path, columns=names, supports=ranges, **arguments)
