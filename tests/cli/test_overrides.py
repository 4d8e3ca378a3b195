"""Wrong command lines give one message. Hydra would give a traceback, pages of text, or nothing."""

import re
from pathlib import Path

import pytest
from helpers import SMALL, Run

from flowtrain.cli.config_files import config_dirs
from flowtrain.cli.overrides import FLAGS, rename_old_keys, validate_command_line, warn_of_old_key
from flowtrain.runs.compose import applied_recipes
from flowtrain.training import checkpoint
from flowtrain.utils.errors import ConfigError, FlowtrainError, out_of_memory


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("trainer=3", "trainer=3: choose one of default"),
        ("model=null", "model=null: choose one of affine, auto, ffjord, glow, "),
        ("+model=3", "model=3: choose one of affine"),
        ("solver={a: 1}", "choose one of adaptive_heun"),
        ("model=realnvp,3", "choose one of affine"),
        ("recipe=nowhere", "recipe=nowhere: choose one of affine_array"),
        ("=3", "'=3': "),
        ("+=", "KEY=VALUE"),
        (" ", "KEY=VALUE"),
        ("--foo", "--foo: unknown flag"),
        ("~model", "~model: "),
        ("~data=moons", "~data=moons: "),
        ("nonsense", "nonsense: "),
        ("glow", "did you mean model=glow?"),
        ("--multrun", "did you mean --multirun?"),
    ],
)
def test_unknown_overrides_are_refused_with_valid_ones(argument: str, says: str) -> None:
    with pytest.raises(ConfigError) as e:
        validate_command_line([argument])
    assert says in str(e.value)


@pytest.mark.parametrize(
    "argument",
    [
        "model=realnvp", "model=realnvp,glow", "'model=\"realnvp\"'", "~regularizer", "seed=3", "model.hidden=[4]",
        "experiment=moons", "+experiment=rings", "trainer.steps=", "data=array",
        *(flag for flag in FLAGS if flag != "--resolve"),
    ],
)  # fmt: skip
def test_valid_overrides_pass(argument: str) -> None:
    validate_command_line([argument])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["seed=${nothing.there}"], "nothing.there"),
        (["trainer.lr=???"], "trainer.lr"),
        (["model._target_=nowhere.at.all"], "nowhere.at.all"),
        (["model._target_=flowtrain.flow.nothing"], "'nothing'"),
        (["model._target_=math.pi"], "math.pi"),
        (["model.hidden=[1000000,100000000]"], "memory"),
    ],
)
def test_invalid_command_line_gets_one_line(run: Run, arguments: list[str], says: str) -> None:
    code, out, err = run("flowtrain", *arguments, "trainer.steps=1", "data.n_val=8")
    assert (code, out) == (1 if "memory" in says else 2, "")
    assert err.startswith("flowtrain: ")
    assert len(err.splitlines()) == 1
    assert says in err


def test_data_larger_than_memory_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}
    monkeypatch.setattr("os.sysconf", sizes.get)
    code, out, err = run("flowtrain", "data.n_test=134217728")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("flowtrain: data.n_test=134217728: ")
    assert re.findall(r"\b\d+\b", err)[1:] == ["3", "1"]
    code, out, err = run("flowtrain", "trainer.batch_size=268435456", "data.n_val=8", "data.n_test=8")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("flowtrain: trainer.batch_size=268435456: ")
    assert re.findall(r"\b\d+\b", err)[1:] == ["2", "1"]


def test_other_errors_are_not_taken_for_memory() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(FlowtrainError("out of memory"))


@pytest.mark.parametrize("place", ["command line", "experiment"])
def test_old_name_of_a_key_works_with_a_warning(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    warn_of_old_key.cache_clear()
    small = ["model=glow", *SMALL, "hydra.run.dir=r"]
    if place == "experiment":
        (tmp_path / "conf/experiment").mkdir(parents=True)
        text = "# @package _global_\nmodel:\n  positions: true\n"
        (tmp_path / "conf/experiment/old.yaml").write_text(text)
        small += ["experiment=old", "--config-dir", "conf"]
    else:
        small.append("model.positions=true")
    code, _, err = run("flowtrain", *small)
    assert code == 0, err
    assert "model.positional_bias" in err + caplog.text
    saved = checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]["model"]
    assert saved["positional_bias"] is True
    assert "positions" not in saved


def test_command_line_wins_over_the_old_name_of_a_key_in_an_experiment(run: Run, tmp_path: Path) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/old.yaml").write_text("# @package _global_\nmodel:\n  positions: true\n")
    small = ["model=glow", "experiment=old", *SMALL, "--config-dir", "conf", "hydra.run.dir=r"]
    assert run("flowtrain", *small, "model.positions=false")[0] == 0
    assert checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]["model"]["positional_bias"] is False


def test_own_key_of_a_user_model_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/mine.yaml").write_text("name: mine\n_target_: mine.model\npositions: 3\n")
    command = ["model=mine", "model.positions=6", "--config-dir", str(tmp_path / "conf")]
    monkeypatch.setattr("sys.argv", ["flowtrain", *command])
    assert rename_old_keys(command) == command
    assert rename_old_keys(["model=glow,realnvp", "model.positions=true"])[1] == "model.positional_bias=true"


def test_recipe_values_are_read_as_hydra_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/recipe").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - ffjord_rings\ntrainer:\n  lr: 1e-3\n  weight_decay: ${trainer.lr}\n"
    (tmp_path / "conf/recipe/mine.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["flowtrain", "--config-dir", str(tmp_path / "conf")])
    config = {"trainer": {"lr": 0.001, "weight_decay": 0.001}, "solver": {"warmup": 0}}
    assert set(applied_recipes({"recipe": "mine"}, config, config_dirs())["mine"]) == {
        "trainer.lr",
        "trainer.weight_decay",
        "solver.warmup",
    }
