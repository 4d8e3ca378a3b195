"""Schedules end within a time limit, and a command keeps its time budget. The tests use a fake clock."""

import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, MakeTrainer, ReadRows, Run

from flowtrain.bijections.linear import Affine
from flowtrain.cli.config_files import compose_defaults
from flowtrain.cli.saved_config import overridden
from flowtrain.data.base import Dataset
from flowtrain.data.targets.base import FunctionTarget, TargetData
from flowtrain.flow import Flow
from flowtrain.training import checkpoint, time_budget
from flowtrain.training import trainer as loop
from flowtrain.training.progress import Progress
from flowtrain.training.schedules import ScheduleClock
from flowtrain.training.time_budget import TimeBudget
from flowtrain.training.trainer import Trainer
from flowtrain.utils import status

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")


class Clock:
    """A clock that advances only when a test advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 1e6

    def per_step(self, run: Trainer, seconds: float) -> None:
        take = run.train_step

        def train_step() -> dict[str, Any]:
            self.now += seconds
            return take()

        run.train_step = train_step  # type: ignore[method-assign]


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(loop, "time", found)
    monkeypatch.setattr(time_budget, "time", found)
    return found


def train_values(rows: ReadRows, run_dir: Path, key: str) -> list[Any]:
    return [row[key] for row in rows(run_dir) if row["split"] == "train"]


AFFINE = ["model=affine", "trainer.lr=0.01", "trainer.lr_warmup=0", "trainer.val_every=500"]


def test_schedule_position_without_time_limit_equals_the_step() -> None:
    p = Progress()
    clock = ScheduleClock(p, 100, 0)
    clock.begin()
    for p.step in range(1, 101):
        assert clock.reached(1e6, None) == p.step
        clock.advance(p.step, 1e6)
        assert clock.at(p.step) == p.step


@pytest.mark.parametrize("change", [0, 40])
def test_schedule_is_unchanged_if_the_run_fits_the_limit(change: int) -> None:
    """A slow first tenth of the run does not change its schedule."""
    p = Progress()
    clock = ScheduleClock(p, 100, change)
    clock.begin()
    for p.step in range(1, 101):
        elapsed = (4 if p.step > 1 else 3) + 0.8 * p.step
        position = clock.reached(elapsed, 200.0 if change else 100.0)
        assert position == p.step
        assert not clock.advance(position, elapsed)


def test_schedules_end_within_the_time_limit(
    fake_clock: Clock, tmp_path: Path, trainer: MakeTrainer, rows: ReadRows
) -> None:
    keys = [*AFFINE, "trainer.steps=1000", "trainer.time_limit=40"]
    run = trainer(tmp_path / "cut", *keys)
    fake_clock.per_step(run, 1.0)
    run.fit()
    assert (run.step, run.stopped_by) == (40, "time limit")
    lr = train_values(rows, tmp_path / "cut", "lr")
    assert lr == sorted(lr, reverse=True)
    assert lr[3] > 0.0099
    assert 0.004 < lr[22] < 0.006
    # the learning rate falls smoothly to 0
    assert lr[-1] < 0.0001
    assert max(a - b for a, b in itertools.pairwise(lr)) < 0.0006
    # batches and noise depend on the step, not on the schedule position
    whole = trainer(tmp_path / "whole", *keys[:-1], "trainer.steps=40")
    assert torch.equal(whole.update.batches.of(7).x, run.update.batches.of(7).x)


def test_tolerance_warmup_ends_within_the_time_limit(
    fake_clock: Clock, tmp_path: Path, trainer: MakeTrainer, rows: ReadRows
) -> None:
    keys = ["model=ffjord", "model.hidden=[4]", "trainer.steps=1000", "trainer.time_limit=12", "trainer.val_every=500"]
    run = trainer(tmp_path, *keys)
    fake_clock.per_step(run, 1.0)
    run.fit()
    rtol = train_values(rows, tmp_path, "rtol")
    assert rtol == sorted(rtol, reverse=True)
    assert rtol[0] == pytest.approx(1e-3, rel=0.02)
    assert rtol[-2:] == pytest.approx([1e-5, 1e-5])


def test_ranks_agree_on_the_schedule_position(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trainer: MakeTrainer
) -> None:
    """Ranks use the largest position of all ranks. Here another rank is 50 steps ahead."""
    run = trainer(tmp_path, *AFFINE, "trainer.steps=100", "trainer.time_limit=1000")
    monkeypatch.setattr(loop.ranks, "largest", lambda values: [*values[:2], values[2] + 50])
    run.progress.step = 1
    run.check_for_stop(None, False)
    assert run.schedule_clock.at(1) == 51
    assert run.train_state.rate(1) == pytest.approx(run.train_state.lr.at(51))


def test_resume_continues_from_the_schedule_position(
    fake_clock: Clock, tmp_path: Path, trainer: MakeTrainer, rows: ReadRows
) -> None:
    keys = [*AFFINE, "trainer.steps=1000", "trainer.time_limit=40"]
    first = trainer(tmp_path, *keys)
    fake_clock.per_step(first, 1.0)
    take = first.train_step

    def signalled() -> dict[str, Any]:
        if first.step == 21:
            first.stopped_by, first.signal = "SIGTERM", 15
        return take()

    first.train_step = signalled  # type: ignore[method-assign]
    first.fit()
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    assert saved["step"] == 22
    assert 450 < saved["position"] < 550
    second = trainer(tmp_path, *keys, saved=saved)
    fake_clock.per_step(second, 1.0)
    second.fit()
    lr = train_values(rows, tmp_path, "lr")
    assert (second.step, len(lr)) == (62, 62)
    assert lr == sorted(lr, reverse=True)
    assert lr[22] == pytest.approx(lr[21], rel=0.1)
    assert lr[-1] < 0.0001
    # a run ended by the time limit resumes at the schedule position of its step
    ended = checkpoint.load(tmp_path / "checkpoints/last.pt")
    assert ended["position"] == 1000
    third = trainer(tmp_path, *keys, saved=ended)
    third.schedule_clock.begin()
    assert third.train_state.rate(62) == pytest.approx(third.train_state.lr.at(62))


def test_hybrid_spends_half_of_the_time_on_likelihood(
    fake_clock: Clock, tmp_path: Path, trainer: MakeTrainer, rows: ReadRows
) -> None:
    keys = ["model=ffjord", "model.hidden=[4]", "objective=hybrid", "objective.matching=900", "solver.rtol=1e-2"]
    keys += ["trainer.steps=1000", "trainer.val_every=500", "trainer.log_every=1", "trainer.batch_size=16"]
    keys += ["trainer.lr_warmup=0", "trainer.time_limit=20"]
    run = trainer(tmp_path, *keys)
    fake_clock.per_step(run, 1.0)
    run.fit()
    assert run.step == 20
    nll = train_values(rows, tmp_path, "nll")
    assert [n is None for n in nll] == [True] * 10 + [False] * 10
    assert train_values(rows, tmp_path, "lr")[10] == pytest.approx(run.settings.lr)
    assert train_values(rows, tmp_path, "lr")[-1] < 0.1 * run.settings.lr
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    assert saved["config"]["objective"]["matching"] == 10
    again = trainer(tmp_path, *keys[:3], *keys[4:], "objective.matching=10", saved=saved)
    assert again.train_state.solves_from == 10
    assert again.train_state.warmup == run.train_state.warmup == round(990 * 2 / 3)


# The budget of a command


class SortedRows(Dataset):
    """A dataset whose test rows are sorted."""

    event_shape = (2,)

    def __init__(self, n: int) -> None:
        self.val = torch.randn(50, 2)
        self.test = torch.arange(2.0 * n).view(n, 2)

    def train_batch(self, step: int, batch_size: int, seed: int) -> torch.Tensor:
        return torch.randn(batch_size, 2)


def budget_with_row_time(fake_clock: Clock, seconds: float, row_seconds: float, n: int = 10_000) -> TimeBudget:
    found = TimeBudget(seconds, fake_clock.now - 5, Flow((2,), Affine(2)), SortedRows(n))
    found.row_seconds = row_seconds
    return found


def test_training_leaves_time_for_the_evaluation(fake_clock: Clock) -> None:
    cheap, dear = budget_with_row_time(fake_clock, 100, 1e-6), budget_with_row_time(fake_clock, 100, 1e-3)
    assert 90 < cheap.for_training < cheap.left == 95
    assert dear.end == pytest.approx(dear.left - dear.for_training)
    # the time reserved for the end covers all test rows, a validation, the checks and a picture
    assert dear.end > 10
    assert dear.affordable_rows(dear.room) == (10_000, True)
    # checks are dropped before test rows
    assert budget_with_row_time(fake_clock, 100, 3.3e-3).affordable_rows(50.0) == (10_000, False)
    # the time reserved for the end does not shrink during training
    before = dear.end
    fake_clock.now += 40
    assert dear.end == before
    assert dear.left == 55


def test_checks_take_precedence_over_table_baselines(fake_clock: Clock) -> None:
    flow, table = Flow((2,), Affine(2)), SortedRows(1000)
    table.n_train = 5000

    def budget(seconds: float, flow: Flow = flow) -> TimeBudget:
        return TimeBudget(seconds, fake_clock.now, flow, table)

    assert budget_with_row_time(fake_clock, 100, 1e-6).for_baselines == 0
    assert budget(100).for_baselines == pytest.approx(5)
    assert budget(10_000).for_baselines == 20
    # the share of the budget is too small to fit a mixture
    assert budget(30).for_baselines == 0
    assert budget(100, Flow((2,), Affine(2), classes=3)).for_baselines == 0
    assert budget(100).end == pytest.approx(budget_with_row_time(fake_clock, 100, 0).end + 5)
    late = budget(100)
    late.row_seconds = 1e-5
    fake_clock.now += 95
    assert late.affordable_data() == (table, True)
    assert late.for_baselines == 0


def test_reducing_test_rows_is_logged(fake_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    enough = budget_with_row_time(fake_clock, 100, 1e-4)
    data, thorough = enough.affordable_data()
    assert data is enough.data
    assert thorough
    assert not caplog.records
    short = budget_with_row_time(fake_clock, 100, 0.01)
    fewer, thorough = short.affordable_data()
    assert not thorough
    n = len(fewer.test)
    assert 200 <= n < 10_000
    assert 0.01 * n < short.left
    # the remaining rows are evenly spaced
    assert torch.equal(fewer.test[[0, -1]], short.data.test[[0, -1]])
    assert len(short.data.test) == 10_000
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(n) in record.getMessage()
    assert "10000" in record.getMessage()


def test_probe_measures_samples_of_a_target(fake_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The time of a sample includes the time of the target."""

    def slow(x: torch.Tensor) -> torch.Tensor:
        fake_clock.now += 0.01 * len(x)
        return -0.5 * x.square().sum(1)

    data = TargetData(FunctionTarget(slow, 2), n_val=50, n_test=20_000)
    found = TimeBudget(100, fake_clock.now, Flow((2,), Affine(2)), data)
    found.probe()
    assert found.row_seconds == pytest.approx(0.01)
    fewer, thorough = found.affordable_data()
    assert (fewer is data, thorough) == (False, False)
    # 0.5 s for the probe, and 1,500 further rows of the evaluation
    assert 200 <= len(fewer.test) < 10_000 - 1500
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "floweval" in record.getMessage()


