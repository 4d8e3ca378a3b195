"""The names of the files of an evaluation: eval.json is reserved for the test set of the run."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import Run, Train

from flowtrain.cli.load_run import LoadedRun, set_name

OWN = {"_target_": "flowtrain.data.tables.array.ArrayData", "path": "/a/train.csv", "test_path": None, "seed": 0}
TOY = {"_target_": "flowtrain.data.toys.shapes.Circles", "name": "circles", "n_test": 50}


@pytest.mark.parametrize(
    ("split", "changed", "name"),
    [
        ("test", {}, ""),
        ("val", {}, "val"),
        ("all", {}, "all"),
        ("all", {"path": "/b/new.csv"}, "new"),
        ("all", {"path": "/a/train.csv"}, "train"),
        ("all", {"path": "/b/new.csv.gz"}, "new"),
        ("all", {"path": "/b/my data (1).npy"}, "my data (1)"),
        # the file is not named val, because this is the name for split=val
        ("all", {"path": "/b/val.csv"}, "val.csv"),
        ("test", {"path": "/a/train.csv"}, ""),
        ("test", {"path": "/b/new.csv"}, "new-test"),
        ("val", {"path": "/b/new.csv"}, "new-val"),
        ("test", {"test_path": "/b/other.npy"}, "other"),
        ("val", {"test_path": "/b/other.npy"}, "test_path-b-other.npy-val"),
        ("test", {"seed": 3}, "seed-3"),
    ],
)
def test_names_tell_which_rows_were_scored(split: str, changed: dict[str, object], name: str) -> None:
    opened = LoadedRun(Path("best.pt"), None, 0, None, {"data": {**OWN, **changed}}, bool(changed), OWN)  # type: ignore[arg-type]
    assert set_name(opened, split, [f"data.{key}={value}" for key, value in changed.items()]) == name


def test_other_data_have_their_own_name() -> None:
    opened = LoadedRun(Path("best.pt"), None, 0, None, {"data": TOY}, True, OWN)  # type: ignore[arg-type]
    assert set_name(opened, "test", ["data=circles"]) == "circles"
    assert set_name(opened, "val", ["data=circles"]) == "circles-val"


def test_evaluations_of_other_rows_leave_those_of_the_test_set(run: Run, tmp_path: Path, trained: Train) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("train", 300), ("new", 40)):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(n, 2)))
    run_dir = Path(trained("data=array", "data.path=train.npy"))
    own = {"eval.json", "report.md", "report.html", "plots/calibration.png", "plots/ood.png"}
    assert run("floweval", f"ckpt={run_dir}", "report=true", "ood=new.npy")[0] == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert {str(path.relative_to(run_dir)) for path in before} >= own
    for arguments, n in ((["split=val"], 30), (["data.path=new.npy"], 40), (["split=all"], 300)):
        code, out, err = run("floweval", f"ckpt={run_dir}", "report=true", "ood=new.npy", *arguments)
        assert code == 0, err
        name = {30: "val", 40: "new", 300: "all"}[n]
        assert json.loads((run_dir / f"eval-{name}.json").read_text())["n"] == n
        for file in own - {"eval.json"}:
            path = run_dir / file
            assert path.with_name(f"{path.stem}-{name}{path.suffix}").is_file()
        assert f"eval-{name}.json" in out
    assert before == {path: path.read_bytes() for path in before}


def test_the_typicality_of_new_rows_is_by_the_validation_set_of_the_run(
    run: Run, tmp_path: Path, trained: Train
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.normal(size=(300, 2)))
    np.save(tmp_path / "new.npy", 3 * rng.normal(size=(40, 2)))
    run_dir = Path(trained("data=array", "data.path=train.npy"))
    assert run("floweval", f"ckpt={run_dir}", "split=val", "scores=val.npy")[0] == 0
    assert run("floweval", f"ckpt={run_dir}", "data.path=new.npy", "ood=new.npy", "scores=new_scores.npy")[0] == 0
    found = json.loads((run_dir / "eval-new.json").read_text())["ood"]
    val, new = -np.load("val.npy").mean(), -np.load("new_scores.npy").mean()
    assert found["entropy"] == pytest.approx(val, abs=1e-5)
    assert new > val + 1
    # the data of the run are missing
    (tmp_path / "train.npy").unlink()
    code, _, err = run("floweval", f"ckpt={run_dir}", "data.path=new.npy", "ood=new.npy")
    assert code == 0
    assert "train.npy" in err
    found = json.loads((run_dir / "eval-new.json").read_text())["ood"]
    assert (found["entropy"], found["entropy_of"]) == (pytest.approx(new), "scored rows")
