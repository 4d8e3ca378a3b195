"""Progress displays on a terminal, without a terminal, and in library calls."""

import io
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import SMALL, TINY, Run
from helpers.files import Terminal
from omegaconf import OmegaConf

from flowtrain.bijections.linear import Affine
from flowtrain.cli import entry_points, sweep_jobs
from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.flow import Flow
from flowtrain.runs.console import messages
from flowtrain.training.progress import show
from flowtrain.utils import status
from flowtrain.utils.status import DELAY, EVERY, Reporter, Status, phase, reporting

log = logging.getLogger("flowtrain")


class Clock:
    """A clock that tests set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """A reporter with its own clock, on a terminal or on another stream."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream, self.clock = stream, Clock()
        self.reporter = Reporter(stream, self.clock, threaded=False)

    def after(self, seconds: float) -> str:
        """Advances the clock and returns the visible text."""
        self.clock.now += seconds
        self.reporter.refresh()
        return self.seen

    @property
    def seen(self) -> str:
        return self.stream.screen() if isinstance(self.stream, Terminal) else self.stream.getvalue()


@pytest.fixture
def terminal() -> Iterator[Shown]:
    shown = Shown(Terminal())
    with reporting(shown.reporter):
        yield shown


@pytest.fixture
def elsewhere() -> Iterator[Shown]:
    shown = Shown(io.StringIO())
    with reporting(shown.reporter):
        yield shown


def test_terminal_shows_long_work_until_it_ends(terminal: Shown) -> None:
    with status.status("solving"):
        assert terminal.after(0.9 * DELAY) == ""
        assert terminal.after(0.2 * DELAY).startswith("solving")
        assert "01:02" in terminal.after(60)
    assert terminal.seen == ""


def test_short_steps_add_up(terminal: Shown) -> None:
    for name in ("first", "second", "third"):
        with status.status(name):
            seen = terminal.after(0.9 * DELAY)
    assert seen.startswith("third")
    assert terminal.seen == ""


def test_innermost_work_is_shown(terminal: Shown) -> None:
    with status.status("evaluating"):
        with status.status("checks"), status.status("mass"):
            seen = terminal.after(2 * DELAY)
            assert [name in seen for name in ("evaluating", "checks", "mass")] == [True] * 3
        assert "mass" not in terminal.seen
        assert "evaluating" in terminal.seen


def test_counted_work_has_a_progress_bar(terminal: Shown) -> None:
    with status.status("scoring", total=200, unit="row") as progress:
        terminal.after(DELAY)
        for _ in range(5):
            terminal.clock.now += 1
            progress.advance(10)
        assert "25%" in terminal.seen
        assert "50/200" in terminal.seen
        assert "row/s" in terminal.seen
    assert terminal.seen == ""


def test_the_bar_of_training_is_there_at_once_and_stays(terminal: Shown) -> None:
    with status.status("training", total=10, bar=True, done=4) as progress:
        assert "4/10" in terminal.seen
        progress.note(nll="1.5")
        progress.advance(6)
        # the last count is drawn, although the last redraw was recent
    assert "10/10" in terminal.seen
    assert "nll=1.5" in terminal.seen
    assert terminal.stream.getvalue().endswith("\n")


def test_long_work_replaces_the_progress_bar(terminal: Shown) -> None:
    with status.status("training", total=10, bar=True):
        terminal.after(100)
        with status.status("validating"):
            assert "0/10" in terminal.after(0.9 * DELAY)
            assert terminal.after(0.2 * DELAY).startswith("validating")
        assert "0/10" in terminal.seen


def test_messages_are_on_separate_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(Terminal())
    monkeypatch.setattr(sys, "stderr", shown.stream)
    with reporting(shown.reporter), messages(), status.status("solving"):
        shown.after(2 * DELAY)
        log.warning("short")
        assert shown.after(2 * DELAY).split("\n")[1].startswith("solving")
        log.warning("a message longer than the status of the current work")
        assert shown.after(2 * DELAY).split("\n")[2].startswith("solving")
    # no part of the status remains after the short message
    assert shown.seen.split("\n") == ["short", "a message longer than the status of the current work", ""]


def test_after_an_error_only_the_error_is_visible(terminal: Shown) -> None:
    def fails() -> None:
        with status.status("outer"), status.status("inner", total=3):
            terminal.after(2 * DELAY)
            assert "inner" in terminal.seen
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fails()
    assert terminal.seen == ""


def test_work_ending_out_of_order_leaves_no_line(terminal: Shown) -> None:
    with status.status("outer"):
        inner = status.status("inner")
        inner.__enter__()
        terminal.after(2 * DELAY)
    assert terminal.seen == ""
    inner.__exit__(None, None, None)
    assert terminal.after(2 * DELAY) == ""


