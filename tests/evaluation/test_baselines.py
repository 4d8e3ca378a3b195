"""Evaluations of tables compare the flow with simple densities of the training rows."""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evaluate, Run, Train
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from flowtrain.bijections.linear import Affine, gaussian_log_prob, shrunk_covariance
from flowtrain.data.base import Dataset
from flowtrain.data.tables.array import ArrayData
from flowtrain.evaluation import baselines as of
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.baselines import baselines, check_baseline
from flowtrain.evaluation.result import Baseline
from flowtrain.flow import Flow
from flowtrain.models.realnvp import realnvp
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import with_error

pytestmark = pytest.mark.usefixtures("without_figures")
# a time limit that never binds for small tables
SECONDS = 60.0


class Rows(Dataset):
    """A dataset with given training, validation and test rows."""

    def __init__(self, train: Tensor, val: Tensor, test: Tensor) -> None:
        self.train, self.val, self.test = train, val, test
        self.event_shape, self.n_train = train.shape[1:], len(train)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self.train[:batch_size]

    def train_rows(self, most: int) -> Tensor:
        return self.train[:most]


def clusters(n: int, seed: int) -> Tensor:
    """Returns two distant clusters, one of them narrow, in columns of different scales, (n, 2)."""
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.5
    z = np.where(first[:, None], rng.normal(0, 1, (n, 2)), rng.normal([8, 3], [0.1, 2], (n, 2)))
    return torch.from_numpy(z * [1e3, 1e-2] + [1e6, 5])


@pytest.fixture
def data() -> Rows:
    return Rows(clusters(600, 0), clusters(200, 1), clusters(150, 2))


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the logged warnings and information messages."""
    said: list[str] = []
    for level in ("warning", "info"):
        monkeypatch.setattr(
            logging.getLogger("flowtrain"), level, lambda words, *of, level=level: said.append(f"{level}: {words % of}")
        )
    return said


def table(path: Path, n: int = 400) -> Path:
    rng = np.random.default_rng(0)
    np.save(path, rng.normal(size=(n, 3)) @ rng.normal(size=(3, 3)) + 5)
    return path


def gaussian_baseline(data: Dataset, x: Tensor, log_p: Tensor) -> Baseline:
    found = baselines(data, [x], log_p)
    assert found is not None
    assert list(found) == ["gaussian"]
    return found["gaussian"]


def test_gaussian_baseline_is_fitted_to_the_training_rows(tmp_path: Path) -> None:
    data = ArrayData(str(table(tmp_path / "x.npy")))
    rows = data.train_rows(10**6)
    assert rows.shape == (320, 3)
    assert len(torch.unique(rows, dim=0)) == 320
    expected = gaussian_log_prob(data.test, *shrunk_covariance(rows))
    # log p of a flow that is worse by 1 nat in every other row
    log_p = expected - (torch.arange(40) % 2).double()
    found = gaussian_baseline(data, data.test, log_p)
    assert found.nll == pytest.approx(-expected.mean().item())
    assert found.nll_stderr == pytest.approx(expected.std().item() / 40**0.5)
    assert (found.worse, found.worse_stderr) == (pytest.approx(0.5), pytest.approx((10 / 39 / 40) ** 0.5))
    # a large table needs only some of its rows, without repetitions
    assert len(torch.unique(data.train_rows(50), dim=0)) == 50


def test_memory_mapped_and_integer_tables_have_a_gaussian_baseline(tmp_path: Path) -> None:
    path = table(tmp_path / "x.npy")
    mapped = ArrayData(str(path), memory_map=True, val_path=str(path), test_path=str(path))
    found = gaussian_baseline(mapped, mapped.test, torch.zeros(400))
    values = torch.from_numpy(np.load(path))
    expected = gaussian_log_prob(values, *shrunk_covariance(values))
    assert found.nll == pytest.approx(-expected.mean().item(), abs=1e-4)
    # with x constant, x + u has an NLL of 0 under its own density and of 1/2 log(2 pi e / 12) under a Gaussian
    np.save(tmp_path / "counts.npy", np.zeros((20_000, 1)) + 4)
    counts = ArrayData(str(tmp_path / "counts.npy"), dequantize=True)
    noisy = counts.test + torch.rand(2000, 1)
    found = gaussian_baseline(counts, noisy, torch.zeros(2000))
    assert found.nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 12), abs=0.02)


def test_gaussian_with_context_is_a_linear_regression(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    context = np.column_stack([rng.normal(1e6, 10, 1000), rng.normal(size=1000)])
    x = rng.normal(size=(1000, 2)) @ [[1, 0.5], [0, 0.2]] + (context - [1e6, 0]) @ [[3, 0], [1, -2]] + [5, 7]
    np.save(tmp_path / "x.npy", np.column_stack([x, context]))
    data = ArrayData(str(tmp_path / "x.npy"), context=[2, 3])
    found = baselines(data, [data.test], torch.zeros(len(data.test)), context=data.test_context)
    assert found is not None
    # by the normal equations, without centering
    train, given = data.train_rows(10**6), data.train_context(10**6)
    assert given is not None
    mean, std = given.mean(0), given.std(0)
    theirs = data.test_context
    assert theirs is not None
    design, own = (torch.cat([(c - mean) / std, torch.ones(len(c), 1)], 1).double() for c in (given, theirs))
    slope = torch.linalg.solve(design.T @ design, design.T @ train.double())
    expected = gaussian_log_prob(data.test - own @ slope, *shrunk_covariance(train - design @ slope))
    assert found["gaussian"].nll == pytest.approx(-expected.mean().item(), abs=1e-4)
    # the entropy of the noise
    assert found["gaussian"].nll == pytest.approx(math.log(2 * math.pi * math.e) + math.log(0.2), abs=0.2)


def test_images_and_data_without_training_rows_have_no_baseline(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 4)))
    images = ArrayData(str(tmp_path / "x.npy"), event_shape=[1, 2, 2])
    assert baselines(images, [images.test], torch.zeros(5)) is None
    assert check_baseline(1.0, 0.1, None, 4) is None


def kernel_density(h: float) -> KernelDensity:
    """Returns scikit-learn's estimator with one leaf: pruning loses up to hundreds of nats in the tails (1.9.1)."""
    return KernelDensity(bandwidth=h, leaf_size=10_000)


