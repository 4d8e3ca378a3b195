"""Steps and validations that fail: stopped at, passed over, or gone back from, as the run's policy says."""

import logging
from collections.abc import Callable
from enum import Enum, auto
from typing import TypeVar

from flowtrain.training.checkpoint_manager import CheckpointManager
from flowtrain.training.failure_policy import STEP_ERRORS, FailurePolicy
from flowtrain.training.metrics import Metrics
from flowtrain.training.settings import Settings
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError, FlowtrainError
from flowtrain.utils.formatting import resume_command

log = logging.getLogger("flowtrain")

T = TypeVar("T")


class Failed(Enum):
    """What became of a step or a validation that failed: it was passed over, or the run went back."""

    SKIPPED = auto()
    REWOUND = auto()


class Recovery:
    """Stands around what may fail; all ranks see the same failures, and do the same about them."""

    def __init__(
        self, failure_policy: FailurePolicy, checkpoints: CheckpointManager, metrics: Metrics, settings: Settings
    ) -> None:
        self.failure_policy, self.checkpoints, self.metrics, self.settings = (
            failure_policy,
            checkpoints,
            metrics,
            settings,
        )

    def guarded(self, action: Callable[[], T], what: str) -> T | Failed:
        """What an action gives; where it failed, what the policy has made of that.

        Args:
            what: the action's name in messages.
        """
        try:
            return action()
        except ranks.RankLostError:
            raise
        except FlowtrainError as e:
            return self.failed(e, what)
        except RuntimeError as e:
            if not self.settings.compile or "torch._" not in f"{type(e).__module__}.":
                raise
            first = " ".join(str(e).split())[:300]
            raise ConfigError(
                f"trainer.compile=true: torch could not compile here: set it to false ({first} ...)"
            ) from e

    def failed(self, error: FlowtrainError, what: str) -> Failed:
        """Does what the policy says of what failed, on whatever rank."""
        policy = self.failure_policy.policy_for(error)
        if policy == "skip":
            self.failure_policy.skipped += 1
            log.warning("%s is skipped: %s", what, error)
            return Failed.SKIPPED
        if policy == "rewind":
            self.rewind(f"{what}: {error}")
            return Failed.REWOUND
        run_dir = self.checkpoints.run_dir
        # last.pt stays as it is: a step fails for its weights, and would fail again from those before it
        lr = self.settings.lr * self.failure_policy.lr_scale
        if not isinstance(error, STEP_ERRORS):
            cure = "" if run_dir is None else f" Resume with: {resume_command(run_dir)}"
        elif run_dir is None:
            cure = f" Fit again with a smaller learning rate, trainer.lr={lr / 2:g}."
        else:
            cure = (
                " Go on from the last checkpoint, with a smaller learning rate: "
                f"{resume_command(run_dir)} trainer.lr={lr / 2:g}"
            )
        raise type(error)(f"{what}: {error}{cure}") from error

    def rewind(self, why: str) -> None:
        """Back to the last checkpoint, with half of the learning rate from there on."""
        rewinds, halvings = self.failure_policy.rewinds + 1, self.failure_policy.halvings + 1
        self.checkpoints.back()
        self.failure_policy.rewinds, self.failure_policy.halvings, self.failure_policy.skipped = rewinds, halvings, 0
        step = self.checkpoints.saved_step
        self.metrics.back_to(step)
        # now, so that a run killed before its next checkpoint does not begin with the old rate again
        self.checkpoints.last()
        log.warning(
            "%s Back to step %d with a learning rate %g times the one that was set (%d of at most %d times).",
            why,
            step,
            self.failure_policy.lr_scale,
            rewinds,
            self.failure_policy.max_rewinds,
        )