def test_no_line_is_longer_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for total in (None, 7):
        shown = Shown(Terminal())
        with reporting(shown.reporter), status.status("word " * 30, total=total):
            assert 10 < len(shown.after(2 * DELAY)) < 40


def test_short_work_prints_nothing_without_a_terminal(elsewhere: Shown) -> None:
    with status.status("training", total=10, bar=True) as progress:
        for _ in range(10):
            elsewhere.clock.now += 0.09 * EVERY
            progress.advance()
    assert elsewhere.seen == ""


def test_long_work_prints_lines_without_a_terminal(elsewhere: Shown) -> None:
    with status.status("evaluating"), status.status("scoring", total=400, unit="row") as progress:
        progress.advance(100)
        lines = [len(elsewhere.after(EVERY / 3).splitlines()) for _ in range(7)]
    assert lines == [0, 0, 1, 1, 1, 2, 2]
    first = elsewhere.seen.splitlines()[0]
    assert [word in first for word in ("evaluating", "scoring", "100 of 400 rows", "25%", "01:30 left")] == [True] * 5
    assert "\r" not in elsewhere.seen


def test_closed_stream_does_not_end_the_work(terminal: Shown) -> None:
    with status.status("solving"):
        terminal.stream.close()
        terminal.clock.now += 2 * DELAY
        terminal.reporter.refresh()


class Announced(Terminal):
    """A terminal that signals when text is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_thread_shows_uncounted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TICK", 0.01)
    stream = Announced()
    before = threading.active_count()
    with reporting(Reporter(stream, delay=0.02)), status.status("one long solve"):
        assert stream.written.wait(30)
    assert "one long solve" in stream.getvalue()
    assert stream.screen() == ""
    assert threading.active_count() == before


def in_a_process(code: str, **environment: str) -> str:
    """Runs code with a pseudo-terminal as stderr, and returns what stderr shows and what stdout contains."""
    pty = pytest.importorskip("pty")
    mine, its = pty.openpty()
    given = {**os.environ, **environment}
    code = "from flowtrain.utils import status\nstatus.DELAY, status.TICK = 0.0, 0.01\n" + textwrap.dedent(code)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=its, stdout=subprocess.PIPE, env=given, text=True)
    os.close(its)
    text = io.StringIO()
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:
            break
        if not part:
            break
        text.write(part.decode())
    os.close(mine)
    out, _ = process.communicate()
    assert process.returncode == 0, text.getvalue()
    return f"{text.getvalue()}|{out}"


def test_a_command_says_that_it_is_loading() -> None:
    said = in_a_process("""
        import sys, time, types
        from flowtrain.cli import entry_points
        assert "torch" not in sys.modules
        class Finder:
            def find_spec(self, name, path, target=None):
                if name == "flowtrain.cli.evaluate":
                    time.sleep(0.3)
                    module = sys.modules[name] = types.ModuleType(name)
                    module.main = lambda: print("ran", file=sys.stderr)
                    import importlib.machinery
                    class Loader:
                        def create_module(self, spec): return module
                        def exec_module(self, module): pass
                    return importlib.machinery.ModuleSpec(name, Loader())
        sys.meta_path.insert(0, Finder())
        entry_points.floweval()
    """)
    shown = Terminal()
    shown.write(said.split("|")[0].replace("\r\n", "\n"))
    assert "loading" in said
    assert shown.screen() == "ran\n"


def test_a_forked_process_is_silent_and_does_not_wait() -> None:
    said = in_a_process("""
        import os, time
        with status.reporting(), status.status("parent"):
            time.sleep(0.05)
            with status._reporter._changed:
                child = os.fork()
            if child == 0:
                with status.status("child"):
                    time.sleep(0.05)
                with status.reporting(status.Reporter(open(os.devnull, "w"))), status.status("again"):
                    pass
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert said.split("|")[1] == "7\n"
    assert "parent" in said
    assert "child" not in said


