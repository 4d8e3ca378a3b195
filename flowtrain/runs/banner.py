"""The banner of a run, descriptions of its data and its device, and the commands that are suggested after it."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowtrain.data.base import Dataset
from flowtrain.data.context import example_of
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import NAMES
from flowtrain.flow import Density, Flow
from flowtrain.ode import Solver
from flowtrain.runs.console import data_name, name_of, shortest, title_of
from flowtrain.training.trainer import Trainer
from flowtrain.utils import ranks
from flowtrain.utils.formatting import flattened, option, shown


def banner(trainer: Trainer, run_dir: Path | None, recipes: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns the banner of a run, with a line for each part.

    Args:
        recipes: the recipes that were applied, with the keys that each of them set; None if unknown.
    """
    config, flow, data, settings = trainer.config, trainer.flow, trainer.data, trainer.settings
    step, warmup = trainer.step, trainer.train_state.warmup
    objective, regularizer = name_of(config["objective"]), name_of(config.get("regularizer") or {"name": "none"})
    size = sum(p.numel() for p in flow.parameters())
    start = f", from step {step}" if step else ""
    rows = {
        "model": f"{name_of(config['model'])}, {size:,} parameters",
        "data": f"{data_name(config)}, {describe_samples(data)}",
        "solver": "none: closed form" if flow.solver is None else _solver(flow.solver, warmup),
        "objective": objective + ("" if regularizer == "none" else f", regularizer {regularizer}"),
        "training": f"{settings.steps:,} steps of {settings.batch_size}{start}, {settings.optimizer}, "
        f"learning rate {settings.lr:g} ({settings.lr_decay}), seed {config['seed']}",
        **({} if recipes is None else {"recipe": _recipes(config, recipes)}),
        "device": describe_device(flow.like.device),
        **({} if run_dir is None else {"run": str(shortest(run_dir))}),
    }
    return as_banner(title_of(config), rows)


def as_banner(title: str, rows: Mapping[str, str]) -> str:
    """Formats a banner from the text of each part, by its name."""
    lines = "\n".join(f"{name:>{NAMES}}  {words}" for name, words in rows.items())
    return f"flowtrain: {title}\n{lines}"


def describe_samples(data: Dataset) -> str:
    """Describes a data set: the columns or the image shape, and the sizes of its sets."""
    shape = data.event_shape
    kind = f"{shape[0]} column{'s' * (shape[0] > 1)}" if len(shape) == 1 else f"images {'x'.join(map(str, shape))}"
    if isinstance(data, TargetData):
        known = "" if data.target.log_z is None else f", log Z {data.target.log_z:.4f} nats"
        draws = f"{len(data.val):,} samples for a validation, {len(data.test):,} for the evaluation"
        return f"a density of {kind}, known up to a constant{known}; {draws}"
    known = "" if data.entropy is None else f", entropy {data.entropy:.4f} nats"
    rows = "" if data.n_train is None else f"{data.n_train:,} rows for training, "
    weighted = "" if data.val_weights is None else "; the rows are weighted"
    return f"{kind}{known}; {rows}held out {len(data.val):,} for validation, {len(data.test):,} for the test{weighted}"


def _recipes(config: Mapping[str, Any], recipes: Mapping[str, Sequence[str]]) -> str:
    """Formats the recipes that were applied and the keys that they set, on one or more lines."""
    lines, values = [], flattened(config)
    for name, keys in recipes.items():
        text = f"{name}, sets {' '.join(f'{key}={shown(values[key])}' for key in keys if key in values)}"
        lines += textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * (NAMES + 2)).join(lines) or "none"


def _solver(solver: Solver, warmup: int) -> str:
    if not solver.adaptive:
        return f"{solver.method}, steps of {solver.step_size:g}"
    warming = warmup and solver.warmup_rtol > solver.train_rtol
    tightening = f"; rtol in training from {solver.warmup_rtol:g} to {solver.train_rtol:g}" if warming else ""
    return f"{solver.method}, rtol {solver.rtol:g}, atol {solver.atol:g}{tightening}"


def describe_device(device: torch.device) -> str:
    """Describes a device: the name of the GPU, or the number of threads."""
    beside = f", {ranks.size()} ranks" if ranks.size() > 1 else ""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}{beside}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}{beside}"


def next_commands(run_dir: Path, flow: Density) -> str:
    """Returns the commands that are suggested after a run."""
    shown = shortest(run_dir)
    # an ensemble has no path from base to data to animate
    moving = isinstance(flow, Flow) and (len(flow.event_shape) == 3 or flow.event_shape == (2,))
    run = option("ckpt", shown)
    what = "animate=true" if moving else "n=10000"
    if flow.context and not moving:
        what = shlex.quote(f"context={example_of(flow.context)}")
    sample = f"flowsample {run} {what}"
    return f"{'next':>{NAMES}}  floweval {run} report=true\n{'':>{NAMES}}  {sample}"
