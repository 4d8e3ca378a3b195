"""The NLL of the validation set, and what follows from it: the best checkpoint, a smaller rate, the end of a run."""

import math
import time

import torch
from torch import Tensor

from flowtrain import distributed
from flowtrain.data.base import Dataset
from flowtrain.errors import FlowtrainError, NonFiniteError
from flowtrain.scores import check_finite, held_out, log_probs
from flowtrain.training import rise
from flowtrain.training.learner import Learner
from flowtrain.training.metrics import Metrics, in_bits
from flowtrain.training.progress import Progress
from flowtrain.training.saving import Saves
from flowtrain.training.settings import Settings


class Validation:
    """Scores the averaged weights, where there are any, and remembers how good they have been."""

    def __init__(
        self, learner: Learner, data: Dataset, settings: Settings, progress: Progress, metrics: Metrics, saves: Saves
    ) -> None:
        self.flow, self.learner, self.data, self.settings = learner.flow, learner, data, settings
        self.progress, self.metrics, self.saves = progress, metrics, saves
        # the number of rows that a validation takes, from the start of the set; None: all
        self.size = settings.val_size
        # seconds that the last validation took on this rank
        self.seconds = 0.0
        # of the last validation: log p of this rank's rows, the index of its first row, and the size of the whole set
        self.scored, self.start, self.n = torch.zeros(0, dtype=torch.float64), 0, 0
        # whether the NLL has clearly risen, which ends the run
        self.risen = False

    def run(self, regular: bool = True) -> None:
        """Computes the NLL of the fixed validation set at the final tolerance, and keeps the best checkpoint.

        Args:
            regular: whether this validation counts for patience, plateaus and `max_rise`. Early ones do not.
        """
        p = self.progress
        self.flow.eval()
        p.val_nll, stderr = self.nll()
        bits = in_bits(self.flow, p.val_nll)
        self.metrics.write(step=p.step, split="val", nll=p.val_nll, nll_stderr=stderr, seconds=p.seconds, **bits)
        # a NaN is never an improvement
        improved = p.val_nll < (math.inf if p.best is None else p.best["nll"])
        rows = None if self.settings.max_rise is None else self.compared()
        if regular:
            self.count()
            self.look_for_rise(rows)
        # a new best counts only once its checkpoint is written, on all ranks
        if improved and self.saves.best():
            p.best, p.best_rows = {"nll": p.val_nll, "step": p.step}, rows

    def count(self) -> None:
        """Updates patience and plateau after a regular validation: whether it was the best regular one."""
        p = self.progress
        improved = p.val_nll < (math.inf if p.counted is None else p.counted)
        if improved:
            p.counted = p.val_nll
        self.learner.lr.validated(improved)
        # what is still being tightened has not settled
        p.stale = 0 if improved or not self.learner.settled(p.step) else p.stale + 1

    def look_for_rise(self, rows: Tensor | None) -> None:
        """Sets `risen`: whether the last three validations are clearly worse than the best, or two that still rise."""
        p, s = self.progress, self.settings
        worse = False
        if s.max_rise is not None and rows is not None and p.best_rows is not None and len(rows) == len(p.best_rows):
            least = rise.margin(s.max_rise, math.prod(self.flow.event_shape))
            worse = self.learner.may_overfit(p.step) and rise.clearly_worse(p.best_rows, rows, least)
        p.worse = [*p.worse, p.val_nll] if worse else []
        self.risen = len(p.worse) > 2 or p.worse != sorted(p.worse, reverse=True)

    def compared(self) -> Tensor:
        """log p of some rows of the whole validation set, (k,), the same on all ranks."""
        mine = rise.some_rows(self.scored, self.start, self.n)
        return torch.cat([torch.tensor(part) for part in distributed.all_of(mine.tolist())])

    @property
    def out_of_patience(self) -> bool:
        """Whether so many validations in a row have found no new best that the run is to end."""
        patience = self.settings.patience
        return patience is not None and self.progress.stale >= patience

    def nll(self) -> tuple[float, float]:
        """NLL over the validation set and its standard error, in nats. Each rank scores its share of the rows."""
        x, label = held_out(self.flow, self.data, "val")
        x = x[: self.size]
        begun = time.perf_counter()
        share = distributed.share(len(x))
        label = None if label is None else label[share]
        log_p, failure = torch.zeros(0, dtype=torch.float64), None
        try:
            if len(x[share]):
                log_p = self.learner.with_average(log_probs, self.flow, x[share], label, seed=distributed.rank())
            check_finite(log_p, "val", share.start)
        except FlowtrainError as e:
            failure = e
        self.scored, self.start, self.n = log_p, share.start, len(x)
        self.seconds = time.perf_counter() - begun
        sums = [log_p.sum().item(), log_p.square().sum().item(), len(log_p), failure is not None]
        total, squares, n, failures = distributed.summed(sums)
        if failures:
            raise distributed.agreed(failure) or NonFiniteError("the validation failed")
        variance = max(0.0, squares - total**2 / n) / (n - 1) if n > 1 else math.nan
        return -total / n, math.sqrt(variance / n)
