"""The trainer: bitwise resume, metrics and early stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MakeTrainer, ReadRows

from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import STEP_STREAM, step_generator
from flowtrain.runs.build import build_data
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("float32")


# with lr=1 each validation is worse than the validation before, so the plateau schedule has state to restore
PLATEAU = ["trainer.lr_decay=plateau", "trainer.lr_plateau_patience=1", "trainer.lr=1.0", "trainer.val_every=2"]
HYBRID = ["objective=hybrid", "objective.matching=5", "solver.rtol=1e-3"]

RUNS = [
    ["model=realnvp", "model.layers=2", "model.hidden=[8]", "model.mixing=permutation", "trainer.ema=0.9"],
    ["model=ffjord", "model.hidden=[8,8]", "model.trace=hutchinson", "solver.warmup=6", "solver.rtol=1e-3"],
    ["model=affine", "trainer.optimizer=adamw", "trainer.ema=null", *PLATEAU],
    ["model=glow", "model.steps=2", "model.hidden=[8]", "trainer.lr_decay=constant", "trainer.lr_warmup=3"],
    ["model=nsf", "model.layers=2", "model.hidden=[8]", "model.dropout=0.2"],
    ["model=ffjord", "model.hidden=[8]", "objective=flow_matching"],
    ["model=ffjord", "model.hidden=[8,8]", "trainer.optimizer=muon", *HYBRID],
    ["model=ffjord", "model.hidden=[8]", "regularizer=rnode", "regularizer.end_time=0.1", "solver.rtol=1e-3"],
]


NAMES = ["realnvp", "ffjord", "affine", "glow", "nsf", "matching", "hybrid", "rnode"]


@pytest.fixture(scope="module", params=RUNS, ids=NAMES)
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trainer: MakeTrainer
) -> tuple[list[str], Trainer]:
    """Returns the overrides of an uninterrupted run, and its trainer."""
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    run = trainer(tmp_path_factory.mktemp("whole"), *request.param, "trainer.steps=10")
    run.fit()
    return request.param, run


@pytest.mark.parametrize("stop", [4, 7])
def test_resume_is_bitwise_exact(
    uninterrupted: tuple[list[str], Trainer],
    stop: int,
    tmp_path: Path,
    trainer: MakeTrainer,
    stop_at: Callable[..., None],
    rows: ReadRows,
) -> None:
    overrides, run = uninterrupted
    first = trainer(tmp_path / "parts", *overrides, "trainer.steps=10")
    stop_at(first, stop)
    first.fit()
    assert first.step == stop
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    # rows written after the last checkpoint of a crashed process must be removed
    with (tmp_path / "parts/metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": stop + 1, "split": "train", "nll": 0, "seconds": 0}) + '\n{"step": 9, "sp')
    second = trainer(tmp_path / "parts", *overrides, "trainer.steps=10", saved=saved)
    second.fit()
    ends = [row for row in rows(tmp_path / "parts") if not (row["split"] == "val" and row["step"] == stop != 4)]
    assert ends == rows(run.run_dir)
    for key, value in run.flow.state_dict().items():
        assert torch.equal(value, second.flow.state_dict()[key]), key
    if run.train_state.ema is not None and second.train_state.ema is not None:
        assert all(torch.equal(v, second.train_state.ema.shadow[k]) for k, v in run.train_state.ema.shadow.items())


def test_resume_accepts_new_settings_but_no_other_model(tmp_path: Path, trainer: MakeTrainer) -> None:
    trainer(
        tmp_path, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=4", "trainer.ema=null"
    ).fit()
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    changed = trainer(
        tmp_path,
        "model=realnvp",
        "model.layers=2",
        "model.hidden=[8]",
        "trainer.weight_decay=0.5",
        "trainer.ema=0.9",
        saved=saved,
    )
    assert changed.train_state.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert changed.train_state.ema is not None
    assert all(torch.equal(changed.train_state.ema.shadow[k], v) for k, v in changed.flow.named_parameters())
    with pytest.raises(CheckpointError, match=r"leave model\."):
        trainer(tmp_path, "model=realnvp", "model.layers=2", "model.hidden=[32]", saved=saved)


def test_run_killed_before_its_first_validation_resumes(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.steps=9")

    def killed() -> dict[str, Any]:
        raise KeyboardInterrupt

    run.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 0


def test_trace_noise_and_toy_data_are_independent() -> None:
    """With equal keys, noise and data would be drawn from the same numbers, and Hutchinson's estimate would be
    biased."""
    toy = build_data(compose_defaults(["data=8gaussians"]))
    noise = torch.randn(512, 2, generator=step_generator(0, STEP_STREAM, 7))
    batch = toy.train_batch(7, 512, 0)
    same = torch.randn(512, 2, generator=step_generator(0, 1, 7))
    assert not torch.equal(noise, same)
    assert torch.corrcoef(torch.stack([noise[:, 0], batch[:, 0]]))[0, 1].abs() < 0.15


def test_equal_seeds_give_equal_runs(tmp_path: Path, trainer: MakeTrainer, rows: ReadRows) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer(
            tmp_path / name, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=3", f"seed={seed}"
        ).fit()
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_metrics_contain_the_documented_keys(tmp_path: Path, trainer: MakeTrainer, rows: ReadRows) -> None:
    trainer(tmp_path / "c", "model.hidden=[8]", "trainer.steps=4", "solver.rtol=1e-3").fit()
    trainer(tmp_path / "d", "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=4").fit()
    train = {"step", "split", "nll", "nfe_forward", "nfe_backward", "grad_norm", "lr", "rtol", "atol"}
    for name, continuous in (("c", True), ("d", False)):
        by_split = {s: [r for r in rows(tmp_path / name) if r["split"] == s] for s in ("train", "val")}
        assert [r["step"] for r in by_split["train"]] == [1, 2, 3, 4]
        assert [r["step"] for r in by_split["val"]] == [4]
        assert set(by_split["train"][0]) == train
        assert set(by_split["val"][0]) == {"step", "split", "nll", "nll_stderr"}
        assert (by_split["train"][0]["nfe_forward"] is not None) is continuous
        assert (by_split["train"][0]["rtol"] is not None) is continuous


def test_adjoint_gradient_reports_backward_nfe(tmp_path: Path, trainer: MakeTrainer, rows: ReadRows) -> None:
    trainer(tmp_path, "model.hidden=[8]", "trainer.steps=2", "solver.rtol=1e-3", "solver.gradient=adjoint").fit()
    assert all(row["nfe_backward"] > 0 for row in rows(tmp_path) if row["split"] == "train")


def test_early_stopping_ends_a_run(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.lr=1.0", "trainer.steps=400", "trainer.patience=3")
    run.fit()
    assert run.step < 400
    assert "early stopping" in str(run.stopped_by)
    assert run.best is not None
    assert run.best["step"] == run.step - 3 * 4
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.best["step"]


def test_time_limit_triggers_validation_and_checkpoint(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(
        tmp_path, "model=realnvp", "trainer.steps=100000", "trainer.time_limit=0.2", "trainer.val_every=99999"
    )
    run.fit()
    assert run.stopped_by == "time limit"
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.step < 100_000
