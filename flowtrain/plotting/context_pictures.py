"""Chooses the contexts and the rows for the figures of conditional flows."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.context import CATEGORICAL, ContextColumn, context_text, features
from flowtrain.data.tables.columns import default_names
from flowtrain.evaluation.log_likelihood import context_table, held_out
from flowtrain.flow import Density
from flowtrain.plotting.context_figures import draw_contexts
from flowtrain.plotting.drawing import as_drawn, drawing, evaluate_inside_range, warn_if_plotting_fails
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.errors import DataError

# the quantiles of a real context column that are shown, and the largest number of categories
QUANTILES, MOST_CATEGORIES = (0.1, 0.3, 0.5, 0.7, 0.9), 5
# the rows near a context: their share of all rows, and their smallest and largest numbers
NEAR, FEWEST_NEAR, MOST_NEAR = 0.05, 50, 1000
# their largest share of all rows. Otherwise the panels of a small test set would show the same rows
LARGEST_NEAR = 0.2
# the share of the rows among which the context of a panel is chosen
CANDIDATES = 0.02
# the number of points that pass through the flow at once
AT_ONCE = 2000


def draw_context_pictures(
    flow: Density, data: Dataset, path_of: Callable[[str], Path], title: str, options: PlotOptions = DEFAULT
) -> list[Path]:
    """Draws contexts.png of a conditional flow of one or two columns: its density at several contexts of test rows.

    The contexts are quantiles of the first real context column, or the most frequent categories if there is no such
    column. The other context columns are near their means.

    Returns:
        The files that were written.
    """
    if not flow.conditional or flow.event_shape not in ((1,), (2,)):
        return []
    with warn_if_plotting_fails("contexts"), drawing(flow) as flow:
        data = as_drawn(data)
        columns, values = _test_contexts(flow, data)
        contexts, varied = panel_contexts(columns, values)
        draw_contexts(
            path_of("contexts"),
            names=[_panel_name(columns, c, varied) for c in contexts.tolist()],
            data=[flow.dequantized(rows_near(flow, data, c)) for c in contexts],
            log_densities=[partial(log_density_at, flow, context=as_context(flow, c)) for c in contexts],
            columns=list(data.columns) or default_names(range(flow.event_shape[0])),
            title=f"{title}, density at contexts of test rows",
            near_words="with this context" if _all_categorical(columns) else "with the nearest contexts",
            options=options,
            types=flow.types,
        )
        return options.files(path_of("contexts"))
    return []


def _test_contexts(flow: Density, data: Dataset) -> tuple[tuple[ContextColumn, ...], Tensor]:
    """Returns the columns of the context, and the values (n, k) of the test rows on the CPU."""
    _, context = held_out(flow, data, "test")
    if context is None or not len(context):
        raise DataError("the test set has no rows")
    return context_table(flow, context.cpu(), data)


def panel_contexts(columns: tuple[ContextColumn, ...], values: Tensor) -> tuple[Tensor, int]:
    """Chooses contexts from rows (n, k).

    Returns:
        (contexts (m, k), which are rows of `values` in ascending order; the position of the column that varies).
    """
    varied = next((i for i, column in enumerate(columns) if column.kind != CATEGORICAL), 0)
    c = values[:, varied]
    # the distance of the other columns to their means
    others = [i for i in range(len(columns)) if i != varied]
    off = torch.zeros(len(values), dtype=values.dtype)
    if others:
        f = features([columns[i] for i in others], values[:, others], values.dtype)
        off = (f - f.mean(0)).square().sum(1)
    chosen = []
    if columns[varied].kind == CATEGORICAL:
        codes, counts = torch.unique(c, return_counts=True)
        frequent = codes[counts.argsort(descending=True, stable=True)][:MOST_CATEGORIES]
        for code in frequent.sort().values:
            rows = (c == code).nonzero().flatten()
            chosen.append(values[rows[off[rows].argmin()]])
    else:
        most = max(1, round(CANDIDATES * len(values)))
        for q in c.sort().values[[round(share * (len(c) - 1)) for share in QUANTILES]]:
            rows = (c - q).abs().argsort(stable=True)[: most if others else 1]
            chosen.append(values[rows[off[rows].argmin()]])
    found = torch.unique(torch.stack(chosen), dim=0)
    return found[found[:, varied].argsort(stable=True)], varied


def _all_categorical(columns: Sequence[ContextColumn]) -> bool:
    return all(column.kind == CATEGORICAL for column in columns)


def typical_context(flow: Density, data: Dataset) -> Tensor:
    """Returns a context in the middle of the contexts of test rows, in the form of `Flow.context_of`, (1, k).

    For a flow with labels, the result is the first class with training rows, (1,).
    """
    if flow.classes is not None:
        return torch.tensor(flow.classes_with_rows[:1], device=flow.like.device)
    columns, values = _test_contexts(flow, data)
    f = features(columns, values, values.dtype)
    middle = torch.stack([c.median() if len(torch.unique(c)) > 2 else c.mean() for c in f.unbind(1)])
    return values[(f - middle).square().sum(1).argmin()].unsqueeze(0).to(flow.like.device)


def rows_near(flow: Density, data: Dataset, context: Tensor) -> Tensor:
    """Returns the test rows whose contexts are nearest to a context (k,), on the device of the flow.

    The distance is between the features of contexts, in which real columns are standardized. For a flow with labels,
    the result contains rows with this label.
    """
    columns, values = _test_contexts(flow, data)
    c = context.reshape(1, -1).to(values)
    distance = (features(columns, values, values.dtype) - features(columns, c, values.dtype)).square().sum(1)
    most = min(MOST_NEAR, max(1, round(LARGEST_NEAR * len(values))))
    count = min(most, max(FEWEST_NEAR, round(NEAR * len(values))))
    if _all_categorical(columns):
        near = (distance == distance.min()).nonzero().flatten()[:MOST_NEAR]
    else:
        near = distance.argsort(stable=True)[:count]
    return data.test[near.to(data.test.device)].to(flow.like.device)


def as_context(flow: Density, values: Tensor) -> Tensor:
    """Converts values (k,) of `context_table` to one context for `Flow.log_prob`: (1, k), or a label ()."""
    return values.reshape(1, -1) if flow.context else values.reshape(()).long()


def log_density_at(flow: Density, x: Tensor, context: Tensor) -> Tensor:
    """Returns log p(x | c), (G,), at points x (G, d), in chunks. It is -inf outside the range of the flow."""

    def density(part: Tensor) -> Tensor:
        return flow.log_prob(part, context)

    return torch.cat([evaluate_inside_range(flow, part, density, -torch.inf) for part in torch.split(x, AT_ONCE)])


def context_words(flow: Density, context: Tensor) -> str:
    """Returns a context (1, k), or a label (1,), for titles: "mass = 1.5, colour = red", or "class 3"."""
    if not flow.context:
        return f"class {int(context)}"
    return context_text(flow.context, context.flatten().tolist())


def _panel_name(columns: tuple[ContextColumn, ...], values: list[float], varied: int) -> str:
    """Returns the name of a panel: the column that varies, and the other column if there is only one."""
    shown = [varied, *(i for i in range(len(columns)) if i != varied)] if len(columns) <= 2 else [varied]
    return context_text([columns[i] for i in shown], [values[i] for i in shown])
