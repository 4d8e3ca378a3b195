"""Ends a run: evaluates its best checkpoint, writes result.json and draws pictures."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtrain.data.base import Dataset
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import NAMES, Evaluation, TargetEvaluation, evaluate, evaluate_target
from flowtrain.evaluation.baselines import affordable_seconds, has_baselines
from flowtrain.flow import Density, Flow
from flowtrain.plotting import pictures
from flowtrain.plotting.context_pictures import draw_context_pictures
from flowtrain.plotting.curves import draw_curves
from flowtrain.plotting.drawing import warn_if_plotting_fails
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.target_pictures import draw_target_figures
from flowtrain.runs import load
from flowtrain.runs.banner import next_commands
from flowtrain.runs.console import data_name, title_of
from flowtrain.runs.search import Search
from flowtrain.training import tensorboard
from flowtrain.training.time_budget import TimeBudget
from flowtrain.training.trainer import Trainer
from flowtrain.utils.files import write_json
from flowtrain.utils.status import phase

log = logging.getLogger("flowtrain")


def finish(
    trainer: Trainer | Search, run_dir: Path, board: tensorboard.Board | None, flow: Density | None = None
) -> None:
    """Evaluates the best checkpoint of a run, and writes result.json and the final figures.

    Args:
        flow: a flow into which the weights are loaded. None: a flow is built from the config.
    """

    def path_of(name: str) -> Path:
        return run_dir / f"plots/{name}.png"

    # the trainer's config, because the solver guard may have reduced the step size
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
        result = evaluated(trainer, flow, saved["step"])
    best = None if trainer.best is None else trainer.best["nll"]
    rest = {"train_seconds": trainer.seconds, "steps": trainer.step, "val_nll": best}
    rest["val_nll_stderr"] = None if trainer.best is None else stderr_at(trainer.metrics.rows, trainer.best["step"])
    write_json(run_dir / "result.json", {**result.to_dict(), **rest})
    rows = trainer.validations() if isinstance(trainer, Search) else trainer.metrics.rows
    drawn = draw_figures(flow, data, result, rows, config, path_of, options, time_budget)
    if board is not None:
        board.end(result.to_dict(), [path for path in drawn if path.suffix == ".png"], trainer.step)
    trained = f"{'trained':>{NAMES}}  in {trainer.seconds:.1f} s, {trainer.summary(saved['step'])}"
    if time_budget is not None:
        log.info("time_budget=%g: %.1f s so far", time_budget.seconds, time_budget.seconds - time_budget.left)
        time_budget.warn_if_over()
    log.info("%s\n%s\n%s", result.table(), trained, next_commands(run_dir, flow))


def evaluated(trainer: Trainer | Search, flow: Density, step: int) -> Evaluation | TargetEvaluation:
    """Evaluates a flow on the test set or on the target of a run, within the time budget."""
    data, time_budget = trainer.data, trainer.time_budget
    tested, thorough = (data, True) if time_budget is None else time_budget.affordable_data()
    if isinstance(data, TargetData):
        return evaluate_target(flow, data.target, len(tested.test), data.seed_of("test"), step, thorough=thorough)
    seconds = affordable_seconds(trainer.seconds) if has_baselines(flow, data) else 0.0
    if flow.conditional and len(data.event_shape) == 1:
        log.info("baselines: only a Gaussian, because the others ignore the context")
    if time_budget is not None:
        seconds = min(seconds, time_budget.for_baselines)
    return evaluate(flow, tested, "test", step, trained_on=data, thorough=thorough, baseline_seconds=seconds)


def draw_figures(
    flow: Density,
    data: Dataset,
    result: Evaluation | TargetEvaluation,
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    path_of: Callable[[str], Path],
    options: PlotOptions,
    time_budget: TimeBudget | None = None,
) -> list[Path]:
    """Draws all figures of a flow and its evaluation.

    A figure that fails gives a warning, and the other figures are drawn.

    Args:
        data: the data set whose test set is drawn beside samples.
        rows: the rows of metrics.jsonl, or the validations of several runs, each with its name as split; empty: the
            training curves are not drawn.
        config: names the model and the data in titles.
        path_of: returns the path of a figure from its name.
        time_budget: leaves out figures for which there is no time.

    Returns:
        The files.
    """
    title, drawn = figure_title(config, result), list[Path]()
    if isinstance(result, TargetEvaluation):
        assert isinstance(data, TargetData)
        more = time_budget is None or time_budget.has_time_for("the flow in more detail", more=True)
        return draw_target_figures(flow, data.target, result, rows, title, path_of, options, more)
    if rows:
        with warn_if_plotting_fails("curves"):
            kept = None if result.members else result.step
            draw_curves(path_of("curves"), rows=rows, title=title, entropy=data.entropy, kept=kept, options=options)
            drawn += options.files(path_of("curves"))
    if time_budget is None or time_budget.has_time_for("samples"):
        with warn_if_plotting_fails("samples"):
            pictures.draw(flow, data, path_of("samples"), title, options=options)
            drawn += options.files(path_of("samples"))
        drawn += draw_context_pictures(flow, data, path_of, title, options)
    drawn += pictures.draw_evaluation(result, data, title_of(config), data_name(config), path_of, options)
    if isinstance(flow, Flow) and (
        time_budget is None or time_budget.has_time_for("the flow in more detail", more=True)
    ):
        drawn += pictures.draw_other_figures(flow, data, path_of, title, options)
    return drawn


def figure_title(config: Mapping[str, Any], result: Evaluation | TargetEvaluation) -> str:
    """Returns the title of figures: model, data, step, and the NLL of the evaluated rows; for images in bits/dim.

    For a target, it has log Z, ESS and Pareto k instead of the NLL.
    """
    step = "" if result.members else f"step {result.step:,}"
    if isinstance(result, TargetEvaluation):
        return ", ".join(filter(None, (title_of(config), step, result.words)))
    which = {"test": "test ", "val": "validation "}.get(result.split, "")
    return ", ".join(filter(None, (title_of(config), step, f"{which}{result.words}")))


def stderr_at(rows: Sequence[Mapping[str, Any]], step: float) -> float | None:
    """Returns the standard error of the validation NLL at a step; None if an older version did not write it."""
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
    """Draws the samples during training. The title has the step and the NLL of the last validation.

    Args:
        nll: in nats; NaN before the first validation.
    """
    bits = flow.bits_per_nat
    name = "negative ELBO" if isinstance(data, TargetData) else "NLL"
    reached = f"{name} {nll:.3f} nats" if bits is None else f"{bits * nll:.3f} bits/dim"
    validated = "" if math.isnan(nll) else f", validation {reached}"
    path = run_dir / f"plots/samples_{step:06d}.png"
    with warn_if_plotting_fails(f"step {step}"):
        pictures.draw(flow, data, path, f"{title}, step {step:,}{validated}", options=options)
        if board is not None and "png" in options.formats:
            board.picture(path, step)
