"""FFJORD: a continuous flow with a free-form field (Grathwohl et al. 2019)."""

from collections.abc import Sequence

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.checks import whole
from flowtrain.divergence import TraceRule
from flowtrain.errors import ConfigError
from flowtrain.fields.mlp import MLPField
from flowtrain.flow import Flow
from flowtrain.solvers import Solver


def ffjord(
    event_shape: tuple[int, ...],
    *,
    solver: Solver,
    field: str = "concatsquash",
    hidden: Sequence[int] = (64, 64, 64),
    activation: str = "tanh",
    flows: int = 1,
    trace: str = "auto",
    eval_trace: str = "auto",
    noise: str = "rademacher",
    noise_samples: int = 1,
) -> Flow:
    """A flow over vectors: `flows` continuous bijections, each with an MLP field of its own.

    Args:
        event_shape: (d,).
        solver: shared by all the bijections.
        field: concatsquash | concat | time_embedding.
        hidden, activation: of the field, see `MLPField`.
        trace, eval_trace, noise, noise_samples: see `TraceRule`.

    Raises:
        ConfigError: images, or a setting out of range.
    """
    if len(event_shape) != 1:
        raise ConfigError(f"model=ffjord is for vectors; the data has samples of shape {event_shape}")
    rule = TraceRule(trace, eval_trace, noise, noise_samples)
    return Flow(
        event_shape,
        Chain(
            Continuous(MLPField(event_shape[0], hidden, field, activation), solver, rule)
            for _ in range(whole("model.flows", flows))
        ),
    )
