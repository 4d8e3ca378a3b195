"""Loads the flow of a checkpoint, after checking that its config names only trusted code and fits its weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from flowtrain.data.base import Dataset, Samples
from flowtrain.data.context import ContextColumn, is_context_column
from flowtrain.data.types import ColumnType, is_column_type
from flowtrain.flow import Density, Flow, Record
from flowtrain.models.ensemble import Ensemble
from flowtrain.runs.build import build_data, build_density, is_description, resolve_device, with_whole_numbers
from flowtrain.runs.console import without_warnings
from flowtrain.runs.descriptions import check_description, home_of, under
from flowtrain.runs.ensembles import Run, ensemble_of, runs_of
from flowtrain.training import checkpoint, checkpoint_files
from flowtrain.training.ema import averages
from flowtrain.training.resume_validation import is_count
from flowtrain.utils.arguments import below_half, path_of, shortened
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError, FlowtrainError, first_line
from flowtrain.utils.process import own_settings

# the subpackage of flowtrain from which each group of a config in a file may build
GROUP_PACKAGES = {
    "model": "models",
    "data": "data",
    "target": "data.targets",
    "solver": "ode",
    "objective": "objectives",
    "regularizer": "bijections.regularizers",
}


def check_targets(config: Mapping[str, Any], trust: Sequence[str] = ()) -> None:
    """Checks that a config from a file builds only classes of flowtrain and of the packages in `trust`.

    Raises:
        CheckpointError: a `_target_` that is not trusted, or an interpolation.
    """
    if isinstance(trust, str):
        trust = [trust]
    described = is_description(config["model"])
    if described:
        for key, value in config["model"].items():
            if key != "_target_":
                check_description(value, trust, f"model.{key}")
    for where, value in nested_values(config):
        if isinstance(value, str) and "${" in value:
            raise CheckpointError(f"the checkpoint's config is refused: it has an interpolation at {'.'.join(where)}")
        if where[-1] != "_target_" or (described and where[0] == "model"):
            continue
        roots = [f"flowtrain.{GROUP_PACKAGES[where[0]]}"] if where[0] in GROUP_PACKAGES else []
        roots += list(trust)
        if not under(value, roots) or not under(home_of(value), roots):
            raise CheckpointError(
                f"the checkpoint's config would run {value} ({'.'.join(where)}), but only "
                f"{', '.join(roots) or 'nothing'} is trusted there. If it is your own package, name it: trust=[mypkg]"
            )


def nested_values(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the plain values in nested mappings and lists, each with the keys that lead to it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from nested_values(value, (*where, str(key)))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from nested_values(value, (*where, str(i)))
    else:
        yield where, node


# Limits for configs in files. Integers up to 1024 in a model config and samples of up to 2**24 elements are always
# allowed. Larger integers must not exceed the number of weights in the file
SMALL_NUMBER, SMALL_SAMPLE = 1024, 2**24
# keys of integers that do not affect the size of a model
UNBOUNDED = ("levels", "max_nfe", "warmup")


@overload
def load(
    path: str | Path, device: str = "cpu", trust: Sequence[str] = (), weights: Sequence[float] | str | None = None
) -> Flow: ...
@overload
def load(
    path: list[Any] | tuple[Any, ...],
    device: str = "cpu",
    trust: Sequence[str] = (),
    weights: Sequence[float] | str | None = None,
) -> Ensemble: ...
def load(
    path: str | Path | Sequence[str | Path],
    device: str = "cpu",
    trust: Sequence[str] = (),
    weights: Sequence[float] | str | None = None,
) -> Flow | Ensemble:
    """Loads the flow of a run directory or a file. Loading runs no code from the file.

    The flow is in evaluation mode and has the dtype of the saved weights. If training averaged the weights (EMA), the
    flow has the averages.

    A sweep directory, or a list of runs with the same data, gives an `Ensemble`: log p(x) = log sum_m w_m p_m(x). The
    weights of the members are computed by EM on the validation rows, which are read again, see
    `flowtrain.models.ensemble.stacking_weights`. If the path is the file of an ensemble, its weights are in the file.

    Args:
        path: a run directory (its best checkpoint), a .pt file of a run or of `Flow.save`, a sweep directory, or a list
            of these. Runs of a sweep without a checkpoint are left out with a warning.
        device: cpu, cuda, cuda:0 or auto (a GPU if there is one).
        trust: packages besides flowtrain whose classes the file may name, such as ("mypkg",).
        weights: the weights of the members of an ensemble, in their order, or "equal". None: by EM, which needs the
            validation rows.

    Returns:
        The flow, or the ensemble. `Flow.record` has the config of its run; it is None for a flow that was built by
        hand.

    Raises:
        CheckpointError: the file is missing, damaged, or names code that is not trusted; runs with different data.
        ConfigError: this machine does not have the device, or the weights are invalid.
        DataError: the validation rows of an ensemble are missing or have changed.

    Example:
        >>> flow = load("outputs/2026-01-01/12-00-00")  # doctest: +SKIP
    """
    paths = [path_of("path", each) for each in path] if isinstance(path, list | tuple) else path_of("path", path)
    where, runs = resolve_device(device), runs_of(paths)
    if runs is None:
        assert isinstance(paths, Path)
        if weights is not None:
            raise ConfigError(f"weights: {path} is a single run: give a sweep directory or a list of runs")
        # the declared type of a single path is Flow, although a file may contain an ensemble
        return cast(Flow, restore(checkpoint.load(checkpoint_files.find(paths)), where, trust))
    members = []
    for run in runs:
        saved = checkpoint.load(checkpoint_files.find(run))
        members.append(Run(str(run), restore(saved, where, trust), saved["config"], samples_of(saved), saved["step"]))

    def data() -> Dataset:
        config = members[0].config
        if "_target_" not in config["data"]:
            raise DataError(f"{members[0].name} does not say what data it was trained on")
        with without_warnings():
            return build_data(config, members[0].samples)

    return ensemble_of(members, weights, data)


def restore_flow(saved: Mapping[str, Any], device: torch.device, trust: Sequence[str] = ()) -> Flow:
    """Restores the flow of a checkpoint that has been read; see `load`.

    Raises:
        CheckpointError: as in `load`, or the checkpoint is an ensemble.
    """
    flow = restore(saved, device, trust)
    if not isinstance(flow, Flow):
        raise CheckpointError(
            "the checkpoint is an ensemble of flows, but a single flow is needed here: give one of its members"
        )
    return flow


def restore(saved: Mapping[str, Any], device: torch.device, trust: Sequence[str] = ()) -> Density:
    """Restores the flow or the ensemble of a checkpoint that has been read; see `load`."""
    check_targets(saved["config"], trust)
    samples = samples_of(saved)
    # building draws random weights, and the caller may be in inference mode, whose tensors cannot be trained
    with own_settings(torch.device("cpu")):
        check_sizes(saved, samples)
        flow = build_density(saved["config"], samples)
        cast_as(flow, saved["weights"])
        load_averaged_weights(flow, saved)
    # files of flows that were built by hand have no record; files of ensembles have the data config of their members
    if "trainer" in saved["config"] or "_target_" in saved["config"].get("data", {}):
        flow.record = Record(saved["config"], samples, saved["step"])
    return flow.to(device).eval()


def own_packages(config: Mapping[str, Any]) -> list[str]:
    """Returns the packages of a config's classes, which are trusted because the user has composed the config."""
    return [
        str(group["_target_"]).split(".")[0]
        for group in config.values()
        if isinstance(group, dict) and "_target_" in group
    ]


