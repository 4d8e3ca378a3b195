"""Runs with every objective: bitwise resume, the hybrid's switch of loss, refused settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.cli.config_files import compose_defaults
from flowtrain.flow import Flow
from flowtrain.nn.mlp_field import MLPField
from flowtrain.objectives.flow_matching import Hybrid
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.ode import ode_solver
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError

SMALL = ["trainer.batch_size=16", "trainer.log_every=1", "data.n_val=20", "data.n_test=20", "model.hidden=[8]"]


def test_hybrid_switches_its_loss_once(flow_with_field: Callable[..., Flow]) -> None:
    flow = flow_with_field(MLPField(2, [4], "concat", "tanh"))
    objective = Hybrid(flow, Regularizer(kinetic=0.1, spectral=0.1), steps=10, matching=0.7)
    x = torch.randn(5, 2)
    names = []
    for step in range(10):
        objective.begin(step)
        names.append(tuple(objective(x)[1]))
    assert names == [("matching", "spectral")] * 7 + [("nll", "kinetic", "spectral")] * 3
    assert objective.likelihood_from == 7
    torch.manual_seed(0)
    expected = Likelihood(flow, Regularizer(kinetic=0.1, spectral=0.1)).train()(x)[0]
    torch.testing.assert_close(objective.train()(x)[0], expected)


@pytest.mark.parametrize("share", [0.0, 0.01, 2.5, 10, "half"])
def test_invalid_matching_fractions_are_refused(share: Any, flow_with_field: Callable[..., Flow]) -> None:
    with pytest.raises(ConfigError, match=r"objective.matching"):
        Hybrid(flow_with_field(MLPField(2, [4], "concat", "tanh")), Regularizer(), steps=10, matching=share)


def trained(stop_at: Callable[..., None], run_dir: Path, *overrides: str, stop: int | None = None) -> Trainer:
    torch.set_default_dtype(torch.float32)
    config = compose_defaults([*SMALL, *overrides])
    torch.manual_seed(0)
    data = build_data(config)
    flow = build_flow(config, data.samples)
    # an untrained teacher would be the identity, and the student would learn nothing
    teacher = build_flow(config, data.samples)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    last = run_dir / "checkpoints/last.pt"
    saved = checkpoint.load(last) if last.exists() else None
    objective = build_objective(config, flow, teacher)
    trainer = Trainer(objective, flow, data, build_settings(config), run_dir, config, saved)
    if stop:
        stop_at(trainer, stop)
    trainer.fit()
    return trainer


STEPS = ["trainer.steps=10", "trainer.val_every=5"]


@pytest.fixture(scope="module", params=["flow_matching", "hybrid", "rectified"])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, stop_at: Callable[..., None]
) -> tuple[list[str], Trainer]:
    """Returns the overrides of an uninterrupted run, and its trainer."""
    torch.set_num_threads(1)
    name = request.param
    keys = [f"objective={name}", *STEPS]
    keys += ["objective.matching=0.6"] * (name == "hybrid") + ["objective.pairs=100"] * (name == "rectified")
    return keys, trained(stop_at, tmp_path_factory.mktemp("whole"), *keys)


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resume_is_bitwise_exact(
    uninterrupted: tuple[list[str], Trainer], stop: int, tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    """Runs are stopped before, at and after the hybrid's switch of loss."""
    keys, run = uninterrupted
    assert any(bool(p.abs().max() > 0) for p in run.train_state.ema.shadow.values() if p.shape == (2, 8))  # type: ignore[union-attr]
    trained(stop_at, tmp_path, *keys, stop=stop)
    again = trained(stop_at, tmp_path, *keys)
    for key, value in run.flow.state_dict().items():
        assert torch.equal(value, again.flow.state_dict()[key]), key


def test_hybrid_likelihood_phase_starts_at_the_averaged_weights(tmp_path: Path, stop_at: Callable[..., None]) -> None:
    keys = ["objective=hybrid", "objective.matching=6", *STEPS, "trainer.ema=0.9"]
    trainer = trained(stop_at, tmp_path, *keys, stop=6)
    assert trainer.train_state.ema is not None
    average = {name: value.clone() for name, value in trainer.train_state.ema.shadow.items()}
    assert any(not torch.equal(p, average[name]) for name, p in trainer.flow.named_parameters())
    trainer.start_likelihood()
    assert all(torch.equal(p, average[name]) for name, p in trainer.flow.named_parameters())
    assert not trainer.train_state.optimizer.state


def train_rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.metrics.rows if row["split"] == "train"]


