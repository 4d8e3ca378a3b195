"""`flowtrain runs`, on directories written here and on runs of a few steps."""

import csv
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from helpers import SMALL, Run

from flowtrain.cli import list_runs
from flowtrain.plotting import runs_figure

Write = Callable[..., Path]
VAL = {"split": "val", "nll_stderr": 0.02}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run directory. Each run is newer than the run before."""
    time = [1_000_000_000]

    def written(
        place: str,
        result: Mapping[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        config: str | None = "model: {name: nsf}\ndata: {name: moons}\n",
        overrides: str = "[]",
    ) -> Path:
        folder = tmp_path / place
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/overrides.yaml").write_text(overrides)
        if config is not None:
            (folder / ".hydra/config.yaml").write_text(config)
        if rows is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        time[0] += 100
        for path in folder.rglob("*"):
            os.utime(path, (time[0], time[0]))
        return folder

    return written


def listed(run: Run, *arguments: str) -> list[dict[str, Any]]:
    """Returns the runs of a list, read from its JSON file."""
    code, out, err = run("flowtrain", "runs", *arguments, "out=l.json")
    assert (code, err) == (0, ""), err
    found: list[dict[str, Any]] = json.loads(Path("l.json").read_text())["runs"]
    assert all(name in out for each in found if (name := each["name"].rpartition("/")[2]).isprintable())
    return found


RESULT = {"nll": 2.5, "nll_stderr": 0.03, "bits_per_dim": None, "train_seconds": 7.0, "steps": 40, "val_nll": 2.4}


def test_runs_are_listed_with_the_newest_last(run: Run, write: Write) -> None:
    write("outputs/z", RESULT)
    write("outputs/2026-01-02/03-04-05-6", {**RESULT, "nll": 100.0, "bits_per_dim": 1.5})
    write("outputs/a", rows=[{**VAL, "step": k, "nll": 3 - k / 10 % 0.5, "seconds": k / 2} for k in (0, 2, 4, 6)])
    found = listed(run)
    assert [each["name"] for each in found] == ["z", "2026-01-02/03-04-05-6", "a"]
    keys = ("split", "nll", "nll_stderr", "bits_per_dim", "train_seconds", "steps", "state")
    assert [[each[key] for key in keys] for each in found] == [
        ["test", 2.5, 0.03, None, 7.0, 40, "finished"],
        ["test", 100.0, 0.03, 1.5, 7.0, 40, "finished"],
        ["val", pytest.approx(2.6), 0.02, None, 3.0, 6, "stopped at step 6"],
    ]
    assert (found[0]["model"], found[0]["data"], found[0]["path"]) == ("nsf", "moons", "outputs/z")
    lines = run("flowtrain", "runs")[1].splitlines()
    assert [words in line for line, words in zip(lines[1:], ("2.50 +- 0.03", "bits/dim", "(val)"), strict=True)] == [
        True
    ] * 3
    with Path("l.csv").open("w") as file:
        file.write(list_runs.as_csv(list_runs.find_runs(Path("outputs"))))
    with Path("l.csv").open() as file:
        assert [row["nll"] for row in csv.DictReader(file)][:2] == ["2.5", "100.0"]


def test_a_run_that_was_resumed_and_stopped_is_not_finished(run: Run, write: Write) -> None:
    write("outputs/a", RESULT, rows=[{**VAL, "step": 60, "nll": 1.0, "seconds": 1.0}])
    assert [(each["state"], each["nll"]) for each in listed(run)] == [("stopped at step 60", 2.5)]


def test_a_run_is_running_while_a_process_holds_its_lock(run: Run, write: Write) -> None:
    folder = write("outputs/a", RESULT)
    with filelock.FileLock(folder / ".lock"):
        assert listed(run)[0]["state"] == "running"
    (folder / ".lock").touch()
    assert listed(run)[0]["state"] == "finished"


def test_failed_runs_say_so(run: Run, write: Write) -> None:
    (write("outputs/a") / "error.txt").write_text("a solve failed")
    failed = write("outputs/b", rows=[{"split": "train", "step": 20, "nll": 3.0, "seconds": 1.0}]) / "failed"
    failed.mkdir()
    (failed / "step_000023.npz").touch()
    # a step that was skipped
    skipped = write("outputs/c", rows=[{"split": "train", "step": 50, "nll": 3.0, "seconds": 1.0}]) / "failed"
    skipped.mkdir()
    (skipped / "step_000023.npz").touch()
    states = {each["name"]: each["state"] for each in listed(run)}
    assert states == {"a": "failed", "b": "failed at step 23", "c": "stopped at step 50"}


def test_runs_of_a_sweep_follow_its_line(run: Run, write: Write) -> None:
    for job, rtol in ((0, "1e-3"), (2, "1e-4"), (10, "1e-5")):
        write(f"outputs/multirun/s/{job}", RESULT, overrides=f"[model=nsf, solver.rtol={rtol}]")
        write(f"outputs/between-{job}", RESULT)
    Path("outputs/multirun/s/multirun.yaml").touch()
    write("outputs/last", RESULT)
    found = listed(run)
    names = ["between-0", "between-2", *(f"multirun/s/{job}" for job in (0, 2, 10)), "between-10", "last"]
    assert [each["name"] for each in found] == names
    assert [each["overrides"] for each in found[2:5]] == [{"solver.rtol": v} for v in ("1e-3", "1e-4", "1e-5")]
    assert {each["sweep"] for each in found[2:5]} == {"outputs/multirun/s"}
    lines = run("flowtrain", "runs")[1].splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("multirun/s "))
    assert "3 runs" in lines[place]
    assert [line.split()[0] for line in lines[place + 1 : place + 4]] == ["0", "2", "10"]
    assert [each["name"] for each in listed(run, "outputs/multirun/s")] == ["0", "2", "10"]


def test_candidates_of_a_search_are_not_listed(run: Run, write: Write) -> None:
    write("outputs/a", RESULT)
    write("outputs/a/search/nsf", rows=[{**VAL, "step": 1, "nll": 1.0, "seconds": 1.0}])
    assert [each["name"] for each in listed(run)] == ["a"]


def test_broken_and_foreign_directories_are_shown_or_skipped(run: Run, write: Write) -> None:
    place = Path("outputs")
    write("outputs/result").joinpath("result.json").write_text("{")
    write("outputs/list").joinpath("result.json").write_text("[1]")
    write("outputs/deep").joinpath("result.json").write_text("[" * 100_000)
    write("outputs/types", {"nll": "x", "nll_stderr": [], "steps": {}, "train_seconds": True})
    write("outputs/bytes").joinpath("result.json").write_bytes(b"\xff\xfe")
    torn = b'\xff\n{"step": "x"}\n3\n{"step": 5, "split": "val", "nll"'
    write("outputs/rows").joinpath("metrics.jsonl").write_bytes(torn)
    write("outputs/config", RESULT, config="model: [")
    write("outputs/tag", RESULT, config="model: !!python/object/apply:os.system [touch /tmp/never]")
    write("outputs/scalar", RESULT, config="3")
    write("outputs/none", RESULT, config=None)
    write("outputs/\x1b[31mred", RESULT)
    write("outputs/sweep/0", RESULT, overrides="{{").parent.joinpath("multirun.yaml").touch()
    (place / "foreign/deeper").mkdir(parents=True)
    (place / "foreign/notes.txt").touch()
    (place / "file.txt").touch()
    (place / "loop").symlink_to(place.absolute())
    (place / "dangling").symlink_to("nowhere")
    (place / "directory/metrics.jsonl").mkdir(parents=True)
    found = {each["name"]: each for each in listed(run)}
    assert len(found) == 12
    damaged = {"result", "list", "deep", "bytes", "config", "tag", "scalar", "types"}
    assert {name for name, each in found.items() if each["problem"]} == damaged
    assert {found[name]["nll"] for name in ("result", "list", "deep", "types", "bytes", "rows")} == {None}
    assert {found[name]["nll"] for name in ("config", "tag", "scalar", "none", "sweep/0")} == {2.5}
    code, out, _ = run("flowtrain", "runs")
    assert (code, "\x1b" in out) == (0, False)


@pytest.mark.usefixtures("without_figures", "float32")
def test_no_checkpoint_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("flowtrain", *SMALL, "model=affine", "name=a")[0] == 0

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "load", refuse)
    found = listed(run)
    assert [(each["name"], each["model"], each["steps"], each["state"]) for each in found] == [
        ("a", "affine", 4, "finished")
    ]
    assert found[0]["nll"] == json.loads(Path("outputs/a/result.json").read_text())["nll"]


def test_curves_of_several_runs_are_drawn(run: Run, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(runs_figure, "draw_runs", lambda path, *, runs, title: drawn.append((str(path), [*runs])))
    rows = [{**VAL, "step": k, "nll": 3.0, "seconds": 1.0} for k in (1, 2)]
    for name in ("a", "b"):
        write(f"outputs/{name}", RESULT, rows)
    write("outputs/c", RESULT, [])
    assert run("flowtrain", "runs")[0] == 0
    assert drawn == []
    code, out, _ = run("flowtrain", "runs", "outputs/a", "outputs/b")
    assert code == 0
    assert "runs.png" in out
    Path("runs.png").touch()
    run("flowtrain", "runs", "outputs/a", "outputs/b")
    run("flowtrain", "runs", "outputs", "plot=x/all.png")
    both = ["outputs/a", "outputs/b"]
    assert drawn == [("runs.png", both), ("runs-2.png", both), ("x/all.png", both)]
    code, _, err = run("flowtrain", "runs", "outputs/c", "plot=c.png")
    assert (code, len(drawn)) == (2, 3), err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["--foo"], "--foo"),
        (["plto=a.png"], "plot"),
        (["out=a.txt"], ".json"),
        (["plot=a.jpg"], ".png"),
        ([""], "--help"),
    ],
)
def test_mistakes_are_refused(run: Run, arguments: list[str], named: str) -> None:
    code, out, err = run("flowtrain", "runs", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert named in err


def test_nothing_to_list(run: Run) -> None:
    code, out, err = run("flowtrain", "runs")
    assert (code, err, list(Path().iterdir())) == (0, "", [])
    assert "outputs" in out


def test_help_names_the_options(run: Run) -> None:
    code, out, _ = run("flowtrain", "runs", "--help")
    assert code == 0
    assert [key for key in list_runs.KEYS if f"  {key} " not in out] == []


def test_files_of_runs_are_not_overwritten(run: Run, write: Write) -> None:
    place = write("outputs/sweep/0", RESULT, [{**VAL, "step": 1, "nll": 1.0, "seconds": 1.0}])
    (place.parent / "sweep.csv").write_text("job\n0\n")
    before = {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    for output in ("out=outputs/sweep/0/result.json", "out=outputs/sweep/sweep.csv"):
        code, _, err = run("flowtrain", "runs", output)
        assert (code, len(err.splitlines())) == (2, 1)
    assert {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ['{"val_nll": "x", "nll": 1.0}', '{"nll": [1]}', "[" * 100_000])
def test_results_of_a_sweep_without_numbers_are_damaged(run: Run, write: Write, text: str) -> None:
    write("outputs/s/0", RESULT, overrides="[seed=0]")
    damaged = write("outputs/s/1", rows=[{**VAL, "step": 3, "nll": 1.0, "seconds": 1.0}], overrides="[seed=1]")
    (damaged / "result.json").write_text(text)
    (damaged.parent / "sweep.csv").touch()
    found = {each["name"]: each for each in listed(run)}
    assert found["s/0"]["problem"] == ""
    assert "result.json" in found["s/1"]["problem"]
    assert (found["s/1"]["split"], found["s/1"]["overrides"]) == ("val", {"seed": "1"})


def test_a_result_without_a_finite_nll_has_ended(run: Run, write: Write) -> None:
    write("outputs/a", {**RESULT, "nll": None}, [{**VAL, "step": 40, "nll": 1.0, "seconds": 1.0}])
    (found,) = listed(run)
    assert (found["state"], found["split"]) == ("finished", "val")
    assert "NLL" in found["problem"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_named_pipe_is_no_run(run: Run, write: Write) -> None:
    write("outputs/a", RESULT)
    Path("outputs/b").mkdir()
    os.mkfifo("outputs/b/metrics.jsonl")
    assert [each["name"] for each in listed(run)] == ["a"]


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names are Unicode")
def test_paths_that_are_not_unicode_are_written_in_ascii(run: Run, write: Write) -> None:
    write("outputs/a\udcff", RESULT)
    assert run("flowtrain", "runs", "out=l.csv")[0] == 0
    assert "outputs/a\\udcff" in Path("l.csv").read_text()
