"""The commands with a column of weights: training, evaluation of the test set and of another file."""

from pathlib import Path

import numpy as np
import pytest
from helpers import Evaluate, Run, Train

KEYS = ["model=affine", "data=array", "data.weights=w", "trainer.steps=20", "trainer.plot_every=null"]


@pytest.mark.usefixtures("without_figures", "float32")
@pytest.mark.parametrize("model", ["affine", "mixture"])
def test_evaluation_of_weighted_files(
    model: str, trained: Train, evaluated: Evaluate, run: Run, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    # the weights turn N(0, 1) into N(0.8, 1) in the first column
    values = np.column_stack([x, np.exp(0.8 * x[:, 0])])
    for name, rows in (("t", values), ("new", values[:100])):
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",", header="a,b,w", comments="")
    run_dir = trained(*KEYS, f"model={model}", f"data.path={tmp_path}/t.csv")
    found = evaluated(run_dir)
    assert 1 < found["n_effective"] < found["n"] == 40
    name = "eval-new.json"
    new = evaluated(run_dir, f"data.path={tmp_path}/new.csv", name=name)
    w = values[:100, 2]
    assert new["n_effective"] == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-6)
    # without the column of weights, the rows have equal weights
    np.savetxt(tmp_path / "new.csv", values[:100, :2], delimiter=",", header="a,b", comments="")
    plain = evaluated(run_dir, f"data.path={tmp_path}/new.csv", name=name)
    assert "n_effective" not in plain
    assert plain["nll"] != pytest.approx(new["nll"], rel=1e-3)
    code, _, _ = run("flowsample", f"ckpt={run_dir}", "n=2000", f"out={tmp_path}/s.npy")
    assert code == 0
    assert np.load(tmp_path / "s.npy")[:, 0].mean() == pytest.approx(
        np.average(x[:, 0], weights=values[:, 2]), abs=0.25
    )


@pytest.mark.usefixtures("without_figures", "float32")
def test_test_rows_can_be_evaluated_with_other_weights(trained: Train, run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.normal(size=(400, 2)), rng.uniform(1, 3, (400, 2))])

    def write() -> None:
        np.savetxt(tmp_path / "t.csv", values, delimiter=",", header="a,b,w,v", comments="")

    write()
    run_dir = trained(*KEYS, f"data.path={tmp_path}/t.csv", "data.columns=[a,b]")
    for weights in ("null", "v"):
        code, _, err = run("floweval", f"ckpt={run_dir}", f"data.weights={weights}")
        assert code == 0, err
    # other rows are refused with both columns of weights
    values = values[::-1]
    write()
    for arguments in ([], ["data.weights=v"]):
        code, _, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert code == 2, err
