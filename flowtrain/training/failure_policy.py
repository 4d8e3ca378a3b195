"""Policy for steps whose loss, gradient or solve fails."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from flowtrain.utils import ranks
from flowtrain.utils.errors import FlowtrainError, NonFiniteError, SolverError
from flowtrain.utils.files import replacing

log = logging.getLogger("flowtrain")

POLICIES = ("stop", "skip", "rewind")
# errors to which the policy applies. All other errors stop the run
STEP_ERRORS = (NonFiniteError, SolverError)
# a run stops after this many skipped steps in a row, because later batches are unlikely to help
SKIPS = 10
# the largest number of failed batches that are kept
DUMPS = 5


def dump(run_dir: Path | None, step: int, x: Tensor, context: Tensor | None) -> Path | None:
    """Writes the batch of a failed step, x (B, *event_shape) and its context or None, to an .npz file.

    Returns:
        the path; None if the file could not be written, DUMPS batches are kept already, or there is no run directory.
    """
    if run_dir is None:
        return None
    of_rank = f"_rank{ranks.rank()}" if ranks.size() > 1 else ""
    path = run_dir / f"failed/step_{step:06d}{of_rank}.npz"
    if len(list(path.parent.glob("step_*.npz"))) >= DUMPS and not path.exists():
        return None
    arrays: dict[str, Any] = {"x": x.cpu().numpy()}
    if context is not None:
        arrays["label" if context.dim() == 1 else "context"] = context.cpu().numpy()
    try:
        with replacing(path) as f:
            np.savez(f, **arrays)
    except OSError as e:
        log.warning("the batch of step %d could not be written: %s", step, e)
        return None
    return path


def bad_update(flow: nn.Module, loss: float, x: Tensor) -> NonFiniteError | None:
    """Returns an error that says whether the loss or the gradients are not finite, and the likely cause.

    None if both are finite.
    """
    finite = math.isfinite(loss)
    bad = [n for n, p in flow.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if finite and not bad:
        # the norm of finite gradients can overflow
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        bad = [] if nn.utils.get_total_norm(gradients).isfinite() else ["the weights"]
        if not bad:
            return None
    what = f"the gradient of {_listed(bad)} is not finite" if finite else f"the loss is {loss}"
    return NonFiniteError(f"{what}; the weights were not touched. {_cause(flow, finite, x)}")


def _cause(flow: nn.Module, loss_is_finite: bool, x: Tensor) -> str:
    """Returns the likely cause and what to do about it."""
    wrong = [name for name, p in flow.named_parameters() if not p.isfinite().all()]
    if wrong:
        return f"The weights {_listed(wrong)} are not finite after an earlier update: go back to an earlier checkpoint."
    rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if rows:
        return (
            f"The batch itself contains NaN or infinite values, first in row {rows[0]}: remove such rows from the data."
        )
    if loss_is_finite:
        return "The loss is finite, so the backward pass has overflowed. Try a smaller trainer.lr or trainer.clip_norm."
    largest = float(x.abs().max()) if x.is_floating_point() else 0.0
    if largest > 1e6:
        return (
            f"The batch has values up to {largest:.1e}: scale the data (data.standardize), or try a smaller trainer.lr."
        )
    return "Try a smaller trainer.lr or trainer.clip_norm."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class FailurePolicy:
    """The failure policy of a run, `trainer.on_nonfinite`, with its counters.

    Attributes:
        skipped: the number of consecutive steps that were skipped.
        rewinds: the number of rewinds so far.
        halvings: the number of halvings of the learning rate, one for each rewind since trainer.lr was last changed.
    """

    def __init__(self, policy: str, max_rewinds: int) -> None:
        self.policy, self.max_rewinds = policy, max_rewinds
        self.skipped, self.rewinds, self.halvings = 0, 0, 0

    @property
    def lr_scale(self) -> float:
        """The factor of the learning rate after the rewinds."""
        return 0.5**self.halvings

    def policy_for(self, error: FlowtrainError) -> str:
        """Returns the policy for an error: "stop" if it is not a step error, or if the policy has reached its limit."""
        lasts = {"stop": True, "skip": self.skipped < SKIPS, "rewind": self.rewinds < self.max_rewinds}
        return self.policy if isinstance(error, STEP_ERRORS) and lasts[self.policy] else "stop"

    def state(self) -> dict[str, Any]:
        """Returns the counters by name."""
        return {"skipped": self.skipped, "rewinds": self.rewinds, "halvings": self.halvings}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`. States of older versions lack `halvings`, which equals `rewinds`."""
        self.skipped, self.rewinds = state["skipped"], state["rewinds"]
        self.halvings = state.get("halvings", self.rewinds)
