"""The training loop: updates, solver guard, metrics, validations, checkpoints, pictures and stopping."""

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
    """Trains `objective`, which wraps `flow`, on `data`. Writes metrics and checkpoints into `run_dir`, if it is given.

    All random numbers of step s are generated from (seed, s). An interruption therefore does not change the result of a
    resumed run, and no random state is saved.

    With several ranks (see `flowtrain.utils.ranks`), each rank has its own share of every batch, its own noise and its
    own solver steps. Gradients are averaged, so that all ranks make the same updates. Only rank 0 writes files.

    Args:
        config: the run's plain config, stored in every checkpoint.
        saved: a checkpoint of this run to resume from.
        picture: called with (flow, step, validation NLL) every `plot_every` steps.
        initialize: whether a new run performs data-dependent initialization. False if the flow has another run's
            weights.
        time_budget: the time budget of the whole command. Training leaves time for the evaluation after it.

    Attributes:
        stopped_by: the reason if the run ended before its last step, else None.
        signal: the number of the signal that ended the run, else None.
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
        initialization.check_cuda_graphs(objective, flow, settings)
        self.objective = objective
        self.schedule_clock = ScheduleClock(self.progress, settings.steps, objective.likelihood_from or 0)
        # the first optimizer of a process makes torch import its compiler, which takes seconds
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
        # the time at which this command began to train
        self.begun = time.perf_counter()

    @property
    def limit(self) -> float | None:
        """Time limit of this command's training in seconds; None: no limit."""
        limits = [] if self.settings.time_limit is None else [self.settings.time_limit]
        if self.time_budget is not None:
            limits.append(time.perf_counter() - self.begun + self.time_budget.for_training)
        return min(limits, default=None)

    # public attributes

    @property
    def step(self) -> int:
        """The number of updates so far, including skipped ones."""
        return self.progress.step

    @property
    def seconds(self) -> float:
        """Training time in seconds, summed over all commands that resumed the run."""
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
        """The step of last.pt."""
        return self.checkpoints.saved_step

    def read(self) -> dict[str, Any]:
        """Returns the best checkpoint, or the last checkpoint if there was no validation yet."""
        return self.checkpoints.read()

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's config, with changes made during training: a reduced step size, and keys of the objective."""
        return self.checkpoints.config

    def summary(self, best: int) -> str:
        """Summarizes training: the best step and advice. `best` is the step of best.pt."""
        d = math.prod(self.flow.event_shape)
        hint = advice(self.metrics.rows, best, self.step, d, self.data.n_train is not None, self.config)
        return best_step(best, self.step) + (f" ({hint})" if hint else "")

    # the loop

    def fit(self, name: str | None = None) -> None:
        """Trains until the last step, or until the time limit, early stopping or a signal, which set `stopped_by`.

        Args:
            name: the name of the flow, shown next to the progress counter. With a name, the counter shows no total.

        Raises:
            FlowtrainError: a loss, gradient or solve failed. The step did not change the weights.
        """
        begun, before = time.perf_counter(), self.seconds
        s, p = self.settings, self.progress
        self.begun = begun
        self.schedule_clock.begin()
        self.budget()
        with StopSignals() as signals, progress_bar(s.steps, p.step, name) as bar:
            if p.step == 0:
                # saved here, so that a run that is killed before its first validation can be resumed
                self.checkpoints.write_last()
                if self.validation_schedule.validates_early(0) and p.best is None:
                    # drops a validation row of an earlier process that was killed before it saved a checkpoint
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
            # for a signal received while the last step was validated and saved
            self.check_for_stop(signals.received, out_of_time=False)
        if self.saved_step != p.step:
            log.warning("last.pt contains step %d: the checkpoint of step %d was not written", self.saved_step, p.step)

    def budget(self) -> None:
        """Measures the time to score rows, and limits the rows of a validation to the time budget."""
        if self.time_budget is None:
            return
        self.time_budget.probe()
        # a resumed run keeps its validation rows, because its best NLL is comparable only on the same rows
        if self.best is None:
            self.validation.size = ranks.broadcast_object(self.time_budget.val_rows(self.settings.val_size))
            self.time_budget.most_val = self.validation.size

    def train_step(self) -> Row:
        """Makes one update and runs the solver guard. Returns the measurements of the step."""
        step = self.step
        if self.train_state.solves(step) and not self.progress.began:
            self.start_likelihood()
        row, batch = self.update.take(step, self.train_state.rate(step) * self.failure_policy.lr_scale)
        with status("checking the solver's error"):
            too_coarse = self.train_state.check_solver(step, batch)
        if too_coarse:
            self.checkpoints.keep_step_size()
        return row

    def start_likelihood(self) -> None:
        """Prepares the first step that maximizes the likelihood.

        After another objective, the weights are set to their moving average.
        """
        self.progress.began = True
        if self.step:
            self.train_state.restart()
            self.progress.stale, self.progress.worse = 0, []

    def measured(self, row: Row, bar: Status) -> None:
        """Processes the measurements of a step: warns about the NFE, and logs every `log_every` steps."""
        self.failure_policy.skipped = 0
        self.watch.check(self.step, row)
        if self.step % self.settings.log_every == 0 or self.step == 1:
            nll = row.pop("nll")
            self.metrics.write(step=self.step, split="train", nll=nll, seconds=self.seconds, **row)
            show(bar, self.metrics.rows[-1], self.progress.val_nll, self.flow.bits_per_nat)

    def check_for_stop(self, received: int | None, out_of_time: bool) -> None:
        """Sets `stopped_by` if any rank has received a signal or has no time left. Advances the schedules."""
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
            and self.objective.switch_to_likelihood(self.step)
        ):
            log.info("step %d: half of the time limit has passed; training continues with the likelihood", self.step)
            self.schedule_clock.change_now(elapsed)
            self.train_state.solve_from(self.step)
            self.checkpoints.keep_objective(self.objective.pinned)

    def after_step(self) -> None:
        """Validates, saves and draws if these are due after this step, or if the run stops."""
        validate = partial(self.recovery.guarded, self.validate, f"the validation of step {self.step}")
        if self.validation_schedule.validates(self.step):
            if validate() is Failed.REWOUND:
                return
            self.checkpoints.write_last()
        elif self.validation_schedule.validates_early(self.step):
            if not self.validate_early() and self.stopped_by:
                self.checkpoints.write_last()
        elif self.stopped_by:
            # the checkpoint is saved before the validation, because a run that is not stopped would not validate at
            # this step
            self.checkpoints.write_last()
            if self.signal is None:
                validate()
        if self.validation_schedule.draws(self.step):
            self.draw()

    def validate(self) -> None:
        """Runs a regular validation. Sets `stopped_by` if the NLL has stopped improving or has clearly risen."""
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
        self.checkpoints.write_last()
        return True

    def draw(self) -> None:
        """Draws a picture with the averaged weights, if there are any."""
        if self.picture is not None and ranks.is_first():
            with status("drawing samples"):
                self.train_state.with_average(self.picture, self.flow, self.step, self.progress.val_nll)
