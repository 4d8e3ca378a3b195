"""Fits flows to data from Python. `fit` and `train` run the same code as the command `flowtrain`.

Example:
    >>> import torch
    >>> x = torch.randn(200, 2)
    >>> flow = fit(x, model="affine", steps=20, progress=False)
    >>> flow.log_prob(x).shape
    torch.Size([200])
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, cast

import torch
import yaml

from flowtrain.bijections.linear import FromGaussian, Preconditioned
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Dataset
from flowtrain.data.tables.from_memory import Rows, write_table
from flowtrain.data.tables.roles import Roles
from flowtrain.data.targets.base import FunctionTarget, Target, TargetData
from flowtrain.flow import Flow, Record
from flowtrain.models.described import TARGET
from flowtrain.models.ensemble import Ensemble
from flowtrain.runs import load
from flowtrain.runs.auto_settings import AUTO
from flowtrain.runs.build import build_data, with_whole_numbers
from flowtrain.runs.compose import TARGET_CHOICES, Composed, compose, default_choices, options
from flowtrain.runs.console import writing_log
from flowtrain.runs.descriptions import describe, describe_solver
from flowtrain.runs.prepare import Parts
from flowtrain.runs.run import Ended
from flowtrain.runs.run import train as run_training
from flowtrain.runs.run_directory import claim_directory, cleaned_up_unless_begun, locked_directory, remove_empty
from flowtrain.runs.source import ROLES, Source, as_mapping, plain, source_of
from flowtrain.utils.arguments import choose, number, path_of, shortened
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.files import config_dir, config_groups, write_text
from flowtrain.utils.formatting import counted, flattened, shown
from flowtrain.utils.status import library_reporter, reporting

log = logging.getLogger("flowtrain")

# files in the run directory to which a fit copies its tables, by the key of the data that names them
TABLES = {"path": "data/train.npz", "val_path": "data/val.npz", "test_path": "data/test.npz"}
# further files that a fit writes in its run directory
FILES = (".hydra/*.yaml", "flowtrain.log", "checkpoints/*.pt", "plots/*.png", "plots/*.pdf", "plots/*.svg")
# keys of target=custom that are arguments of `fit_target`
TARGET_KEYS = ("dim", "types", "columns", "loc", "scale", "log_z")
# models whose trainer settings are used for a flow of an unknown model: for a flow that solves ODEs, and for others
CONTINUOUS, DISCRETE = "ffjord", "realnvp"


_FITTING = threading.RLock()


def _renew_lock() -> None:
    global _FITTING
    _FITTING = threading.RLock()


# a forked process needs a new lock, because the thread that holds the lock is not copied
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Lets one fit run at a time, because all threads of a process share random state, default dtype and log level."""
    with _FITTING:
        yield


