"""`floweval sbc=true`: simulation-based calibration of a run."""

from pathlib import Path

import numpy as np
from helpers import Evaluate, Run, Train
from helpers.files import written


def test_ranks_and_coverage_are_written_with_the_names_of_the_columns(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    rows = np.random.default_rng(0).normal(size=(400, 2)) * [1, 20]
    written(tmp_path / "train.csv", "size,density", rows)
    run_dir = trained("data=array", "data.path=train.csv")
    found = evaluated(run_dir, "sbc=true", "sbc_samples=30")["sbc"]
    assert (found["n"], found["samples"], list(found["columns"])) == (40, 30, ["size", "density"])
    assert 0 <= found["tarp"]["p_value"] <= 1
    assert len(found["density"]["coverage"]) == len(found["density"]["levels"])
    assert (Path(run_dir) / "plots/sbc.png").is_file()
    # other rows: the names of the files say which
    written(tmp_path / "new.csv", "density,size", rows[:30, ::-1] + [0, 3])
    shifted = evaluated(run_dir, "data.path=new.csv", "sbc=true", "sbc_samples=30", "report=true", name="eval-new.json")
    assert shifted["sbc"]["columns"]["size"]["p_value"] < 0.01 < shifted["sbc"]["columns"]["density"]["p_value"]
    assert "sbc-new.png" in (Path(run_dir) / "report-new.md").read_text()
    assert "sbc" not in evaluated(run_dir)
    code, _, err = run("floweval", f"ckpt={run_dir}", "sbc_samples=30")
    assert (code, "sbc=true" in err) == (2, True)


def test_sbc_of_images_is_refused(run: Run, tmp_path: Path, trained: Train) -> None:
    np.save(tmp_path / "train.npy", np.random.default_rng(0).normal(size=(200, 4)))
    run_dir = trained("data=array", "data.path=train.npy", "data.event_shape=[1,2,2]")
    code, _, err = run("floweval", f"ckpt={run_dir}", "sbc=true")
    assert (code, "sbc" in err, "Traceback" in err) == (2, True, False)
