"""The config target of files that contain a flow built in Python, or an ensemble."""

from collections.abc import Sequence

from flowtrain.flow import Density
from flowtrain.ode import Solver
from flowtrain.utils.errors import ConfigError

# the `_target_` of the model in configs of such files
TARGET = "flowtrain.models.described.described"


def described(event_shape: Sequence[int], *, flow: Density, solver: Solver) -> Density:
    """Returns the flow that was built from the description in a file; see `flowtrain.runs.save`.

    Args:
        event_shape: shape of a sample.
        flow: the built flow.
        solver: replaces all solvers of the flow, if it differs from the first solver of the flow.

    Raises:
        ConfigError: the description does not describe a flow, or the samples of the flow have another shape.
    """
    if not isinstance(flow, Density) or flow.event_shape != tuple(event_shape):
        raise ConfigError(f"model.flow does not describe a flow of samples of shape {tuple(event_shape)}")
    own = flow.solver
    if own is not None and (type(own), own.settings) != (type(solver), solver.settings):
        flow.use_solver(solver)
    return flow
