"""What the tests of training share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowtrain.build import build_data, build_flow, build_objective, build_settings
from flowtrain.cli import evaluate, sample, train
from flowtrain.cli.messages import compose_defaults
from flowtrain.data.base import Dataset
from flowtrain.training.loop import Trainer

COMMANDS = {"flowtrain": train.main, "floweval": evaluate.main, "flowsample": sample.main}

Run = Callable[..., tuple[int, str, str]]


def trainer_of(
    run_dir: Path, overrides: list[str], saved: dict[str, Any] | None = None, data: Dataset | None = None
) -> Trainer:
    """As `flowtrain` would have it, but for the data where those are given."""
    config = compose_defaults(overrides)
    torch.manual_seed(config["seed"])
    data = data or build_data(config)
    flow = build_flow(config, data.samples)
    return Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, saved)


def stop_at(trainer: Trainer, step: int) -> None:
    """Has `fit` end after that step, as a time limit would, wherever validations fall."""
    take = trainer.train_step

    def train_step() -> dict[str, Any]:
        if trainer.step == step - 1:
            trainer.stopped_by = "the test"
        return take()

    trainer.train_step = train_step  # type: ignore[method-assign]
