"""Ensembles of runs: `flowtrain.load` of lists and sweep directories, with weights from the validation rows."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.figures import skip_figures
from helpers.files import normal

import flowtrain
from flowtrain import Ensemble
from flowtrain.bijections.linear import Affine
from flowtrain.data.base import Samples, record_of
from flowtrain.data.targets.base import FunctionTarget, TargetData
from flowtrain.models.ensemble import stacking_weights
from flowtrain.runs.ensembles import Run, difference_between, ensemble_of, runs_of
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")
SMALL: dict[str, Any] = {"trainer.batch_size": 32, "data.n_val": 60, "data.n_test": 50}


def fit(run_dir: Path, data: Any = "moons", model: str = "affine", steps: int = 4, **more: Any) -> Path:
    overrides = {**SMALL, **more.pop("overrides", {})}
    if model == "realnvp":
        overrides |= {"model.layers": 1, "model.hidden": [8]}
    if not isinstance(data, str):
        overrides = {key: value for key, value in overrides.items() if not key.startswith("data.n_")}
    flowtrain.fit(data, model=model, steps=steps, run_dir=run_dir, progress=False, overrides=overrides, **more)
    return run_dir


def log_density(x: torch.Tensor) -> torch.Tensor:
    """A mixture of two Gaussians at 0 and 6 in one column, with the weights 0.25 and 0.75."""
    parts = torch.stack([-0.5 * x[:, 0].square() + math.log(0.25), -0.5 * (x[:, 0] - 6).square() + math.log(0.75)])
    return parts.logsumexp(0)


def test_weights_for_a_target_maximise_the_likelihood_of_its_samples() -> None:
    """Each member is a part of the target, so the weights are the weights of the parts."""
    flows = [flowtrain.Flow((1,), Affine(1)).eval() for _ in range(3)]
    torch.nn.init.constant_(flows[1].bijection.mean, 6.0)  # type: ignore[arg-type]
    torch.nn.init.constant_(flows[2].bijection.mean, -30.0)  # type: ignore[arg-type]
    data = TargetData(FunctionTarget(log_density, 1), n_val=4000, n_test=2)
    runs = [Run(str(i), flow, {"data": {}, "target": {}}, data.samples, 0) for i, flow in enumerate(flows)]
    found = ensemble_of(runs, None, lambda: data)
    assert found.weights == pytest.approx((0.25, 0.75, 0), abs=0.02)
    other = runs[1]._replace(config={"data": {}, "target": {"std": 2}})
    with pytest.raises(CheckpointError, match=r"target\.std"):
        ensemble_of([runs[0], other], None, lambda: data)


def test_start_distributions_of_targets_may_differ() -> None:
    flow, file = flowtrain.Flow((2,), Affine(2)).eval(), record_of((50, "a5"), [])

    def run(record: Any = (), **target: Any) -> Run:
        return Run("0", flow, {"data": {}, "target": target}, Samples((2,), record=record), 0)

    known = {"_target_": "flowtrain.data.targets.wells.DoubleWell"}
    assert difference_between(run(**known, scale=1.0), run(**known, scale=2.0)) is None
    own = {"_target_": "mypkg.OwnTarget", "dim": None}
    assert difference_between(run(**own, scale=1.0), run(**own, scale=2.0)) is not None
    # equal files, but another prior
    assert difference_between(run(file, prior_scale=1.0), run(file, prior_scale=2.0)) is not None


def table(n: int = 200) -> Any:
    return np.concatenate([normal(n // 2, 2), normal(n - n // 2, 2, seed=1) + 4])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a sweep over moons, and other runs beside it."""
    root = tmp_path_factory.mktemp("runs")
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        fit(root / "sweep/0")
        fit(root / "sweep/1", model="realnvp", steps=60)
        fit(root / "sweep/10", model="realnvp", steps=60, seed=1)
        (root / "sweep/2/.hydra").mkdir(parents=True)
        (root / "sweep/2/.hydra/overrides.yaml").write_text("[model=ffjord]\n")
        fit(root / "other", overrides={"data.n_val": 70})
        fit(root / "table", table())
        fit(root / "same", table(), model="realnvp")
        fit(root / "reseeded", table(), overrides={"data.seed": 1})
        fit(root / "shifted", table() + 1)
        fit(root / "wide", normal(100, 3))
        fit(root / "labels", table(), model="realnvp", label=np.arange(200) % 2)
        fit(root / "labels ignored", np.c_[table(), np.arange(200) % 2], overrides={"data.label": 2})
        fit(root / "whole", np.floor(table()).astype(int), overrides={"data.dequantize": True})
    return root


