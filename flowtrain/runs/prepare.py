"""Builds and checks the trainer of a run: its data, flow, objective and settings, from a config or a checkpoint."""

import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowtrain.data.base import Dataset, Samples, changes
from flowtrain.data.tables.table_reader import Table
from flowtrain.evaluation import check_fits
from flowtrain.flow import Flow
from flowtrain.plotting.options import PlotOptions
from flowtrain.runs import auto_settings, build, load
from flowtrain.runs.components import resolve_components
from flowtrain.runs.compose import options, with_choices
from flowtrain.runs.console import name_of, title_of
from flowtrain.training import checkpoint, tensorboard
from flowtrain.training.time_budget import TimeBudget
from flowtrain.training.trainer import Trainer
from flowtrain.utils import ranks
from flowtrain.utils.arguments import number, whole, within_memory
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError
from flowtrain.utils.files import config_dir
from flowtrain.utils.process import choose_threads
from flowtrain.utils.status import phase, status

log = logging.getLogger("flowtrain")

# the flow that a run's objective learns from, in its directory
TEACHER = "checkpoints/teacher.pt"
# the least steps for the hybrid objective
LEAST_HYBRID = 10


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
    # finds mistakes before the data are read, which can take long. Built again once the data are known
    build.build_settings(auto_settings.resolve_auto(config, None, (1,)))
    # checkpoints of an older flowtrain have no time budget
    seconds = config.get("time_budget")
    seconds = None if seconds is None else number("time_budget", seconds)
    with phase("reading the data"):
        data = build.build_data(config, **given.tables) if given.data is None else given.data
    options = PlotOptions.of(config)
    options.positions(data.event_shape, data.columns)
    config = resolve_objective(config, data)
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
    if run_dir is not None and settings.plot_every is not None:
        # imported here because it takes matplotlib
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
    if saved is None and taught is not None and build.takes_teacher(config) and ranks.is_first():
        # written last, because the directory holds a run from then on; as read before, because the other run may have
        # changed since
        checkpoint.save(run_dir / TEACHER, taught)
    if board is not None:
        board.follow(trainer.metrics, trainer.step, run_dir / "plots")
    return trainer


def resolve_objective(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """The config with objective=auto replaced by the objective that suits the data, and the settings that suit it."""
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


def data_like(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """The choices whose recipes and trainer settings suit these data."""
    name = str(config["data"].get("name"))
    if data.n_train is None and name not in options("data", [config_dir()]):
        return {"data": "moons", "recipe": "none"}
    return {"data": "array" if data.n_train is not None else name}


def objective_of(event_shape: tuple[int, ...], steps: Any) -> str:
    """The objective that was better for model=ffjord on tables of so many columns.

    Args:
        steps: the number of steps. Below LEAST_HYBRID, the likelihood is used.
    """
    few = isinstance(steps, int) and steps < LEAST_HYBRID
    return "likelihood" if len(event_shape) > 1 or event_shape[0] <= 2 or few else "hybrid"


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
