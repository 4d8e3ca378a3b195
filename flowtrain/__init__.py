"""flowtrain: fit, evaluate and sample densities with normalizing flows.

Example:
    >>> import flowtrain
    >>> flow = flowtrain.models.realnvp(2)
    >>> flow.log_prob(flow.sample(5)).shape
    torch.Size([5])
    >>> flow = flowtrain.load("outputs/2026-01-01/12-00-00")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# this module records the time at which the process started
import flowtrain.utils.status  # noqa: F401

if TYPE_CHECKING:
    from flowtrain import bases, bijections, data, models, nn, objectives, ode
    from flowtrain.evaluation.evaluate import evaluate
    from flowtrain.evaluation.result import Evaluation
    from flowtrain.evaluation.target_result import TargetEvaluation
    from flowtrain.evaluation.targets import evaluate_target
    from flowtrain.flow import Flow, Record
    from flowtrain.models.ensemble import Ensemble
    from flowtrain.runs.fit import fit, fit_target, train
    from flowtrain.runs.load import load

__all__ = [
    "Ensemble",
    "Evaluation",
    "Flow",
    "Record",
    "TargetEvaluation",
    "bases",
    "bijections",
    "data",
    "evaluate",
    "evaluate_target",
    "fit",
    "fit_target",
    "load",
    "models",
    "nn",
    "objectives",
    "ode",
    "train",
]

# the module of each public name. The other names in __all__ are modules
_HOMES = {
    "Ensemble": "flowtrain.models.ensemble",
    "Evaluation": "flowtrain.evaluation.result",
    "Flow": "flowtrain.flow",
    "Record": "flowtrain.flow",
    "TargetEvaluation": "flowtrain.evaluation.target_result",
    "evaluate": "flowtrain.evaluation.evaluate",
    "evaluate_target": "flowtrain.evaluation.targets",
    "fit": "flowtrain.runs.fit",
    "fit_target": "flowtrain.runs.fit",
    "load": "flowtrain.runs.load",
    "train": "flowtrain.runs.fit",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that a command can show a message before it imports torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"flowtrain.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
