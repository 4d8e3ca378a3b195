"""logger=[jsonl,tensorboard]: TensorBoard shows resumed, killed and rewound runs completely and without duplicates."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Run

from flowtrain.training import checkpoint, tensorboard
from flowtrain.training.checkpoint_manager import CheckpointManager
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import NonFiniteError

EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
LOGGER = "logger=[jsonl,tensorboard]"
SMALL = [
    "model=affine", "trainer.steps=6", "trainer.batch_size=16", "trainer.log_every=1", "trainer.val_every=2",
    "trainer.plot_every=2", "data.n_val=32", "data.n_test=32",
]  # fmt: skip


def wall_time(run_dir: Path, step: int) -> float:
    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    return next(float(e.wall_time) for e in read.Scalars("train/nll") if e.step == step)


def begin_and_stop(
    stop_at: Callable[..., None], run: Run, monkeypatch: pytest.MonkeyPatch, step: int, *keys: str
) -> None:
    begin = Trainer.__init__

    def stopping(self: Trainer, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        stop_at(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "__init__", stopping)
        code, _, err = run("flowtrain", *keys)
        assert code == 0, err


def test_resumed_run_has_no_duplicate_entries(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected_scalars: Callable[..., Any],
    read_tensorboard: Callable[..., Any],
    expected_pictures: Callable[..., Any],
    stop_at: Callable[..., None],
) -> None:
    begin_and_stop(stop_at, run, monkeypatch, 3, *SMALL, LOGGER, f"hydra.run.dir={tmp_path}/r")
    assert read_tensorboard(tmp_path / "r")[0] == expected_scalars(tmp_path / "r")
    begun = wall_time(tmp_path / "r", 1)
    # the learning rate is smaller, so that repeated steps would give different values
    assert run("flowtrain", f"resume={tmp_path}/r", "trainer.lr=1e-4")[0] == 0
    scalars, images = read_tensorboard(tmp_path / "r")
    assert scalars == expected_scalars(tmp_path / "r")
    assert [step for name, step in scalars if name == "train/nll"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, step in scalars if name == "test/nll"] == [6]
    assert images == expected_pictures(tmp_path / "r", 6)
    assert wall_time(tmp_path / "r", 1) == begun
    # the run has ended, so resuming only evaluates it again
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0
    assert read_tensorboard(tmp_path / "r")[0] == expected_scalars(tmp_path / "r")
    assert read_tensorboard(tmp_path / "r")[1] == expected_pictures(tmp_path / "r", 6)


def test_entries_after_the_last_checkpoint_are_dropped_on_resume(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_tensorboard: Callable[..., Any],
    expected_scalars: Callable[..., Any],
    stop_at: Callable[..., None],
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # the run is killed after the validation at step 6, before the checkpoint that includes this validation
        save = CheckpointManager.write_last
        patched.setattr(
            CheckpointManager, "write_last", lambda self: killed() if self.progress.step == 6 else save(self)
        )
        assert run("flowtrain", *SMALL, LOGGER, f"hydra.run.dir={tmp_path}/r")[0] == 130
    assert ("val/nll", 6) in read_tensorboard(tmp_path / "r")[0]
    begun = (tmp_path / "r/tensorboard/events.out.tfevents.000000").stat().st_size
    # the kill has truncated the file
    os.truncate(tmp_path / "r/tensorboard/events.out.tfevents.000000", begun - 3)
    begin_and_stop(stop_at, run, monkeypatch, 5, f"resume={tmp_path}/r", "trainer.lr=1e-4")
    scalars, _ = read_tensorboard(tmp_path / "r")
    assert scalars == expected_scalars(tmp_path / "r")
    assert max(step for _, step in scalars) == 5


def test_entries_of_rewound_steps_are_dropped(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_tensorboard: Callable[..., Any],
    expected_scalars: Callable[..., Any],
    expected_pictures: Callable[..., Any],
) -> None:
    take, failures = Trainer.train_step, [5]

    def failing(self: Trainer) -> dict[str, Any]:
        if self.step in failures:
            failures.remove(self.step)
            raise NonFiniteError("this error occurs once.")
        return take(self)

    monkeypatch.setattr(Trainer, "train_step", failing)
    keys = [*SMALL, "trainer.val_every=4", "trainer.on_nonfinite=rewind", LOGGER]
    purged: list[int] = []
    purge = tensorboard.Board.back_to
    monkeypatch.setattr(tensorboard.Board, "back_to", lambda self, step: (purged.append(step), purge(self, step)))
    code, _, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    assert purged == [4]
    scalars, images = read_tensorboard(tmp_path / "r")
    assert scalars == expected_scalars(tmp_path / "r")
    assert [step for name, step in scalars if name == "train/nll"] == [1, 2, 3, 4, 5, 6]
    assert images == expected_pictures(tmp_path / "r", 6)


@pytest.mark.slow
def test_tensorboard_added_on_resume_includes_earlier_steps(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_tensorboard: Callable[..., Any],
    expected_scalars: Callable[..., Any],
    expected_pictures: Callable[..., Any],
    stop_at: Callable[..., None],
) -> None:
    begin_and_stop(stop_at, run, monkeypatch, 3, *SMALL, f"hydra.run.dir={tmp_path}/r")
    # checkpoints of versions without loggers
    for path in (tmp_path / "r/checkpoints").glob("*.pt"):
        saved = checkpoint.load(path)
        assert saved["config"].pop("logger") == ["jsonl"]
        checkpoint.save(path, saved)
    assert run("floweval", f"ckpt={tmp_path}/r")[0] == 0
    code, _, err = run("floweval", f"ckpt={tmp_path}/r", LOGGER)
    assert (code, "logger" in err) == (2, True)
    begin_and_stop(stop_at, run, monkeypatch, 4, f"resume={tmp_path}/r")
    assert not (tmp_path / "r/tensorboard").exists()
    code, _, err = run("flowtrain", f"resume={tmp_path}/r", LOGGER)
    assert code == 0, err
    scalars, images = read_tensorboard(tmp_path / "r")
    assert scalars == expected_scalars(tmp_path / "r")
    assert ("train/nll", 1) in scalars
    assert images == expected_pictures(tmp_path / "r", 6)
    assert checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]["logger"] == ["jsonl", "tensorboard"]