def test_mixture_and_kernel_density_nll_match_scikit_learn(data: Rows) -> None:
    found = baselines(data, [data.test], torch.zeros(150), SECONDS)
    assert found is not None
    assert list(found) == ["gaussian", "gaussian_mixture", "kernel_density"]
    mean, std = data.train.mean(0), data.train.std(0, correction=0)
    train, val, test = ((rows.sub(mean).div(std)).numpy() for rows in (data.train, data.val, data.test))
    volume = float(std.log().sum())

    def nll(model: GaussianMixture | KernelDensity, rows: np.ndarray) -> float:
        return volume - float(model.score_samples(rows).mean())

    fits = [GaussianMixture(k, random_state=0, max_iter=200).fit(train) for k in (1, 2, 4, 8)]
    best = min(fits, key=lambda model: nll(model, val))
    assert found["gaussian_mixture"].nll == pytest.approx(nll(best, test), abs=1e-3)
    assert found["gaussian_mixture"].settings.startswith(str(best.n_components))
    assert best.n_components > 1
    assert found["gaussian_mixture"].nll < found["gaussian"].nll - 0.5

    grid = [kernel_density(h).fit(train) for h in np.geomspace(0.005, 1, 100)]
    best_kernels = min(grid, key=lambda model: nll(model, val))
    assert found["kernel_density"].nll == pytest.approx(nll(best_kernels, test), abs=0.02)


