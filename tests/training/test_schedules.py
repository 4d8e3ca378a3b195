"""Learning rates and tolerances during a run."""

from pathlib import Path
from typing import Any

import pytest
from helpers import MakeTrainer, ReadRows
from helpers.processes import composed

from flowtrain.training.schedules import LearningRate
from flowtrain.training.settings import Settings

pytestmark = pytest.mark.usefixtures("float32")


def test_tolerance_warms_up_in_training_and_is_final_in_validation(
    tmp_path: Path, trainer: MakeTrainer, rows: ReadRows
) -> None:
    overrides = [
        "model.hidden=[8]",
        "trainer.steps=4",
        "solver.rtol=1e-4",
        "solver.warmup=3",
        "solver.warmup_rtol=1e-1",
    ]
    run = trainer(tmp_path, *overrides)
    assert run.flow.solver is not None
    run.fit()
    assert [r["rtol"] for r in rows(tmp_path) if r["split"] == "train"] == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4])
    assert run.flow.solver.rtol == 1e-4


def settings(**changes: Any) -> Settings:
    return Settings(**{**composed([])["trainer"], **changes})


def test_learning_rate_schedules() -> None:
    cosine = LearningRate(settings(lr=1.0, lr_warmup=10, steps=100))
    assert cosine.at(0) == pytest.approx(0.1)
    assert cosine.at(50) == pytest.approx(0.5)
    assert cosine.at(100) == pytest.approx(0)
    plateau = LearningRate(settings(lr=1.0, lr_warmup=0, lr_decay="plateau", lr_plateau_patience=2))
    for improved in (True, False, False, False):
        plateau.validated(improved)
    assert plateau.at(7) == 0.5
    assert LearningRate(settings(lr=1.0, lr_warmup=0, lr_decay="constant")).at(99) == 1


def test_the_tolerance_warms_up_over_two_thirds_of_a_run(tmp_path: Path, trainer: MakeTrainer, rows: ReadRows) -> None:
    trainer(tmp_path, "model=ffjord", "model.hidden=[8]", "trainer.steps=6", "trainer.log_every=1").fit()
    rtol = [row["rtol"] for row in rows(tmp_path) if row["split"] == "train"]
    assert rtol == pytest.approx([1e-3, 10**-3.5, 1e-4, 10**-4.5, 1e-5, 1e-5])
