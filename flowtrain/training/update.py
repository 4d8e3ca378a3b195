"""One update of the weights: batch, loss, gradient averaged over ranks, finite check, clipping, optimizer step."""

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
from flowtrain.utils.process import seed_generators, seeded

# number of places for the loss and its terms in the summed tensor. It is fixed, because a rank whose step failed must
# send a tensor of the same size
AVERAGING_SLOTS = 16


def average_gradients(
    parameters: Sequence[nn.Parameter], terms: Mapping[str, Tensor], weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Replaces this rank's gradients by the weighted mean sum_r w_r g_r over all ranks r, if the mean is finite.

    Gradients and terms are summed as one tensor after the backward pass. A rank whose step failed sends NaN, so that no
    rank makes an update. Each rank then still has its own gradients, which `bad_update` examines.

    A parameter that has no gradient on any rank gets none, so that weight decay and the optimizer's averages do not
    change the parameter. If only some ranks have a gradient, the gradients of the others count as zeros.

    Args:
        terms: the loss and its parts by name, with the same names on all ranks. Empty if the step failed.
        weight: w_r, this rank's share of the rows of the batch.

    Returns:
        (the norm of the mean gradient, which is not finite if a rank failed; the weighted means of the terms). With a
        single rank, these are the norm and the terms of this rank, and the gradients are not copied.
    """
    trained = [p for p in parameters if p.requires_grad]
    if ranks.size() == 1:
        return total_norm([p.grad for p in trained if p.grad is not None]), dict(terms)
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    slots = pieces[0].new_full((AVERAGING_SLOTS,), 0.0 if terms else torch.nan)
    for i, term in enumerate(terms.values()):
        slots[i] = term
    # 1 for each parameter with a gradient, else 0. The sum over ranks is above 0 if any rank has a gradient. This needs
    # no synchronization with the device
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
    # This is the only synchronization with the device in this function. The caller's check for finite values would also
    # need a synchronization
    finite, *there = torch.cat([norm.isfinite().view(1), known > 0]).tolist()
    if finite:
        for p, piece, has in zip(trained, torch.split(gradient, sizes), there, strict=True):
            # in the memory layout of the parameter, because a fused optimizer iterates over both in memory order
            p.grad = torch.empty_like(p).copy_(piece.view_as(p)) if has else None
    return norm, found


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all gradients together."""
    if len({(g.dtype, g.device) for g in gradients}) != 1:
        return nn.utils.get_total_norm(gradients)
    # for many small tensors, one copy and one norm are faster than a norm of each tensor
    norm: Tensor = torch.linalg.vector_norm(torch._utils._flatten_dense_tensors(gradients))  # type: ignore[no-untyped-call]
    return norm


NFE = ("nfe_forward", "nfe_backward")

# the measurements of a step, as in metrics.jsonl
Row = dict[str, Any]


@dataclass
class Attempt:
    """The result of this rank's forward and backward pass, before results are exchanged between ranks.

    Attributes:
        terms: the loss and its parts by name. Empty if the step failed.
        nfe: the mean NFE of one of the `accumulate` parts of the batch. Empty if no ODE was solved.
        failure: the error if the step failed, else None.
    """

    terms: dict[str, Tensor] = field(default_factory=dict)
    nfe: dict[str, float] = field(default_factory=dict)
    failure: FlowtrainError | None = None


class Update:
    """Makes updates of `train_state` that minimize `objective` on `batches`. All ranks make the same updates.

    Args:
        run_dir: the run directory, in which the batch of a failed step is kept; None: it is not kept.
    """

    def __init__(
        self, objective: Objective, train_state: TrainState, batches: Batches, settings: Settings, run_dir: Path | None
    ) -> None:
        self.objective, self.train_state, self.batches = objective, train_state, batches
        self.settings, self.run_dir = settings, run_dir
        self.flow, self.device = train_state.flow, batches.device
        # searching them takes longer than using them
        self.parameters, self.modules = list(self.flow.parameters()), list(objective.modules())

    def take(self, step: int, lr: float) -> tuple[Row, Batch]:
        """Makes one update, after a check that loss and gradients are finite.

        The check costs one transfer to the host, in addition to the transfers of the solver. A step that fails does not
        change the weights or the running statistics of batch norms.

        Returns:
            (the measurements of the step, the batch of the step).

        Raises:
            FlowtrainError: a loss, gradient or solve failed on any rank. The weights were not changed.
        """
        begun = time.perf_counter()
        seed = self.batches.seed_of(step)
        seed_generators(seed, self.device)
        batch = self.batches.of(step, seed)
        self.train_state.set_rate(lr)
        restore = self.train_state.keep_running()
        attempt = self.attempt(step, batch)
        norm, means = self.average(attempt)
        grad_norm, *values = torch.stack([norm, *means.values()]).tolist()
        found = dict(zip(means, values, strict=True))
        if attempt.failure is not None or not math.isfinite(grad_norm) or not math.isfinite(found["loss"]):
            restore()
            raise self.diagnose_failure(step, batch, attempt)
        if self.settings.clip_norm is not None and grad_norm > 0.99 * self.settings.clip_norm:
            # equals torch.nn.utils.clip_grads_with_norm_, which takes longer. Smaller gradients are not clipped
            factor = (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
        self.train_state.apply()
        nfe = {name: found.pop(name, n) for name, n in attempt.nfe.items()}
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
        """Computes loss and gradients of this rank's rows. An error is returned, because all ranks must exchange it."""
        attempt, s = Attempt(), self.settings
        if not all(module.training for module in self.modules):
            self.objective.train()
        if s.compile:
            # allows CUDA graphs to overwrite the tensors of the previous step
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with record_solves() as solves, training_step(s.precision, self.device):
            self.train_state.optimizer.zero_grad()
            try:
                self.objective.follow_schedule(self.train_state.schedule_clock.at(step))
                self.objective.begin(step)
                attempt.terms = self.backward(batch, self.train_state.options(step))
            except STEP_ERRORS as e:
                attempt.failure = e
        attempt.nfe = {name: sum(getattr(c, name) for c in solves) / s.accumulate for name in NFE if solves}
        return attempt

    def backward(self, batch: Batch, options: SolveOptions) -> dict[str, Tensor]:
        """Returns the loss of a batch and its terms by name, and adds to the gradients of the parameters.

        Gradients are summed over `accumulate` parts of the batch, one in memory at a time.
        """
        n = self.settings.accumulate
        contexts, weights = ([None] * n if v is None else v.tensor_split(n) for v in (batch.context, batch.weights))
        total: dict[str, Tensor] = {}
        for part, c, w in zip(batch.x.tensor_split(n), contexts, weights, strict=True):
            with narrowed(self.settings.precision, self.device):
                # `build_objective` refuses an objective without the argument `weights` if the data have weights
                loss, terms = self.objective(part, c, options, **({} if w is None else {"weights": w}))
            share = len(part) / len(batch.x)
            (share * loss).backward()
            for name, term in {"loss": loss, **terms}.items():
                total[name] = total.get(name, 0.0) + share * term.detach()
        return total

    def average(self, attempt: Attempt) -> tuple[Tensor, dict[str, Tensor]]:
        """Replaces the gradients by their mean over all ranks.

        Returns the norm of the mean gradient, and the mean terms, including NFE.
        """
        terms = dict(attempt.terms)
        if terms and ranks.size() > 1:
            terms |= {name: terms["loss"].new_tensor(n, dtype=torch.float32) for name, n in attempt.nfe.items()}
        return average_gradients(self.parameters, terms, self.batches.weight)

    def diagnose_failure(self, step: int, batch: Batch, attempt: Attempt) -> FlowtrainError:
        """Returns an error that says on which rank a step failed and why, the same on all ranks. Saves the batch."""
        failure = attempt.failure
        if failure is None and not math.isfinite(float(attempt.terms["loss"])):
            with seeded(batch.seed, self.device):
                failure = self.objective.diagnose_failure(batch.x)
        failure = failure or bad_update(self.flow, float(attempt.terms["loss"]), batch.x)
        if failure is not None:
            path = dump(self.run_dir, step + 1, batch.x, batch.context)
            failure = failure if path is None else type(failure)(f"{failure} Its batch is in {path}.")
        agreed = ranks.gather_errors(failure)
        return agreed or NonFiniteError("the gradients of every rank are finite, but their sum is not.")
