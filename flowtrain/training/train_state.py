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
from flowtrain.training.batches import Batch
from flowtrain.training.ema import Ema
from flowtrain.training.resume_validation import moments
from flowtrain.training.schedules import LearningRate, ScheduleClock
from flowtrain.training.settings import Settings
from flowtrain.training.solver_guard import SolverGuard
from flowtrain.utils import ranks

# of the steps, the share over which the tolerance warms up where the solver leaves it to the trainer
WARMUP = 2 / 3


class TrainState:
    """Optimizer, learning rate, average and guard of a flow whose weights are those that training begins with.

    Args:
        schedule_clock: the position of the learning rate and tolerance schedules.

    Attributes:
        solves_from: the first step that solves the ODE, None where none does.
        tied: whether the tolerance warms up with the learning rate, which has no end in sight.
        running: the running statistics of batch norms, which each rank would have of its own rows.
        ema, guard: None where there is none.
    """

    def __init__(self, objective: Objective, flow: Flow, settings: Settings, schedule_clock: ScheduleClock) -> None:
        self.flow, self.settings, self.schedule_clock = flow, settings, schedule_clock
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(flow.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.solves_from = objective.likelihood_from
        self.lr = LearningRate(settings, self.solves_from or 0)
        self.tied = flow.solver is not None and flow.solver.warmup is None and settings.lr_decay == "plateau"
        self.guard = None
        if flow.solver is not None:
            end_time = objective.regularizer.end_time
            self.guard = SolverGuard(flow, settings.guard_every, lambda: self.warmup, self.warmed, end_time)
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
        """Makes the likelihood take over at that step, earlier than planned."""
        self.solves_from = self.lr.again = step

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr.at(step, self.schedule_clock.at(step))

    def solves(self, step: int) -> bool:
        """Whether that step of training solves the ODE, and maximizes the likelihood."""
        return self.solves_from is not None and step >= self.solves_from

    def set_rate(self, lr: float) -> None:
        """Sets the learning rate of the update to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def apply(self) -> None:
        """Updates the weights and their average. All ranks take the running statistics of rank 0."""
        self.optimizer.step()
        ranks.broadcast(self.running)
        if self.ema is not None:
            self.ema.update()

    @torch.no_grad()
    def keep_running(self) -> Callable[[], None]:
        """Copies the running statistics of batch norms, and returns a function that restores the copy.

        A forward pass in training mode updates them before the loss is known to be finite. Without batch norms, both
        calls do nothing.
        """
        kept = [buffer.clone() for buffer in self.running]

        @torch.no_grad()
        def restore() -> None:
            for buffer, value in zip(self.running, kept, strict=True):
                buffer.copy_(value)

        return restore

    def begin_anew(self) -> None:
        """Before another loss: it begins at the average, and the optimizer's moments are of no use to it."""
        self.optimizer.state.clear()
        self.lr.begin_anew()
        if self.ema is not None:
            self.ema.begin_anew()

    def with_average(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Calls a function while the flow holds its averaged weights, where there are any."""
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            return function(*arguments, **named)

    # the tolerance of training, and the guard's look at what comes of it

    def options(self, step: int) -> SolveOptions:
        """How a step of training solves the ODE."""
        if self.guard is None or not self.solves(step):
            return AS_CONFIGURED
        rtol, atol = self.guard.tolerance_at(step)
        return SolveOptions(rtol=rtol, atol=atol)

    def tolerance(self, step: int) -> dict[str, float | None]:
        """What the row of a step says of it: None of fixed steps, and where nothing is solved."""
        if self.guard is None or not self.guard.solver.adaptive or not self.solves(step):
            return {"rtol": None, "atol": None}
        return dict(zip(("rtol", "atol"), self.guard.tolerance_at(step), strict=True))

    def check_solver(self, step: int, batch: Batch) -> bool:
        """Has the guard look at the solver, where its turn has come after that step: whether it has tightened it."""
        if self.guard is None or not self.solves(step):
            return False
        # of several parts the first: there is memory for one
        part = slice(math.ceil(len(batch.x) / self.settings.accumulate))
        label = None if batch.label is None else batch.label[part]
        # the guard's forward passes run in training mode and must not change the running statistics
        restore = self.keep_running()
        try:
            return self.guard.check(step + 1, batch.x[part], batch.seed, label)
        finally:
            restore()

    def warmed(self, step: int) -> float:
        """How many steps of the tolerance's warm-up a step has behind it.

        With lr_decay=plateau, where nothing says how many are to come, it goes with the halvings of the learning rate.
        """
        solver = self.flow.solver
        if self.tied and solver is not None:
            return self.lr.settled * self.warmup
        return max(0, self.schedule_clock.at(step) - (self.solves_from or 0))

    def settled(self, step: int) -> bool:
        """Whether a validation without a new best counts towards early stopping: not while tolerances tighten."""
        solver = self.flow.solver
        if self.settings.lr_decay == "plateau" and self.lr.settled < 1:
            return False
        if solver is None or self.solves_from is None:
            return True
        return self.solves(step) and self.warmed(step) >= self.warmup

    def may_overfit(self, step: int) -> bool:
        """Whether a rise of the validation NLL after that step means overfitting.

        False before the learning rate of the likelihood has warmed up, and while a plateau may still lower it.
        """
        if self.solves_from is None or step < self.solves_from + self.settings.lr_warmup:
            return False
        return self.settings.lr_decay != "plateau" or self.lr.settled >= 1

    # of last.pt

    def state(self) -> dict[str, Any]:
        """What is not among the weights; `ema` goes with those, into every checkpoint."""
        guard = None if self.guard is None else self.guard.state()
        return {"optimizer": self.optimizer.state_dict(), "lr": self.lr.state(), "guard": guard}

    def load_moments(self, saved: Mapping[str, Any]) -> None:
        """The optimizer's, not its settings: they are those of this run, which may be others."""
        groups = self.optimizer.state_dict()["param_groups"]
        state = moments(saved["optimizer"], list(self.flow.parameters()))
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load(self, saved: Mapping[str, Any]) -> None:
        """The rest, once it has been checked."""
        self.lr.load(saved["lr"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load(saved["ema"])
        if self.guard is not None and saved.get("guard") is not None:
            self.guard.load(saved["guard"])
