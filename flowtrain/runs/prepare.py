"""Builds the trainer of a run with its data, flow, objective and settings, from a config or a checkpoint."""

import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowtrain.data.base import Dataset, Samples, changes
from flowtrain.data.context import CATEGORICAL, ContextColumn, feature_count
from flowtrain.data.tables.columns import listed
from flowtrain.data.tables.table_reader import Table
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import check_fits
from flowtrain.flow import Flow
from flowtrain.plotting.options import PlotOptions
from flowtrain.runs import auto_settings, build, load
from flowtrain.runs.components import resolve_components
from flowtrain.runs.compose import options, with_choices
from flowtrain.runs.console import name_of, title_of
from flowtrain.runs.tails import resolve_df
from flowtrain.training import checkpoint, checkpoint_files, tensorboard
from flowtrain.training.time_budget import TimeBudget
from flowtrain.training.trainer import Trainer
from flowtrain.utils import ranks
from flowtrain.utils.arguments import number, whole, within_memory
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError
from flowtrain.utils.files import config_dir
from flowtrain.utils.formatting import counted
from flowtrain.utils.process import choose_threads
from flowtrain.utils.status import phase, status

log = logging.getLogger("flowtrain")

# the file in the run directory with the flow from which the objective learns
TEACHER = "checkpoints/teacher.pt"
# the smallest number of steps for the hybrid objective
LEAST_HYBRID = 10


@dataclass(frozen=True)
class Parts:
    """Objects that the caller of a run has built. These objects replace the objects of the config.

    Attributes:
        flow: a flow, which is trained in place.
        data: a data set.
        tables: tables in memory, by the keys of the data that they replace.
        initialize: whether a new run performs data-dependent initialization.
    """

    flow: Flow | None = None
    data: Dataset | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    initialize: bool = True


NOTHING_GIVEN = Parts()


def prepare(
    config: Mapping[str, Any],
    run_dir: Path | None,
    saved: Mapping[str, Any] | None,
    trust: Sequence[str],
    board: tensorboard.Board | None,
    begun: float,
    given: Parts = NOTHING_GIVEN,
) -> Trainer:
    """Builds and checks the trainer of a run with its flow, data and settings; see `flowtrain.runs.run.train`."""
    device = ranks.device(build.resolve_device(config["device"]))
    # reports mistakes before the data are read, which can take long. The settings are built again with the data
    build.build_settings(auto_settings.resolve_auto(config, None, (1,)))
    # checkpoints of older versions have no time budget
    seconds = config.get("time_budget")
    seconds = None if seconds is None else number("time_budget", seconds)
    # a resumed run reads the copy in its run directory, see below
    teacher_checkpoint = None if saved is not None else read_teacher(config, run_dir, False)
    before = _samples_before(saved or teacher_checkpoint, given.flow)
    with phase("reading the data"):
        data = build.build_data(config, before, **given.tables) if given.data is None else given.data
    options = PlotOptions.of(config)
    options.positions(data.event_shape, data.columns)
    config = resolve_objective(config, data)
    config = auto_settings.resolve_auto(config, data.n_train, data.event_shape, bool(data.context))
    config = resolve_components(resolve_df(config, data), data)
    settings = build.build_settings(config)
    data = _for_trained(data, saved, given)
    within_memory("trainer.batch_size", settings.batch_size, 4 * math.prod(data.event_shape))
    choose_threads(config.get("threads"), data.event_shape)
    if saved is not None:
        teacher_checkpoint = read_teacher(config, run_dir, True)
    teacher = None
    if teacher_checkpoint is not None:
        data = _for_teacher(data, load.samples_of(teacher_checkpoint), saved is None)
        with status("loading the run to begin from"):
            teacher = load.restore_flow(teacher_checkpoint, device, trust)
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
                f"objective={name_of(config['objective'])} learns from the given flow, which a run directory cannot "
                "store: leave run_dir out"
            )
        # the teacher of a given flow is its own present state
        teacher = deepcopy(flow).eval()
    objective = build.build_objective(config, flow, teacher, data)
    config = {**config, "objective": {**config["objective"], **objective.pinned}}
    picture = None
    if run_dir is not None and settings.plot_every is not None:
        # imported here because it imports matplotlib
        from flowtrain.runs.finish import draw_training

        picture = partial(
            draw_training, data=data, run_dir=run_dir, title=title_of(config), board=board, options=options
        )
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
    if run_dir is None:
        return trainer
    if saved is None and teacher_checkpoint is not None and build.takes_teacher(config) and ranks.is_first():
        # The file is written last, because it makes the directory count as a run. The content was read at the start,
        # because the run `from` may have changed since then
        checkpoint.save(run_dir / TEACHER, teacher_checkpoint)
    if board is not None:
        board.follow(trainer.metrics, trainer.step, run_dir / "plots")
    return trainer


