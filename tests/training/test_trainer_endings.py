"""Signals and failures after the last step of a run, and failures of writing and validation."""

import errno
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import MakeTrainer, ReadRows, Run

from flowtrain.data.base import Dataset
from flowtrain.training import checkpoint
from flowtrain.training.checkpoint_manager import CheckpointManager
from flowtrain.training.metrics import Metrics
from flowtrain.training.trainer import Trainer
from flowtrain.training.validation import Validation
from flowtrain.utils.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")

KEYS = [
    "model=affine",
    "trainer.steps=4",
    "trainer.val_every=2",
    "trainer.batch_size=8",
    "data.n_val=8",
    "data.n_test=8",
]


@pytest.mark.parametrize(
    ("owner", "method"), [(Validation, "run"), (CheckpointManager, "write_last")], ids=["validated", "saved"]
)
def test_signal_during_the_last_validation_or_save(
    owner: type, method: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = getattr(owner, method)

    def signalled(self: Any) -> None:
        act(self)
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, signalled)
        code, _, err = run("flowtrain", *KEYS, f"hydra.run.dir={tmp_path}/r")
    assert code == 143
    assert f"SIGTERM at step 4; resume with: flowtrain resume={tmp_path}/r" in err
    assert not (tmp_path / "r/result.json").exists()
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0
    assert (tmp_path / "r/result.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signal_during_the_evaluation(
    number: int, code: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*arguments: Any, **named: Any) -> None:
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr("flowtrain.runs.finish.evaluate", signalled)
        found, out, err = run("flowtrain", *KEYS, f"hydra.run.dir={tmp_path}/r")
    assert (found, out) == (code, f"{tmp_path}/r\n")
    assert err.endswith(f"during the evaluation; resume with: flowtrain resume={tmp_path}/r\n")
    assert not (tmp_path / "r/.lock").exists()
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0


def test_sighup_saves_unless_it_is_ignored(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def signalled(self: Trainer) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    # under nohup, the signal is ignored from the start
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert run("flowtrain", *KEYS, f"hydra.run.dir={tmp_path}/a")[0] == 129
        assert checkpoint.load(tmp_path / "a/checkpoints/last.pt")["step"] == 1
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert run("flowtrain", *KEYS, f"hydra.run.dir={tmp_path}/b")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_unwritable_result_is_an_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("flowtrain.runs.finish.write_json", full)
        code, _, err = run("flowtrain", *KEYS, f"hydra.run.dir={tmp_path}/r")
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("flowtrain: the run has ended at step 4 and is saved, but its result could not be written")
    assert f"flowtrain resume={tmp_path}/r " in last
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0


def test_full_disk_is_reported_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trainer: MakeTrainer
) -> None:
    save = checkpoint.save

    def full(path: Path, content: dict[str, Any]) -> None:
        if content["step"] > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", full)
    run = trainer(tmp_path, "model=affine", "trainer.steps=9")
    run.fit()
    assert (run.step, run.saved_step) == (9, 4)
    assert re.findall(r"\d+", caplog.messages[-1]) == ["4", "9"]


class FailingValidation(Validation):
    """A validation that fails once, at step 8."""

    failures = 1

    def nll(self) -> tuple[float, float]:
        if self.progress.step == 8 and self.failures:
            self.failures -= 1
            raise NonFiniteError("log p(x) is nan for row 0 of the val set")
        return super().nll()


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_failed_validation_follows_the_failure_policy(
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trainer: MakeTrainer,
    rows: ReadRows,
) -> None:
    monkeypatch.setattr("flowtrain.training.trainer.Validation", FailingValidation)
    run = trainer(tmp_path, "model=affine", "trainer.steps=12", f"trainer.on_nonfinite={policy}")
    what = "the validation of step 8"
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=rf"^{what}: log p.* flowtrain resume={tmp_path} trainer.lr="):
            run.fit()
        assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 4
        return
    run.fit()
    found = rows(tmp_path)
    assert checkpoint.load(checkpoint.previous(tmp_path / "checkpoints/last.pt"))["step"] == 8
    assert [r["step"] for r in found if r["split"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in found if r["split"] == "val"] == ([4, 12] if policy == "skip" else [4, 8, 12])
    said = (
        f"{what} is skipped"
        if policy == "skip"
        else f"{what}: log p(x) is nan for row 0 of the val set. Rewound to step 4"
    )
    assert said in caplog.text


def test_learning_rate_set_after_a_rewind_is_used(
    tmp_path: Path, trainer: MakeTrainer, poisoned_once: type[Dataset], poisoned: type[Dataset], rows: ReadRows
) -> None:
    keys = ["model=affine", "trainer.lr_decay=constant", "trainer.lr_warmup=0", "trainer.on_nonfinite=rewind"]
    first = trainer(tmp_path, *keys, "trainer.steps=8", "trainer.lr=0.004", data=poisoned_once(5))
    first.fit()
    assert first.failure_policy.rewinds == 1
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    again = trainer(tmp_path, *keys, "trainer.steps=10", "trainer.lr=0.004", data=poisoned(-1), saved=saved)
    again.fit()
    assert rows(tmp_path)[-2]["lr"] == 0.002
    other = trainer(tmp_path, *keys, "trainer.steps=12", "trainer.lr=0.003", data=poisoned(-1), saved=saved)
    other.fit()
    assert rows(tmp_path)[-2]["lr"] == 0.003
    assert other.failure_policy.rewinds == 1


def test_unwritten_metrics_survive_a_rewind(tmp_path: Path, rows: ReadRows) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write(step=1, nll=3.0)
    metrics.path.rename(tmp_path / "away")
    metrics.path.mkdir()
    metrics.write(step=2, nll=2.0)
    metrics.write(step=3, nll=1.0)
    metrics.path.rmdir()
    (tmp_path / "away").rename(metrics.path)
    metrics.back_to(2)
    metrics.write(step=3, nll=1.5)
    assert [(r["step"], r["nll"]) for r in rows(tmp_path)] == [(1, 3.0), (2, 2.0), (3, 1.5)]
    metrics.back_to(1)
    assert [r["step"] for r in rows(tmp_path)] == [1]
