"""Output of a run on a terminal and without a terminal."""

import io
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, TINY, Run
from helpers.files import Terminal

from flowtrain.runs.console import shortest, writing_log

pytestmark = pytest.mark.usefixtures("float32", "without_figures")


def terminal_output(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        code, _, _ = run("flowtrain", *SMALL, *TINY, "hydra.run.dir=r", *arguments)
    assert code == 0
    return terminal.screen()


def test_run_prints_nothing_without_a_terminal(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", *SMALL, *TINY, "hydra.run.dir=r")
    assert (code, out, err) == (0, f"{tmp_path}/r\n", "")
    log = (tmp_path / "r/flowtrain.log").read_text()
    assert "ffjord on moons" in log
    assert "floweval ckpt=r report=true" in log


def test_terminal_shows_a_banner_and_a_summary(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    output = terminal_output(run, monkeypatch)
    begins = output.index("flowtrain: ffjord on moons")
    # if a name is in the banner and in the final table, the value of the banner is used
    named = dict(reversed(re.findall(r"^ +(\w[\w ]*?)  (.+)$", output, re.MULTILINE)))
    assert begins == 0
    assert ("ffjord" in named["model"], "72" in named["model"]) == (True, True)
    assert re.findall(r"moons|[\d.]+", named["data"]) == ["moons", "2", "2.3939", "20", "50"]
    assert named["solver"].startswith("dopri5, rtol 0.001, atol 0.001")
    assert re.findall(r"muon|cosine|[\d.]+", named["training"]) == ["4", "16", "muon", "0.01", "cosine", "0"]
    assert re.findall(r"cpu|\d+", named["device"]) == ["cpu", "1"]
    assert named["run"] == "r"
    # the progress bar, the final table, and the suggested commands
    assert re.search(r"4/4 \[.*nll=\d\.\d+, nfe=\d+", output)
    assert named["NLL"].endswith("nats (solver " + named["NLL"].partition("(solver ")[2])
    assert re.match(r"in \d+\.\d s, best at step \d of 4", named["trained"])
    assert named["next"] == "floweval ckpt=r report=true"
    assert "flowsample ckpt=r animate=true" in output


def test_resumed_run_names_its_starting_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_output(run, monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run("flowtrain", "resume=r", "trainer.steps=6")
    assert re.search(r"\b6\b.*\b16\b.*step 4\b", terminal.screen())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=realnvp", "model.hidden=[4]"], ["none: closed form"]),
        (["solver=rk4", "solver.steps=4", "model.hidden=[4]"], ["rk4, steps of 0.25"]),
        (["regularizer=rnode", "model.hidden=[4]"], ["likelihood, regularizer rnode"]),
    ],
)
def test_banner_names_each_part(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        run("flowtrain", *SMALL, *arguments)
    assert [w for w in words if w not in terminal.screen()] == []


def test_paths_are_shown_relative_to_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shortest(tmp_path / "a/b") == Path("a/b")
    assert shortest(Path("/elsewhere")) == Path("/elsewhere")


def recipe_of(log: str) -> str:
    """Returns the last recipe row of a banner, with its continuation lines."""
    return re.findall(r"^ +recipe  (.+(?:\n {15}\S.*)*)", log, re.MULTILINE)[-1]


def test_banner_names_the_recipe_and_its_keys(run: Run, tmp_path: Path) -> None:
    rings = ["data=rings", *SMALL, *TINY, "trainer.lr=0.002", "hydra.run.dir=r"]
    assert run("flowtrain", *rings)[0] == 0
    log = (tmp_path / "r/flowtrain.log").read_text()
    assert "ffjord_rings" in recipe_of(log)
    assert "solver.warmup=0" in recipe_of(log)
    # keys set on the command line are not listed
    assert "trainer.lr" not in recipe_of(log)
    before = recipe_of(log)
    assert run("flowtrain", "resume=r", "trainer.steps=5")[0] == 0
    log = (tmp_path / "r/flowtrain.log").read_text()
    assert len(re.findall(r"^ +recipe  ", log, re.MULTILINE)) == 2
    assert recipe_of(log) == before


def test_banner_states_that_no_recipe_applies(run: Run, tmp_path: Path) -> None:
    assert run("flowtrain", *SMALL, *TINY, "data=rings", "recipe=none", "hydra.run.dir=r")[0] == 0
    assert recipe_of((tmp_path / "r/flowtrain.log").read_text()) == "none"


def test_banner_shows_the_resolved_auto_values(run: Run, tmp_path: Path) -> None:
    np.save("x.npy", torch.randn(60, 3).numpy())
    assert (
        run("flowtrain", "model=realnvp", "data=array", "data.path=x.npy", "trainer.steps=2", "hydra.run.dir=r")[0] == 0
    )
    recipe = recipe_of((tmp_path / "r/flowtrain.log").read_text())
    assert "realnvp_array" in recipe
    assert "auto" not in recipe.replace("realnvp_array", "")
    assert re.search(r"model\.layers=\d+", recipe)


def test_user_recipe_may_set_any_key(run: Run, tmp_path: Path) -> None:
    (tmp_path / "conf/recipe").mkdir(parents=True)
    (tmp_path / "conf/recipe/mine.yaml").write_text("# @package _global_\nseed: 3\nmodel:\n  layers: 1\n")
    small = ["model=realnvp", *SMALL, "recipe=mine", "--config-dir", "conf", "hydra.run.dir=r"]
    assert run("flowtrain", *small)[0] == 0
    assert {"seed=3", "model.layers=1"} <= set(recipe_of((tmp_path / "r/flowtrain.log").read_text()).split())


@pytest.mark.parametrize("handlers", ["none", "own", "root"])
@pytest.mark.parametrize("disabled", [False, True])
def test_log_file_does_not_change_the_logging_of_the_caller(
    handlers: str, disabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, root, seen = logging.getLogger("flowtrain"), logging.getLogger(), io.StringIO()
    for name, value in (("handlers", []), ("propagate", True), ("level", logging.INFO), ("disabled", disabled)):
        monkeypatch.setattr(logger, name, value)
    # setLevel clears the logger's cache of enabled levels
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "stderr", seen)
    if handlers != "none":
        (logger if handlers == "own" else root).addHandler(logging.StreamHandler(seen))

    def log_messages() -> str:
        seen.seek(0)
        seen.truncate()
        for level in (logging.DEBUG, logging.INFO, logging.CRITICAL):
            logger.log(level, "%s", logging.getLevelName(level))
        return seen.getvalue()

    outside = log_messages()
    with writing_log(tmp_path / "flowtrain.log"):
        assert log_messages() == outside
    assert log_messages() == outside
    assert [line.split()[-1] for line in (tmp_path / "flowtrain.log").read_text().splitlines()] == [
        "DEBUG",
        "INFO",
        "CRITICAL",
    ]