@pytest.mark.parametrize("environment", [{"TQDM_DISABLE": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_other_ranks_and_jobs_side_by_side_are_silent(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    shown = Shown(Terminal())
    with reporting(shown.reporter), status.status("training", total=3, bar=True) as progress:
        progress.advance(3)
    assert shown.after(100) == ""


def test_calls_of_the_library_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(status, "DELAY", 0.0)
    flow = Flow((2,), Affine(2))
    log_probs(flow, flow.sample(10), batch_size=2)
    assert stream.getvalue() == ""
    # inside a reporter the same call would write something
    with reporting(Reporter(stream, threaded=False)):
        log_probs(flow, flow.sample(10), batch_size=2)
    assert "scoring" in stream.getvalue()


def test_a_phase_leaves_its_seconds_in_the_log(caplog: pytest.LogCaptureFixture, propagate_logs: None) -> None:
    with caplog.at_level(logging.DEBUG, "flowtrain"), phase("reading"):
        pass
    assert [record.getMessage() for record in caplog.records] == ["reading: 0.0 s"]


@pytest.mark.parametrize(
    ("row", "factor", "values"),
    [
        ({"nll": 2.5, "nfe_forward": 20, "nfe_backward": 22}, None, {"nll": "2.500", "val": "3.000", "nfe": "42"}),
        ({"nll": 2.5, "nfe_forward": None}, 0.5, {"bits/dim": "1.250", "val": "1.500"}),
        ({"nll": None, "matching": 0.25, "nfe_forward": None}, 0.5, {"matching": "0.250", "val bits/dim": "1.500"}),
    ],
)
def test_the_bar_has_the_unit_of_the_table(
    row: dict[str, float | None], factor: float | None, values: dict[str, str]
) -> None:
    bar = Status("training", total=10)
    show(bar, row, 3.0, factor)
    assert dict(pair.split("=") for pair in bar.notes.split(", ")) == values
    show(bar, row, math.nan, factor)
    assert "val" not in bar.notes


@contextmanager
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Makes stderr a terminal that shows the status without delay."""
    stream = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        patched.setattr(status, "DELAY", 0.0)
        yield stream


@pytest.mark.usefixtures("float32")
def test_commands_name_what_they_do(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with eager(monkeypatch) as stream:
        run("flowtrain", *SMALL, *TINY, "hydra.run.dir=r", "trainer.val_every=2")
    steps = ("reading the data", "initializing", "training", "scoring the test set", "checking", "drawing samples")
    assert [name for name in steps if name not in stream.getvalue()] == []
    written = (tmp_path / "r/flowtrain.log").read_text()
    assert [name for name in steps if name != "training" and f"{name}" not in written] == []
    for command, names in (
        (("floweval", "ckpt=r"), ("reading the data", "scoring the test set", "mass", "round trip", "calibration")),
        (("flowsample", "ckpt=r", "n=20"), ("sampling", "drawing samples")),
        (("flowsample", "ckpt=r", "quality=[1,2]"), ("comparing", "euler")),
    ):
        with eager(monkeypatch) as stream:
            code, _, _ = run(*command)
        assert code == 0
        assert [name for name in names if name not in stream.getvalue()] == []
        assert stream.screen() == ""


@pytest.mark.usefixtures("float32")
def test_failing_command_prints_only_its_message(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "not_a_table.npy")
    with eager(monkeypatch) as stream:
        code, _, _ = run("flowtrain", "data=array", "data.path=not_a_table.npy", "hydra.run.dir=r")
    assert code == 2
    assert "reading the data" in stream.getvalue()
    lines = stream.screen().strip("\n").split("\n")
    assert len(lines) == 1
    assert lines[0].startswith("flowtrain: ")
    assert "not_a_table.npy" in lines[0]


def test_a_sweep_of_jobs_in_other_processes_says_how_many_are_done(
    terminal: Shown, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the callback sets this variable
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sweep_jobs.JobCounter, "SECONDS", 0.0)
    launcher = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "launcher": launcher}})
    with sweep_jobs.summarized():
        sweep_jobs.SweepDirectoryRecorder().on_multirun_start(config)
        assert "0 jobs" in terminal.after(2 * DELAY)
        for name in ("0", "1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "result.json").touch()
        assert "2 jobs" in terminal.after(1)
    assert terminal.seen == ""
    assert capsys.readouterr().out.endswith(f"{tmp_path}\n")


def test_interrupt_while_loading_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> ModuleType:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry_points, "import_module", interrupted)
    with pytest.raises(SystemExit) as stopped:
        entry_points.floweval()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_fits_from_python_show_bars_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, str]] = []

    class Bar:
        def __init__(self, **named: Any) -> None:
            assert named["total"] == 3
            self.n, self.closed = named["initial"], False

        def set_postfix_str(self, text: str) -> None:
            shown.append((self.n, text))

        def close(self) -> None:
            shown.append((self.n, "closed"))

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with status.reporting(status.TqdmReporter()), status.status("training", total=3, bar=True) as bar:
        with status.status("validating"):
            bar.note(nll=2)
        bar.advance(3)
    assert shown[-2:] == [(3, "nll=2"), (3, "closed")]
