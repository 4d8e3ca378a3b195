"""model=auto: searches for the best density of a table, by successive halving and stacking.

The search fits a Gaussian and a mixture first. Then each flow in `flowtrain.runs.candidates.recommended` trains for an
equal first part, which is one sixth of the time of the best flow. The flows are ranked by validation NLL without the
worst 1% of the rows. The best flow gets the time that is left. If it stops early, the others continue in the order of
their rank. This is similar to successive halving (Jamieson and Talwalkar 2016, Non-stochastic best arm identification
and hyperparameter optimization). Any remaining time is used for further seeds of the best model.

The result is the ensemble of all candidates, log p(x) = log sum_m w_m p_m(x), with weights by EM on the validation rows
(stacking: Smyth and Wolpert 1999, Linearly combining density estimators via stacking). A candidate is left out if the
validation NLL rises by at most 0.002 nats without it.
"""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.types import circular_columns
from flowtrain.evaluation import NAMES
from flowtrain.flow import Density, Flow, Record
from flowtrain.models.ensemble import Ensemble, sparse_weights, stacked
from flowtrain.plotting.options import DEFAULTS, PlotOptions
from flowtrain.runs import auto_settings, build, load
from flowtrain.runs.auto_settings import AUTO
from flowtrain.runs.banner import as_banner, describe_device, describe_samples
from flowtrain.runs.candidates import CIRCULAR, Candidate, recommended
from flowtrain.runs.components import resolve_components
from flowtrain.runs.compose import options, values_of, with_choices
from flowtrain.runs.console import data_name, prefixed, shortest
from flowtrain.runs.ensembles import validation_log_probs, validation_rows, validation_weights
from flowtrain.runs.prepare import (
    NOTHING_GIVEN,
    Parts,
    check_same,
    check_unchanged,
    data_like,
    objective_of,
    prepare,
)
from flowtrain.runs.run_directory import SEARCH_FOLDER, SEARCH_STATE, holds_run
from flowtrain.runs.save import content_of
from flowtrain.runs.tails import resolve_df
from flowtrain.training import checkpoint, checkpoint_files, tensorboard
from flowtrain.training.metrics import Metrics, in_bits
from flowtrain.training.metrics import read as read_metrics
from flowtrain.training.time_budget import TimeBudget
from flowtrain.utils import ranks
from flowtrain.utils.arguments import choose, flag, number, whole
from flowtrain.utils.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FlowtrainError,
    UnfinishedError,
    first_line,
)
from flowtrain.utils.files import config_dir, write_json
from flowtrain.utils.formatting import counted, resume_command, with_error
from flowtrain.utils.process import SignalReceived, choose_threads, ended_by_signals
from flowtrain.utils.status import phase, status
from flowtrain.utils.weighting import average, stderr

log = logging.getLogger("flowtrain")

# `Trainer.stopped_by` if a trainer has reached its time limit
OUT_OF_TIME = "time limit"
# the key in a checkpoint for the config of its search
SEARCH = "search"
# models that are fitted first, each with its largest share of the time limit
CHEAP = {"affine": 0.05, "mixture": 0.15}
# FINALISTS: without a time limit, the number of flows that are trained to the end. FIRST_PART: every flow first trains
# for this share of the total time of the best flow. The learning rate schedule ends with this part, because flows are
# not comparable while the learning rate is high. In the second part, the schedule restarts. Validation NLL after 60 s
# on one thread if only the best flow continues, and if the two best flows continue: gas -7.80 and -7.45, pendigits
# -31.2 and -31.3, annthyroid -20.23 and -20.25
FINALISTS, FIRST_PART = 2, 1 / 6
# a ranking leaves out this share of the validation rows, the rows with the lowest log p
TRIMMED = 0.01
# largest number of further seeds; the search ends when a seed lowers the validation NLL by less than GAIN nats
SEEDS, GAIN = 3, 0.005
# from this number of training rows on, flows train for as many steps as the time allows, at most LONG
LARGE, LONG = 5_000, 100_000
# largest number of validation rows for the scores of the candidates
ROWS = 10_000
# no further candidate begins if less than this share of the time limit is left
LEAST_SHARE = 0.03
# the share of `time_budget` for the search, until the time to score a row is measured
SEARCH_SHARE = 0.6
# time for the choice of the mixture: the share of the time left, and the least seconds
COMPONENTS_SHARE, COMPONENTS_LEAST = 0.15, 1.0