def load_averaged_weights(flow: Density, saved: Mapping[str, Any]) -> None:
    """Loads the weights of a checkpoint into a flow, or their averages if EMA was used.

    Raises:
        CheckpointError: the weights belong to another model.
    """
    try:
        flow.load_state_dict(saved["weights"])
        if saved.get("ema"):
            flow.load_state_dict(averages(saved["ema"]), strict=False)
    except RuntimeError as e:
        first = " ".join(str(e).split())[:160]
        raise CheckpointError(f"the checkpoint's weights do not fit the model of its config ({first} ...)") from e


def cast_as(flow: Density, weights: Mapping[str, Tensor]) -> None:
    """Casts the parameters and buffers of a flow to the dtypes of the weights, for example after `flow.double()`."""
    dtypes = list({w.dtype for w in weights.values() if w.is_floating_point()})
    if len(dtypes) == 1:
        flow.to(dtypes[0])
        return
    for name, tensor in chain(flow.named_parameters(), flow.named_buffers()):
        if name in weights and tensor.is_floating_point():
            tensor.data = tensor.data.to(weights[name].dtype)


def check_sizes(saved: Mapping[str, Any], samples: Samples) -> Density | None:
    """Checks that a config builds a model of the size of the checkpoint's weights, before any memory is allocated.

    An integer in the model's config must not exceed the number of weights. The model is then built on torch's meta
    device, which allocates no memory, and must have weights of the same shapes.

    Returns:
        the model on the meta device; None for a model that needs values to be built.

    Raises:
        CheckpointError: the config does not fit the weights, or does not build a flow.
    """
    weights = saved["weights"]
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    most = max(SMALL_NUMBER, sum(w.numel() for w in weights.values()))
    # a float such as 1e9 counts as an integer if the argument is an integer
    model = with_whole_numbers({"model": saved["config"]["model"]}, ["model"])
    for where, value in nested_values(without_own_arguments(model)):
        if not isinstance(value, int) or where[-1] in UNBOUNDED or value in samples.event_shape:
            continue
        if abs(value) > most:
            raise CheckpointError(
                f"the checkpoint's {'.'.join(where)} is {value}, which is too large for its weights (at most {most})"
            )
    if math.prod(samples.event_shape) > max(SMALL_SAMPLE, most):
        raise CheckpointError(f"the checkpoint's event shape {samples.event_shape} is too large for its weights")
    try:
        with torch.device("meta"):
            sketch = build_density(saved["config"], samples)
    except FlowtrainError as e:
        raise CheckpointError(f"the checkpoint's config does not build a flow: {e}") from e
    except NotImplementedError:
        # a user's model that needs values to be built
        return None
    except RuntimeError as e:
        if "meta tensors" in str(e):
            return None
        raise CheckpointError(f"the checkpoint's config does not build a flow: {first_line(e)[:200]}") from e
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError) as e:
        raise CheckpointError(f"the checkpoint's config does not build a flow: {first_line(e)[:200]}") from e
    wrong = [name for name, w in sketch.state_dict().items() if not _fits(weights.get(name), w, samples)]
    wrong += [name for name in shapes if name not in sketch.state_dict()]
    averaged = averages(saved.get("ema") or {}).items()
    wrong += [f"ema {k}" for k, v in averaged if not _fits(v, sketch.state_dict().get(k), samples)]
    if wrong:
        raise CheckpointError(f"the checkpoint's weights do not fit the model of its config: {', '.join(wrong[:3])}")
    return sketch


