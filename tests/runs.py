"""What the tests of training share."""

from collections.abc import Callable
from typing import Any

from flowtrain.cli import evaluate, sample, train
from flowtrain.training.trainer import Trainer

COMMANDS = {"flowtrain": train.main, "floweval": evaluate.main, "flowsample": sample.main}

Run = Callable[..., tuple[int, str, str]]


def stop_at(trainer: Trainer, step: int) -> None:
    """Has `fit` end after that step, as a time limit would, wherever validations fall."""
    take = trainer.train_step

    def train_step() -> dict[str, Any]:
        if trainer.step == step - 1:
            trainer.stopped_by = "the test"
        return take()

    trainer.train_step = train_step  # type: ignore[method-assign]
