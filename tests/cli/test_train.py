"""The commands from training to samples: files, last line, repeatability."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import COMMANDS, SMALL, TINY, Run

import flowtrain
from flowtrain.cli.config_files import compose_defaults
from flowtrain.training import checkpoint
from flowtrain.utils.files import config_dir

FAST = {
    "nsf": ["model.hidden=[8]", "model.layers=2"],
    "maf": ["model.hidden=[8]", "model.layers=2"],
    "affine": [],
    "realnvp": ["model.hidden=[8]", "model.layers=2"],
    "ffjord": TINY,
}


def result(run_dir: str | Path, name: str = "result.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(run_dir) / name).read_text())
    return content


EVALUATION = [
    "nll", "nll_stderr", "n", "split", "step", "bits_per_dim", "entropy", "kl", "kl_stderr", "trace", "noise_samples",
    "dequantization_samples", "solver", "nfe", "solver_error", "roundtrip_error", "seconds", "device",
    "dtype", "total_seconds", "budget", "checks", "calibration", "ood", "baselines", "row_error", "headline",
]  # fmt: skip


def test_train_evaluate_sample(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("flowtrain", *SMALL, *TINY)
    assert code == 0
    run_dir = Path(out.splitlines()[-1])
    written = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}
    assert written == {
        ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "flowtrain.log", "metrics.jsonl",
        "checkpoints/best.pt", "checkpoints/last.pt", "checkpoints/last.previous.pt", "plots/samples.png",
        "plots/curves.png", "plots/calibration.png", "plots/transport.png", "plots/paths.png", "result.json",
    }  # fmt: skip
    trained = result(run_dir)
    assert list(trained) == [*EVALUATION, "train_seconds", "steps", "val_nll", "val_nll_stderr"]
    assert trained["steps"] == 4

    code, out, _ = run("floweval", f"ckpt={run_dir}")
    assert code == 0
    assert "NLL" in out
    evaluated = result(run_dir, "eval.json")
    assert list(evaluated) == EVALUATION
    assert evaluated["nll"] == pytest.approx(trained["nll"], abs=1e-6)
    assert evaluated["kl"] == pytest.approx(trained["kl"], abs=1e-6)
    assert evaluated["kl"] > -3 * evaluated["kl_stderr"]

    code, out, _ = run("flowsample", f"ckpt={run_dir}/checkpoints/best.pt", "n=30", "seed=3", "out=x/s.npy")
    assert code == 0
    samples = np.load(tmp_path / "x/s.npy")
    assert samples.shape == (30, 2)
    assert samples.dtype == np.float32
    assert (tmp_path / "x/s.png").exists()
    flow = flowtrain.load(run_dir)
    torch.manual_seed(3)
    z = torch.randn(30, 2)
    assert torch.allclose(flow.inverse(torch.from_numpy(samples)), z, atol=2e-2)
    run("flowsample", f"ckpt={run_dir}", "n=30", "seed=3", "out=again.npy")
    assert np.array_equal(np.load(tmp_path / "again.npy"), samples)


def test_floweval_changes_solver_split_and_data(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("flowtrain", *SMALL, *TINY)
    ckpt = f"ckpt={out.splitlines()[-1]}"
    changes = ["split=val", "solver=rk4", "solver.step_size=0.1", "data=circles", "data.n_val=30", "out=e.json"]
    assert run("floweval", ckpt, *changes)[0] == 0
    evaluated = result(tmp_path, "e.json")
    assert (evaluated["split"], evaluated["n"], evaluated["entropy"] > 3) == ("val", 30, True)
    assert evaluated["solver"] == {"method": "rk4", "rtol": None, "atol": None, "step_size": 0.1}
    assert run("floweval", ckpt, "model.eval_trace=hutchinson", "model.noise_samples=2", "out=h.json")[0] == 0
    assert (result(tmp_path, "h.json")["trace"], result(tmp_path, "h.json")["noise_samples"]) == ("hutchinson", 2)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("model", ["affine", "realnvp", "nsf", "maf", "ffjord"])
@pytest.mark.parametrize("d", [1, 3, 20])
def test_user_arrays_are_trained_on(run: Run, tmp_path: Path, model: str, d: int) -> None:
    if model == "realnvp" and d == 1:
        pytest.skip("couplings need two columns; see the test of the message")
    rows = 7 + 30 * np.random.default_rng(0).standard_normal((200, d))
    np.save(tmp_path / "mine.npy", rows)
    keys = [k for k in SMALL if "data." not in k]
    code, out, err = run("flowtrain", "data=array", "data.path=mine.npy", f"model={model}", *keys, *FAST[model])
    assert code == 0, err
    trained = result(out.splitlines()[-1])
    # log p is in the units of the data, which are N(7, 30^2 I)
    normal = torch.distributions.Normal(7.0, 30.0).entropy().item()
    assert trained["nll"] / d == pytest.approx(normal, abs=0.5)
    assert trained["n"] == 20
    assert trained["kl"] is None
    os.chdir("/")
    assert run("floweval", f"ckpt={tmp_path / out.splitlines()[-1]}", f"out={tmp_path}/e.json")[0] == 0
    assert result(tmp_path, "e.json")["nll"] == pytest.approx(trained["nll"], abs=1e-6)


@pytest.mark.usefixtures("without_figures")
def test_sweep_writes_a_run_per_job(run: Run) -> None:
    code, out, err = run("flowtrain", "-m", "solver.rtol=1e-2,1e-3", "model.hidden=[8]", *SMALL, "trainer.steps=2")
    assert code == 0, err
    dirs = [Path(line) for line in out.splitlines()[:2]]
    assert len({d.parent for d in dirs}) == 1
    assert [result(d)["solver"]["rtol"] for d in dirs] == [1e-2, 1e-3]
    assert [result(d)["solver"]["atol"] for d in dirs] == [1e-2, 1e-3]


@pytest.mark.usefixtures("without_figures")
def test_resume_continues_a_run(run: Run) -> None:
    keys = [*SMALL, "model=realnvp", *FAST["realnvp"], "trainer.lr_decay=constant"]
    _, out, _ = run("flowtrain", *keys)
    run_dir = out.splitlines()[-1]
    code, out, err = run("flowtrain", f"resume={run_dir}", "trainer.steps=6")
    assert code == 0, err
    assert out.splitlines()[-1] == str(Path(run_dir).absolute())
    assert result(run_dir)["steps"] == 6
    _, out, _ = run("flowtrain", *keys, "trainer.steps=6")
    whole = checkpoint.load(Path(out.splitlines()[-1]) / "checkpoints/last.pt")["weights"]
    resumed = checkpoint.load(Path(run_dir) / "checkpoints/last.pt")["weights"]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


TOYS = sorted(
    p.stem
    for p in (config_dir() / "data").glob("*.yaml")
    if p.stem not in ("array", "target", "mnist", "fashion_mnist")
)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_every_toy_trains(run: Run, toy: str, model: str, request: pytest.FixtureRequest) -> None:
    # the figures depend on the toy only, so one model draws them
    if model == "ffjord":
        request.getfixturevalue("without_figures")
    code, out, err = run("flowtrain", f"data={toy}", f"model={model}", *SMALL, *FAST[model], "trainer.steps=2")
    assert code == 0, err
    trained = result(out.splitlines()[-1])
    assert np.isfinite(trained["nll"])
    assert trained["kl"] > 0


def test_every_config_composes() -> None:
    """Each choice of each group is composed. Experiments are composed alone, because choices would override theirs."""
    options = {
        group.name: [f"{group.name}={p.stem}" for p in group.glob("*.yaml")]
        for group in config_dir().iterdir()
        if group.is_dir()
    }
    experiments = options.pop("experiment")
    together = itertools.zip_longest(*options.values())
    for chosen in [[e] for e in experiments] + [[o for o in each if o] for each in together]:
        assert compose_defaults(chosen)["seed"] == 0


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_lists_keys(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "ckpt=" in out or "data=array" in out


def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Two processes run at the same time, because most of their time is the import of torch."""
    keys = [*SMALL, "model=affine", "trainer.steps=1000000", "trainer.log_every=1"]
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {
        number: subprocess.Popen(
            [sys.executable, "-m", "flowtrain", *keys, f"hydra.run.dir=r{number}"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in map(int, codes)
    }
    try:
        for number, process in processes.items():
            run_dir = tmp_path / f"r{number}"
            deadline = time.monotonic() + 60
            metrics = run_dir / "metrics.jsonl"
            while (not metrics.exists() or metrics.stat().st_size < 500) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode == codes[signal.Signals(number)]
            assert "flowtrain resume=" in err
            assert Path(out.splitlines()[-1]) == run_dir
            step = checkpoint.load(run_dir / "checkpoints/last.pt")["step"]
            assert step == json.loads(metrics.read_text().splitlines()[-1])["step"]
    finally:
        for process in processes.values():
            process.kill()


def test_optdigits_trains_on_all_64_columns(run: Run, real: Callable[..., list[str]]) -> None:
    train, test = real("optdigits/optdigits.tra", "optdigits/optdigits.tes")
    keys = ["data=array", f"data.path={train}", f"data.test_path={test}"]
    keys += ["data.columns=[0:64]", "data.dequantize=true", "trainer.steps=3", "trainer.plot_every=null"]
    code, out, err = run("flowtrain", *keys, "model=realnvp", *FAST["realnvp"])
    assert code == 0, err
    assert result(out.splitlines()[-1])["n"] == 1797
