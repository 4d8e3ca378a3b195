"""The learning rate over a run."""

import math
from typing import Any

from flowtrain.training.settings import Settings


class LearningRate:
    """lr x warm-up x decay. Warm-up and cosine depend on the step alone; plateau remembers the validations.

    Warm-up: (step + 1) / lr_warmup up to 1. Cosine: (1 + cos(pi step / steps)) / 2. Plateau: halved after
    `lr_plateau_patience` validations in a row without a new best.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scale = 1.0
        self.stale = 0

    def at(self, step: int) -> float:
        s = self.settings
        warm = min(1.0, (step + 1) / s.lr_warmup) if s.lr_warmup else 1.0
        decay = (1 + math.cos(math.pi * min(1.0, step / s.steps))) / 2 if s.lr_decay == "cosine" else self.scale
        return s.lr * warm * decay

    def validated(self, improved: bool) -> None:
        if self.settings.lr_decay != "plateau":
            return
        self.stale = 0 if improved else self.stale + 1
        if self.stale >= self.settings.lr_plateau_patience:
            self.scale, self.stale = self.scale / 2, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "stale": self.stale}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.stale = state["scale"], state["stale"]
