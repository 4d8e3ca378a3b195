"""How far a run has come, in plain values."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """What a run counts and remembers from step to step, and last.pt with it.

    Attributes:
        step: updates so far, those that were skipped included.
        seconds: spent on them, over all the times that the run was resumed.
        stale: validations in a row without a new best, as early stopping counts them.
        best: NLL in nats and step of the best validation whose checkpoint is on the disk; None before the first.
        val_nll: of the last validation, in nats; NaN before the first.
        began: whether the likelihood's steps have.
    """

    step: int = 0
    seconds: float = 0.0
    stale: int = 0
    best: dict[str, float] | None = None
    val_nll: float = math.nan
    began: bool = False

    def state(self) -> dict[str, Any]:
        """All of it, by name."""
        return asdict(self)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint says, in place: others hold on to this object."""
        for name in (f.name for f in fields(self)):
            # a run of an older flowtrain has only ever solved
            setattr(self, name, saved.get(name, True) if name == "began" else saved[name])
