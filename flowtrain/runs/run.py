"""One run from its config to result.json."""

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowtrain.data.base import Dataset, Samples, changes
from flowtrain.data.tables.table_reader import Table
from flowtrain.evaluation import check_fits
from flowtrain.flow import Flow
from flowtrain.runs import auto_settings, build, load
from flowtrain.runs.components import resolve_components
from flowtrain.runs.console import banner, name_of, title_of
from flowtrain.training import checkpoint, tensorboard
from flowtrain.training.time_budget import TimeBudget
from flowtrain.training.trainer import Trainer
from flowtrain.utils import ranks
from flowtrain.utils.arguments import number, whole, within_memory
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError, UnfinishedError
from flowtrain.utils.formatting import resume_command
from flowtrain.utils.process import SignalReceived, choose_threads, ended_by_signals, own_settings
from flowtrain.utils.status import phase, status

log = logging.getLogger("flowtrain")

# the flow that a run's objective learns from, in its directory
TEACHER = "checkpoints/teacher.pt"


@dataclass(frozen=True)
class Parts:
    """Objects that the caller of a run has built: each takes the place of one that the config names.

    Attributes:
        flow: a flow, which is trained in place.
        data: a data set.
        tables: tables in memory, by the keys of the data that they take the place of.
        initialize: whether a new run sets what depends on its data.
    """

    flow: Flow | None = None
    data: Dataset | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    initialize: bool = True


NOTHING_GIVEN = Parts()


class Ended(NamedTuple):
    """The trainer of a run that has ended, and its exit code: 128 + the signal's number after a signal, else 0."""

    trainer: Trainer
    code: int

    @property
    def best(self) -> float:
        """The best validation NLL in nats; NaN before the first validation."""
        return math.nan if self.trainer.best is None else self.trainer.best["nll"]


def train(
    config: Mapping[str, Any],
    run_dir: Path | None,
    saved: Mapping[str, Any] | None = None,
    trust: Sequence[str] = (),
    begun: float | None = None,
    recipes: Mapping[str, Sequence[str]] | None = None,
    given: Parts = NOTHING_GIVEN,
) -> Ended:
    """Trains; in a run directory, also evaluates the best checkpoint and writes result.json and the pictures.

    Args:
        config: plain values, resolved.
        run_dir: None: nothing is written.
        saved: the checkpoint to go on from.
        trust: packages besides flowtrain that the run of `from` may build from.
        begun: when the command began, by time.perf_counter, for `time_budget`; None: now.
        recipes: for the banner, the recipes that applied and the keys that each has set; None if unknown.
        given: objects that replace those of the config.
    """
    begun = time.perf_counter() if begun is None else begun
    with own_settings(ranks.device(build.resolve_device(config["device"]))):
        return _train(config, run_dir, saved, trust, begun, recipes, given)


def _train(
    config: Mapping[str, Any],
    run_dir: Path | None,
    saved: Mapping[str, Any] | None,
    trust: Sequence[str],
    begun: float,
    recipes: Mapping[str, Sequence[str]] | None,
    given: Parts,
) -> Ended:
    """`train`, in a process whose settings may be changed."""
    board = None if run_dir is None else tensorboard.board(config["logger"], run_dir / "tensorboard")
    trainer = prepare(config, run_dir, saved, trust, board, begun, recipes, given)
    trainer.fit()
    resume = "" if run_dir is None else f"; resume with: {resume_command(run_dir)}"
    if trainer.signal is not None:
        log.warning("%s at step %d%s", trainer.stopped_by, trainer.saved_step, resume)
        return Ended(trainer, 128 + trainer.signal)
    if trainer.stopped_by:
        log.info("stopped at step %d: %s", trainer.step, trainer.stopped_by)
    if run_dir is None or not ranks.is_first():
        return Ended(trainer, 0)
    # imported here because it takes matplotlib
    from flowtrain.runs.finish import finish

    try:
        with ended_by_signals():
            finish(trainer, run_dir, board, given.flow)
    except SignalReceived as e:
        name = signal.Signals(e.number).name
        log.warning("%s during the evaluation%s", name, resume)
        return Ended(trainer, 128 + e.number)
    except OSError as e:
        raise UnfinishedError(
            f"the run has ended at step {trainer.saved_step} and is saved, but its result could not be written ({e}): "
            f"once it can be, {resume_command(run_dir)} evaluates it"
        ) from e
    return Ended(trainer, 0)


