"""Short fuzzing and kill tests. scripts/torture.py runs the same tests for longer."""

import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harm.arrays import random_file
from harm.checkpoints import Original, load_verdict, read_original
from harm.compare import differences, value_differences
from harm.configs import companions, options, random_config, small_run, write_files
from harm.damage import damaged
from harm.forks import Outcome, judge
from harm.kills import MODELS, RUN, Moment, Whole, kills
from harm.part import Part, Verdict
from helpers import MakeTrainer, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.tables.array import ArrayData
from flowtrain.runs.auto_settings import resolve_auto
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings, takes_teacher
from flowtrain.runs.components import resolve_components
from flowtrain.runs.tails import resolve_df
from flowtrain.utils.errors import FlowtrainError

pytestmark = pytest.mark.usefixtures("float32")

TORTURE = Path(__file__).resolve().parents[2] / "scripts" / "torture.py"
BUDGET = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
RANDOM = st.randoms(use_true_random=False)
NUMBERS = itertools.count()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates a working directory with the files that random configs refer to."""
    monkeypatch.setenv("FLOWTRAIN_DATA", str(write_files(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Kills


@pytest.mark.slow
def test_killed_runs_resume_to_the_uninterrupted_result(run: Run, tmp_path: Path) -> None:
    keys = [*RUN, *MODELS["realnvp"], "trainer.steps=60"]
    code, _, err = run("flowtrain", *keys, f"hydra.run.dir={tmp_path}/whole")
    assert code == 0, err
    part = Part("kills", 3, time.monotonic() + 300, tmp_path, random.Random(0))
    moments = [Moment("save", 0.002, rows=25), Moment("row", 0.001, rows=8), Moment("last row", 0.2)]
    kills(Whole(keys, tmp_path / "whole", steps=60, trains=3, ends=5), part, iter(moments))
    assert (part.tried, part.wrong) == (3, [])


def test_run_comparison_detects_any_difference(tmp_path: Path, trainer: MakeTrainer) -> None:
    a, b = torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.nan])
    assert value_differences({"x": [a, 1.0]}, {"x": [b, 1.0], "seconds": 3}, "at") == []
    assert value_differences({"x": [-a, 1.0]}, {"x": [b, 2.0]}, "at") == ["at:x:0 differs", "at:x:1 differs"]
    assert value_differences({"x": 1}, {"x": 1.0}, "at") == ["at:x is a int, not a float"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer(tmp_path / name, "model=affine", "trainer.steps=4", f"seed={seed}").fit()
        (tmp_path / name / "result.json").write_text("{}")
    assert [d for d in differences(tmp_path / "a", tmp_path / "b") if "config" not in d] == []
    assert "metrics.jsonl differs" in differences(tmp_path / "a", tmp_path / "c")


# Checkpoints


@pytest.fixture(scope="module")
def original_checkpoint(tmp_path_factory: pytest.TempPathFactory, trainer: MakeTrainer) -> tuple[Path, Original]:
    """Trains a run. Returns a copy of a checkpoint without the previous checkpoint beside it, and its content."""
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=4").fit()
    path = folder / "alone.pt"
    path.write_bytes((folder / "checkpoints/last.pt").read_bytes())
    return path, read_original(path)


@settings(max_examples=100, **BUDGET)
@given(rng=RANDOM)
def test_damaged_checkpoints_are_refused_or_harmless(
    original_checkpoint: tuple[Path, Original], rng: random.Random
) -> None:
    path, whole = original_checkpoint
    kind, content = damaged(rng, whole.content)
    path.write_bytes(content)
    verdict = load_verdict(path, whole)
    assert not verdict.wrong, (kind, verdict)


def test_wrongly_loaded_checkpoint_is_detected(original_checkpoint: tuple[Path, Original]) -> None:
    path, whole = original_checkpoint
    path.write_bytes(whole.content)
    assert load_verdict(path, whole) == ("unharmed", False)
    name = next(iter(whole.state))
    other = {**whole.state, name: torch.nextafter(whole.state[name], torch.tensor(9.0))}
    assert load_verdict(path, whole._replace(state=other)).wrong
    assert load_verdict(path, whole._replace(log_p=whole.log_p + 1)).wrong


# Configs


@pytest.mark.slow
def test_every_option_composes_and_builds(files: Path) -> None:
    # `auto` can only be resolved with data
    for group, name in (option for option in options() if option[1] != "auto"):
        config = compose_defaults(small_run({**companions({group: name}), group: name}))
        data = build_data(config)
        config = resolve_components(resolve_df(resolve_auto(config, data.n_train, data.event_shape), data), data)
        build_settings(config)
        flow = build_flow(config, data.samples)
        build_objective(config, flow, flow if takes_teacher(config) else None)


@settings(max_examples=10, **BUDGET)
@given(rng=RANDOM)
@pytest.mark.slow
def test_random_configs_train_or_are_refused(run: Run, files: Path, rng: random.Random) -> None:
    run_dir = files / f"run{next(NUMBERS)}"
    arguments = random_config(rng)
    verdict = judge(Outcome(*run("flowtrain", *arguments, f"hydra.run.dir={run_dir}")), run_dir)
    assert not verdict.wrong, (arguments, verdict.words)


def test_wrong_exit_code_or_output_is_detected(tmp_path: Path) -> None:
    message = "flowtrain: seed=x: give a whole number\n"
    (tmp_path / "flowtrain.log").write_text("2026-01-01 INFO reading\nsecond line\n")
    assert judge(Outcome(2, "", message), tmp_path) == ("refused", False)
    assert judge(Outcome(1, "", "reading\nsecond line\n" + message), tmp_path) == ("failed", False)
    bad = [
        Outcome(None, "", message), Outcome(-11, "", message), Outcome(2, "x", message), Outcome(2, "", ""),
        Outcome(2, "", message + message), Outcome(2, "", "Warning\n" + message), Outcome(0, "", ""),
        Outcome(1, "", "Traceback (most recent call last):\n"), Outcome(3, "", message),
    ]  # fmt: skip
    assert all(judge(outcome, tmp_path).wrong for outcome in bad)
    (tmp_path / "result.json").write_text('{"nll": null}')
    assert judge(Outcome(0, "", ""), tmp_path).wrong
    (tmp_path / "result.json").write_text('{"nll": 2.5}')
    assert judge(Outcome(0, "", ""), tmp_path) == ("trained", False)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert judge(Outcome(2, "", message), tmp_path).wrong


# Array files


@settings(max_examples=300, **BUDGET)
@given(rng=RANDOM)
def test_odd_and_damaged_files_are_read_or_refused(tmp_path: Path, rng: random.Random) -> None:
    name, content = random_file(rng)
    (tmp_path / name).write_bytes(content)
    verdict = read_verdict(tmp_path / name)
    assert not verdict.wrong, (name, verdict.words)
    (tmp_path / name).unlink()


def read_verdict(path: Path) -> Verdict:
    try:
        data = ArrayData(str(path))
    except FlowtrainError as e:
        return Verdict(str(e), wrong=len(str(e).splitlines()) > 1)
    return Verdict("read", wrong=not data.train_batch(0, 8, 0).isfinite().all())


# The script


@pytest.mark.slow
def test_script_prints_a_table(tmp_path: Path) -> None:
    few = ["--kills", "1", "--corruptions", "5", "--configs", "3", "--arrays", "5", "--minutes", "5"]
    environment: dict[str, Any] = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(TORTURE), *few]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["part", "kills of realnvp", "kills of ffjord", "corruptions", "configs", "array files"], done.stderr
    assert done.returncode == (1 if "Failures, kept" in done.stdout else 0)
