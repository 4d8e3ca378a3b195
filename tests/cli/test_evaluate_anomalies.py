"""`floweval anomalies=FILE`: decisions, p-values, contributions and labels of a file of new rows."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import Evaluate, Run, Train
from sklearn.metrics import average_precision_score, roc_auc_score

import flowtrain
from flowtrain.evaluation import find_anomalies

COLUMNS = ["row", "log_prob", "p_value", "anomaly", "column_1", "contribution_1", "column_2", "contribution_2"]


def rows(n: int, seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(n, 2))
    return np.column_stack([a[:, 0], 100 * a[:, 0] + 10 * a[:, 1]])


@pytest.fixture
def run_dir(trained: Train, tmp_path: Path) -> str:
    pl.DataFrame(rows(400, 0), schema=["size", "heat"]).write_csv(tmp_path / "t.csv")
    return trained("model=affine", "data=array", "data.path=t.csv", "data.val_fraction=0.25", "data.missing=drop")


@pytest.fixture
def new(tmp_path: Path) -> pl.DataFrame:
    """New rows in which every 10th row has a disturbed column, with names, labels and a missing value."""
    x = rows(120, 1)
    x[:60:10, 1] += 100
    x[60::10, 0] += 1
    frame = pl.DataFrame(
        {
            "name": [f"k{i}" for i in range(120)],
            "heat": [None if i == 3 else float(x[i, 1]) for i in range(120)],
            "bad": [None if i == 5 else int(i % 10 == 0) for i in range(120)],
            "size": x[:, 0],
        }
    )
    frame.write_csv(tmp_path / "new.csv")
    frame.write_parquet(tmp_path / "new.parquet")
    return frame


def read(path: Path) -> pl.DataFrame:
    return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)


def test_rows_of_a_file_are_flagged_with_the_columns_that_explain_them(
    run_dir: str, new: pl.DataFrame, tmp_path: Path, evaluated: Evaluate
) -> None:
    keys = ["data.id=name", "data.anomaly_label=bad", "scores=s.csv", "report=true", "false_positive_rate=0.05"]
    for ending in (".csv", ".parquet"):
        found = evaluated(run_dir, f"data.path=new{ending}", f"anomalies=a{ending}", *keys, name="eval-new.json")
    table = read(tmp_path / "a.csv")
    assert read(tmp_path / "a.parquet").equals(table)
    assert table.columns == ["name", *COLUMNS]
    assert table["name"].to_list() == new["name"].to_list()
    assert table["log_prob"].to_list() == read(tmp_path / "s.csv")["log_prob"].to_list()
    # the row with a missing value, and rows that are not flagged
    assert all(cell is None for cell in table.row(3)[2:])
    assert table.filter(pl.col("anomaly") == 0)["column_1"].null_count() == (table["anomaly"] == 0).sum()
    bad = np.arange(120) % 10 == 0
    assert table["anomaly"].dtype == pl.Int64
    assert table.filter(bad)["anomaly"].sum() == 12
    # whichever column is disturbed, both are off by the same number of conditional standard deviations
    assert set(table.filter(bad)["column_1"]) | set(table.filter(bad)["column_2"]) == {"size", "heat"}
    # the same in Python, with the calibration rows in memory
    flow = flowtrain.load(run_dir)
    x = new.filter(pl.col("heat").is_not_null()).select("size", "heat").to_numpy()
    evaluated(run_dir, "split=val", "scores=val.csv", name="eval-val.json")
    known = pl.read_csv(tmp_path / "t.csv")[read(tmp_path / "val.csv")["row"].to_list()].to_numpy()
    assert len(known) == 100
    again = find_anomalies(flow, x, known, false_positive_rate=0.05)
    kept = table.filter(pl.col("log_prob").is_not_null())
    np.testing.assert_allclose(kept["p_value"], again.p_values)
    assert (kept["anomaly"].to_numpy() == again.is_anomaly).all()
    flagged = kept.filter(pl.col("anomaly") == 1)
    np.testing.assert_allclose(flagged["contribution_1"], again.contributions[again.is_anomaly, 0], rtol=1e-4)
    names = np.array(["size", "heat"])[again.columns[again.is_anomaly, 0]]
    assert flagged["column_1"].to_list() == names.tolist()
    # the summary
    summary = found["anomalies"]
    assert (summary["n"], summary["n_calibration"], summary["flagged"]) == (119, 100, kept["anomaly"].sum())
    assert summary["threshold"] == pytest.approx(again.threshold)
    labels = new.filter(pl.col("heat").is_not_null())["bad"].to_numpy()
    is_known = ~np.isnan(labels)
    labels, score = labels[is_known], -again.log_p[is_known]
    assert summary["auroc"] == pytest.approx(roc_auc_score(labels, score))
    assert summary["average_precision"] == pytest.approx(average_precision_score(labels, score))
    assert summary["measured_true_positive_rate"] == 1
    ordinary = again.is_anomaly[is_known][labels == 0]
    assert summary["measured_false_positive_rate"] == pytest.approx(ordinary.mean())
    assert (Path(run_dir) / "plots/anomalies-new.png").is_file()
    assert "anomalies-new.png" in (Path(run_dir) / "report-new.md").read_text()


def test_false_discovery_rate_and_rows_of_the_test_set(
    run_dir: str, new: pl.DataFrame, tmp_path: Path, evaluated: Evaluate
) -> None:
    found = evaluated(
        run_dir, "data.path=new.csv", "anomalies=a.csv", "false_discovery_rate=0.2", name="eval-new.json"
    )["anomalies"]
    assert found["false_discovery_rate"] == 0.2
    assert "false_positive_rate" not in found
    assert "auroc" not in found
    table = read(tmp_path / "a.csv")
    # without ids, and with labels as a column that is ignored
    assert table.columns == COLUMNS
    assert table["anomaly"].sum() == found["flagged"] >= 12
    own = evaluated(run_dir, "anomalies=a.csv")["anomalies"]
    assert own["n"] == len(read(tmp_path / "a.csv")) == 40
    assert own["false_positive_rate"] == 0.01
    assert "anomalies" not in evaluated(run_dir)


def test_files_without_column_names_and_whole_numbers(trained: Train, tmp_path: Path, evaluated: Evaluate) -> None:
    x = np.random.default_rng(0).poisson(3, (300, 2))
    np.save(tmp_path / "x.npy", x)
    run_dir = trained("model=affine", "data=array", "data.path=x.npy", "data.dequantize=true")
    y = np.column_stack([x[:50], np.arange(50) == 9])
    y[9, 1] = 90
    np.save(tmp_path / "y.npy", y)
    found = evaluated(
        run_dir, "data.path=y.npy", "anomalies=a.csv", "data.anomaly_label=-1", "false_positive_rate=0.05",
        name="eval-y.json",
    )["anomalies"]  # fmt: skip
    assert (found["n_anomalies"], found["auroc"]) == (1, 1.0)
    assert read(tmp_path / "a.csv").row(9)[3:5] == (1, "c1")


def test_mistakes_are_refused_before_any_work(run_dir: str, new: pl.DataFrame, run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    file, rate = ["data.path=new.csv", "anomalies=a.csv"], "false_positive_rate"
    for arguments, *words in (
        ([*file, f"{rate}=0.005"], rate, "199", "100"),
        ([*file, "false_discovery_rate=0.001"], "false_discovery_rate", "999"),
        ([*file, f"{rate}=0.1", "false_discovery_rate=0.1"], "false_discovery_rate"),
        ([*file, f"{rate}=1.5"], rate),
        ([*file, "data.anomaly_label=bda"], "data.anomaly_label", "'bad'"),
        ([*file, "data.anomaly_label=name"], "data.anomaly_label", "'k0'"),
        ([*file, "data.anomaly_label=heat"], "data.anomaly_label", "'heat'"),
        (["data.path=new.csv", "anomalies=a.npy"], "anomalies", ".csv"),
        (["data.path=new.csv", "anomalies=new.csv"], "new.csv"),
        ([f"{rate}=0.1"], rate, "anomalies="),
        (["data.path=new.csv", "data.anomaly_label=bad"], "data.anomaly_label", "anomalies="),
        (["anomalies=a.csv", "data.anomaly_label=bad"], "data.anomaly_label", "data.path"),
        (["anomalies=a.csv", "split=val"], "anomalies", "split=val"),
    ):
        code, out, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert (code, out, "Traceback" in err) == (2, "", False), arguments
        assert all(word in err.splitlines()[-1] for word in words), err
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_training_data_are_refused(run_dir: str, new: pl.DataFrame, run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").unlink()
    code, out, err = run("floweval", f"ckpt={run_dir}", "data.path=new.csv", "anomalies=a.csv")
    assert (code, out, "t.csv" in err, "Traceback" in err) == (2, "", True, False)
