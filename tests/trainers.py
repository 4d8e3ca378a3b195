"""A trainer as `flowtrain` would have it; imported by the tests' own processes too, which import no other."""

from pathlib import Path
from typing import Any

import torch

from flowtrain.cli.error_messages import compose_defaults
from flowtrain.data.base import Dataset
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training.trainer import Trainer


def trainer_of(
    run_dir: Path, overrides: list[str], saved: dict[str, Any] | None = None, data: Dataset | None = None
) -> Trainer:
    """As `flowtrain` would have it, but for the data where those are given."""
    config = compose_defaults(overrides)
    torch.manual_seed(config["seed"])
    data = data or build_data(config)
    flow = build_flow(config, data.samples)
    return Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, saved)
