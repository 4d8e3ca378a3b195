"""Evaluations of tables beside the Gaussian of their training rows."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evaluate, Train

from flowtrain.bijections.linear import Affine, gaussian_log_prob, shrunk_covariance
from flowtrain.data.tables.array import ArrayData
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.baseline import gaussian_baseline, of_baseline
from flowtrain.evaluation.result import Baseline
from flowtrain.flow import Flow

pytestmark = pytest.mark.usefixtures("without_figures")


def table(path: Path, n: int = 400) -> Path:
    rng = np.random.default_rng(0)
    np.save(path, rng.normal(size=(n, 3)) @ rng.normal(size=(3, 3)) + 5)
    return path


def test_baseline_is_the_gaussian_of_the_training_rows_on_the_scored_rows(tmp_path: Path) -> None:
    data = ArrayData(str(table(tmp_path / "x.npy")))
    rows = data.train_rows(10**6)
    assert rows.shape == (320, 3)
    assert len(torch.unique(rows, dim=0)) == 320
    expected = gaussian_log_prob(data.test, *shrunk_covariance(rows))
    # a flow that is worse by 1 in every other row
    log_p = expected - (torch.arange(40) % 2).double()
    found = gaussian_baseline(data, data.test, log_p)
    assert found is not None
    assert found.nll == pytest.approx(-expected.mean().item())
    assert found.nll_stderr == pytest.approx(expected.std().item() / 40**0.5)
    assert (found.worse, found.worse_stderr) == (pytest.approx(0.5), pytest.approx((10 / 39 / 40) ** 0.5))
    # some rows do for a large table, and each comes once
    assert len(torch.unique(data.train_rows(50), dim=0)) == 50


def test_memory_mapped_and_integer_tables_have_a_baseline(tmp_path: Path) -> None:
    path = table(tmp_path / "x.npy")
    mapped = ArrayData(str(path), memory_map=True, val_path=str(path), test_path=str(path))
    found = gaussian_baseline(mapped, mapped.test, torch.zeros(400))
    values = torch.from_numpy(np.load(path))
    expected = gaussian_log_prob(values, *shrunk_covariance(values))
    assert found is not None
    assert found.nll == pytest.approx(-expected.mean().item(), abs=1e-4)
    # x + u, u uniform: the density of the noise alone has an NLL of 0, and a Gaussian's is 1/2 log(2 pi e / 12)
    np.save(tmp_path / "counts.npy", np.zeros((20_000, 1)) + 4)
    counts = ArrayData(str(tmp_path / "counts.npy"), dequantize=True)
    found = gaussian_baseline(counts, counts.test, torch.zeros(2000))
    assert found is not None
    assert found.nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 12), abs=0.02)


def test_images_and_rows_without_training_set_have_no_baseline(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 4)))
    images = ArrayData(str(tmp_path / "x.npy"), event_shape=[1, 2, 2])
    assert gaussian_baseline(images, images.test, torch.zeros(5)) is None
    assert of_baseline(1.0, 0.1, None, 4) is None


@pytest.mark.parametrize(
    ("worse", "stderr", "passed"),
    [
        (-5.0, 0.1, True),
        (0.05, 0.1, True),
        (0.3, 0.1, False),
        # too little to matter, however certain
        (0.005, 1e-6, True),
        # one row with a huge -log p makes the difference uncertain, not small
        (1e7, 1e7, False),
        (math.inf, math.nan, False),
    ],
)
def test_worse_is_by_the_paired_difference(worse: float, stderr: float, passed: bool) -> None:
    check = of_baseline(5.0 + worse, 1.0, Baseline(5.0, 0.3, 0.0, worse, stderr), 3)
    assert check is not None
    assert check.passed is passed
    assert of_baseline(1.0, math.nan, Baseline(5.0, math.nan, 0.0, worse, math.nan), 3).passed is None  # type: ignore[union-attr]


def test_a_flow_that_is_worse_is_reported_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ArrayData(str(table(tmp_path / "x.npy")))
    warned: list[str] = []
    monkeypatch.setattr(logging.getLogger("flowtrain"), "warning", lambda words, *of: warned.append(words % of))
    found = evaluate(Flow((3,), Affine(3)).float(), data, trained_on=data)
    assert found.baselines is not None
    simple = found.baselines["gaussian"].nll
    assert simple + 1 < found.nll
    named = [words for words in warned if "Gaussian" in words]
    assert len(named) == 1
    assert f"{found.nll:.0f}" in named[0]
    assert f"{simple:.1f}" in named[0]
    assert f"{simple:.1f}" in found.table()
    # without the data that the flow was trained on, there is nothing to compare with
    assert evaluate(Flow((3,), Affine(3)).float(), data).baselines is None


def test_result_of_a_run_has_a_baseline(trained: Train, evaluated: Evaluate, tmp_path: Path) -> None:
    path = table(tmp_path / "x.npy")
    run_dir = trained("data=array", f"data.path={path}")
    simple = json.loads(Path(run_dir, "result.json").read_text())["baselines"]["gaussian"]
    assert set(simple) == {"nll", "nll_stderr", "seconds"}
    assert evaluated(run_dir)["baselines"]["gaussian"]["nll"] == pytest.approx(simple["nll"])
    # on other rows of the run
    assert evaluated(run_dir, "split=val", name="eval-val.json")["baselines"]["gaussian"]["nll"] != simple["nll"]
    # not of other data
    assert evaluated(run_dir, f"data.path={path}", name="eval-x.json")["baselines"] is None


def test_toy_has_no_baseline(evaluated: Evaluate, trained: Train) -> None:
    assert evaluated(trained("data=moons", "data.n_test=60", "data.n_val=40"))["baselines"] is None
