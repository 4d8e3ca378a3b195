"""Training state: optimizer, learning rate, EMA and solver guard of a flow."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from flowtrain.bijections.scale import BatchNorm
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.training.adam import Adam
from flowtrain.training.batches import Batch
from flowtrain.training.ema import Ema
from flowtrain.training.muon import Muon, hidden_matrices
from flowtrain.training.resume_validation import moments
from flowtrain.training.schedules import LearningRate, ScheduleClock
from flowtrain.training.settings import Settings
from flowtrain.training.solver_guard import SolverGuard
from flowtrain.utils import ranks

# if the solver sets no warm-up, the tolerance warms up over this share of the steps that solve the ODE
WARMUP = 2 / 3


class TrainState:
    """Optimizer, learning rate, EMA and solver guard of a flow.

    Args:
        flow: the flow with its initial weights, which the EMA starts from.
        schedule_clock: the position of the learning rate and tolerance schedules.

    Attributes:
        solves_from: the first step that maximizes the likelihood. None if the objective never does.
        tied: whether the tolerance warms up with the halvings of lr_decay=plateau, whose end is not known in advance.
        running: the running statistics of batch norms, which differ between ranks until they are broadcast.
        ema: the average of the weights; None: not used.
        guard: the solver guard; None if the flow solves no ODE.
    """

    def __init__(self, objective: Objective, flow: Flow, settings: Settings, schedule_clock: ScheduleClock) -> None:
        self.objective, self.flow, self.settings, self.schedule_clock = objective, flow, settings, schedule_clock
        parameters = list(flow.parameters())
        if settings.optimizer == "muon":
            self.optimizer: Adam = Muon(parameters, hidden_matrices(flow), settings.lr, settings.weight_decay)
        else:
            self.optimizer = Adam(parameters, settings.lr, settings.weight_decay, settings.optimizer == "adamw")
        self.solves_from = objective.likelihood_from
        self.lr = LearningRate(settings, self.solves_from or 0)
        self.tied = flow.solver is not None and flow.solver.warmup is None and settings.lr_decay == "plateau"
        self.guard = None
        if flow.solver is not None:
            end_time = objective.regularizer.end_time
            self.guard = SolverGuard(
                flow, settings.guard_every, lambda: self.warmup, self.warmed, end_time, objective.raises_log_prob
            )
        norms = [m for m in flow.modules() if isinstance(m, BatchNorm | _BatchNorm)]
        self.running = [b for m in norms for b in m.buffers()]
        self.ema = None if settings.ema is None else Ema(flow, settings.ema)

    @property
    def warmup(self) -> int:
        """The number of warm-up steps of the tolerance: the solver's, or WARMUP of the steps that solve the ODE."""
        solver = self.flow.solver
        if solver is None:
            return 0
        if solver.warmup is not None:
            return solver.warmup
        return round(WARMUP * (self.settings.steps - (self.solves_from or 0)))

    def solve_from(self, step: int) -> None:
        """Makes the likelihood replace another objective at that step, earlier than planned."""
        self.solves_from = self.lr.again = step

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr.at(step, self.schedule_clock.at(step))

    def solves(self, step: int) -> bool:
        """Returns whether a training step maximizes the likelihood, for which a continuous flow solves its ODE."""
        return self.solves_from is not None and step >= self.solves_from

    def set_rate(self, lr: float) -> None:
        """Sets the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def apply(self) -> None:
        """Updates the weights and their average. The running statistics of rank 0 are copied to all ranks."""
        self.optimizer.update()
        ranks.broadcast(self.running)
        if self.ema is not None:
            self.ema.update()

    @torch.no_grad()
    def keep_running(self) -> Callable[[], None]:
        """Copies the running statistics of batch norms, and returns a function that restores the copy.

        A forward pass in training mode updates them before the loss is known to be finite. Without batch norms, both
        calls do nothing.
        """
        if not self.running:
            return _nothing
        kept = [buffer.clone() for buffer in self.running]

        @torch.no_grad()
        def restore() -> None:
            for buffer, value in zip(self.running, kept, strict=True):
                buffer.copy_(value)

        return restore

    def restart(self) -> None:
        """Prepares for another objective: sets the weights to their average and resets optimizer and learning rate."""
        self.optimizer.state.clear()
        self.lr.restart()
        if self.ema is not None:
            self.ema.restart()

    def with_average(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Calls a function while the flow has its averaged weights, if there are any."""
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            return function(*arguments, **named)

    # tolerance of training and solver guard

    def options(self, step: int) -> SolveOptions:
        """Returns the options for the ODE solve of a training step."""
        if self.guard is None or not self.solves(step):
            return AS_CONFIGURED
        rtol, atol = self.guard.tolerance_at(step)
        return SolveOptions(rtol=rtol, atol=atol)

    def tolerance(self, step: int) -> dict[str, float | None]:
        """Returns rtol and atol of a step for its row in metrics.jsonl.

        Both are None for fixed steps or without a solve.
        """
        if self.guard is None or not self.guard.solver.adaptive or not self.solves(step):
            return {"rtol": None, "atol": None}
        return dict(zip(("rtol", "atol"), self.guard.tolerance_at(step), strict=True))

    def check_solver(self, step: int, batch: Batch) -> bool:
        """Runs the solver guard after a step, if a check is due. Returns whether the solver was tightened."""
        if self.guard is None or not self.solves(step):
            return False
        # only the first part of the batch is checked, because `accumulate` limits the memory to one part
        part = slice(math.ceil(len(batch.x) / self.settings.accumulate))
        context = None if batch.context is None else batch.context[part]
        # the guard's forward passes run in training mode and must not change the running statistics
        restore = self.keep_running()
        try:
            rows = self.objective.rows_to_check(batch.x[part]) if self.guard.is_due(step + 1) else batch.x[part]
            return self.guard.check(step + 1, rows, batch.seed, context)
        finally:
            restore()

    def warmed(self, step: int) -> float:
        """Returns how many warm-up steps of the tolerance are completed at a step.

        With lr_decay=plateau, the number follows the halvings of the learning rate, because the length of the run is
        not known.
        """
        solver = self.flow.solver
        if self.tied and solver is not None:
            return self.lr.settled * self.warmup
        return max(0, self.schedule_clock.at(step) - (self.solves_from or 0))

    def settled(self, step: int) -> bool:
        """Returns whether a validation without a new best counts towards early stopping.

        False before the likelihood begins, while the tolerance warms up, and while a plateau may still lower the
        learning rate.
        """
        solver = self.flow.solver
        if self.settings.lr_decay == "plateau" and self.lr.settled < 1:
            return False
        if solver is None or self.solves_from is None:
            return True
        return self.solves(step) and self.warmed(step) >= self.warmup

    def may_overfit(self, step: int) -> bool:
        """Returns whether a rise of the validation NLL after that step indicates overfitting.

        False before the learning rate of the likelihood has warmed up, and while a plateau may still lower it.
        """
        if self.solves_from is None or step < self.solves_from + self.settings.lr_warmup:
            return False
        return self.settings.lr_decay != "plateau" or self.lr.settled >= 1

    # parts of last.pt

    def state(self) -> dict[str, Any]:
        """Returns the state of optimizer, learning rate and guard. A checkpoint stores `ema` with the weights."""
        guard = None if self.guard is None else self.guard.state()
        found = {"optimizer": self.optimizer.state_dict(), "lr": self.lr.state(), "guard": guard}
        of_objective = self.objective.state()
        return found if of_objective is None else {**found, "objective": of_objective}

    def load_moments(self, saved: Mapping[str, Any]) -> None:
        """Restores the moments of the optimizer from a checkpoint, but not its settings, which a resume may change."""
        groups = self.optimizer.state_dict()["param_groups"]
        content = saved["optimizer"]
        if isinstance(self.optimizer, Muon):
            content = self.optimizer.upgraded(content)
        state = moments(content, list(self.flow.parameters()), self.optimizer.moments_of)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores learning rate, EMA and guard from a checkpoint that has been checked."""
        self.lr.load(saved["lr"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load(saved["ema"])
        if self.guard is not None and saved.get("guard") is not None:
            self.guard.load(saved["guard"])
        if saved.get("objective") is not None:
            self.objective.load(saved["objective"])


def _nothing() -> None:
    """Restores nothing."""
