"""`floweval` and `flowsample` on ensembles: sweep directories, lists of runs, and files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run, Train
from helpers.files import normal

import flowtrain
from flowtrain import models
from flowtrain.ode import ode_solver

REALNVP = ["model=realnvp", "model.layers=1", "model.hidden=[8]", "trainer.steps=40"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a table whose columns have names."""
    path = tmp_path_factory.mktemp("table") / "train.csv"
    rows = np.concatenate([normal(150, 2), normal(150, 2, seed=1) + 4])
    np.savetxt(path, rows, delimiter=",", header="height,weight", comments="")
    return path


@pytest.fixture
def sweep(trained: Train, table: Path, tmp_path: Path) -> Path:
    """Returns two runs on the table in the directory `my sweep`, trained once and copied."""
    done = table.parent / "my sweep"
    if not done.exists():
        data = ["data=array", f"data.path={table}"]
        trained(*data, f"hydra.run.dir='{done}/1e-3'")
        trained(*data, *REALNVP, f"hydra.run.dir='{done}/lr=0'")
    shutil.copytree(done, tmp_path / "my sweep")
    return tmp_path / "my sweep"


def evaluation(run: Run, *arguments: str, name: str) -> dict[str, Any]:
    code, _, err = run("floweval", *arguments)
    assert code == 0, err
    found: dict[str, Any] = json.loads(Path(name).read_text())
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    times = dict.fromkeys(("seconds", "total_seconds", "step", "baselines"))
    return {**one, **times} == {**other, **times}


def test_a_sweep_directory_is_evaluated(run: Run, sweep: Path) -> None:
    arguments = [f"ckpt={sweep}", "scores=s.npy", "report=true"]
    found = evaluation(run, *arguments, name="my sweep/eval.json")
    ensemble = flowtrain.load(sweep)
    assert [m["path"] for m in found["members"]] == [str(sweep / "1e-3"), str(sweep / "lr=0")]
    assert [m["weight"] for m in found["members"]] == pytest.approx(ensemble.weights)
    scores, members = np.load("s.npy"), np.load("s_members.npy")
    assert (scores.shape, members.shape) == ((30,), (30, 2))
    np.testing.assert_allclose(scores, np.log(np.exp(members) @ np.array(ensemble.weights)), rtol=1e-4)
    assert found["nll"] == pytest.approx(-scores.mean())
    assert [m["nll"] for m in found["members"]] == pytest.approx(list(-members.mean(0)))
    assert found["baselines"]["gaussian"]["nll"] > 0
    for name in ("report.md", "report.html", "plots/calibration.png"):
        assert (sweep / name).is_file()
    assert "lr=0" in (sweep / "report.md").read_text()
    # the same without ckpt=, and then on other rows
    assert same(evaluation(run, str(sweep), "dtype=float32", name="my sweep/eval.json"), found)
    rows = normal(40, 2)
    np.savetxt("new.csv", rows[:, ::-1], delimiter=",", header="weight,height", comments="")
    found = evaluation(
        run, "my sweep", "data.path=new.csv", "ood=new.csv", "scores=n.npy", name="my sweep/eval-new.json"
    )
    assert found["n"] == 40
    np.testing.assert_allclose(np.load("n.npy"), ensemble.log_prob(rows), rtol=1e-4)
    assert found["ood"]["auroc"] == pytest.approx(0.5)


def test_a_list_of_runs_is_evaluated_as_their_sweep(run: Run, sweep: Path) -> None:
    expected = evaluation(run, str(sweep), name="my sweep/eval.json")
    before = (sweep / "eval.json").read_bytes()
    lists = f"ckpt=[{sweep}/1e-3, {sweep}/lr=0]", f"ckpt=['{sweep}/1e-3','{sweep}/lr=0']"
    for ckpt in lists:
        found = evaluation(run, ckpt, name="my sweep/eval-1e-3+lr=0.json")
        assert same(found, expected)
    found = evaluation(run, lists[0], "weights=[3,1]", "out=w.json", name="w.json")
    assert [m["weight"] for m in found["members"]] == [0.75, 0.25]
    assert (sweep / "eval.json").read_bytes() == before


def test_the_file_of_an_ensemble_is_evaluated_as_its_sweep(run: Run, sweep: Path) -> None:
    expected = evaluation(run, str(sweep), name="my sweep/eval.json")
    flowtrain.load(sweep).save("e.pt")
    assert same(evaluation(run, "e.pt", "out=e.json", name="e.json"), expected)


