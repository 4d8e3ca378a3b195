"""Sweeps: a failed job does not stop the others, finished jobs are skipped, and a summary is written."""

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import Run
from helpers.files import normal
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from flowtrain.cli.sweep_jobs import forward_signal, job_directory
from flowtrain.runs import sweep_summary
from flowtrain.runs.run_directory import holding
from flowtrain.training.trainer import Trainer

SMALL = ["model=affine", "trainer.steps=4", "trainer.batch_size=16", "data.n_val=32", "data.n_test=32"]
MATPLOTLIB_AND_OTHERS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch, without_figures: None) -> None:
    """Skips Hydra's composition of all jobs in advance. Each job composes its config again when it starts."""
    monkeypatch.setattr(BasicSweeper, "validate_batch_is_legal", lambda self, batch: None)


def table(root: Path) -> list[dict[str, str]]:
    with (root / "sweep.csv").open() as f:
        return list(csv.DictReader(f))


def test_a_job_that_fails_leaves_the_others_alone(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", "-m", *SMALL, "trainer.lr=1e-2,-1,1e-3", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert "flowtrain: 1 (" in err
    assert "trainer.lr=-1" in err
    rows = table(tmp_path / "s")
    assert [row["job"] for row in rows[2:]] == ["1"]
    assert [row["state"] for row in rows] == ["done", "done", "failed"]
    assert rows[2]["error"].startswith("trainer.lr=-1: ")
    # the table is sorted by the validation NLL of the best checkpoint
    found = [float(row["val_nll"]) for row in rows[:2]]
    assert found == sorted(found)
    for row in rows[:2]:
        lines = (tmp_path / "s" / row["job"] / "metrics.jsonl").read_text().splitlines()
        assert min(r["nll"] for r in map(json.loads, lines) if r["split"] == "val") == float(row["val_nll"])
    assert out.endswith(f"{(tmp_path / 's/sweep.md').read_text()}\n{tmp_path}/s\n")
    assert (tmp_path / "s/sweep.png").exists()


@pytest.mark.usefixtures("composed_once")
def test_rerun_sweep_skips_finished_jobs_and_runs_missing_ones(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[..., None]
) -> None:
    keys = ["-m", *SMALL, "trainer.log_every=1", "trainer.lr=1e-2,1e-3", f"hydra.sweep.dir={tmp_path}/s"]
    begin = Trainer.__init__

    def killed(self: Trainer, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        if self.settings.lr == 1e-3:
            stop_at(self, 2)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "__init__", killed)
        assert run("flowtrain", *keys)[0] == 0
    whole = (tmp_path / "s/0/result.json").stat()
    # these changes simulate a job that was killed before its evaluation
    (tmp_path / "s/1/result.json").unlink()
    assert sweep_summary.read(tmp_path / "s")[1].state == "stopped"
    # the sweep has another value and another order, so that the numbers of the jobs differ
    keys[-2] = "trainer.lr=3e-3,1e-3,1e-2"
    assert run("flowtrain", *keys)[0] == 0
    rows = {row["trainer.lr"]: row for row in table(tmp_path / "s")}
    assert {lr: (row["job"], row["steps"]) for lr, row in rows.items()} == {
        "0.01": ("0", "4"), "0.001": ("1", "4"), "0.003": ("0_1", "4"),
    }  # fmt: skip
    assert (tmp_path / "s/0/result.json").stat() == whole
    trained = [json.loads(line) for line in (tmp_path / "s/1/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in trained if row["split"] == "train"] == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if p.is_dir()) == ["0", "0_1", "1"]


@pytest.mark.usefixtures("composed_once")
def test_unexpected_error_of_a_job_is_recorded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Trainer) -> None:
        raise ZeroDivisionError("a mistake of ours")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", broken)
        code, _, err = run("flowtrain", "-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert err.count("Traceback") == 2
    assert "failed: ZeroDivisionError: a mistake of ours" in (tmp_path / "s/sweep.md").read_text()
    assert run("flowtrain", "-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")[0] == 0
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "done"]


@pytest.mark.usefixtures("composed_once")
def test_signal_stops_the_sweep_and_writes_the_summary(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def signalled(self: Trainer) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    code, out, _ = run("flowtrain", "-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 143
    assert [row["state"] for row in table(tmp_path / "s")] == ["stopped"]
    assert out.splitlines()[-1] == f"{tmp_path}/s"


def test_signal_handler_of_a_launcher_is_called() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        forward_signal(signal.SIGUSR2)
        # this signal has no handler
        forward_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


def test_every_job_has_its_own_directory(tmp_path: Path) -> None:
    def there(name: str, *given: str) -> Path:
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra/overrides.yaml").write_text("".join(f"- {o}\n" for o in given))
        return tmp_path / name

    zero, one = there("0", "seed=0", "trainer.lr=0.1"), there("1", "seed=1", "trainer.lr=0.1")
    (tmp_path / "2").mkdir()
    assert job_directory(tmp_path, tmp_path / "0", ["seed=0", "trainer.lr=0.1"]) == zero
    assert job_directory(tmp_path, tmp_path / "2", ["seed=1", "trainer.lr=0.1"]) == one
    assert not (tmp_path / "2").exists()
    assert job_directory(tmp_path, tmp_path / "1", ["seed=7"]) == tmp_path / "1_1"
    (tmp_path / "3").mkdir()
    assert job_directory(tmp_path, tmp_path / "3", ["seed=7"]) == tmp_path / "3"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
@MATPLOTLIB_AND_OTHERS
@pytest.mark.slow
def test_other_launchers_run_the_jobs(launcher: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs run in other processes, which render figures. One column has the fewest figures."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    if launcher == "submitit_local":
        # submitit checks only once a second whether a job has ended
        sleep = time.sleep
        monkeypatch.setattr("submitit.core.core._time", SimpleNamespace(sleep=lambda s: sleep(0.05), time=time.time))
    np.save(tmp_path / "x.npy", normal(60, 1))
    keys = ["data=array", f"data.path={tmp_path}/x.npy", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}/s"]
    code, out, _ = run("flowtrain", "-m", *SMALL[:3], "trainer.lr=-1,1e-3", *keys)
    assert code == 1
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "failed"]
    assert out.splitlines()[-1] == f"{tmp_path}/s"


@MATPLOTLIB_AND_OTHERS
@pytest.mark.usefixtures("without_figures")
def test_a_sweeper_looks_for_the_least_validation_nll(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    keys = ["hydra.sweeper.n_trials=3", "++hydra.sweeper.params={trainer.lr: 'choice(0.1,-1,0.01)'}"]
    code, _, err = run("flowtrain", "experiment=search_moons", *SMALL, *keys, f"hydra.sweep.dir={tmp_path}/s")
    rows = table(tmp_path / "s")
    assert len(rows) == 3, err
    assert code == any(row["state"] == "failed" for row in rows)
    best = (tmp_path / "s/optimization_results.yaml").read_text()
    assert f"best_value: {rows[0]['val_nll']}" in best


def test_without_the_plugin_the_extra_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore

    stored = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(stored, "joblib.yaml", raising=False)
    code, out, err = run("flowtrain", "-m", "seed=1,2", "hydra/launcher=joblib", f"hydra.sweep.dir={tmp_path}/s")
    assert (code, out) == (2, "")
    assert err == "flowtrain: hydra/*=joblib is an extra: pip install 'flowtrain[joblib]'\n"


@pytest.mark.usefixtures("composed_once")
def test_foreign_files_and_damaged_results_are_ignored(run: Run, tmp_path: Path) -> None:
    """Foreign files and damaged results in the directory of a sweep stop neither jobs nor the summary."""
    for name, content in (("foreign", b"\0\xff["), ("list", b"{a: 1}")):
        (tmp_path / "s" / name / ".hydra").mkdir(parents=True)
        (tmp_path / "s" / name / ".hydra/overrides.yaml").write_bytes(content)
    keys = ["-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s"]
    assert run("flowtrain", *keys)[0] == 0
    for damaged in ('{"val_nll": ', "[]", "\0"):
        (tmp_path / "s/0/result.json").write_text(damaged)
        code, _, err = run("flowtrain", *keys)
        assert code == 1
        assert "s/0/result.json is damaged" in err
        assert [(row["job"], row["state"]) for row in table(tmp_path / "s")] == [("1", "done"), ("0", "failed")]
    (tmp_path / "s/0/result.json").unlink()
    assert run("flowtrain", *keys)[0] == 0
    # a result.json without the keys of training
    (tmp_path / "s/0/result.json").write_text('{"nll": 2.5, "nll_stderr": 0.1}')
    assert run("flowtrain", *keys)[0] == 0
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "done"]


@pytest.mark.usefixtures("composed_once")
def test_jobs_of_another_process_are_skipped(run: Run, tmp_path: Path) -> None:
    with holding(tmp_path / "s/0"):
        code, _, err = run("flowtrain", "-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert "is in use by process" in err
    assert not (tmp_path / "s/0/error.txt").exists()
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "stopped"]


@pytest.mark.usefixtures("composed_once")
def test_custom_job_directories(run: Run, tmp_path: Path) -> None:
    keys = ["-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s"]
    assert run("flowtrain", *keys, "hydra.sweep.subdir=a/${hydra.job.num}")[0] == 0
    assert sorted(row["job"] for row in table(tmp_path / "s")) == ["a/0", "a/1"]
    # the jobs are found under other names
    assert run("flowtrain", *keys)[0] == 0
    assert sorted(row["job"] for row in table(tmp_path / "s")) == ["a/0", "a/1"]
    code, out, err = run("flowtrain", *keys, "hydra.sweep.subdir=.")
    assert code == 2
    assert err.startswith("flowtrain: hydra.sweep.subdir: ")
    assert len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"], out


def test_key_missing_from_one_model_of_the_sweep(run: Run, tmp_path: Path) -> None:
    keys = ["model=realnvp,affine", "model.layers=2", f"hydra.sweep.dir={tmp_path}/s"]
    code, _, err = run("flowtrain", "-m", *keys)
    assert code == 2
    assert err.startswith("flowtrain: with model=affine there is no key model.layers; ")
    code, _, err = run("flowtrain", "-m", "model=choice(realnvp,affine)", "model.nonsense=1", keys[-1])
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("flowtrain: there is no key model.nonsense; ")


def test_sweep_of_invalid_jobs_leaves_no_files(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", "-m", *SMALL, "trainer.lr=-1,-2")
    assert (code, out) == (2, "")
    assert err.count("trainer.lr=-") == 4
    assert list(tmp_path.iterdir()) == []
