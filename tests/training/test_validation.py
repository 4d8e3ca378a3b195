"""Small tables: early validations that do not change training, and runs that end when they overfit."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MakeTrainer, ReadRows
from helpers.files import normal, npy
from helpers.processes import composed

from flowtrain.cli.config_files import compose_defaults
from flowtrain.training import checkpoint
from flowtrain.training.schedules import ValidationSchedule, early_validations
from flowtrain.training.settings import Settings
from flowtrain.training.trainer import Trainer
from flowtrain.training.validation import Validation, advice, clearly_worse, some_rows
from flowtrain.utils.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")

# 60 training rows give 5 steps of 12 rows per epoch
SMALL = ["data=array", "recipe=none", "trainer.batch_size=12", "trainer.val_every=10", "trainer.log_every=1"]
SMALL += ["model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.lr_warmup=0", "trainer.plot_every=null"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("table")
    train, held = npy(folder / "train.npy", normal(60, 3)), npy(folder / "held.npy", normal(30, 3, seed=1))
    return [*SMALL, f"data.path={train}", f"data.val_path={held}", f"data.test_path={held}"]


def validation_steps(rows: ReadRows, run_dir: Path) -> list[int]:
    return [row["step"] for row in rows(run_dir) if row["split"] == "val"]


def settings(**changes: Any) -> Settings:
    return Settings(**{**composed([])["trainer"], **changes})


def test_early_validations_start_each_epoch_and_become_rarer() -> None:
    early = settings(val_early=True, val_every=100, batch_size=512)
    small = sorted(early_validations(early, 120))
    assert small[:14] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22]
    gaps = [b - a for a, b in itertools.pairwise(small)]
    assert gaps == sorted(gaps)
    assert max(gaps) < 100
    assert sorted(early_validations(early, 5_000))[:5] == [0, 10, 20, 30, 40]
    # with long epochs or a preceding matching phase, only step 0 is validated early
    assert early_validations(early, 512 * 100) == early_validations(early, 120, matching=True) == {0}
    assert early_validations(settings(val_early=False), 120) == frozenset()
    plan = ValidationSchedule(early, frozenset([0, 5, 100]))
    assert [plan.validates(s) for s in (0, 5, 100, 1000)] == [False, False, True, True]
    assert [plan.validates_early(s) for s in (0, 5, 100)] == [True, True, False]


def test_only_tables_are_validated_early_by_default() -> None:
    assert compose_defaults(["data=array", "data.path=x"])["trainer"]["val_early"]
    assert not compose_defaults(["data=moons"])["trainer"]["val_early"]


def test_early_validations_include_step_0(
    table: list[str], tmp_path: Path, trainer_of: MakeTrainer, rows: ReadRows
) -> None:
    run = trainer_of(tmp_path, [*table, "trainer.steps=20"])
    run.fit()
    assert validation_steps(rows, tmp_path) == [0, 5, 10, 15, 20]
    assert run.best is not None
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.best["step"]


ENDINGS = {
    "patience": ["trainer.lr=0.3", "trainer.patience=2", "trainer.lr_decay=constant"],
    "plateau": ["trainer.lr=0.3", "trainer.patience=2", "trainer.lr_decay=plateau", "trainer.lr_plateau_patience=1"],
    "steps": ["trainer.lr=0.001", "trainer.patience=null"],
    "hybrid": ["model=ffjord", "model.hidden=[8]", "objective=hybrid", "objective.matching=15", "solver.rtol=1e-2"],
}


@pytest.mark.parametrize("how", ENDINGS)
def test_early_validations_do_not_change_training(
    how: str, table: list[str], tmp_path: Path, trainer_of: MakeTrainer, rows: ReadRows
) -> None:
    """Weights and the final step are equal: early validations count neither for patience nor for a plateau."""
    layers = [key for key in table if not (how == "hybrid" and key.startswith("model"))]
    found = []
    for early in ("true", "false"):
        keys = [
            *layers,
            *ENDINGS[how],
            {"hybrid": "trainer.steps=20", "plateau": "trainer.steps=120"}.get(how, "trainer.steps=60"),
        ]
        keys += ["trainer.max_rise=null", "trainer.batch_size=12", "trainer.val_every=10", "trainer.log_every=1"]
        run = trainer_of(tmp_path / early, [*keys, f"trainer.val_early={early}"])
        run.fit()
        found.append(run)
    early, late = found
    assert len(validation_steps(rows, early.run_dir)) > len(validation_steps(rows, late.run_dir))
    assert (early.step, early.stopped_by) == (late.step, late.stopped_by)
    assert ("without a new best" in str(early.stopped_by)) is (how in ("patience", "plateau"))
    of_training = [[r for r in rows(run.run_dir) if r["split"] == "train"] for run in found]
    assert of_training[0] == of_training[1]
    assert all(torch.equal(v, late.flow.state_dict()[k]) for k, v in early.flow.state_dict().items())
    assert early.best is not None
    assert late.best is not None
    assert early.best["nll"] <= late.best["nll"]


def rising_nll(self: Validation) -> tuple[float, float]:
    """Returns a validation NLL that falls until step 20 and then rises by 1 nat in 10 steps."""
    self.scored = torch.linspace(-4, -2, 30) - abs(self.progress.step - 20) / 10
    self.n = 30
    return -self.scored.mean().item(), 0.1


@pytest.fixture
def rising_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validation, "nll", rising_nll)


ENDS_EARLY = ["trainer.steps=100", "trainer.max_rise=0.9"]


@pytest.fixture(scope="module")
def uninterrupted(table: list[str], tmp_path_factory: pytest.TempPathFactory, trainer_of: MakeTrainer) -> Trainer:
    """Returns a run that ended because its validation NLL rose."""
    torch.set_default_dtype(torch.float32)
    run = trainer_of(tmp_path_factory.mktemp("whole"), [*table, *ENDS_EARLY])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Validation, "nll", rising_nll)
        run.fit()
    return run


@pytest.mark.usefixtures("rising_validation")
@pytest.mark.parametrize("stop", [3, 5, 7, 33])
def test_resume_is_bitwise_exact(
    stop: int,
    uninterrupted: Trainer,
    table: list[str],
    tmp_path: Path,
    trainer_of: MakeTrainer,
    stop_at: Callable[..., None],
    rows: ReadRows,
) -> None:
    """Runs are stopped before, at and after an early validation, and while the NLL rises."""
    keys = [*table, *ENDS_EARLY]
    assert uninterrupted.best is not None
    assert (uninterrupted.step, uninterrupted.best["step"]) == (40, 20)
    first = trainer_of(tmp_path / "parts", keys)
    stop_at(first, stop)
    first.signal = 15
    first.fit()
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    assert saved["step"] == stop
    second = trainer_of(tmp_path / "parts", keys, saved)
    second.fit()
    assert rows(tmp_path / "parts") == rows(uninterrupted.run_dir)
    assert (second.best, second.step, second.stopped_by) == (
        uninterrupted.best,
        uninterrupted.step,
        uninterrupted.stopped_by,
    )
    ends = [checkpoint.load(run.run_dir / "checkpoints/best.pt") for run in (uninterrupted, second)]
    assert ends[0]["step"] == ends[1]["step"] == uninterrupted.best["step"]
    assert all(torch.equal(v, ends[1]["weights"][k]) for k, v in ends[0]["weights"].items())


def test_initial_weights_are_kept_if_no_step_improves(
    table: list[str], tmp_path: Path, trainer_of: MakeTrainer
) -> None:
    run = trainer_of(tmp_path, [*table, "trainer.lr=3", "trainer.lr_decay=constant", "trainer.steps=30"])
    start = {k: v.clone() for k, v in run.flow.state_dict().items()}
    run.fit()
    best = checkpoint.load(tmp_path / "checkpoints/best.pt")
    assert best["step"] == 0
    assert all(torch.equal(v, start[k]) for k, v in best["weights"].items())
    assert "step 0 of 30" in run.summary(best["step"])


def test_run_killed_at_step_0_validates_once(
    table: list[str], tmp_path: Path, trainer_of: MakeTrainer, rows: ReadRows
) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    run = trainer_of(tmp_path, [*table, "trainer.steps=10"])
    run.checkpoints.write_best = kill  # type: ignore[method-assign,assignment]
    with pytest.raises(Killed):
        run.fit()
    assert validation_steps(rows, tmp_path) == [0]
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    trainer_of(tmp_path, [*table, "trainer.steps=10"], saved).fit()
    assert validation_steps(rows, tmp_path) == [0, 5, 10]


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_failing_early_validation_does_not_end_the_run(
    policy: str,
    table: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trainer_of: MakeTrainer,
    rows: ReadRows,
) -> None:
    score = Validation.nll

    def nll(self: Validation) -> float:
        if self.progress.step in (0, 5):
            raise NonFiniteError("log p(x) is nan for row 0 of the val set")
        return score(self)

    monkeypatch.setattr(Validation, "nll", nll)
    run = trainer_of(tmp_path, [*table, "trainer.steps=20", f"trainer.on_nonfinite={policy}"])
    run.fit()
    assert (run.step, run.failure_policy.rewinds) == (20, 0)
    assert validation_steps(rows, tmp_path) == [10, 15, 20]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "validation" in r.getMessage()]) == 2


# A rising validation NLL


@pytest.mark.usefixtures("rising_validation")
def test_run_ends_if_the_validation_nll_rises(
    uninterrupted: Trainer, table: list[str], tmp_path: Path, trainer_of: MakeTrainer
) -> None:
    assert uninterrupted.best is not None
    assert (uninterrupted.step, uninterrupted.best["step"]) == (40, 20)
    assert "step 20" in str(uninterrupted.stopped_by)
    said = uninterrupted.summary(20)
    assert "step 20 of 40" in said
    assert "model.hidden" in said
    # the run ends later if the margin is wider, the learning rate warms up, or max_rise is off
    for name, keys, step in (
        ("b", ["trainer.max_rise=2.5"], 60),
        ("c", ["trainer.max_rise=0.9", "trainer.lr_warmup=50"], 60),
        ("d", ["trainer.max_rise=null", "trainer.steps=70"], 70),
    ):
        other = trainer_of(tmp_path / name, [*table, "trainer.steps=100", "trainer.patience=null", *keys])
        other.fit()
        assert other.step == step


def test_overfitting_check_waits_for_plateau_and_likelihood_phase(
    table: list[str], tmp_path: Path, trainer_of: MakeTrainer
) -> None:
    run = trainer_of(tmp_path / "a", [*table, "trainer.lr_decay=plateau"])
    assert not run.train_state.may_overfit(150)
    run.train_state.lr.scale = 1 / 16
    assert run.train_state.may_overfit(150)
    layers = [key for key in table if not key.startswith("model")]
    hybrid = trainer_of(tmp_path / "b", [*layers, "model=ffjord", "objective=hybrid", "objective.matching=100"])
    matching = trainer_of(tmp_path / "c", [*layers, "model=ffjord", "objective=flow_matching"])
    warmup = hybrid.settings.lr_warmup
    assert [hybrid.train_state.may_overfit(s) for s in (99, 99 + warmup, 100 + warmup)] == [False, False, True]
    assert not matching.train_state.may_overfit(5000)


def test_validation_rise_must_affect_most_rows() -> None:
    torch.manual_seed(0)
    before = torch.randn(40)
    assert clearly_worse(before, before - 3 + torch.randn(40), 1.0)
    assert not clearly_worse(before, before - 0.5, 1.0)
    assert not clearly_worse(before, before + 3, 1.0)
    one = before.clone()
    one[7] -= 1e9
    assert not clearly_worse(before, one, 1.0)
    # the differences vary over many orders of magnitude, so the standard error of their mean is uninformative
    assert clearly_worse(before, before - 10 ** torch.linspace(0.1, 9, 40), 1.0)
    assert not clearly_worse(before[:3], before[:3] - 5, 1.0)
    # the shares of the ranks together select the same rows as one process
    log_p = torch.arange(5000.0)
    parts = [some_rows(log_p[a:b], a, 5000) for a, b in ((0, 1667), (1667, 3000), (3000, 5000))]
    assert torch.equal(torch.cat(parts), some_rows(log_p, 0, 5000))


def test_checkpoints_of_older_versions_resume(table: list[str], tmp_path: Path, trainer_of: MakeTrainer) -> None:
    """Runs of old checkpoints have no early validations, and their `stale` counts from the best validation so far."""
    keys = [*table, "trainer.lr=0.3", "trainer.lr_decay=constant", "trainer.patience=2"]
    trainer_of(tmp_path, [*keys, "trainer.steps=20", "trainer.val_early=false", "trainer.max_rise=null"]).fit()
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    for key in ("counted", "best_rows", "worse"):
        del saved[key]
    config = {**saved["config"], "trainer": {**saved["config"]["trainer"], "steps": 200}}
    for key in ("val_early", "max_rise"):
        del config["trainer"][key]
    run = trainer_of(tmp_path, keys, {**saved, "config": config})
    older = Settings(**config["trainer"])
    assert (older.val_early, older.max_rise) == (False, None)
    assert run.progress.counted == saved["best"]["nll"]
    assert (run.progress.stale, run.progress.worse, run.progress.best_rows) == (saved["stale"], [], None)


# Advice


def validation_rows(*nlls: float) -> list[dict[str, Any]]:
    return [{"step": 100 * i, "split": "val", "nll": nll} for i, nll in enumerate(nlls)]


@pytest.mark.parametrize(
    ("nlls", "best", "finite", "word"),
    [
        ((6.0, 5.0, 5.5, 6.0, 7.0), 100, True, "model.hidden"),
        ((5.0, 5.1, 5.5, 6.0, 7.0), 0, True, "initial"),
        ((6.0, 5.0, 4.0, 3.0, 2.5, 2.0), 500, True, "trainer.steps"),
        ((6.0, 5.0, 4.0, 3.0, 2.5, 2.0), 500, False, "trainer.steps"),
        ((6.0, 5.0, 4.0, 3.0, 2.001, 2.0), 500, True, None),
        ((6.0, 5.0, 5.5, 6.0, 7.0), 100, False, None),
        # no clear rise
        ((6.0, 5.0, 5.001, 5.0, 5.002), 100, True, None),
        ((6.0,), 0, True, None),
    ],
)
def test_advice_matches_the_validation_curve(
    nlls: tuple[float, ...], best: int, finite: bool, word: str | None
) -> None:
    config = {"model": {"hidden": [8], "dropout": 0.0}}
    found = advice(validation_rows(*nlls), best, 100 * (len(nlls) - 1), 4, finite, config)
    assert found is None if word is None else word in str(found)
    if word == "model.hidden":
        assert "model.dropout" in str(found)
        assert "model.dropout" not in str(advice(validation_rows(*nlls), best, 400, 4, finite, {"model": {}}))


# Pictures


def test_first_figure_is_drawn_after_50_steps() -> None:
    steps = np.arange(0, 1201)
    assert [s for s in steps if s and ValidationSchedule(settings(plot_every=500)).draws(s)] == [50, 500, 1000]
    assert [s for s in steps if s and ValidationSchedule(settings(plot_every=40)).draws(s)][:2] == [40, 80]
    assert not any(ValidationSchedule(settings(plot_every=None)).draws(s) for s in steps)
