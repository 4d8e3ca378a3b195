"""Preparation of training: checks of the settings, data-dependent initialization and compilation."""

import inspect
import math

import torch

from flowtrain.bases import Base
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.scale import Standardize
from flowtrain.data.targets.base import TargetData
from flowtrain.flow import Flow
from flowtrain.nn.velocity_field import Field
from flowtrain.objectives.base import Objective
from flowtrain.training.batches import Batches
from flowtrain.training.settings import Settings
from flowtrain.training.time_budget import TimeBudget
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError, NonFiniteError
from flowtrain.utils.weighting import resample

# size of the batch for data-dependent initialization: the number of elements, the least and the largest number of rows
INITIALIZATION, LEAST_ROWS, MOST_ROWS = 2**23, 500, 10_000


def check_trainable(flow: Flow, settings: Settings) -> None:
    """Checks the settings that depend on the flow or the number of ranks.

    Raises:
        ConfigError: a setting that does not fit the flow or the number of ranks.
    """
    if settings.batch_size < settings.accumulate * ranks.size():
        raise ConfigError(
            f"trainer.batch_size={settings.batch_size} over {ranks.size()} ranks leaves a rank fewer rows than "
            f"trainer.accumulate={settings.accumulate}: give a larger batch size"
        )
    if flow.solver is not None and settings.precision != "float32":
        raise ConfigError(
            f"trainer.precision={settings.precision}: ODEs are solved in float32, because in a lower precision the "
            "error control would measure rounding errors; set it to float32 for a continuous flow"
        )


def check_cuda_graphs(objective: Objective, flow: Flow, settings: Settings) -> None:
    """Checks that solver.cuda_graphs can be used, if it is set. The solver checks its own settings.

    Raises:
        ConfigError: an objective or a field whose training solves cannot be captured.
    """
    if not any(block.solver.cuda_graphs for block in flow.ode_blocks):
        return
    if objective.likelihood_from is None:
        reason = "this objective solves no ODE in training; use objective=likelihood or objective=hybrid"
    elif objective.uses_target:
        reason = "an objective for a target solves two ODEs before each backward pass; use data instead of a target"
    elif settings.compile:
        reason = "trainer.compile=true captures graphs too; set it to false"
    elif len(flow.event_shape) > 1:
        reason = (
            "the solves of images recompute their stages (solver.gradient=auto); graphs need samples that are vectors"
        )
    elif any(not isinstance(block.field, Field) or block.field.recorder() is None for block in flow.ode_blocks):
        reason = "a velocity field has no hand-written derivatives; use a field of flowtrain.nn"
    else:
        return
    raise ConfigError(f"solver.cuda_graphs=true: {reason}, or set solver.cuda_graphs=false")


def initialize(flow: Flow, batches: Batches, time_budget: TimeBudget | None = None) -> None:
    """Sets statistics and data-dependent parameters from the same rows of the training data on every rank.

    With weights, the moments of bijections are weighted means. A base that is fitted gets rows that are drawn by
    weight, see `resample`.

    Args:
        time_budget: limits the number of rows, but not below LEAST_ROWS, and not if the base is fitted to the rows.

    Raises:
        NonFiniteError: the data contain NaN or infinite values.
    """
    moments, offset = batches.data.statistics(), batches.data.offset
    if moments is None and offset is not None:
        # the samples are centered, but not standardized
        moments = offset, torch.ones_like(offset)
    for bijection in flow.bijection.modules():
        if isinstance(bijection, Standardize) and moments is not None:
            bijection.fit(*moments, offset)
    rows = max(LEAST_ROWS, min(MOST_ROWS, INITIALIZATION // math.prod(flow.event_shape)))
    # a base that is fitted, such as a mixture, needs the same rows from which its number of components was chosen
    if time_budget is not None and type(flow.base).initialize is Base.initialize:
        rows = max(LEAST_ROWS, time_budget.first_rows(rows))
    if batches.data.n_train is not None:
        # repeated rows are left out, because the shrinkage of a covariance depends on the number of distinct rows
        rows = min(rows, batches.data.n_train)
    x, context, weights = batches.draw(0, rows, slice(None))
    if not bool(torch.isfinite(x).all()):
        if isinstance(batches.data, TargetData):
            raise NonFiniteError(
                "the initial distribution has samples that are NaN or infinite: change target.loc and target.scale. "
                "They are mean and standard deviation before the type of a column maps the real line to its range"
            )
        raise NonFiniteError("the training data contain NaN or infinite values: remove these rows")
    features = flow.features(flow.context_of(context, x))
    if weights is None:
        flow.base.initialize(flow.bijection.initialize(flow.dequantized(x), features))
        return
    _check_takes_weights(flow)
    if not float(weights.sum()) > 0:
        # with signed weights, the sum over these rows can be negative although the sum over all rows is positive
        weights = weights.clamp_min(0)
    z = flow.bijection.initialize(flow.dequantized(x), features, weights)
    flow.base.initialize(z[resample(weights).to(z.device)])


def _check_takes_weights(flow: Flow) -> None:
    """Checks that `initialize` of each bijection has an argument for weights.

    Raises:
        ConfigError: a bijection of the user without this argument.
    """
    for module in flow.bijection.modules():
        if isinstance(module, Bijection) and "weights" not in inspect.signature(module.initialize).parameters:
            raise ConfigError(
                f"data.weights: {type(module).__name__}.initialize has no argument weights; add weights=None after "
                "context, and weight the moments of the data with it"
            )


def compile_parts(objective: Objective, flow: Flow) -> None:
    """Compiles the velocity fields of a continuous flow, or the whole loss of any other flow.

    Raises:
        ConfigError: a conditional continuous flow.
    """
    parts = flow.ode_blocks
    if parts and flow.conditional:
        raise ConfigError("trainer.compile=true: the fields of a conditional flow are not compiled; set it to false")
    for continuous in parts:
        continuous.compile_field()
    if not parts:
        objective.compile()
