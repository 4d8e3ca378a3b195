"""`flowtrain` and `floweval` on a target: log Z in result.json and eval.json, other targets, and samples of data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Evaluate, Run, Train
from helpers.densities import BANANA, BANANA_LOG_Z

TARGET = ["data=target", "objective=reverse_kl", *BANANA, "trust=[helpers]", "data.n_val=20", "data.n_test=300"]


def content(run_dir: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run_dir) / name).read_text())
    return found


def test_run_reports_log_z_and_floweval_gives_the_same(run: Run, trained: Train, evaluated: Evaluate) -> None:
    run_dir = trained(*TARGET, f"target.log_z={BANANA_LOG_Z}")
    result = content(run_dir, "result.json")
    assert abs(result["log_z"] - BANANA_LOG_Z) < 3 * result["log_z_stderr"] + 1e-3
    assert {"train_seconds", "steps", "val_nll", "val_nll_stderr", "headline", "ess"} <= {*result}
    assert (result["n"], result["step"]) == (300, result["steps"])
    log = (Path(run_dir) / "flowtrain.log").read_text()
    assert result["headline"].removeprefix("log Z ") in log
    assert "floweval" in log
    again = evaluated(run_dir, "trust=[helpers]", "report=true", "plots=true")
    for key in ("log_z", "log_z_stderr", "nll", "ess", "pareto_k", "kl_reverse"):
        assert again[key] == result[key], key
    assert result["headline"] in (Path(run_dir) / "report.md").read_text()
    # the base points depend on data.seed; other evaluations have other files
    more = evaluated(run_dir, "trust=[helpers]", "data.n_test=400", "data.seed=1", name="eval-n_test-400-seed-1.json")
    assert (more["n"], more["log_z"] == again["log_z"]) == (400, False)
    exact = evaluated(run_dir, "trust=[helpers]", "dtype=float64", "batch_size=7", "out=exact.json")
    assert exact["log_z"] == again["log_z"]  # eval.json is unchanged
    assert json.loads(Path("exact.json").read_text())["budget"]["precision"] is None
    code, out, _ = run("flowtrain", "runs", str(Path(run_dir).parent))
    assert (code, "finished" in out) == (0, True)


def test_other_target_is_evaluated(trained: Train, evaluated: Evaluate) -> None:
    run_dir = trained(*TARGET, f"target.log_z={BANANA_LOG_Z}")
    wide = evaluated(run_dir, "trust=[helpers]", "+target.width=2", name="eval-width-2.json")
    assert wide["checks"]["log_z"]["passed"] is False
    named = evaluated(run_dir, "trust=[helpers]", "target.log_z=null", name="eval-log_z-None.json")
    assert named["kl_reverse"] is None


def test_options_that_need_data_are_refused(run: Run, trained: Train) -> None:
    run_dir = trained(*TARGET)
    code, _, err = run("floweval", run_dir, "trust=[helpers]", "scores=s.csv", "split=val", "sbc=true")
    assert (code, "Traceback" in err) == (2, False)
    assert all(name in err for name in ("scores=s.csv", "split=val", "sbc="))


def test_flow_of_a_target_scores_samples(run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate) -> None:
    run_dir = trained(*TARGET)
    toy = evaluated(run_dir, "trust=[helpers]", "data=moons", "data.n_test=50", name="eval-moons.json")
    assert "log_z" not in toy
    assert toy["n"] == 50
    rows = np.random.default_rng(0).normal(size=(30, 2))
    np.savetxt(tmp_path / "new.csv", rows, delimiter=",", header="x1,x2", comments="")
    found = evaluated(run_dir, "trust=[helpers]", "data.path=new.csv", "scores=s.npy", name="eval-new.json")
    assert found["nll"] == pytest.approx(-np.load("s.npy").mean())
    # a run on a target has no training rows
    code, _, err = run("floweval", run_dir, "trust=[helpers]", "data.path=new.csv", "anomalies=a.csv")
    assert (code, "target" in err, "Traceback" in err) == (2, True, False)


def test_sweep_reports_log_z_and_forms_an_ensemble(run: Run, evaluated: Evaluate) -> None:
    few = ["model=affine", "trainer.steps=3", "trainer.batch_size=32", "trainer.plot_every=null"]
    code, _, err = run("flowtrain", "-m", *few, *TARGET, "seed=0,1", "name=pair")
    assert code == 0, err
    root = Path("outputs/multirun/pair")
    assert "log_z" in (root / "sweep.csv").read_text().splitlines()[0].split(",")
    found = evaluated(str(root), "trust=[helpers]")
    assert len(found["members"]) == 2
    assert sum(member["weight"] for member in found["members"]) == pytest.approx(1)
    assert found["n"] == 300
