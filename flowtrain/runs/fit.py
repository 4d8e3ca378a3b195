"""Fits flows to data from Python: `fit` and `train` run the code of the command `flowtrain`.

Example:
    >>> import torch
    >>> x = torch.randn(200, 2)
    >>> flow = fit(x, model="affine", steps=20, progress=False)
    >>> flow.log_prob(x).shape
    torch.Size([200])
"""

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from flowtrain.bijections.linear import FromGaussian, Preconditioned
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Dataset
from flowtrain.data.tables.from_memory import Rows, column_names, event_shape_of, is_frame, table_of, write_table
from flowtrain.data.tables.table_reader import Table
from flowtrain.flow import Flow, Record
from flowtrain.models.described import TARGET
from flowtrain.runs import load
from flowtrain.runs.build import with_whole_numbers
from flowtrain.runs.compose import Composed, compose, options, read_yaml, values_of
from flowtrain.runs.console import writing_log
from flowtrain.runs.descriptions import describe, describe_solver
from flowtrain.runs.run import Ended, Parts
from flowtrain.runs.run import train as run_training
from flowtrain.runs.run_directory import claim_directory, cleaned_up_unless_begun, locked_directory, remove_empty
from flowtrain.utils.arguments import number
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.files import config_dir, config_groups, write_text
from flowtrain.utils.formatting import flattened, shown
from flowtrain.utils.status import library_reporter, reporting

log = logging.getLogger("flowtrain")

# tables of a fit in its run directory, by the key of the data that names them
TABLES = {"path": "data/train.npz", "val_path": "data/val.npz", "test_path": "data/test.npz"}
# the model whose trainer settings a flow built by hand is trained with, if it solves ODEs and if not
CONTINUOUS, DISCRETE = "ffjord", "realnvp"


