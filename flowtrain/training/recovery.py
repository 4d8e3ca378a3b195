"""Applies the failure policy to steps and validations that fail: stop, skip, or rewind to the last checkpoint."""

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
    """The outcome of a step or validation that failed: skipped, or the run was rewound."""

    SKIPPED = auto()
    REWOUND = auto()


class Recovery:
    """Runs steps and validations and applies the failure policy. All ranks see the same failures and act alike."""

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
        """Runs `action`. Returns its result, or the outcome of the failure policy if it fails.

        Args:
            what: the name of the action in messages.

        Raises:
            FlowtrainError: the action failed and the policy is to stop.
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
                f"trainer.compile=true: torch could not compile the loss; set it to false ({first} ...)"
            ) from e

    def failed(self, error: FlowtrainError, what: str) -> Failed:
        """Applies the policy to an error: skips, rewinds, or raises the error with a hint for the user."""
        policy = self.failure_policy.policy_for(error)
        if policy == "skip":
            self.failure_policy.skipped += 1
            log.warning("%s is skipped: %s", what, error)
            return Failed.SKIPPED
        if policy == "rewind":
            self.rewind(f"{what}: {error}".rstrip("."))
            return Failed.REWOUND
        run_dir = self.checkpoints.run_dir
        # last.pt is not updated: the step failed because of its weights, and would fail again when resumed from them
        lr = self.settings.lr * self.failure_policy.lr_scale
        if not isinstance(error, STEP_ERRORS):
            hint = "" if run_dir is None else f"Resume with: {resume_command(run_dir)}"
        elif run_dir is None:
            hint = f"Fit again with a smaller learning rate, trainer.lr={lr / 2:g}."
        else:
            hint = (
                "Resume from the last checkpoint with a smaller learning rate: "
                f"{resume_command(run_dir)} trainer.lr={lr / 2:g}"
            )
        message = f"{what}: {error}"
        raise type(error)(f"{message.rstrip('.')}. {hint}" if hint else message) from error

    def rewind(self, why: str) -> None:
        """Rewinds the run to the last checkpoint and halves the learning rate from there on."""
        rewinds, halvings = self.failure_policy.rewinds + 1, self.failure_policy.halvings + 1
        self.checkpoints.rewind()
        self.failure_policy.rewinds, self.failure_policy.halvings, self.failure_policy.skipped = rewinds, halvings, 0
        step = self.checkpoints.saved_step
        self.metrics.back_to(step)
        # the checkpoint is saved now, so that a run that is killed before its next checkpoint does not resume with the
        # old rate
        self.checkpoints.write_last()
        log.warning(
            "%s. Rewound to step %d; the learning rate is now %g times trainer.lr (rewind %d of at most %d).",
            why,
            step,
            self.failure_policy.lr_scale,
            rewinds,
            self.failure_policy.max_rewinds,
        )
