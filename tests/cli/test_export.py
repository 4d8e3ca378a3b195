"""`flowexport`: its files, its table, and the mistakes that it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import SMALL, OnlyPrograms, Run

from flowtrain import load
from flowtrain.flow import Flow

pytestmark = pytest.mark.usefixtures("float32", "without_figures")

REALNVP = ["model=realnvp", "model.layers=1", "model.hidden=[8]"]


@pytest.fixture
def realnvp(run: Run) -> None:
    """Returns a run in the directory r."""
    code, _, err = run("flowtrain", *SMALL, *REALNVP, "hydra.run.dir=r")
    assert code == 0, err


def metadata_of(path: Path) -> dict[str, object]:
    extra = {"metadata.json": ""}
    torch.export.load(path, extra_files=extra)
    found: dict[str, object] = json.loads(extra["metadata.json"])
    return found


@pytest.mark.usefixtures("realnvp")
def test_programs_are_written_into_the_run_directory(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowexport", "r")
    assert (code, err) == (0, "")
    files = [tmp_path / "r" / name for name in ("flow.pt2", "flow.inverse.pt2", "flow.sample.pt2")]
    assert all(path.name in out for path in files)
    x = torch.randn(3, 2)
    found = torch.export.load(files[0]).module()(x)
    torch.testing.assert_close(found, load("r").log_prob(x).detach(), rtol=1e-5, atol=1e-5)
    about = metadata_of(files[1])
    assert (about["rows"], about["rows_from"]) == (50, "test set of the run")


def test_a_continuous_run_takes_solver_and_steps(run: Run, tmp_path: Path, only_programs: OnlyPrograms) -> None:
    only_programs("log_prob")
    code, _, err = run("flowtrain", *SMALL, "model.hidden=[4]", "solver.rtol=1e-2", "hydra.run.dir=r")
    assert code == 0, err
    code, out, err = run("flowexport", "ckpt=r", "out=a.pt2", "solver=midpoint", "steps=3")
    assert (code, err) == (0, "")
    assert "midpoint, 3 steps" in out
    assert metadata_of(tmp_path / "a.pt2")["solver"] == {"method": "midpoint", "steps": 3}


def test_names_of_columns_are_kept_and_missing_data_are_replaced(
    run: Run, tmp_path: Path, only_programs: OnlyPrograms
) -> None:
    only_programs("log_prob")
    rows = torch.randn(60, 2).tolist()
    (tmp_path / "a.csv").write_text("\n".join(["one,two", *(f"{a},{b}" for a, b in rows)]))
    keys = ["data=array", "data.path=a.csv", "trainer.steps=4", "trainer.plot_every=null", "hydra.run.dir=r"]
    code, _, err = run("flowtrain", *REALNVP, *keys)
    assert code == 0, err
    (tmp_path / "a.csv").unlink()
    code, out, err = run("flowexport", "r", "out=a.pt2")
    assert code == 0
    assert "samples of the flow" in out
    assert "a.csv" in err
    about = metadata_of(tmp_path / "a.pt2")
    assert (about["columns"], about["rows_from"]) == (["one", "two"], "samples of the flow")


MISTAKES = [
    (["out=a.txt"], 2, ".pt2"),
    (["steps=3"], 2, "no ODE"),
    (["solver=dopri5"], 2, "solver=dopri5"),
    (["steps=0"], 2, "steps=0"),
    (["tolerance=-1"], 2, "tolerance"),
    (["out=r/checkpoints/best.pt/a.pt2"], 1, "is not a directory"),
    (["device=cuda"], 2, "device"),
    (["out=d.pt2"], 2, "is a directory"),
]


@pytest.mark.usefixtures("realnvp")
def test_mistakes_are_named_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "d.pt2").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, wanted, words in MISTAKES:
        code, _, err = run("flowexport", "r", *arguments)
        assert (code, words in err) == (wanted, True), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("realnvp")
def test_older_files_stay_if_a_program_differs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_programs: OnlyPrograms
) -> None:
    only_programs("log_prob", "inverse")
    (tmp_path / "a.pt2").write_text("old")
    # the program is compared with a flow that gives other values
    inverse = Flow.inverse
    monkeypatch.setattr(Flow, "inverse", lambda self, x, label=None: inverse(self, x, label) + 1e-3)
    code, out, err = run("flowexport", "r", "out=a.pt2")
    assert (code, out) == (1, "")
    assert "inverse differs" in err
    assert (tmp_path / "a.pt2").read_text() == "old"
    assert not (tmp_path / "a.inverse.pt2").exists()
    assert run("flowexport", "r", "out=a.pt2", "tolerance=1e-2")[0] == 0
