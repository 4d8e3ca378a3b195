"""Messages about unknown names begin with the nearest valid name."""

import shlex

import pytest
from helpers import Run
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from flowtrain.cli.config_files import compose_defaults
from flowtrain.cli.error_messages import explain, unknown_key
from flowtrain.utils.arguments import nearest, one_of
from flowtrain.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trainer.step", "trainer.steps"), ("lr", "trainer.lr"), ("learning_rate", "trainer.lr"), ("mdoel", "model"),
        ("batchsize", "trainer.batch_size"), ("batch_size", "trainer.batch_size"), ("model.lr", "trainer.lr"),
        ("tainer.lr", "trainer.lr"), ("sed", "seed"), ("solver.rtoll", "solver.rtol"), ("Trainer.LR", "trainer.lr"),
    ],
)  # fmt: skip
def test_nearest_key_is_suggested(key: str, meant: str) -> None:
    message = unknown_key(key, compose_defaults([]))
    assert f"did you mean {meant}?" in message


def test_no_suggestion_for_unrelated_names() -> None:
    assert nearest("frobnicate", ["trainer.lr", "model", "seed"]) == []
    assert nearest("", ["trainer.lr"]) == nearest("x", []) == []
    assert "did you mean" not in unknown_key("frobnicate", compose_defaults([]))


def test_key_of_another_choice_is_named_as_such() -> None:
    assert "model=realnvp" in unknown_key("model.layers", compose_defaults([]))
    assert "data=array" in unknown_key("data.path", compose_defaults([]))


def test_nearest_choice_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"x=tahn: did you mean tanh\?.*softplus, tanh"):
        one_of("x", "tahn", ["softplus", "tanh"])


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("model=ffjrod", "ffjord"), ("data=moon", "moons"), ("solver=dopri", "dopri5"), ("experiment=ring", "rings"),
        ("+model.hiden=[3]", "hidden"), ("solver.method=dopry5", "dopri5"), ("+solver.rtoll=1", "rtol"),
        ("trainer.optimizer=adm", "adam"), ("recipe=ffjord_ring", "ffjord_rings"), ("--hlp", "--help"),
    ],
)  # fmt: skip
def test_command_line_suggests_nearest_names(run: Run, argument: str, meant: str) -> None:
    code, out, err = run("flowtrain", argument)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"did you mean {meant}" in err


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("[Region,Anzahl (Stück),Umsatz [€]]", ["Region", "Anzahl (Stück)", "Umsatz [€]"]),
        ("[3,'a (1)',x (m, s)]", [3, "a (1)", "x (m, s)"]),
        ("my (1)", "my (1)"),
    ],
)
def test_suggested_quotes_give_the_intended_value(value: str, items: list[str] | str) -> None:
    with pytest.raises(OverrideParseException) as e:
        OverridesParser.create().parse_overrides([f"data.columns={value}"])
    (suggested,) = shlex.split(explain(e.value).rpartition("need quotes: ")[2])
    assert OverridesParser.create().parse_overrides([suggested])[0].value() == items
