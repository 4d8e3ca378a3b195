"""Schedules of a run: the learning rate, the clock of the schedules, and the steps of validations and pictures."""

import math
from dataclasses import dataclass
from typing import Any

from flowtrain.training.progress import Progress
from flowtrain.training.settings import Settings

# with lr_decay=plateau, the learning rate counts as settled after this many halvings
HALVINGS = 4


class LearningRate:
    """The learning rate: lr x warm-up x decay.

    The warm-up is (step + 1) / lr_warmup, up to 1. The decay is one of:

    - cosine: (1 + cos(pi position / steps)) / 2. The position is the step. Under a time limit, the position is larger,
      see `ScheduleClock`.
    - plateau: halved after `lr_plateau_patience` consecutive validations without a new best.
    - constant: 1.

    Args:
        again: the step at which the likelihood replaces another objective. The schedule runs once over the steps before
            this step, and once over the other steps. 0 if there is no such step.
    """

    def __init__(self, settings: Settings, again: int = 0) -> None:
        self.settings, self.again = settings, again
        self.restart()

    def restart(self) -> None:
        """Resets the state of the plateau schedule."""
        self.scale, self.stale = 1.0, 0

    def at(self, step: int, position: float | None = None) -> float:
        """Returns the learning rate of a step, counted from 0.

        Args:
            position: the position of the schedules, see `ScheduleClock`; None: the step.
        """
        s = self.settings
        begin, end = (0, self.again) if step < self.again else (self.again, s.steps)
        since = step - begin
        warm = min(1.0, (since + 1) / s.lr_warmup) if s.lr_warmup else 1.0
        reached = since if position is None else position - begin
        part = min(1.0, reached / max(1, end - begin))
        decay = (1 + math.cos(math.pi * part)) / 2 if s.lr_decay == "cosine" else self.scale
        return s.lr * warm * decay

    @property
    def settled(self) -> float:
        """The progress of the plateau schedule from 0 (no halving) to 1 (HALVINGS halvings)."""
        return min(1.0, -math.log2(self.scale) / HALVINGS)

    def validated(self, improved: bool) -> None:
        """Updates the plateau schedule after a validation. `improved`: whether this validation is the best so far."""
        if self.settings.lr_decay != "plateau":
            return
        self.stale = 0 if improved else self.stale + 1
        if self.stale >= self.settings.lr_plateau_patience:
            self.scale, self.stale = self.scale / 2, 0

    def state(self) -> dict[str, Any]:
        """Returns the state of the plateau schedule."""
        return {"scale": self.scale, "stale": self.stale}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""
        self.scale, self.stale = state["scale"], state["stale"]


# in this first share of a phase's time, the position follows the steps alone, so that a slow start does not advance the
# schedules
GRACE = 0.1
# share of a time limit after which the likelihood replaces another objective
MATCHING = 0.5


class ScheduleClock:
    """The position of the schedules, in steps: the larger of the step and the training time converted to steps.

    The learning rate, the tolerance and the change to the likelihood follow the position. During the share GRACE of the
    time limit, the position is the step. Then the converted time rises linearly and reaches the last step at the time
    limit, so that the learning rate has decayed by then. Without a time limit, the position is the step. Batches and
    noise always depend on the step alone.

    A resumed run continues from its position and has the whole time limit again. If the time limit had ended the run,
    its position is reset to its step.

    Args:
        progress: the progress of the run, which stores the position.
        steps: the number of steps of the run.
        change: the step at which the likelihood replaces another objective; 0 if the run begins with the likelihood.
    """

    def __init__(self, progress: Progress, steps: int, change: int) -> None:
        self.progress, self.steps, self.change = progress, steps, change
        self.start = (0.0, 0.0)

    def at(self, step: float) -> float:
        """Returns the position of a step."""
        return max(step, self.progress.position)

    def begin(self) -> None:
        """Sets the position at which this command starts to train."""
        p = self.progress
        p.position = float(p.step) if p.position >= self.steps else max(p.position, float(p.step))
        self.start = (0.0, p.position)

    def reached(self, elapsed: float, limit: float | None) -> float:
        """Returns the position after `elapsed` seconds of training of this command with the time `limit`, or None."""
        p = self.progress
        if limit is None:
            return self.at(p.step)
        matching = p.step < self.change
        end, until = (self.change, MATCHING * limit) if matching else (self.steps, limit)
        since, begin = self.start
        length = until - since
        part = 1.0 if length <= 0 else ((elapsed - since) / length - GRACE) / (1 - GRACE)
        return max(self.at(p.step), begin + (end - begin) * min(1.0, max(0.0, part)))

    def advance(self, position: float, elapsed: float) -> bool:
        """Stores the position that all ranks agreed on. Returns whether the likelihood must begin earlier than planned.

        When the likelihood begins at its planned step, the rest of the time limit is measured from this step.
        """
        p = self.progress
        before, p.position = self.start[1], position
        if p.step < self.change:
            return position >= self.change
        if before < self.change:
            self.start = (elapsed, float(p.step))
            p.position = float(p.step)
        return False

    def change_now(self, elapsed: float) -> None:
        """Makes the likelihood replace the other objective at this step."""
        p = self.progress
        self.change, self.start, p.position = p.step, (elapsed, float(p.step)), float(p.step)


# the number of steps between an early validation and the next, divided by the step of the early validation
EARLY_SPACING = 1 / 4
# the step of the first picture, if plot_every is larger
FIRST_PICTURE = 50


@dataclass(frozen=True)
class ValidationSchedule:
    """Decides after which steps of a run a validation or a picture is due.

    Args:
        early: steps of early validations, see `early_validations`.
    """

    settings: Settings
    early: frozenset[int] = frozenset()

    def validates(self, step: int) -> bool:
        """Returns whether a regular validation is due after `step` updates: every `val_every` and at the last step."""
        return step > 0 and (step % self.settings.val_every == 0 or step == self.settings.steps)

    def validates_early(self, step: int) -> bool:
        """Returns whether an early validation, and not a regular one, is due after `step` updates."""
        return step in self.early and not self.validates(step)

    def draws(self, step: int) -> bool:
        """Returns whether a picture is due: every `plot_every` steps, and once at FIRST_PICTURE."""
        every = self.settings.plot_every
        return every is not None and (step % every == 0 or step == FIRST_PICTURE < every)


def early_validations(settings: Settings, rows: int | None, matching: bool = False) -> frozenset[int]:
    """Returns the steps of early validations, in addition to the regular validations; empty unless `val_early` is set.

    The first is step 0, which validates the initialized flow. The gap to the next step is one epoch or a quarter of the
    steps so far, whichever is more. Early validations end when this gap reaches `val_every`. If an epoch is one step,
    the steps are 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22 and so on. If an epoch has at least `val_every` steps,
    only step 0 is validated early.

    Args:
        rows: the number of training rows. None: endless data, treated as one batch per epoch.
        matching: whether the run begins with another objective than the likelihood. Then only step 0 is validated
            early, because a step of that objective is far cheaper than a validation.

    Example:
        >>> from types import SimpleNamespace
        >>> settings = SimpleNamespace(val_early=True, val_every=50, batch_size=100)
        >>> sorted(early_validations(settings, rows=1000))
        [0, 10, 20, 30, 40, 50, 62, 77, 96, 120, 150, 187, 233]
    """
    if not settings.val_early:
        return frozenset()
    steps, step = [0], 0
    epoch = max(1, math.ceil((rows or 0) / settings.batch_size))
    while not matching and (gap := max(epoch, int(EARLY_SPACING * step))) < settings.val_every:
        step += gap
        steps.append(step)
    return frozenset(steps)
