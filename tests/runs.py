"""What the tests of training share."""

from typing import Any

from flowtrain.training.loop import Trainer


def stop_at(trainer: Trainer, step: int) -> None:
    """Has `fit` end after that step, as a time limit would, wherever validations fall."""
    take = trainer.train_step

    def train_step() -> dict[str, Any]:
        if trainer.step == step - 1:
            trainer.stopped_by = "the test"
        return take()

    trainer.train_step = train_step  # type: ignore[method-assign]
