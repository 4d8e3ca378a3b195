"""The time budget of a whole command, divided between training and the evaluation after it."""

import copy
import logging
import math
import time

import torch

from flowtrain.data.base import Dataset
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation.baselines import LEAST_SECONDS, MOST_SECONDS, has_baselines
from flowtrain.evaluation.log_likelihood import held_out, log_probs
from flowtrain.evaluation.log_weights import weighted_samples
from flowtrain.evaluation.targets import EXACT, FEW_EXACT
from flowtrain.flow import Density, rows_at_a_time
from flowtrain.training.failure_policy import STEP_ERRORS

log = logging.getLogger("flowtrain")

# seconds that an evaluation, and its pictures, need in addition to the passes of rows through the flow
EVALUATION_SECONDS, PICTURES_SECONDS = 1.5, 2.0
# largest shares of the remaining time for the initialization, for one validation, and for the evaluation at the end
INITIALIZATION_SHARE, VALIDATION_SHARE, EVALUATION_SHARE = 0.03, 0.05, 0.6
# largest share of the whole budget for baselines other than the Gaussian
BASELINES_SHARE = 0.05
# rows that an evaluation passes through the flow for its error budget and its checks, in addition to the test rows
# (measured: 9,000 to 10,000 on moons, a table of 36 columns and MNIST)
ROWS_OF_CHECKS = 10_000
# the same without the checks
ROWS_WITHOUT_CHECKS = 500
# rows that the pictures of each kind of data pass through the flow
ROWS_OF_PICTURES = {"plane": 16_000, "vectors": 2_000, "images": 100}
# further rows for the pictures of `pictures.draw_other_figures`
ROWS_OF_MORE_PICTURES = {"plane": 45_000, "vectors": 0, "images": 400}
# rows of the first pass of a probe, and the factor by which each further pass has more rows
PROBE_ROWS, PROBE_GROWTH = 8, 4
# a probe ends after a pass that takes more than this share of the remaining time
PROBE_SHARE = 0.005
# safety factor on the measured time of a row
SAFETY = 1.2
# smallest number of rows to which a set is reduced
LEAST_ROWS = 200
# number of probes during training. A probe is repeated because solves become slower during training
PROBES = 4


