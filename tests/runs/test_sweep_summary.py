"""The summary of a sweep: its table, the runs within the error of the best, and its figure."""

import csv
import json
import math
from pathlib import Path

import pytest
from helpers import Run

from flowtrain.runs import sweep_summary
from flowtrain.runs.sweep_directory import OVERRIDES, overrides_of

pytestmark = pytest.mark.usefixtures("without_figures")

SMALL = ["model=affine", "trainer.steps=4", "trainer.batch_size=16", "data.n_val=32", "data.n_test=32"]


def job(name: str, nll: float | None, **keys: str) -> sweep_summary.Job:
    return sweep_summary.Job(
        name, keys, {} if nll is None else {"val_nll": nll, "nll": nll, "nll_stderr": 0.01, "nfe": 20}, None
    )


def test_runs_as_good_as_the_best_are_marked() -> None:
    def measured(name: str, nll: float, error: float | None) -> sweep_summary.Job:
        return sweep_summary.Job(name, {"lr": name}, {"val_nll": nll, "val_nll_stderr": error}, None)

    # if both NLLs have a standard error of 0.01, two standard errors of their difference are 0.0283
    jobs = [measured("a", 2.0, 0.01), measured("b", 2.028, 0.01), measured("c", 2.029, 0.01), measured("d", 2.2, 0.2)]
    assert sweep_summary.tied_with_best(jobs) == {"a", "b", "d"}
    lines = sweep_summary.as_markdown(jobs, ["lr"]).splitlines()
    assert [line.count("*") for line in lines[2:6]] == [1, 1, 0, 1]
    assert "2.000 +- 0.010" in lines[2]
    assert "standard errors" in lines[-1]
    rows = list(csv.DictReader(sweep_summary.as_csv(jobs, ["lr"]).splitlines()))
    assert [row["as_good_as_best"] for row in rows] == ["true", "true", "false", "true"]
    # results of older versions have no standard errors
    old = [measured("a", 2.0, None), measured("b", 2.0001, None)]
    assert sweep_summary.tied_with_best(old) == {"a"}
    assert "*" not in sweep_summary.as_markdown(old, ["lr"])
    assert (
        sweep_summary.tied_with_best([sweep_summary.Job("0", {}, {}, "failed")])
        == sweep_summary.tied_with_best([])
        == set()
    )


def test_validation_error_belongs_to_the_best_step(run: Run, tmp_path: Path) -> None:
    assert run("flowtrain", *SMALL, "hydra.run.dir=r", "trainer.val_every=1", "trainer.lr=0.1")[0] == 0
    result = json.loads((tmp_path / "r/result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    (best,) = [row for row in rows if row["split"] == "val" and row["nll"] == result["val_nll"]]
    assert result["val_nll_stderr"] == best["nll_stderr"]
    assert run("floweval", "r", "split=val")[0] == 0
    scored = json.loads((tmp_path / "r/eval-val.json").read_text())
    assert scored["n"] == 32
    assert result["val_nll"] == pytest.approx(scored["nll"], rel=1e-5)
    assert result["val_nll_stderr"] == pytest.approx(scored["nll_stderr"], rel=1e-4)


def test_sweep_figure_is_drawn_against_numeric_keys() -> None:
    jobs = [job("0", 2.5, lr="1e-2", seed="0"), job("1", 2.4, lr="1e-3", seed="0"), job("2", 2.6, lr="1e-2", seed="1")]
    assert sweep_summary.varied_keys(jobs) == ["lr", "seed"]
    found = sweep_summary.group_by_key(jobs, "lr")
    assert (found.values, found.numbers) == (["1e-3", "1e-2"], [1e-3, 1e-2])
    assert found.found["val_nll"] == [[2.4], [2.5, 2.6]]
    assert "solver_error" not in found.found
    named = sweep_summary.group_by_key(
        [job("0", 2.5, model="realnvp"), job("1", 2.4, model="affine"), job("2", 2.4)], "model"
    )
    assert (named.values, named.numbers) == (["affine", "default", "realnvp"], None)


def test_summary_of_failed_jobs_only(tmp_path: Path) -> None:
    failed = sweep_summary.Job("0", {"seed": "1"}, {}, "one|two\nthe last line")
    lines = sweep_summary.as_markdown([failed], ["seed"]).splitlines()
    assert lines == ["| job | seed |  |", "| --- | --- | --- |", "| 0 | 1 | failed: the last line |"]
    assert sweep_summary.write_summary(tmp_path) == ("no job was started", 0)
    odd = [
        sweep_summary.Job("0", {"seed": "123456781", "x": "a|b\nc"}, {}, None),
        sweep_summary.Job("1", {"seed": "2"}, {}, None),
    ]
    assert sweep_summary.as_markdown(odd, ["seed", "x"]).splitlines()[2].startswith(r"| 0 | 123456781 | a\|b c |")
    assert math.isinf(failed.val_nll)


def test_old_override_keys_are_renamed(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / OVERRIDES).write_text("- model.positions=true\n- trainer.lr=0.1\n")
    assert overrides_of(tmp_path) == ["model.positional_bias=true", "trainer.lr=0.1"]
