"""Trainers of a few steps, their rows, and data that go bad."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainers import trainer_of

from flowtrain.data.base import Dataset
from flowtrain.training.trainer import Trainer

SMALL = ["trainer.batch_size=16", "trainer.val_every=4", "trainer.log_every=1", "data.n_val=20", "data.n_test=20"]


def trainer(
    run_dir: Path, *overrides: str, saved: dict[str, Any] | None = None, data: Dataset | None = None
) -> Trainer:
    return trainer_of(run_dir, [*SMALL, *overrides], saved, data)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in lines]


class Poisoned(Dataset):
    """Good batches, then one with a NaN."""

    def __init__(self, bad_step: int, event_shape: tuple[int, ...] = (2,)) -> None:
        self.event_shape, self.bad_step = event_shape, bad_step
        self.val = self.test = torch.randn(20, *event_shape)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, *self.event_shape)
        if step == self.bad_step:
            x[0, 0] = torch.nan
        return x


def saved_run(run_dir: Path, *overrides: str) -> Path:
    """A finished run; its last checkpoint."""
    trainer(run_dir, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=8", *overrides).fit()
    return run_dir / "checkpoints/last.pt"


class PoisonedOnce(Poisoned):
    """Bad only the first time that the step is asked for."""

    def __init__(self, bad_step: int, times: int = 1) -> None:
        super().__init__(bad_step)
        self.times = times

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, 2, generator=torch.Generator().manual_seed(step))
        if step == self.bad_step and self.times > 0:
            self.times -= 1
            x[0, 0] = torch.nan
        return x
