"""`floweval` and `flowsample` on files of `Flow.save`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, TINY, Run
from helpers.files import normal

import flowtrain
from flowtrain import Flow, bijections, models
from flowtrain.bijections import Chain, Permutation
from flowtrain.ode import ode_solver

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Returns a flow with a tensor in its description, and a continuous part."""
    torch.set_default_dtype(torch.float32)
    flow = models.ffjord(2, hidden=[6], solver=ode_solver("dopri5", rtol=1e-3))
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.5)
    Flow(2, Chain([flow.bijection, Permutation(torch.tensor([1, 0]))])).save(tmp_path / "flow.pt")
    np.savetxt(tmp_path / "new.csv", normal(40, 2), delimiter=",")
    return tmp_path / "flow.pt"


def evaluation(run: Run, *arguments: Any) -> dict[str, Any]:
    code, _, err = run("floweval", *arguments, "out=e.json", "device=cpu")
    assert code == 0, err
    found: dict[str, Any] = json.loads(Path("e.json").read_text())
    return found


def test_a_saved_flow_is_evaluated_on_a_file(run: Run, saved: Path) -> None:
    x = torch.from_numpy(np.loadtxt("new.csv", delimiter=","))
    found = evaluation(run, "flow.pt", "data.path=new.csv", "scores=s.npy", "dtype=float64")
    flow = flowtrain.load(saved).double()
    with torch.no_grad():
        expected = flow.log_prob(x)
        np.testing.assert_allclose(np.load("s.npy"), expected, rtol=1e-12)
        assert (found["nll"], found["n"]) == (pytest.approx(-float(expected.mean())), 40)
        tight = flow.with_solver(ode_solver("dopri5", rtol=1e-9)).log_prob(x)
    assert (tight - expected).abs().max() > 1e-6
    evaluation(run, "flow.pt", "data.path=new.csv", "scores=s.npy", "dtype=float64", "solver.rtol=1e-9")
    np.testing.assert_allclose(np.load("s.npy"), tight, rtol=1e-12)
    found = evaluation(run, "flow.pt", "data.path=new.csv", "solver=rk4", "solver.steps=7")
    assert found["solver"]["method"] == "rk4"


def test_a_saved_flow_is_sampled(run: Run, saved: Path) -> None:
    code, out, err = run("flowsample", "ckpt=flow.pt", "n=30", "seed=3", "out=x.npy", "device=cpu")
    assert code == 0, err
    assert "30 samples" in out
    torch.manual_seed(3)
    np.testing.assert_array_equal(np.load("x.npy"), flowtrain.load(saved).sample(30))
    code, _, err = run("flowsample", "flow.pt", "n=30", "seed=3", "out=y.npy", "solver.rtol=1e-7", "device=cpu")
    assert code == 0, err
    assert 0 < np.abs(np.load("x.npy") - np.load("y.npy")).max() < 0.1


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("floweval", [], "data.path"),
        ("floweval", ["data.path=new.csv", "model.hidden=[3]"], "model.hidden"),
        ("floweval", ["data.path=new.csv", "model.eval_trace=exact"], "model.eval_trace"),
        ("floweval", ["data.path=new.csv", "solver.nothing=3"], "solver.nothing"),
        ("flowsample", ["quality=[1,2]"], "data.path"),
        ("flowtrain", [], "from Python"),
    ],
)
def test_what_a_saved_flow_does_not_know_is_said(
    run: Run, saved: Path, command: str, arguments: list[str], words: str
) -> None:
    key = "from" if command == "flowtrain" else "ckpt"
    code, out, err = run(command, f"{key}=flow.pt", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_flow_without_an_ode_takes_solver_keys_as_a_run_does(run: Run, tmp_path: Path) -> None:
    Flow(2, bijections.Affine(2)).save("affine.pt")
    np.savetxt("new.csv", normal(40, 2), delimiter=",")
    assert evaluation(run, "affine.pt", "data.path=new.csv", "solver.rtol=1e-7")["solver"] is None


def test_flow_of_a_run_is_treated_as_its_checkpoint(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", "data=moons", *SMALL, *TINY)
    assert code == 0, err
    run_dir = Path(out.splitlines()[-1])
    flowtrain.load(run_dir).save("copy.pt")
    for arguments in ([], ["split=val"], ["solver.rtol=1e-4"]):
        one, other = (evaluation(run, f"ckpt={path}", *arguments) for path in (run_dir, "copy.pt"))
        assert {**one, **dict.fromkeys(("seconds", "total_seconds"))} == {
            **other,
            **dict.fromkeys(("seconds", "total_seconds")),
        }
    samples = []
    for path in (run_dir, "copy.pt"):
        code, _, err = run("flowsample", f"ckpt={path}", "n=20", "out=x.npy", "device=cpu")
        assert code == 0, err
        samples.append(np.load("x.npy"))
    np.testing.assert_array_equal(*samples)
