"""Files of scores, samples and grids from the command line: .csv and .parquet with ids, row numbers and names."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from helpers import Evaluate, Run, Train

import flowtrain

pytestmark = pytest.mark.usefixtures("without_figures")


def table(n: int = 200, seed: int = 0) -> pl.DataFrame:
    """Returns columns of text, real numbers, counts and classes. Every 9th row has a missing value."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "name": [f"k{i:03d}" for i in range(n)],
            "a": rng.normal(size=n),
            "count": rng.poisson(4.0, n),
            "kind": np.arange(n) % 2,
        }
    )
    return frame.with_columns(pl.when(pl.int_range(pl.len()) % 9 != 2).then(pl.col("a")))


@pytest.fixture
def run_dir(trained: Train, tmp_path: Path) -> str:
    table().write_csv(tmp_path / "t.csv")
    keys = ["data.id=name", "data.label=kind", "data.missing=drop", "data.dequantize=[count]", "model.conditional=true"]
    return trained("model=realnvp", "model.layers=2", "model.hidden=[4]", "data=array", "data.path=t.csv", *keys)


def read(path: Path) -> pl.DataFrame:
    return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)


def test_scores_of_a_new_file_have_ids_and_row_numbers(run_dir: str, tmp_path: Path, evaluated: Evaluate) -> None:
    new = table(60, seed=1).select("kind", "count", "name", "a")
    new.write_parquet(tmp_path / "new.parquet")
    for path in ("s.csv", "s.parquet", "s.npy"):
        evaluated(run_dir, "data.path=new.parquet", f"scores={path}", "ood=new.parquet", name="eval-new.json")
    scores = read(tmp_path / "s.csv")
    assert scores.columns == ["name", "row", "log_prob", "error"]
    assert scores["name"].to_list() == new["name"].to_list()
    assert scores["row"].to_list() == list(range(60))
    missing = new["a"].is_null()
    assert missing.sum() == 7
    assert scores["log_prob"].is_null().to_list() == missing.to_list()
    assert scores["error"].is_null().to_list() == missing.to_list()
    np.testing.assert_array_equal(scores["log_prob"].fill_null(np.nan), np.load(tmp_path / "s.npy"))
    assert read(tmp_path / "s.parquet").equals(scores)
    assert read(tmp_path / "s_ood.csv").select("name", "row").equals(scores.select("name", "row"))
    assert not list(tmp_path.glob("*members*"))


def test_scores_of_the_test_set_have_its_rows_in_the_file(run_dir: str, tmp_path: Path, evaluated: Evaluate) -> None:
    found = evaluated(run_dir, "scores=s.csv")
    scores, rows = read(tmp_path / "s.csv"), table()
    assert len(scores) == found["n"]
    assert scores["log_prob"].mean() == pytest.approx(-found["nll"])
    assert found["row_error"]["worst"] == pytest.approx(scores["error"].max())
    assert found["row_error"]["p99"] == pytest.approx(np.quantile(scores["error"], 0.99))
    assert scores["name"].to_list() == rows[scores["row"].to_list()]["name"].to_list()
    assert rows[scores["row"].to_list()]["a"].null_count() == 0


def test_ids_of_a_run_that_was_trained_without_them(
    trained: Train, run: Run, tmp_path: Path, evaluated: Evaluate
) -> None:
    table().drop_nulls().write_csv(tmp_path / "t.csv")
    run_dir = trained("data=array", "data.path=t.csv", "data.columns=[a,count]")
    before = evaluated(run_dir, "scores=s.csv")
    assert read(tmp_path / "s.csv").columns == ["row", "log_prob", "error"]
    # the rows are the same, so the name of the file is the same
    (Path(run_dir) / "eval.json").unlink()
    assert evaluated(run_dir, "scores=s.csv", "data.id=name")["nll"] == before["nll"]
    scores = read(tmp_path / "s.csv")
    assert scores["name"].to_list() == table().drop_nulls()[scores["row"].to_list()]["name"].to_list()
    code, _, err = run("floweval", f"ckpt={run_dir}", "data.path=t.csv", "data.id=nmae", "scores=s.csv")
    assert (code, "data.id" in err, "'name'" in err) == (2, True, True), err


def test_separate_test_files_have_their_own_rows_and_ids(trained: Train, tmp_path: Path, evaluated: Evaluate) -> None:
    table().write_csv(tmp_path / "t.csv")
    test = table(50, seed=2).with_columns(pl.col("name") + "x")
    test.write_csv(tmp_path / "test.csv")
    keys = ["data.test_path=test.csv", "data.id=0", "data.missing=drop", "data.columns=[1,2]"]
    run_dir = trained("data=array", "data.path=t.csv", *keys)
    evaluated(run_dir, "scores=s.csv")
    kept = np.flatnonzero(test["a"].is_not_null())
    scores = read(tmp_path / "s.csv")
    assert scores["row"].to_list() == kept.tolist()
    assert scores["name"].to_list() == test[kept]["name"].to_list()


