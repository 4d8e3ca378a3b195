"""The density of one or two columns on a grid, as arrays for figures that the user draws."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.tables.columns import default_names
from flowtrain.evaluation.log_likelihood import score_rows
from flowtrain.flow import Context, Density
from flowtrain.plotting.points import EVERYWHERE, finite, robust_range
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.process import seeded

# the names of the axes
AXES = ("x", "y")


def check_has_grid(flow: Density, path: object, context: Context = None) -> None:
    """Checks that a grid is possible: vectors of one or two columns, and a context for a flow with context columns.

    Args:
        path: the file of the grid, for the message.
        context: the context of the grid, see `density_grid`.

    Raises:
        ConfigError: images, more than two columns, or a missing context.
        FlowtrainError: a context that the flow does not have.
    """
    if flow.context and context is None:
        names = ", ".join(column.name for column in flow.context)
        raise ConfigError(
            f"grid={path}: the flow is conditional on {names}, and a grid needs values of these columns. Give "
            "scores=FILE and data.path=FILE with the points of your grid and these columns"
        )
    if context is not None and not flow.context:
        flow.check_label(context)
    if len(flow.event_shape) == 1 and flow.event_shape[0] <= len(AXES):
        return
    if len(flow.event_shape) > 1:
        raise ConfigError(f"grid={path}: the samples are images, and a grid is for one or two columns; omit grid")
    raise ConfigError(
        f"grid={path}: the samples have {flow.event_shape[0]} columns, and a grid is for one or two. Train on one or "
        "two of them with data.columns, or give scores=FILE and data.path=FILE with the points of your grid"
    )


def density_grid(
    flow: Density,
    x: Tensor,
    points: int,
    columns: tuple[str, ...] = (),
    context: Context = None,
    **options: Any,
) -> dict[str, NDArray[Any]]:
    """Computes log p on a regular grid around data of one or two columns.

    The grid of a column covers the range from its 0.5% to its 99.5% quantile, and 12% of this range on both sides, but
    it does not leave the support of a column type. For whole numbers x, the density is the density of x + u with u
    uniform in [0, 1).

    Args:
        x: the data, (n, 1) or (n, 2), in data units.
        points: the number m of grid points of each axis.
        columns: the names of the columns.
        context: for a conditional flow, the context of all points, see `Flow.log_prob`: a label, or values of the
            context columns. None means the mean density over the classes.
        options: batch size and seed: arguments of `score_rows`.

    Returns:
        `x` (m,) and, for two columns, `y` (m,): the axes; `log_prob` (m,) or (m, m), first index along x, in nats and
        float64, -inf outside the range of the flow, NaN if it cannot be computed; `columns`: the names of the axes;
        `context` if it is given: the label, or the values of the context columns (k,).

    Raises:
        FlowtrainError: a context that the flow does not have, or data without a finite row.
    """
    with seeded(0, flow.like.device):
        values = finite("data", flow.dequantized(x)).values
    supports = [one.support for one in flow.types] or [EVERYWHERE] * values.shape[1]
    ranges = [robust_range(column) for column in values.T]
    axes = [
        np.linspace(max(start, low), min(end, high), points)
        for (start, end), (low, high) in zip(ranges, supports, strict=True)
    ]
    grid = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)))
    inside = torch.ones(len(grid), dtype=torch.bool)
    if flow.levels is not None:
        inside = ((grid >= 0) & (grid <= flow.levels)).all(1)
    log_p = torch.full((len(grid),), -torch.inf, dtype=torch.float64)
    found = None if context is None else flow.context_of(context, grid)
    if inside.any():
        within = None if found is None else found[inside]
        log_p[inside] = score_rows(flow, grid[inside], within, latents=0, unsolved=len(grid), **options).log_p
    arrays = dict(zip(AXES, axes, strict=False))
    names = np.array(columns or default_names(range(len(axes))))
    arrays |= {"log_prob": log_p.view([points] * len(axes)).numpy(), "columns": names}
    return arrays if found is None else {**arrays, "context": found[0].cpu().numpy()}
