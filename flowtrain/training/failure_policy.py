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
# what a policy is for; any other error is a mistake, and stops the run
STEP_ERRORS = (NonFiniteError, SolverError)
# steps skipped in a row after which a run stops: its weights are past mending
SKIPS = 10
# batches that are kept
DUMPS = 5


def dump(run_dir: Path | None, step: int, x: Tensor, label: Tensor | None) -> Path | None:
    """Keeps the batch of a step that failed, x (B, *event_shape) and label (B,) or None, as .npz.

    Returns the file; None where it could not be written, there are enough of them, or there is no run directory.
    """
    if run_dir is None:
        return None
    of_rank = f"_rank{ranks.rank()}" if ranks.size() > 1 else ""
    path = run_dir / f"failed/step_{step:06d}{of_rank}.npz"
    if len(list(path.parent.glob("step_*.npz"))) >= DUMPS and not path.exists():
        return None
    arrays: dict[str, Any] = {"x": x.cpu().numpy(), **({} if label is None else {"label": label.cpu().numpy()})}
    try:
        with replacing(path) as f:
            np.savez(f, **arrays)
    except OSError as e:
        log.warning("the batch of step %d could not be kept: %s", step, e)
        return None
    return path


def bad_update(flow: nn.Module, loss: float, x: Tensor) -> NonFiniteError | None:
    """What is wrong with a loss and its gradients: which is not finite, and the likely cause; None for nothing."""
    finite = math.isfinite(loss)
    bad = [n for n, p in flow.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if finite and not bad:
        # the norm of finite gradients can leave the range all the same
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        bad = [] if nn.utils.get_total_norm(gradients).isfinite() else ["the weights"]
        if not bad:
            return None
    what = f"the gradient of {_listed(bad)} is not finite" if finite else f"the loss is {loss}"
    return NonFiniteError(f"{what}; the weights were not touched. {_cause(flow, finite, x)}")


def _cause(flow: nn.Module, loss_is_finite: bool, x: Tensor) -> str:
    """Where to look first."""
    wrong = [name for name, p in flow.named_parameters() if not p.isfinite().all()]
    if wrong:
        return f"The weights {_listed(wrong)} are not finite since an update before: go back to an earlier checkpoint."
    rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if rows:
        return f"The batch itself holds NaN or infinite values, first in row {rows[0]}: remove those rows of the data."
    if loss_is_finite:
        return (
            "The loss is finite, so this is an overflow on the way back. Try a smaller trainer.lr or trainer.clip_norm."
        )
    largest = float(x.abs().max()) if x.is_floating_point() else 0.0
    if largest > 1e6:
        return (
            f"The batch goes up to {largest:.1e}: scale the data down (data.standardize), or try a smaller trainer.lr."
        )
    return "Try a smaller trainer.lr or trainer.clip_norm."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class FailurePolicy:
    """The policy of a run, `trainer.on_nonfinite`, and what it has cost so far.

    Attributes:
        skipped: steps in a row.
        rewinds: so far.
        halvings: of the learning rate: one a rewind, since it was last chosen.
    """

    def __init__(self, policy: str, max_rewinds: int) -> None:
        self.policy, self.max_rewinds = policy, max_rewinds
        self.skipped, self.rewinds, self.halvings = 0, 0, 0

    @property
    def lr_scale(self) -> float:
        """What the rewinds leave of the learning rate, a factor."""
        return 0.5**self.halvings

    def policy_for(self, error: FlowtrainError) -> str:
        """What is done about an error: the policy, while it lasts and where it is for such an error, else to stop."""
        lasts = {"stop": True, "skip": self.skipped < SKIPS, "rewind": self.rewinds < self.max_rewinds}
        return self.policy if isinstance(error, STEP_ERRORS) and lasts[self.policy] else "stop"

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"skipped": self.skipped, "rewinds": self.rewinds, "halvings": self.halvings}

    def load(self, state: dict[str, Any]) -> None:
        """Takes such a state; an older one has a halving for each rewind."""
        self.skipped, self.rewinds = state["skipped"], state["rewinds"]
        self.halvings = state.get("halvings", self.rewinds)
