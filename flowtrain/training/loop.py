"""The training loop: batch, loss, backward, clip, check, step. Everything optional hangs off it."""

import logging
import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flowtrain import distributed
from flowtrain.bijections.scale import BatchNorm, Standardize
from flowtrain.data.base import STEP_STREAM, Dataset, step_generator
from flowtrain.errors import CheckpointError, ConfigError, FlowtrainError, NonFiniteError
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.precision import narrowed, training_step
from flowtrain.scores import check_finite, held_out, log_probs
from flowtrain.solvers import record_solves
from flowtrain.training import checkpoint
from flowtrain.training.averaging import averaged
from flowtrain.training.ema import Ema
from flowtrain.training.guard import Guard
from flowtrain.training.metrics import Metrics
from flowtrain.training.schedule import LearningRate
from flowtrain.training.settings import Settings
from flowtrain.training.signals import StopSignals
from flowtrain.training.state import check_progress, moments
from flowtrain.training.trouble import STEP_ERRORS, Trouble, bad_update, dump

log = logging.getLogger("flowtrain")

NFE = ("nfe_forward", "nfe_backward")
NFE_WARNING = 1000
# of the steps, the share over which the tolerance warms up where the solver leaves it to the trainer
WARMUP = 2 / 3
# numbers in the batch that data-dependent parameters are set by, and rows at the most
INITIALIZATION, INITIALIZATION_ROWS = 2**23, 10_000
# what last.pt keeps of the trainer itself
PROGRESS = ("step", "seconds", "stale", "best", "val_nll", "began")
# an NFE so many times the median of the steps before is a spike, and how many those are at most
SPIKE, MEDIAN_OF = 3, 100

T = TypeVar("T")


class Failed(Enum):
    """What became of a step or a validation that failed: it was passed over, or the run went back."""

    SKIPPED = auto()
    REWOUND = auto()


Picture = Callable[[Flow, int, float], None]


