"""What a user sees of a run while it trains: the progress bar, and warnings of a field that gets hard to solve."""

import logging
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flowtrain import distributed

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


@contextmanager
def progress_bar(steps: int, done: int) -> Iterator[Any]:
    """On the terminal of rank 0; inside, messages appear above it."""
    # of tqdm's own variable, what is said here takes precedence
    shown = sys.stderr.isatty() and distributed.is_first() and not os.environ.get("TQDM_DISABLE")
    with ExitStack() as stack:
        if shown:
            stack.enter_context(logging_redirect_tqdm([log]))
        yield stack.enter_context(tqdm(total=steps, initial=done, unit="step", disable=not shown, dynamic_ncols=True))


def show(bar: Any, row: Mapping[str, Any], val_nll: float) -> None:
    """Puts the loss and the NFE of a row behind the bar."""
    nfe = {} if row["nfe_forward"] is None else {"nfe": row["nfe_forward"] + row["nfe_backward"]}
    name = "nll" if row.get("nll") is not None else "matching" if "matching" in row else None
    loss = {} if name is None else {name: f"{row[name]:.3f}"}
    val = {} if math.isnan(val_nll) else {"val": f"{val_nll:.3f}"}
    bar.set_postfix(**loss, **val, **nfe, refresh=False)
