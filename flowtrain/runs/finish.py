"""The end of a run: the evaluation of its best checkpoint, result.json and pictures."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtrain.data.base import Dataset
from flowtrain.evaluation import NAMES, evaluate
from flowtrain.evaluation.baselines import affordable_seconds, has_baselines
from flowtrain.flow import Density, Flow
from flowtrain.plotting import pictures
from flowtrain.plotting.curves import draw_curves
from flowtrain.plotting.drawing import warn_if_plotting_fails
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.runs import load
from flowtrain.runs.console import data_name, next_commands, title_of
from flowtrain.runs.search import Search
from flowtrain.training import tensorboard
from flowtrain.training.trainer import Trainer
from flowtrain.utils.files import write_json
from flowtrain.utils.status import phase

log = logging.getLogger("flowtrain")


def finish(
    trainer: Trainer | Search, run_dir: Path, board: tensorboard.Board | None, flow: Density | None = None
) -> None:
    """Writes result.json and the final pictures, from the best checkpoint on the disk.

    Args:
        flow: a flow to load its weights into; None: built from the config.
    """

    def place(name: str) -> Path:
        return run_dir / f"plots/{name}.png"

    # the trainer's config, whose step size may have become smaller
    config, data, device = trainer.config, trainer.data, trainer.device
    options = PlotOptions.of(config)
    time_budget = trainer.time_budget
    saved = trainer.read()
    with phase("loading the checkpoint to evaluate"):
        if flow is None:
            flow = load.restore({**saved, "config": config}, device, trust=load.own_packages(config))
        else:
            load.load_averaged_weights(flow, saved)
    with phase("evaluating"):
        tested, thorough = (data, True) if time_budget is None else time_budget.tested()
        seconds = affordable_seconds(trainer.seconds) if has_baselines(flow, data) else 0.0
        if time_budget is not None:
            seconds = min(seconds, time_budget.for_baselines)
        result = evaluate(
            flow, tested, "test", saved["step"], trained_on=data, thorough=thorough, baseline_seconds=seconds
        )
    best = None if trainer.best is None else trainer.best["nll"]
    rest = {"train_seconds": trainer.seconds, "steps": trainer.step, "val_nll": best}
    rest["val_nll_stderr"] = None if trainer.best is None else stderr_at(trainer.metrics.rows, trainer.best["step"])
    write_json(run_dir / "result.json", {**result.to_dict(), **rest})
    title = title_of(config)
    reached = f"{title}, test {result.words}"
    drawn = []
    with warn_if_plotting_fails("curves"):
        rows = trainer.validations() if isinstance(trainer, Search) else trainer.metrics.rows
        draw_curves(place("curves"), rows=rows, title=reached, entropy=data.entropy, options=options)
        drawn += options.files(place("curves"))
    if time_budget is None or time_budget.has_time_for("samples"):
        with warn_if_plotting_fails("samples"):
            pictures.draw(flow, data, place("samples"), reached, options=options)
            drawn += options.files(place("samples"))
    drawn += pictures.draw_evaluation(result, title, data_name(config), place, options)
    if isinstance(flow, Flow) and (
        time_budget is None or time_budget.has_time_for("the flow in more detail", more=True)
    ):
        drawn += pictures.draw_more(flow, data, place, reached, options)
    if board is not None:
        board.end(result.to_dict(), [path for path in drawn if path.suffix == ".png"], trainer.step)
    trained = f"{'trained':>{NAMES}}  in {trainer.seconds:.1f} s, {trainer.course(saved['step'])}"
    if time_budget is not None:
        log.info("time_budget=%g: %.1f s so far", time_budget.seconds, time_budget.seconds - time_budget.left)
        time_budget.warn_if_over()
    log.info("%s\n%s\n%s", result.table(), trained, next_commands(run_dir, flow))


def stderr_at(rows: Sequence[Mapping[str, Any]], step: float) -> float | None:
    """The standard error of the validation NLL at a step; None in rows written by an older flowtrain."""
    found = [row.get("nll_stderr") for row in rows if row.get("split") == "val" and row["step"] == step]
    return found[-1] if found else None


def draw_training(
    flow: Flow,
    step: int,
    nll: float,
    *,
    data: Dataset,
    run_dir: Path,
    title: str,
    board: tensorboard.Board | None,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws a picture during training, titled with the step and the NLL of the last validation, in nats."""
    bits = flow.bits_per_nat
    reached = f"NLL {nll:.3f} nats" if bits is None else f"{bits * nll:.3f} bits/dim"
    # the first picture may come before the first validation
    validated = "" if math.isnan(nll) else f", validation {reached}"
    path = run_dir / f"plots/samples_{step:06d}.png"
    with warn_if_plotting_fails(f"step {step}"):
        pictures.draw(flow, data, path, f"{title}, step {step}{validated}", options=options)
        if board is not None and "png" in options.formats:
            board.picture(path, step)