@_one_at_a_time()
def fit(
    x: Rows | Dataset | str | Path,
    *,
    model: str | None = None,
    flow: Flow | None = None,
    label: Any = None,
    context: Any = None,
    weights: Any = None,
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
    """Fits a flow to data by maximum likelihood: max over theta of the mean of log p(x; theta), in nats.

    This does the same as the command `flowtrain model=MODEL data=array`. Without `model`, several models are fitted to
    rows or a file within three minutes, and the best are stacked, see `flowtrain.runs.search`. Rows are split into
    training, validation and test sets. The flow standardises them; its log p and samples are in the units of x.
    Training has early stopping, averaged weights and a guard against solver error. With the same seed and settings,
    `fit` and the command give the same flow. The two flows can differ if a time limit ends the training, or if
    other threads draw random numbers from torch at the same time.

    torch's random state, thread count, default dtype and precision settings are restored on return. All threads of a
    process share them, so fits in several threads run one after another.

    Args:
        x: rows (n, d) as a NumPy array, a tensor or a data frame; images (n, C, H, W); the name of a data set
            (`"moons"`); the path of a file (`"mine.csv"`, `"mine.parquet"`); or a `Dataset`. The flow keeps the column
            names of a frame. Rows with missing values are refused, or left out with overrides={"data.missing": "drop"}.
        model: the name of a model: "nsf", "maf", "ffjord", "realnvp", "glow", "mixture" or "affine"; or "auto", which
            searches for the best. None: "auto" for rows and files, "ffjord" for data sets by name.
        flow: a flow to start from, such as the result of an earlier fit. `train` trains a copy of it, so `model` is not
            given. None: a new flow.
        label: for p(x | label), a class 0, 1, ... for each row, (n,), or the name or position of a column of x. True
            uses the labels of a data set.
        context: for p(x | context), the values of the context c for each row: an array (n, k) or (n,), or a data frame,
            whose names are kept. Or the columns of x or of a file that are the context: a name, a position, or a list
            of them. The real columns of the context are standardised. Columns with text are categorical.
        weights: a weight of each row, (n,), or the name or position of a column of x or of a file. Only the ratios of
            the weights matter.
        val: the validation set, by which the best weights are chosen: rows like x. If label, context or weights are
            arrays: (rows, labels), (rows, context) or (rows, weights), or for several of them a mapping such as {"x":
            rows, "context": context, "weights": weights}. A number is the share of x to hold out. None: 0.1.
        test: the test set, given like `val`. The test set is scored only if there is a run directory.
            `Flow.record.held_out` has the positions of the rows that were held out from x.
        levels: the number of values if x contains integers 0 .. levels - 1, such as 256 for images of bytes. The flow
            then models the density of x + u with u ~ U[0, 1) (dequantization). For counts without a largest value, give
            overrides={"data.dequantize": True} instead.
        steps: the number of optimizer steps. None: the default for the model and the data.
        minutes: the time limit of the whole call. Learning rate and tolerance reach their final values before this
            limit. None: three minutes for a search, and no limit for a single model.
        seed: the seed of the initial weights and the batches. The split into sets depends on the key `data.seed` only.
        device: auto (a GPU if there is one), cpu, cuda or cuda:0.
        run_dir: a directory for the files of a run: log, metrics, checkpoints, a copy of the data, pictures and
            result.json. The directory must not contain another run. `flowtrain resume=RUN_DIR` continues the run. None:
            nothing is written.
        progress: whether to show a progress bar.
        overrides: further settings by their keys on the command line, {"trainer.lr": 1e-3, "solver": "tsit5"} or
            ["trainer.lr=1e-3", "solver=tsit5"]. They override the arguments above. `flowtrain --help` lists the keys.
            Messages name settings by these keys.

    Returns:
        The flow with the best validation NLL, in evaluation mode, on the device of the fit. A search returns an
        `Ensemble` if more than one model has a positive weight. An ensemble has no `forward` and `inverse`.
        `Flow.record` contains the config and the rows of metrics. If Ctrl-C interrupts the fit after the first
        validation, the best flow so far is returned. A second Ctrl-C raises KeyboardInterrupt.

    Raises:
        ConfigError: a setting that does not exist or is out of range.
        DataError: missing values, text, or other data to which no density can be fitted. The message names row and
            column.
        FlowtrainError: a loss, a gradient or an ODE solve failed; see the key `trainer.on_nonfinite`.

    Example:
        >>> flow = fit("moons", model="realnvp", steps=10, progress=False)
        >>> flow.sample(3).shape
        torch.Size([3, 2])
    """
    begun = time.perf_counter()
    if flow is not None:
        _check_trainable(flow)
        for name, given in (("model", model), ("levels", levels)):
            if given is not None:
                raise ConfigError(f"{name}: the argument flow already determines it; leave {name} out")
        copied = deepcopy(flow)
        train(
            copied,
            x,
            label=label,
            context=context,
            weights=weights,
            val=val,
            test=test,
            steps=steps,
            minutes=minutes,
            seed=seed,
            device=None if device == "auto" else device,
            run_dir=run_dir,
            progress=progress,
            overrides=overrides,
        )
        return copied
    if model is not None and not isinstance(model, str):
        raise ConfigError(
            f"model is of type {type(model).__name__}: give a name such as model='realnvp', or the argument flow for a "
            "flow that was built by hand"
        )
    source = source_of(x, {"label": label, "context": context, "weights": weights}, val, test, overrides)
    chosen = _open_choices(source, model, as_mapping(overrides))
    settings = {**source.settings, **chosen, "seed": seed, "device": str(device)}
    if levels is not None:
        settings["data.levels"] = levels
    composed = _composed(settings, steps, minutes, overrides, held=source.held_keys)
    if source.labelled:
        if "conditional" not in composed.config["model"]:
            raise ConfigError(
                f"label: model={chosen['model']} cannot be conditional: choose a model of flowtrain, such as nsf or maf"
            )
        composed.config["model"]["conditional"] = True
    ended = _run(composed, source, run_dir, progress, begun, Parts(data=source.data))
    trainer = ended.trainer
    saved = {**trainer.read(), "config": trainer.config}
    # the declared type is Flow, although a search may return an ensemble
    fitted = cast(Flow, load.restore(saved, trainer.device, load.own_packages(trainer.config)))
    fitted.record = _record(saved, ended)
    return fitted


@_one_at_a_time()
def train(
    flow: Flow,
    x: Rows | Dataset | str | Path,
    *,
    label: Any = None,
    context: Any = None,
    weights: Any = None,
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
    """Trains a flow that was built by hand, in place. Arguments that are not listed here are as in `fit`.

    The rows of x must have the event shape of the flow, and be integers if the flow is integer-valued. The rows are
    standardised only if the flow contains a `flowtrain.bijections.Standardize`. Afterwards, the flow has the weights
    with the best validation NLL and is in evaluation mode. If training fails, the flow gets its former weights back.
    With overrides={"objective": "rectified"}, the present flow is the teacher for straight paths (reflow).

    Args:
        device: the device to train on. None: the device of the flow.
        initialize: whether to set data-dependent parameters first, such as scale and shift of ActNorm. A flow with
            context then gets the names of the context columns, and their mean and std, by which they are standardised.
            None: only if the flow was never trained by `fit` or `train`.
        overrides: as in `fit`. The groups `model` and `solver` cannot be changed.

    Returns:
        The record of the training, also in `flow.record`.

    Raises:
        ConfigError: a setting that does not exist or is out of range.
        DataError: the data do not fit the flow, for example in their shape.
        FlowtrainError: as in `fit`.

    Example:
        >>> import flowtrain, torch
        >>> flow = flowtrain.models.realnvp(2, layers=2, hidden=[8])
        >>> record = train(flow, torch.randn(100, 2), steps=5, progress=False)
        >>> record.metrics[-1]["split"]
        'val'
    """
    begun = time.perf_counter()
    _check_trainable(flow)
    source = source_of(x, {"label": label, "context": context, "weights": weights}, val, test, overrides)
    if source.labelled and flow.classes is None:
        raise DataError("the flow is not conditional: remove the argument label")
    kind = _kind(flow)
    where = flow.like.device if device is None else device
    settings = {**source.settings, "model": kind, "seed": seed, "device": str(where)}
    picked = "data.columns" in flattened(as_mapping(overrides))
    if source.tables:
        settings |= _data_settings(flow, source, picked)
    elif "data.path" in settings:
        settings |= _types_in_file(flow, source, picked)
    composed = _composed(settings, steps, minutes, overrides, ("model", "solver"), source.held_keys)
    composed.config["model"] = {"name": kind}
    if run_dir is not None:
        composed.config["model"] |= {"_target_": TARGET, "flow": describe(flow)}
        composed.config["solver"] = composed.config["solver"] if flow.solver is None else describe_solver(flow.solver)
    if initialize is None:
        initialize = flow.record is None
    before, context = deepcopy(flow.state_dict()), (flow.context, flow.context_rows)
    try:
        ended = _run(composed, source, run_dir, progress, begun, Parts(flow, source.data, initialize=initialize))
        saved = ended.trainer.read()
        load.load_averaged_weights(flow, saved)
    except BaseException:
        flow.load_state_dict(before)
        flow.context, flow.context_rows = context
        raise
    finally:
        flow.eval()
    flow.record = _record({**saved, "config": ended.trainer.config}, ended)
    return flow.record


@_one_at_a_time()
def fit_target(
    log_density: Callable[[torch.Tensor], torch.Tensor] | Target | str,
    dim: int | None = None,
    *,
    model: str | None = None,
    flow: Flow | None = None,
    objective: str = "reverse_kl",
    types: Mapping[str, Any] | Sequence[Any] | None = None,
    columns: Sequence[str] | None = None,
    loc: float | Sequence[float] | None = None,
    scale: float | Sequence[float] | None = None,
    log_z: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    run_dir: str | Path | None = None,
    progress: bool = True,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> Flow:
    """Fits a flow q to a density p = p~ / Z that is known up to the constant Z (variational inference).

    This function runs the same code as the command `flowtrain target=NAME`. The objective `reverse_kl` minimizes
    KL(q || p) = log Z - ELBO with ELBO = E_q[log p~(x) - log q(x)], in nats. `flowtrain.evaluate_target` estimates log
    Z and the effective sample size of the fitted flow. Arguments that are not listed here are as in `fit`.

    Args:
        log_density: a function that returns log p~(x) in nats, (B,), for x (B, d), differentiable with torch; a
            `flowtrain.data.targets.base.Target`; or the name of a target, such as "funnel".
        dim: the number of columns d. It is required for a function. A `Target` and most named targets already have it.
        model: the name of a model. None: "nsf".
        flow: a flow to start from, such as a flow that was fitted to samples of an MCMC run. A copy of `flow` is
            trained. None: a new flow, close to a Gaussian with mean `loc` and standard deviation `scale`.
        objective: "reverse_kl", or "weighted_forward_kl" for densities with several modes.
        types: the types of columns with bounds, as for the key `data.types`: a mapping from names of columns, such as
            {"x1": "positive"}, or one type for each column. The density is zero outside of the bounds.
        columns: the names of the columns. None: x1, x2 and so on.
        loc, scale: mean and standard deviation of the initial distribution on the real line, a number or one for each
            column. None: the defaults of the target, which are 0 and 1 for a function.
        log_z: log Z in nats. None: unknown. The evaluation compares its estimate with this value.
        run_dir: a directory for the files of a run. `log_density` must then be the name of a target, or a function that
            can be imported by its name.

    Returns:
        The flow with the largest validation ELBO, in evaluation mode.

    Raises:
        ConfigError: a setting does not exist or is out of range, or `log_density` and `flow` differ in their columns.
        DataError: `log_density` does not return a tensor (B,).
        FlowtrainError: a loss, a gradient or an ODE solve failed; see the key `trainer.on_nonfinite`.

    Example:
        >>> flow = fit_target(lambda x: -0.5 * x.square().sum(1), 2, model="affine", steps=5, progress=False)
        >>> flow.sample(3).shape
        torch.Size([3, 2])
    """
    begun = time.perf_counter()
    if flow is not None:
        _check_trainable(flow)
        if run_dir is not None or model is not None:
            raise ConfigError(
                "flow: leave out model and run_dir. The command continues a run on a target: flowtrain target=NAME "
                "from=RUN_DIR"
            )
        # a Target and a name already determine the types
        if types is None and flow.types and not isinstance(log_density, Target | str):
            types = flow.types
    about: dict[str, Any] = {"dim": dim, "types": types, "columns": columns, "loc": loc, "scale": scale, "log_z": log_z}
    about = {key: value for key, value in about.items() if value is not None}
    if not isinstance(log_density, Target | str):
        # messages name these keys, which the config of a function in memory does not have
        overrides = as_mapping(overrides)
        about |= {key: overrides.pop(f"target.{key}") for key in TARGET_KEYS if f"target.{key}" in overrides}
    for key in about.keys() & {"dim", "loc", "scale", "log_z"}:
        about[key] = about[key].tolist() if hasattr(about[key], "tolist") else about[key]
    found = _target_settings(log_density, about)
    kind = model or TARGET_CHOICES["model"]
    if flow is not None:
        kind = CONTINUOUS if flow.ode_blocks else DISCRETE
    settings = {"data": "target", **found.settings, "model": kind, "objective": objective}
    fixed = () if flow is None else ("model", "solver")
    settings |= {"seed": seed, "device": str(device if flow is None else flow.like.device)}
    composed = _composed(settings, steps, minutes, overrides, fixed)
    parts = Parts()
    if found.target is not None:
        if run_dir is not None:
            raise ConfigError(
                "run_dir: the run directory cannot store this target. Give a function of a module, which can be "
                "imported by its name, or the name of a target"
            )
        keys = ("n_val", "n_test", "seed")
        parts = Parts(data=TargetData(found.target, **{key: composed.config["data"][key] for key in keys}))
    if flow is not None:
        data = parts.data or build_data(composed.config)
        assert isinstance(data, TargetData)
        copied = deepcopy(flow)
        composed.config["model"] = {"name": kind}
        parts = Parts(copied.train(), data, initialize=False)
    ended = _run(composed, Source({"data": "target"}, data=parts.data), run_dir, progress, begun, parts)
    trainer = ended.trainer
    saved = {**trainer.read(), "config": trainer.config}
    if flow is not None:
        load.load_averaged_weights(copied, saved)
        fitted: Flow = copied.eval()
    else:
        fitted = load.restore_flow(saved, trainer.device, load.own_packages(trainer.config))
    fitted.record = _record(saved, ended)
    return fitted


class _TargetSettings(NamedTuple):
    """The config keys of a target, or a target that a config cannot describe."""

    settings: dict[str, Any]
    target: Target | None = None


def _target_settings(log_density: Any, about: Mapping[str, Any]) -> _TargetSettings:
    """Returns the settings of a target.

    Args:
        log_density: a function, a `Target`, or the name of a target.
        about: arguments of the target, such as dim.

    Raises:
        ConfigError: `log_density` is none of these, or the number of columns is missing.
    """
    if isinstance(log_density, Target):
        if about:
            raise ConfigError(f"{next(iter(about))}: the Target already sets this value; leave this argument out")
        return _TargetSettings({}, log_density)
    if isinstance(log_density, str):
        return _TargetSettings({"target": log_density, **{f"target.{key}": value for key, value in about.items()}})
    if isinstance(log_density, type):
        raise ConfigError(
            f"log_density: {log_density.__name__} is a class; give an object of it, {log_density.__name__}(...)"
        )
    if not callable(log_density):
        raise ConfigError(f"log_density={shortened(log_density)}: give a function, a Target, or the name of a target")
    if "dim" not in about:
        raise ConfigError("dim: give the number of columns of x")
    name = f"{getattr(log_density, '__module__', None)}.{getattr(log_density, '__qualname__', None)}"
    if is_importable(log_density, name) and not name.startswith("__main__."):
        keys = {f"target.{key}": _plain_types(value) if key == "types" else value for key, value in about.items()}
        return _TargetSettings({"target": "custom", "target._target_": name, **keys})
    return _TargetSettings({}, FunctionTarget(log_density, **about))


def _plain_types(types: Mapping[str, Any] | Sequence[Any]) -> Any:
    """Returns types as text for a config."""
    if isinstance(types, str):
        return types
    if isinstance(types, Mapping):
        return {key: str(one) for key, one in types.items()}
    return [str(one) for one in types]


def is_importable(function: Any, name: str) -> bool:
    """Returns whether a dotted name can be imported and is this function."""
    try:
        return resolve_name(name) is function
    except Exception:  # importing by name can raise any exception
        return False


def _check_trainable(flow: Any) -> None:
    """Checks that `train` can train a flow.

    Raises:
        ConfigError: not a flow, no parameter that requires a gradient, or inference tensors.
    """
    if isinstance(flow, Ensemble):
        raise ConfigError(
            "flow: an ensemble cannot be trained; give one of its members, flow.flows[i]. flow.log_weights are the "
            "logarithms of their weights"
        )
    if isinstance(flow, str | Path):
        raise ConfigError(f"flow={str(flow)!r}: give a Flow, as in flow=flowtrain.load({str(flow)!r})")
    if not isinstance(flow, Flow):
        raise ConfigError(f"flow={shortened(flow)}: give a Flow, or use fit, which builds one from the name of a model")
    parameters = list(flow.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ConfigError("the flow has no parameter to train: set requires_grad for at least one")
    if any(tensor.is_inference() for tensor in (*parameters, *flow.buffers())):
        raise ConfigError(
            "the flow was built in torch.inference_mode and cannot be trained: build it outside, or train a "
            "copy.deepcopy of it"
        )


def _open_choices(source: Source, model: str | None, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Returns the default choices of model and objective; see `flowtrain.cli.overrides.with_default_choices`."""
    data = source.settings["data"]
    if data not in ("array", "target") or set(overrides) & {"data", "experiment"}:
        return {"model": model or "ffjord"}
    found = default_choices(set(flattened(overrides)), model, data)
    return {**({} if model is None else {"model": model}), **found}


def _kind(flow: Flow) -> str:
    """Returns the name of the model whose trainer settings suit a flow."""
    name = None if flow.record is None else flow.record.config["model"].get("name")
    known = name in options("model", [config_dir()]) and name != AUTO
    return str(name) if known else CONTINUOUS if flow.ode_blocks else DISCRETE


def _types_in_file(flow: Flow, source: Source, picked: bool) -> dict[str, Any]:
    """Returns the types of the columns of a file, by name. Without names, all columns must belong to the samples."""
    names: Sequence[str | int] = () if flow.record is None else flow.record.samples.columns
    if not names and not picked and not any(f"data.{role}" in source.settings for role in ROLES):
        names = range(len(flow.types))
    types = {str(name): str(one) for name, one in zip(names, flow.types, strict=False)}
    return {"data.types": types} if types else {}


def _data_settings(flow: Flow, source: Source, picked: bool) -> dict[str, Any]:
    """Returns the keys of data=array that make its samples fit a flow.

    Args:
        picked: whether the user has chosen columns of the table.

    Raises:
        DataError: x has another number of columns than the samples of the flow.
    """
    parts, table = list(flow.modules()), source.tables["path"]
    label, context, weights = (source.settings.get(f"data.{role}") for role in ROLES)
    roles = Roles(label, context, weights)
    others = roles.pick(table.columns, table.path).all
    # columns are given by their positions in the table, which also has the columns of other roles
    places = [i for i in range(len(table.columns)) if i not in others]
    trained = () if flow.record is None else flow.record.samples.columns
    by_name = table.named and trained and all(table.columns.count(name) == 1 for name in trained)
    if by_name:
        places = [table.columns.index(name) for name in trained]
    elif not picked and len(places) != math.prod(flow.event_shape):
        raise DataError(
            f"the flow was made for samples of shape {flow.event_shape}, but x has {counted(len(places), 'column')}"
        )
    noisy = [places[i] for i in flow.noisy if i < len(places)]
    return {
        "data.columns": places if by_name else None,
        "data.standardize": any(isinstance(part, Standardize) for part in parts),
        "data.gaussian_start": any(isinstance(part, FromGaussian | Preconditioned) for part in parts),
        "data.center": flow.centered,
        "data.levels": flow.levels,
        "data.dequantize": not flow.types and (noisy or (flow.integer_valued and flow.levels is None)),
        "data.types": {str(i): str(one) for i, one in zip(places, flow.types, strict=False)} or None,
    }


def _composed(
    settings: Mapping[str, Any],
    steps: int | None,
    minutes: float | None,
    overrides: Mapping[str, Any] | Sequence[str] | None,
    fixed: Sequence[str] = (),
    held: Sequence[str] = (),
) -> Composed:
    """Composes the config of a fit. `overrides` override the other settings.

    Args:
        fixed: groups that overrides cannot change.
        held: keys of data in memory, which overrides cannot change.
    """
    settings = dict(settings)
    if steps is not None:
        settings["trainer.steps"] = steps
    if minutes is not None:
        settings["time_budget"] = 60 * number("minutes", plain(minutes))
    given = as_mapping(overrides)
    refused = [key for key in flattened(given) if key.partition(".")[0] in fixed]
    if refused:
        raise ConfigError(f"overrides: {refused[0]} cannot be changed, because the flow is built already")
    taken = [key for key in flattened(given) if key in ("data", "data._target_", *held)]
    if held and taken:
        raise ConfigError(f"overrides: {taken[0]} cannot be changed, because the rows are in memory")
    composed = compose({**settings, **given})
    for group in ("model", "data"):
        if composed.choices[group] is None:
            raise ConfigError(f"{group}={None}: {choose(None, options(group, [config_dir()]))}")
    return replace(composed, config=with_whole_numbers(composed.config, config_groups()))


def _run(
    composed: Composed, source: Source, run_dir: str | Path | None, progress: bool, begun: float, parts: Parts
) -> Ended:
    """Trains a flow, in a run directory if one is given."""
    config, parts = composed.config, replace(parts, tables=source.tables)
    if source.data is not None:
        config["data"] = {"name": type(source.data).__name__}
        if run_dir is not None:
            raise ConfigError("run_dir: a run cannot be resumed with a Dataset; give rows, or a data set by its name")
    with reporting(library_reporter()) if progress else nullcontext():
        if run_dir is None:
            return _checked(run_training(config, None, begun=begun, recipes=composed.recipes, given=parts))
        path = path_of("run_dir", run_dir).absolute()
        with _new_run_directory(path):
            paths = {key: str(path / TABLES[key]) for key in source.tables}
            config = {**config, "data": {**config["data"], **paths}}
            # the config is written first, because it identifies the files of a killed fit
            _write_hydra(path, config, composed)
            for key, table in source.tables.items():
                write_table(Path(paths[key]), table)
            with writing_log(path / "flowtrain.log"):
                given = replace(parts, tables={})
                return _checked(run_training(config, path, begun=begun, recipes=composed.recipes, given=given))


def _checked(ended: Ended) -> Ended:
    """Re-raises the signal that ended a run, unless it is an interrupt after the first validation. Returns the run.

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
            there = _files_of_others(run_dir)
            if there:
                raise ConfigError(f"{there[0]} exists and is not overwritten: choose another run_dir")
            with cleaned_up_unless_begun(run_dir, (BaseException,), bool(made), written):
                yield
    finally:
        remove_empty(made)


def _files_of_others(run_dir: Path) -> list[Path]:
    """Returns the files that a fit would overwrite, except leftovers of a fit killed before its first checkpoint."""
    config, overrides = (_yaml_of(run_dir / f".hydra/{name}.yaml") for name in ("config", "overrides"))
    if isinstance(config, Mapping) and {"model", "data", "solver", "objective", "trainer"} <= config.keys():
        data = config["data"] if isinstance(config["data"], Mapping) else {}
        # data/train.npz is our own copy if a fit wrote this config. A command lists its data.path among the overrides
        own = data.get("path") == str(run_dir / TABLES["path"]) and isinstance(overrides, list)
        own = own and not any(str(entry).startswith("data.path=") for entry in overrides)
        patterns: tuple[str, ...] = () if own else tuple(TABLES.values())
    else:
        patterns = (*TABLES.values(), *FILES)
    found = [path for pattern in patterns for path in sorted(run_dir.glob(pattern))]
    links = [path for pattern in (*TABLES.values(), *FILES) for path in run_dir.glob(pattern) if path.is_symlink()]
    # an empty log may come from a fit that was refused
    return [*links, *(path for path in found if path.stat().st_size)]


def _yaml_of(path: Path) -> Any:
    """Returns the content of a YAML file; None if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError):
        return None


def _write_hydra(run_dir: Path, config: Mapping[str, Any], composed: Composed) -> None:
    """Writes the .hydra folder as the command `flowtrain` does."""
    plain = {key: value for key, value in config.items() if key != "model"}
    overrides = [f"{key}={shown(value)}" for key, value in composed.settings.items()]
    hydra = {"hydra": {"runtime": {"choices": composed.choices}, "overrides": {"task": overrides}}}
    model = {key: value for key, value in config["model"].items() if not isinstance(value, Mapping)}
    whole = {**plain, "model": model, "resume": None, "from": None, "trust": []}
    for name, content in (("config", whole), ("hydra", hydra), ("overrides", overrides)):
        write_text(run_dir / f".hydra/{name}.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _record(saved: Mapping[str, Any], ended: Ended) -> Record:
    """Returns the record of a fit that has ended. `saved` is the checkpoint of its flow."""
    trainer = ended.trainer
    return Record(
        config=saved["config"],
        samples=load.samples_of(saved),
        step=saved["step"],
        metrics=tuple(trainer.metrics.rows),
        seconds=trainer.seconds,
        stopped_by=trainer.stopped_by,
        held_out=dict(trainer.data.held_rows),
    )
