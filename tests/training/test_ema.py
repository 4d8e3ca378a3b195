"""Averages of weights: their update, and checkpoints that contain them."""

from pathlib import Path

import pytest
import torch
from helpers import MakeTrainer
from torch import nn

from flowtrain.runs.load import load
from flowtrain.training.ema import Ema

pytestmark = pytest.mark.usefixtures("float32")


def test_ema_is_the_average_and_gives_the_weights_back() -> None:
    module = nn.Linear(1, 1)
    ema = Ema(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(4.0)
    start = ema.shadow["weight"].item()
    ema.update()
    decay = min(0.5, 2 / 11)
    averaged = decay * start + (1 - decay) * 4
    with ema.applied():
        assert module.weight.item() == pytest.approx(averaged)
    assert module.weight.item() == 4
    assert ema.shadow["weight"].item() == pytest.approx(averaged)


def test_checkpoint_with_ema_loads_the_averaged_weights(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.steps=4", "trainer.ema=0.999", "trainer.lr=0.5")
    run.fit()
    assert run.train_state.ema is not None
    loaded = dict(load(tmp_path).named_parameters())
    for name, value in run.train_state.ema.shadow.items():
        assert torch.equal(loaded[name], value)
    assert not torch.equal(loaded["bijection.bijections.0.mean"], run.flow.state_dict()["bijection.bijections.0.mean"])


def test_buffers_that_no_checkpoint_holds_are_not_averaged() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(2), persistent=False)
    assert "mask" not in Ema(module, 0.9).state()
