"""Rows that dominate the NLL are named, and correct densities have none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evaluate, Run, Train
from torch import Tensor

from flowtrain.evaluation.outliers import concentration, outlying


def gaussian(n: int, d: int = 4) -> Tensor:
    """Returns log p of draws from N(0, I), up to a constant."""
    return -torch.randn(n, d).square().sum(1) / 2


def student(n: int, nu: float = 1.0) -> Tensor:
    """Returns log p of draws from Student's t distribution, up to a constant."""
    x = torch.distributions.StudentT(torch.tensor(nu)).sample((n,))
    return -(nu + 1) / 2 * torch.log1p(x.square() / nu)


@pytest.mark.parametrize("n", [10, 15, 150, 999, 5000])
@pytest.mark.parametrize("value", [-1e7, -1e300, 1e5])
def test_dominating_row_is_named(n: int, value: float) -> None:
    log_p = gaussian(n)
    row = n // 3
    log_p[row] = value
    others = torch.cat([log_p[:row], log_p[row + 1 :]])
    found = concentration(log_p, "test set")
    assert (found.passed, found.rows, found.count) == (False, (row,), 1)
    assert found.value is not None
    assert 0.85 < found.value <= 1
    assert found.nll_without == pytest.approx(-others.mean().item())
    assert found.nll_without_stderr == pytest.approx(others.std().item() / (n - 1) ** 0.5)
    assert f"row {row} " in str(found.message)


def test_few_dominating_rows_are_named_and_many_pass() -> None:
    log_p = gaussian(5000)
    log_p[[7, 4999, 100]] = torch.tensor([-2e6, -1e6, -1.5e6])
    found = concentration(log_p, "test set")
    # the smallest set of rows with more than half of the variance
    assert (found.passed, found.rows) == (False, (7,))
    log_p[7] = -1.2e6
    assert concentration(log_p, "test set").rows == (7, 100)
    # more than 0.1% of the rows share the variance
    log_p[::100] = -1e6 - torch.arange(50.0)
    assert concentration(log_p, "test set").passed


def test_two_equal_outliers_of_a_small_set_are_both_named() -> None:
    log_p = gaussian(200)
    log_p[[3, 150]] = -1e7
    assert concentration(log_p, "test set").rows == (3, 150)


@pytest.mark.parametrize(("n", "trips"), [(20, 3), (50, 2), (300, 1), (10_000, 0)])
def test_false_positive_rate_is_low_for_regular_densities(n: int, trips: int) -> None:
    sets = 300 if n < 10_000 else 20
    for draw in (gaussian, student, lambda n: gaussian(n, 1), lambda n: torch.rand(n).log(), lambda n: torch.zeros(n)):
        assert sum(not concentration(draw(n), "test set").passed for _ in range(sets)) <= trips


def test_scores_equal_up_to_rounding_pass() -> None:
    log_p = torch.full((400,), -1.5)
    log_p[5] += 1e-6
    assert concentration(log_p, "test set").passed
    assert outlying(log_p)[0] == 0


def test_non_finite_rows_are_named_first() -> None:
    log_p = gaussian(300)
    log_p[[4, 9]] = torch.tensor([-torch.inf, torch.nan])
    log_p[20] = -1e8
    found = concentration(log_p, "test set")
    assert (found.passed, found.value, found.rows, found.count) == (False, 1.0, (4, 9, 20), 3)
    assert found.nll_without == pytest.approx(-log_p[(log_p > -1e7)].mean().item())
    # non-finite rows are named, however many they are
    log_p[:100] = -torch.inf
    assert concentration(log_p, "test set").count == 100
    assert concentration(torch.tensor([-1.0, -torch.inf]), "test set").rows == (1,)
    assert concentration(torch.tensor([-1.0, -2.0]), "test set").passed is None


def test_outliers_beside_non_finite_rows_are_named() -> None:
    log_p = gaussian(100).double()
    log_p[7], log_p[31] = -torch.inf, -1e6
    check = concentration(log_p, "test set")
    assert check.count == 2
    assert all(f"row {row}" in check.message for row in (7, 31))


def test_outlier_is_named_in_table_json_and_report(run: Run, tmp_path: Path, trained: Train) -> None:
    """Checks that use a subset of the rows exclude the dominating row."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.normal(size=(300, 2)))
    run_dir = trained("data=array", "data.path=train.npy")
    rows = rng.normal(size=(40, 2)).astype(np.float32)
    rows[17] = 1e8
    np.save(tmp_path / "new.npy", rows)
    code, out, err = run("floweval", f"ckpt={run_dir}", "data.path=new.npy", "report=true")
    assert code == 0
    found = json.loads(Path(run_dir, "eval-new.json").read_text())
    check = found["checks"]["concentration"]
    assert (check["passed"], check["rows"], check["limit"]) == (False, [17], 0.5)
    assert check["nll_without"] < 10 < 1e12 < found["nll"]
    report = Path(run_dir, "report-new.md").read_text()
    for text in (out, err, report):
        assert "row 17 " in text
    # rounding is not the cause of the large NLL
    assert found["checks"]["precision"]["passed"]
    assert found["budget"]["precision"] < 1e-3
    assert "precision:" not in err


def test_rows_of_zero_density_do_not_change_other_scores(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.normal(size=(300, 2)))
    run_dir = trained("data=array", "data.path=train.npy")
    rows = rng.normal(size=(40, 2)).astype(np.float32)
    np.save(tmp_path / "good.npy", rows)
    # their squares exceed float32
    rows[[3, 30]] = 3e38
    np.save(tmp_path / "far.npy", rows)
    evaluated(run_dir, "data.path=good.npy", "scores=good_scores.npy", name="eval-good.json")
    more = ["data.path=far.npy", "scores=s.npy", "ood=far.npy", "report=true"]
    code, out, err = run("floweval", f"ckpt={run_dir}", *more)
    assert code == 0, err
    found = json.loads(Path(run_dir, "eval-far.json").read_text())
    scores, good = np.load(tmp_path / "s.npy"), np.load(tmp_path / "good_scores.npy")
    assert np.flatnonzero(~np.isfinite(scores)).tolist() == [3, 30]
    np.testing.assert_allclose(np.delete(scores, [3, 30]), np.delete(good, [3, 30]), rtol=1e-6)
    assert (found["nll"], found["n"]) == (None, 40)
    # with an infinite NLL, a share of the variance is undefined
    (line,) = [line for line in out.splitlines() if "FAILED: concentration" in line]
    assert "rows 3 and 30" in line
    assert "variance" not in line
    check = found["checks"]["concentration"]
    assert (check["rows"], check["nll_without"]) == ([3, 30], pytest.approx(-np.delete(scores, [3, 30]).mean()))
    assert (found["ood"]["infinite"], found["ood"]["auroc"]) == (2, 0.5)
    np.save(tmp_path / "none.npy", rows[[3, 30]])
    code, _, err = run("floweval", f"ckpt={run_dir}", "data.path=none.npy", "scores=none_scores.npy")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert not (tmp_path / "none_scores.npy").exists()