def test_kernel_log_probs_match_scikit_learn() -> None:
    torch.manual_seed(0)
    x, centers = 3 * torch.randn(300, 5), torch.randn(400, 5)
    found = of.kernel_log_probs(x, centers, [0.1, 0.7])
    for h, log_p in zip((0.1, 0.7), found, strict=True):
        expected = kernel_density(h).fit(centers.numpy()).score_samples(x.numpy())
        np.testing.assert_allclose(log_p.numpy(), expected, rtol=1e-9)


def test_kernel_density_integrates_to_one_in_data_units(data: Rows) -> None:
    """The density is in data units, and a column that is constant in training does not affect it."""
    train = torch.cat([data.train[:, :1], torch.full((600, 1), 7.0)], 1)
    table = of.StandardisedRows(train, train)
    fitted = of._kernels(table, 10.0, 100)
    assert fitted is not None
    a, b = torch.linspace(-8e3, 14e3, 2201) + 1e6, torch.linspace(-1, 15, 33)
    grid = torch.cartesian_prod(a, b)
    mass = float(fitted.log_prob(grid).exp().sum() * (a[1] - a[0]) * (b[1] - b[0]))
    assert mass == pytest.approx(1, abs=1e-3)


def test_noise_draws_are_averaged_inside_the_log(data: Rows) -> None:
    a, b = data.test, data.test + torch.tensor([300.0, 0.01])
    log_p = torch.zeros(150)
    one, other, both = (baselines(data, points, log_p) for points in ([a], [b], [a, b]))
    assert one is not None
    assert other is not None
    assert both is not None
    mean, covariance = shrunk_covariance(data.train)
    p = (gaussian_log_prob(a, mean, covariance).exp() + gaussian_log_prob(b, mean, covariance).exp()) / 2
    assert both["gaussian"].nll == pytest.approx(-float(p.log().mean()))
    assert both["gaussian"].nll < max(one["gaussian"].nll, other["gaussian"].nll)