def prepare(
    config: Mapping[str, Any],
    run_dir: Path | None,
    saved: Mapping[str, Any] | None,
    trust: Sequence[str],
    board: tensorboard.Board | None,
    begun: float,
    recipes: Mapping[str, Sequence[str]] | None = None,
    given: Parts = NOTHING_GIVEN,
) -> Trainer:
    """Builds and checks the trainer of a run with its flow, data and settings; see `train`."""
    device = ranks.device(build.resolve_device(config["device"]))
    # finds mistakes before the data are read, which can take long. Built again once the data are known
    build.build_settings(auto_settings.resolve_auto(config, None, (1,)))
    # checkpoints of an older flowtrain have no time budget
    seconds = config.get("time_budget")
    seconds = None if seconds is None else number("time_budget", seconds)
    with phase("reading the data"):
        data = build.build_data(config, **given.tables) if given.data is None else given.data
    config = resolve_components(auto_settings.resolve_auto(config, data.n_train, data.event_shape), data)
    settings = build.build_settings(config)
    if saved is not None:
        check_same("resume", load.samples_of(saved), data.samples)
        check_unchanged(load.samples_of(saved), data.samples)
    within_memory("trainer.batch_size", settings.batch_size, 4 * math.prod(data.event_shape))
    choose_threads(config.get("threads"), data.event_shape)
    taught = teaching(config, run_dir, saved is not None)
    teacher = None
    if taught is not None:
        check_same("from", load.samples_of(taught), data.samples)
        if saved is None and (change := changes(load.samples_of(taught).record, data.samples.record)):
            log.warning(
                "from: since that run, %s: it may have been trained on rows that are held out now, which then score "
                "too well",
                change,
            )
        with status("loading the run to begin from"):
            teacher = load.restore_flow(taught, device, trust)
    if saved is not None:
        load.check_sizes(saved, data.samples)
    torch.manual_seed(whole("seed", config["seed"], least=0))
    with phase("building the model"):
        flow = (build.build_flow(config, data.samples) if given.flow is None else _fitting(given.flow, data)).to(device)
    if teacher is not None and saved is None:
        flow.load_state_dict(teacher.state_dict())
    if given.flow is not None and build.takes_teacher(config):
        if run_dir is not None:
            raise ConfigError(
                f"objective={name_of(config['objective'])}: a run directory cannot keep the flow to learn from; leave "
                "run_dir out"
            )
        # a flow that is given learns from its own present state
        teacher = deepcopy(flow).eval()
    objective = build.build_objective(config, flow, teacher)
    config = {**config, "objective": {**config["objective"], **objective.pinned}}
    picture = None
    if run_dir is not None:
        from flowtrain.runs.finish import draw_training

        picture = partial(draw_training, data=data, run_dir=run_dir, title=title_of(config), board=board)
    time_budget = None if seconds is None else TimeBudget(seconds, begun, flow, data, run_dir is not None)
    trainer = Trainer(
        objective,
        flow,
        data,
        settings,
        run_dir,
        config,
        saved,
        picture,
        initialize=teacher is None and given.initialize,
        time_budget=time_budget,
    )
    log.info("%s", banner(config, flow, data, settings, run_dir, trainer.step, trainer.train_state.warmup, recipes))
    if run_dir is None:
        return trainer
    if saved is None and taught is not None and build.takes_teacher(config) and ranks.is_first():
        # written last, because the directory holds a run from then on; as read before, because the other run may have
        # changed since
        checkpoint.save(run_dir / TEACHER, taught)
    if board is not None:
        board.follow(trainer.metrics, trainer.step, run_dir / "plots")
    return trainer


def _fitting(flow: Flow, data: Dataset) -> Flow:
    """The flow, if the data are of its kind.

    Raises:
        DataError: samples of another shape or kind, or no labels for a conditional flow.
    """
    check_fits(flow, data)
    if flow.classes is not None and (data.classes or 0) > flow.classes:
        raise DataError(f"the flow has {flow.classes} classes, and the labels of the data go up to {data.classes}")
    if flow.classes is not None and data.classes is None:
        raise DataError("the flow is conditional, and the data have no labels: give label")
    return flow


def teaching(config: Mapping[str, Any], run_dir: Path | None, resumed: bool) -> dict[str, Any] | None:
    """The checkpoint of the run that `from` names: what a new run begins with, and what some objectives learn from.

    Such objectives are resumed with the copy in the run directory, because the other run may change. Other objectives
    need it only at the start.

    Raises:
        CheckpointError: it is missing.
    """
    if config.get("from") is None or (resumed and not build.takes_teacher(config)):
        return None
    path = run_dir / TEACHER if resumed and run_dir is not None else checkpoint.find(Path(config["from"]))
    if not path.is_file():
        raise CheckpointError(f"{path} is not there: the run cannot go on without; start a new one, with from=RUN_DIR")
    return checkpoint.load(path)


def check_same(who: str, before: Samples, now: Samples) -> None:
    """Refuses to go on with a run on samples of another kind.

    Raises:
        ConfigError: naming what differs.
    """
    for key in (
        "event_shape",
        "integer_valued",
        "noisy",
        "levels",
        "alpha",
        "standardized",
        "centered",
        "gaussian_start",
    ):
        old, new = getattr(before, key), getattr(now, key)
        if old != new:
            raise ConfigError(
                f"{who}: the run was trained on samples whose {key} is {old}, and that of the data now is {new}: "
                "leave data.* as it was, but for where its files are"
            )


def check_unchanged(before: Samples, now: Samples) -> None:
    """Refuses to resume a run whose data have changed: it could be tested on rows that it was trained on.

    Raises:
        DataError: saying what has changed.
    """
    change = changes(before.record, now.record)
    if change:
        raise DataError(
            f"resume: since the run began, {change}. A run must be resumed with the same data: otherwise, rows that "
            "it was trained on could be held out. Restore the data, or start a new run with the changed data "
            "(from=RUN_DIR starts it with the weights of this one)"
        )
