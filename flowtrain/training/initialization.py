"""What comes before the first step: refusing what cannot be trained, and setting what depends on the data."""

import math

import torch

from flowtrain.bases import Base
from flowtrain.bijections.scale import Standardize
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.training.batches import Batches
from flowtrain.training.settings import Settings
from flowtrain.training.time_budget import TimeBudget
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError, NonFiniteError

# numbers in the batch that data-dependent parameters are set by, and rows: at the least, and at the most
INITIALIZATION, LEAST_ROWS, MOST_ROWS = 2**23, 500, 10_000


def check_trainable(flow: Flow, settings: Settings) -> None:
    """Refuses settings that are sound by themselves, but not for this flow or on so many ranks.

    Raises:
        ConfigError: naming the setting.
    """
    if settings.batch_size < settings.accumulate * ranks.size():
        raise ConfigError(
            f"trainer.batch_size={settings.batch_size} over {ranks.size()} ranks leaves fewer rows to one "
            f"than the {settings.accumulate} parts of trainer.accumulate: give a larger one"
        )
    if flow.solver is not None and settings.precision != "float32":
        raise ConfigError(
            f"trainer.precision={settings.precision}: ODEs are solved in float32, because their error control "
            "would measure the rounding; leave it at float32 for a continuous flow"
        )


def initialize(flow: Flow, batches: Batches, time_budget: TimeBudget | None = None) -> None:
    """Sets statistics and data-dependent parameters from training data, all rows of them on every rank.

    Args:
        time_budget: limits the number of rows, but not below LEAST_ROWS, and not for a base that is fitted to them.

    Raises:
        NonFiniteError: data that hold NaN or infinite values.
    """
    moments, offset = batches.data.statistics(), batches.data.offset
    if moments is None and offset is not None:
        # centered, but not standardized
        moments = offset, torch.ones_like(offset)
    for bijection in flow.bijection.modules():
        if isinstance(bijection, Standardize) and moments is not None:
            bijection.fit(*moments, offset)
    rows = max(LEAST_ROWS, min(MOST_ROWS, INITIALIZATION // math.prod(flow.event_shape)))
    # a base that is fitted, such as a mixture, needs the rows that its number of components was chosen by
    if time_budget is not None and type(flow.base).initialize is Base.initialize:
        rows = max(LEAST_ROWS, time_budget.first_rows(rows))
    if batches.data.n_train is not None:
        # no row twice: the shrinkage of a covariance depends on the number of distinct rows
        rows = min(rows, batches.data.n_train)
    x, label = batches.draw(0, rows, slice(None))
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("the training data hold NaN or infinite values: remove those rows")
    flow.base.initialize(flow.bijection.initialize(flow.dequantized(x), label))


def compile_parts(objective: Objective, flow: Flow) -> None:
    """Compiles what is evaluated most: the fields of continuous flows, and of a flow that solves no ODE the whole loss.

    Raises:
        ConfigError: a conditional continuous flow.
    """
    parts = flow.ode_blocks
    if parts and flow.classes is not None:
        raise ConfigError("trainer.compile=true: the fields of a conditional flow are not compiled; set it to false")
    for continuous in parts:
        continuous.compile_field()
    if not parts:
        objective.compile()
