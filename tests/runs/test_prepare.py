"""Choices that a run makes once its data are known: the objective of FFJORD on a table."""

from typing import Any

import numpy as np
import pytest
from helpers import Run

from flowtrain.runs.fit import fit
from flowtrain.training import checkpoint

# training is minimal, because the tests check only the config
FEW = {"trainer.steps": 12, "trainer.val_every": 12, "trainer.lr": 0.0123, "model.hidden": [4]}


def config_of(columns: int, overrides: dict[str, Any], **named: Any) -> Any:
    x = np.random.default_rng(0).normal(size=(60, columns))
    return fit(x, progress=False, overrides={**FEW, **overrides}, **named).record.config  # type: ignore[union-attr]


@pytest.mark.parametrize(("columns", "objective"), [(2, "likelihood"), (3, "hybrid")])
def test_auto_objective_of_ffjord_depends_on_the_columns(columns: int, objective: str) -> None:
    config = config_of(columns, {}, model="ffjord")
    assert config["objective"]["name"] == objective
    # values that were set are kept, and the objective sets the others
    assert (config["trainer"]["lr"], config["trainer"]["steps"], config["model"]["hidden"]) == (0.0123, 12, [4])


@pytest.mark.parametrize(
    "overrides", [{"objective": "likelihood"}, {"objective": "flow_matching"}, {"regularizer": "rnode"}]
)
def test_given_or_implied_objective_is_kept(overrides: dict[str, str]) -> None:
    config = config_of(3, overrides, model="ffjord")
    assert config["objective"]["name"] == overrides.get("objective", "likelihood")


def test_resumed_run_keeps_its_auto_objective(run: Run, tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    keys = [f"{key}={value}".replace(" ", "") for key, value in FEW.items()]
    code, _, err = run("flowtrain", "model=ffjord", "data=array", "data.path=x.npy", "hydra.run.dir=r", *keys)
    assert code == 0, err
    code, _, err = run("flowtrain", "resume=r", "trainer.steps=14")
    assert code == 0, err
    config = checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]
    assert (config["objective"]["name"], config["trainer"]["steps"]) == ("hybrid", 14)
    python = config_of(3, {}, model="ffjord")
    assert {**python["trainer"], "steps": 14} == config["trainer"]
    assert python["model"] == config["model"]
