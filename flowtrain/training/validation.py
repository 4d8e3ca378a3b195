"""Validation: the NLL, the best checkpoint, early stopping, detection of overfitting, and advice."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation.log_likelihood import check_finite, held_out, log_probs
from flowtrain.evaluation.log_weights import check_log_weights, weighted_samples
from flowtrain.training.checkpoint_manager import CheckpointManager
from flowtrain.training.metrics import Metrics, in_bits
from flowtrain.training.progress import Progress
from flowtrain.training.settings import Settings
from flowtrain.training.train_state import TrainState
from flowtrain.utils import ranks
from flowtrain.utils.errors import DataError, FlowtrainError, NonFiniteError
from flowtrain.utils.weighting import average, stderr

# the largest and smallest number of validation rows that are compared row by row
MOST_COMPARED, LEAST_ROWS_RISEN = 2000, 5
# the mean difference must exceed this many standard errors
SIGMAS = 4.0
# differences are clipped at this multiple of their median size, so that a single row does not determine the result
CLIP = 3.0
# if this share of the rows is worse, the standard error is not checked
MANY_WORSE = 0.75
# for samples with more elements than this, the margin grows in proportion
MARGIN_COLUMNS = 10


def margin(max_rise: float, d: int) -> float:
    """Returns how far the NLL may be above the best NLL, in nats, for samples of d elements."""
    return max_rise * max(1.0, d / MARGIN_COLUMNS)


def clearly_worse(best: Tensor, now: Tensor, least: float, weights: Tensor | None = None) -> bool:
    """Returns whether log p of the same rows, (n,) each, is significantly worse by more than `least` nats.

    Means, shares and standard errors are weighted if `weights` (n,) are given.

    The mean difference must exceed `least`. In addition, either a share MANY_WORSE of the rows must be worse by more
    than `least`, or the mean of the clipped differences must exceed `least` and SIGMAS of its standard errors. A single
    row therefore cannot decide.

    Example:
        >>> before = torch.arange(10.0)
        >>> clearly_worse(before, before - 2 - 0.1 * before, least=1.0), clearly_worse(before, before - 0.5, least=1.0)
        (True, False)
        >>> clearly_worse(before, before - 1000 * (before == 3), least=1.0)
        False
    """
    worse = (best - now).double()
    if len(worse) < LEAST_ROWS_RISEN or not bool(worse.isfinite().all()):
        return False
    if float(average(worse, weights)) <= least:
        return False
    if float(average((worse > least).double(), weights)) >= MANY_WORSE:
        return True
    limit = float(CLIP * worse.abs().median())
    clipped = worse.clamp(-limit, limit)
    return float(average(clipped, weights)) > max(least, SIGMAS * stderr(clipped, weights))


def some_rows(log_p: Tensor, start: int, n: int) -> Tensor:
    """Returns the entries of log_p that belong to MOST_COMPARED (or fewer) evenly spaced rows of a set of n rows.

    Args:
        log_p: log p of consecutive rows of the set.
        start: the index of the first of these rows in the set.
    """
    every = max(1, math.ceil(n / MOST_COMPARED))
    return log_p[-start % every :: every].to(torch.float32)


# a run had too few steps if the NLL still improved in the last steps, this share of all steps
LATE_BEST = 0.2
# nats by which the NLL must have improved in these last steps, for samples of up to ten elements
GAINED = 0.02
# a best validation within this first share of the steps suggests overfitting
EARLY_BEST = 0.5


def best_step(step: int, steps: int) -> str:
    """Returns a phrase with the step of the best validation.

    Example:
        >>> best_step(200, 1200)
        'best at step 200 of 1,200'
    """
    return f"best at step {step:,} of {steps:,}"


def advice(
    rows: Sequence[Mapping[str, Any]], best: int, steps: int, d: int, finite: bool, config: Mapping[str, Any]
) -> str | None:
    """Suggests settings that may give a better flow, from the validations of a run. None if they show nothing clear.

    Args:
        rows: the rows of metrics.jsonl.
        best: the step of the best validation.
        steps: the number of steps of the run.
        d: the number of elements of a sample.
        finite: whether the training data are a finite set.
        config: the config of the run. The model keys of the config determine which suggestions are possible.
    """
    nll = {row["step"]: row["nll"] for row in rows if row["split"] == "val"}
    if len(nll) < 2 or best not in nll:
        return None
    clear = GAINED * max(1.0, d / 10)
    if finite and best <= EARLY_BEST * steps and nll[max(nll)] - nll[best] > clear:
        names = {"hidden": "a smaller model (model.hidden)", "dropout": "model.dropout"}
        keys = ["more rows", *(words for key, words in names.items() if key in config["model"])]
        keys += ["a larger trainer.weight_decay", "a smaller trainer.lr"]
        what = "the flow overfits" if best else "no step was better than the initial flow"
        return f"{what}: {', '.join(keys[:-1])} or {keys[-1]} may help"
    before = [nll[step] for step in nll if step <= (1 - LATE_BEST) * steps]
    if best == max(nll) and before and min(before) - nll[best] > clear:
        return "the validation NLL was still falling: a larger trainer.steps may help"
    return None


class Validation:
    """Validates the flow with its averaged weights, if there are any, and records the results in `progress`."""

    def __init__(
        self,
        train_state: TrainState,
        data: Dataset,
        settings: Settings,
        progress: Progress,
        metrics: Metrics,
        checkpoints: CheckpointManager,
    ) -> None:
        self.flow, self.train_state, self.data, self.settings = train_state.flow, train_state, data, settings
        self.progress, self.metrics, self.checkpoints = progress, metrics, checkpoints
        # the number of rows of a validation, from the start of the set; None: all
        self.size = settings.val_size
        # duration of the last validation on this rank in seconds
        self.seconds = 0.0
        # the last validation: log p of this rank's rows, the index of the first of them, and the number of all rows
        self.scored, self.start, self.n = torch.zeros(0, dtype=torch.float64), 0, 0
        # the weights of all rows of the last validation, or None
        self.weights: Tensor | None = None
        # whether the NLL has clearly risen, which ends the run
        self.risen = False

    def run(self, regular: bool = True) -> None:
        """Computes the NLL of the validation set at the final tolerance, and writes best.pt if the NLL is the best so
        far.

        Args:
            regular: whether this validation counts for patience, plateaus and `max_rise`. Early validations do not
                count.
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
            self.check_overfitting(rows)
        # a new best counts only if its checkpoint could be written; all ranks agree on this
        if improved and self.checkpoints.write_best():
            p.best, p.best_rows = {"nll": p.val_nll, "step": p.step}, rows

    def count(self) -> None:
        """Updates the counters for patience and plateau after a regular validation."""
        p = self.progress
        improved = p.val_nll < (math.inf if p.counted is None else p.counted)
        if improved:
            p.counted = p.val_nll
        self.train_state.lr.validated(improved)
        # validations do not count while the tolerance warms up or a plateau still lowers the learning rate
        p.stale = 0 if improved or not self.train_state.settled(p.step) else p.stale + 1

    def check_overfitting(self, rows: Tensor | None) -> None:
        """Sets `risen`: whether the NLL of the latest consecutive regular validations is clearly worse than the best.

        Three such validations are needed, or two if the second is worse than the first.
        """
        p, s = self.progress, self.settings
        worse = False
        if s.max_rise is not None and rows is not None and p.best_rows is not None and len(rows) == len(p.best_rows):
            least = margin(s.max_rise, math.prod(self.flow.event_shape))
            weights = None if self.weights is None else some_rows(self.weights, 0, self.n)
            worse = self.train_state.may_overfit(p.step) and clearly_worse(p.best_rows, rows, least, weights)
        p.worse = [*p.worse, p.val_nll] if worse else []
        self.risen = len(p.worse) > 2 or p.worse != sorted(p.worse, reverse=True)

    def compared(self) -> Tensor:
        """Returns log p of some rows of the whole validation set, (k,), the same on all ranks."""
        mine = some_rows(self.scored, self.start, self.n)
        return torch.cat([torch.tensor(part) for part in ranks.all_gather(mine.tolist())])

    @property
    def out_of_patience(self) -> bool:
        """Whether `patience` consecutive validations have found no new best, which ends the run."""
        patience = self.settings.patience
        return patience is not None and self.progress.stale >= patience

    def nll(self) -> tuple[float, float]:
        """Returns the NLL of the validation set and its standard error, in nats. Each rank scores its own rows.

        The noise of a row depends on the number of the row in the whole set, and not on the number of ranks. With
        weights, rows of weight 0 are not scored. For the standard error, see `flowtrain.utils.weighting.stderr`. For a
        target, the NLL is the negative ELBO, and the rows are samples of the flow with fixed base points.
        """
        x, context, weights = self.rows()
        begun = time.perf_counter()
        share = ranks.share(len(x))
        context = None if context is None else context[share]
        log_p, failure = torch.zeros(0, dtype=torch.float64), None
        try:
            if isinstance(self.data, TargetData):
                of_target = self.data.target, len(x), self.data.seed_of("val"), share
                drawn = self.train_state.with_average(weighted_samples, self.flow, *of_target)
                check_log_weights(drawn, share.start)
                log_p = drawn.log_w
            elif len(x[share]):
                log_p = self.train_state.with_average(log_probs, self.flow, x[share], context, first=share.start)
                check_finite(log_p, "val", share.start)
        except FlowtrainError as e:
            failure = e
        self.scored, self.start, self.n, self.weights = log_p, share.start, len(x), weights
        self.seconds = time.perf_counter() - begun
        w = torch.ones_like(log_p) if weights is None else weights[share][: len(log_p)].cpu()
        [failures] = ranks.summed([float(failure is not None)])
        if failures:
            raise ranks.gather_errors(failure) or NonFiniteError("the validation failed")
        total, of_weights, of_squares = ranks.summed([float(part) for part in ((w * log_p).sum(), w.sum(), w @ w)])
        mean = total / of_weights
        [apart] = ranks.summed([float((w * (log_p - mean)).square().sum())])
        effective = of_weights**2 / of_squares
        if not effective > 1:
            return -mean, math.nan
        return -mean, math.sqrt(effective / (effective - 1) * apart) / abs(of_weights)

    def rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the first `size` validation rows with a weight other than 0, their context and their weights."""
        x, context = held_out(self.flow, self.data, "val")
        weights = self.data.val_weights
        if weights is not None:
            kept = weights != 0
            x, context, weights = x[kept], None if context is None else context[kept], weights[kept]
            first = slice(self.size)
            if not float(weights[first].sum()) > 0:
                raise DataError(
                    f"the weights of the {len(weights[first]):,} validation rows do not have a positive sum, so the "
                    "NLL is not defined; give a larger data.val_fraction or trainer.val_size"
                )
        context, weights = (None if v is None else v[: self.size] for v in (context, weights))
        return x[: self.size], context, weights
