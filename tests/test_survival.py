"""What a run survives: damaged files, full disks, signals, steps that fail, another process in its directory."""

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from holder import hold
from runs import Run, stop_at
from test_training import Poisoned, rows, trainer
from torch import Tensor

from flowtrain.build import load
from flowtrain.errors import CheckpointError, ConfigError, NonFiniteError, SolverError
from flowtrain.training import checkpoint
from flowtrain.training.checksum import checksum
from flowtrain.training.lock import holding
from flowtrain.training.loop import Trainer


@pytest.fixture(autouse=True)
def float32(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(logging.getLogger("flowtrain"), "propagate", True)


CONTENT = {
    "format": 1, "a": [1, 2.5, True, None, "x"], "t": torch.arange(6.0).view(2, 3),
    "b": (torch.tensor(3), torch.zeros(0)),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"a": [1, 2.5, True, None, "y"]},
        {"a": [1, 2.5, 1, None, "x"]},
        {"a": (1, 2.5, True, None, "x")},
        {"t": torch.arange(6.0).view(3, 2)},
        {"t": torch.arange(6).view(2, 3)},
        {"t": torch.nextafter(torch.arange(6.0), torch.ones(6)).view(2, 3)},
        {"b": (torch.tensor(3.0), torch.zeros(0))},
        {"c": 1},
    ],
)
def test_checksum_sees_every_change(change: dict[str, Any]) -> None:
    assert checksum(CONTENT) == checksum({**CONTENT, "t": CONTENT["t"].clone()})  # type: ignore[attr-defined]
    assert checksum(CONTENT) != checksum({**CONTENT, **change})