def test_slow_validations_use_fewer_rows(fake_clock: Clock) -> None:
    found = budget_with_row_time(fake_clock, 100, 1e-3)
    found.data.val = torch.randn(100_000, 2)
    n = found.val_rows(None)
    assert n is not None
    assert 1e-3 * n <= 0.05 * found.left
    assert found.val_rows(300) == 300
    assert budget_with_row_time(fake_clock, 100, 1e-6).val_rows(None) is None


def test_figures_are_skipped_without_time_left(fake_clock: Clock) -> None:
    found = budget_with_row_time(fake_clock, 100, 1e-5)
    assert found.has_time_for("samples")
    fake_clock.now += 95
    assert not found.has_time_for("samples")


def test_budget_ends_training_in_time(fake_clock: Clock, tmp_path: Path, trainer: MakeTrainer, rows: ReadRows) -> None:
    run = trainer(tmp_path, *AFFINE, "trainer.steps=100000")
    run.time_budget = TimeBudget(60, fake_clock.now - 10, run.flow, run.data)
    fake_clock.per_step(run, 0.5)
    run.fit()
    assert run.stopped_by == "time limit"
    assert 3 < run.time_budget.left < 4.5
    assert train_values(rows, tmp_path, "lr")[-1] < 0.001


def test_scoring_time_is_updated_during_training(
    fake_clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: MakeTrainer
) -> None:
    """Solves become longer: scoring a row takes 1e-4 s longer with every step."""
    run = trainer(tmp_path, *AFFINE, "trainer.steps=100000")
    monkeypatch.setattr(
        time_budget,
        "log_probs",
        lambda flow, x, label: setattr(fake_clock, "now", fake_clock.now + len(x) * run.step / 1e4),
    )
    run.time_budget = TimeBudget(600, fake_clock.now, run.flow, run.data)
    fake_clock.per_step(run, 1.0)
    run.fit()
    assert run.time_budget.probed > 2
    assert run.time_budget.row_seconds > 0
    assert run.step < 590


