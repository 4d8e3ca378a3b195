"""data=array: only columns whose mean is large relative to their deviation are centered, in float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Evaluate, Refused, Run, Train
from helpers.files import normal, npy, save

import flowtrain
from flowtrain.data.base import Samples
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.flow import Flow
from flowtrain.runs.build import build_flow
from flowtrain.training.batches import Batches
from flowtrain.training.initialization import initialize
from flowtrain.utils.errors import DataError

MEAN, STD = np.array([1.7e9, 5.412e6, 3.0]), np.array([100.0, 5.0, 2.0])


def large_values(n: int, seed: int = 0) -> np.ndarray:
    return MEAN + STD * normal(n, 3, seed)


def nll(values: np.ndarray) -> float:
    """Returns the mean NLL under independent normal columns with the parameters of `large_values`."""
    z = (values - MEAN) / STD
    return float((z**2 / 2 + np.log(STD * np.sqrt(2 * np.pi))).sum(1).mean())


@pytest.mark.parametrize("ending", ["csv", "npy"])
def test_centered_samples_keep_float64_precision(tmp_path: Path, ending: str) -> None:
    values = large_values(100)
    path = save(tmp_path / "t.csv", values) if ending == "csv" else npy(tmp_path / "t.npy", values)
    data = ArrayData(path, test_path=path)
    assert data.samples.centered
    assert data.val.dtype == data.test.dtype == data.train_batch(0, 5, 0).dtype == torch.float64
    np.testing.assert_array_equal(data.test, values)
    assert data.offset is not None
    # only the columns with a large mean have an offset, and float32 represents the offset exactly
    assert (data.offset == data.offset.float()).all()
    np.testing.assert_allclose(data.offset, [MEAN[0], MEAN[1], 0.0], atol=128)
    assert data.statistics()[1].numpy() == pytest.approx(STD, rel=0.3)  # type: ignore[index]


@pytest.mark.parametrize(
    ("mean", "std", "centered"),
    [(0.0, 1.0, False), (2000.0, 50.0, False), (2000.0, 1.0, True), (-1e7, 1.0, True), (1e-3, 1e-9, True)],
)
def test_only_columns_with_coarse_float32_rounding_are_centered(
    tmp_path: Path, mean: float, std: float, centered: bool
) -> None:
    path = npy(tmp_path / "t.npy", mean + std * normal(50, 1))
    data = ArrayData(path)
    assert (data.samples.centered, data.val.dtype == torch.float64) == (centered, centered)
    plain = ArrayData(npy(tmp_path / "u.npy", 0.0 + normal(50, 1)), center=True)
    assert (plain.offset, plain.val.dtype) == (None, torch.float32)


def test_constant_columns_are_still_refused(tmp_path: Path, refused: Refused) -> None:
    values = large_values(50)
    values[:, 1] = 1.7e9 + 0.1
    path = npy(tmp_path / "t.npy", values)
    refused(lambda: ArrayData(path), DataError, [path, "'c1'", "constant"])


def test_memory_mapped_file_is_centered(
    tmp_path: Path, small_windows: None, open_streamed: Callable[..., ArrayData]
) -> None:
    values = large_values(300)
    data = open_streamed(npy(tmp_path / "t.npy", values))
    assert data.train_batch(0, 7, 0).dtype == data.val.dtype == torch.float64
    known = {tuple(row) for row in values.tolist()}
    assert {tuple(row) for row in torch.cat([data.train_batch(0, 50, 0), data.val]).tolist()} <= known


def test_large_integers_are_dequantized_in_float64(tmp_path: Path) -> None:
    values = np.round(1e6 + 50 * normal(100, 1))
    data = ArrayData(npy(tmp_path / "t.npy", values), dequantize=True)
    flow = build_flow(CONFIG, data.samples).eval()
    noisy = flow.dequantized(data.val)
    assert (data.val.dtype, noisy.dtype) == (torch.int64, torch.float64)
    u = noisy - data.val
    assert bool(((u >= 0) & (u < 1)).all())
    # float32 would have only 16 values between neighbouring integers
    assert bool((16 * u != (16 * u).round()).any())


CONFIG: dict[str, Any] = {
    "model": {"_target_": "flowtrain.models.affine.affine", "name": "affine"},
    "solver": {"_target_": "flowtrain.ode.ode_solver", "method": "dopri5"},
}


def test_flow_built_without_centering_has_no_offset() -> None:
    flow = build_flow(CONFIG, Samples((2,), standardized=True))
    assert not any("offset" in key for key in flow.state_dict())
    assert flow.sample(2).dtype == flow.log_prob(torch.zeros(1, 2)).dtype == flow.like.dtype


MODELS: dict[str, dict[str, Any]] = {
    "affine": {"_target_": "flowtrain.models.affine.affine"},
    "realnvp": {"_target_": "flowtrain.models.realnvp.realnvp", "layers": 2, "hidden": [8]},
    "ffjord": {"_target_": "flowtrain.models.ffjord.ffjord", "hidden": [8]},
}


def initialized_flow(data: ArrayData, model: dict[str, Any]) -> Flow:
    """Returns a flow at the first step of its training on the data."""
    flow = build_flow({**CONFIG, "model": model}, data.samples)
    initialize(flow, Batches(flow, data, 64, 0))
    return flow.eval()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("standardize", [True, False])
def test_likelihoods_and_samples_use_the_units_of_the_file(
    tmp_path: Path, float32: None, model: str, standardize: bool
) -> None:
    values = large_values(400)
    data = ArrayData(npy(tmp_path / "t.npy", values), standardize=standardize)
    flow = initialized_flow(data, MODELS[model])
    x = torch.from_numpy(large_values(500, seed=1))
    log_p = flow.log_prob(x).detach()
    assert log_p.dtype == torch.float32
    # float64 gives the same values: the cast keeps the offset, and float32 had lost no digits
    exact = copy.deepcopy(flow).double()
    np.testing.assert_allclose(log_p, exact.log_prob(x).detach(), rtol=1e-4)
    np.testing.assert_allclose(copy.deepcopy(exact).float().log_prob(x).detach(), log_p)
    assert (flow(flow.inverse(x)) - x).abs().max() < 1e-2
    samples = flow.sample(2000).numpy()
    assert samples.dtype == np.float64
    if model == "affine":
        # an initialized affine flow is the Gaussian of the training rows
        assert float(-log_p.mean()) == pytest.approx(nll(large_values(500, seed=1)), abs=0.1)
        np.testing.assert_allclose((samples - MEAN).mean(0) / STD, 0, atol=0.2)
        np.testing.assert_allclose((samples - MEAN).std(0) / STD, 1, rtol=0.2)
    # gradients are finite in training
    flow.train()
    flow.log_prob(data.train_batch(0, 16, 0)).mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in flow.parameters())


def test_commands_score_and_sample_with_the_offset(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    path = npy(tmp_path / "t.npy", large_values(200))
    new = large_values(300, seed=1)
    run_dir = trained("data=array", f"data.path={path}")
    found = evaluated(run_dir, f"data.path={npy(tmp_path / 'new.npy', new)}", "scores=s.npy", name="eval-new.json")
    assert found["nll"] == pytest.approx(nll(new), abs=0.1)
    assert not [name for name, check in found["checks"].items() if check["passed"] is False]
    log_p = flowtrain.load(run_dir).log_prob(torch.from_numpy(new)).detach()
    np.testing.assert_allclose(log_p, np.load(tmp_path / "s.npy"), rtol=1e-5)
    assert run("flowsample", f"ckpt={run_dir}", "n=500")[0] == 0
    samples = np.load(Path(run_dir) / "samples.npy")
    assert samples.dtype == np.float64
    np.testing.assert_allclose((samples - MEAN).std(0) / STD, 1, atol=0.2)
    assert run("flowtrain", f"resume={run_dir}", "trainer.steps=6")[0] == 0
    code, out, err = run("flowtrain", f"from={run_dir}", "trainer.steps=2")
    assert code == 0, err
    log_p = flowtrain.load(out.splitlines()[-1]).log_prob(torch.from_numpy(new)).detach()
    assert float(-log_p.mean()) == pytest.approx(nll(new), abs=0.1)


def test_figures_of_a_centered_run_are_drawn(trained: Train, tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", large_values(100)[:, :2])
    small = ["model=ffjord", "model.hidden=[8]", "solver=rk4", "solver.steps=2", "objective=flow_matching"]
    run_dir = Path(trained("data=array", f"data.path={path}", *small))
    assert "no picture" not in (run_dir / "flowtrain.log").read_text()
    assert {"samples.png", "transport.png", "paths.png"} <= {p.name for p in (run_dir / "plots").iterdir()}


def test_affine_flow_fits_a_real_table_with_offsets(float32: None, real: Callable[..., list[str]]) -> None:
    """The columns are 5,412,000 +- 5 and 448,000 +- 5 metres, for which a Gaussian has 6.07 nats."""
    (path,) = real("cases/utm.npy")
    data = ArrayData(path)
    flow, rows = initialized_flow(data, MODELS["affine"]), RowsToScore(path, data.samples)
    assert rows.test.dtype == torch.float64
    assert float(-flow.log_prob(rows.test).detach().mean()) == pytest.approx(6.07, abs=0.02)