NORMAL = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(NORMAL[:1], id="one row"),
        pytest.param(NORMAL[:2], id="two rows"),
        pytest.param(NORMAL[:1].expand(50, 3), id="one row, repeated"),
        pytest.param(torch.cat([NORMAL[:, :2], torch.full((60, 1), 4.0)], 1), id="constant column"),
        pytest.param(NORMAL[:, [0, 1, 0]], id="repeated column"),
        pytest.param(NORMAL.round(), id="few values"),
        pytest.param(NORMAL.repeat(4, 1), id="repeated rows"),
        pytest.param(1e9 + NORMAL, id="offset"),
        pytest.param(1e150 * NORMAL, id="huge"),
        pytest.param(1e-150 * NORMAL, id="tiny"),
        pytest.param(torch.cat([NORMAL, torch.full((1, 3), 1e12)]), id="outlier"),
        pytest.param(torch.randn(12, 40, dtype=torch.float64), id="more columns than rows"),
    ],
)
def test_degenerate_tables_have_finite_baselines(train: Tensor, logged: list[str]) -> None:
    # some training rows are also validation rows, so narrow densities fit best
    data = Rows(train, train[: max(1, len(train) // 2)], train)
    found = baselines(data, [train], torch.zeros(len(train)), SECONDS)
    assert found is not None
    varies = len(torch.unique(train, dim=0)) > 1
    assert set(found) == ({"gaussian", "gaussian_mixture", "kernel_density"} if varies else {"gaussian"})
    assert varies or any("info" in words for words in logged)
    for one in found.values():
        assert math.isfinite(one.nll)
        assert math.isfinite(one.worse)


def test_missing_scikit_learn_message_names_the_extra(
    data: Rows, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    found = baselines(data, [data.test], torch.zeros(150), SECONDS)
    assert found is not None
    assert list(found) == ["gaussian", "kernel_density"]
    assert len(logged) == 1
    assert "flowtrain[baselines]" in logged[0]


def test_short_time_limit_fits_fewer_components_and_is_logged(data: Rows, logged: list[str]) -> None:
    found = baselines(data, [data.test], torch.zeros(150), 1e-3)
    assert found is not None
    # the first number of components is always fitted
    assert found["gaussian_mixture"].settings == "1 component"
    assert len(logged) == 1
    assert of.affordable_seconds(1.9) == 0


def test_warning_is_logged_if_a_baseline_beats_the_flow(data: Rows, logged: list[str]) -> None:
    flow = Flow((2,), Affine(2))
    flow.bijection.initialize(data.train)
    found = evaluate(flow, data, trained_on=data, baseline_seconds=SECONDS)
    assert found.baselines is not None
    assert list(found.to_dict()["baselines"]) == ["gaussian", "gaussian_mixture", "kernel_density"]
    # the Gaussian baseline is as good as this flow
    assert "baseline" not in [check.name for check in found.failed]
    assert found.baselines["gaussian_mixture"].worse > 0.5
    (warning,) = [words for words in logged if words.startswith("warning") and "gaussian mixture" in words]
    simple = found.baselines["kernel_density"]
    assert with_error(found.nll, found.nll_stderr) in warning
    assert with_error(simple.nll, simple.nll_stderr) in warning
    assert with_error(simple.nll, simple.nll_stderr) in found.table()
    # for rows in memory, the validation rows are split off trained_on
    of_rows = evaluate(flow, data.test, trained_on=data.train, baseline_seconds=SECONDS)
    assert of_rows.baselines is not None
    assert of_rows.baselines["gaussian_mixture"].nll == pytest.approx(found.baselines["gaussian_mixture"].nll, abs=0.2)
    # on normal data, no baseline beats the Gaussian
    logged.clear()
    train, val, test = torch.randn(900, 2).split(300)
    flow.bijection.initialize(train)
    evaluate(flow, Rows(train, val, test), trained_on=Rows(train, val, test), baseline_seconds=SECONDS)
    assert not [words for words in logged if words.startswith("warning")]


def test_baseline_and_flow_score_the_same_dequantized_rows(tmp_path: Path) -> None:
    """The baseline uses the noise of the scored rows, so a flow that equals the baseline gives the same scores."""
    np.save(tmp_path / "counts.npy", np.random.default_rng(0).poisson(3, size=(600, 2)))
    data = ArrayData(str(tmp_path / "counts.npy"), dequantize=True)
    flow = Flow((2,), Affine(2), integer_valued=True)
    rows = data.train_rows(1000)
    with torch.no_grad():
        flow.bijection.initialize(rows + torch.rand(rows.shape))
    found = evaluate(flow, data, trained_on=data)
    assert found.baselines is not None
    # the small difference comes from the noise of the training rows
    assert found.baselines["gaussian"].worse_stderr < 0.01


@pytest.mark.parametrize("kind", ["image", "conditional", "no training rows"])
def test_baselines_of_images_and_conditional_flows_are_refused(kind: str) -> None:
    shape = (1, 4, 4) if kind == "image" else 2
    classes = 3 if kind == "conditional" else None
    flow = realnvp(shape, layers=1, conditional=classes is not None, classes=classes)
    x = torch.randn(20, *flow.event_shape)
    label = None if flow.classes is None else torch.arange(20) % 3
    given = None if kind == "no training rows" else x
    with pytest.raises(ConfigError, match="baselines"):
        evaluate(flow, x, label=label, trained_on=given, baseline_seconds=SECONDS)


@pytest.mark.parametrize(
    ("worse", "stderr", "passed"),
    [
        (-5.0, 0.1, True),
        (0.05, 0.1, True),
        (0.3, 0.1, False),
        # the difference is certain, but too small to matter
        (0.005, 1e-6, True),
        # one row with a huge -log p makes the difference uncertain, not small
        (1e7, 1e7, False),
        (math.inf, math.nan, False),
    ],
)
def test_baseline_check_uses_the_paired_difference(worse: float, stderr: float, passed: bool) -> None:
    check = check_baseline(5.0 + worse, 1.0, Baseline(5.0, 0.3, 0.0, worse, stderr), 3)
    assert check is not None
    assert check.passed is passed
    assert check_baseline(1.0, math.nan, Baseline(5.0, math.nan, 0.0, worse, math.nan), 3).passed is None  # type: ignore[union-attr]


def test_warning_about_a_worse_flow_contains_both_nlls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ArrayData(str(table(tmp_path / "x.npy")))
    warned: list[str] = []
    monkeypatch.setattr(logging.getLogger("flowtrain"), "warning", lambda words, *of: warned.append(words % of))
    found = evaluate(Flow((3,), Affine(3)).float(), data, trained_on=data)
    assert found.baselines is not None
    simple = found.baselines["gaussian"].nll
    assert simple + 1 < found.nll
    named = [words for words in warned if "Gaussian" in words]
    assert len(named) == 1
    assert f"{found.nll:.0f}" in named[0]
    assert f"{simple:.1f}" in named[0]
    assert f"{simple:.1f}" in found.table()
    # without trained_on there is no baseline
    assert evaluate(Flow((3,), Affine(3)).float(), data).baselines is None


def test_result_json_contains_the_gaussian_baseline(trained: Train, evaluated: Evaluate, tmp_path: Path) -> None:
    path = table(tmp_path / "x.npy")
    run_dir = trained("data=array", f"data.path={path}")
    simple = json.loads(Path(run_dir, "result.json").read_text())["baselines"]["gaussian"]
    assert set(simple) == {"nll", "nll_stderr", "seconds"}
    assert evaluated(run_dir)["baselines"]["gaussian"]["nll"] == pytest.approx(simple["nll"])
    # another split of the run has baselines too
    assert evaluated(run_dir, "split=val", name="eval-val.json")["baselines"]["gaussian"]["nll"] != simple["nll"]
    # other data have no baselines
    assert evaluated(run_dir, f"data.path={path}", name="eval-x.json")["baselines"] is None


def test_toy_data_have_no_baseline(evaluated: Evaluate, trained: Train) -> None:
    assert evaluated(trained("data=moons", "data.n_test=60", "data.n_val=40"))["baselines"] is None


def test_floweval_baselines_option_adds_all_baselines(
    trained: Train, evaluated: Evaluate, run: Run, tmp_path: Path
) -> None:
    path = table(tmp_path / "x.npy")
    run_dir = trained("data=array", f"data.path={path}")
    # after a short training, a run fits only the Gaussian
    assert list(evaluated(run_dir)["baselines"]) == ["gaussian"]
    found = evaluated(run_dir, "baselines=true")["baselines"]
    assert list(found) == ["gaussian", "gaussian_mixture", "kernel_density"]
    for one in found.values():
        assert set(one) == {"nll", "nll_stderr", "seconds"}
        assert math.isfinite(one["nll"])
    # baselines for new rows. Here, the new rows are the whole table
    of_new = evaluated(run_dir, f"data.path={path}", "baselines=true", name="eval-x.json")["baselines"]
    assert of_new.keys() == found.keys()
    assert of_new["gaussian"]["nll"] != found["gaussian"]["nll"]
    # without the training rows no baseline can be fitted
    new = table(tmp_path / "new.npy", 50)
    path.unlink()
    code, _, err = run("floweval", f"ckpt={run_dir}", f"data.path={new}", "baselines=true")
    assert code == 2
    assert str(path) in err


def test_floweval_refuses_baselines_of_toys(trained: Train, run: Run) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40")
    code, _, err = run("floweval", f"ckpt={run_dir}", "baselines=true")
    assert code == 2
    assert "baselines" in err


def test_long_training_fits_all_baselines(trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of, "LEAST_SECONDS", 1e-9)
    run_dir = trained("data=array", f"data.path={table(tmp_path / 'x.npy')}")
    found = json.loads(Path(run_dir, "result.json").read_text())["baselines"]
    assert "gaussian_mixture" in found
