"""The output of --help agrees with the config files. The flags and the completion that it describes work."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run
from omegaconf import OmegaConf

from flowtrain.cli import evaluate, export, sample, usage
from flowtrain.cli.config_files import CommentedConfig, compose_defaults
from flowtrain.cli.help import GROUPS, KEYS, meanings
from flowtrain.cli.usage import WITHOUT_TERMINAL, first_sentence
from flowtrain.utils.files import config_dir, config_groups
from flowtrain.utils.formatting import flattened, shown

FILES = sorted(path.relative_to(config_dir()).with_suffix("").as_posix() for path in config_dir().rglob("*.yaml"))
CHOICES = [name for name in FILES if "/" in name]


def text_of(name: str) -> str:
    return (config_dir() / f"{name}.yaml").read_text()


def values_of(name: str) -> dict[str, Any]:
    """Returns the values that a file sets, by dotted keys, without its defaults list."""
    found = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{name}.yaml"))
    assert isinstance(found, dict)
    return flattened({str(key): value for key, value in found.items() if key != "defaults"})


def whole_path(name: str, key: str) -> str:
    """Returns the key of a file as a key of the whole config."""
    group = name.partition("/")[0]
    return key if CommentedConfig(text_of(name)).whole or "/" not in name else f"{group}.{key}"


@pytest.mark.parametrize("name", FILES)
def test_every_config_file_starts_with_a_description(name: str) -> None:
    said = CommentedConfig(text_of(name)).sentence
    assert len(said) > 10
    assert said[0].isalnum()


@pytest.mark.parametrize("name", FILES)
def test_lines_of_config_files_are_short(name: str) -> None:
    assert [line for line in text_of(name).splitlines() if len(line) > 120] == []


def named(text: str) -> Iterator[str]:
    """Returns the files that comments name as the origin of keys."""
    yield from re.findall(r"#.*?\bkeys of ([\w/]+)\.yaml", text)


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_explained(name: str) -> None:
    """Each key has a comment, or the file names another file that explains its keys."""
    text = text_of(name)
    said = CommentedConfig(text)
    elsewhere = {key: words for other in named(text) for key, words in meanings(*other.split("/", 1)).items()}
    for parent in said.parents:
        assert f"{name.partition('/')[0]}/{parent}" in named(text), f"{name} does not say whose keys it has"
    for key in values_of(name):
        path = whole_path(name, key)
        # the parameters of a search are named after keys of the config
        path = path.removeprefix("hydra.sweeper.params.")
        recipes = name.startswith("recipe/")
        assert said.keys[key] or elsewhere.get(path) or (recipes and said.parents), f"{name}: {key} has no comment"


SHOWN: dict[tuple[str, ...], str] = {}


def help_of(run: Run, *arguments: str, command: str = "flowtrain") -> str:
    """Returns the help on a command line, which the command prints once for all tests."""
    key = (command, *arguments)
    if key not in SHOWN:
        code, SHOWN[key], err = run(command, *arguments, "--help")
        assert code == 0, err
    out = SHOWN[key]
    assert max(map(len, out.splitlines())) <= max(WITHOUT_TERMINAL, *map(len, re.findall(r"\S+", out)))
    assert "\x1b" not in out
    return out


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_help_lists_every_group_and_choice(run: Run) -> None:
    out = squeezed(help_of(run, "all"))
    assert set(GROUPS) == set(config_groups())
    for group in GROUPS:
        assert f" {group} {squeezed(CommentedConfig(text_of('config')).groups[group])} " in out
    for choice in CHOICES:
        assert f" {choice.partition('/')[2]} {squeezed(CommentedConfig(text_of(choice)).sentence)}" in out, choice


@pytest.mark.parametrize("arguments", [[], ["model=glow", "data=mnist"], ["experiment=gas_ffjord"], ["solver=rk4"]])
def test_help_lists_every_key_with_value_and_description(run: Run, arguments: list[str]) -> None:
    config = compose_defaults(arguments)
    out = help_of(run, *arguments, "all")
    for key, value in flattened(config).items():
        if key == "experiment":
            continue
        found = re.search(rf"^  {re.escape(f'{key}={shown(value)}')}\n? {{2,}}(\S.*)", out, re.M)
        assert found, key
    for group in GROUPS:
        name = (config.get(group) or {}).get("name")
        said = meanings(group, name) if name else {}
        for key, meaning in ((key, text) for key, text in said.items() if key.startswith(f"{group}.")):
            assert squeezed(meaning) in squeezed(out), key
    for key, meaning in CommentedConfig(text_of("config")).keys.items():
        assert squeezed(meaning) in squeezed(out), key


def test_help_marks_the_chosen_configs(run: Run) -> None:
    out = help_of(run, "model=glow", "data=mnist", "trainer.lr=0.25", "all")
    chosen = re.findall(r"^ +\* (\S+)", out, re.M)
    assert chosen == ["glow", "mnist", "likelihood", "none", "dopri5", "default", "glow_mnist"]
    # the recipe glow_mnist sets 4; the default of Glow is 8
    assert "  model.steps=4 " in out
    assert "  trainer.lr=0.25 " in out
    assert "model.field" not in out


def test_help_of_a_sweep_shows_its_first_run(run: Run) -> None:
    out = help_of(run, "-m", "model=glow,ffjord", "solver.rtol=1e-3,1e-4", "trainer.lr=interval(0.1,1)", "all")
    assert "\n  model=glow\n" in out
    assert "  solver.rtol=0.001 " in out


def test_help_names_the_flags(run: Run) -> None:
    out = help_of(run, "all")
    flags = ["--cfg", "--info", "--config-dir", "--hydra-help", "-m, --multirun", "install=bash", "install=fish"]
    assert [flag for flag in flags if flag not in out] == []
    assert run("flowtrain", "-h", "all")[1] == out


@pytest.mark.parametrize(
    "mistake",
    ["modle=glow", "model=nope", "model.nope=3", "--foo", "+foo=1", "solver.rtol=1e-3,1e-4", "a", "recipe=nope"],
)
def test_mistakes_next_to_help_are_refused(run: Run, mistake: str) -> None:
    for arguments in ([mistake, "--help"], ["-h", mistake]):
        code, out, err = run("flowtrain", *arguments)
        assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
        assert err.startswith("flowtrain: ")


def test_help_works_without_a_runnable_config(run: Run) -> None:
    for arguments in (["~trainer"], ["resume=nowhere"], ["--cfg", "job"], ["--info", "defaults"], ["-cd", "."]):
        help_of(run, *arguments)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cfg", "job"], "steps: 123"),
        (["--cfg", "job", "-p", "trainer"], "steps: 123"),
        (["--cfg", "hydra"], "sweep:"),
        (["--info", "defaults-tree"], "model: glow"),
        (["--info", "defaults"], "model/glow"),
        (["--info", "searchpath"], str(config_dir())),
        (["--info"], str(config_dir())),
    ],
)
def test_hydra_flags_show_configs_without_running(run: Run, flags: list[str], words: str) -> None:
    """The flags may stand at any place."""
    for arguments in (["model=glow", "trainer.steps=123", *flags], ["model=glow", *flags, "trainer.steps=123"]):
        code, out, err = run("flowtrain", *arguments)
        assert code == 0, err
        assert words in out
    assert not Path("outputs").exists()


def test_hydra_help_lists_the_flags_of_hydra(run: Run) -> None:
    assert "--shell-completion" in run("flowtrain", "--hydra-help")[1]
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("flowtrain model=", {f"model={path.stem}" for path in (config_dir() / "model").glob("*.yaml")}),
        ("flowtrain model=glow model.st", {"model.steps="}),
        ("flowtrain trainer.lr_w", {"trainer.lr_warmup="}),
        ("flowtrain -m data=mo", {"data=moons"}),
    ],
)
def test_completion_lists_choices_and_keys(
    run: Run, monkeypatch: pytest.MonkeyPatch, line: str, wanted: set[str]
) -> None:
    for shell in ("bash", "fish"):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        code, out, err = run("flowtrain", "-sc", f"query={shell}")
        assert code == 0, err
        assert set(out.split()) == wanted


@pytest.mark.slow
def test_completion_in_a_shell() -> None:
    script = Path(sys.executable).with_name("flowtrain")
    bash = shutil.which("bash")
    if not script.exists() or bash is None:
        pytest.skip("not installed, or no bash")
    commands = """
    eval "$(flowtrain -sc install=bash)"
    complete -p flowtrain
    COMP_LINE="flowtrain model=rea" COMP_POINT=19 COMP_CWORD=1 hydra_bash_completion
    echo "found ${COMPREPLY[*]}"
    """
    environment = {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", commands], env=environment, capture_output=True, text=True)
    assert "hydra_bash_completion flowtrain" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "found model=realnvp"


@pytest.mark.parametrize(
    ("arguments", "has", "lacks"),
    [
        (["model"], ["glow", "realnvp", "  model.hidden="], ["trainer.lr", "_target_"]),
        (["trainer"], ["trainer.lr=", "trainer.steps="], ["model.hidden"]),
        (["model=glow", "model"], ["* glow", "model.steps=8"], ["trainer.lr"]),
        (["trainer.lr"], ["trainer.lr="], ["trainer.lr_warmup"]),
        (["solver.rtol=1e-3", "solver.rtol"], ["solver.rtol=0.001"], ["solver.atol"]),
        (["glow"], ["model=glow", "model.steps=8", "trainer.lr=0.005"], ["trainer.lr_warmup"]),
        (["data=mnist", "glow"], ["model=glow", "model.steps=4"], ["model.field"]),
        (["gas_ffjord"], ["experiment=gas_ffjord", "data=array", "model.init_scale=2.0"], []),
        (["hydra.run.dir"], ["hydra.run.dir=outputs/"], ["hydra.sweep"]),
        (["model.candidates"], ["model=auto", "model.candidates=null"], ["model.hidden"]),
        (["model=nsf", "model.candidates"], ["model=auto", "model.candidates=null"], ["model.hidden"]),
        (["model.coupling"], ["model=glow", "model.coupling=affine"], ["model=nsf"]),
        (["runs"], ["flowtrain runs", "plot"], ["model.hidden"]),
        (["seed", "device"], ["seed=0", "device=auto"], ["threads"]),
    ],
)
def test_help_on_a_topic(run: Run, arguments: list[str], has: list[str], lacks: list[str]) -> None:
    for order in ([*arguments, "--help"], ["-h", *arguments]):
        code, out, err = run("flowtrain", *order)
        assert code == 0, err
        assert [words for words in has if words not in out] == []
        assert [words for words in lacks if words in out] == []


def test_help_on_a_topic_of_the_other_commands(run: Run) -> None:
    for command, topic, has, lacks in (
        ("floweval", "ood", "AUROC", "ckpt "),
        ("floweval", "solver", "solver.rtol=", "AUROC"),
        ("flowsample", "n", "10000", "quality"),
    ):
        code, out, err = run(command, "--help", topic)
        assert code == 0, err
        assert has in out
        assert lacks not in out
        code, out, err = run(command, "--help", f"{topic}x_")
        assert (code, out, len(err.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("command", ["flowtrain", "floweval", "flowsample"])
def test_version_names_flowtrain_torch_and_python(run: Run, command: str) -> None:
    code, out, _ = run(command, "--version")
    assert code == 0
    assert re.fullmatch(rf"flowtrain \S+, torch {re.escape(torch.__version__)}, Python 3\S+\n", out)


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--cfg", "job", "-p", "trainer"]])
def test_cfg_of_a_sweep_shows_its_first_config(run: Run, flags: list[str], tmp_path: Path) -> None:
    swept = run("flowtrain", "-m", "trainer.steps=123,5", "seed=1,2", *flags)
    assert swept == run("flowtrain", *flags, "trainer.steps=123", "seed=1")
    assert swept[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [evaluate, sample, export])
def test_help_of_the_other_commands_has_a_line_for_each_option(run: Run, module: Any) -> None:
    command = module.USAGE.name
    assert list(module.USAGE.options.keys() ^ module.OWN.keys()) == []
    short, full = help_of(run, command=command), help_of(run, "all", command=command)
    assert run(command, "-h")[1] == short
    assert len(short.splitlines()) <= 48
    for key, text in module.USAGE.options.items():
        assert re.search(rf"^  {key}\n? +{re.escape(first_sentence(text))}$", short, re.M), key
        assert squeezed(text) in squeezed(full), key
    for line, _ in module.USAGE.examples:
        assert line in short


@pytest.mark.parametrize("columns", [80, 100])
def test_overview_fits_on_two_screens(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(usage, "WITHOUT_TERMINAL", columns)
    for arguments in ([], ["data=array", "data.path=a.csv"]):
        lines = run("flowtrain", *arguments, "--help")[1].splitlines()
        assert (len(lines) <= 48, max(map(len, lines)) <= columns) == (True, True), len(lines)


def test_overview_has_groups_choices_and_the_keys_used_most(run: Run) -> None:
    out = help_of(run, "data=mnist", "trainer.lr=0.25")
    for group in set(GROUPS) - {"recipe", "experiment", "trainer"}:
        names = re.search(rf"^  {group} +(.*(?:\n   .*)*)", out, re.M)
        assert names is not None
        found = names[1].replace("*", "").split()
        assert found == sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    assert re.findall(r"\*(\w+)", out) == ["ffjord", "mnist", "likelihood", "none", "dopri5", "ffjord_mnist"]
    assert len(KEYS) == 9
    for key in KEYS:
        assert re.search(rf"^  {re.escape(key)}=\S+ +\S", out, re.M), key
    assert "trainer.lr=0.25 " in out
    known = {key for choice in CHOICES for key in flattened(meanings(*choice.split("/", 1)))}
    assert set(KEYS) <= known | set(CommentedConfig(text_of("config")).keys) | {f"trainer.{k}" for k in ("steps", "lr")}


def test_unknown_topics_name_the_nearest(run: Run) -> None:
    for topic, near in (("modle", "model"), ("candidats", "model.candidates"), ("nfs", "nsf"), ("al", "all")):
        code, out, err = run("flowtrain", "--help", topic)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert re.search(rf"\b{re.escape(near)}\b", err.replace(topic, "", 1)), err


@pytest.mark.parametrize(("columns", "expected"), [(40, 80), (97, 97), (300, 120)])
def test_width_follows_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, expected: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert usage.width() == expected
    text = "\n".join(usage.table([("key", "word " * 60)], column=20))
    assert expected - 5 <= max(map(len, text.splitlines())) <= expected


def test_comments_of_a_config_file_are_parsed() -> None:
    said = CommentedConfig(
        "# @package _global_\n# Of et al. 2020, a file. And more.\n#   command\na: 1  # one\n# two\n# lines\n"
        "b:\n  c: [x,\n    y] # list\n  # above\n  d: 'a # b'\n  e: null\n# not of f\n\nf: 3\n"
    )
    assert said.sentence == "Of et al. 2020, a file."
    assert said.keys == {"a": "one", "b": "two lines", "b.c": "list", "b.d": "above", "b.e": "", "f": ""}
    assert CommentedConfig("").keys == {}


def test_full_help_explains_the_recipe_that_applies(run: Run) -> None:
    for arguments, named in ((["data=rings"], "ffjord_rings"), (["data=rings", "recipe=none"], "recipe=none")):
        out = help_of(run, *arguments, "all")
        first_screen = " ".join(" ".join(out.splitlines()[:24]).split())
        assert named in first_screen
        assert ("solver.warmup=0" in first_screen) == (named == "ffjord_rings")


def test_the_suggestions_of_a_topic_are_shown_once_and_near(run: Run) -> None:
    err = run("flowtrain", "--help", "modle")[2]
    assert "did you mean model?" in err
    # the letters of tsit5 and of split are similar, the words are not
    assert "tsit5" not in run("flowsample", "--help", "split")[2]


def test_a_config_file_that_cannot_be_parsed_gives_one_message(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/torn.yaml").write_text("# My model.\nlayers: [\n")
    assert "torn" in help_of(run, "--config-dir", "mine", "--help", "model")
    for arguments in (["--help", "torn"], ["model=torn"]):
        code, out, err = run("flowtrain", "--config-dir", "mine", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert "torn.yaml" in err
