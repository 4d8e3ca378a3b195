"""Checks the training state in last.pt before it is used.

The checksum detects damage, but anybody can write a file with a valid checksum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.flow import Flow
from flowtrain.training.ema import averages
from flowtrain.utils.errors import CheckpointError

Check = Callable[[Any], bool]
# upper limit of the counts of rewinds, skipped steps and tightenings
MAX_COUNT = 1000


def is_count(value: Any) -> bool:
    """Returns whether a value is an int that is not negative and fits into 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def _is_small_count(value: Any) -> bool:
    return is_count(value) and value <= MAX_COUNT


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _positive(value: Any) -> bool:
    return _number(value) and math.isfinite(value) and value > 0


def _fields(**checks: Check) -> Check:
    """Returns a check for a dictionary that has these keys with values that pass the checks."""
    return lambda value: isinstance(value, dict) and all(k in value and ok(value[k]) for k, ok in checks.items())


def _none_or(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _steps(value: Any) -> bool:
    """Returns whether a value is a step plan: a list of pairs (length, ideal length), see `StepPlan`."""
    pairs = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
    # extreme ratios of the lengths would make a plan with more steps than fit into memory
    return pairs and all(_positive(n) for p in value for n in p) and sum(a / b for a, b in value) < 1e6


# checks of the keys that must be present (REQUIRED), and of keys that older versions do not write (OPTIONAL)
REQUIRED: dict[str, Check] = {
    "seconds": lambda v: _number(v) and math.isfinite(v) and v >= 0,
    "stale": is_count,
    "best": _none_or(_fields(nll=lambda v: _number(v) and math.isfinite(v), step=is_count)),
    "val_nll": _number,
    "lr": _fields(scale=lambda v: _number(v) and 0 < v <= 1, stale=is_count),
}
OPTIONAL: dict[str, Check] = {
    "began": lambda v: isinstance(v, bool),
    "guard": _none_or(_fields(tightenings=_is_small_count, warned=_none_or(lambda v: isinstance(v, dict)))),
    "trouble": lambda v: (
        _fields(skipped=_is_small_count, rewinds=_is_small_count)(v) and _is_small_count(v.get("halvings", 0))
    ),
    "position": lambda v: _number(v) and math.isfinite(v) and v >= 0,
    "counted": _none_or(_number),
    "worse": lambda v: isinstance(v, list) and all(map(_number, v)),
    "best_rows": _none_or(lambda v: isinstance(v, Tensor) and v.dim() == 1 and v.is_floating_point()),
    "histories": lambda v: isinstance(v, list) and all(map(_steps, v)),
}


def check_progress(saved: Mapping[str, Any], flow: Flow) -> None:
    """Checks the training state of a checkpoint, except for the optimizer's moments.

    Raises:
        CheckpointError: a part is missing or has values that no run writes.
    """
    wrong = [key for key, good in REQUIRED.items() if key not in saved or not good(saved[key])]
    wrong += [key for key, good in OPTIONAL.items() if key in saved and not good(saved[key])]
    if not _is_ema(saved.get("ema"), flow):
        wrong.append("ema")
    if wrong:
        raise CheckpointError(f"the checkpoint is damaged: invalid values of {', '.join(wrong)}")


def _is_ema(ema: Any, flow: Flow) -> bool:
    if ema is None:
        return True
    shapes = {name: value.shape for name, value in flow.state_dict().items()}
    return (
        isinstance(ema, dict)
        and is_count(ema.get("updates"))
        and all(isinstance(v, Tensor) and v.shape == shapes.get(k) for k, v in averages(ema).items())
    )


def moments(
    saved: Any, parameters: Sequence[nn.Parameter], names_of: Callable[[Tensor], Sequence[str]]
) -> dict[int, dict[str, Tensor]]:
    """Returns the checked state of the optimizer by the index of the parameter: `step` and the averages of gradients.

    The averages must have the shape of the parameter. The optimizer does not check this, and its fused kernel would
    write past the end of a tensor that is too short.

    Args:
        names_of: returns the names of the averages of a parameter, see `Adam.moments_of`.

    Raises:
        CheckpointError: the state does not fit the parameters.
    """
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError("the checkpoint is damaged: it has no valid optimizer state")
    found = {}
    for i, entry in state.items():
        known = type(i) is int and 0 <= i < len(parameters) and isinstance(entry, dict)
        names = names_of(parameters[i]) if known else ()
        if not known or not all(_fits(entry.get(name), parameters[i]) for name in names):
            raise CheckpointError(
                f"the checkpoint's optimizer state does not fit parameter {i}: the checkpoint is damaged, or the run "
                "had another trainer.optimizer: resume with the same one, or start a new run with from=RUN"
            )
        step = entry.get("step")
        if not isinstance(step, Tensor) or step.shape != () or not bool(torch.isfinite(step)):
            raise CheckpointError(f"the checkpoint is damaged: the optimizer state of parameter {i} has no valid step")
        found[i] = {name: entry[name] for name in ("step", *names)}
    return found


def _fits(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
