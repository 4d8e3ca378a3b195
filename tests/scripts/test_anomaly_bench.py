"""The benchmark of anomaly detection: the split, ECOD, the interval of false positive rates, and the report."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import anomalies

    return anomalies


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Writes a set of 60 ordinary rows and 5 anomalies with a constant column."""
    (tmp_path / "adbench").mkdir()
    x = np.random.default_rng(0).normal(size=(65, 3))
    x[:, 1], x[-5:, 0] = 7.0, 30.0
    np.savez(tmp_path / "adbench/glass.npz", X=x, y=np.arange(65) >= 60)
    return tmp_path


def test_half_of_the_ordinary_rows_is_for_fitting(bench: ModuleType, data: Path) -> None:
    x, test, y = bench.split("glass", 0, data)
    assert (x.shape, test.shape, y.sum()) == ((30, 2), (35, 2), 5)
    assert (test[y == 1, 0] == 30).all()
    assert len(np.unique(np.concatenate([x, test])[:, 1])) == 65
    assert not np.array_equal(x, bench.split("glass", 1, data)[0])


def test_ecod_is_the_largest_sum_of_logarithms_of_tails(bench: ModuleType) -> None:
    x = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 10.0]])
    # both columns have 4 values together with the row. Column 0 is symmetric, column 1 is skewed to the right
    left = -np.log([4 / 4, 4 / 4])
    right = -np.log([1 / 4, 1 / 4])
    assert bench.ecod(x, np.array([[9.0, 99.0]]), 0) == pytest.approx([max(left.sum(), right.sum())])
    low_and_high = bench.ecod(x, np.array([[-9.0, 99.0]]), 0)
    # skewness 0 counts as positive, so by skewness the right tail of column 0 is used
    assert low_and_high == pytest.approx([np.log(4)])


def test_the_interval_is_beta_binomial(bench: ModuleType) -> None:
    run = {"n_calibration": 99, "n_ordinary": 400}
    expected = stats.betabinom(400, 5, 95).ppf([0.025, 0.975]) / 400
    assert bench.band([run], 0.05) == pytest.approx(expected, abs=0.003)
    low, high = bench.band([run] * 5, 0.05)
    assert expected[0] < low < 0.05 < high < expected[1]


@pytest.mark.slow
def test_runs_are_continued_and_reported(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    row = {"set": "glass", "seed": 0, "auroc": 0.5, "average_precision": 0.5, "n_calibration": 20, "n_ordinary": 100}
    counts = {"false_positives": {"0.05": 90, "0.01": 0}}
    out.write_text(json.dumps({**row, "method": "nsf", **counts}) + "\n")
    command = [sys.executable, str(BENCH / "anomalies.py"), "--data", str(data), "--seeds", "0", "--sets", "glass"]
    command += ["--methods", "nsf", "ecod", "knn", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(out.read_text().splitlines()) == 3
    assert "0.900 !" in done.stdout
    assert "mean rank, 1 sets" in done.stdout
