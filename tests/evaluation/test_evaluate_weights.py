"""Evaluations of weighted rows: integer weights give the means of repeated rows."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from flowtrain import Ensemble, Flow
from flowtrain.bijections import Affine
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.calibration import calibration, ks_distance, ks_p_value
from flowtrain.evaluation.evaluate import dataset_of
from flowtrain.evaluation.ood_detection import auroc
from flowtrain.evaluation.outliers import concentration
from flowtrain.evaluation.sample_quality import rows_by_weight
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.weighting import effective_rows, resample


def flow_of(mean: float = 0.3, log_scale: float = 0.1) -> Flow:
    flow = Flow((2,), Affine(2)).eval()
    with torch.no_grad():
        flow.bijection.mean.fill_(mean)
        flow.bijection.log_diagonal.fill_(log_scale)
    return flow


def ensemble() -> Ensemble:
    return Ensemble([flow_of(), flow_of(-0.5, 0.3)], [0.6, 0.4], ["a", "b"]).eval()


@pytest.mark.parametrize("make", [flow_of, ensemble])
def test_integer_weights_evaluate_as_repeated_rows(make: Callable[[], Flow]) -> None:
    x, k, other = torch.randn(300, 2), torch.randint(0, 4, (300,)), torch.randn(80, 2) + 1
    flow, repeated = make(), x.repeat_interleave(k, 0)
    found = evaluate(flow, dataset_of(flow, x, weights=k / 3), "all", other=("other", other))
    expected = evaluate(flow, dataset_of(flow, repeated), "all", other=("other", other))
    assert found.nll == pytest.approx(expected.nll, rel=1e-12)
    assert found.ood is not None
    assert expected.ood is not None
    for name in ("auroc", "typicality_auroc", "entropy"):
        assert getattr(found.ood, name) == pytest.approx(getattr(expected.ood, name), rel=1e-9)
    for one, right in zip(found.members or (), expected.members or (), strict=True):
        assert (one.path, one.nll) == (right.path, pytest.approx(right.nll))
    if found.spread is not None:
        assert found.spread == pytest.approx(expected.spread)
    else:
        assert found.calibration.statistic == pytest.approx(expected.calibration.statistic, abs=1e-9)
        assert found.calibration.worst == expected.calibration.worst
    # the standard error counts effective rows
    assert found.n_effective == pytest.approx(effective_rows(k.double()))
    assert found.nll_stderr > expected.nll_stderr
    content = found.to_dict()
    assert content["n_effective"] == pytest.approx(found.n_effective)
    assert "n_effective" not in expected.to_dict()
    assert found.budget.total == pytest.approx(found.nll_stderr, rel=0.1)


def test_gaussian_baseline_has_weighted_moments() -> None:
    flow = flow_of()
    x, train, k = torch.randn(200, 2), torch.randn(500, 2), torch.randint(0, 4, (500,))
    x, train = (1 + rows @ torch.tensor([[1.0, 1.5], [0.0, 0.5]]) for rows in (x, train))
    found = evaluate(flow, x, weights=torch.ones(200), trained_on=dataset_of(flow, train, weights=k))
    repeated = train.repeat_interleave(k, 0)
    covariance = torch.cov(repeated.T, correction=0).numpy()
    expected = -stats.multivariate_normal(repeated.mean(0).numpy(), covariance).logpdf(x.numpy()).mean()
    assert found.baselines is not None
    # the covariance is shrunk a little
    assert found.baselines["gaussian"].nll == pytest.approx(expected, rel=2e-2)
    assert found.nll == pytest.approx(evaluate(flow, x).nll, rel=1e-12)


@pytest.mark.usefixtures("float32")
def test_rows_of_weight_0_are_left_out_of_every_mean() -> None:
    flow = flow_of()
    x = torch.randn(100, 2)
    far = torch.cat([x, torch.full((5, 2), 1e38)])
    weights = torch.cat([torch.rand(100) + 0.5, torch.zeros(5)])
    found, expected = evaluate(flow, far, weights=weights), evaluate(flow, x, weights=weights[:100])
    assert bool(found.scores[100:].isinf().all())
    assert found.n == 105
    for name in ("nll", "nll_stderr", "n_effective", "roundtrip_error"):
        assert math.isfinite(getattr(found, name))
    assert (found.nll, found.nll_stderr) == pytest.approx((expected.nll, expected.nll_stderr))
    assert found.calibration.statistic == pytest.approx(expected.calibration.statistic)
    assert not found.failed


def test_weights_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = flow_of(), torch.randn(20, 2)
    for weights in (
        torch.ones(19),
        torch.full((20,), torch.nan),
        -torch.ones(20),
        torch.zeros(20),
        "w",
        1e200 * torch.ones(20).double(),
    ):
        with pytest.raises(DataError, match="weights"):
            evaluate(flow, x, weights=weights)
    with pytest.raises(ConfigError, match="weights"):
        evaluate(flow, dataset_of(flow, x), "all", weights=torch.ones(20))


def test_a_column_of_a_frame_is_a_weight() -> None:
    pandas = pytest.importorskip("pandas")
    from flowtrain.evaluation.evaluate import row_weights

    frame = pandas.DataFrame({"a": [0.0, 1.0], "b": [1.0, 2.0], "w": [1.0, 3.0]})
    assert row_weights(flow_of(), frame, "w", 2).tolist() == [1.0, 3.0]


def test_importance_weights_are_calibrated() -> None:
    """Rows from N(0, 4) with weights to N(0, 1): the p-values of the true density are not small too often."""
    small = 0
    for _ in range(200):
        z = 1.3 * torch.randn(400, 1)
        w = (-0.5 * z[:, 0].square() * (1 - 1 / 1.3**2)).exp()
        found, pit = calibration(z, Flow((1,), Affine(1)).base, weights=w)
        small += found.p_value < 0.05
        assert len(pit["z1"]) == round(effective_rows(w))
    assert small <= 20
    shifted, _ = calibration(z + 0.5, Flow((1,), Affine(1)).base, weights=w)
    assert shifted.p_value < 1e-4


@pytest.mark.parametrize("signed", [False, True])
def test_weighted_kolmogorov_smirnov_distance(signed: bool) -> None:
    u, w = torch.rand(50, 2), torch.rand(50) - (0.2 if signed else 0.0)
    for j, found in enumerate(ks_distance(u, w).tolist()):
        order = np.argsort(u[:, j].numpy())
        steps, places = np.cumsum(w.numpy()[order]) / w.numpy().sum(), u[:, j].numpy()[order]
        before = np.concatenate([[0.0], steps[:-1]])
        expected = max(np.abs(steps - places).max(), np.abs(before - places).max())
        assert found == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(ks_distance(u, torch.full((50,), 2.0)), ks_distance(u))
    assert ks_p_value(0.3, 20.5) == pytest.approx(ks_p_value(0.3, 20), abs=0.01)


def test_weighted_area_under_the_curve() -> None:
    inside, k, outside = (
        torch.randn(60).round(decimals=1),
        torch.randint(0, 3, (60,)),
        torch.randn(40).round(decimals=1),
    )
    area, error = auroc(inside, outside, k / 2.0)
    repeated, smaller = auroc(inside.repeat_interleave(k), outside)
    assert area == pytest.approx(repeated)
    assert error > smaller
    assert auroc(inside, outside, torch.ones(60)) == pytest.approx(auroc(inside, outside))


def test_a_large_weight_makes_a_row_an_outlier() -> None:
    log_p = torch.randn(200)
    log_p[17] = -30.0
    weights = torch.ones(200)
    assert concentration(log_p, "set", weights=weights).rows == (17,)
    assert concentration(log_p, "set").rows == (17,)
    weights[17] = 1e-3
    assert concentration(log_p, "set", weights=weights).passed
    log_p[3], weights[3] = -torch.inf, 0.0
    assert concentration(log_p, "set", weights=weights).passed


def test_distances_of_samples_use_rows_drawn_by_weight() -> None:
    assert rows_by_weight(None, 3).tolist() == [0, 1, 2]
    weights = torch.tensor([0.0, 1.0, 3.0])
    torch.testing.assert_close(rows_by_weight(weights, 4), resample(weights, 4))
    with pytest.raises(ConfigError, match=r"data\.signed_weights"):
        rows_by_weight(-weights, 2)
