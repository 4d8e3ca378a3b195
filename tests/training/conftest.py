"""Fixtures for the tests of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Compose, MakeTrainer, processes
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training import tensorboard
from flowtrain.training.trainer import Trainer


class Poisoned(Dataset):
    """Data whose batch at one step contains a NaN."""

    def __init__(self, bad_step: int, event_shape: tuple[int, ...] = (2,)) -> None:
        self.event_shape, self.bad_step = event_shape, bad_step
        self.val = self.test = torch.randn(20, *event_shape)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, *self.event_shape)
        if step == self.bad_step:
            x[0, 0] = torch.nan
        return x


class PoisonedOnce(Poisoned):
    """Data whose batch at one step contains a NaN. Only the first `times` requests of this batch return the NaN."""

    def __init__(self, bad_step: int, times: int = 1) -> None:
        super().__init__(bad_step)
        self.times = times

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, 2, generator=torch.Generator().manual_seed(step))
        if step == self.bad_step and self.times > 0:
            self.times -= 1
            x[0, 0] = torch.nan
        return x


@pytest.fixture(scope="session")
def poisoned() -> type[Poisoned]:
    """Returns the class of data with a NaN at one step."""
    return Poisoned


@pytest.fixture(scope="session")
def poisoned_once() -> type[PoisonedOnce]:
    """Returns the class of data with a NaN in the first request of one step."""
    return PoisonedOnce


@pytest.fixture(scope="session")
def trainer_of() -> MakeTrainer:
    """Returns a function that builds a trainer from a run directory and overrides."""
    return processes.trainer_of


# Runs with coarse solves, which the solver guard checks


@pytest.fixture(scope="session")
def guarded_config() -> Compose:
    """Returns a function that composes the config of a small run."""
    small = ["data.n_val=100", "data.n_test=20", "trainer.batch_size=64", "model.hidden=[16,16]", "trainer.ema=null"]
    return lambda *overrides: processes.composed([*small, *overrides])


@pytest.fixture(scope="session")
def guarded_trainer() -> MakeTrainer:
    """Returns a function that builds a trainer from a config."""

    def build(run_dir: Path, config: dict[str, Any], saved: dict[str, Any] | None = None) -> Trainer:
        torch.manual_seed(config["seed"])
        data = build_data(config)
        flow = build_flow(config, data.samples)
        return Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, saved)

    return build


# TensorBoard

Scalars = dict[tuple[str, int], float]
Pictures = dict[tuple[str, int], bytes]


@pytest.fixture(scope="session")
def read_tensorboard() -> Callable[[Path], tuple[Scalars, Pictures]]:
    """Returns a function that reads what TensorBoard shows of a run, by tag and step, and checks for duplicates."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(run_dir: Path) -> tuple[Scalars, Pictures]:
        sizes = {"scalars": 0, "images": 0}
        events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance=sizes)
        events.Reload()
        scalars = [((tag, e.step), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
        images = [
            ((tag, e.step), e.encoded_image_string) for tag in events.Tags()["images"] for e in events.Images(tag)
        ]
        assert len(dict(scalars)) == len(scalars)
        assert len(dict(images)) == len(images)
        return dict(scalars), dict(images)

    return read


@pytest.fixture(scope="session")
def expected_scalars() -> Callable[[Path], Scalars]:
    """Returns a function that reads the scalars which TensorBoard should show from metrics.jsonl and result.json."""

    def read(run_dir: Path) -> Scalars:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        if (run_dir / "result.json").exists():
            result = json.loads((run_dir / "result.json").read_text())
            rows.append({"step": result["steps"], "split": "test", **{k: result[k] for k in tensorboard.RESULT}})
        return {
            (f"{row['split']}/{key}", row["step"]): float(np.float32(value))
            for row in rows
            for key, value in row.items()
            if key not in ("step", "split") and value is not None
        }

    return read


@pytest.fixture(scope="session")
def expected_pictures() -> Callable[[Path, int], Pictures]:
    """Returns a function that reads the pictures which TensorBoard should show from plots/."""

    def read(run_dir: Path, steps: int) -> Pictures:
        return {
            (f"final/{p.stem}", steps) if "_" not in p.stem else ("samples", int(p.stem[-6:])): p.read_bytes()
            for p in (run_dir / "plots").glob("*.png")
        }

    return read
