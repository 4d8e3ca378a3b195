"""What last.pt says of a run's progress, held against what it can be before any of it is used.

A checksum tells damage from what was written, but not who wrote it.
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
# no run is rewound or tightened so often
MANY = 1000


def is_count(value: Any) -> bool:
    """Whether a value is a count: an int that is not negative and fits into 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def _few(value: Any) -> bool:
    return is_count(value) and value <= MANY


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _positive(value: Any) -> bool:
    return _number(value) and math.isfinite(value) and value > 0


def _fields(**checks: Check) -> Check:
    """A dictionary that has these keys, with such values."""
    return lambda value: isinstance(value, dict) and all(k in value and ok(value[k]) for k, ok in checks.items())


def _none_or(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _steps(value: Any) -> bool:
    """The steps of a solve, each (length, suited length)."""
    pairs = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
    # lengths so far apart would have a plan of more steps than memory has room for
    return pairs and all(_positive(n) for p in value for n in p) and sum(a / b for a, b in value) < 1e6


# what must be there, and what may be, because an older flowtrain did not have it
PROGRESS: dict[str, Check] = {
    "seconds": lambda v: _number(v) and math.isfinite(v) and v >= 0,
    "stale": is_count,
    "best": _none_or(_fields(nll=lambda v: _number(v) and math.isfinite(v), step=is_count)),
    "val_nll": _number,
    "lr": _fields(scale=lambda v: _number(v) and 0 < v <= 1, stale=is_count),
}
LATER: dict[str, Check] = {
    "began": lambda v: isinstance(v, bool),
    "guard": _none_or(_fields(tightenings=_few, warned=_none_or(lambda v: isinstance(v, dict)))),
    "trouble": lambda v: _fields(skipped=_few, rewinds=_few)(v) and _few(v.get("halvings", 0)),
    "position": lambda v: _number(v) and math.isfinite(v) and v >= 0,
    "counted": _none_or(_number),
    "worse": lambda v: isinstance(v, list) and all(map(_number, v)),
    "best_rows": _none_or(lambda v: isinstance(v, Tensor) and v.dim() == 1 and v.is_floating_point()),
    "histories": lambda v: isinstance(v, list) and all(map(_steps, v)),
}


def check_progress(saved: Mapping[str, Any], flow: Flow) -> None:
    """Refuses a training state that no run can have saved.

    Raises:
        CheckpointError: naming the part.
    """
    wrong = [key for key, good in PROGRESS.items() if key not in saved or not good(saved[key])]
    wrong += [key for key, good in LATER.items() if key in saved and not good(saved[key])]
    if not _is_ema(saved.get("ema"), flow):
        wrong.append("ema")
    if wrong:
        raise CheckpointError(f"the checkpoint's {', '.join(wrong)} cannot be those of a run: it is damaged")


def _is_ema(ema: Any, flow: Flow) -> bool:
    if ema is None:
        return True
    shapes = {name: value.shape for name, value in flow.state_dict().items()}
    return (
        isinstance(ema, dict)
        and is_count(ema.get("updates"))
        and all(isinstance(v, Tensor) and v.shape == shapes.get(k) for k, v in averages(ema).items())
    )


def moments(saved: Any, parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """Adam's state, by the number of the parameter: `step`, and `exp_avg` and `exp_avg_sq` of the parameter's shape.

    Those of an AdamW are the same. An optimizer takes them as they come, and writes past the end of one that is short.

    Raises:
        CheckpointError: they are not those of the parameters.
    """
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError("the checkpoint's optimizer cannot be that of a run: it is damaged")
    for i, of_one in state.items():
        known = type(i) is int and 0 <= i < len(parameters) and isinstance(of_one, dict)
        if not known or not all(_fits(of_one.get(name), parameters[i]) for name in ("exp_avg", "exp_avg_sq")):
            raise CheckpointError(
                f"the checkpoint's optimizer does not fit its weights (parameter {i}): it is damaged, or of another "
                "trainer.optimizer"
            )
        step = of_one.get("step")
        if not isinstance(step, Tensor) or step.shape != () or not bool(torch.isfinite(step)):
            raise CheckpointError("the checkpoint's optimizer has taken no number of steps: it is damaged")
    return {i: {name: of_one[name] for name in ("step", "exp_avg", "exp_avg_sq")} for i, of_one in state.items()}


def _fits(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
