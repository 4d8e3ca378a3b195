"""A time budget for a whole command: what training may take of it, and what the evaluation after it will need."""

import copy
import logging
import math
import time

import torch

from flowtrain.data.base import Dataset
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.scores import held_out, log_probs
from flowtrain.training.trouble import STEP_ERRORS

log = logging.getLogger("flowtrain")

# seconds that an evaluation and its pictures take besides the passes of rows through the flow
OVERHEAD, PICTURES = 1.5, 2.0
# of the time that is left once all is built, the shares of initialization, of a validation and of the end
FIRST, VALIDATION, END = 0.03, 0.05, 0.6
# rows that the error budget and the checks of an evaluation take in all (9,000 to 10,000 as measured on moons, a table
# of 36 columns and MNIST), and those of an evaluation that is not thorough
CHECKED, BRIEF = 10_000, 500
# rows that a picture takes of two columns, of more, and of images; and those that `pictures.draw_more` takes besides
DRAWN, MORE = {"plane": 16_000, "vectors": 2_000, "images": 100}, {"plane": 45_000, "vectors": 0, "images": 400}
# rows that a probe scores first, then each time so many times as many, up to a share of the time that is left
FEWEST, MORE_ROWS, SHARE = 8, 4, 0.005
# by which rows are taken to be slower than measured
SAFETY = 1.2
# the least that a set is cut to
LEAST = 200
# of the time for training, into how many parts probes divide it: solves become longer as a flow is trained
PARTS = 4


class Deadline:
    """When a command is to be done.

    Args:
        seconds: of the whole command.
        begun: when it began, by time.perf_counter.

    Attributes:
        row_seconds: what one row takes to be scored, as last measured.
    """

    def __init__(self, seconds: float, begun: float, flow: Flow, data: Dataset) -> None:
        self.seconds, self.begun, self.flow, self.data = seconds, begun, flow, data
        shape = flow.event_shape
        self.kind = "images" if len(shape) == 3 else "plane" if shape[0] <= 2 else "vectors"
        self.row_seconds = 0.0
        self.most_val: int | None = None
        self.probed = 0
        # seconds that the evaluation may take
        self.room = END * self.left

    @property
    def left(self) -> float:
        """Seconds."""
        return self.begun + self.seconds - time.perf_counter()

    @property
    def slowness(self) -> float:
        """How much longer than on idle cores things take: wall time over CPU time, at least 1."""
        return max(1.0, (self.seconds - self.left) / max(time.process_time(), 1e-3))

    def probe(self) -> None:
        """Measures `row_seconds` on validation rows, with the weights as they are.

        On ever more of them, as long as that is quick: the cost of a pass is spread over as many rows as it has.
        """
        x, label = held_out(self.flow, self.data, "val")
        training = self.flow.training
        self.flow.eval()
        rows, enough = FEWEST, min(len(x), rows_at_a_time(self.flow.event_shape))
        try:
            # what comes first pays for allocations and caches
            log_probs(self.flow, x[:2], None if label is None else label[:2])
            while True:
                rows = min(rows, enough)
                begun = time.perf_counter()
                log_probs(self.flow, x[:rows], None if label is None else label[:rows])
                took = time.perf_counter() - begun
                measured = took / rows
                if rows == enough or took > SHARE * self.left:
                    break
                rows *= MORE_ROWS
            self.measured(measured)
        except STEP_ERRORS as e:
            # the next validation says what is wrong
            log.debug("a probe of the time that rows take failed: %s", e)
        finally:
            self.flow.train(training)
            self.probed += 1

    def probe_again(self, elapsed: float, limit: float) -> None:
        """Probes once in each of the PARTS of the time for training."""
        if elapsed < limit and PARTS * elapsed >= self.probed * limit:
            self.probe()

    def scored(self, rows: int, seconds: float) -> None:
        """Told of a validation."""
        if rows:
            self.row_seconds = seconds / rows

    def measured(self, row_seconds: float) -> None:
        """Takes in a measurement: half of a sudden change may be that of a busy machine."""
        self.row_seconds = math.sqrt(self.row_seconds * row_seconds) if self.row_seconds else row_seconds

    def first_rows(self, most: int) -> int:
        """How many of `most` rows a model is initialized with."""
        self.probe()
        return most if not self.row_seconds else min(most, max(1, int(FIRST * self.left / self.row_seconds)))

    @property
    def end(self) -> float:
        """Seconds that the end of the run will take: a last validation, the evaluation and the pictures."""
        n_val = len(self.data.val) if self.most_val is None else min(self.most_val, len(self.data.val))
        tested, thorough = self.evaluated(self.room)
        rows = n_val + tested + (CHECKED if thorough else BRIEF) + DRAWN[self.kind]
        return self.slowness * (OVERHEAD + PICTURES) + self.row_seconds * rows

    @property
    def for_training(self) -> float:
        """Seconds that are left for training."""
        return self.left - self.end

    def evaluated(self, seconds: float) -> tuple[int, bool]:
        """How many test rows an evaluation in that time scores, all where it can, and whether it is thorough."""
        n = len(self.data.test)
        if not self.row_seconds:
            return n, True
        room = (seconds - self.slowness * OVERHEAD) / (SAFETY * self.row_seconds)
        if room >= n + CHECKED:
            return n, True
        return min(n, max(LEAST, int(room) - BRIEF)), False

    def val_rows(self, size: int | None) -> int | None:
        """How many rows of the validation set a validation takes: `size`, or fewer where those would take too long."""
        n = min(len(self.data.val), size or len(self.data.val))
        if not self.row_seconds or self.row_seconds * n <= VALIDATION * self.left:
            return size
        self.most_val = min(n, max(LEAST, int(VALIDATION * self.left / self.row_seconds)))
        log.info(
            "time_budget=%g: validations take %d of %d rows, so that each of them takes at most %d%% of the time",
            self.seconds,
            self.most_val,
            n,
            round(100 * VALIDATION),
        )
        return self.most_val

    def tested(self) -> tuple[Dataset, bool]:
        """The data with as many test rows as there is time for, and whether the evaluation is thorough.

        Fewer rows than there are give a warning.
        """
        n = len(self.data.test)
        rows, thorough = self.evaluated(self.left - self.slowness * PICTURES)
        if not thorough:
            log.info(
                "time_budget=%g leaves no time for the checks of the density; floweval makes them, with the run's "
                "directory",
                self.seconds,
            )
        if rows == n:
            return self.data, thorough
        log.warning(
            "time_budget=%g leaves time to score %d of the %d test rows: the result is that of these, evenly spread. "
            "floweval with the run's directory scores all of them.",
            self.seconds,
            rows,
            n,
        )
        chosen = torch.linspace(0, n - 1, rows).round().long()
        fewer = copy.copy(self.data)
        fewer.test = self.data.test[chosen]
        fewer.test_labels = None if self.data.test_labels is None else self.data.test_labels[chosen]
        return fewer, thorough

    def has_time_for(self, what: str, more: bool = False) -> bool:
        """Whether a picture can be drawn within the budget; says where not."""
        takes = self.slowness * PICTURES / 2 + self.row_seconds * (MORE if more else DRAWN)[self.kind]
        if takes <= max(0.0, self.left):
            return True
        log.info("time_budget=%g: no time is left for pictures of %s; floweval draws them", self.seconds, what)
        return False
