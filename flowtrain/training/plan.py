"""Which steps of a run are validated and drawn: pure functions of the step, so that a resumed run does the same."""

import math
from dataclasses import dataclass

from flowtrain.training.settings import Settings

# of an early validation's step, the share by which the next one comes later
EARLY = 1 / 4
# the step of the first picture, where plot_every is larger
FIRST_PICTURE = 50


@dataclass(frozen=True)
class Plan:
    """The steps of a run at which something besides an update is done.

    Args:
        early: steps of early validations, see `early_validations`.
    """

    settings: Settings
    early: frozenset[int] = frozenset()

    def validates(self, step: int) -> bool:
        """Whether a regular validation is due after so many updates: every `val_every` steps, and after the last."""
        return step > 0 and (step % self.settings.val_every == 0 or step == self.settings.steps)

    def validates_early(self, step: int) -> bool:
        """Whether only an early validation is due after so many updates."""
        return step in self.early and not self.validates(step)

    def draws(self, step: int) -> bool:
        """Whether a picture is due: every `plot_every` steps, and once at FIRST_PICTURE."""
        every = self.settings.plot_every
        return every is not None and (step % every == 0 or step == FIRST_PICTURE < every)


def early_validations(settings: Settings, rows: int | None, matching: bool = False) -> frozenset[int]:
    """The steps of the validations that come before and between the regular ones, where `val_early` asks for them.

    The first is step 0: the flow as it was initialized. The next ones follow after one epoch, or after a quarter of the
    steps so far, whichever is more, until the regular validations are as frequent. A small table, whose epoch is one
    step, is validated at steps 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22 and so on; a table whose epoch has more than
    `val_every` steps at step 0 only.

    Args:
        rows: of the training set; None where every batch is new.
        matching: whether the run begins with another objective than the likelihood. Its steps are far cheaper than a
            validation, so that only step 0 is validated early.

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