class Trainer:
    """Trains `objective`, which wraps `flow`, on `data`; writes metrics and checkpoints into `run_dir`.

    All randomness of step s is keyed by (seed, s): a run resumed at s goes on exactly as if it had not stopped,
    and nothing random needs saving.

    With several ranks (see `flowtrain.distributed`), each takes its share of every batch, with noise of its own, and
    solves it by steps of its own; gradients are averaged, so that all make the same updates, and rank 0 writes.

    Args:
        config: the run's plain config, kept in every checkpoint.
        saved: a checkpoint of this run to go on from.
        picture: called with (flow, step, validation NLL) every `plot_every` steps.
        initialize: whether a new run sets what depends on its data; not where it begins from another run's weights.
    """

    def __init__(
        self,
        objective: Objective,
        flow: Flow,
        data: Dataset,
        settings: Settings,
        run_dir: Path,
        config: Mapping[str, Any],
        saved: Mapping[str, Any] | None = None,
        picture: Picture | None = None,
        initialize: bool = True,
    ) -> None:
        self.objective, self.flow, self.data = objective, flow, data
        self.settings, self.run_dir, self.config = settings, run_dir, config
        self.seed = int(config["seed"])
        self.picture = picture
        self.device = flow.like.device
        data.to(self.device)
        # of every batch, the rows that this rank has
        self.share = distributed.share(settings.batch_size)
        self.rows = self.share.stop - self.share.start
        if settings.batch_size < settings.accumulate * distributed.size():
            raise ConfigError(
                f"trainer.batch_size={settings.batch_size} over {distributed.size()} ranks leaves fewer rows to one "
                f"than the {settings.accumulate} parts of trainer.accumulate: give a larger one"
            )
        self.step, self.seconds, self.stale = 0, 0.0, 0
        # whether the likelihood's steps have
        self.began = False
        self.best: dict[str, float] | None = None
        self.val_nll = math.nan
        # of last.pt
        self.saved_step = self.step
        self.stopped_by: str | None = None
        # the number of the signal that did
        self.signal: int | None = None
        self.trouble = Trouble(settings.on_nonfinite, settings.max_rewinds)
        self.warned = False
        self.nfe: deque[int] = deque(maxlen=MEDIAN_OF)
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(flow.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        # the first step that solves, None where none does
        self.solves_from = objective.likelihood_from
        self.lr = LearningRate(settings, self.solves_from or 0)
        # by the learning rate where that has no end in sight
        self.tied = flow.solver is not None and flow.solver.warmup is None and settings.lr_decay == "plateau"
        if flow.solver is not None and flow.solver.warmup is None:
            flow.solver.warmup = round(WARMUP * (settings.steps - (self.solves_from or 0)))
        if flow.solver is not None and settings.precision != "float32":
            raise ConfigError(
                f"trainer.precision={settings.precision}: ODEs are solved in float32, because their error control "
                "would measure the rounding; leave it at float32 for a continuous flow"
            )
        self.guard = None if flow.solver is None else Guard(flow, flow.solver, settings.guard_every, self.warmed)
        if saved is None and initialize:
            self.initialize()
        elif saved is not None:
            self.load_weights(saved)
        distributed.make_alike(flow.state_dict().values())
        norms = [m for m in flow.modules() if isinstance(m, BatchNorm | _BatchNorm)]
        # which each rank would have of its own rows
        self.running = [b for m in norms for b in m.buffers()]
        self.ema = None if settings.ema is None else Ema(flow, settings.ema)
        if saved is not None:
            self.load_progress(saved)
        if settings.compile:
            self.compile()
        self.metrics = Metrics(run_dir / "metrics.jsonl", self.step, writes=distributed.is_first())

    def initialize(self) -> None:
        """Statistics and data-dependent parameters, from training data."""
        moments = self.data.statistics()
        for bijection in self.flow.bijection.modules():
            if isinstance(bijection, Standardize) and moments is not None:
                bijection.fit(*moments)
        rows = max(500, min(INITIALIZATION_ROWS, INITIALIZATION // math.prod(self.flow.event_shape)))
        x, label = self.batch(0, rows, slice(None))
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("the training data hold NaN or infinite values: remove those rows")
        self.flow.bijection.initialize(self.flow.dequantized(x), label)

    def batch(self, step: int, size: int, share: slice) -> tuple[Tensor, Tensor | None]:
        """Samples and, for a conditional flow, labels of a step, on the flow's device: those rows of the batch."""
        x = self.data.train_share(step, size, self.seed, share).to(self.device, non_blocking=True)
        label = self.data.labels_share(step, size, self.seed, share) if self.flow.classes is not None else None
        return x, None if label is None else label.to(self.device, non_blocking=True)

    def compile(self) -> None:
        """Compiles what is evaluated most: the fields of continuous flows, of discrete ones the whole loss."""
        parts = self.flow.continuous
        if parts and self.flow.classes is not None:
            raise ConfigError(
                "trainer.compile=true: the fields of a conditional flow are not compiled; set it to false"
            )
        for continuous in parts:
            continuous.compile_field()
        if not parts:
            self.objective.compile()

    def fit(self) -> None:
        """Runs to the last step, the time limit, early stopping or a signal; `stopped_by` says which but the first.

        Raises:
            FlowtrainError: a loss, gradient or solve that failed, before it touched the weights.
        """
        begun, before = time.perf_counter(), self.seconds
        s = self.settings
        with StopSignals() as signals, ExitStack() as stack:
            stack.enter_context(logging_redirect_tqdm([log]))
            # of tqdm's own variable, what is said here takes precedence
            hidden = True if os.environ.get("TQDM_DISABLE") or not distributed.is_first() else None
            bar = stack.enter_context(
                tqdm(total=s.steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)
            )
            if self.step == 0:
                # killed before the first validation, there is still something to go on from
                self.save_last()
            while self.step < s.steps and self.stopped_by is None:
                row = self.guarded(self.train_step, f"step {self.step + 1}")
                self.step += row is not Failed.REWOUND
                self.seconds = before + time.perf_counter() - begun
                if isinstance(row, dict):
                    self.measured(row, bar)
                bar.update(self.step - bar.n)
                out_of_time = s.time_limit is not None and time.perf_counter() - begun >= s.time_limit
                self.heed(signals.received, out_of_time)
                if row is not Failed.REWOUND:
                    self.after_step()
                self.seconds = before + time.perf_counter() - begun
            # a signal that came while the last step was validated and saved
            self.heed(signals.received, out_of_time=False)
        if self.saved_step != self.step:
            log.warning("the last checkpoint that could be written is of step %d, not %d", self.saved_step, self.step)

    def measured(self, row: dict[str, Any], bar: Any) -> None:
        """Logs what a step measured, where its turn has come."""
        self.trouble.skipped = 0
        self.watch_nfe(row)
        if self.step % self.settings.log_every == 0 or self.step == 1:
            self.metrics.write(step=self.step, split="train", nll=row.pop("nll"), seconds=self.seconds, **row)
            self.show(bar, row)

    def after_step(self) -> None:
        """Validates, saves and draws, where its turn has come or the run stops."""
        s = self.settings
        validate = partial(self.guarded, self.validate, f"the validation of step {self.step}")
        if self.step % s.val_every == 0 or self.step == s.steps:
            if validate() is Failed.REWOUND:
                return
            self.save_last()
        elif self.stopped_by:
            # saved first: resumed, the run must not know of a validation that it would not have made
            self.save_last()
            if self.signal is None:
                validate()
        if s.plot_every and self.step % s.plot_every == 0:
            self.draw()

    def heed(self, received: int | None, out_of_time: bool) -> None:
        """Ends the run after this step where any rank has had a signal, or has no time left."""
        received, late = (int(v) for v in distributed.largest([received or 0, out_of_time]))
        if late:
            self.stopped_by = "time limit"
        if received:
            self.signal, self.stopped_by = received, signal.Signals(received).name

    def guarded(self, action: Callable[[], T], what: str) -> T | Failed:
        """What an action gives; where it failed, what the policy has made of that."""
        try:
            return action()
        except distributed.RankLostError:
            raise
        except FlowtrainError as e:
            return self.failed(e, what)
        except RuntimeError as e:
            if not self.settings.compile or "torch._" not in f"{type(e).__module__}.":
                raise
            first = " ".join(str(e).split())[:300]
            raise ConfigError(
                f"trainer.compile=true: torch could not compile here: set it to false ({first} ...)"
            ) from e

    def kept(self, error: FlowtrainError) -> FlowtrainError:
        """The error of a step of this rank, before it touched the weights, and where its batch is now."""
        batch = self.batch(self.step, self.settings.batch_size, self.share)
        path = dump(self.run_dir, self.step + 1, *batch)
        return error if path is None else type(error)(f"{error} Its batch is in {path}.")

    def failed(self, error: FlowtrainError, what: str) -> Failed:
        """Does what the policy says of what failed, on whatever rank."""
        policy = self.trouble.policy_for(error)
        if policy == "skip":
            self.trouble.skipped += 1
            log.warning("%s is skipped: %s", what, error)
            return Failed.SKIPPED
        if policy == "rewind":
            self.rewind(f"{what}: {error}")
            return Failed.REWOUND
        if not isinstance(error, STEP_ERRORS):
            raise type(error)(f"{what}: {error} Go on with: flowtrain resume={self.run_dir}") from error
        # last.pt stays as it is: a step fails for its weights, and would fail again from those before it
        lr = self.settings.lr * self.trouble.lr_scale
        raise type(error)(
            f"{what}: {error} Go on from the last checkpoint, with a smaller learning rate: "
            f"flowtrain resume={self.run_dir} trainer.lr={lr / 2:g}"
        ) from error

    def rewind(self, why: str) -> None:
        """Back to the last checkpoint, with half of the learning rate from there on."""
        rewinds, halvings = self.trouble.rewinds + 1, self.trouble.halvings + 1
        saved = checkpoint.load(self.run_dir / "checkpoints/last.pt")
        self.load_weights(saved)
        self.load_progress(saved)
        self.trouble.rewinds, self.trouble.halvings, self.trouble.skipped = rewinds, halvings, 0
        if self.config["solver"] != saved["config"]["solver"]:
            # steps were made smaller since: what was best with the larger ones may owe itself to them
            self.best = None
        self.metrics.back_to(self.step)
        # now, so that a run killed before its next checkpoint does not begin with the old rate again
        self.save_last()
        log.warning(
            "%s Back to step %d with a learning rate %g times the one that was set (%d of at most %d times).",
            why,
            self.step,
            self.trouble.lr_scale,
            rewinds,
            self.trouble.max_rewinds,
        )

    def draw(self) -> None:
        if self.picture is not None and distributed.is_first():
            self.with_average(self.picture, self.flow, self.step, self.val_nll)

    def train_step(self) -> dict[str, Any]:
        """One update. The finite check costs one transfer to the host, beside the solver's, and comes before it."""
        begun = time.perf_counter()
        step, s = self.step, self.settings
        own = (distributed.rank(),) if distributed.rank() else ()
        seed = step_generator(self.seed, STEP_STREAM, step, *own).initial_seed()
        torch.manual_seed(seed)
        if self.solves_from is not None and step >= self.solves_from and not self.began:
            self.begin_anew()
        x, label = self.batch(step, s.batch_size, self.share)
        self.objective.train()
        lr = self.lr.at(step) * self.trouble.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # where the step solves
        guard = self.guard if self.solves_from is not None and step >= self.solves_from else None
        rtol, atol = (None, None) if guard is None else guard.tolerance_at(step)
        if s.compile:
            # CUDA graphs may overwrite what the step before left
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with record_solves() as solves, training_step(s.precision, self.device), ExitStack() as stack:
            if guard is not None:
                stack.enter_context(guard.solver.using(rtol=rtol, atol=atol))
            self.optimizer.zero_grad()
            try:
                self.objective.begin(step)
                failure, terms = None, self.backward(x, label)
            except STEP_ERRORS as e:
                failure, terms = e, {}
        # of one part: what a sample meets
        nfe = {name: sum(getattr(c, name) for c in solves) / s.accumulate for name in NFE if solves}
        shared = {name: x.new_tensor(n, dtype=torch.float32) for name, n in nfe.items() if distributed.size() > 1}
        norm, means = averaged(
            list(self.flow.parameters()), {**terms, **shared} if terms else {}, self.rows / s.batch_size
        )
        grad_norm, *values = torch.stack([norm, *means.values()]).tolist()
        row = dict(zip(means, values, strict=True))
        if failure is not None or not math.isfinite(grad_norm) or not math.isfinite(row["loss"]):
            raise self.blame(failure, terms, x)
        del row["loss"]
        nfe |= {name: row.pop(name) for name in shared}
        if s.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.flow.parameters(), s.clip_norm, norm)
        self.optimizer.step()
        distributed.make_alike(self.running)
        if self.ema is not None:
            self.ema.update()
        seconds = time.perf_counter() - begun
        first = math.ceil(len(x) / s.accumulate)
        if guard is not None and guard.check(step + 1, x[:first], seed, None if label is None else label[:first]):
            self.tightened()
        adaptive = guard is not None and guard.solver.adaptive
        return {
            "nll": None,
            **row,
            **(self.bits(row["nll"]) if "nll" in row else {}),
            "step_seconds": seconds,
            **{name: round(nfe[name]) if nfe else None for name in NFE},
            "grad_norm": grad_norm,
            "lr": lr,
            "rtol": rtol if adaptive else None,
            "atol": atol if adaptive else None,
        }

    def blame(self, failure: FlowtrainError | None, terms: Mapping[str, Tensor], x: Tensor) -> FlowtrainError:
        """What there is to say of a step without an update, the same on all ranks: where it failed, and why."""
        failure = failure or bad_update(self.flow, float(terms["loss"]), x)
        agreed = distributed.agreed(None if failure is None else self.kept(failure))
        return agreed or NonFiniteError("the sum of all ranks' gradients is not finite, though each of them is.")

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

    def bits(self, nll: float) -> dict[str, float]:
        """What a row says of an NLL in bits per dimension: nothing but for images."""
        factor = self.flow.bits_per_nat
        return {} if factor is None else {"bits_per_dim": factor * nll}

    def tightened(self) -> None:
        """Takes over a smaller step size, which holds in evaluation too, and so in every checkpoint's config."""
        solver = self.flow.solver
        if solver is None or solver.adaptive:
            return
        sized = {"step_size": solver.step_size, "steps": None}
        self.config = {**self.config, "solver": {**self.config["solver"], **sized}}
        # the best NLL so far may owe itself to the coarser steps, and no honest one would ever beat it
        self.best = None

    def show(self, bar: Any, row: dict[str, Any]) -> None:
        last = self.metrics.rows[-1]
        nfe = {} if row["nfe_forward"] is None else {"nfe": row["nfe_forward"] + row["nfe_backward"]}
        name = "nll" if last.get("nll") is not None else "matching" if "matching" in last else None
        loss = {} if name is None else {name: f"{last[name]:.3f}"}
        bar.set_postfix(**loss, val=f"{self.val_nll:.3f}", **nfe, refresh=False)

    def watch_nfe(self, row: dict[str, Any]) -> None:
        nfe = (row.get("nfe_forward") or 0) + (row.get("nfe_backward") or 0)
        if not nfe:
            return
        usual = statistics.median(self.nfe) if len(self.nfe) >= MEDIAN_OF // 10 else math.inf
        self.nfe.append(nfe)
        if nfe > SPIKE * usual:
            log.warning("step %d: NFE %d, where %g was usual before", self.step, nfe, usual)
        if nfe > NFE_WARNING and not self.warned:
            self.warned = True
            log.warning(
                "step %d: NFE %d passed %d, the field is getting hard to solve. Try a looser solver.rtol, a smaller "
                "trainer.lr or more trainer.weight_decay.",
                self.step,
                nfe,
                NFE_WARNING,
            )

    def validate(self) -> None:
        """NLL on the fixed validation set at the final tolerance; keeps the best checkpoint."""
        self.flow.eval()
        self.val_nll = self.validation_nll()
        self.metrics.write(
            step=self.step, split="val", nll=self.val_nll, seconds=self.seconds, **self.bits(self.val_nll)
        )
        # a NaN is never an improvement
        improved = self.val_nll < (math.inf if self.best is None else self.best["nll"])
        self.lr.validated(improved)
        # what is still being tightened has not settled
        self.stale = 0 if improved or not self.settled() else self.stale + 1
        # the best is what is on the disk, as all ranks hear
        if improved and self.keep("best", self.inference_state()):
            self.best = {"nll": self.val_nll, "step": self.step}
        if self.settings.patience is not None and self.stale >= self.settings.patience:
            self.stopped_by = self.stopped_by or f"early stopping after {self.stale} validations without a new best"

    def validation_nll(self) -> float:
        """In nats, over the validation set, of which each rank scores its share."""
        # a step that was skipped has left each rank with its own
        distributed.make_alike(self.running)
        x, label = held_out(self.flow, self.data, "val")
        x = x[: self.settings.val_size]
        share = distributed.share(len(x))
        label = None if label is None else label[share]
        log_p, failure = torch.zeros(0, dtype=torch.float64), None
        try:
            if len(x[share]):
                log_p = self.with_average(log_probs, self.flow, x[share], label, seed=distributed.rank())
            check_finite(log_p, "val", share.start)
        except FlowtrainError as e:
            failure = e
        total, n, failures = distributed.summed([log_p.sum().item(), len(log_p), failure is not None])
        if failures:
            raise distributed.agreed(failure) or NonFiniteError("the validation failed")
        return -total / n

    def begin_anew(self) -> None:
        """The likelihood's first step: another loss, for which the optimizer's moments are of no use.

        After steps of another objective it begins at their average.
        """
        self.began = True
        if not self.step:
            return
        self.optimizer.state.clear()
        self.lr.begin_anew()
        self.stale = 0
        if self.ema is not None:
            self.ema.begin_anew()

    def warmed(self, step: int) -> float:
        """How many steps of the tolerance's warm-up a step has behind it.

        With lr_decay=plateau, where nothing says how many are to come, it goes with the halvings of the learning rate.
        """
        solver = self.flow.solver
        if self.tied and solver is not None:
            return self.lr.settled * (solver.warmup or 0)
        return max(0, step - (self.solves_from or 0))

    def settled(self) -> bool:
        """Whether a validation without a new best counts towards early stopping: not while tolerances tighten."""
        solver = self.flow.solver
        if self.settings.lr_decay == "plateau" and self.lr.settled < 1:
            return False
        if solver is None or self.solves_from is None:
            return True
        return self.step >= self.solves_from and self.warmed(self.step) >= (solver.warmup or 0)

    def with_average(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Calls a function while the flow holds its averaged weights, where there are any."""
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            return function(*arguments, **named)

    def inference_state(self) -> dict[str, Any]:
        return {
            "config": dict(self.config),
            "event_shape": list(self.flow.event_shape),
            "samples": asdict(self.data.samples),
            "step": self.step,
            "weights": self.flow.state_dict(),
            "ema": None if self.ema is None else self.ema.state(),
        }

    def save_last(self) -> None:
        guard = None if self.guard is None else self.guard.state()
        rest: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "lr": self.lr.state(), "guard": guard}
        rest |= {key: getattr(self, key) for key in PROGRESS}
        rest["trouble"] = self.trouble.state()
        rest["histories"] = [h.steps for h in self.flow.histories]
        if self.keep("last", {**self.inference_state(), **rest}):
            self.saved_step = self.step

    def keep(self, name: str, state: dict[str, Any]) -> bool:
        """Whether rank 0 has written the checkpoint.

        A disk that is full does not end a run, which has the one before.
        """
        written = True
        try:
            if distributed.is_first():
                checkpoint.save(self.run_dir / f"checkpoints/{name}.pt", state)
        except OSError as e:
            if self.step == 0:
                raise
            log.warning(
                "step %d: checkpoints/%s.pt could not be written (%s). The one before it stays, and the run goes on.",
                self.step,
                name,
                e,
            )
            written = False
        return distributed.from_first(written)

    def load_weights(self, saved: Mapping[str, Any]) -> None:
        try:
            self.flow.load_state_dict(saved["weights"])
        except RuntimeError as e:
            first = " ".join(str(e).split())[:160]
            raise CheckpointError(
                f"the run cannot go on with this config, its weights are of another model ({first} ...): "
                "leave model.* as it was"
            ) from e
        # its settings are those of this run, which may be others
        groups = self.optimizer.state_dict()["param_groups"]
        state = moments(saved["optimizer"], list(self.flow.parameters()))
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load_progress(self, saved: Mapping[str, Any]) -> None:
        check_progress(saved, self.flow)
        self.lr.load(saved["lr"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load(saved["ema"])
        if self.guard is not None and saved.get("guard") is not None:
            self.guard.load(saved["guard"])
        if "trouble" in saved:
            self.trouble.load(saved["trouble"])
        if saved["config"]["trainer"].get("lr") != self.settings.lr:
            # a rate that the user chose in the light of what had happened
            self.trouble.halvings = 0
        for key in PROGRESS:
            # a run of an older flowtrain has only ever solved
            setattr(self, key, saved.get(key, True) if key == "began" else saved[key])
        # a run of an older flowtrain begins its solves anew
        for history, steps in zip(self.flow.histories, saved.get("histories", ()), strict=False):
            history.steps = [(length, suited) for length, suited in steps]
        self.saved_step = self.step
