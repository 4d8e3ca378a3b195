"""Trainers whose solves are coarse enough to be guarded."""

from pathlib import Path
from typing import Any

import torch

from flowtrain.cli.error_messages import compose_defaults
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training.trainer import Trainer

SMALL = ["data.n_val=100", "data.n_test=20", "trainer.batch_size=64", "model.hidden=[16,16]", "trainer.ema=null"]


def compose(*overrides: str) -> dict[str, Any]:
    return compose_defaults([*SMALL, *overrides])


def trainer(run_dir: Path, config: dict[str, Any], saved: dict[str, Any] | None = None) -> Trainer:
    torch.manual_seed(config["seed"])
    data = build_data(config)
    flow = build_flow(config, data.samples)
    return Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, saved)