def is_search(config: Mapping[str, Any]) -> bool:
    """Returns whether the config of a run asks for a search."""
    return config["model"].get("name") == AUTO and "_target_" not in config["model"]


class Search:
    """A run that fits several models to a table and makes an ensemble of them, see `flowtrain.runs.search`.

    Results are stored in RUN/search/search.json as soon as they are known, and the checkpoints of each candidate in
    RUN/search/NAME. The checkpoint of the run contains the ensemble so far. A resumed search does not repeat finished
    work. With `trainer.steps` and without `trainer.time_limit`, no decision depends on time, and an interruption does
    not change the result.

    `flowtrain.runs.finish.finish` uses a search like a `flowtrain.training.trainer.Trainer`.

    Args:
        config: the plain config of the run, with model=auto.
        run_dir: the run directory; None: nothing is written.
        begun: the time.perf_counter at which the command began, for `time_budget`.
        given: the caller's data, which replace the data of the config.
        board: writes the metrics for TensorBoard; None: not written.

    Attributes:
        candidates: the results of each candidate, by name.
        stopped_by: the reason if the search has ended early, else None.
        signal: the number of the signal that has ended it, else None.
        best: validation NLL in nats of the last stack, and the step of the search; None before the first stack.

    Raises:
        ConfigError: a setting that a search does not support.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run_dir: Path | None,
        begun: float,
        given: Parts = NOTHING_GIVEN,
        board: tensorboard.Board | None = None,
    ) -> None:
        _check(config)
        self.given_config, self.run_dir, self.begun = dict(config), run_dir, begun
        self.time_limit, self.max_steps = _limits(config)
        self.best: dict[str, float] | None = None
        self.stopped_by: str | None = None
        self.signal: int | None = None
        self.time_budget: TimeBudget | None = None
        self.device = build.resolve_device(config["device"])
        with phase("reading the data"):
            self.data = build.build_data(config, None, **given.tables) if given.data is None else given.data
        PlotOptions.of(config).positions(self.data.event_shape, self.data.columns)
        choose_threads(config.get("threads"), self.data.event_shape)
        self.models = _models(config, self.data)
        if self.data.val_weights is not None and config["data"].get("signed_weights"):
            raise ConfigError(
                "data.signed_weights: model=auto stacks its models by EM, which needs weights that are not negative; "
                "give a model, such as model=nsf"
            )
        self.candidates: dict[str, Candidate] = {}
        # validation NLL in nats of each stack, by the name of the stage after which it was made
        self.stacks: dict[str, float] = {}
        # the names of the flows after their first part, the best first
        self.ranking: list[str] = []
        self._memory: dict[str, dict[str, Any]] = {}
        self._flows: dict[str, Flow] = {}
        self._log_p: dict[str, Tensor] = {}
        self._row_seconds: dict[str, float] = {}
        self._content: dict[str, Any] = {}
        # the candidates of the last stack, with their stages
        self._stacked: list[tuple[str, int]] = []
        # whether this command has trained a candidate
        self._is_new = False
        self._failures: list[FlowtrainError] = []
        # seconds of the search in earlier commands, and the time at which this command began to search
        self._before, self._since = 0.0, math.inf
        self._begin()
        self.metrics = Metrics(None if run_dir is None else run_dir / "metrics.jsonl", self.step)
        if board is not None and run_dir is not None:
            board.follow(self.metrics, self.step, run_dir / "plots")
        log.info("%s", self._banner())

    def _begin(self) -> None:
        """Reads the state of a resumed search, or removes the files of a killed search before a new search."""
        if self.run_dir is None:
            return
        folder = self.run_dir / SEARCH_FOLDER
        if holds_run(self.run_dir):
            self._read_state(folder / SEARCH_STATE)
            self._check_data()
            return
        # a search that was killed before its first checkpoint leaves its state and empty directories
        if folder.exists() and not (folder.is_dir() and _is_leftover(folder)):
            raise ConfigError(f"{folder} exists, but a search would write into it: choose another run directory")
        if folder.exists():
            shutil.rmtree(folder)
        self._write_state()

    def _check_data(self) -> None:
        """Checks that the data of a resumed search have not changed. Reads the checkpoint of the ensemble if it exists.

        Raises:
            CheckpointError: a checkpoint is damaged.
            ConfigError, DataError: the data have changed, see `flowtrain.runs.prepare.check_unchanged`.
        """
        assert self.run_dir is not None
        if checkpoint_files.has_checkpoint(self.run_dir):
            self._content = saved = checkpoint.load(checkpoint_files.find(self.run_dir))
        else:
            saved = next((s for name in self.candidates if (s := self._saved(name, "last")) is not None), {})
        if saved:
            check_same("resume", load.samples_of(saved), self.data.samples)
            check_unchanged(load.samples_of(saved), self.data.samples)

    # the attributes that `finish` uses

    @property
    def step(self) -> int:
        """The number of updates of all candidates."""
        return sum(candidate.steps for candidate in self.candidates.values())

    @property
    def saved_step(self) -> int:
        """The same as `step`, because the checkpoints of the candidates belong to the search."""
        return self.step

    @property
    def seconds(self) -> float:
        """The time of the search in seconds, summed over all commands that resumed it."""
        return self._before + max(0.0, time.perf_counter() - self._since)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the stack."""
        found: dict[str, Any] = self._content["config"]
        return found

    def read(self) -> dict[str, Any]:
        """Returns the checkpoint of the stacked ensemble."""
        return self._content

    def summary(self, step: int) -> str:
        """Returns a summary of the search."""
        members = sum(candidate.weight > 0 for candidate in self.candidates.values())
        return f"{members} of {counted(len(self.candidates), 'candidate')} in the stack, {self.step:,} steps in all"

    def validations(self) -> list[dict[str, Any]]:
        """Returns the validation rows of all candidates from the run directory. `split` is the candidate's name."""
        assert self.run_dir is not None
        return validations_of({name: self.run_dir / SEARCH_FOLDER / name for name in self.candidates})

    # the search

    def fit(self) -> None:
        """Trains all candidates, or until the time limit or a signal, which set `stopped_by`.

        Raises:
            FlowtrainError: the error of the first candidate, if all candidates have failed.
        """
        self._since = time.perf_counter()
        try:
            with ended_by_signals():
                self._fit()
        except SignalReceived as e:
            self.signal, self.stopped_by = e.number, signal.Signals(e.number).name
            if not self._content:
                self._stack_interrupted()
        except OSError as e:
            if self.run_dir is None:
                raise
            raise UnfinishedError(
                f"the search has stopped ({e}). Its results are saved: {resume_command(self.run_dir)} continues it"
            ) from e
        self._before, self._since = self.seconds, math.inf
        if self._content:
            log.info("%s", self._table())
        elif self.signal is None:
            raise self._failures[0]

    def _fit(self) -> None:
        for model in self.models:
            if model in CHEAP:
                self._advance(
                    model, model, 2, None if self._total_seconds is None else CHEAP[model] * self._total_seconds
                )
        self._stack("first candidates")
        for i, model in enumerate(self._ranked([model for model in self.models if model not in CHEAP])):
            if not self._is_over() and (i < FINALISTS or self._total_seconds is not None):
                self._advance(model, model, 2, self._share_of_left(1))
        self._stack("finalists")
        self._add_seeds()
        if self._is_over():
            self.stopped_by = OUT_OF_TIME

    def _ranked(self, models: Sequence[str]) -> list[str]:
        """Trains the models for the first part of their time. Returns the models with a result, the best first."""
        if len(models) <= 1:
            return list(models)
        if self.ranking:
            return self.ranking
        # the time of the best flow after its first part, in units of the first part
        later = 1 / FIRST_PART - 1
        for i, model in enumerate(models):
            if not self._is_over():
                self._advance(model, model, 1, self._share_of_left(len(models) - i + later))
        self._stack("first parts")
        tried = sorted((c for c in self.candidates.values() if c.name in models), key=lambda c: c.rank)
        words = ", ".join(f"{c.name} {c.rank:.4g}" for c in tried) or "no flow had time"
        log.info("validation NLL without the worst %g%% of the rows: %s", 100 * TRIMMED, words)
        self.ranking = [c.name for c in tried if c.nll is not None]
        self._write_state()
        return self.ranking

    def _add_seeds(self) -> None:
        """Trains further seeds of the best model while there is time and they improve the stack."""
        found = [self.candidates[m] for m in self.models if m in self.candidates and m not in CHEAP]
        best = min(found, key=lambda c: c.rank, default=None)
        if best is None or best.nll is None:
            return
        before = self.stacks["finalists"]
        for i in range(2, SEEDS + 2):
            name = f"{best.model}-{i}"
            if name not in self.candidates and self._left() < best.seconds / 2:
                return
            self._advance(name, best.model, 2, self._share_of_left(1))
            self._stack(name)
            gained, before = before - self.stacks[name], self.stacks[name]
            if not gained >= GAIN:
                return

    def _left(self) -> float:
        """Returns the seconds that are left for the search; infinity without a limit."""
        limits = [] if self.time_limit is None else [self.time_limit - self.seconds]
        if self.time_budget is not None:
            limits.append(self.time_budget.for_training)
        elif self.given_config.get("time_budget") is not None:
            limits.append(SEARCH_SHARE * self.given_config["time_budget"] - (time.perf_counter() - self.begun))
        return min(limits, default=math.inf)

    def _is_over(self) -> bool:
        return self._left() <= LEAST_SHARE * (self._total_seconds or 0.0)

    @property
    def _total_seconds(self) -> float | None:
        """The time limit of the whole search in seconds; None without a limit."""
        budget = self.given_config.get("time_budget")
        limits = [
            limit for limit in (self.time_limit, None if budget is None else SEARCH_SHARE * budget) if limit is not None
        ]
        return min(limits, default=None)

    def _share_of_left(self, parts: float) -> float | None:
        """Returns the seconds that are left divided by `parts`; None without a limit."""
        left = self._left()
        return None if left == math.inf else max(0.0, left / parts)

    # candidates

    def _advance(self, name: str, model: str, stage: int, seconds: float | None) -> None:
        """Trains a candidate to the end of a stage and scores it, unless the result is recorded already.

        Args:
            name: the name of the candidate.
            model: the name of the candidate's model.
            stage: the number of the stage, 1 or 2, see `Candidate`.
            seconds: the time limit of the stage; None: the stage has a number of steps instead.

        Raises:
            ConfigError, DataError: the settings or the data do not fit, and no candidate has succeeded so far.
        """
        position = int(name.removeprefix(model).removeprefix("-") or 1)
        candidate = self.candidates.get(name)
        if candidate is None:
            candidate = Candidate(name, model, int(self.given_config["seed"]) + position - 1)
        if candidate.stage >= stage or candidate.ended is not None:
            return
        self._is_new = True
        begun = time.perf_counter()
        self.candidates[name] = candidate
        try:
            with prefixed(name):
                self._train(candidate, stage, seconds)
                self._score(candidate)
        except FlowtrainError as e:
            if isinstance(e, ConfigError | DataError) and not self._content:
                raise
            self._failures.append(e)
            candidate.ended = f"failed: {first_line(e)}"
            # a ConfigError is expected, because some models do not support data of this shape
            level = logging.INFO if isinstance(e, ConfigError) else logging.WARNING
            log.log(level, "%s is left out: %s", name, e)
        candidate.seconds += time.perf_counter() - begun
        log.info("%s: %s", name, candidate.description)
        self._write_state()

    def _train(self, candidate: Candidate, stage: int, seconds: float | None) -> None:
        folder = None if self.run_dir is None else self.run_dir / SEARCH_FOLDER / candidate.name
        saved = self._saved(candidate.name, "last")
        config = self._config_of(candidate) if saved is None else saved["config"]
        if candidate.max_steps is None:
            candidate.max_steps = config["trainer"]["steps"]
            # stored now, because the config in the first checkpoint of the candidate may have another number of steps
            self._write_state()
        steps = candidate.max_steps
        restarts = stage == 2 and saved is not None and saved["step"] == candidate.steps
        if saved is not None and restarts:
            # Early stopping is reset, because the NLL rises after the restart. `best` is kept, so that best.pt is
            # replaced only by weights with a lower NLL than the best of the first part
            saved = {**saved, "best": candidate.best, "best_rows": None, "counted": None, "stale": 0, "worse": []}
            patience = None if self._is_bounded_by_time() else config["trainer"]["patience"]
            config = {**config, "trainer": {**config["trainer"], "max_rise": None, "patience": patience}}
        config = {**config, "trainer": {**config["trainer"], "time_limit": seconds}}
        if seconds is None:
            config["trainer"]["steps"] = math.ceil(FIRST_PART * steps) if stage == 1 else steps
        trainer = prepare(config, folder, saved, (), None, self.begun, Parts(data=self.data))
        trainer.fit(candidate.name)
        if folder is None:
            self._memory[candidate.name] = {kind: trainer.checkpoints.read(kind) for kind in ("best", "last")}
        candidate.steps, candidate.best = trainer.step, trainer.best
        if trainer.signal is not None:
            raise SignalReceived(trainer.signal)
        candidate.stage = stage
        ended = trainer.stopped_by or "last step"
        # after stage 1 a candidate can continue with restarted schedules, unless early stopping or its steps ended it
        candidate.ended = ended if stage == 2 or ended.startswith("early") or trainer.step >= steps else None

    def _is_bounded_by_time(self) -> bool:
        """Returns whether flows train for as many steps as the time allows."""
        is_large = self.data.n_train is None or self.data.n_train >= LARGE
        return self.max_steps is None and self._total_seconds is not None and is_large

    def _saved(self, name: str, kind: str) -> dict[str, Any] | None:
        """Reads a checkpoint of a candidate, "best" or "last"; None if the candidate has no checkpoint."""
        if self.run_dir is None:
            return self._memory.get(name, {}).get(kind)
        folder = self.run_dir / SEARCH_FOLDER / name
        if kind == "last" and not (folder / "checkpoints/last.pt").exists():
            return None
        return checkpoint.load(checkpoint_files.find(folder, kind))

    def _config_of(self, candidate: Candidate) -> dict[str, Any]:
        """Returns the initial config of a candidate: its recipe, with the settings of the user for all candidates."""
        own = self.given_config
        like = data_like(own, self.data)
        chosen = {"model": candidate.model, **like}
        if candidate.model == "ffjord":
            chosen["objective"] = objective_of(self.data.event_shape, self.max_steps)
        groups = ["trainer", "solver", "regularizer"] if candidate.model == "ffjord" else ["trainer"]
        composed = {**own, "trainer": {**own["trainer"], "steps": AUTO}}
        config = with_choices(composed, {"model": AUTO, **like}, chosen, groups)
        config["trainer"] |= {"plot_every": None, "time_limit": None}
        config |= {key: own[key] for key in ("data", "device", "threads")}
        config |= {
            "seed": candidate.seed,
            "logger": ["jsonl"],
            "time_budget": None,
            "plots": own.get("plots", DEFAULTS),
        }
        if own["model"].get("conditional"):
            config["model"]["conditional"] = True
        config = auto_settings.resolve_auto(config, self.data.n_train, self.data.event_shape, bool(self.data.context))
        if self.max_steps is not None:
            config["trainer"]["steps"] = self.max_steps
        elif candidate.model not in CHEAP and self._is_bounded_by_time():
            config["trainer"]["steps"] = max(LONG, config["trainer"]["steps"])
        config = resolve_df(config, self.data)
        return resolve_components(config, self.data, max(COMPONENTS_LEAST, COMPONENTS_SHARE * self._left()))

    def _score(self, candidate: Candidate) -> None:
        """Computes log p of the validation rows with the best checkpoint of a candidate."""
        name = candidate.name
        saved = self._saved(name, "best")
        assert saved is not None
        flow = load.restore_flow(saved, self.device)
        x, label = validation_rows(flow, self.data, ROWS)
        begun = time.perf_counter()
        with status(f"scoring {name}"):
            log_p = validation_log_probs([flow], x, label, [name]).squeeze(1)
        self._flows[name], self._log_p[name] = flow, log_p
        self._row_seconds[name] = (time.perf_counter() - begun) / len(x)
        weights = validation_weights(self.data, ROWS)
        candidate.nll, candidate.step = -float(average(log_p, weights)), saved["step"]
        candidate.nll_stderr = stderr(log_p, weights)
        candidate.trimmed = -trimmed_mean(log_p.nan_to_num(-math.inf), weights)

    def _scored(self, name: str) -> Tensor:
        """Returns log p of the validation rows under a candidate, (n,), in nats."""
        if name not in self._log_p:
            self._score(self.candidates[name])
        return self._log_p[name]

    # the stack

    def _stack(self, after: str) -> None:
        """Computes the weights of the candidates so far, and writes the checkpoint of their ensemble.

        Does nothing if the NLL is recorded and no candidate has been trained since the search was resumed.

        Args:
            after: the name of the stage under which the NLL is recorded.
        """
        if after in self.stacks and not self._is_new:
            return
        for candidate in [c for c in self.candidates.values() if c.nll is not None]:
            try:
                self._scored(candidate.name)
            except FlowtrainError as e:
                candidate.nll, candidate.weight, candidate.ended = None, 0.0, f"failed: {first_line(e)}"
                self._failures.append(e)
                log.warning("%s is left out: %s", candidate.name, e)
        names = [c.name for c in self.candidates.values() if c.nll is not None]
        if not names:
            return
        trained = [(name, self.candidates[name].stage) for name in names]
        if trained == self._stacked and self.best is not None:
            self.stacks[after] = self.best["nll"]
            self._write_state()
            return
        self._stacked = trained
        log_p = torch.stack([self._scored(name) for name in names], 1)
        of_rows = validation_weights(self.data, ROWS)
        weights = sparse_weights(log_p, of_rows)
        for name, weight in zip(names, weights, strict=True):
            self.candidates[name].weight = weight
        members = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight > 0]
        combined = stacked(log_p, weights)
        self.stacks[after] = nll = -float(average(combined, of_rows))
        self.best = {"nll": nll, "step": self.step}
        density = self._density(members)
        self._write(density)
        nll_stderr = stderr(combined, of_rows)
        bits = in_bits(density, nll)
        self.metrics.write(step=self.step, split="val", nll=nll, nll_stderr=nll_stderr, seconds=self.seconds, **bits)
        words = ", ".join(f"{weight:.2f} {name}" for name, weight in members)
        log.info("stack: validation NLL %s (%s)", with_error(nll, nll_stderr), words)
        self._write_state()
        seconds = self.given_config.get("time_budget")
        if seconds is not None:
            if self.time_budget is None:
                self.time_budget = TimeBudget(seconds, self.begun, density, self.data, self.run_dir is not None)
            self.time_budget.flow = density
            self.time_budget.scored(1, sum(self._row_seconds[name] for name, _ in members))

    def _stack_interrupted(self) -> None:
        """Makes an ensemble of the candidates that have a checkpoint, if a signal arrives before the first ensemble."""
        state = self.stacks, [asdict(candidate) for candidate in self.candidates.values()]
        for candidate in self.candidates.values():
            try:
                if self._saved(candidate.name, "best") is not None:
                    self._score(candidate)
            except FlowtrainError as e:
                log.debug("%s has no result yet: %s", candidate.name, e)
        self._stack("interrupted")
        # the previous state is restored, so that the interruption does not change the decisions of the resumed search
        self.stacks = {label: nll for label, nll in state[0].items() if label != "interrupted"}
        self.candidates = {each["name"]: Candidate(**each) for each in state[1]}
        self._write_state()

    def _density(self, members: Sequence[tuple[str, float]]) -> Density:
        """Returns the ensemble of the members; a single member is returned as a flow."""
        flows = [self._flows[name] for name, _ in members]
        if len(flows) == 1:
            return flows[0]
        found = Ensemble(flows, [weight for _, weight in members], [name for name, _ in members])
        found.record = Record(self.given_config, self.data.samples, self.step)
        return found.eval()

    def _write(self, density: Density) -> None:
        """Writes the checkpoint of the run. A full disk only causes a warning."""
        content = content_of(density)
        # for a single flow, the config of its candidate; for an ensemble, the config of the search with another model
        config = {**self.given_config, **content["config"], "time_budget": self.given_config.get("time_budget")}
        if isinstance(density, Ensemble):
            config["model"]["name"] = AUTO
        self._content = {**content, "config": config, SEARCH: dict(self.given_config)}
        if self.run_dir is None:
            return
        try:
            for kind in ("best", "last"):
                checkpoint.save(self.run_dir / f"checkpoints/{kind}.pt", self._content)
        except OSError as e:
            log.warning("the checkpoint of the stack could not be written (%s); the search continues", e)

    # the state in the run directory

    def _write_state(self) -> None:
        if self.run_dir is None:
            return
        state = {
            "config": {key: value for key, value in self.given_config.items() if key != "trust"},
            "time_limit": self.time_limit,
            "seconds": self.seconds,
            "stacks": self.stacks,
            "ranking": self.ranking,
            "candidates": [asdict(candidate) for candidate in self.candidates.values()],
        }
        try:
            (self.run_dir / SEARCH_FOLDER).mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / SEARCH_FOLDER / SEARCH_STATE, state)
        except OSError as e:
            log.warning(
                "%s could not be written (%s); the search continues", self.run_dir / SEARCH_FOLDER / SEARCH_STATE, e
            )

    def _read_state(self, path: Path) -> None:
        """Restores the state of a resumed search.

        Raises:
            CheckpointError: the state file is missing or damaged.
        """
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(Candidate)}
            found = [Candidate(**{k: v for k, v in c.items() if k in known}) for c in state["candidates"]]
            for candidate in found:
                candidate.check()
            before = state["time_limit"]
            self.candidates = {candidate.name: candidate for candidate in found}
            self.stacks = {str(k): math.nan if v is None else float(v) for k, v in state["stacks"].items()}
            self._before = float(state["seconds"])
            self.ranking = [str(name) for name in state["ranking"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise CheckpointError(
                f"{path}: the search cannot be resumed, because its state cannot be read ({first_line(e)}). Start a "
                "new search; the flow found so far is in the checkpoint of the run"
            ) from e
        if self.stacks:
            self.best = {"nll": [*self.stacks.values()][-1], "step": self.step}
        if before is not None and (self.time_limit is None or self.time_limit > before):
            # with a larger time limit than before, flows that the limit has ended can continue
            for candidate in self.candidates.values():
                if candidate.ended == OUT_OF_TIME and candidate.model not in CHEAP:
                    candidate.ended, candidate.stage = None, min(candidate.stage, 1)

    # messages

    def _banner(self) -> str:
        cheap, flows = ([m for m in self.models if (m in CHEAP) == is_cheap] for is_cheap in (True, False))
        steps = "" if self.max_steps is None else f"up to {self.max_steps:,} steps of each, "
        rows = {
            "model": f"auto: fits {', '.join([*cheap, *flows])} and stacks the best; model=NAME fits one model",
            "data": f"{data_name(self.given_config)}, {describe_samples(self.data)}",
            "training": f"{steps}{'no time limit' if self._left() == math.inf else f'{self._left():.0f} s in all'}, "
            f"seed {self.given_config['seed']}",
            "device": describe_device(self.device),
            **({} if self.run_dir is None else {"run": str(shortest(self.run_dir))}),
        }
        return as_banner(f"{AUTO} on {data_name(self.given_config)}", rows)

    def _table(self) -> str:
        """Returns a table of all candidates with weight and validation NLL, the lowest NLL first."""
        lines = [f"{counted(len(self.candidates), 'candidate')} in {self.seconds:.0f} s; NLL in nats"]
        for c in sorted(self.candidates.values(), key=lambda c: math.inf if c.nll is None else c.nll):
            lines.append(f"{c.name:>{NAMES}}  weight {c.weight:.3f}, {c.description}")
        return "\n".join(lines)


def trimmed_mean(log_p: Tensor, weights: Tensor | None = None) -> float:
    """Returns the (weighted) mean of log_p (n,) without the lowest values, which have the share TRIMMED of the weight.

    Without weights, the number of rows that are left out is rounded down.
    """
    w = torch.ones_like(log_p) if weights is None else weights.to(log_p) / weights.to(log_p).mean()
    order = log_p.argsort(descending=True, stable=True)
    kept = (1 - TRIMMED) * len(log_p)
    left = (math.ceil(kept) if weights is None else kept) - (w[order].cumsum(0) - w[order])
    return float(average(log_p[order], w[order].minimum(left.clamp_min(0))))


def _is_leftover(folder: Path) -> bool:
    """Returns whether a directory contains only files of a search, and no checkpoint."""
    state = _content_of_state(folder)
    if "candidates" not in state or "stacks" not in state:
        return False
    names = ("metrics.jsonl", "checkpoints", SEARCH_STATE)
    return all(path.name in names or path.is_dir() for path in folder.rglob("*"))


def validations_of(run_dirs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Returns the validations of several runs. The split of each row is the name of the run.

    Args:
        run_dirs: run directories by name; those without metrics.jsonl are left out.
    """
    paths = {name: run_dir / "metrics.jsonl" for name, run_dir in run_dirs.items()}
    found = {name: read_metrics(path) for name, path in paths.items() if path.exists()}
    return [{**row, "split": name} for name, rows in found.items() for row in rows if row.get("split") == "val"]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics that the training curves of a run show. The list may be empty.

    For a search, the rows are the validations of its candidates.
    """
    candidates = _content_of_state(run_dir / SEARCH_FOLDER).get("candidates")
    if isinstance(candidates, list):
        names = [str(each["name"]) for each in candidates if isinstance(each, dict) and "name" in each]
        return validations_of({name: run_dir / SEARCH_FOLDER / name for name in names})
    path = run_dir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def config_of_search(run_dir: Path) -> dict[str, Any] | None:
    """Reads the config of the search in a run directory from its state file; None if it cannot be read."""
    config = _content_of_state(run_dir / SEARCH_FOLDER).get("config")
    return config if isinstance(config, dict) else None


def best_candidate(run_dir: Path) -> Path | None:
    """Returns the directory of the candidate with the lowest validation NLL in a search; None if there is none."""
    candidates = _content_of_state(run_dir / SEARCH_FOLDER).get("candidates")
    found: dict[Path, float] = {}
    for candidate in candidates if isinstance(candidates, list) else []:
        name, nll = (candidate.get(key) for key in ("name", "nll")) if isinstance(candidate, dict) else (None, None)
        if isinstance(name, str) and isinstance(nll, int | float):
            found[run_dir / SEARCH_FOLDER / name] = nll
    found = {path: nll for path, nll in found.items() if checkpoint_files.has_checkpoint(path)}
    return min(found, key=lambda path: found[path], default=None)


def _content_of_state(folder: Path) -> dict[str, Any]:
    """Returns the content of the state file in the directory of a search; empty if it cannot be read."""
    try:
        content = json.loads((folder / SEARCH_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _limits(config: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """Returns the time limit in seconds and the number of steps of each candidate; None for no limit."""
    trainer = config["trainer"]
    limit, steps = trainer.get("time_limit"), trainer["steps"]
    default = values_of("model", AUTO, [config_dir()])["trainer"]["time_limit"]
    if config.get("time_budget") is not None and limit == default:
        # the user's budget for the whole command replaces the default limit
        limit = None
    if limit is not None:
        limit = number("trainer.time_limit", limit)
    return limit, None if steps == AUTO else whole("trainer.steps", steps)


def _check(config: Mapping[str, Any]) -> None:
    """Checks the config of a search.

    Raises:
        ConfigError: an unknown key, another objective than the likelihood, or several processes.
    """
    keys = ("candidates", "conditional")
    for key in config["model"]:
        if key not in ("name", *keys):
            raise ConfigError(
                f"model: unknown key {key}; {choose(key, keys, 'the keys of model=auto are')}; or give model=NAME"
            )
    flag("model.conditional", config["model"].get("conditional", False))
    if config["objective"].get("name") not in (None, "likelihood"):
        raise ConfigError(
            f"objective={config['objective']['name']}: model=auto chooses the objective of each model; give a model, "
            "such as model=ffjord"
        )
    if config.get("time_budget") is not None:
        number("time_budget", config["time_budget"])
    if ranks.size() > 1:
        raise ConfigError("model=auto runs in one process: give a model, such as model=nsf, to train with torchrun")


def _models(config: Mapping[str, Any], data: Dataset) -> list[str]:
    """Returns the names of the models of a search. Cheap models come first.

    Raises:
        ConfigError: an unknown model.
        DataError: model.conditional=true without labels.
    """
    given = config["model"].get("candidates")
    names = [name for name in options("model", [config_dir()]) if name != AUTO]
    labelled = bool(config["model"].get("conditional"))
    if labelled and data.context:
        raise ConfigError(
            "model.conditional=true is for data.label, but the data have the context "
            f"{', '.join(column.name for column in data.context)}: omit it. A label can be a categorical context column"
        )
    if labelled and data.classes is None:
        raise DataError("model.conditional=true needs labels: give data.label")
    if given is None:
        found = [*CHEAP, *recommended(data.n_train, data.event_shape)]
        return [name for name in found if name in CIRCULAR] if circular_columns(data.types) else found
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"model.candidates={given}: give a list of models, as in [nsf,maf]")
    for name in listed:
        if name not in names:
            raise ConfigError(f"model.candidates: {name} is unknown; {choose(name, names, 'the models are')}")
    return sorted(dict.fromkeys(listed), key=lambda name: name not in CHEAP)
