"""Makes an ensemble of runs: finds the runs, checks that they have the same data, and computes the weights."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowtrain.data.base import Dataset, Samples, changes
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import check_fits
from flowtrain.evaluation.log_likelihood import held_out, log_probs
from flowtrain.evaluation.log_weights import weighted_samples
from flowtrain.flow import Density, Flow, Record
from flowtrain.models.ensemble import Ensemble, difference_in_kind, stacking_weights
from flowtrain.runs.run_directory import SEARCH_STATE
from flowtrain.training import checkpoint_files
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError, FlowtrainError, SolverError
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")

Weights = Sequence[float] | str | None
EQUAL = "equal"
# largest number of validation rows for the weights, evenly spaced
ROWS = 20_000
# attributes of `Samples` that all members must have in common
SAME = ("event_shape", "integer_valued", "levels", "noisy", "columns", "label", "context")
# keys of the start distribution of a target, which do not change its density
START = ("loc", "scale")


class Run(NamedTuple):
    """A run or a file that becomes a member of an ensemble. `name` is used in tables and messages."""

    name: str
    flow: Density
    config: Mapping[str, Any]
    samples: Samples
    step: int


def runs_of(path: str | Path | Sequence[str | Path]) -> list[Path] | None:
    """Returns the runs of an ensemble from a list or a sweep directory; None for a single run or file.

    Runs of a sweep that have no checkpoint are left out with a warning. A list may contain sweep directories.

    Raises:
        CheckpointError: an empty list, or a sweep in which no run has a checkpoint.
    """
    if isinstance(path, str | Path):
        return _runs_inside(Path(path).expanduser())
    found = []
    for each in path:
        inside = _runs_inside(Path(each).expanduser())
        found += [Path(each).expanduser()] if inside is None else inside
    if not found:
        raise CheckpointError("ckpt is an empty list: give the members of an ensemble, as in [RUN1,RUN2]")
    return found


def _runs_inside(root: Path) -> list[Path] | None:
    if not root.is_dir() or checkpoint_files.has_checkpoint(root):
        return None
    # skips the candidates of a search, which are in a directory inside its run
    begun = {path.parent for path in root.glob("**/checkpoints") if not (path.parents[1] / SEARCH_STATE).is_file()}
    begun |= {path.parent.parent for path in root.glob("**/.hydra/overrides.yaml")}
    runs = sorted(begun - {root}, key=lambda run: [(len(part), part) for part in run.parts])
    if not runs:
        return None
    found = [run for run in runs if checkpoint_files.has_checkpoint(run)]
    if not found:
        raise CheckpointError(f"{root}: none of the {len(runs)} runs in this directory has a checkpoint")
    for run in runs:
        if run not in found:
            log.warning("%s has no checkpoint and is left out of the ensemble", run)
    return found


def ensemble_of(runs: Sequence[Run], weights: Weights, data: Callable[[], Dataset]) -> Ensemble:
    """Returns the ensemble of runs with the same data, in evaluation mode.

    Args:
        weights: the weights of the members, or "equal". None: by EM on the validation rows of `data`, see
            `stacking_weights`; for a target, by EM on weighted samples of all members.
        data: builds the data set on which the runs were trained.

    Raises:
        CheckpointError: two runs have different data. The message names them and the difference.
        ConfigError: invalid weights.
        DataError: the data are missing or have changed.
        NonFiniteError: no member has a finite log p at some validation row.
    """
    for run in runs:
        if difference := difference_between(runs[0], run):
            raise CheckpointError(
                f"{runs[0].name} and {run.name} cannot form an ensemble, because their data differ: {difference}"
            )
    if isinstance(weights, str) and weights != EQUAL:
        raise ConfigError(f"weights={weights}: give a list of numbers, one for each member, or {EQUAL}")
    if weights is None:
        weights = _weights_by_validation(runs, data)
    weights = [1.0] * len(runs) if isinstance(weights, str) else list(weights)
    if len(weights) != len(runs):
        raise ConfigError(f"weights={weights}: give one number for each of the {len(runs)} runs")
    members = [member for run, weight in zip(runs, weights, strict=True) for member in _members_of(run, weight)]
    try:
        found = Ensemble(*map(list, zip(*members, strict=True)))
    except FlowtrainError as e:
        raise ConfigError(str(e)) from e
    one = runs[0]
    config = {**one.config, "model": {"name": f"ensemble of {len(runs)}"}}
    found.record = Record(config, replace(one.samples), max(run.step for run in runs))
    return found.eval()


def difference_between(one: Run, other: Run) -> str | None:
    """Describes the first difference between the data of two runs; None if they agree.

    Data without a record of their rows, such as toys, are compared by their configs. The start distributions of targets
    may differ.
    """
    for name in SAME:
        a, b = getattr(one.samples, name), getattr(other.samples, name)
        if a != b:
            if name == "context":
                a, b = (", ".join(column.name for column in part) or "none" for part in (a, b))
            return f"the samples differ in {name} ({a} and {b})" if a != b else f"the samples differ in {name}"
    if kind := difference_in_kind(one.flow, other.flow):
        return f"the samples differ in {kind}"
    if one.samples.record and other.samples.record:
        before = {name: rest for name, *rest in one.samples.record}
        now = {name: rest for name, *rest in other.samples.record}
        if before.keys() != now.keys():
            return f"one run has the sets {', '.join(before)}, the other run has {', '.join(now)}"
        if change := changes(one.samples.record, other.samples.record):
            return f"from the first to the second, {change}"
        if not one.config.get("target"):
            return None
    for group in ("data", "target"):
        a, b = (run.config.get(group) or {} for run in (one, other))
        for key in {**a, **b}:
            if a.get(key) != b.get(key) and not (group == "target" and key in START and _has_start(a)):
                return f"{group}.{key} is {a.get(key)} and {b.get(key)}"
    return None


def _has_start(target: Mapping[str, Any]) -> bool:
    """Returns whether `loc` and `scale` are the start distribution. In a class of the user they can be anything."""
    return str(target.get("_target_")).startswith("flowtrain.") or target.get("dim") is not None


def _members_of(run: Run, weight: float) -> list[tuple[Flow, float, str]]:
    """Returns the flows of a run with their weights and names. For an ensemble, these are its members."""
    if isinstance(run.flow, Ensemble):
        found = zip(run.flow.flows, run.flow.log_weights, run.flow.active_names, strict=True)
        return [(flow, weight * math.exp(log_w), f"{run.name}/{name}") for flow, log_w, name in found]
    assert isinstance(run.flow, Flow)
    return [(run.flow, weight, run.name)]


def _weights_by_validation(runs: Sequence[Run], data: Callable[[], Dataset]) -> list[float]:
    flows = [run.flow for run in runs]
    if len(flows) == 1:
        return [1.0]
    with status("reading the validation rows"):
        try:
            built = data()
            check_fits(flows[0], built)
            if change := changes(runs[0].samples.record, built.record, ["val"]):
                raise DataError(f"since {runs[0].name} was trained, {change}")
        except (FlowtrainError, OSError) as e:
            raise DataError(
                "the weights of an ensemble are computed on the validation rows of its data, which cannot be used: "
                f"{e}. Restore the data, or give the weights: weights=[0.5,0.5], or weights={EQUAL}"
            ) from e
    if isinstance(built, TargetData):
        return _weights_by_target(flows, built)
    x, label = validation_rows(flows[0], built, ROWS)
    log_p = validation_log_probs(flows, x, label, [run.name for run in runs])
    return stacking_weights(log_p, validation_weights(built, ROWS))


def _weights_by_target(flows: Sequence[Density], data: TargetData) -> list[float]:
    """Returns the weights w of M flows that maximise E_p[log sum_m w_m q_m(x)] for a target p, by EM.

    The expectation is estimated from samples of all flows with the importance weights p~(x) / sum_m q_m(x).

    Source: Cappe et al. 2008, Adaptive importance sampling in general mixture classes.
    """
    data.to(flows[0].like.device)
    each = max(2, min(len(data.val), ROWS // len(flows)))
    drawn = [weighted_samples(flow, data.target, each, data.seed_of("val")) for flow in flows]
    log_target = torch.cat([one.log_p for one in drawn])
    log_q = validation_log_probs(flows, torch.cat([one.x for one in drawn]))
    log_w = log_target - log_q.nan_to_num(nan=-math.inf).logsumexp(1)
    log_w = torch.where(log_w < math.inf, log_w, -math.inf)
    return stacking_weights(log_q, (log_w - log_w.max()).exp())


def validation_rows(flow: Density, data: Dataset, most: int) -> tuple[Tensor, Tensor | None]:
    """Returns at most `most` evenly spaced validation rows, and their labels if the flow is conditional."""
    x, label = held_out(flow, data, "val")
    every = -(-len(x) // most)
    return x[::every], None if label is None else label[::every]


def validation_weights(data: Dataset, most: int) -> Tensor | None:
    """Returns the weights of the rows of `validation_rows`, (n,), or None."""
    weights = data.val_weights
    return None if weights is None else weights[:: -(-len(weights) // most)]


def validation_log_probs(
    flows: Sequence[Density], x: Tensor, label: Tensor | None = None, names: Sequence[str] | None = None
) -> Tensor:
    """Computes log p of M flows at rows x (n, *event_shape), (n, M), in nats, with the same dequantization noise.

    If the ODE of a flow cannot be solved, its column is NaN, with a warning.

    Args:
        names: the names of the flows in messages. None: their positions, counted from 0.
    """
    names = [f"member {i}" for i in range(len(flows))] if names is None else names
    device = flows[0].like.device
    with seeded(0, device):
        x = flows[0].dequantized(x.to(device))
    columns = []
    for i, flow in enumerate(flows):
        try:
            with status(f"scoring the validation rows with {names[i]}"):
                columns.append(log_probs(flow, x, label))
        except SolverError as e:
            log.warning("%s gets the weight 0 in the ensemble: %s", names[i], e)
            columns.append(torch.full((len(x),), torch.nan, dtype=torch.float64))
    return torch.stack(columns, 1)
