"""One update of the weights: batch, loss, gradient averaged over ranks, check, clipping, optimizer step."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.objectives.base import Objective
from flowtrain.ode import SolveOptions, record_solves
from flowtrain.training.batches import Batch, Batches
from flowtrain.training.failure_policy import STEP_ERRORS, bad_update, dump
from flowtrain.training.metrics import in_bits
from flowtrain.training.settings import Settings
from flowtrain.training.train_state import TrainState
from flowtrain.utils import ranks
from flowtrain.utils.errors import FlowtrainError, NonFiniteError
from flowtrain.utils.precision import narrowed, training_step

# numbers kept for a loss and its terms in what is summed, so that a rank whose step failed sends as many as the others
AVERAGING_SLOTS = 16


def averaged(
    parameters: Sequence[nn.Parameter], terms: Mapping[str, Tensor], weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Puts sum_r w_r g_r, over all ranks, in the place of this rank's gradients, where that is finite.

    Gradients and terms travel as one tensor and are summed once all of them are there, so that a rank whose step has
    failed, forward or backward, takes part with NaN in the place of its own: then no rank has an update to make, and
    each has its own gradients still, to tell whether it was its fault.

    A parameter without a gradient on every rank stays without one, so that weight decay and the optimizer's averages
    do not change it. If only some ranks have a gradient, the others count as zeros.

    Args:
        terms: the loss and its parts, by name, the same on all ranks; none where the step failed.
        weight: w_r, the share of the rows of the batch that this rank has.

    Returns:
        (the norm of the mean gradient, NaN or infinite where it is of no use; the weighted terms). On one rank, those
        of its own, and nothing is copied.
    """
    trained = [p for p in parameters if p.requires_grad]
    if ranks.size() == 1:
        return nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]), dict(terms)
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    slots = pieces[0].new_full((AVERAGING_SLOTS,), 0.0 if terms else torch.nan)
    for i, term in enumerate(terms.values()):
        slots[i] = term
    # 1 for each parameter with a gradient. The sum over ranks is above 0 if any rank has one. Needs no device sync
    known = pieces[0].new_ones(len(trained))
    for i, p in enumerate(trained):
        if p.grad is None:
            known[i] = 0.0
    flat = torch.cat([*(piece.flatten() for piece in pieces), known, slots]).mul_(weight)
    if not terms:
        flat.fill_(torch.nan)
    ranks.sum_in_place(flat)
    sizes = [p.numel() for p in trained]
    gradient, known, means = torch.split(flat, [sum(sizes), len(trained), AVERAGING_SLOTS])
    norm = torch.linalg.vector_norm(gradient)
    found = dict(zip(terms, means, strict=False))
    # one wait for the device, which the caller's check would come to anyway
    finite, *there = torch.cat([norm.isfinite().view(1), known > 0]).tolist()
    if finite:
        for p, piece, has in zip(trained, torch.split(gradient, sizes), there, strict=True):
            # in the layout of the parameter: a fused optimizer goes through the memory of both side by side
            p.grad = torch.empty_like(p).copy_(piece.view_as(p)) if has else None
    return norm, found


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
    """Makes the updates of `train_state` that lower `objective` on `batches`, the same ones on all ranks.

    Args:
        run_dir: where the batch of a step that failed is kept; None: nowhere.
    """

    def __init__(
        self, objective: Objective, train_state: TrainState, batches: Batches, settings: Settings, run_dir: Path | None
    ) -> None:
        self.objective, self.train_state, self.batches = objective, train_state, batches
        self.settings, self.run_dir = settings, run_dir
        self.flow, self.device = train_state.flow, batches.device

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
        self.train_state.set_rate(lr)
        restore = self.train_state.keep_running()
        tried = self.attempt(step, batch)
        norm, means = self.averaged(tried)
        grad_norm, *values = torch.stack([norm, *means.values()]).tolist()
        found = dict(zip(means, values, strict=True))
        if tried.failure is not None or not math.isfinite(grad_norm) or not math.isfinite(found["loss"]):
            restore()
            raise self.diagnose_failure(step, batch, tried)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.flow.parameters(), self.settings.clip_norm, norm)
        self.train_state.apply()
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
            **self.train_state.tolerance(step),
        }
        return row, batch

    def attempt(self, step: int, batch: Batch) -> Attempt:
        """Loss and gradients of this rank's rows; a failure is kept, for all ranks have to hear of it."""
        tried, s = Attempt(), self.settings
        self.objective.train()
        if s.compile:
            # CUDA graphs may overwrite what the step before left
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with record_solves() as solves, training_step(s.precision, self.device):
            self.train_state.optimizer.zero_grad()
            try:
                self.objective.begin(step)
                tried.terms = self.backward(batch.x, batch.label, self.train_state.options(step))
            except STEP_ERRORS as e:
                tried.failure = e
        tried.nfe = {name: sum(getattr(c, name) for c in solves) / s.accumulate for name in NFE if solves}
        return tried

    def backward(self, x: Tensor, label: Tensor | None, options: SolveOptions) -> dict[str, Tensor]:
        """The loss of a batch and its terms, by name.

        Its gradient is summed over `accumulate` parts that are in memory one at a time.
        """
        n = self.settings.accumulate
        labels = [None] * n if label is None else label.tensor_split(n)
        total: dict[str, Tensor] = {}
        for part, y in zip(x.tensor_split(n), labels, strict=True):
            with narrowed(self.settings.precision, self.device):
                loss, terms = self.objective(part, y, options)
            share = len(part) / len(x)
            (share * loss).backward()
            for name, term in {"loss": loss, **terms}.items():
                total[name] = total.get(name, 0.0) + share * term.detach()
        return total

    def averaged(self, tried: Attempt) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean gradient of all ranks in the place of this one's: its norm, and the mean terms, NFE among them."""
        terms = dict(tried.terms)
        if terms and ranks.size() > 1:
            terms |= {name: terms["loss"].new_tensor(n, dtype=torch.float32) for name, n in tried.nfe.items()}
        return averaged(list(self.flow.parameters()), terms, self.batches.weight)

    def diagnose_failure(self, step: int, batch: Batch, tried: Attempt) -> FlowtrainError:
        """What there is to say of a step without an update, the same on all ranks: where it failed, and why."""
        failure = tried.failure or bad_update(self.flow, float(tried.terms["loss"]), batch.x)
        if failure is not None:
            path = dump(self.run_dir, step + 1, batch.x, batch.label)
            failure = failure if path is None else type(failure)(f"{failure} Its batch is in {path}.")
        agreed = ranks.gather_errors(failure)
        return agreed or NonFiniteError("the sum of all ranks' gradients is not finite, though each of them is.")
