"""Reflow: pairs from a teacher, straightened paths, and runs that start from another run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run
from torch import nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.flow import Flow
from flowtrain.nn.mlp_field import MLPField
from flowtrain.objectives.flow_matching import Rectified, draw_pairs
from flowtrain.ode import ode_solver
from flowtrain.runs.load import load
from flowtrain.training import checkpoint

pytestmark = pytest.mark.usefixtures("without_figures")


def test_reflow_pairs_are_endpoints_of_teacher_paths(
    flow_with_field: Callable[..., Flow], linear_field: type[nn.Module]
) -> None:
    a, b = torch.tensor([0.5, -1.0]), torch.tensor([[0.2, -0.7], [0.6, 0.1]])
    x0, x1, labels = draw_pairs(flow_with_field(linear_field(a, b)).eval(), 30, rtol=1e-9)
    # for x' = a + B x, [x; 1] is mapped by the exponential of [[B, a], [0, 0]]
    generator = torch.zeros(3, 3)
    generator[:2, :2], generator[:2, 2] = b, a
    move = torch.linalg.matrix_exp(generator)
    torch.testing.assert_close(x1, x0 @ move[:2, :2].T + move[:2, 2], rtol=1e-6, atol=1e-6)
    assert labels is None


def test_reflow_straightens_paths(flow_with_field: Callable[..., Flow], linear_field: type[nn.Module]) -> None:
    """After a quarter-turn rotation is reflowed, one Euler step reaches the end point of the teacher's exact solve."""
    torch.manual_seed(0)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) * math.pi / 2
    teacher = flow_with_field(linear_field(torch.zeros(2), turn)).eval()
    student = flow_with_field(MLPField(2, [32, 32], "concat", "swish"))
    objective = Rectified(student, Regularizer(), teacher, seed=0, pairs=2000, rtol=1e-6)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        objective(torch.empty(256, 2))[0].backward()
        optimizer.step()
    z = torch.randn(500, 2)
    (student_part,) = (m for m in student.modules() if isinstance(m, Continuous))
    (teacher_part,) = (m for m in teacher.modules() if isinstance(m, Continuous))
    student_part.solver = ode_solver("euler", steps=1)
    teacher_part.solver = ode_solver("dopri5")
    with torch.no_grad():
        exact = teacher(z)
        one = (student.eval()(z) - exact).square().mean().sqrt()
        teacher_part.solver = ode_solver("euler", steps=1)
        before = (teacher(z) - exact).square().mean().sqrt()
    assert float(one) < 0.2 * float(before)


