"""Runs tolerate full disks, signals, other processes and files in their directory, and failing pictures."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MakeTrainer, ReadRows, Run

from flowtrain.runs.load import load
from flowtrain.runs.run_directory import holding
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")


def test_full_disk_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trainer: MakeTrainer, rows: ReadRows
) -> None:
    """A limit on file sizes makes writes fail as on a full disk."""
    run = trainer(tmp_path, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=16")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = run.train_step

    def filling() -> dict[str, Any]:
        # between steps 5 and 9, with one validation and two checkpoints
        small = 5 <= run.step < 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 if small else limits[0], limits[1]))
        return step()

    run.train_step = filling  # type: ignore[method-assign]
    try:
        run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.step == 16
    assert re.search(r"step 8: .*checkpoints/last\.pt", caplog.text)
    assert "metrics.jsonl" in caplog.text
    # no row or checkpoint is missing, and best.pt contains the best checkpoint
    undisturbed = trainer(tmp_path / "calm", "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=16")
    undisturbed.fit()
    assert rows(tmp_path) == rows(tmp_path / "calm")
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 16
    assert run.best is not None
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.best["step"]


def test_unwritable_directory_fails_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: MakeTrainer
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = trainer(tmp_path, "model=affine", "trainer.steps=4")
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space"):
        run.fit()


# the process ends after 60 s if the test fails before it kills the process
HOLD = """
import sys, time
from pathlib import Path
from flowtrain.runs.run_directory import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_run_directory_is_locked_until_its_process_ends(
    tmp_path: Path, run: Run, saved_run: Callable[..., Path]
) -> None:
    saved_run(tmp_path / "r")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "r")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=f"in use by process {process.pid} on"), holding(tmp_path / "r"):
        pass
    code, out, err = run("flowtrain", f"resume={tmp_path}/r")
    assert (code, out) == (2, "")
    assert f"in use by process {process.pid}" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = run("flowtrain", "model=affine", f"hydra.run.dir={tmp_path}/r")
    assert (code, "in use by process" in err) == (2, True)
    process.kill()
    process.communicate()
    # the lock file is left over
    assert (tmp_path / "r/.lock").exists()
    with holding(tmp_path / "r"):
        pass
    assert not (tmp_path / "r/.lock").exists()


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)],
)
def test_signals_save_and_print_the_resume_command(
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
    assert f"{signal.Signals(number).name} at step 4; resume with: flowtrain resume={tmp_path}/r" in err
    assert checkpoint.load(tmp_path / "r/checkpoints/last.pt")["step"] == 4
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0
    metrics = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if row["split"] == "train"] == list(range(1, 10))
    assert load(tmp_path / "r").log_prob(torch.zeros(1, 2)).isfinite().all()


@pytest.mark.usefixtures("without_figures")
def test_run_killed_before_its_first_checkpoint_restarts(run: Run, tmp_path: Path) -> None:
    """The killed run left an empty metrics file and partly written temporary files."""
    (tmp_path / "r/checkpoints").mkdir(parents=True)
    torn = [tmp_path / "r/checkpoints/.last.pt.77.88.tmp", tmp_path / "r/.metrics.jsonl.77.88.tmp"]
    for path in (*torn, tmp_path / "r/metrics.jsonl"):
        path.touch()
    keys = ["model=affine", "trainer.steps=4", "data.n_test=20", "data.n_val=20", f"hydra.run.dir={tmp_path}/r"]
    code, _, err = run("flowtrain", *keys)
    assert (code, (tmp_path / "r/result.json").exists()) == (0, True), err
    assert not any(path.exists() for path in torn)
    code, _, err = run("flowtrain", *keys)
    assert (code, "already contains a run" in err) == (2, True)


@pytest.mark.parametrize(
    "left", ["checkpoints/last.pt", "checkpoints/best.previous.pt", "result.json", "metrics.jsonl"]
)
def test_files_of_a_previous_run_are_not_overwritten(left: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "r" / left
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    code, _, err = run("flowtrain", "model=affine", f"hydra.run.dir={tmp_path}/r")
    assert (code, "already contains a run" in err, path.read_text()) == (2, True, "kept")


def test_failed_figure_does_not_fail_a_run(run: Run, tmp_path: Path) -> None:
    """The squares of the values exceed float32, so there is a density but no figure."""
    generator = torch.Generator().manual_seed(0)
    np.save(tmp_path / "x.npy", 1e37 * torch.randn(60, 2, generator=generator, dtype=torch.float64).numpy())
    keys = ["data=array", f"data.path={tmp_path}/x.npy", "model=affine", "trainer.steps=4", "trainer.batch_size=8"]
    code, out, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/r")
    assert (code, out) == (0, f"{tmp_path}/r\n"), err
    assert (tmp_path / "r/result.json").exists()
    assert "no picture of samples: cannot plot" in err


def test_figure_of_two_integer_columns_is_drawn(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (60, 2)))
    keys = ["data=array", f"data.path={tmp_path}/x.npy", "data.levels=256", "model=affine", "trainer.batch_size=8"]
    code, _, err = run("flowtrain", *keys, "trainer.steps=4", f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    assert "no picture" not in err
    assert (tmp_path / "r/plots/samples.png").exists()