def result(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return {k: v for k, v in content.items() if "seconds" not in k}


def test_sufficient_budget_does_not_change_the_result(run: Run, tmp_path: Path) -> None:
    found = []
    for budget in ("null", "5000"):
        code, out, err = run("flowtrain", f"time_budget={budget}", "model=affine", *SMALL)
        assert code == 0, err
        found.append(result(Path(out.splitlines()[-1])))
    assert found[0] == found[1]


def test_exhausted_budget_still_gives_a_result(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flowtrain.cli.start_run.command_begun", lambda: time.perf_counter() - 10_000)
    code, out, err = run("flowtrain", "time_budget=10", "model=affine", *SMALL, "data.n_test=500")
    assert code == 0, err
    found = result(Path(out.splitlines()[-1]))
    assert (found["n"], found["steps"]) == (200, 1)
    # only checks that score no further rows are made
    assert found["checks"].keys() <= {"concentration", "baseline"}
    assert found["budget"]["rows"] == 10
    assert "200 of the 500" in err


@pytest.mark.parametrize("value", ["0", "-3", "soon"])
def test_invalid_budget_is_refused(value: str, run: Run) -> None:
    code, _, err = run("flowtrain", f"time_budget={value}", "model=affine", *SMALL)
    assert code == 2
    assert "time_budget" in err


def test_runs_of_older_versions_accept_a_budget() -> None:
    saved = compose_defaults([])
    del saved["time_budget"]
    assert overridden(saved, ["time_budget=60"])["time_budget"] == 60
    assert overridden(saved, [])["time_budget"] is None


def test_time_is_measured_from_the_process_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_BEGUN", [1.5])
    assert status.command_begun() == 1.5
    # the next job of a sweep starts later
    before = time.perf_counter()
    assert status.command_begun() >= before