def test_checksum_refuses_what_claims_more_than_it_holds() -> None:
    with pytest.raises(CheckpointError, match="less memory"):
        checksum({"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(CheckpointError, match="no plain value"):
        checksum({"w": object()})


def saved_run(run_dir: Path, *overrides: str) -> Path:
    """A finished run; its last checkpoint."""
    trainer(run_dir, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=8", *overrides).fit()
    return run_dir / "checkpoints/last.pt"


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """500 offsets, drawn at random over the whole file: refused, or without effect on what is read."""
    path = saved_run(tmp_path)
    checkpoint.previous(path).unlink()
    whole = path.read_bytes()
    right = checksum(checkpoint.load(path))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(500):
        at = int(torch.randint(len(whole), (), generator=generator))
        bit = int(torch.randint(8, (), generator=generator))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            content = checkpoint.load(path)
        except CheckpointError:
            refused += 1
        else:
            # padding, or a field of the archive that nothing reads
            assert checksum(content) == right
    assert refused > 150


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone"])
def test_the_checkpoint_before_a_damaged_one_is_taken(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_run(tmp_path)
    whole = bytearray(path.read_bytes())
    assert checkpoint.load(path)["step"] == 8
    if damage == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole.copy()
        flipped[middle : middle + 64] = bytes(255 - b for b in flipped[middle : middle + 64])
        path.write_bytes({"torn": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    assert checkpoint.load(checkpoint.find(tmp_path, prefer="last"))["step"] == 4
    assert "the one before it, last.previous.pt of step 4" in caplog.text


def test_a_run_goes_on_from_the_one_before_to_the_same_end(tmp_path: Path) -> None:
    whole = saved_run(tmp_path / "whole")
    path = saved_run(tmp_path / "torn")
    path.write_bytes(path.read_bytes()[:1000])
    saved = checkpoint.load(path)
    overrides = ["model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=8"]
    trainer(tmp_path / "torn", *overrides, saved=saved).fit()
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")
    ends = [checkpoint.load(p)["weights"] for p in (path, whole)]
    assert all(torch.equal(ends[0][k], v) for k, v in ends[1].items())


def test_what_does_not_read_back_never_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_run(tmp_path)
    before, content = path.read_bytes(), checkpoint.load(path)
    save = torch.save

    def lossy(what: dict[str, Any], f: Any) -> None:
        save({**what, "step": 99}, f)

    monkeypatch.setattr(torch, "save", lossy)
    with pytest.raises(OSError, match="does not read back"):
        checkpoint.save(path, content)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


def test_checkpoints_of_an_older_flowtrain_have_no_checksum(tmp_path: Path) -> None:
    path = saved_run(tmp_path)
    content = checkpoint.load(path)
    torch.save({**content, "format": 1}, path)
    assert checkpoint.load(path)["step"] == 8
    torch.save(content, path)
    checkpoint.previous(path).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stands for it: what the system refuses to write, it refuses as it would there."""
    run = trainer(tmp_path, "model=realnvp", "trainer.steps=16")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = run.train_step

    def filling() -> dict[str, Any]:
        # between steps 5 and 9, in which a validation and two checkpoints fall
        small = 5 <= run.step < 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 if small else limits[0], limits[1]))
        return step()

    run.train_step = filling  # type: ignore[method-assign]
    try:
        run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.step == 16
    assert "step 8: checkpoints/last.pt could not be written" in caplog.text
    assert "its rows are kept until it can" in caplog.text
    # nothing is missing: neither rows nor checkpoints, and the best is the one on the disk
    undisturbed = trainer(tmp_path / "calm", "model=realnvp", "trainer.steps=16")
    undisturbed.fit()
    assert rows(tmp_path) == rows(tmp_path / "calm")
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 16
    assert run.best is not None
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.best["step"]


def test_a_directory_that_cannot_be_written_ends_a_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = trainer(tmp_path, "model=affine", "trainer.steps=4")
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space"):
        run.fit()


class PoisonedOnce(Poisoned):
    """Bad only the first time that the step is asked for, to train and to keep it."""

    def __init__(self, bad_step: int, times: int = 2) -> None:
        super().__init__(bad_step)
        self.times = times

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, 2, generator=torch.Generator().manual_seed(step))
        if step == self.bad_step and self.times > 0:
            self.times -= 1
            x[0, 0] = torch.nan
        return x


@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_a_failed_step_is_skipped(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, f"model={model}", "trainer.steps=9", "trainer.on_nonfinite=skip", data=Poisoned(5))
    run.fit()
    assert run.step == 9
    assert [r["step"] for r in rows(tmp_path) if r["split"] == "train"] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert caplog.text.count("step 6 is skipped") == 1
    assert all(torch.isfinite(v).all() for v in run.flow.state_dict().values())


def test_no_more_than_ten_steps_in_a_row_are_skipped(tmp_path: Path) -> None:
    class Bad(Poisoned):
        def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
            return super().train_batch(step, batch_size, seed) * (torch.nan if step >= 4 else 1)

    run = trainer(tmp_path, "model=realnvp", "trainer.steps=90", "trainer.on_nonfinite=skip", data=Bad(-1))
    with pytest.raises(NonFiniteError, match="step 15: "):
        run.fit()
    assert len(list((tmp_path / "failed").iterdir())) == 5


@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_a_run_rewinds_and_goes_on_with_half_the_rate(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [f"model={model}", "trainer.steps=12", "trainer.on_nonfinite=rewind", "trainer.lr_decay=constant"]
    keys += ["trainer.lr_warmup=0", "trainer.lr=0.004"]
    run = trainer(tmp_path / "a", *keys, data=PoisonedOnce(5))
    run.fit()
    trained = [r for r in rows(tmp_path / "a") if r["split"] == "train"]
    assert [(r["step"], r["lr"]) for r in trained] == [(s, 0.004 if s <= 4 else 0.002) for s in range(1, 13)]
    assert "Back to step 4 with a learning rate 0.5 times" in caplog.text
    # killed after it and resumed: the same to the bit
    part = trainer(tmp_path / "b", *keys, data=PoisonedOnce(5))
    stop_at(part, 7)
    part.fit()
    saved = checkpoint.load(tmp_path / "b/checkpoints/last.pt")
    assert saved["trouble"]["rewinds"] == 1
    rest = trainer(tmp_path / "b", *keys, data=PoisonedOnce(5, times=0), saved=saved)
    rest.fit()
    assert all(torch.equal(v, run.flow.state_dict()[k]) for k, v in rest.flow.state_dict().items())


@pytest.mark.parametrize(("model", "error"), [("realnvp", NonFiniteError), ("ffjord", SolverError)])
def test_rewinds_come_to_an_end(model: str, error: type[Exception], tmp_path: Path) -> None:
    keys = [f"model={model}", "trainer.steps=9", "trainer.on_nonfinite=rewind", "trainer.max_rewinds=2"]
    run = trainer(tmp_path, *keys, "trainer.lr=0.004", data=Poisoned(5))
    with pytest.raises(error, match=r"step 6: .*trainer.lr=0.0005"):
        run.fit()
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["trouble"]["rewinds"] == 2


def test_the_cause_of_a_failed_step_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, "model=realnvp", "trainer.steps=9")

    def broken(name: str, change: Callable[[Tensor], None]) -> str:
        parameter = dict(run.flow.named_parameters())[name]
        kept = parameter.detach().clone()
        with torch.no_grad():
            change(parameter)
        with pytest.raises(NonFiniteError) as caught:
            run.guarded(run.train_step, "step 1")
        with torch.no_grad():
            parameter.copy_(kept)
        return str(caught.value)

    name = next(iter(dict(run.flow.named_parameters())))
    assert f"The weights {name} are not finite" in broken(name, lambda p: p.view(-1)[0].fill_(torch.nan))


def test_a_spike_of_nfe_is_logged_with_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.steps=9")
    for step in range(30):
        run.step = step
        run.watch_nfe({"nfe_forward": 200 if step == 25 else 40, "nfe_backward": 0})
    assert [r.getMessage() for r in caplog.records] == ["step 25: NFE 200, where 40 was usual before"]


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path, run: Run) -> None:
    saved_run(tmp_path / "r")
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "r", ready, leave))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ConfigError, match=f"in use by process {process.pid} on"), holding(tmp_path / "r"):
        pass
    code, out, err = run("flowtrain", f"resume={tmp_path}/r")
    assert (code, out) == (2, "")
    assert f"in use by process {process.pid}" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = run("flowtrain", "model=affine", f"hydra.run.dir={tmp_path}/r")
    assert (code, "in use by process" in err) == (2, True)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # its lock file is still there
    assert (tmp_path / "r/.lock").exists()
    with holding(tmp_path / "r"):
        pass
    assert not (tmp_path / "r/.lock").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)],
)
def test_signals_save_and_say_how_to_go_on(
    number: int, code: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def signalled(self: Trainer) -> dict[str, Any]:
        row = step(self)
        if self.step == 3:
            os.kill(os.getpid(), number)
        return row

    keys = ["model=affine", "trainer.steps=9", "data.n_test=20", "data.n_val=20", "trainer.log_every=1"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", signalled)
        found, _, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/r")
    assert found == code
    assert f"{signal.Signals(number).name} at step 4; go on with: flowtrain resume={tmp_path}/r" in err
    assert checkpoint.load(tmp_path / "r/checkpoints/last.pt")["step"] == 4
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0
    metrics = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if row["split"] == "train"] == list(range(1, 10))
    assert load(tmp_path / "r").log_prob(torch.zeros(1, 2)).isfinite().all()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(run: Run, tmp_path: Path) -> None:
    """It has left a metrics file without rows, and what it was writing."""
    (tmp_path / "r/checkpoints").mkdir(parents=True)
    torn = [tmp_path / "r/checkpoints/.last.pt.77.88.tmp", tmp_path / "r/.metrics.jsonl.77.88.tmp"]
    for path in (*torn, tmp_path / "r/metrics.jsonl"):
        path.touch()
    keys = ["model=affine", "trainer.steps=4", "data.n_test=20", "data.n_val=20", f"hydra.run.dir={tmp_path}/r"]
    code, _, err = run("flowtrain", *keys)
    assert (code, (tmp_path / "r/result.json").exists()) == (0, True), err
    assert not any(path.exists() for path in torn)
    code, _, err = run("flowtrain", *keys)
    assert (code, "already holds a run" in err) == (2, True)


@pytest.mark.parametrize(
    "left", ["checkpoints/last.pt", "checkpoints/best.previous.pt", "result.json", "metrics.jsonl"]
)
def test_what_a_run_has_left_is_not_written_over(left: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "r" / left
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    code, _, err = run("flowtrain", "model=affine", f"hydra.run.dir={tmp_path}/r")
    assert (code, "already holds a run" in err, path.read_text()) == (2, True, "kept")


def test_a_picture_that_cannot_be_drawn_does_not_fail_a_run(run: Run, tmp_path: Path) -> None:
    """Values whose squares leave float32: a density of them there is, but no figure."""
    generator = torch.Generator().manual_seed(0)
    np.save(tmp_path / "x.npy", 1e37 * torch.randn(60, 2, generator=generator, dtype=torch.float64).numpy())
    keys = ["data=array", f"data.path={tmp_path}/x.npy", "model=affine", "trainer.steps=4", "trainer.batch_size=8"]
    code, out, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/r")
    assert (code, out) == (0, f"{tmp_path}/r\n"), err
    assert (tmp_path / "r/result.json").exists()
    assert "no picture samples: cannot plot" in err


def test_the_picture_of_two_columns_of_levels_ends_where_they_do(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (60, 2)))
    keys = ["data=array", f"data.path={tmp_path}/x.npy", "data.levels=256", "model=affine", "trainer.batch_size=8"]
    code, _, err = run("flowtrain", *keys, "trainer.steps=4", f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    assert "no picture" not in err
    assert (tmp_path / "r/plots/samples.png").exists()
