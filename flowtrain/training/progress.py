"""How far a run has come, in plain values."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """What a run counts and remembers from step to step, and last.pt with it.

    Attributes:
        step: updates so far, those that were skipped included.
        seconds: spent on them, over all the times that the run was resumed.
        stale: consecutive regular validations without a new best among the regular ones, for early stopping.
        best: NLL in nats and step of the best validation whose checkpoint is on the disk; None before the first.
        val_nll: of the last validation, in nats; NaN before the first.
        began: whether the likelihood's steps have.
        counted: the best NLL of the regular validations; None before the first. `stale` counts by it, because early
            validations must not change when a run ends.
        best_rows: log p of some validation rows at the best validation, see `rise.some_rows`; None if `max_rise` is not
            set.
        position: the position of the schedules, in steps, see `Pace`.
        worse: NLL of the latest consecutive regular validations that were clearly worse than the best.
    """

    step: int = 0
    seconds: float = 0.0
    stale: int = 0
    best: dict[str, float] | None = None
    val_nll: float = math.nan
    began: bool = False
    counted: float | None = None
    best_rows: Tensor | None = None
    position: float = 0.0
    worse: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """All of it, by name."""
        return asdict(self)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint says, in place: others hold on to this object."""
        # in runs of an older flowtrain, all steps were of the likelihood and all validations were regular
        best = saved["best"]
        older: dict[str, Any] = {
            "began": True,
            "counted": None if best is None else best["nll"],
            "best_rows": None,
            "worse": [],
            "position": float(saved["step"]),
        }
        for name in (f.name for f in fields(self)):
            setattr(self, name, saved.get(name, older[name]) if name in older else saved[name])

    def forget_best(self) -> None:
        """Makes the next validation the best, because earlier ones were measured differently."""
        self.best = self.counted = self.best_rows = None
        self.worse = []
