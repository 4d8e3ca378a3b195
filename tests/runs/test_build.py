"""Integers may be written as floats like 1e4, and become int."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run
from helpers.densities import KnownBanana, banana
from omegaconf import OmegaConf

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.targets.base import Target
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.runs import build
from flowtrain.runs.build import build_data, build_flow, build_objective, build_target, with_whole_numbers
from flowtrain.runs.compose import compose
from flowtrain.training import checkpoint
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError

GROUPS = ("model", "data", "solver", "trainer", "objective", "regularizer")


def test_float_with_integer_value_becomes_an_int() -> None:
    assert (whole("n", 1e4), type(whole("n", 1e4))) == (10_000, int)
    for bad in (1.5, float("nan"), float("inf"), 1e10, 0.0, True, "1e4"):
        with pytest.raises(ConfigError, match="n="):
            whole("n", bad)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.hidden=[8e0,4]", "model.flows=2e0", "model.noise_samples=1e0", "data.n_val=1e1", "data.seed=3e0"],
        ["model=realnvp", "model.layers=2e0", "data=mnist", "data.crop=2e0", "data.n_val=1e2"],
        ["model=glow", "model.steps=2e0", "model.scales=1e0", "data=array", "data.levels=1.6e1"],
        ["solver.max_nfe=1e3", "solver.warmup=1e2", "solver=rk4", "solver.steps=1e1", "trainer.val_every=1e2"],
        ["trainer.steps=1e4", "trainer.batch_size=1e2", "trainer.patience=1e1", "trainer.log_every=1e1", "seed=1e1"],
    ],
)
def test_integers_may_be_written_as_floats_in_every_group(overrides: list[str]) -> None:
    config = with_whole_numbers(compose_defaults(overrides), GROUPS)
    for override in (o for o in overrides if "e" in o.partition("=")[2] and o.partition("=")[2][0] in "[0123456789"):
        key = override.partition("=")[0]
        value = OmegaConf.select(OmegaConf.create(config), key)
        parts = value if OmegaConf.is_list(value) else [value]
        assert {type(part) for part in parts} == {int}, override


def test_non_integer_arguments_are_unchanged() -> None:
    config = compose_defaults(["trainer.lr=1e0", "solver.rtol=1.0", "trainer.time_limit=60.0", "trainer.steps=1.5"])
    assert with_whole_numbers(config, GROUPS) == config
    kept = with_whole_numbers(config, GROUPS)
    assert [type(kept["trainer"][key]) for key in ("lr", "time_limit", "steps")] == [float] * 3
    unknown = {"model": {"_target_": "nowhere.at.all", "depth": 2.0}, "seed": 0}
    assert with_whole_numbers(unknown, ["model", "data"]) == unknown


@pytest.mark.usefixtures("without_figures")
def test_commands_accept_integers_written_as_floats(run: Run, tmp_path: Path) -> None:
    keys = ["trainer.steps=2e0", "trainer.batch_size=1.6e1", "seed=3e0", "data.n_val=2e1", "data.n_test=2e1"]
    assert run("flowtrain", "model=realnvp", "model.layers=2e0", "model.hidden=[4e0]", *keys, "hydra.run.dir=r")[0] == 0
    kept = checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]
    for config in (kept, OmegaConf.to_container(OmegaConf.load(tmp_path / "r/.hydra/config.yaml"))):
        found = [config["seed"], *(config["trainer"][k] for k in ("steps", "batch_size")), config["data"]["n_val"]]
        found += [config["model"]["layers"], *config["model"]["hidden"]]
        assert found == [3, 2, 16, 20, 2, 4]
        assert {type(value) for value in found} == {int}
    assert run("flowtrain", "resume=r", "trainer.steps=3e0")[0] == 0
    assert type(checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]["trainer"]["steps"]) is int
    assert run("flowsample", "r", "n=3e1", "seed=1e0", "out=s.npy")[0] == 0
    assert np.load(tmp_path / "s.npy").shape == (30, 2)
    assert run("floweval", "r", "batch_size=1e1", "data.n_test=3e1")[0] == 0


class WithoutOptions(Likelihood):
    def forward(self, x, label=None):  # type: ignore[no-untyped-def, override]
        return super().forward(x, label)


def test_objective_without_options_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_defaults(["data.n_test=20", "data.n_val=20", "model.hidden=[4]"])
    flow = build_flow(config, build_data(config).samples)
    monkeypatch.setattr(build, "_object", lambda target, group: WithoutOptions if group == "objective" else Regularizer)
    config["objective"] = {"_target_": "mine.WithoutOptions"}
    with pytest.raises(ConfigError, match="options"):
        build_objective(config, flow)


def target_of(function: str, **settings: Any) -> Target:
    config = compose({"data": "target", "target": "custom", "target._target_": f"helpers.densities.{function}"}).config
    config["target"] |= settings
    return build_target(config)


def test_target_of_a_function_or_a_class() -> None:
    x = torch.randn(5, 2)
    for function in ("with_option", "Banana"):
        torch.testing.assert_close(target_of(function, dim=2, width=2.0)(x), banana(x, 2.0))
    # the keys of target=custom with their default values are no arguments of a class of targets
    found = target_of("KnownBanana", width=2.0)
    assert isinstance(found, KnownBanana)
    torch.testing.assert_close(found(x), banana(x, 2.0))


@pytest.mark.parametrize(
    ("function", "settings", "words"),
    [
        ("with_option", {"dim": 2}, r"\+target.width"),
        ("with_option", {"width": 1.0}, "target.dim"),
        ("with_option", {"dim": 2, "width": 1.0, "widht": 1.0}, "did you mean width"),
        ("with_scale", {"dim": 2}, "argument scale"),
        ("KnownBanana", {"dim": 2}, "unknown key dim"),
    ],
)
def test_wrong_settings_of_a_target_are_refused(function: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        target_of(function, **settings)


def test_custom_target_needs_a_function() -> None:
    with pytest.raises(ConfigError, match=r"target._target_=mypkg\.log_density"):
        build_target(compose({"data": "target", "target": "custom"}).config)
