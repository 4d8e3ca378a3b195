"""flowtrain: train, evaluate and look at normalizing flows.

Example:
    >>> import flowtrain
    >>> flow = flowtrain.load("outputs/2026-01-01/12-00-00")  # doctest: +SKIP
    >>> flow.log_prob(flow.sample(5)).shape  # doctest: +SKIP
    torch.Size([5])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# notes when the command began
import flowtrain.utils.status  # noqa: F401

if TYPE_CHECKING:
    from flowtrain.flow import Flow
    from flowtrain.runs.load import load

__all__ = ["Flow", "load"]

_HOMES = {"Flow": "flowtrain.flow", "load": "flowtrain.runs.load"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: a command says that it is loading before it imports torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
