"""Sweeps: what fails leaves the rest alone, what is done is not done again, and the summary says what was found."""

import csv
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Run

from flowtrain.cli.sweep_jobs import place, stopped
from flowtrain.runs import sweep_summary
from flowtrain.runs.lock import holding
from flowtrain.training.trainer import Trainer

SMALL = ["model=affine", "trainer.steps=4", "trainer.batch_size=16", "data.n_val=32", "data.n_test=32"]
MATPLOTLIB_AND_OTHERS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def table(root: Path) -> list[dict[str, str]]:
    with (root / "sweep.csv").open() as f:
        return list(csv.DictReader(f))


def test_a_job_that_fails_leaves_the_others_alone(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", "-m", *SMALL, "trainer.lr=1e-2,-1,1e-3", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert "flowtrain: 1 (" in err
    assert "trainer.lr=-1: give a number greater than 0" in err
    rows = table(tmp_path / "s")
    assert [row["job"] for row in rows[2:]] == ["1"]
    assert [row["state"] for row in rows] == ["done", "done", "failed"]
    assert rows[2]["error"] == "trainer.lr=-1: give a number greater than 0"
    # sorted by the validation NLL, which is the one of the best checkpoint
    found = [float(row["val_nll"]) for row in rows[:2]]
    assert found == sorted(found)
    for row in rows[:2]:
        lines = (tmp_path / "s" / row["job"] / "metrics.jsonl").read_text().splitlines()
        assert min(r["nll"] for r in map(json.loads, lines) if r["split"] == "val") == float(row["val_nll"])
    assert out.endswith(f"{(tmp_path / 's/sweep_summary.md').read_text()}\n{tmp_path}/s\n")
    assert (tmp_path / "s/sweep.png").exists()


def test_run_again_it_does_what_is_missing(
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
    # as if it had been killed before it was evaluated
    (tmp_path / "s/1/result.json").unlink()
    assert sweep_summary.read(tmp_path / "s")[1].state == "stopped"
    # one more value, and another order: the jobs have other numbers now
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


def test_an_error_of_ours_is_kept_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_signal_stops_the_sweep_and_sums_up(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def signalled(self: Trainer) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    code, out, _ = run("flowtrain", "-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 143
    assert [row["state"] for row in table(tmp_path / "s")] == ["stopped"]
    assert out.splitlines()[-1] == f"{tmp_path}/s"


def test_the_handler_of_a_launcher_hears_of_the_signal() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        stopped(signal.SIGUSR2)
        # no one waits for this one
        stopped(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


def test_a_place_for_every_job(tmp_path: Path) -> None:
    def there(name: str, *given: str) -> Path:
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra/overrides.yaml").write_text("".join(f"- {o}\n" for o in given))
        return tmp_path / name

    zero, one = there("0", "seed=0", "trainer.lr=0.1"), there("1", "seed=1", "trainer.lr=0.1")
    (tmp_path / "2").mkdir()
    assert place(tmp_path, tmp_path / "0", ["seed=0", "trainer.lr=0.1"]) == zero
    assert place(tmp_path, tmp_path / "2", ["seed=1", "trainer.lr=0.1"]) == one
    assert not (tmp_path / "2").exists()
    assert place(tmp_path, tmp_path / "1", ["seed=7"]) == tmp_path / "1_1"
    (tmp_path / "3").mkdir()
    assert place(tmp_path, tmp_path / "3", ["seed=7"]) == tmp_path / "3"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
@MATPLOTLIB_AND_OTHERS
def test_other_launchers(launcher: str, run: Run, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    keys = [f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}/s"]
    code, out, _ = run("flowtrain", "-m", *SMALL, "trainer.lr=-1,1e-3", *keys)
    assert code == 1
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "failed"]
    assert out.splitlines()[-1] == f"{tmp_path}/s"


@MATPLOTLIB_AND_OTHERS
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


def test_files_of_others_and_damaged_results(run: Run, tmp_path: Path) -> None:
    """In the directory of a sweep: neither stops a job, nor the summary."""
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
    # floweval may have written over it
    (tmp_path / "s/0/result.json").write_text('{"nll": 2.5, "nll_stderr": 0.1}')
    assert run("flowtrain", *keys)[0] == 0
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "done"]


def test_what_another_process_holds_is_left_to_it(run: Run, tmp_path: Path) -> None:
    with holding(tmp_path / "s/0"):
        code, _, err = run("flowtrain", "-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert "is in use by process" in err
    assert not (tmp_path / "s/0/error.txt").exists()
    assert [row["state"] for row in table(tmp_path / "s")] == ["done", "stopped"]


def test_directories_of_the_users_choice(run: Run, tmp_path: Path) -> None:
    keys = ["-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s"]
    assert run("flowtrain", *keys, "hydra.sweep.subdir=a/${hydra.job.num}")[0] == 0
    assert sorted(row["job"] for row in table(tmp_path / "s")) == ["a/0", "a/1"]
    # found again under other names
    assert run("flowtrain", *keys)[0] == 0
    assert sorted(row["job"] for row in table(tmp_path / "s")) == ["a/0", "a/1"]
    code, out, err = run("flowtrain", *keys, "hydra.sweep.subdir=.")
    assert code == 2
    assert err.startswith("flowtrain: hydra.sweep.subdir: every job needs a directory of its own")
    assert len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"], out


def test_a_key_that_one_model_of_several_has_not(run: Run, tmp_path: Path) -> None:
    keys = ["model=realnvp,affine", "model.layers=2", f"hydra.sweep.dir={tmp_path}/s"]
    code, _, err = run("flowtrain", "-m", *keys)
    assert code == 2
    assert err.startswith("flowtrain: with model=affine there is no key model.layers; ")
    code, _, err = run("flowtrain", "-m", "model=choice(realnvp,affine)", "model.nonsense=1", keys[-1])
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("flowtrain: there is no key model.nonsense; ")


def job(name: str, nll: float | None, **keys: str) -> sweep_summary.Job:
    return sweep_summary.Job(
        name, keys, {} if nll is None else {"val_nll": nll, "nll": nll, "nll_stderr": 0.01, "nfe": 20}, None
    )


def test_a_sweep_of_nothing_but_mistakes_leaves_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", "-m", *SMALL, "trainer.lr=-1,-2")
    assert (code, out) == (2, "")
    assert err.count("trainer.lr=-") == 4
    assert list(tmp_path.iterdir()) == []


def test_which_runs_are_as_good_as_the_best() -> None:
    def measured(name: str, nll: float, error: float | None) -> sweep_summary.Job:
        return sweep_summary.Job(name, {"lr": name}, {"val_nll": nll, "val_nll_stderr": error}, None)

    # two standard errors of the difference are 0.0283 beside the best's 0.01, where the other's is the same
    jobs = [measured("a", 2.0, 0.01), measured("b", 2.028, 0.01), measured("c", 2.029, 0.01), measured("d", 2.2, 0.2)]
    assert sweep_summary.as_good(jobs) == {"a", "b", "d"}
    lines = sweep_summary.as_markdown(jobs, ["lr"]).splitlines()
    assert [line.count("*") for line in lines[2:6]] == [1, 1, 0, 1]
    assert "2.000 +- 0.010" in lines[2]
    assert "standard errors" in lines[-1]
    rows = list(csv.DictReader(sweep_summary.as_csv(jobs, ["lr"]).splitlines()))
    assert [row["as_good_as_best"] for row in rows] == ["true", "true", "false", "true"]
    # of an older flowtrain, and of one run alone
    old = [measured("a", 2.0, None), measured("b", 2.0001, None)]
    assert sweep_summary.as_good(old) == {"a"}
    assert "*" not in sweep_summary.as_markdown(old, ["lr"])
    assert sweep_summary.as_good([sweep_summary.Job("0", {}, {}, "failed")]) == sweep_summary.as_good([]) == set()


def test_the_validation_error_is_that_of_the_best_step(run: Run, tmp_path: Path) -> None:
    assert run("flowtrain", *SMALL, "hydra.run.dir=r", "trainer.val_every=1", "trainer.lr=0.1")[0] == 0
    result = json.loads((tmp_path / "r/result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    (best,) = [row for row in rows if row["split"] == "val" and row["nll"] == result["val_nll"]]
    assert result["val_nll_stderr"] == best["nll_stderr"]
    assert run("floweval", "r", "split=val")[0] == 0
    scored = json.loads((tmp_path / "r/eval-val.json").read_text())
    assert scored["n"] == 32
    assert result["val_nll"] == pytest.approx(scored["nll"], rel=1e-5)
    assert result["val_nll_stderr"] == pytest.approx(scored["nll_stderr"], rel=1e-4)


def test_what_is_drawn_against_a_key() -> None:
    jobs = [job("0", 2.5, lr="1e-2", seed="0"), job("1", 2.4, lr="1e-3", seed="0"), job("2", 2.6, lr="1e-2", seed="1")]
    assert sweep_summary.swept(jobs) == ["lr", "seed"]
    found = sweep_summary.against(jobs, "lr")
    assert (found.values, found.numbers) == (["1e-3", "1e-2"], [1e-3, 1e-2])
    assert found.found["val_nll"] == [[2.4], [2.5, 2.6]]
    assert "solver_error" not in found.found
    named = sweep_summary.against(
        [job("0", 2.5, model="realnvp"), job("1", 2.4, model="affine"), job("2", 2.4)], "model"
    )
    assert (named.values, named.numbers) == (["affine", "default", "realnvp"], None)


def test_a_table_of_nothing_but_failures(tmp_path: Path) -> None:
    failed = sweep_summary.Job("0", {"seed": "1"}, {}, "one|two\nthe last line")
    lines = sweep_summary.as_markdown([failed], ["seed"]).splitlines()
    assert lines == ["| job | seed |  |", "| --- | --- | --- |", "| 0 | 1 | failed: the last line |"]
    assert sweep_summary.write_summary(tmp_path) == ("no job was begun", 0)
    odd = [
        sweep_summary.Job("0", {"seed": "123456781", "x": "a|b\nc"}, {}, None),
        sweep_summary.Job("1", {"seed": "2"}, {}, None),
    ]
    assert sweep_summary.as_markdown(odd, ["seed", "x"]).splitlines()[2].startswith(r"| 0 | 123456781 | a\|b c |")
    assert math.isinf(failed.val_nll)
