"""What a run says on a terminal, and what elsewhere."""

import re
import sys
from pathlib import Path

import pytest
from helpers import SMALL, TINY, Run
from helpers.files import Terminal

from flowtrain.runs.console import shortest

pytestmark = pytest.mark.usefixtures("float32")


def on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        code, _, _ = run("flowtrain", *SMALL, *TINY, "hydra.run.dir=r", *arguments)
    assert code == 0
    return terminal.screen()


def test_elsewhere_than_on_a_terminal_a_run_is_quiet(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", *SMALL, *TINY, "hydra.run.dir=r")
    assert (code, out, err) == (0, f"{tmp_path}/r\n", "")
    log = (tmp_path / "r/flowtrain.log").read_text()
    assert "ffjord on moons" in log
    assert "floweval ckpt=r report=true" in log


def test_on_a_terminal_it_says_what_it_is_and_what_came_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = on_a_terminal(run, monkeypatch)
    begins = said.index("flowtrain: ffjord on moons")
    # a name that the table at the end has too is the banner's first
    named = dict(reversed(re.findall(r"^ +(\w[\w ]*?)  (.+)$", said, re.MULTILINE)))
    assert begins == 0
    assert named["model"] == "ffjord, 72 parameters"
    assert named["data"] == "moons, 2 columns, entropy 2.3939 nats; held out 20 for validation, 50 for the test"
    assert named["solver"].startswith("dopri5, rtol 0.001, atol 0.001")
    assert named["training"] == "4 steps of 16, adam, learning rate 0.015 (cosine), seed 0"
    assert named["device"] == "cpu, 1 thread"
    assert named["run"] == "r"
    # the bar, the table, what to type
    assert re.search(r"4/4 \[.*nll=\d\.\d+, nfe=\d+", said)
    assert named["NLL"].endswith("nats (solver " + named["NLL"].partition("(solver ")[2])
    assert re.match(r"in \d+\.\d s, best at step \d of 4", named["trained"])
    assert named["next"] == "floweval ckpt=r report=true"
    assert "flowsample ckpt=r animate=true" in said


def test_a_resumed_run_says_from_where(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(run, monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run("flowtrain", "resume=r", "trainer.steps=6")
    assert "6 steps of 16, from step 4, adam" in terminal.screen()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=realnvp", "model.hidden=[4]"], ["none: closed form"]),
        (["solver=rk4", "solver.steps=4", "model.hidden=[4]"], ["rk4, steps of 0.25"]),
        (["regularizer=rnode", "model.hidden=[4]"], ["likelihood, regularizer rnode"]),
    ],
)
def test_each_part_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        run("flowtrain", *SMALL, *arguments)
    assert [w for w in words if w not in terminal.screen()] == []


def test_paths_are_as_short_as_they_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shortest(tmp_path / "a/b") == Path("a/b")
    assert shortest(Path("/elsewhere")) == Path("/elsewhere")
