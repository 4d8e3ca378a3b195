"""data.missing and files with types from the command line: training, resume, evaluation and scores."""

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import Evaluate, Run, Train

import flowtrain

pytestmark = pytest.mark.usefixtures("without_figures")


def holed(n: int = 150, seed: int = 0) -> pl.DataFrame:
    """Returns named columns with missing values, codes and text."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"a": rng.normal(size=n), "name": ["x"] * n, "b": rng.normal(3, 2, n)})
    row = pl.int_range(pl.len())
    return frame.with_columns(
        pl.when(row % 9 != 2).then(pl.col("a")),
        pl.when(row % 11 == 5).then(-999.0).otherwise(pl.col("b")).alias("b"),
    )


def complete(frame: pl.DataFrame) -> np.ndarray:
    """Returns whether each row has no missing value."""
    return frame.select(pl.col("a").is_not_null() & (pl.col("b") != -999)).to_series().to_numpy()


@pytest.fixture
def run_dir(trained: Train, tmp_path: Path) -> str:
    holed().write_parquet(tmp_path / "t.parquet")
    options = ["data.columns=[a,b]", "data.missing=drop", "data.na=[-999,?]"]
    return trained("data=array", f"data.path={tmp_path / 't.parquet'}", *options)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".parquet", ".arrow", ".xlsx"])
def test_scores_have_one_value_for_each_row(
    ending: str, run_dir: str, tmp_path: Path, evaluated: Evaluate, run: Run
) -> None:
    new = holed(60, seed=1).select("b", "name", "a")
    path = tmp_path / f"new{ending}"
    write = {".parquet": new.write_parquet, ".arrow": new.write_ipc, ".xlsx": new.write_excel}
    if ending == ".csv.gz":
        path.write_bytes(gzip.compress(new.write_csv().encode()))
    elif ending == ".tsv":
        path.write_text(new.write_csv(separator="\t"))
    else:
        write.get(ending, new.write_csv)(path)
    found = evaluated(run_dir, f"data.path={path}", "scores=s.npy", f"ood={path}", name="eval-new.json")
    kept = complete(new)
    rows = new.select("a", "b").to_numpy()[kept]
    assert found["n"] == kept.sum()
    expected = np.full(60, np.nan)
    expected[kept] = flowtrain.load(run_dir).log_prob(rows)
    for name in ("s.npy", "s_ood.npy"):
        np.testing.assert_allclose(np.load(tmp_path / name), expected, atol=1e-5)
    code, _, err = run("floweval", f"ckpt={run_dir}", f"data.path={path}", "data.missing=refuse")
    assert (code, "data.missing=drop" in err) == (2, True), err


def test_outliers_are_named_by_their_row_in_the_file(run_dir: str, tmp_path: Path, evaluated: Evaluate) -> None:
    new = holed(60, seed=1)
    new[40, "a"] = 1e6
    assert complete(new)[40]
    new.write_csv(tmp_path / "new.csv")
    found = evaluated(run_dir, f"data.path={tmp_path / 'new.csv'}", name="eval-new.json")
    check = found["checks"]["concentration"]
    assert (check["rows"], "row 40" in check["message"]) == ([40], True), check


def test_runs_with_dropped_rows_resume(run: Run, run_dir: str, tmp_path: Path, evaluated: Evaluate) -> None:
    before = evaluated(run_dir)
    frame = holed()
    # a missing row is not part of the data, so it may change
    other = frame.with_columns(pl.when(pl.col("a").is_null()).then(7.0).otherwise(pl.col("b")).alias("b"))
    other.write_parquet(tmp_path / "t.parquet")
    assert evaluated(run_dir)["nll"] == before["nll"]
    code, _, err = run("flowtrain", f"resume={run_dir}", "trainer.steps=6")
    assert code == 0, err
    frame[0, "a"] = 0.0
    frame.write_parquet(tmp_path / "t.parquet")
    code, _, err = run("flowtrain", f"resume={run_dir}", "trainer.steps=8")
    assert (code, "resume" in err) == (2, True), err


def test_log_counts_the_dropped_rows(run_dir: str) -> None:
    n = 150 - complete(holed()).sum()
    assert f"{n} of 150 rows have missing values" in (Path(run_dir) / "flowtrain.log").read_text()
    assert json.loads((Path(run_dir) / "result.json").read_text())["n"] == round(0.1 * (150 - n))


def test_missing_values_are_refused_by_default(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.xlsx"
    holed().write_excel(path)
    arguments = ["model=affine", "data=array", f"data.path={path}"]
    code, _, err = run("flowtrain", *arguments)
    assert (code, "'name'" in err, "'data.columns=[0,2]'" in err) == (2, True, True), err
    code, _, err = run("flowtrain", *arguments, "data.columns=[0,2]")
    assert (code, "'a': 17, first in row 4" in err, "data.missing=drop" in err) == (2, True, True), err