class TimeBudget:
    """Estimates the remaining time of a command, and limits training and evaluation so that the command ends in time.

    Args:
        seconds: the time budget of the whole command.
        begun: the time.perf_counter at which the command began.
        evaluates: whether an evaluation and pictures follow the training.

    Attributes:
        row_seconds: seconds to score one row; for a target, to draw and weight one sample. A new measurement is
            averaged geometrically with the previous value.
        for_baselines: seconds reserved for a Gaussian mixture and a kernel density estimate. 0 if the data have no such
            baselines, or if the budget is less than 40 s.
    """

    def __init__(self, seconds: float, begun: float, flow: Density, data: Dataset, evaluates: bool = True) -> None:
        self.seconds, self.begun, self.flow, self.data, self.evaluates = seconds, begun, flow, data, evaluates
        shape = flow.event_shape
        self.kind = "images" if len(shape) == 3 else "plane" if shape[0] <= 2 else "vectors"
        self.row_seconds = 0.0
        self.most_val: int | None = None
        self.probed = 0
        # seconds of the command before training was prepared
        self.before = seconds - self.left
        reserved = min(MOST_SECONDS, BASELINES_SHARE * seconds) if evaluates and has_baselines(flow, data) else 0.0
        self.for_baselines = reserved if reserved >= LEAST_SECONDS else 0.0
        # seconds that the evaluation may take
        self.room = EVALUATION_SHARE * self.left

    @property
    def left(self) -> float:
        """Seconds left of the time budget."""
        return self.begun + self.seconds - time.perf_counter()

    @property
    def slowness(self) -> float:
        """Wall time divided by CPU time so far, at least 1. Other processes on the machine increase this ratio."""
        return max(1.0, (self.seconds - self.left) / max(time.process_time(), 1e-3))

    def probe(self) -> None:
        """Measures `row_seconds` on validation rows, with the current weights.

        Repeats the pass with more rows as long as the pass is quick, because a pass has a fixed cost.
        """
        training = self.flow.training
        self.flow.eval()
        rows, enough = PROBE_ROWS, min(len(self.data.val), rows_at_a_time(self.flow.event_shape))
        try:
            # warm-up: the first pass also allocates memory and fills caches
            self._score(2)
            while True:
                rows = min(rows, enough)
                begun = time.perf_counter()
                self._score(rows)
                took = time.perf_counter() - begun
                measured = took / rows
                if rows == enough or took > PROBE_SHARE * self.left:
                    break
                rows *= PROBE_GROWTH
            self.measured(measured)
        except STEP_ERRORS as e:
            # the next validation reports the error
            log.debug("the time to score a row could not be measured: %s", e)
        finally:
            self.flow.train(training)
            self.probed += 1

    def _score(self, rows: int) -> None:
        """Scores the first `rows` validation rows. For a target, it draws and weights `rows` samples of the flow."""
        if isinstance(self.data, TargetData):
            weighted_samples(self.flow, self.data.target, rows, self.data.seed_of("val"))
            return
        x, label = held_out(self.flow, self.data, "val")
        log_probs(self.flow, x[:rows], None if label is None else label[:rows])

    def probe_again(self, elapsed: float, limit: float) -> None:
        """Probes once in each of PROBES equal parts of the training time."""
        if elapsed < limit and PROBES * elapsed >= self.probed * limit:
            self.probe()

    def scored(self, rows: int, seconds: float) -> None:
        """Sets `row_seconds` from a validation of `rows` rows that took `seconds`."""
        if rows:
            self.row_seconds = seconds / rows

    def measured(self, row_seconds: float) -> None:
        """Updates `row_seconds` to its geometric mean with a new measurement, because one measurement is unreliable."""
        self.row_seconds = math.sqrt(self.row_seconds * row_seconds) if self.row_seconds else row_seconds

    def first_rows(self, most: int) -> int:
        """Returns the number of rows for data-dependent initialization, at most `most`."""
        self.probe()
        return (
            most
            if not self.row_seconds
            else min(most, max(1, int(INITIALIZATION_SHARE * self.left / self.row_seconds)))
        )

    @property
    def end(self) -> float:
        """Estimated seconds for the end of the run: a last validation, the evaluation and the pictures."""
        n_val = len(self.data.val) if self.most_val is None else min(self.most_val, len(self.data.val))
        if not self.evaluates:
            return self.slowness * self.row_seconds * n_val
        tested, thorough = self.affordable_rows(self.room)
        rows = n_val + tested + self.rows_of_checks(thorough) + ROWS_OF_PICTURES[self.kind]
        return self.slowness * (EVALUATION_SECONDS + PICTURES_SECONDS) + self.for_baselines + self.row_seconds * rows

    @property
    def for_training(self) -> float:
        """Seconds left for training."""
        return self.left - self.end

    def affordable_rows(self, seconds: float) -> tuple[int, bool]:
        """Returns the number of test rows that can be scored in `seconds`, and whether there is time for the checks."""
        n = len(self.data.test)
        if not self.row_seconds:
            return n, True
        room = (seconds - self.slowness * EVALUATION_SECONDS) / (SAFETY * self.row_seconds)
        if room >= n + self.rows_of_checks(True):
            return n, True
        return min(n, max(LEAST_ROWS, int(room) - self.rows_of_checks(False))), False

    def rows_of_checks(self, thorough: bool) -> int:
        """Returns the number of rows that an evaluation scores in addition to the test rows."""
        rows = ROWS_OF_CHECKS if thorough else ROWS_WITHOUT_CHECKS
        # for a target, exact samples are also scored
        return rows + (EXACT if thorough else FEW_EXACT) * isinstance(self.data, TargetData)

    def val_rows(self, size: int | None) -> int | None:
        """Returns the number of rows of a validation: `size`, or fewer if `size` rows would take too long."""
        n = min(len(self.data.val), size or len(self.data.val))
        if not self.row_seconds or self.row_seconds * n <= VALIDATION_SHARE * self.left:
            return size
        self.most_val = min(n, max(LEAST_ROWS, int(VALIDATION_SHARE * self.left / self.row_seconds)))
        log.info(
            "time_budget=%g: validations use %d of %d rows, so that each takes at most %d%% of the time that is left",
            self.seconds,
            self.most_val,
            n,
            round(100 * VALIDATION_SHARE),
        )
        return self.most_val

    def affordable_data(self) -> tuple[Dataset, bool]:
        """Returns the data with the test rows that can be scored in time, and whether there is time for the checks.

        Warns if not all test rows are scored. Sets `for_baselines` to 0 if the rows and the checks need the time.
        """
        n = len(self.data.test)
        seconds = self.left - self.slowness * PICTURES_SECONDS
        rows, thorough = self.affordable_rows(seconds - self.for_baselines)
        if not thorough and self.for_baselines:
            # rows and checks have priority over the baselines
            self.for_baselines = 0.0
            rows, thorough = self.affordable_rows(seconds)
            log.info(
                "time_budget=%g leaves no time for baselines other than a Gaussian; floweval baselines=true fits them",
                self.seconds,
            )
        if not thorough:
            log.info(
                "time_budget=%g leaves no time for the checks of the density; run floweval on the run directory to "
                "perform them",
                self.seconds,
            )
        if rows == n:
            return self.data, thorough
        what = "samples" if isinstance(self.data, TargetData) else "test rows, which are evenly spaced"
        log.warning(
            "time_budget=%g leaves time to score only %d of the %d %s. Run floweval on the run directory to score all "
            "of them.",
            self.seconds,
            rows,
            n,
            what,
        )
        chosen = torch.linspace(0, n - 1, rows).round().long()
        fewer = copy.copy(self.data)
        fewer.test = self.data.test[chosen]
        for extra in ("test_labels", "test_context", "test_weights"):
            values = getattr(self.data, extra)
            setattr(fewer, extra, None if values is None else values[chosen])
        return fewer, thorough

    def warn_if_over(self) -> None:
        """Warns if the command has exceeded its budget by more than 20%."""
        if self.left < -0.2 * self.seconds:
            log.warning(
                "time_budget=%g: the command took %.0f s, including %.0f s before training. Give a larger budget, or "
                "run the command when the machine is less busy",
                self.seconds,
                self.seconds - self.left,
                self.before,
            )

    def has_time_for(self, what: str, more: bool = False) -> bool:
        """Returns whether pictures can be drawn within the budget. Logs a message if there is no time.

        Args:
            what: what the pictures show, for the message.
            more: whether the pictures are drawn by `pictures.draw_other_figures`.
        """
        rows = (ROWS_OF_MORE_PICTURES if more else ROWS_OF_PICTURES)[self.kind]
        takes = self.slowness * PICTURES_SECONDS / 2 + self.row_seconds * rows
        if takes <= max(0.0, self.left):
            return True
        log.info("time_budget=%g leaves no time for pictures of %s; floweval plots=true draws them", self.seconds, what)
        return False