def fit(
    x: Rows | Dataset | str | Path,
    *,
    model: str = "ffjord",
    label: Any = None,
    val: Any = None,
    test: Any = None,
    levels: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    run_dir: str | Path | None = None,
    progress: bool = True,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> Flow:
    """Fits a flow to data: max over theta of mean log p(x; theta), in the units of x.

    This is the command `flowtrain model=MODEL data=array`: rows are split into training, validation and test sets,
    standardised inside the flow, and trained on with early stopping, averaged weights and the guard of the solver. The
    same seed and settings give the same flow as the command. torch's random state, thread count, default dtype and
    precision settings are as before when it returns.

    Args:
        x: rows (n, d) as a NumPy array, a tensor or a data frame; images (n, C, H, W); the name of a data set
            (`"moons"`); the path of a file (`"mine.csv"`); or a `Dataset`. The flow keeps the column names of a frame.
        model: the name of a model, such as "realnvp", "glow" or "ffjord".
        label: for p(x | label), a class 0, 1, ... for each row, (n,), or the name or position of a column of x. True
            takes the labels of a data set.
        val: the validation set, which chooses the best weights: rows like x, or (rows, labels). A number is the share
            of x to hold out. None: 0.1.
        test: the test set, scored only if there is a run directory; as `val`.
        levels: the number of values if x is whole numbers 0 .. levels - 1, such as 256 for images of bytes. The flow
            then models the density of x + u with u ~ U[0, 1) (dequantization).
        steps: the number of updates. None: the default of the model.
        minutes: the time limit of the whole call. Learning rate and tolerance reach their final values by then.
        seed: of the initial weights and the batches. The split depends on `data.seed` only.
        device: auto (a GPU if there is one), cpu, cuda or cuda:0.
        run_dir: a directory for the files of a run, which must not hold one: log, metrics, checkpoints, a copy of the
            data, pictures and result.json. `flowtrain resume=RUN_DIR` continues the run. None: nothing is written.
        progress: show a progress bar.
        overrides: further settings by their keys on the command line, {"trainer.lr": 1e-3, "solver": "tsit5"} or
            ["trainer.lr=1e-3", "solver=tsit5"]; `flowtrain --help` lists them.

    Returns:
        The flow with the best validation NLL, in evaluation mode, on the device of the fit. `Flow.record` holds its
        config and the rows of metrics. If Ctrl-C interrupts the fit after the first validation, it is the best flow so
        far; a second Ctrl-C raises KeyboardInterrupt.

    Raises:
        ConfigError: a setting that does not exist or is out of range.
        DataError: data that no density can be fitted to, naming row and column.
        FlowtrainError: a loss, gradient or solve that failed; see `trainer.on_nonfinite`.

    Example:
        >>> flow = fit("moons", model="realnvp", steps=10, progress=False)
        >>> flow.sample(3).shape
        torch.Size([3, 2])
    """
    begun = time.perf_counter()
    source = source_of(x, label, val, test)
    settings = {**source.settings, "model": model, "seed": seed, "device": str(device)}
    if levels is not None:
        settings["data.levels"] = levels
    composed = _composed(settings, steps, minutes, overrides)
    if source.labelled:
        if "conditional" not in composed.config["model"]:
            raise ConfigError(f"label: model={model} is not conditional; choose realnvp, glow or ffjord")
        composed.config["model"]["conditional"] = True
    ended = _run(composed, source, run_dir, progress, begun, Parts(data=source.data))
    trainer = ended.trainer
    saved = {**trainer.checkpoints.read(), "config": trainer.config}
    flow = load.restore_flow(saved, trainer.flow.like.device, load.own_packages(trainer.config))
    flow.record = _record(saved, ended)
    return flow


def train(
    flow: Flow,
    x: Rows | Dataset | str | Path,
    *,
    label: Any = None,
    val: Any = None,
    test: Any = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    initialize: bool | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> Record:
    """Trains a flow that was built by hand, in place. For the arguments see `fit`.

    x must have the event shape and the kind of the flow. It is standardised only if the flow contains a `Standardize`.
    Afterwards, the flow has the weights of the best validation NLL and is in evaluation mode. If training fails, it has
    its former weights. With {"objective": "rectified"} among the overrides, the flow learns straight paths from its own
    present state (reflow).

    Args:
        device: None: the device of the flow.
        initialize: whether to set data-dependent parameters, such as scale and shift of ActNorm, from x first.
            None: unless the flow was trained by `fit` or `train` before.

    Returns:
        The record of the training, also in `flow.record`.

    Raises:
        ConfigError: a setting that does not exist or is out of range.
        DataError: data of another shape or kind than the flow's.
        FlowtrainError: as `fit`.

    Example:
        >>> import flowtrain, torch
        >>> flow = flowtrain.models.realnvp(2, layers=2, hidden=[8])
        >>> record = train(flow, torch.randn(100, 2), steps=5, progress=False)
        >>> record.rows[-1]["split"]
        'val'
    """
    begun = time.perf_counter()
    if not isinstance(flow, Flow):
        raise ConfigError(f"flow is of type {type(flow).__name__}: give a single Flow, such as a member of an ensemble")
    source = source_of(x, label, val, test)
    if source.labelled and flow.classes is None:
        raise DataError("the flow is not conditional: leave label out")
    kind = CONTINUOUS if flow.ode_blocks else DISCRETE
    where = flow.like.device if device is None else device
    settings = {**source.settings, "model": kind, "seed": seed, "device": str(where)}
    if source.tables:
        settings |= _data_settings(flow)
    composed = _composed(settings, steps, minutes, overrides, fixed=("model", "solver"))
    composed.config["model"] = {"name": kind}
    if run_dir is not None:
        composed.config["model"] |= {"_target_": TARGET, "flow": describe(flow)}
        composed.config["solver"] = composed.config["solver"] if flow.solver is None else describe_solver(flow.solver)
    if initialize is None:
        initialize = flow.record is None
    before = deepcopy(flow.state_dict())
    try:
        ended = _run(composed, source, run_dir, progress, begun, Parts(flow, source.data, initialize=initialize))
        saved = ended.trainer.checkpoints.read()
        load.load_averaged_weights(flow, saved)
    except BaseException:
        flow.load_state_dict(before)
        raise
    finally:
        flow.eval()
    flow.record = _record({**saved, "config": ended.trainer.config}, ended)
    return flow.record


@dataclass(frozen=True)
class Source:
    """The data of a fit.

    Attributes:
        settings: the choice of the data and its keys.
        tables: tables in memory, by the keys of the data that they take the place of.
        data: a data set that the caller has built, or None.
        labelled: whether the caller has given labels.
    """

    settings: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    data: Dataset | None = None
    labelled: bool = False


def source_of(x: Any, label: Any = None, val: Any = None, test: Any = None) -> Source:
    """Reads the arguments of `fit` that are data.

    Raises:
        ConfigError: a name that is neither a data set nor a file, or arguments that do not go together.
        DataError: rows that are not a table of numbers.
    """
    if not isinstance(x, str | Path | Dataset):
        return _in_memory(x, label, val, test)
    for name, given in (("val", val), ("test", test)):
        if given is not None:
            raise ConfigError(f"{name}: only for rows in memory; {_by_overrides(x, name)}")
    named = not isinstance(x, Dataset) and str(x) in options("data", [config_dir()])
    if isinstance(x, Dataset) or named:
        if label not in (None, True):
            raise ConfigError("label: this data set has its own labels; give label=True to use them")
        chosen = _settings_of(x) if isinstance(x, Dataset) else {"data": str(x)}
        return Source(chosen, data=x if isinstance(x, Dataset) else None, labelled=label is True)
    if not Path(x).expanduser().is_file():
        raise ConfigError(f"x={str(x)!r}: no data set and no file has this name")
    settings: dict[str, Any] = {"data": "array", "data.path": str(Path(x).expanduser().absolute())}
    if label is not None:
        if not isinstance(label, str | int):
            raise ConfigError("label: for a file, give the name or the position of its column of labels")
        settings["data.label"] = label
    return Source(settings, labelled=label is not None)


def _by_overrides(x: Any, name: str) -> str:
    if isinstance(x, Dataset):
        return "a Dataset has its own held-out sets"
    return f"for data by name or path, give overrides={{'data.{name}_path': FILE}}"


def _settings_of(data: Dataset) -> dict[str, Any]:
    """The settings of the config that names the class of a data set, else those for finite or for endless data."""
    target = f"{type(data).__module__}.{type(data).__qualname__}"
    folders = [config_dir()]
    named = (
        name for name in options("data", folders) if values_of("data", name, folders)["data"]["_target_"] == target
    )
    endless = {"data": "moons", "recipe": "none"}
    return {"data": found} if (found := next(named, None)) else endless if data.n_train is None else {"data": "array"}


def _in_memory(x: Any, label: Any, val: Any, test: Any) -> Source:
    """Rows in memory, as tables in the place of the files of data=array."""
    settings: dict[str, Any] = {"data": "array"}
    labels = None
    if isinstance(label, str | int):
        settings["data.label"] = label
    elif label is not None:
        labels = label
    names = column_names(x) if is_frame(x) else ()
    free = next(name for name in ("label", "class_label", "_label") if name not in names)
    table = table_of(x, "x", labels, free)
    if labels is not None:
        settings["data.label"] = free if names else len(table.columns) - 1
    if (event_shape := event_shape_of(x)) is not None:
        settings["data.event_shape"] = event_shape
    tables = {"path": table}
    for key, given in (("val", val), ("test", test)):
        if given is None:
            continue
        if isinstance(given, int | float):
            settings[f"data.{key}_fraction"] = given
            continue
        rows, own = given if isinstance(given, tuple) else (given, None)
        if (own is None) != (labels is None):
            raise DataError(f"{key}: give (rows, labels) if label is an array, else rows alone")
        held = table_of(rows, key, own, free)
        if is_frame(rows) and names:
            missing = [name for name in table.columns if name not in held.columns]
            if missing:
                raise DataError(f"{key} has no column {missing[0]!r}; it needs the columns of x")
            held = held.only([held.columns.index(name) for name in table.columns])
            held = replace(held, indices=table.indices)
        elif not is_frame(rows) and names and len(held.columns) == len(table.columns):
            held = replace(held, columns=table.columns)
        tables[f"{key}_path"] = held
    return Source(settings, tables, labelled=label is not None)


def _data_settings(flow: Flow) -> dict[str, Any]:
    """The keys of data=array with which its samples are of the kind that a flow takes."""
    parts = list(flow.modules())
    return {
        "data.standardize": any(isinstance(part, Standardize) for part in parts),
        "data.gaussian_start": any(isinstance(part, FromGaussian | Preconditioned) for part in parts),
        "data.center": flow.centered,
        "data.levels": flow.levels,
        "data.dequantize": list(flow.noisy) or (flow.integer_valued and flow.levels is None),
    }


def _composed(
    settings: Mapping[str, Any],
    steps: int | None,
    minutes: float | None,
    overrides: Mapping[str, Any] | Sequence[str] | None,
    fixed: Sequence[str] = (),
) -> Composed:
    """The config of a fit; overrides win.

    Args:
        fixed: groups that overrides cannot change.
    """
    settings = dict(settings)
    if steps is not None:
        settings["trainer.steps"] = steps
    if minutes is not None:
        settings["time_budget"] = 60 * number("minutes", minutes)
    given = _as_mapping(overrides)
    refused = [key for key in flattened(given) if key.partition(".")[0] in fixed]
    if refused:
        raise ConfigError(f"overrides: {refused[0]} cannot be changed, because the flow is built already")
    composed = compose({**settings, **given})
    return replace(composed, config=with_whole_numbers(composed.config, config_groups()))


def _as_mapping(overrides: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Overrides by their keys; a list has the form of a command line.

    Raises:
        ConfigError: an entry of a list that is not KEY=VALUE.
    """
    if overrides is None or isinstance(overrides, Mapping):
        return dict(overrides or {})
    found = {}
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = str(override).partition("=")
        if not equals:
            raise ConfigError(f"overrides: {override!r}: give KEY=VALUE")
        found[key] = read_yaml(value)
    return found


def _run(
    composed: Composed, source: Source, run_dir: str | Path | None, progress: bool, begun: float, parts: Parts
) -> Ended:
    """Trains, in a run directory if one is given."""
    config, parts = composed.config, replace(parts, tables=source.tables)
    if source.data is not None:
        config["data"] = {"name": type(source.data).__name__}
        if run_dir is not None:
            raise ConfigError("run_dir: a run cannot be resumed with a Dataset; give rows, or a data set by its name")
    with reporting(library_reporter()) if progress else nullcontext():
        if run_dir is None:
            return _checked(run_training(config, None, begun=begun, recipes=composed.recipes, given=parts))
        path = Path(run_dir).expanduser().absolute()
        with _new_run_directory(path):
            config = {**config, "data": {**config["data"], **_write_tables(path, source.tables)}}
            _write_hydra(path, config, composed)
            with writing_log(path / "flowtrain.log"):
                given = replace(parts, tables={})
                return _checked(run_training(config, path, begun=begun, recipes=composed.recipes, given=given))


def _checked(ended: Ended) -> Ended:
    """The run that has ended. A signal that has ended it is raised again, except an interrupt after a validation.

    Raises:
        KeyboardInterrupt: an interrupt before the first validation.
    """
    if not ended.code:
        return ended
    number = ended.code - 128
    if number != signal.SIGINT:
        signal.raise_signal(number)
    elif ended.trainer.best is None:
        raise KeyboardInterrupt
    return ended


@contextmanager
def _new_run_directory(run_dir: Path) -> Iterator[None]:
    """Locks a directory for a new run. If training does not begin, the files written so far are removed."""
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    written = tuple(TABLES.values())
    try:
        with locked_directory(run_dir):
            claim_directory(run_dir)
            there = [name for name in written if (run_dir / name).exists() and not (run_dir / ".hydra").exists()]
            if there:
                raise ConfigError(f"{run_dir / there[0]} exists and is not overwritten: choose another run_dir")
            with cleaned_up_unless_begun(run_dir, (BaseException,), bool(made), written):
                yield
    finally:
        remove_empty(made)


def _write_tables(run_dir: Path, tables: Mapping[str, Table]) -> dict[str, str]:
    """Keeps tables in the run directory, for its resumption. Returns their paths."""
    paths = {key: run_dir / TABLES[key] for key in tables}
    for key, table in tables.items():
        write_table(paths[key], table)
    return {key: str(path) for key, path in paths.items()}


def _write_hydra(run_dir: Path, config: Mapping[str, Any], composed: Composed) -> None:
    """The .hydra folder as the command writes it."""
    plain = {key: value for key, value in config.items() if key != "model"}
    overrides = [f"{key}={shown(value)}" for key, value in composed.settings.items()]
    hydra = {"hydra": {"runtime": {"choices": composed.choices}, "overrides": {"task": overrides}}}
    model = {key: value for key, value in config["model"].items() if not isinstance(value, Mapping)}
    whole = {**plain, "model": model, "resume": None, "from": None, "trust": []}
    for name, content in (("config", whole), ("hydra", hydra), ("overrides", overrides)):
        write_text(run_dir / f".hydra/{name}.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _record(saved: Mapping[str, Any], ended: Ended) -> Record:
    """The record of a fit that has ended, from the checkpoint that its flow is loaded from."""
    trainer = ended.trainer
    return Record(
        config=saved["config"],
        samples=load.samples_of(saved),
        step=saved["step"],
        rows=tuple(trainer.metrics.rows),
        seconds=trainer.seconds,
        stopped_by=trainer.stopped_by,
        held_out=dict(trainer.data.held_rows),
    )