def test_pairs_depend_only_on_the_seed(flow_with_field: Callable[..., Flow]) -> None:
    flow = flow_with_field(MLPField(2, [4], "concat", "tanh"))
    state = torch.get_rng_state()
    pools = [Rectified(flow, Regularizer(), flow, seed=seed, pairs=10).pool[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[0], pools[2])


def test_from_copies_weights_model_and_data_of_the_run(run: Run, tmp_path: Path) -> None:
    small = ["trainer.steps=3", "trainer.batch_size=16", "data.n_val=50", "data.n_test=50"]
    code, out, err = run("flowtrain", "objective=flow_matching", "data=circles", "model.hidden=[6]", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    # with a tiny learning rate the final weights equal the initial weights
    code, out, err = run("flowtrain", f"from={first}", "trainer.steps=1", "trainer.lr=1e-12", "trainer.ema=null")
    assert code == 0, err
    second = out.strip().splitlines()[-1]
    x = torch.randn(20, 2)
    torch.testing.assert_close(load(second).log_prob(x), load(first).log_prob(x))
    assert "on circles" in (Path(second) / "flowtrain.log").read_text()
    code, out, err = run("flowtrain", "objective=rectified", f"from={first}", "objective.pairs=100", "trainer.steps=4")
    assert code == 0, err
    third = Path(out.strip().splitlines()[-1])
    saved = checkpoint.load(third / "checkpoints/last.pt")
    assert saved["config"]["from"] == str(Path(first).absolute() / "checkpoints/best.pt")
    code, _, err = run("flowtrain", f"resume={third}", "trainer.steps=6")
    assert code == 0, err


def test_rectified_resumes_without_the_teacher_run(run: Run, tmp_path: Path) -> None:
    small = ["trainer.batch_size=16", "data.n_val=50", "data.n_test=50", "model.hidden=[6]", "trainer.val_every=5"]
    code, out, err = run("flowtrain", "objective=hybrid", "trainer.steps=10", "objective.matching=0.5", *small)
    assert code == 0, err
    first = Path(out.strip().splitlines()[-1])
    code, _, err = run("flowtrain", f"resume={first}", "trainer.steps=14")
    assert code == 0, err
    saved = checkpoint.load(first / "checkpoints/last.pt")
    # the step at which the loss switches is unchanged
    assert saved["config"]["objective"]["matching"] == 5
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert all(row["nll"] is not None for row in rows if row["step"] > 5)
    short = ["objective.pairs=100", "trainer.val_every=2"]
    code, out, err = run("flowtrain", "objective=rectified", f"from={first}", "trainer.steps=4", *short)
    assert code == 0, err
    second = Path(out.strip().splitlines()[-1])
    first.rename(tmp_path / "gone")
    code, _, err = run("flowtrain", f"resume={second}", "trainer.steps=6")
    assert code == 0, err
    code, _, err = run("flowtrain", f"resume={second}", "from=elsewhere")
    assert code == 2
    assert "its own checkpoint" in err


def test_saved_teacher_equals_the_teacher_used_in_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's run saves another checkpoint while the pairs are drawn."""
    small = ["trainer.steps=2", "trainer.batch_size=16", "data.n_val=50", "data.n_test=50", "model.hidden=[4]"]
    code, out, err = run("flowtrain", *small)
    assert code == 0, err
    best = Path(out.strip().splitlines()[-1]) / "checkpoints/best.pt"
    before = checkpoint.load(best)

    def save_another_checkpoint(*arguments: Any) -> Any:
        checkpoint.save(best, {**before, "step": 77})
        return draw_pairs(*arguments)

    monkeypatch.setattr("flowtrain.objectives.flow_matching.draw_pairs", save_another_checkpoint)
    code, out, err = run("flowtrain", "objective=rectified", f"from={best}", "objective.pairs=50", "trainer.steps=2")
    assert code == 0, err
    assert checkpoint.load(best)["step"] == 77
    kept = checkpoint.load(Path(out.strip().splitlines()[-1]) / "checkpoints/teacher.pt")
    assert kept["step"] == before["step"]


def test_refused_reflow_leaves_the_run_directory_free(run: Run) -> None:
    small = ["trainer.steps=2", "trainer.batch_size=16", "data.n_val=50", "data.n_test=50"]
    code, out, err = run("flowtrain", "model.flows=2", "model.hidden=[4]", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    reflow = ["objective=rectified", "hydra.run.dir=here"]
    code, _, err = run("flowtrain", f"from={first}", *reflow, "trainer.steps=2")
    assert code == 2
    assert "has 2" in err
    # the value after a flag is no override, and the settings of the first run come before the overrides
    code, out, err = run("flowtrain", f"from={first}", "objective=likelihood", "hydra.run.dir=here", "--cfg", "job")
    assert code == 0, err
    code, _, err = run("flowtrain", f"from={first}", "hydra.run.dir=here", "trainer.steps=2")
    assert code == 0, err
    for bad in ("from=", "from=a,b"):
        code, _, err = run("flowtrain", bad)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert "give one run directory" in err


def test_from_uses_the_recipe_of_the_model(run: Run) -> None:
    small = ["trainer.batch_size=16", "data.n_val=50", "data.n_test=50"]
    code, out, err = run("flowtrain", "model=realnvp", "data=circles", "trainer.steps=2", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    code, out, err = run("flowtrain", f"from={first}", "trainer.steps=2")
    assert code == 0, err
    second = Path(out.strip().splitlines()[-1])
    saved = checkpoint.load(second / "checkpoints/last.pt")["config"]
    assert (saved["trainer"]["lr"], saved["model"]["name"]) == (0.005, "realnvp")
    assert "realnvp" in (second / ".hydra/config.yaml").read_text()


@pytest.mark.parametrize("resumed", [False, True])
def test_from_runs_no_code_of_the_checkpoint(resumed: bool, run: Run, tmp_path: Path) -> None:
    """Neither the run's own config nor the config of the resumed run can grant trust."""
    small = ["trainer.batch_size=16", "data.n_val=50", "data.n_test=50", "model.hidden=[6]", "trainer.steps=2"]
    code, out, err = run("flowtrain", *small)
    assert code == 0, err
    first = Path(out.strip().splitlines()[-1])
    best = checkpoint.load(first / "checkpoints/best.pt")
    evil = {"_target_": "shutil.copyfile", "src": "/etc/hostname", "dst": str(tmp_path / "stolen")}
    if resumed:
        code, out, err = run(
            "flowtrain", "objective=rectified", f"from={first}", "objective.pairs=9", "trainer.steps=2"
        )
        assert code == 0, err
        first = Path(out.strip().splitlines()[-1])
        last = checkpoint.load(first / "checkpoints/last.pt")
        checkpoint.save(first / "checkpoints/last.pt", {**last, "config": {**last["config"], "trust": ["shutil"]}})
        checkpoint.save(first / "checkpoints/teacher.pt", {**best, "config": {**best["config"], "solver": evil}})
        code, _, err = run("flowtrain", f"resume={first}", "trainer.steps=3")
    else:
        checkpoint.save(first / "checkpoints/best.pt", {**best, "config": {**best["config"], "solver": evil}})
        code, _, err = run("flowtrain", f"from={first}", "trainer.steps=3")
    assert code != 0
    assert "is trusted there" in err
    assert not (tmp_path / "stolen").exists()


def test_from_on_incompatible_data_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(f"{i},{i * i % 7}" for i in range(50)))
    (tmp_path / "b.csv").write_text("\n".join(f"{i},{i * i % 7},{i % 3}" for i in range(50)))
    small = ["trainer.steps=2", "model.hidden=[4]", "trainer.batch_size=8"]
    code, out, err = run("flowtrain", "data=array", f"data.path={tmp_path}/a.csv", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    (tmp_path / "a.csv").rename(tmp_path / "moved.csv")
    code, _, err = run("flowtrain", f"from={first}", f"data.path={tmp_path}/moved.csv", "trainer.steps=2")
    assert code == 0, err
    code, _, err = run("flowtrain", f"from={first}", f"data.path={tmp_path}/b.csv", "trainer.steps=2")
    assert code == 2
    assert "from: " in err
    assert "event_shape" in err


def test_best_checkpoint_of_a_reflow_excludes_the_teacher_weights(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32))
    small = ["model.hidden=[4]", "trainer.steps=2", "trainer.plot_every=null"]
    keys = ["objective=flow_matching", "data=array", "data.path=t.npy", *small]
    assert run("flowtrain", *keys, "hydra.run.dir=teacher")[0] == 0
    # the learning rate is so large that the initial likelihood is better than the final likelihood
    reflow = ["objective=rectified", "from=teacher", "objective.pairs=50", "trainer.lr=0.5", "trainer.lr_warmup=0"]
    assert run("flowtrain", *reflow, *small[1:], "hydra.run.dir=student")[0] == 0
    assert json.loads((tmp_path / "student/result.json").read_text())["step"] == 2
