"""The training loop: update, guard, and what hangs off it: rows, validations, checkpoints, pictures, ends."""

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowtrain.data.base import Dataset
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.training import initialization
from flowtrain.training.batches import Batches
from flowtrain.training.checkpoint_manager import CheckpointManager, load_weights
from flowtrain.training.failure_policy import STEP_ERRORS, FailurePolicy
from flowtrain.training.metrics import Metrics
from flowtrain.training.progress import NfeWatch, Progress, progress_bar, show
from flowtrain.training.recovery import Failed, Recovery
from flowtrain.training.schedules import ScheduleClock, ValidationSchedule, early_validations
from flowtrain.training.settings import Settings
from flowtrain.training.time_budget import TimeBudget
from flowtrain.training.train_state import TrainState
from flowtrain.training.update import Row, Update
from flowtrain.training.validation import Validation, advice, best_step
from flowtrain.utils import ranks
from flowtrain.utils.process import StopSignals
from flowtrain.utils.status import Status, phase, status

log = logging.getLogger("flowtrain")

Picture = Callable[[Flow, int, float], None]


class Trainer:
    """Trains `objective`, which wraps `flow`, on `data`; writes metrics and checkpoints into `run_dir` if there is one.

    All randomness of step s is keyed by (seed, s): a run resumed at s goes on exactly as if it had not stopped,
    and nothing random needs saving.

    With several ranks (see `flowtrain.utils.ranks`), each takes its share of every batch, with noise of its own, and
    solves it by steps of its own; gradients are averaged, so that all make the same updates, and rank 0 writes.

    Args:
        config: the run's plain config, kept in every checkpoint.
        saved: a checkpoint of this run to go on from.
        picture: called with (flow, step, validation NLL) every `plot_every` steps.
        initialize: whether a new run sets what depends on its data; not where it begins from another run's weights.

        time_budget: the time budget of the whole command; training leaves time for what follows it.

    Attributes:
        stopped_by: what has ended the run before its last step, or None.
        signal: the number of the signal that did.
    """

    def __init__(
        self,
        objective: Objective,
        flow: Flow,
        data: Dataset,
        settings: Settings,
        run_dir: Path | None,
        config: Mapping[str, Any],
        saved: Mapping[str, Any] | None = None,
        picture: Picture | None = None,
        initialize: bool = True,
        time_budget: TimeBudget | None = None,
    ) -> None:
        self.flow, self.data, self.settings, self.run_dir, self.picture = flow, data, settings, run_dir, picture
        self.time_budget = time_budget
        initialization.check_trainable(flow, settings)
        batches = Batches(flow, data, settings.batch_size, int(config["seed"]))
        if saved is not None:
            load_weights(flow, saved)
        elif initialize:
            with phase("initializing the model from data"):
                initialization.initialize(flow, batches, time_budget)
        ranks.broadcast(flow.state_dict().values())
        self.progress, self.failure_policy = Progress(), FailurePolicy(settings.on_nonfinite, settings.max_rewinds)
        self.objective = objective
        self.schedule_clock = ScheduleClock(self.progress, settings.steps, objective.likelihood_from or 0)
        # the first optimizer makes torch load its compiler, which takes seconds
        with status("preparing the optimizer"):
            self.train_state = TrainState(objective, flow, settings, self.schedule_clock)
        self.checkpoints = CheckpointManager(
            run_dir, config, data.samples, self.train_state, self.failure_policy, self.progress
        )
        if saved is not None:
            self.checkpoints.load(saved)
        if settings.compile:
            initialization.compile_parts(objective, flow)
        path = run_dir / "metrics.jsonl" if run_dir is not None and ranks.is_first() else None
        self.metrics = Metrics(path, self.step)
        self.update = Update(objective, self.train_state, batches, settings, run_dir)
        self.validation = Validation(self.train_state, data, settings, self.progress, self.metrics, self.checkpoints)
        early = early_validations(settings, data.n_train, self.train_state.solves_from != 0)
        self.validation_schedule = ValidationSchedule(settings, early if objective.start_counts else frozenset())
        self.recovery = Recovery(self.failure_policy, self.checkpoints, self.metrics, settings)
        self.watch = NfeWatch()
        self.stopped_by: str | None = None
        self.signal: int | None = None
        # when this command began to train
        self.begun = time.perf_counter()

    @property
    def limit(self) -> float | None:
        """Seconds of training that this command may take; None: no limit."""
        limits = [] if self.settings.time_limit is None else [self.settings.time_limit]
        if self.time_budget is not None:
            limits.append(time.perf_counter() - self.begun + self.time_budget.for_training)
        return min(limits, default=None)

    # what others ask of a run

    @property
    def step(self) -> int:
        """Updates so far, those that were skipped included."""
        return self.progress.step

    @property
    def seconds(self) -> float:
        """Of training, over all the times that the run was resumed."""
        return self.progress.seconds

    @property
    def best(self) -> dict[str, float] | None:
        """The NLL in nats and the step of best.pt."""
        return self.progress.best

    @property
    def device(self) -> torch.device:
        """The device of the flow."""
        return self.flow.like.device

    @property
    def saved_step(self) -> int:
        """That of last.pt."""
        return self.checkpoints.saved_step

    def read(self) -> dict[str, Any]:
        """The best checkpoint; the last one before the first validation."""
        return self.checkpoints.read()

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's, with a step size that the guard may have made smaller."""
        return self.checkpoints.config

    def course(self, best: int) -> str:
        """A summary of training: the best step, and what may help. `best` is the step of best.pt."""
        d = math.prod(self.flow.event_shape)
        hint = advice(self.metrics.rows, best, self.step, d, self.data.n_train is not None, self.config)
        return best_step(best, self.step) + (f" ({hint})" if hint else "")

    # the loop

    def fit(self, name: str | None = None) -> None:
        """Runs to the last step, the time limit, early stopping or a signal; `stopped_by` says which but the first.

        Args:
            name: the name of the flow beside the progress bar, which then counts without an end. None: no name.

        Raises:
            FlowtrainError: a loss, gradient or solve that failed, before it touched the weights.
        """
        begun, before = time.perf_counter(), self.seconds
        s, p = self.settings, self.progress
        self.begun = begun
        self.schedule_clock.begin()
        self.budget()
        with StopSignals() as signals, progress_bar(s.steps, p.step, name) as bar:
            if p.step == 0:
                # killed before the first validation, there is still something to go on from
                self.checkpoints.last()
                if self.validation_schedule.validates_early(0) and p.best is None:
                    # drops a row that an earlier process wrote without saving it in a checkpoint
                    self.metrics.back_to(-1)
                    self.validate_early()
            while p.step < s.steps and self.stopped_by is None:
                row = self.recovery.guarded(self.train_step, f"step {p.step + 1}")
                p.step += row is not Failed.REWOUND
                p.seconds = before + time.perf_counter() - begun
                if isinstance(row, dict):
                    self.measured(row, bar)
                bar.advance(p.step - bar.n)
                limit = self.limit
                if self.time_budget is not None and limit is not None:
                    self.time_budget.probe_again(time.perf_counter() - begun, limit)
                self.check_for_stop(signals.received, limit is not None and time.perf_counter() - begun >= limit)
                if row is not Failed.REWOUND:
                    self.after_step()
                p.seconds = before + time.perf_counter() - begun
            # a signal that came while the last step was validated and saved
            self.check_for_stop(signals.received, out_of_time=False)
        if self.saved_step != p.step:
            log.warning("the last checkpoint that could be written is of step %d, not %d", self.saved_step, p.step)

    def budget(self) -> None:
        """Measures the time to score rows, and limits the rows of a validation to fit the time budget."""
        if self.time_budget is None:
            return
        self.time_budget.probe()
        # an earlier best NLL can only be compared on the same rows
        if self.best is None:
            self.validation.size = ranks.broadcast_object(self.time_budget.val_rows(self.settings.val_size))
            self.time_budget.most_val = self.validation.size

    def train_step(self) -> Row:
        """One update, and the guard's look at it."""
        step = self.step
        if self.train_state.solves(step) and not self.progress.began:
            self.begin_anew()
        row, batch = self.update.take(step, self.train_state.rate(step) * self.failure_policy.lr_scale)
        with status("checking the solver's error"):
            too_coarse = self.train_state.check_solver(step, batch)
        if too_coarse:
            self.checkpoints.keep_step_size()
        return row

    def begin_anew(self) -> None:
        """The likelihood's first step: after steps of another objective it begins at their average."""
        self.progress.began = True
        if self.step:
            self.train_state.begin_anew()
            self.progress.stale, self.progress.worse = 0, []

    def measured(self, row: Row, bar: Status) -> None:
        """Logs what a step measured, where its turn has come."""
        self.failure_policy.skipped = 0
        self.watch.see(self.step, row)
        if self.step % self.settings.log_every == 0 or self.step == 1:
            nll = row.pop("nll")
            self.metrics.write(step=self.step, split="train", nll=nll, seconds=self.seconds, **row)
            show(bar, self.metrics.rows[-1], self.progress.val_nll, self.flow.bits_per_nat)

    def check_for_stop(self, received: int | None, out_of_time: bool) -> None:
        """Ends the run after this step where any rank has had a signal, or has no time left."""
        elapsed = time.perf_counter() - self.begun
        signalled, late, position = ranks.largest(
            [received or 0, out_of_time, self.schedule_clock.reached(elapsed, self.limit)]
        )
        if late:
            self.stopped_by = "time limit"
        if signalled:
            self.signal, self.stopped_by = int(signalled), signal.Signals(int(signalled)).name
        if (
            self.schedule_clock.advance(position, elapsed)
            and not self.stopped_by
            and self.objective.take_over(self.step)
        ):
            log.info("step %d: half of the time limit has passed; the likelihood takes over", self.step)
            self.schedule_clock.change_now(elapsed)
            self.train_state.solve_from(self.step)
            self.checkpoints.keep_objective(self.objective.pinned)

    def after_step(self) -> None:
        """Validates, saves and draws, where its turn has come or the run stops."""
        validate = partial(self.recovery.guarded, self.validate, f"the validation of step {self.step}")
        if self.validation_schedule.validates(self.step):
            if validate() is Failed.REWOUND:
                return
            self.checkpoints.last()
        elif self.validation_schedule.validates_early(self.step):
            if not self.validate_early() and self.stopped_by:
                self.checkpoints.last()
        elif self.stopped_by:
            # saved first: resumed, the run must not know of a validation that it would not have made
            self.checkpoints.last()
            if self.signal is None:
                validate()
        if self.validation_schedule.draws(self.step):
            self.draw()

    def validate(self) -> None:
        """Scores the validation set. Ends a run whose NLL has stopped improving or has clearly risen."""
        with status("validating"):
            self.validation.run()
        if self.time_budget is not None:
            self.time_budget.scored(len(self.validation.scored), self.validation.seconds)
        if self.validation.risen and self.best is not None:
            now, best = self.progress.val_nll, self.best
            self.stopped_by = self.stopped_by or (
                f"early stopping: the validation NLL is {now:.4g} nats and rising, after {best['nll']:.4g} at step "
                f"{best['step']}"
            )
        if self.validation.out_of_patience:
            stale = self.progress.stale
            self.stopped_by = self.stopped_by or f"early stopping after {stale} validations without a new best"

    def validate_early(self) -> bool:
        """Runs an early validation and saves. Returns whether it succeeded.

        A failure only causes a warning, because early validations are optional.
        """
        try:
            self.validation.run(regular=False)
        except STEP_ERRORS as e:
            log.warning("the early validation of step %d failed and is skipped: %s", self.step, e)
            return False
        self.checkpoints.last()
        return True

    def draw(self) -> None:
        """A picture of the averaged weights, where there are any."""
        if self.picture is not None and ranks.is_first():
            with status("drawing samples"):
                self.train_state.with_average(self.picture, self.flow, self.step, self.progress.val_nll)
