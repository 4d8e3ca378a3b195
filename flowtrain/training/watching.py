"""What a user sees of a run while it trains: the progress bar, and warnings of a field that gets hard to solve."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from flowtrain.status import Status, status

log = logging.getLogger("flowtrain")

NFE_WARNING = 1000
# an NFE so many times the median of the steps before is a spike, and how many those are, at most and at least
SPIKE, MEDIAN_OF, LEAST = 3, 100, 10


class NfeWatch:
    """Warns of spikes of the NFE, once each however long it lasts, and once of a large one."""

    def __init__(self) -> None:
        self.before: deque[int] = deque(maxlen=MEDIAN_OF)
        self.warned, self.spiking = False, False

    def see(self, step: int, row: Mapping[str, Any]) -> None:
        """Told of the row of every step that was taken."""
        nfe = (row.get("nfe_forward") or 0) + (row.get("nfe_backward") or 0)
        if not nfe:
            return
        usual = statistics.median(self.before) if len(self.before) >= LEAST else math.inf
        self.before.append(nfe)
        before, self.spiking = self.spiking, nfe > SPIKE * usual
        if self.spiking and not before:
            log.warning("step %d: NFE %d, where %g was usual before", step, nfe, usual)
        if nfe > NFE_WARNING and not self.warned:
            self.warned = True
            log.warning(
                "step %d: NFE %d passed %d, the field is getting hard to solve. Try a looser solver.rtol, a smaller "
                "trainer.lr or more trainer.weight_decay.",
                step,
                nfe,
                NFE_WARNING,
            )


def progress_bar(steps: int, done: int) -> AbstractContextManager[Status]:
    """The progress bar of training, from step `done` to `steps`."""
    return status("training", total=steps, unit="step", done=done, bar=True)


def show(bar: Status, row: Mapping[str, Any], val_nll: float, bits_per_nat: float | None) -> None:
    """Shows the loss of a row, the last validation NLL and the NFE beside the bar.

    Likelihoods are in nats per sample, or in bits per dimension if `bits_per_nat` is given, as in the table of results.
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
