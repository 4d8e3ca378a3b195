"""Data parallelism: two ranks give the result of one process, and a failure on one rank has the same effect on both."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.densities import BANANA_LOG_Z
from helpers.processes import DATA, EQUAL, fit_outcome, fit_with_unused_parameters, run_all, trainer

from flowtrain.training import checkpoint
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def rank_results(folder: Path) -> Found:
    """Returns the results of both ranks."""
    # the fork server imports the modules once, for both ranks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowtrain.cli.sweep_jobs", "flowtrain.cli.evaluate_run", "torch._dynamo"])
    processes = [context.Process(target=run_all, args=(rank, 2, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal_runs(a: dict[str, Any], b: dict[str, Any], atol: float = 0.0) -> None:
    assert a["state"].keys() == b["state"].keys()
    for key, value in a["state"].items():
        torch.testing.assert_close(value, b["state"][key], rtol=atol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_give_the_result_of_one_process(name: str, rank_results: Found, tmp_path: Path) -> None:
    """Each of the 12 steps has a batch of 17 rows: 8 on one rank and 9 on the other."""
    alone = fit_outcome(trainer(tmp_path, *EQUAL[name], data=DATA.get(name)))
    first, second = rank_results[0][name], rank_results[1][name]
    assert (first["error"], first["step"]) == (None, 12)
    assert_equal_runs(first, second)
    assert_equal_runs(first, alone, atol=1e-8)
    assert len(first["rows"]) == len(alone["rows"]) == 14
    for row, right in zip(first["rows"], alone["rows"], strict=True):
        assert (row["step"], row["split"]) == (right["step"], right["split"])
        assert row["nll"] == pytest.approx(right["nll"], abs=1e-8)
        if row["split"] == "train":
            assert row["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-6)
            assert row["lr"] == right["lr"]


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_failure_on_one_rank_fails_on_all(policy: str, rank_results: Found, folder: Path) -> None:
    first, second = (each[policy] for each in rank_results)
    assert_equal_runs(first, second)
    assert first["error"] == second["error"]
    # the rank with the bad batch saves it
    assert [path.name for path in (folder / policy / "failed").iterdir()] == ["step_000006_rank1.npz"]
    steps = [row["step"] for row in first["rows"] if row["split"] == "train"]
    if policy == "stop":
        kind, message = first["error"]
        assert kind == "NonFiniteError"
        assert message.startswith("step 6: rank 1: the loss is nan; the weights were not touched. The batch itself")
        assert f"{folder}/stop/failed/step_000006_rank1.npz" in message
        assert (first["step"], steps) == (5, [1, 2, 3, 4, 5])
    else:
        assert first["error"] is None
        assert steps == [s for s in range(1, 13) if policy == "rewind" or s != 6]


def test_failed_solve_on_one_rank_stops_all_ranks(rank_results: Found) -> None:
    assert [each["unsolved"]["step"] for each in rank_results] == [6, 6]
    kind, message = rank_results[0]["unsolved"]["error"]
    assert kind == "SolverError"
    assert message.startswith("step 7: rank 1: the field is too stiff. Its batch is in ")
    assert rank_results[1]["unsolved"]["error"] == (kind, message)


def test_ranks_share_the_buffer_of_annealed_importance_sampling(rank_results: Found) -> None:
    """Ranks draw different noise, so the weights differ from the weights of one process."""
    first, second = (each["forward_kl"] for each in rank_results)
    assert (first["error"], first["step"]) == (None, 12)
    assert_equal_runs(first, second)
    assert first["rows"] == second["rows"]
    assert len(first["buffer"]["x"]) == 300
    for key, value in first["buffer"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["buffer"][key])), key
    # each rank has drawn its half of the samples of a run
    assert len(first["buffer"]["x"].unique(dim=0)) == 300


def test_failed_annealing_on_one_rank_skips_the_step_on_all(rank_results: Found) -> None:
    first, second = (each["annealing"] for each in rank_results)
    assert_equal_runs(first, second)
    assert (first["error"], first["step"]) == (None, 12)
    steps = [row["step"] for row in first["rows"] if row["split"] == "train"]
    assert steps == [s for s in range(1, 13) if s != 9]


def test_signal_to_one_rank_stops_all_ranks_at_the_same_step(rank_results: Found, folder: Path) -> None:
    assert [(each["signal"]["step"], each["signal"]["signal"]) for each in rank_results] == [(7, 15), (7, 15)]
    assert checkpoint.load(folder / "signal/checkpoints/last.pt")["step"] == 7


def test_running_statistics_are_equal_on_all_ranks(rank_results: Found) -> None:
    assert_equal_runs(rank_results[0]["norm"], rank_results[1]["norm"])
    assert any("running" in key or "mean" in key for key in rank_results[0]["norm"]["state"])
    # the step failed on the second rank only
    assert all(value.isfinite().all() for value in rank_results[0]["norm"]["state"].values())


def test_parameters_without_gradient_are_unchanged(rank_results: Found, tmp_path: Path) -> None:
    """Weight decay would change parameters without a gradient.

    Ranks draw different noise, so the other weights differ from the weights of one process.
    """
    alone = fit_with_unused_parameters(tmp_path)
    assert alone["without"]
    assert_equal_runs(rank_results[0]["unused"], rank_results[1]["unused"])
    for run in (alone, rank_results[0]["unused"], rank_results[1]["unused"]):
        assert (run["error"], run["step"], run["without"]) == (None, 12, alone["without"])
        for name in alone["without"]:
            assert torch.equal(run["state"][name], run["begun"][name])
            assert run["begun"][name].any()
    # a gradient that only one rank has gives the same update on both
    assert rank_results[0]["partly"] == rank_results[1]["partly"] == [[2.0, 2.0], [4.0, 4.0], None]


def test_ranks_of_a_target_have_equal_weights(rank_results: Found) -> None:
    """Ranks draw different base points, so the weights differ from the weights of one process."""
    first, second = (each["target"] for each in rank_results)
    assert (first["error"], first["step"]) == (None, 12)
    assert_equal_runs(first, second)
    assert first["rows"] == second["rows"]
    validations = [row["nll"] for row in first["rows"] if row["split"] == "val"]
    assert len(validations) == 2
    assert all(-BANANA_LOG_Z < nll < 5 for nll in validations)


def test_collective_operations(rank_results: Found) -> None:
    for rank, each in enumerate(rank_results):
        error, none, summed, largest, first, both, shares = each["collectives"]
        assert (error, none) == ("rank 1: stiff", None)
        assert (summed, largest, first, both) == ([2.0, 1.0], [1.0, 0.0], ("of", 0), [0, 1])
        ends = [(0, 0, 1), (0, 1, 2), (0, 2, 5)]
        assert shares == [slice(end[rank], end[rank + 1]) for end in ends]


def test_one_process_resumes_a_two_rank_run(rank_results: Found, folder: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(folder / "signal/checkpoints/last.pt")
    rest = fit_outcome(trainer(tmp_path / "rest", "model=affine", saved=saved))
    whole = fit_outcome(trainer(tmp_path / "whole", "model=affine"))
    assert rest["step"] == 12
    assert_equal_runs(rest, whole, atol=1e-8)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert (ranks.rank(), ranks.size(), ranks.share(5)) == (0, 1, slice(0, 5))
    error = ConfigError("x")
    assert ranks.gather_errors(error) is error
    assert ranks.device(torch.device("cpu")) == torch.device("cpu")
    assert ranks.first_to_report("x")
    assert ranks.saved_run_dir() is None


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
LAUNCHED = ["model=affine", "trainer.steps=60", "trainer.val_every=20", "trainer.log_every=1", "trainer.batch_size=16"]
LAUNCHED += ["data.n_val=20", "data.n_test=50", "trainer.plot_every=null"]


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(tmp_path: Path) -> None:
    """After SIGKILL of a rank, torchrun starts again. The ranks find the run directory, although its name is a time."""
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    killed = tmp_path / "killed.py"
    # skip the figures, which would take most of the time
    killed.write_text(
        "import os, signal\n"
        "import pytest\n"
        "from helpers.figures import skip_figures\n"
        "from flowtrain.cli import train\n"
        "from flowtrain.training.trainer import Trainer\n"
        "step = Trainer.train_step\n"
        "def killed(self):\n"
        "    if self.step == 30 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "Trainer.train_step = killed\n"
        "skip_figures(pytest.MonkeyPatch())\n"
        "train.main()\n"
    )
    begun = time.time()
    done = subprocess.run(
        [*TORCHRUN, str(killed), *LAUNCHED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.stderr, time.time() - begun)
    (run_dir,) = (tmp_path / "outputs").glob("*/*")
    assert done.stdout.splitlines()[-1] == str(run_dir)
    trained = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(trained) == 60
    assert (run_dir / "result.json").exists()
    assert "another process of this run has ended" in done.stderr
