"""The experiments in configs/experiment train, and each uses the recipe of its model."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from helpers import Run
from helpers.files import write_set

from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.runs.auto_settings import resolve_auto
from flowtrain.runs.build import build_flow
from flowtrain.utils.files import config_dir


def test_experiments_use_the_recipe_of_their_model() -> None:
    for name in ("realnvp", "glow", "ffjord"):
        config = compose_defaults([f"experiment=mnist_{name}_small"])
        assert config["model"]["positional_bias"]
        assert config["trainer"]["time_limit"] == 600


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (config_dir() / "experiment").glob("mnist_*.yaml")))
def test_every_image_experiment_trains(experiment: str, run: Run, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "mnist")
    small = ["data.n_val=4", "data.n_test=4", "data.root=data", "trainer.batch_size=4", "trainer.steps=1"]
    small += ["model.hidden=[4]", "model.scales=1", "solver.rtol=1e-2"] + ["model.steps=2"] * ("glow" in experiment)
    code, out, err = run("flowtrain", f"experiment={experiment}", *small)
    assert code == 0, err
    assert json.loads((Path(out.splitlines()[-1]) / "result.json").read_text())["bits_per_dim"] > 0


@pytest.mark.parametrize("model", ["realnvp", "glow", "ffjord"])
def test_checkpoints_of_image_experiments_are_below_16_mib(model: str) -> None:
    # last.pt contains the weights, their average and two moments of the optimizer in float32, the NLL of each of 10,000
    # validation images, and names. These take up to 0.5 MiB
    flow = build_flow(compose_defaults([f"experiment=mnist_{model}"]), Samples((1, 28, 28), True, levels=256))
    assert 4 * 4 * sum(v.numel() for v in flow.state_dict().values()) < 15.5 * 2**20


def test_runs_have_more_validations_than_patience() -> None:
    """A run with fewer validations than the patience would never stop early."""
    for keys in (
        ["data=array", "data.path=x"],
        ["data=array", "data.path=x", "model=realnvp"],
        ["data=array", "data.path=x", "model=glow"],
        ["data=array", "data.path=x", "objective=flow_matching"],
        ["data=mnist", "model=realnvp"],
        ["data=mnist", "model=glow"],
    ):
        settled = 2 / 3 if "model=realnvp" not in keys and "model=glow" not in keys and len(keys) == 2 else 0
        config = compose_defaults(keys)
        for rows in (50, 500, 2000, 10_000):
            trainer = resolve_auto(deepcopy(config), rows, (3,))["trainer"]
            assert trainer["steps"] * (1 - settled) / trainer["val_every"] > trainer["patience"], (keys, rows)


OTHERS = sorted(
    p.stem for p in (config_dir() / "experiment").glob("*.yaml") if not p.stem.startswith(("mnist_", "search_"))
)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("experiment", OTHERS)
def test_every_non_image_experiment_trains(experiment: str, run: Run, tmp_path: Path) -> None:
    small = ["trainer.batch_size=4", "trainer.steps=2", "model.hidden=[4]"]
    if experiment == "gas_ffjord":
        (tmp_path / "a.csv").write_text("\n".join(f"{i},{i * i % 7}" for i in range(50)))
        small += ["data.path=a.csv", "objective.matching=1"]
    else:
        small += ["data.n_val=10", "data.n_test=10"]
    code, out, err = run("flowtrain", f"experiment={experiment}", *small)
    assert code == 0, err
    assert (Path(out.splitlines()[-1]) / "result.json").exists()
