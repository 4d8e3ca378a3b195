"""The benchmark of density estimators on tables: preparation of the rows, the report, and continued measurements."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import tables

    return tables


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Writes two tables: points in the plane, and a column with two decimals and repeated rows."""
    rng = np.random.default_rng(0)
    (tmp_path / "earth").mkdir()
    (tmp_path / "adbench").mkdir()
    points = np.cumsum(rng.normal(size=(400, 2)), 0)
    text = "\n".join(f"{a!r},{b!r}" for a, b in points.tolist())
    (tmp_path / "earth" / "flood.csv").write_text(f"# places\nlat,long\n{text}\n")
    rounded = np.c_[rng.normal(size=300).round(2), rng.normal(size=300), np.ones(300)]
    np.savez(tmp_path / "adbench" / "Wilt.npz", X=np.r_[rounded, rounded[:50]])
    return tmp_path


def test_column_resolution_is_estimated(tables: ModuleType) -> None:
    rng = np.random.default_rng(0)
    hundredths = rng.normal(size=2000).round(2)
    assert tables.resolution(rng.normal(size=2000)) == 0
    assert tables.resolution(hundredths) == pytest.approx(0.01)
    # a few values with more decimals do not change the step
    assert tables.resolution(np.r_[hundredths, rng.normal(size=20).round(5)]) == pytest.approx(0.01)
    # a frequent value does not hide the step between the others
    assert tables.resolution(np.r_[np.zeros(5000), hundredths]) == pytest.approx(0.01)
    # repeated values that lie on no grid
    r = tables.resolution(np.repeat(rng.uniform(size=500), 3))
    assert 1e-4 < r < 1e-2


def test_split_contains_each_row_once_and_depends_on_the_seed(tables: ModuleType, data: Path) -> None:
    split = tables.prepared("adbench/Wilt", 0, data)
    assert [len(part) for part in split] == [240, 30, 30, 30]
    assert split.train.shape[1] == 2
    assert len(np.unique(np.concatenate(split[:3])[:, 1])) == 300
    again, other = tables.prepared("adbench/Wilt", 0, data), tables.prepared("adbench/Wilt", 1, data)
    assert np.array_equal(split.test, again.test)
    assert not np.array_equal(split.places, other.places)


@pytest.mark.slow
def test_baseline_nlls_approach_the_true_entropy(tables: ModuleType) -> None:
    """The NLL of the baselines on many rows of a known density is close to the entropy of the density, in data
    units."""
    rng = np.random.default_rng(0)
    factor = np.array([[20.0, 0.0], [3.0, 0.1]])
    parts = [rng.normal(size=(n, 2)) @ factor.T for n in (2000, 2000, 500)]
    split = tables.Split(*parts, np.arange(500))
    entropy = 1 + math.log(2 * math.pi) + math.log(2.0)
    for fit, error in ((tables.gaussian, 0.1), (tables.gmm, 0.1), (tables.kde, 0.3)):
        found = fit(split, 5.0, 0)
        # the exact NLL of this sample, which differs from the entropy
        z = np.linalg.solve(factor, split.test.T)
        exact = (0.5 * (z**2).sum(0)).mean() + entropy - 1
        assert -found.log_p.mean() == pytest.approx(exact, abs=error)
        assert found.val_nll == pytest.approx(entropy, abs=2 * error)


def test_standard_error_is_clustered_by_row(tables: ModuleType) -> None:
    rng = np.random.default_rng(0)
    value, places = rng.normal(size=400), np.arange(400)
    plain = value.std() / 20
    assert tables.clustered([value], [places]) == pytest.approx((value.mean(), plain))
    # repeating the same rows three times adds no information
    assert tables.clustered([value] * 3, [places] * 3) == pytest.approx((value.mean(), plain))
    assert tables.clustered([value] * 3, [places, places + 400, places + 800]).error == pytest.approx(plain / 3**0.5)
    assert tables.Difference(-1.0, 0.4).verdict == "win"
    assert tables.Difference(-1.0, 0.6).verdict == "tie"
    assert tables.Difference(1.0, 0.4).verdict == "loss"


def measured(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCH / "tables.py"), *arguments]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in Path(arguments[-1]).read_text().splitlines()]


@pytest.mark.slow
def test_benchmark_resumes_and_records_failures(tables: ModuleType, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    keys = ["--data", str(data), "--tables", "adbench/Wilt", "--seconds", "1", "--seeds", "0"]
    first = measured(*keys, "--methods", "gaussian", "--out", str(out))
    with out.open("a") as file:
        file.write('{"table": "earth/fl')
    (data / "adbench" / "landsat.npz").write_text("no table")
    rows = tables.lines(out)
    assert rows == first
    out.write_text(json.dumps(first[0]) + "\n")
    more = ["--methods", "gaussian", "kde", "--seeds", "0", "--tables", "adbench/Wilt", "adbench/landsat"]
    rows = measured(*keys, *more, "--out", str(out))
    assert rows[0] == first[0]
    assert [(r["table"], r["method"], "error" in r) for r in rows] == [
        ("adbench/Wilt", "gaussian", False),
        ("adbench/Wilt", "kde", False),
        ("adbench/landsat", "gaussian", True),
        ("adbench/landsat", "kde", True),
    ]
    assert "adbench/Wilt" in tables.report(out)


@pytest.mark.slow
def test_benchmark_runs_a_flow_and_a_baseline(tables: ModuleType, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    keys = ["--data", str(data), "--tables", "earth/flood", "moons", "--seconds", "3", "--seeds", "0"]
    rows = measured(*keys, "--methods", "gmm", "nsf", "--out", str(out))
    assert not [row for row in rows if "error" in row]
    assert rows[1]["nll"] < 20
    assert rows[1]["failed"] == []
    assert rows[2]["kl"] < 1
