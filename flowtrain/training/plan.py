"""Which steps are followed by a validation or a picture. Depends on the step alone, so a resumed run does the same."""

import math
from dataclasses import dataclass

from flowtrain.training.settings import Settings

# an early validation at a step is followed by the next one after this share of the step
EARLY = 1 / 4
# the step of the first picture, if plot_every is larger
FIRST_PICTURE = 50


@dataclass(frozen=True)
class Plan:
    """The steps of a run that are followed by a validation or a picture.

    Args:
        early: steps of early validations, see `early_validations`.
    """

    settings: Settings
    early: frozenset[int] = frozenset()

    def validates(self, step: int) -> bool:
        """Whether a regular validation is due after `step` updates: every `val_every` steps, and after the last."""
        return step > 0 and (step % self.settings.val_every == 0 or step == self.settings.steps)

    def validates_early(self, step: int) -> bool:
        """Whether an early validation, and no regular one, is due after `step` updates."""
        return step in self.early and not self.validates(step)

    def draws(self, step: int) -> bool:
        """Whether a picture is due: every `plot_every` steps, and once at FIRST_PICTURE."""
        every = self.settings.plot_every
        return every is not None and (step % every == 0 or step == FIRST_PICTURE < every)


def early_validations(settings: Settings, rows: int | None, matching: bool = False) -> frozenset[int]:
    """The steps of validations before and between the regular ones; none unless `val_early` is set.

    The first is step 0: the flow as it was initialized. The gap to the next one is one epoch or a quarter of the steps
    so far, whichever is more. They end when this gap reaches `val_every`. If an epoch is one step, the steps
    are 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22 and so on. If an epoch has at least `val_every` steps, only step 0
    is validated early.

    Args:
        rows: the number of training rows. None: endless data, treated as one batch per epoch.
        matching: whether the run begins with another objective than the likelihood. Then only step 0 is validated
            early, because steps of that objective are far cheaper than a validation.

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
    while not matching and (gap := max(epoch, int(EARLY * step))) < settings.val_every:
        step += gap
        steps.append(step)
    return frozenset(steps)