def without_own_arguments(node: Any) -> Any:
    """Removes the plain arguments of classes outside flowtrain and torch from a config.

    Classes of other packages check sizes themselves.
    """
    if isinstance(node, list | tuple):
        return [without_own_arguments(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    own = "_target_" in node and not under(node["_target_"], ("flowtrain", "torch"))
    kept = {k: v for k, v in node.items() if not own or isinstance(v, Mapping | list | tuple)}
    return {k: without_own_arguments(v) for k, v in kept.items()}


def _fits(value: Any, sketch: Tensor | None, samples: Samples) -> bool:
    """Returns whether a tensor can replace a tensor of the model: same shape and kind, and no index out of range."""
    if not isinstance(value, Tensor) or sketch is None or value.shape != sketch.shape:
        return False
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (value, sketch)]
    if kinds[0] != kinds[1]:
        return False
    # only integer tensors with at least one dimension are indices; integer scalars are counts, as in batch norms
    if value.is_floating_point() or value.dtype == torch.bool or not value.numel() or not value.dim():
        return True
    return int(value.min()) >= 0 and int(value.max()) < max(SMALL_NUMBER, math.prod(samples.event_shape))


def samples_of(saved: Mapping[str, Any]) -> Samples:
    """Returns the description of the training samples in a checkpoint.

    Raises:
        CheckpointError: the description is not valid.
    """
    event_shape = tuple(saved["event_shape"])
    if "samples" not in saved:
        # the first versions, which had no images, did not write this key
        data = saved["config"]["data"]
        return Samples(event_shape, bool(data.get("dequantize")), standardized=bool(data.get("standardize")))
    try:
        samples = Samples(**{**saved["samples"], "event_shape": event_shape})
        alpha = below_half("alpha", samples.alpha)
        counts = [v for v in (samples.levels, samples.classes) if v is not None]
        good = all(type(v) is int and v > 0 for v in counts) and all(isinstance(c, str) for c in samples.columns)
        flags = (samples.integer_valued, samples.standardized, samples.centered, samples.gaussian_start)
        good &= all(isinstance(v, bool) for v in flags) and isinstance(samples.label, str | None)
        good &= all(map(is_count, samples.noisy)) and max(samples.noisy, default=-1) < math.prod(event_shape)
        good &= all(map(is_count, samples.class_counts)) and len(samples.class_counts) in (0, samples.classes)
        good &= not samples.class_counts or sum(samples.class_counts) > 0
        context = tuple(ContextColumn(**column) for column in saved["samples"].get("context", ()))
        good &= all(map(is_context_column, context)) and (not context or samples.classes is None)
        good &= all(len(row) == len(context) and all(map(math.isfinite, row)) for row in samples.context_rows)
        good &= isinstance(samples.weights, str | None)
        types = tuple(ColumnType(**one) for one in saved["samples"].get("types", ()))
        good &= all(map(is_column_type, types)) and (not types or event_shape == (len(types),))
        good &= all(
            len(part) == 3 and isinstance(part[0], str) and is_count(part[1]) and isinstance(part[2], str)
            for part in samples.record
        )
    except (TypeError, ConfigError):
        good = False
    if not good:
        raise CheckpointError(
            f"the checkpoint's description of its samples is not valid: {shortened(saved['samples'])}"
        )
    record = tuple((name, n, checksum) for name, n, checksum in samples.record)
    class_counts, noisy = tuple(samples.class_counts), tuple(samples.noisy)
    rows = tuple(map(tuple, samples.context_rows))
    context = tuple(replace(column, categories=tuple(column.categories)) for column in context)
    return replace(
        samples,
        alpha=alpha,
        noisy=noisy,
        class_counts=class_counts,
        record=record,
        context=context,
        context_rows=rows,
        types=tuple(replace(one, categories=tuple(one.categories)) for one in types),
    )
