"""Saves a flow to a file of the user's choice, in the format of checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flowtrain.data.base import Samples
from flowtrain.flow import Density, Flow
from flowtrain.models.described import TARGET
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import Solver, ode_solver
from flowtrain.runs.build import build_density, build_solver
from flowtrain.runs.descriptions import describe, describe_solver
from flowtrain.runs.load import check_sizes
from flowtrain.training import checkpoint
from flowtrain.utils.arguments import path_of
from flowtrain.utils.errors import CheckpointError, ConfigError, FlowtrainError, first_line

# the config of the data for flows that were built by hand
NO_DATA = {"name": "unknown data"}


def save(flow: Density, path: str | Path) -> None:
    """Writes a flow to a file; see `Flow.save`.

    If a run has trained the flow, the file contains the config and the samples of the run, and the present solver of
    the flow. If the flow was built by hand, or its structure has changed since the run, the file contains a description
    of its parts. The file of an ensemble contains a description and the data config of the members.

    Raises:
        ConfigError: the path does not end in .pt, or is a directory.
        CheckpointError: the file cannot be written, or a part of the flow cannot be described.
    """
    path = path_of("path", path)
    if path.is_dir():
        raise ConfigError(f"{path} is a directory: give the name of a file, such as {path / 'flow.pt'}")
    if path.suffix != ".pt":
        raise ConfigError(f"{path}: give a name that ends in .pt, such as {path.name or 'flow'}.pt")
    content = content_of(flow)
    try:
        # no copy of the previous file is kept, because the directory belongs to the user
        checkpoint.save(path, content, keep_previous=False)
    except OSError as e:
        raise CheckpointError(f"{path}: the flow could not be written ({e})") from e


def content_of(flow: Density) -> dict[str, Any]:
    """Returns the content of a checkpoint of the flow; see `flowtrain.training.checkpoint`."""
    record = flow.record
    if record is not None and isinstance(flow, Flow):
        content = {**_content(flow, record.samples), "config": {**record.config}, "step": record.step}
        if flow.solver is not None:
            content["config"]["solver"] = _solver_group(record.config, flow.solver)
        if _differs(content, flow, record.samples) is None:
            return content
    samples = Samples(
        flow.event_shape,
        integer_valued=flow.integer_valued,
        levels=flow.levels,
        classes=flow.classes,
        centered=flow.centered,
        noisy=tuple(flow.noisy),
        class_counts=tuple(flow.class_counts),
        context=flow.context,
        context_rows=flow.context_rows,
        types=flow.types,
    )
    data, step = NO_DATA, 0
    if record is not None and isinstance(flow, Ensemble):
        samples, data, step = record.samples, record.config["data"], record.step
    model = {"name": "ensemble" if isinstance(flow, Ensemble) else "flow", "_target_": TARGET, "flow": describe(flow)}
    solver = describe_solver(flow.solver or ode_solver())
    content = {**_content(flow, samples), "step": step, "config": {"model": model, "data": data, "solver": solver}}
    if (why := _differs(content, flow, samples)) is not None:
        raise CheckpointError(
            f"the flow cannot be saved: the arguments of its constructors build a different flow ({why}). Its parts "
            "were changed after they were built: pass such changes as arguments instead"
        )
    return content


def _content(flow: Density, samples: Samples) -> dict[str, Any]:
    described = {key: value for key, value in asdict(samples).items() if key != "event_shape"}
    weights = {name: w.detach() for name, w in flow.state_dict().items()}
    return {"event_shape": list(flow.event_shape), "samples": described, "step": 0, "weights": weights, "ema": None}


def _solver_group(config: Mapping[str, Any], solver: Solver) -> dict[str, Any]:
    """Returns the solver group of the run's config, or a description of `solver` if it differs from this group."""
    own = build_solver(config)
    if type(own) is type(solver) and own.settings == solver.settings:
        return dict(config["solver"])
    return describe_solver(solver)


def _differs(content: Mapping[str, Any], flow: Density, samples: Samples) -> str | None:
    """Describes the first structural difference between a flow and the flow that a checkpoint builds; None if equal."""
    try:
        with torch.random.fork_rng(devices=[]):
            # `check_sizes` returns None for a model that cannot be built on the meta device
            again = check_sizes(content, samples) or build_density(content["config"], samples)
    except FlowtrainError as e:
        return first_line(e)
    before, after = ([(name, type(m)) for name, m in f.named_modules()] for f in (flow, again))
    for (name, kind), (other_name, other) in zip(before, after, strict=False):
        if (name, kind) != (other_name, other):
            return (
                f"{name or 'flow'} is a {kind.__name__}, but {other_name or 'flow'} in the file is a {other.__name__}"
            )
    shapes = [{k: tuple(w.shape) for k, w in f.state_dict().items()} for f in (flow, again)]
    if len(before) != len(after) or shapes[0] != shapes[1]:
        return "the file has other weights"
    return None
