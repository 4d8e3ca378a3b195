"""Paths on the command line: printed commands can be run, and files may have any name."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, Run
from hydra.core.override_parser.overrides_parser import OverridesParser

from flowtrain.cli.overrides import quoted
from flowtrain.utils.formatting import option, resume_command

ODD = [
    "my data (1).npy", "a=b.npy", "größe.npy", "a,b.npy", "it's.npy", 'say "x".npy', "$HOME.npy", "${x}.npy", "[1].npy",
    "{a:1}.npy", "'quoted'", "back\\slash.npy", "end\\", "007", "1e3", "true", "choice(a,b)", "x;rm -r y.npy",
    "tab\t.npy",
]  # fmt: skip


def value_of(argument: str) -> object:
    override = OverridesParser.create().parse_overrides(quoted([argument]))[0]
    return str(override.value()).replace("\\${", "${")


@pytest.mark.parametrize("name", ODD)
def test_existing_file_names_are_taken_literally(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    for key in ("data.path", "data.val_path", "data.root", "resume", "from", "ckpt", "out", "scores", "ood"):
        assert value_of(f"{key}={name}") == name
        # a shell parses the printed option
        assert value_of(*shlex.split(option(key, name))) == name


@pytest.mark.parametrize("name", [name for name in ODD if "${" not in name and name != "'quoted'"])
def test_output_file_names_are_taken_literally(name: str) -> None:
    assert value_of(f"out={name}") == name
    assert value_of(f"hydra.run.dir={name}") == name


def test_hydra_syntax_is_not_quoted() -> None:
    left = [
        "data.path=a.npy,b.npy", "data.path=choice(a,b)", "data.path='a b'", "hydra.run.dir=out/${now:%Y}", "out=null",
        "data.path=plain.npy", "seed=1,2", "model.hidden=[1,2]", "-m", "~trainer", "data.label=3", "data.label=name",
    ]  # fmt: skip
    assert quoted(left) == left
    assert quoted(["data.path=a (1).npy,b.npy"]) == ["data.path='a (1).npy',b.npy"]
    for key in ("data.types", "target.types"):
        assert value_of(f"{key}=[interval(0,1), circular(6)]") == "['interval(0,1)', 'circular(6)']"
    assert quoted(["data.label=Größe (cm)"]) == ["data.label='Größe (cm)'"]


def test_printed_paths_name_existing_files() -> None:
    assert (option("ckpt", "null"), option("ckpt", "~x")) == ("ckpt=./null", "'ckpt=./~x'")
    assert resume_command("runs/1") == "flowtrain resume=runs/1"


def commands_in(text: str) -> list[list[str]]:
    """Returns the commands in a log, parsed as by a shell."""
    return [shlex.split(found) for found in re.findall(r"(?:flowtrain '?resume|floweval|flowsample) ?.*", text)]


def test_printed_commands_run_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "my runs, [1] it's ü=$HOME (x)"
    here.mkdir()
    monkeypatch.chdir(here)
    np.save("train (1),é.npy", np.random.default_rng(0).standard_normal((100, 2)))
    keys = [key for key in SMALL if not key.startswith("data.")]
    code, out, err = run("flowtrain", "model=affine", "data=array", "data.path=train (1),é.npy", *keys)
    assert code == 0, err
    run_dir = Path(out.splitlines()[-1])
    printed = commands_in((run_dir / "flowtrain.log").read_text())
    assert [words[0] for words in printed] == ["floweval", "flowsample"]
    monkeypatch.setattr("flowtrain.cli.sample_run.write_animation", lambda *_: 0)
    for command, *words in printed:
        assert run(command, *words)[0] == 0
    # also works from another directory, with the absolute path that is printed last
    (resumed,) = commands_in(resume_command(run_dir))
    monkeypatch.chdir(tmp_path)
    assert run(*resumed) == (0, f"{run_dir}\n", "")
    assert run("floweval", str(run_dir), "split=val")[0] == 0
    assert run("flowtrain", f"from={run_dir}", *keys, "hydra.run.dir=a new, run")[0] == 0
    code, _, err = run("flowtrain", "model=affine", *SMALL, f"hydra.run.dir={run_dir}")
    assert code == 2
    assert resume_command(run_dir) in err


@pytest.mark.parametrize(
    ("argument", "types"),
    [
        ("data.types={a: positive, p: interval(0,1)}", {"a": "positive", "p": "interval(0,1)"}),
        ("data.types={p:circular(360),3:integer(0, inf)}", {"p": "circular(360)", 3: "integer(0, inf)"}),
        ("data.types={p: 'interval(0,1)'}", {"p": "interval(0,1)"}),
        ("data.types={p: [interval,0,1]}", {"p": ["interval", 0, 1]}),
        ("+data.types={p: circular(-180,180)}", {"p": "circular(-180,180)"}),
        ("data.types=null", None),
    ],
)
def test_types_with_bounds_need_no_quotes(argument: str, types: object) -> None:
    assert OverridesParser.create().parse_overrides(quoted([argument]))[0].value() == types
