"""The learning rate over a run."""

import math
from typing import Any

from flowtrain.training.settings import Settings

# after so many, a learning rate that is halved on a plateau has settled
HALVINGS = 4


class LearningRate:
    """lr x warm-up x decay. Warm-up and cosine depend on step and position alone; plateau remembers the validations.

    Warm-up: (step + 1) / lr_warmup up to 1. Cosine: (1 + cos(pi position / steps)) / 2. The position is the step,
    or further under a time limit, see `Pace`. Plateau: halved after
    `lr_plateau_patience` validations in a row without a new best. All of them once for the steps before `again`, where
    that is not 0, and once for those from there on.
    """

    def __init__(self, settings: Settings, again: int = 0) -> None:
        self.settings, self.again = settings, again
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets the validations."""
        self.scale, self.stale = 1.0, 0

    def at(self, step: int, position: float | None = None) -> float:
        """The learning rate of a step, counted from 0. `position`: of the schedules; None for the step itself."""
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
        """How far a plateau's halvings have come, from 0 to 1."""
        return min(1.0, -math.log2(self.scale) / HALVINGS)

    def validated(self, improved: bool) -> None:
        """Told of every validation, and whether it was the best so far."""
        if self.settings.lr_decay != "plateau":
            return
        self.stale = 0 if improved else self.stale + 1
        if self.stale >= self.settings.lr_plateau_patience:
            self.scale, self.stale = self.scale / 2, 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: what a plateau remembers."""
        return {"scale": self.scale, "stale": self.stale}

    def load(self, state: dict[str, Any]) -> None:
        """Takes such a state."""
        self.scale, self.stale = state["scale"], state["stale"]