def resolve_objective(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Returns the config with objective=auto replaced by an objective that suits the data, with its settings."""
    objective = config["objective"]
    if not isinstance(objective, Mapping) or objective.get("name") != auto_settings.AUTO or "_target_" in objective:
        return dict(config)
    chosen = {"model": name_of(config["model"]), **data_like(config, data)}
    objective = objective_of(data.event_shape, config["trainer"]["steps"])
    groups = ["model", "trainer", "solver", "regularizer"]
    found = with_choices(
        config, {**chosen, "objective": auto_settings.AUTO}, {**chosen, "objective": objective}, groups
    )
    return {**config, **{group: found[group] for group in (*groups, "objective")}}


def _samples_before(checkpoint: Mapping[str, Any] | None, flow: Flow | None) -> Samples | None:
    """Returns the samples on which the flow of a checkpoint, or a given flow, was trained; None for a new flow."""
    if checkpoint is not None:
        return load.samples_of(checkpoint)
    return (
        None
        if flow is None
        else Samples(flow.event_shape, classes=flow.classes, types=flow.types, context=flow.context)
    )


def data_like(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Returns the choices of data and recipe whose settings suit these data."""
    name = str(config["data"].get("name"))
    if data.n_train is None and name not in options("data", [config_dir()]):
        return {"data": "moons", "recipe": "none"}
    return {"data": "array" if data.n_train is not None else name}


def objective_of(event_shape: tuple[int, ...], steps: Any) -> str:
    """Returns the objective for model=ffjord that was better in measurements on samples of this shape.

    Args:
        steps: the number of steps. Below LEAST_HYBRID, the likelihood is used.
    """
    few = isinstance(steps, int) and steps < LEAST_HYBRID
    return "likelihood" if len(event_shape) > 1 or event_shape[0] <= 2 or few else "hybrid"


def _for_teacher(data: Dataset, before: Samples, is_new: bool) -> Dataset:
    """Returns the data set for a run that begins with a trained flow.

    Args:
        before: the samples of the run `from`.
        is_new: whether the run is new, not resumed.

    Raises:
        ConfigError: see `check_same`, and for a target `TargetData.for_flow`.
    """
    if isinstance(data, TargetData):
        return data.for_flow(before)
    check_same("from", before, data.samples)
    if is_new:
        _warn_if_changed("from: since that run", before, data.samples)
    return with_context(data, before.context)


def _warn_if_changed(since: str, before: Samples, now: Samples) -> None:
    """Warns of changed samples when a trained flow is trained further. Changed labels and weights cause no leak."""
    if change := changes(before.record, now.record, samples_only=True):
        log.warning(
            "%s, %s. It may have been trained on rows that are held out now, whose NLL is then too low", since, change
        )


def _for_trained(data: Dataset, saved: Mapping[str, Any] | None, given: Parts) -> Dataset:
    """Returns the data set for a flow that was trained before. The data of a resumed run must not have changed.

    Raises:
        ConfigError, DataError: see `check_same` and `check_unchanged`.
    """
    if saved is None:
        if given.flow is None or given.initialize:
            return data
        if given.flow.record is not None:
            before = given.flow.record.samples
            if before.columns != data.columns and sorted(before.columns) == sorted(data.columns):
                raise DataError(
                    f"the flow was trained on the columns {listed(before.columns)}, but x has them in the order "
                    f"{listed(data.columns)}: give overrides={{'data.columns': {list(before.columns)}}}"
                )
            _warn_if_changed("flow: since it was trained", before, data.samples)
        return with_context(data, given.flow.context)
    before = load.samples_of(saved)
    if isinstance(data, TargetData):
        fitting = data.for_flow(before)
        check_unchanged(before, fitting.samples)
        return fitting
    # the description may come from an earlier training: from a run `from`, or from a flow built by hand
    data = with_context(data, before.context)
    check_same("resume", before, data.samples)
    check_unchanged(before, data.samples)
    return data


def with_context(data: Dataset, context: tuple[ContextColumn, ...]) -> Dataset:
    """Returns the data set with the context columns of a trained flow, which have the moments of earlier data.

    The data set keeps its context columns if their number, kinds or categories differ from the flow.
    """
    alike = [(column.kind, column.categories) for column in context]
    if not context or alike != [(column.kind, column.categories) for column in data.context]:
        return data
    found = copy(data)
    found.context = context
    return found


def _fitting(flow: Flow, data: Dataset) -> Flow:
    """Returns the flow after a check that it fits the data. The flow gets the context columns of the data.

    Raises:
        DataError: samples of another shape or kind, or no labels or no context for a conditional flow.
    """
    check_fits(flow, data)
    if flow.classes is not None and (data.classes or 0) > flow.classes:
        raise DataError(f"the flow has {flow.classes} classes, but the data have {data.classes}")
    if flow.classes is not None and data.classes is None:
        raise DataError("the flow is conditional, but the data have no labels: give label")
    wanted, found = feature_count(flow.context), feature_count(data.context)
    if wanted != found:
        names = ", ".join(column.name for column in data.context)
        raise DataError(
            f"the flow has a context of {counted(wanted, 'feature')}, but the data have {found}"
            f"{names and f' ({names})'}: give data.context or the argument context with {counted(wanted, 'feature')}, "
            f"or build the flow with context={found or None}"
        )
    flow.context, flow.context_rows = data.context, data.context_rows
    return flow


def read_teacher(config: Mapping[str, Any], run_dir: Path | None, resumed: bool) -> dict[str, Any] | None:
    """Reads the checkpoint of the run `from`; None if the checkpoint is not needed.

    A new run starts with the weights of the checkpoint. Some objectives also learn from the flow in the checkpoint. A
    resumed run with such an objective reads the copy in its own run directory, because the run `from` may have changed.

    Raises:
        CheckpointError: the checkpoint is missing.
    """
    if config.get("from") is None or (resumed and not build.takes_teacher(config)):
        return None
    path = run_dir / TEACHER if resumed and run_dir is not None else checkpoint_files.find(Path(config["from"]))
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, and the run cannot be resumed without it: start one with from=RUN_DIR"
        )
    return checkpoint.load(path)


