"""`floweval`: scores, new data, and one message for every mistake."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evaluate, Run, Train
from helpers.files import written

import flowtrain


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).normal([3.0, -1.0, 8.0], [1.0, 5.0, 0.1], (300, 3))
    path = tmp_path / "train.csv"
    np.savetxt(path, rows, delimiter=",", header="height,weight,age", comments="")
    return path


def test_scores_are_log_p_of_every_row_in_order(
    trained: Train, evaluated: Evaluate, tmp_path: Path, table: Path
) -> None:
    run_dir = trained("data=array", f"data.path={table}")
    new = np.random.default_rng(1).normal([3.0, -1.0, 8.0], 1.0, (2500, 3)).astype(np.float32)
    np.save(tmp_path / "new.npy", new)
    found = evaluated(run_dir, "data.path=new.npy", "scores=out/s.npy", "batch_size=700", name="eval-new.json")
    scores = np.load(tmp_path / "out/s.npy")
    expected = flowtrain.load(run_dir).log_prob(torch.from_numpy(new)).detach().numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.dtype == np.float64
    assert (found["split"], found["n"]) == ("all", 2500)
    assert found["nll"] == pytest.approx(-scores.mean())
    # the test rows that were split off the training file, and all rows of this file
    assert not Path(run_dir, "eval.json").exists()
    assert evaluated(run_dir)["n"] == 30
    assert evaluated(run_dir, "split=all", name="eval-all.json")["n"] == 300
    Path(run_dir, "eval.json").unlink()
    assert evaluated(run_dir, f"data.path={table}", "split=test")["n"] == 30


def test_new_data_are_read_by_the_names_of_the_columns(
    run: Run, tmp_path: Path, table: Path, trained: Train, evaluated: Evaluate
) -> None:
    run_dir = trained("data=array", f"data.path={table}")
    rows = np.random.default_rng(1).normal([3.0, -1.0, 8.0], 1.0, (50, 3))
    same = written(tmp_path / "same.csv", "height,weight,age", rows)
    mixed = written(tmp_path / "mixed.csv", "age,id,height,weight", rows[:, [2, 0, 0, 1]])
    for i, path in enumerate((same, mixed)):
        evaluated(run_dir, f"data.path={path}", f"scores=s{i}.npy", name=f"eval-{path.stem}.json")
    np.testing.assert_allclose(np.load(tmp_path / "s0.npy"), np.load(tmp_path / "s1.npy"), rtol=1e-6)
    other = written(tmp_path / "other.csv", "height,weight,wealth", rows)
    code, out, err = run("floweval", f"ckpt={run_dir}", f"data.path={other}")
    assert (code, out) == (2, "")
    assert "no column 'age'" in err


def test_a_flow_of_a_toy_scores_points_of_a_file(trained: Train, evaluated: Evaluate, tmp_path: Path) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40")
    written(tmp_path / "points.csv", "x,y", np.zeros((1, 2)))
    found = evaluated(run_dir, "data.path=points.csv", name="eval-points.json")
    assert (found["n"], found["kl"], found["nll_stderr"], found["budget"]["total"]) == (1, None, None, None)
    # the test set of the run is still the same
    assert evaluated(run_dir)["n"] == 60


def test_output_never_overwrites_inputs_or_other_outputs(run: Run, tmp_path: Path, trained: Train) -> None:
    run_dir = trained("data=circles", "data.n_test=50", "data.n_val=40")
    for name in ("v.npy", "v_ood.npy", "s_ood.npy"):
        np.save(tmp_path / name, np.zeros((5, 2)))
    (tmp_path / "link.npy").symlink_to(tmp_path / "v.npy")
    (tmp_path / "folder").mkdir()
    ckpt = f"{run_dir}/checkpoints/best.pt"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments in (
        ["data.path=v.npy", "scores=v.npy"],
        ["data.path=v.npy", "scores=link.npy"],
        ["data.path=v.npy", "out=v.npy"],
        ["ood=s_ood.npy", "scores=s.npy"],
        [f"out={ckpt}"],
        ["out=z.html", "report=true"],
        ["out=z.npy", "scores=z.npy"],
        ["out=folder"],
        ["out=folder", "scores=s.npy"],
    ):
        code, out, err = run("floweval", f"ckpt={ckpt}", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert len(err.strip().splitlines()) == 1, err
    np.save(tmp_path / "train.npy", np.random.default_rng(0).normal(size=(100, 2)))
    other = trained("data=array", "data.path=train.npy")
    code, _, err = run("flowsample", f"ckpt={other}", "n=5", "out=train.npy")
    assert (code, np.load(tmp_path / "train.npy").shape) == (2, (100, 2)), err
    assert before.items() <= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()
    # output may be written to a device. A link means its target
    assert run("floweval", f"ckpt={ckpt}", "out=/dev/null", "scores=/dev/null/x.npy")[0] != 0
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert run("floweval", f"ckpt={ckpt}", "out=link.json")[0] == 0
    assert json.loads((tmp_path / "real.json").read_text())["n"] == 50
    assert (tmp_path / "link.json").is_symlink()


def test_requested_columns_are_used_or_refused(
    run: Run, tmp_path: Path, table: Path, trained: Train, evaluated: Evaluate
) -> None:
    run_dir = trained("data=array", f"data.path={table}")
    rows = np.random.default_rng(1).normal([3.0, -1.0, 8.0], 1.0, (50, 3))
    mixed = written(tmp_path / "mixed.csv", "age,height,weight", rows[:, [2, 0, 1]])
    evaluated(run_dir, f"data.path={mixed}", "scores=a.npy", name="eval-mixed.json")
    evaluated(run_dir, f"data.path={mixed}", "data.columns=[1,2,0]", "scores=b.npy", name="eval-mixed.json")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    for arguments, words in (
        ([f"data.path={mixed}", "split=test"], "height, weight, age"),
        ([f"data.path={mixed}", "data.columns=[nonsense]"], "no column 'nonsense'"),
        ([f"data.test_path={mixed}", "split=all"], "data.test_path"),
        ([f"data.test_path={mixed}"], "columns in another order"),
    ):
        code, out, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert words in err
    same = written(tmp_path / "same.csv", "height,weight,age", rows)
    assert evaluated(run_dir, f"data.path={same}", f"data.test_path={same}", name="eval-same-test.json")["n"] == 50


def test_baselines_of_changed_data_are_refused_with_a_way_out(run: Run, table: Path, trained: Train) -> None:
    run_dir = trained("data=array", f"data.path={table}")
    table.write_text(table.read_text() + "1,2,3\n")
    code, out, err = run("floweval", f"ckpt={run_dir}", "split=all", "baselines=true")
    assert (code, out, "baselines=true" in err) == (2, "", True), err


MISTAKES = [
    (["split=all"], "no file of rows"),
    (["scores=s.txt"], "scores=s.txt: .*npy"),
    (["grid=g.csv"], "grid=g.csv: .*npz"),
    (["grid=g.npz", "grid_points=1"], "grid_points=1"),
    (["label=1"], "grid=FILE.npz"),
    (["grid=g.npz", "label=1"], "not conditional"),
    (["plots.format.x=1"], r"plots.format=\['png'\]"),
    (["dtype=float16"], "dtype=float16: .*float32, float64"),
    (["report=maybe"], "report=maybe: give true or false"),
    (["seed=-1"], "seed=-1"),
    (["data.path=5"], "5 has no ending"),
    (["data.path=[a,b]"], "give the path"),
    (["ood=circles,moons"], "only flowtrain -m"),
    (["ood=../model/ffjord"], "ending"),
    (["ood=nowhere.npy"], "there is no file"),
    (["ood=three.npy"], "three.npy has 3 columns"),
    (["data.path=three.npy"], "three.npy has 3 columns"),
    (["data.path=nan.npy"], "nan"),
    (["data.path=empty.csv"], "empty"),
    (["ood=moons.txt"], "there is no file"),
]


def test_mistakes_get_one_message_and_leave_the_files(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    run_dir = trained("data=circles", "data.n_test=50", "data.n_val=40")
    evaluated(run_dir)
    before = Path(run_dir, "eval.json").read_text()
    np.save(tmp_path / "three.npy", np.zeros((5, 3)))
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    (tmp_path / "empty.csv").touch()
    for arguments, words in MISTAKES:
        code, out, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert re.search(words, err), err
        assert len(err.strip().splitlines()) == 1, err
    assert Path(run_dir, "eval.json").read_text() == before