def test_ids_are_not_part_of_a_sample(trained: Train, run: Run, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(100, 3))
    np.save(tmp_path / "x.npy", np.column_stack([np.arange(100), rows]))
    run_dir = trained("data=array", "data.path=x.npy", "data.id=0")
    streamed = trained("data=array", "data.path=x.npy", "data.id=0", "data.memory_map=true", "name=streamed")
    for each in (run_dir, streamed):
        assert flowtrain.load(each).event_shape == (3,)
        assert run("floweval", f"ckpt={each}", "data.path=x.npy", "scores=s.csv")[0] == 0
        scores = read(tmp_path / "s.csv")
        assert scores.columns == ["c0", "row", "log_prob", "error"]
        assert scores["c0"].to_list() == list(range(100))
        expected = flowtrain.load(each).log_prob(rows)
        np.testing.assert_allclose(scores["log_prob"], expected, rtol=1e-5)
    assert flowtrain.load(trained("data=array", "data.path=x.npy", "data.id=0", "data.columns=[0,1]")).event_shape == (
        1,
    )
    code, _, err = run("flowtrain", "model=affine", "data=array", "data.path=x.npy", "data.id=0", "data.columns=[0]")
    assert (code, "data.id" in err) == (2, True), err


def test_scores_of_an_ensemble_have_the_spread_and_the_members(trained: Train, run: Run, tmp_path: Path) -> None:
    table().drop_nulls().write_csv(tmp_path / "t.csv")
    keys = ["model=realnvp", "model.layers=2", "model.hidden=[4]", "data=array", "data.path=t.csv"]
    runs = [trained(*keys, "data.columns=[a,count]", f"seed={seed}") for seed in (0, 1)]
    for path in ("s.csv", "s.npy"):
        code, _, err = run("floweval", f"ckpt=[{','.join(runs)}]", "weights=[0.3,0.7]", f"scores={path}")
        assert code == 0, err
    scores, members = read(tmp_path / "s.csv"), np.load(tmp_path / "s_members.npy")
    assert scores.columns == ["row", "log_prob", "error", "spread"]
    mean = members @ [0.3, 0.7]
    np.testing.assert_allclose(scores["spread"], np.sqrt((members - mean[:, None]) ** 2 @ [0.3, 0.7]), atol=1e-12)
    assert scores["spread"].min() > 0


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_samples_have_names_types_and_labels(
    ending: str, run_dir: str, run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    code, _, err = run("flowsample", f"ckpt={run_dir}", "n=150", f"out=x{ending}")
    assert code == 0, err
    samples = read(tmp_path / f"x{ending}")
    assert (samples.columns, len(samples)) == (["a", "count", "kind"], 150)
    assert samples["count"].dtype == samples["kind"].dtype == pl.Int64
    assert set(samples["kind"]) == {0, 1}
    run("flowsample", f"ckpt={run_dir}", "n=150", "out=x.npy")
    np.testing.assert_array_equal(samples["a"].cast(pl.Float32), np.load(tmp_path / "x.npy")[:, 0])
    evaluated(run_dir, f"data.path=x{ending}", "scores=s.csv", name="eval-x.json")
    assert read(tmp_path / "s.csv").columns == ["row", "log_prob", "error"]
    trained("data=array", f"data.path=x{ending}", "data.label=kind", "data.dequantize=[count]")
    run("flowsample", f"ckpt={run_dir}", "n=20", "label=1", f"out=x{ending}")
    assert set(read(tmp_path / f"x{ending}")["kind"]) == {1}


def test_samples_of_a_file_without_names_are_read_again(
    trained: Train, run: Run, tmp_path: Path, evaluated: Evaluate
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", np.column_stack([np.arange(100) % 2, rng.normal(size=(100, 2))]))
    keys = ["model=realnvp", "model.layers=2", "model.hidden=[4]", "model.conditional=true"]
    run_dir = trained(*keys, "data=array", "data.path=x.npy", "data.label=0")
    assert run("flowsample", f"ckpt={run_dir}", "n=50", "out=s.csv")[0] == 0
    samples = read(tmp_path / "s.csv")
    assert samples.columns == ["c0", "c1", "label"]
    evaluated(run_dir, "data.path=s.csv", "scores=p.npy", name="eval-s.json")
    expected = flowtrain.load(run_dir).log_prob(samples.select("c0", "c1").to_numpy(), samples["label"].to_numpy())
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, rtol=1e-4)


def test_grid_file_contains_log_p_of_one_class(run_dir: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run("floweval", f"ckpt={run_dir}", "grid=new/g.npz", "grid_points=12", "label=1")
    assert code == 0, err
    with np.load(tmp_path / "new/g.npz") as found:
        assert (found["log_prob"].shape, found["columns"].tolist()) == ((12, 12), ["a", "count"])
        point = np.array([[found["x"][5], found["y"][7]]])
        expected = flowtrain.load(run_dir).log_prob(point, label=1)
        np.testing.assert_allclose(found["log_prob"][5, 7], expected, rtol=1e-4)


def test_grid_and_parquet_are_refused_before_any_work(
    trained: Train, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 3)))
    run_dir = trained("data=array", "data.path=x.npy")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("floweval", f"ckpt={run_dir}", "grid=g.npz")
    assert (code, "data.columns" in err) == (2, True), err
    code, _, err = run("floweval", f"ckpt={run_dir}", f"grid={run_dir}/eval.json")
    assert (code, ".npz" in err) == (2, True), err
    importing = importlib.import_module

    def without_polars(name: str, package: str | None = None) -> ModuleType:
        if name == "polars":
            raise ImportError(name)
        return importing(name, package)

    monkeypatch.setattr(importlib, "import_module", without_polars)
    for command, option in (("floweval", "scores=s.parquet"), ("flowsample", "out=s.parquet")):
        code, out, err = run(command, f"ckpt={run_dir}", option)
        assert (code, out, "flowtrain[tables]" in err) == (2, "", True), err
    assert sorted(tmp_path.rglob("*")) == before