def check_same(who: str, before: Samples, now: Samples) -> None:
    """Checks that the samples are of the same kind as those on which a run was trained.

    Args:
        who: resume or from, for messages.

    Raises:
        ConfigError: a property of the samples differs.
    """
    if before.columns != now.columns and sorted(before.columns) == sorted(now.columns):
        raise ConfigError(
            f"{who}: the run was trained on the columns {listed(before.columns)} in this order, but the data now have "
            f"the order {listed(now.columns)}: change the order of the columns in the file"
        )
    for key in (
        "event_shape",
        "integer_valued",
        "noisy",
        "types",
        "levels",
        "alpha",
        "standardized",
        "centered",
        "gaussian_start",
        "context",
        "classes",
    ):
        old, new = (_kind_of(getattr(samples, key)) for samples in (before, now))
        if old != new:
            raise ConfigError(
                f"{who}: the run was trained on samples with {key}={old}, but the data now have {key}={new}: leave the "
                "keys data.* unchanged, except for paths of files"
            )


def _kind_of(value: Any) -> Any:
    """Returns a property of samples. For context columns, names and categories, because moments may differ."""
    if isinstance(value, tuple) and any(isinstance(column, ContextColumn) for column in value):
        return [(c.name, *c.categories) if c.kind == CATEGORICAL else c.name for c in value]
    return list(value) if isinstance(value, tuple) else value


def check_unchanged(before: Samples, now: Samples) -> None:
    """Checks that the data of a resumed run have not changed.

    With changed data, the run could be tested on rows on which it was trained. A target would be another density.

    Raises:
        DataError: the data have changed.
    """
    change = changes(before.record, now.record)
    if change:
        raise DataError(
            f"resume: since the run began, {change}. A run must be resumed with the same data, because otherwise "
            "training rows could become test rows, or the target would be another one. Restore the data, or start a "
            "new run with the changed data (from=RUN_DIR starts it with the weights of this run)"
        )