def test_sweep_loads_as_an_ensemble_with_optimal_weights(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = trained / "sweep"
    found = flowtrain.load(sweep)
    assert isinstance(found, Ensemble)
    assert not found.training
    names = [str(sweep / name) for name in ("0", "1", "10")]
    assert list(found.names) == names
    assert "sweep/2" in caplog.text
    flows = [flowtrain.load(name) for name in names]
    val = flowtrain.data.Moons(n_val=60, n_test=50).val.numpy()
    log_p = np.stack([flow.log_prob(val) for flow in flows], 1)
    assert list(found.weights) == pytest.approx(stacking_weights(torch.from_numpy(log_p)), abs=1e-4)
    assert sum(w > 0.05 for w in found.weights) >= 2
    x = normal(5, 2)
    p = np.exp(np.stack([flow.log_prob(x) for flow in flows], 1).astype(float)) @ np.array(found.weights)
    np.testing.assert_allclose(found.log_prob(x), np.log(p), rtol=1e-4)
    assert found.record is not None
    assert found.record.samples.event_shape == (2,)


def test_path_lists_may_contain_runs_files_and_sweeps(trained: Path, tmp_path: Path) -> None:
    sweep = trained / "sweep"
    flowtrain.load(sweep / "1").save(tmp_path / "one.pt")
    found = flowtrain.load([sweep / "0", str(tmp_path / "one.pt")], weights=[1, 3])
    assert found.weights == (0.25, 0.75)
    assert found.names == (str(sweep / "0"), str(tmp_path / "one.pt"))
    assert len(flowtrain.load((sweep, tmp_path / "one.pt"), weights="equal").weights) == 4
    assert flowtrain.load([sweep / "0"]).weights == (1.0,)
    assert runs_of(sweep / "0") is None
    assert runs_of(tmp_path / "one.pt") is None


def test_saved_ensemble_is_one_self_contained_file(trained: Path, tmp_path: Path) -> None:
    ensemble = flowtrain.load([trained / "table", trained / "same"])
    ensemble.save(tmp_path / "e.pt")
    shutil.copy(tmp_path / "e.pt", tmp_path / "copy.pt")
    again = flowtrain.load(tmp_path / "copy.pt")
    assert isinstance(again, Ensemble)
    assert (again.weights, again.names) == (ensemble.weights, ensemble.names)
    x = normal(6, 2)
    np.testing.assert_array_equal(again.log_prob(x), ensemble.log_prob(x))
    assert again.record is not None
    assert ensemble.record is not None
    assert again.record.samples == ensemble.record.samples
    assert again.record.samples.record == ensemble.record.samples.record
    assert again.record.config["data"] == ensemble.record.config["data"]
    # a nested ensemble is one member, whose own members share its weight
    nested = flowtrain.load([tmp_path / "e.pt", trained / "table"], weights=[3, 1])
    assert nested.weights == pytest.approx([0.75 * w for w in ensemble.weights if w > 0] + [0.25])
    one = flowtrain.load(trained / "table")
    p = 0.75 * np.exp(ensemble.log_prob(x)) + 0.25 * np.exp(one.log_prob(x))
    np.testing.assert_allclose(np.exp(nested.log_prob(x)), p, rtol=1e-4)
    with pytest.raises(ConfigError):
        flowtrain.load(tmp_path / "e.pt", weights="equal")
    with pytest.raises(ConfigError):
        flowtrain.train(again, x, steps=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("sweep/0", "other", r"data\.n_val is 60 and 70"),
        ("sweep/0", "table", "record|data"),
        ("table", "reseeded", "other rows are held out"),
        ("table", "shifted", "values"),
        ("table", "wide", "event_shape"),
        ("labels", "labels ignored", "label|classes"),
        ("table", "labels", "label|classes"),
        ("table", "whole", "integer_valued"),
    ],
)
def test_runs_on_different_data_are_refused(trained: Path, one: str, other: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        flowtrain.load([trained / one, trained / other], weights="equal")
    assert all(str(trained / name) in str(raised.value) for name in (one, other))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], "best", [0, 0], ["a", "b"]])
def test_invalid_weights_are_refused(trained: Path, weights: Any) -> None:
    with pytest.raises(ConfigError, match="weights"):
        flowtrain.load([trained / "table", trained / "same"], weights=weights)
    with pytest.raises(ConfigError, match="single run"):
        flowtrain.load(trained / "table", weights=weights)


def test_missing_or_changed_data_are_reported_once(trained: Path, tmp_path: Path) -> None:
    for name in ("table", "same"):
        shutil.copytree(trained / name, tmp_path / name)
    runs = [tmp_path / name for name in ("table", "same")]
    # both copies refer to the data of the first run
    path = trained / "table/data/train.npz"
    kept = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(DataError, match=r"train\.npz.*weights="):
            flowtrain.load(runs)
        assert flowtrain.load(runs, weights=[0.5, 0.5]).weights == (0.5, 0.5)
        np.savez(path, table()[::-1])
        with pytest.raises(DataError, match="weights="):
            flowtrain.load(runs)
    finally:
        path.write_bytes(kept)
    assert sum(flowtrain.load(runs).weights) == pytest.approx(1)


def test_directories_without_runs_are_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", [], [tmp_path / "nowhere"]):
        with pytest.raises(CheckpointError):
            flowtrain.load(path)
    shutil.copytree(trained / "sweep/2", tmp_path / "failed/0")
    with pytest.raises(CheckpointError, match="none of the 1 runs"):
        flowtrain.load(tmp_path / "failed")


def test_conditional_runs_are_weighted_with_their_labels(trained: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        fit(tmp_path / "b", table(), model="realnvp", label=np.arange(200) % 2, seed=3, steps=80)
    found = flowtrain.load([trained / "labels", tmp_path / "b"])
    assert found.classes == 2
    assert found.weights[1] > found.weights[0]
    x, y = normal(4, 2), np.array([0, 1, 1, 0])
    assert np.isfinite(found.log_prob(x, y)).all()


def test_tilde_in_a_path_is_expanded(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained))
    assert isinstance(flowtrain.load("~/sweep", weights="equal"), Ensemble)
    assert flowtrain.load("~/sweep/0").event_shape == (2,)


def test_runs_on_integer_data_form_an_ensemble(trained: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        whole = np.floor(table()).astype(int)
        fit(tmp_path / "b", whole, model="realnvp", steps=30, overrides={"data.dequantize": True})
    found = flowtrain.load([trained / "whole", tmp_path / "b"])
    assert found.integer_valued
    assert np.isfinite(found.log_prob(np.floor(table(20)).astype(int))).all()