def test_flow_matching_metrics_have_null_for_solver_keys(tmp_path: Path, stop_at: Callable[..., None]) -> None:
    rows = train_rows(trained(stop_at, tmp_path, "objective=flow_matching", *STEPS))
    assert len(rows) == 10
    for row in rows:
        assert row["matching"] > 0
        assert all(row[key] is None for key in ("nll", "nfe_forward", "nfe_backward", "rtol", "atol"))
        assert {"seconds", "grad_norm", "lr"} <= set(row)


def test_hybrid_restarts_schedules_and_early_stopping(tmp_path: Path, stop_at: Callable[..., None]) -> None:
    keys = ["objective=hybrid", "objective.matching=0.6", "trainer.lr=0.01", "trainer.lr_warmup=2", *STEPS]
    trainer = trained(stop_at, tmp_path, *keys, "solver.warmup=2", "solver.train_rtol=null", "trainer.ema=0.9")
    rows = train_rows(trainer)
    assert [row["nll"] is None for row in rows] == [True] * 6 + [False] * 4
    # the cosine schedule ends before the switch, and restarts with a warm-up after the switch. So does the schedule of
    # the tolerance
    assert [row["lr"] for row in rows[:2]] == pytest.approx([row["lr"] for row in rows[6:8]], rel=0.2)
    assert rows[5]["lr"] < 0.3 * rows[1]["lr"]
    assert [row["rtol"] for row in rows[6:]] == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5])
    # averaging also restarts, so there are four updates since the switch
    assert trainer.train_state.ema is not None
    assert trainer.train_state.ema.updates == 4
    steps = {int(state["step"]) for state in trainer.train_state.optimizer.state.values()}
    assert steps == {4}


def test_plateau_tightens_the_tolerance_before_early_stopping(tmp_path: Path, stop_at: Callable[..., None]) -> None:
    """With a tiny learning rate no validation improves, so each validation halves the learning rate until early
    stopping."""
    plateau = ["trainer.lr_decay=plateau", "trainer.lr_plateau_patience=1", "trainer.patience=3", "trainer.lr_warmup=0"]
    keys = ["trainer.lr=1e-12", "trainer.steps=50", "trainer.val_every=1", "trainer.ema=null"]
    trainer = trained(stop_at, tmp_path, *plateau, *keys)
    rows = train_rows(trainer)
    # the first validation is the best, and each later validation tightens the tolerance
    assert [row["rtol"] for row in rows[:6]] == pytest.approx([1e-3, 1e-3, 10**-3.5, 1e-4, 10**-4.5, 1e-5])
    assert "early stopping" in str(trainer.stopped_by)
    assert trainer.step == 7


def test_resume_with_an_earlier_loss_switch_restarts_the_optimizer(
    tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    keys = ["objective=hybrid", *STEPS, "trainer.ema=0.9"]
    trained(stop_at, tmp_path, *keys, "objective.matching=8", stop=5)
    trainer = trained(stop_at, tmp_path, *keys, "objective.matching=3")
    assert {int(state["step"]) for state in trainer.train_state.optimizer.state.values()} == {5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["objective=rectified"], "from=RUN_DIR"),
        (["from=nowhere", "experiment=rings"], "experiment"),
        (["from=nowhere", "~model.activation"], "model.activation"),
        (["objective=rectified", "from=nowhere"], "there is no such file"),
        (["objective=rectified", "from=nowhere", "model.hidden=[3]"], "model.hidden"),
        (["from=nowhere", "data=circles"], "data"),
        (["objective=flow_matching", "model=realnvp"], "has 0"),
        (["objective=flow_matching", "objective.coupling=best"], "independent, optimal"),
        (["objective=flow_matching", "model.flows=2"], "has 2"),
        (["objective=hybrid", "objective.matching=1.5"], "objective.matching"),
        (["objective=flow_matching", "regularizer=rnode"], "solves no ODE"),
        (["solver=euler", "solver.steps=4", "solver.step_size=0.1"], "give one of them"),
        (["solver.steps=4"], "chooses its own"),
        (["model.init_scale=0"], "model.init_scale"),
    ],
)
def test_invalid_objective_arguments_give_one_line_messages(arguments: list[str], words: str, run: Run) -> None:
    code, _, err = run("flowtrain", *arguments, "trainer.steps=2")
    assert (code, len(err.strip().splitlines())) in ((2, 1), (1, 1)), err
    assert words in err


def test_number_of_steps_sets_the_step_size() -> None:
    assert ode_solver("euler", steps=4).step_size == 0.25
    assert ode_solver("rk4", steps=3).steps_between(0.0, 1.0) == 3
