"""Training with the solver guard: a passing check changes nothing, and tightenings persist."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Compose, MakeTrainer

from flowtrain.cli.config_files import compose_defaults
from flowtrain.cli.saved_config import overridden
from flowtrain.runs import run as runs
from flowtrain.training import checkpoint, solver_guard
from flowtrain.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("float32")


def rows(run: Trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.metrics.rows]


SHORT = ["trainer.steps=10", "trainer.val_every=4", "trainer.log_every=1", "model.trace=hutchinson"]


def test_passing_guard_does_not_change_training(
    tmp_path: Path, guarded_trainer: MakeTrainer, guarded_config: Compose
) -> None:
    ends = []
    for every in ("null", "2"):
        run = guarded_trainer(
            tmp_path / every, guarded_config(*SHORT, "solver.rtol=1e-3", f"trainer.guard_every={every}")
        )
        run.fit()
        ends.append((rows(run), run.flow.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][key]) for key, value in ends[0][1].items())


def force_tightening(monkeypatch: pytest.MonkeyPatch, run: Trainer, until: int) -> None:
    """Makes the first check at each step before `until` report an exploited solver."""
    judged: set[int] = set()

    def judge(*log_ps: Any) -> bool:
        again = run.step in judged
        judged.add(run.step)
        return run.step < until and not again

    monkeypatch.setattr(solver_guard, "exploited", judge)


ADAPTIVE = ["solver.rtol=1e-4", "solver.train_rtol=1e-1", "solver.warmup=8", "solver.warmup_rtol=3e-1"]
FIXED = ["solver=midpoint", "solver.step_size=0.5"]


@pytest.mark.parametrize("solver", [ADAPTIVE, FIXED], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("stop", [3, 7])
def test_resume_after_a_tightening_is_bitwise_exact(
    solver: list[str],
    stop: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guarded_config: Compose,
    guarded_trainer: MakeTrainer,
    stop_at: Callable[..., None],
) -> None:
    config = guarded_config(*SHORT, *solver, "trainer.guard_every=2", "trainer.ema=0.9")
    whole = guarded_trainer(tmp_path / "whole", config)
    force_tightening(monkeypatch, whole, 2)
    whole.fit()
    first = guarded_trainer(tmp_path / "parts", config)
    force_tightening(monkeypatch, first, 2)
    stop_at(first, stop)
    first.fit()
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    assert saved["guard"]["tightenings"] == 1
    # like the command line, continue from the config of the checkpoint
    second = guarded_trainer(tmp_path / "parts", overridden(saved["config"], []), saved)
    force_tightening(monkeypatch, second, 2)
    second.fit()
    assert [row for row in rows(second) if row["split"] == "train" or row["step"] != stop] == rows(whole)
    for key, value in whole.flow.state_dict().items():
        assert torch.equal(value, second.flow.state_dict()[key]), key
    assert whole.best == second.best
    assert second.flow.solver is not None
    assert second.flow.solver.step_size == (0.25 if solver is FIXED else None)
    if solver is ADAPTIVE:
        rtols = [row["rtol"] for row in rows(whole) if row["split"] == "train"]
        assert rtols[1] == pytest.approx(10 * 3 ** (1 / 8) * rtols[2])
        assert rtols[-1] == pytest.approx(1e-2)


def test_smaller_step_size_is_saved_and_resets_the_best_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded_config: Compose, guarded_trainer: MakeTrainer
) -> None:
    config = guarded_config(*SHORT, *FIXED, "trainer.guard_every=5")
    run = guarded_trainer(tmp_path, config)
    force_tightening(monkeypatch, run, 6)
    validate, seen = run.validate, []

    def watched() -> None:
        seen.append(run.best)
        validate()

    run.validate = watched  # type: ignore[method-assign]
    run.fit()
    # the tightening at step 5 discards the best checkpoint of the validation at step 4
    assert [best and best["step"] for best in seen][:2] == [None, None]
    for name in ("best", "last"):
        assert checkpoint.load(tmp_path / f"checkpoints/{name}.pt")["config"]["solver"]["step_size"] == 0.25
    assert config["solver"]["step_size"] == 0.5


def test_result_uses_the_smaller_step_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded_config: Compose
) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(solver_guard, "exploited", lambda *log_ps: next(answers))
    monkeypatch.setattr("flowtrain.plotting.pictures.draw", lambda *arguments: None)
    runs.train(guarded_config(*FIXED, "trainer.steps=2", "trainer.guard_every=2"), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["solver"]["step_size"] == 0.25


def test_checkpoints_without_guard_state_resume(
    tmp_path: Path, guarded_trainer: MakeTrainer, guarded_config: Compose
) -> None:
    guarded_trainer(tmp_path, guarded_config(*SHORT, "trainer.steps=2")).fit()
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    del saved["guard"], saved["config"]["trainer"]["guard_every"], saved["config"]["solver"]["train_rtol"]
    saved["config"]["trainer"]["steps"] = 3
    run = guarded_trainer(tmp_path, saved["config"], saved)
    run.fit()
    assert run.step == 3


def test_flow_without_ode_has_no_guard(tmp_path: Path, guarded_trainer: MakeTrainer) -> None:
    config = compose_defaults(["model=affine", *SHORT[:3], "trainer.guard_every=1", "data.n_val=20"])
    run = guarded_trainer(tmp_path, config)
    run.fit()
    assert run.train_state.guard is None
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["guard"] is None
