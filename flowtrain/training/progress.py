"""Progress of a run: counters, progress bar, and warnings about the NFE."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from flowtrain.utils.status import Status, status

log = logging.getLogger("flowtrain")


@dataclass
class Progress:
    """Counters and results that training updates after every step. They are saved in last.pt.

    Attributes:
        step: the number of updates so far, including skipped ones.
        seconds: training time in seconds, summed over all commands that resumed the run.
        stale: the number of consecutive regular validations without a new best NLL (see `counted`), for early stopping.
        best: NLL in nats and step of the best validation whose checkpoint has been written; None before the first.
        val_nll: the NLL of the last validation in nats; NaN before the first.
        began: whether steps that maximize the likelihood have begun.
        counted: the best NLL of the regular validations; None before the first. `stale` counts from this NLL and not
            from `best`, because early validations must not change when a run ends.
        best_rows: log p of some validation rows at the best validation, see `validation.some_rows`. None without
            `max_rise`.
        position: the position of the schedules, in steps, see `ScheduleClock`.
        worse: the NLLs of the latest consecutive regular validations that were clearly worse than the best.
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
        """Returns all attributes by name."""
        return asdict(self)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores the attributes from a checkpoint. Works in place, because other objects refer to this object."""
        # in older versions, all steps maximized the likelihood and all validations were regular
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
        """Makes the next validation the best. Used when earlier NLLs are no longer comparable."""
        self.best = self.counted = self.best_rows = None
        self.worse = []


# a larger NFE of a step causes a warning
NFE_WARNING = 1000
# a spike is an NFE above SPIKE times the median of the last MEDIAN_OF steps, once there are LEAST_WATCHED steps. An NFE
# up to LEAST_SPIKE is no spike: a solve has one step while the flow is simple, and five or ten are normal later
SPIKE, MEDIAN_OF, LEAST_WATCHED, LEAST_SPIKE = 3, 100, 10, 60


class NfeWatch:
    """Warns once for each spike of the NFE, and once if the NFE exceeds NFE_WARNING."""

    def __init__(self) -> None:
        self.before: deque[int] = deque(maxlen=MEDIAN_OF)
        self.warned, self.spiking = False, False

    def check(self, step: int, row: Mapping[str, Any]) -> None:
        """Checks the NFE in the row of a step. Call this method after every successful step."""
        nfe = (row.get("nfe_forward") or 0) + (row.get("nfe_backward") or 0)
        if not nfe:
            return
        usual = statistics.median(self.before) if len(self.before) >= LEAST_WATCHED else math.inf
        self.before.append(nfe)
        before, self.spiking = self.spiking, nfe > max(SPIKE * usual, LEAST_SPIKE)
        if self.spiking and not before:
            log.warning("step %d: the NFE rose to %d, from a median of %g over the steps before", step, nfe, usual)
        if nfe > NFE_WARNING and not self.warned:
            self.warned = True
            log.warning(
                "step %d: the NFE is %d, above %d, because the ODE is hard to solve. Try a larger solver.rtol, a "
                "smaller trainer.lr or a larger trainer.weight_decay.",
                step,
                nfe,
                NFE_WARNING,
            )


def progress_bar(steps: int, done: int, name: str | None = None) -> AbstractContextManager[Status]:
    """Returns the progress bar of training from step `done` to `steps`; with a name, a counter without a total."""
    if name is None:
        return status("training", total=steps, unit="step", done=done, bar=True)
    return status(f"training {name}", unit="step", done=done)


def show(bar: Status, row: Mapping[str, Any], val_nll: float, bits_per_nat: float | None) -> None:
    """Shows the loss of a row, the last validation NLL and the NFE next to the progress bar.

    NLLs are in nats per sample, or in bits per dimension if `bits_per_nat` is given.
    """
    unit, scale = ("nll", 1.0) if bits_per_nat is None else ("bits/dim", bits_per_nat)
    values: dict[str, Any] = {}
    if row.get("nll") is not None:
        values[unit] = f"{scale * row['nll']:.3f}"
    elif "matching" in row:
        values["matching"] = f"{row['matching']:.3f}"
    if not math.isnan(val_nll):
        values["val" if unit in values or unit == "nll" else f"val {unit}"] = f"{scale * val_nll:.3f}"
    if row["nfe_forward"] is not None:
        values["nfe"] = row["nfe_forward"] + row["nfe_backward"]
    bar.note(**values)