def test_an_export_of_a_search_names_its_best_candidate(run: Run, sweep: Path) -> None:
    flowtrain.load(sweep).save("r/checkpoints/best.pt")
    results = {"maf": 3.0, "nsf_1": 1.5, "nsf": 2.0, "lost": 1.0, "new": None}
    for name in ("maf", "nsf_1", "nsf", "new"):
        shutil.copytree(sweep / "lr=0", f"r/search/{name}")
    candidates = [{"name": name, "nll": nll} for name, nll in results.items()]
    Path("r/search/search.json").write_text(json.dumps({"candidates": [*candidates, 3]}))
    code, out, err = run("flowexport", "r")
    assert (code, out) == (2, "")
    assert "flowexport ckpt=r/search/nsf_1" in err
    assert "flowsample ckpt=r/search/nsf_1 animate=true" in run("flowsample", "r", "animate=true")[2]


def test_an_ensemble_is_sampled(run: Run, sweep: Path) -> None:
    code, out, err = run("flowsample", str(sweep), "n=40", "seed=3")
    assert code == 0, err
    assert "40 samples" in out
    x = np.load(sweep / "samples.npy")
    assert x.shape == (40, 2)
    assert (sweep / "samples.png").is_file()
    code, _, err = run("flowsample", f"ckpt=[{sweep}/lr=0,{sweep}/1e-3]", "n=7", "weights=equal")
    assert code == 0, err
    assert np.load(sweep / "samples-lr=0+1e-3.npy").shape == (7, 2)


def test_solver_keys_apply_to_every_member(run: Run, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    flows = [models.ffjord(2, hidden=[6], solver=ode_solver("dopri5", rtol=10.0**-k)) for k in (2, 3)]
    for i, flow in enumerate(flows):
        for p in flow.parameters():
            torch.nn.init.normal_(p, std=0.7)
        flow.save(tmp_path / f"{i}.pt")
    x = normal(50, 2)
    np.save("x.npy", x)
    arguments = ["ckpt=[0.pt,1.pt]", "weights=[1,3]", "data.path=x.npy", "scores=s.npy", "dtype=float64", "out=e.json"]
    coarse = evaluation(run, *arguments, name="e.json")
    own = np.load("s.npy")
    found = evaluation(run, *arguments, "solver.rtol=1e-8", name="e.json")
    assert (coarse["solver"]["rtol"], found["solver"]["rtol"]) == (1e-2, 1e-8)
    assert coarse["nfe"] < found["nfe"]
    assert coarse["solver_error"] > 10 * found["solver_error"] > 0
    tight = [flow.double().eval().with_solver(ode_solver("dopri5", rtol=1e-8)).log_prob(x) for flow in flows]
    expected = np.log(np.exp(np.stack(tight, 1)) @ np.array([0.25, 0.75]))
    np.testing.assert_allclose(np.load("s.npy"), expected, rtol=1e-10)
    assert np.abs(own - expected).max() > 1e-5


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("flowsample", ["animate=true"], "single flow"),
        ("flowsample", ["quality=[1,2]"], "single flow"),
        ("flowexport", [], "single flow"),
        ("floweval", ["weights=[1,2,3]"], "weights"),
        ("floweval", ["weights=best"], "weights"),
        ("floweval", ["model.hidden=[3]"], "model.hidden"),
        ("floweval", ["scores=s.npy", "ood=s_members.npy"], "s_members.npy"),
    ],
)
def test_what_an_ensemble_cannot_do_is_refused(
    run: Run, sweep: Path, command: str, arguments: list[str], words: str
) -> None:
    np.save("s_members.npy", normal(5, 2))
    code, out, err = run(command, f"ckpt={sweep}", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_sweep_over_data_is_refused(run: Run, trained: Train, sweep: Path, table: Path) -> None:
    trained("data=array", f"data.path={table}", "data.seed=1", "hydra.run.dir='my sweep/other'")
    code, out, err = run("floweval", str(sweep))
    assert (code, out) == (2, "")
    assert "my sweep/other" in err
    assert len(err.strip().splitlines()) == 1


def test_weights_need_the_data_of_the_runs(run: Run, sweep: Path, table: Path) -> None:
    # the file is restored, because other tests read it
    away = table.rename(table.with_name("away.csv"))
    try:
        code, out, err = run("floweval", f"ckpt=[{sweep}/1e-3,{sweep}/lr=0]")
        assert (code, out) == (2, "")
        assert "weights=" in err
        code, _, err = run("flowsample", f"ckpt=[{sweep}/1e-3,{sweep}/lr=0]", "weights=equal", "out=x.npy")
        assert code == 0, err
    finally:
        away.rename(table)
