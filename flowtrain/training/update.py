"""One update of the weights, top to bottom: batch, loss, backward, average, check, clip, step."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain import distributed
from flowtrain.errors import FlowtrainError, NonFiniteError
from flowtrain.objectives.base import Objective
from flowtrain.precision import narrowed, training_step
from flowtrain.solvers import record_solves
from flowtrain.training.averaging import averaged
from flowtrain.training.batches import Batch, Batches
from flowtrain.training.learner import Learner
from flowtrain.training.metrics import in_bits
from flowtrain.training.settings import Settings
from flowtrain.training.trouble import STEP_ERRORS, bad_update, dump

NFE = ("nfe_forward", "nfe_backward")

# what a step measured, as metrics.jsonl has it
Row = dict[str, Any]


@dataclass
class Attempt:
    """What this rank has made of its rows, before anything is known of the others'.

    Attributes:
        terms: the loss and its parts, by name; none where it failed.
        nfe: of one part of the batch, which is what a sample meets; none where nothing was solved.
    """

    terms: dict[str, Tensor] = field(default_factory=dict)
    nfe: dict[str, float] = field(default_factory=dict)
    failure: FlowtrainError | None = None


class Update:
    """Makes the updates of `learner` that lower `objective` on `batches`, the same ones on all ranks.

    Args:
        run_dir: where the batch of a step that failed is kept.
    """

    def __init__(
        self, objective: Objective, learner: Learner, batches: Batches, settings: Settings, run_dir: Path
    ) -> None:
        self.objective, self.learner, self.batches = objective, learner, batches
        self.settings, self.run_dir = settings, run_dir
        self.flow, self.device = learner.flow, batches.device

    def take(self, step: int, lr: float) -> tuple[Row, Batch]:
        """One update. The finite check costs one transfer to the host, beside the solver's, and comes before it.

        A step that fails does not change the weights or the running statistics of batch norms.

        Returns:
            (what was measured, the batch).

        Raises:
            FlowtrainError: a loss, gradient or solve that failed on whatever rank; the weights were not touched.
        """
        begun = time.perf_counter()
        torch.manual_seed(self.batches.seed_of(step))
        batch = self.batches.of(step)
        self.learner.set_rate(lr)
        restore = self.learner.keep_running()
        tried = self.attempt(step, batch)
        norm, means = self.averaged(tried)
        grad_norm, *values = torch.stack([norm, *means.values()]).tolist()
        found = dict(zip(means, values, strict=True))
        if tried.failure is not None or not math.isfinite(grad_norm) or not math.isfinite(found["loss"]):
            restore()
            raise self.blame(step, batch, tried)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.flow.parameters(), self.settings.clip_norm, norm)
        self.learner.apply()
        nfe = {name: found.pop(name, n) for name, n in tried.nfe.items()}
        del found["loss"]
        row = {
            "nll": None,
            **found,
            **(in_bits(self.flow, found["nll"]) if "nll" in found else {}),
            "step_seconds": time.perf_counter() - begun,
            **{name: round(nfe[name]) if nfe else None for name in NFE},
            "grad_norm": grad_norm,
            "lr": lr,
            **self.learner.tolerance(step),
        }
        return row, batch

    def attempt(self, step: int, batch: Batch) -> Attempt:
        """Loss and gradients of this rank's rows; a failure is kept, for all ranks have to hear of it."""
        tried, s = Attempt(), self.settings
        self.objective.train()
        if s.compile:
            # CUDA graphs may overwrite what the step before left
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with record_solves() as solves, training_step(s.precision, self.device), self.learner.solving(step):
            self.learner.optimizer.zero_grad()
            try:
                self.objective.begin(step)
                tried.terms = self.backward(batch.x, batch.label)
            except STEP_ERRORS as e:
                tried.failure = e
        tried.nfe = {name: sum(getattr(c, name) for c in solves) / s.accumulate for name in NFE if solves}
        return tried

    def backward(self, x: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """The loss of a batch and its terms, by name.

        Its gradient is summed over `accumulate` parts that are in memory one at a time.
        """
        n = self.settings.accumulate
        labels = [None] * n if label is None else label.tensor_split(n)
        total: dict[str, Tensor] = {}
        for part, y in zip(x.tensor_split(n), labels, strict=True):
            with narrowed(self.settings.precision, self.device):
                loss, terms = self.objective(part, y)
            share = len(part) / len(x)
            (share * loss).backward()
            for name, term in {"loss": loss, **terms}.items():
                total[name] = total.get(name, 0.0) + share * term.detach()
        return total

    def averaged(self, tried: Attempt) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean gradient of all ranks in the place of this one's: its norm, and the mean terms, NFE among them."""
        terms = dict(tried.terms)
        if terms and distributed.size() > 1:
            terms |= {name: terms["loss"].new_tensor(n, dtype=torch.float32) for name, n in tried.nfe.items()}
        return averaged(list(self.flow.parameters()), terms, self.batches.weight)

    def blame(self, step: int, batch: Batch, tried: Attempt) -> FlowtrainError:
        """What there is to say of a step without an update, the same on all ranks: where it failed, and why."""
        failure = tried.failure or bad_update(self.flow, float(tried.terms["loss"]), batch.x)
        if failure is not None:
            path = dump(self.run_dir, step + 1, batch.x, batch.label)
            failure = failure if path is None else type(failure)(f"{failure} Its batch is in {path}.")
        agreed = distributed.agreed(failure)
        return agreed or NonFiniteError("the sum of all ranks' gradients is not finite, though each of them is.")
