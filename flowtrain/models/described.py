"""A flow that was built by hand, or an ensemble, as the config of its file describes it."""

from collections.abc import Sequence

from flowtrain.flow import Density
from flowtrain.ode import Solver
from flowtrain.utils.errors import ConfigError

# in configs of files
TARGET = "flowtrain.models.described.described"


def described(event_shape: Sequence[int], *, flow: Density, solver: Solver) -> Density:
    """The flow that a description has built; see `flowtrain.runs.save`.

    Args:
        solver: in place of all solvers of the flow, if it differs from the first of them.

    Raises:
        ConfigError: a description of something else, or of samples of another shape.
    """
    if not isinstance(flow, Density) or flow.event_shape != tuple(event_shape):
        raise ConfigError(f"the description is not that of a flow over samples of shape {tuple(event_shape)}")
    own = flow.solver
    if own is not None and (type(own), own.settings) != (type(solver), solver.settings):
        flow.use_solver(solver)
    return flow
