"""Tiny trainings on images."""

from pathlib import Path
from typing import Any

import torch
from runs import stop_at

from flowtrain.cli.error_messages import compose_defaults
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training.trainer import Trainer


def config_of(root: Path, *overrides: str) -> dict[str, Any]:
    small = ["data=mnist", f"data.root={root}", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=4"]
    small += ["trainer.val_every=2", "trainer.log_every=1", "trainer.plot_every=null", "recipe=none"]
    return compose_defaults([*small, *overrides])


TINY = {
    "realnvp": ["model=realnvp", "model.hidden=[4]", "model.layers=1"],
    "realnvp batchnorm": ["model=realnvp", "model.hidden=[4]", "model.layers=1", "model.batch_norm=true"],
    "glow": ["model=glow", "model.hidden=[4]", "model.steps=1", "model.scales=1"],
    "ffjord": ["model=ffjord", "model.hidden=[4]", "solver.rtol=1e-3"],
    "affine": ["model=affine"],
}


def trained(config: dict[str, Any], run_dir: Path, stop: int | None = None, **saved: Any) -> Trainer:
    data = build_data(config)
    torch.manual_seed(config["seed"])
    flow = build_flow(config, data.samples)
    run = Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, **saved)
    if stop is not None:
        stop_at(run, stop)
    run.fit()
    return run
