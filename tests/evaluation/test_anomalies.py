"""Conformal p-values, decisions, average precision and contributions, against closed forms and simulation."""

import logging

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score

import flowtrain
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.linear import Affine
from flowtrain.data.context import ContextColumn
from flowtrain.evaluation import find_anomalies
from flowtrain.evaluation.anomalies import (
    Rate,
    average_precision,
    conformal_p_values,
    contributions,
    detect_anomalies,
    largest_p_value,
)
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.utils.errors import ConfigError


def normal(d: int = 2) -> Flow:
    return Flow((d,), Affine(d)).eval()


class Shift(Bijection):
    """x = z + 10 context."""

    def forward(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert context is not None
        return z + 10 * context, z.new_zeros(len(z))

    def inverse(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert context is not None
        return x - 10 * context, x.new_zeros(len(x))


def gaussian(covariance: torch.Tensor) -> Flow:
    """Returns a normal distribution with zero mean."""
    affine = Affine(len(covariance)).to(covariance.dtype)
    factor = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        affine.log_diagonal.copy_(factor.diagonal().log())
        affine.below_diagonal.copy_(factor)
    return Flow((len(covariance),), affine).eval()


@pytest.mark.parametrize("rate", [0.05, 0.01])
def test_false_positives_of_exchangeable_rows_are_beta_binomial(rate: float) -> None:
    # a wrong flow, because the guarantee does not depend on it
    n, m, splits = 149, 200, 300
    rows = 2 * torch.randn(splits, n + m, 2, generator=torch.Generator().manual_seed(0)) + 1
    log_p = normal().log_prob(rows.flatten(0, 1)).detach().view(splits, -1)
    counts = []
    for each in log_p:
        p = conformal_p_values(each[:n], each[n:])
        counts.append(int((p <= rate).sum()))
    k = int(rate * (n + 1) + 1e-9)
    expected = stats.betabinom(m, k, n + 1 - k)
    low, high = expected.ppf(0.025), expected.ppf(0.975)
    outside = sum(not low <= count <= high for count in counts)
    # 95% bands of a discrete distribution are left by at most 5% of the splits
    assert outside <= stats.binom(splits, 0.05).ppf(0.999)
    error = expected.std() / splits**0.5
    assert np.mean(counts) == pytest.approx(m * k / (n + 1), abs=4 * error)
    assert np.var(counts) == pytest.approx(expected.var(), rel=0.35)


def test_ties_and_infinite_values_never_make_p_values_too_small() -> None:
    generator = torch.Generator().manual_seed(0)
    n, splits = 19, 4000
    values = torch.randint(0, 4, (splits, n + 1), generator=generator).double()
    values[values == 0] = -torch.inf
    p = torch.cat([conformal_p_values(each[:n], each[n:]) for each in values])
    for a in (0.05, 0.2, 0.3, 0.5, 0.8):
        assert float((p <= a).double().mean()) <= a + 4 * (a * (1 - a) / splits) ** 0.5
    # without ties, they are exactly uniform on 1 / (n + 1), ..., 1
    values = torch.rand(splits, n + 1, generator=generator)
    p = torch.cat([conformal_p_values(each[:n], each[n:]) for each in values])
    counts = np.bincount((p * (n + 1)).round().long().numpy(), minlength=n + 2)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_benjamini_hochberg_matches_scipy_and_keeps_its_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    q, found = Rate(0.2, is_discovery=True), []
    for _ in range(300):
        known, new = torch.randn(199, generator=generator), torch.randn(100, generator=generator)
        new[:20] -= 3.0
        p = conformal_p_values(known, new)
        flagged = p <= largest_p_value(p, q) * (1 + 1e-9)
        assert flagged.tolist() == (stats.false_discovery_control(p.numpy()) <= 0.2 * (1 + 1e-9)).tolist()
        found.append((float(flagged[20:].sum() / flagged.sum().clamp_min(1)), float(flagged[:20].double().mean())))
    discoveries, power = np.mean(found, axis=0)
    error = np.std([each for each, _ in found]) / len(found) ** 0.5
    # 80 of 100 rows are ordinary, and ordinary p-values are uniform
    assert discoveries <= 0.2 * 0.8 + 4 * error
    assert discoveries > 0.08
    assert power > 0.5


def test_decisions_agree_with_the_p_values_for_all_rates() -> None:
    generator = torch.Generator().manual_seed(0)
    known, x = (torch.randn(n, 2, generator=generator).round(decimals=1) for n in (99, 300))
    for rate in (0.01, 0.05, 0.07, 0.29, 0.57, 0.99):
        found = find_anomalies(normal(), x, known, false_positive_rate=rate)
        np.testing.assert_array_equal(found.is_anomaly, found.p_values <= rate + 1e-12)
        assert found.threshold is not None
        np.testing.assert_array_equal(found.is_anomaly, found.log_p < found.threshold)
    by_discovery = find_anomalies(normal(), torch.cat([x, x[:100] + 9]), known, false_discovery_rate=0.1)
    assert 80 <= by_discovery.is_anomaly.sum() <= 130


def test_rates_that_need_more_calibration_rows_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    x, known = torch.zeros(5, 2), torch.randn(98, 2)
    for options in ({"false_positive_rate": 0.01}, {"false_discovery_rate": 0.01}, {}):
        with pytest.raises(ConfigError, match=r"\b99\b.*\b98\b"):
            find_anomalies(normal(), x, known, **options)
    with pytest.raises(ConfigError, match="1,999"):
        find_anomalies(normal(), x, known, false_positive_rate=0.0005)
    assert find_anomalies(normal(), x, torch.randn(99, 2)).is_anomaly.sum() == 0
    for options in ({"false_positive_rate": 1}, {"false_positive_rate": 0}, {"false_discovery_rate": "small"}):
        with pytest.raises(ConfigError, match="rate="):
            find_anomalies(normal(), x, known, **options)
    with pytest.raises(ConfigError, match="false_discovery_rate"):
        find_anomalies(normal(), x, known, false_positive_rate=0.1, false_discovery_rate=0.1)
    # one anomaly among 50 rows would need a p-value of 0.002
    x = torch.zeros(50, 2)
    x[0] = 50
    with caplog.at_level(logging.WARNING, "flowtrain"):
        found = find_anomalies(normal(), x, known, false_discovery_rate=0.1)
    assert (found.is_anomaly.sum(), found.threshold) == (0, None)
    # 50 / (0.1 * 99) = 5.05
    assert "6 or more" in caplog.text


def test_rows_that_cannot_be_scored_are_the_least_likely() -> None:
    known = torch.randn(99, 2)
    x = torch.tensor([[0.0, 0.0], [torch.inf, 0.0], [torch.nan, 0.0]])
    log_p = torch.tensor([-1.8, -torch.inf, torch.nan], dtype=torch.float64)
    found, rows = detect_anomalies(normal(), x[:1].expand(3, 2), None, log_p, known, None, Rate(0.05))
    assert rows.flagged.tolist() == [False, True, True]
    assert found.flagged == 2
    assert rows.p_values[1:].tolist() == [0.01, 0.01]


def test_average_precision_and_measured_rates_match_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 12, (300,), generator=generator).double()
    bad = torch.rand(300, generator=generator) < 0.3
    assert average_precision(score, bad) == pytest.approx(average_precision_score(bad, score), abs=1e-12)
    known, x = torch.randn(99, 2, generator=generator), torch.randn(300, 2, generator=generator)
    x[bad] *= 3
    labels = bad.double()
    labels[:7] = torch.nan
    flow = normal()
    log_p = flow.log_prob(x).detach().double()
    found, rows = detect_anomalies(flow, x, None, log_p, known, None, Rate(0.1), labels)
    hit, bad, log_p = rows.flagged[7:], bad[7:], log_p[7:]
    assert (found.n, found.n_anomalies, found.n_ordinary) == (300, int(bad.sum()), int((~bad).sum()))
    assert found.average_precision == pytest.approx(average_precision_score(bad, -log_p), abs=1e-12)
    assert found.measured_false_positive_rate == pytest.approx(float(hit[~bad].double().mean()))
    assert found.measured_true_positive_rate == pytest.approx(float(hit[bad].double().mean()))
    assert found.measured_false_discovery_rate == pytest.approx(float((~bad)[hit].double().mean()))
    # only ordinary rows: no area under the ROC curve
    found, _ = detect_anomalies(flow, x[:20], None, log_p[:20], known, None, Rate(0.1), torch.zeros(20))
    assert (found.auroc, found.n_anomalies, found.measured_true_positive_rate) == (None, 0, None)


def test_contributions_of_a_normal_distribution_are_half_squares_of_conditional_deviations() -> None:
    rho = 0.9
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    flow = gaussian(covariance)
    known = flow.sample(20_000, generator=torch.Generator().manual_seed(0))
    # both values are common, but not together
    x = torch.tensor([[1.5, -1.5], [0.3, 3.5]], dtype=torch.float64)
    columns, gains = contributions(flow, x, None, known, 2)
    for row, column, gain in zip(x, columns, gains, strict=True):
        for j, found in zip(column.tolist(), gain.tolist(), strict=True):
            off = (row[j] - rho * row[1 - j]) / (1 - rho**2) ** 0.5
            assert found == pytest.approx(float(off**2 / 2), rel=0.01, abs=0.02)
    # the unit of a column has no effect
    unit = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    again = contributions(gaussian(covariance * unit * unit.unsqueeze(1)), x * unit, None, known * unit, 2)
    assert torch.equal(again[0], columns)
    torch.testing.assert_close(again[1], gains)


def test_the_disturbed_column_is_named() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    x = torch.randn(3000, 6, generator=generator) @ mixing.T
    covariance = mixing @ mixing.T
    flow = gaussian(covariance)
    known, new = x[:1000], x[1000:1200].clone()
    disturbed = torch.arange(200) % 6
    # conditional standard deviations, which are much smaller than the standard deviations
    scale = torch.linalg.inv(covariance).diagonal().rsqrt()
    new[torch.arange(200), disturbed] += 6 * scale[disturbed]
    found = find_anomalies(flow, new, known)
    assert found.is_anomaly.mean() > 0.9
    named = found.columns[found.is_anomaly]
    right = named == disturbed[found.is_anomaly].numpy()[:, None]
    assert right[:, 0].mean() > 0.75
    assert right.any(1).mean() > 0.95
    assert (np.diff(found.contributions[found.is_anomaly]) <= 0).all()
    assert np.isnan(found.contributions[~found.is_anomaly]).all()
    assert (found.columns[~found.is_anomaly] == -1).all()


def test_ensembles_contexts_and_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    known, x = torch.randn(199, 2, generator=generator), torch.zeros(3, 2)
    x[1, 1] = 8
    pair = Ensemble([normal(), gaussian(torch.eye(2) + 0.5)], [0.5, 0.5])
    found = find_anomalies(pair, x, known)
    assert (found.is_anomaly.tolist(), found.columns[1, 0]) == ([False, True, False], 1)
    # each value is common, but not with every context
    c = torch.linspace(-1, 1, 199).unsqueeze(1)
    flow = Flow((2,), Shift(), context=(ContextColumn("c"),)).eval()
    x = torch.tensor([[9.0, 11.0]] * 2)
    found = find_anomalies(flow, x, known + 10 * c, context=[[1.0], [-1.0]], calibration_context=c)
    assert found.is_anomaly.tolist() == [False, True]
    assert found.contributions[1].tolist() == pytest.approx([21**2 / 2, 19**2 / 2], rel=0.01)
    labelled = flowtrain.models.realnvp(2, layers=2, hidden=(4,), conditional=True, classes=3).eval()
    labels = torch.arange(199) % 3
    found = find_anomalies(labelled, x, known, context=[0, 1], calibration_context=labels)
    np.testing.assert_allclose(found.log_p, labelled.log_prob(x, torch.tensor([0, 1])).detach(), rtol=1e-5)


def test_whole_numbers_are_replaced_by_whole_numbers() -> None:
    flow = Flow((2,), Affine(2), integer_valued=True).eval()
    known = torch.randint(0, 3, (99, 2), generator=torch.Generator().manual_seed(0))
    found = find_anomalies(flow, np.array([[0, 0], [0, 30]]), known)
    assert (found.is_anomaly.tolist(), found.columns[1, 0]) == ([False, True], 1)
    # images have no contributions
    images = Flow((1, 1, 2), Affine(2)).eval()
    found = find_anomalies(images, torch.full((3, 1, 1, 2), 9.0), torch.randn(99, 1, 1, 2))
    assert (found.is_anomaly.tolist(), found.columns.shape) == ([True] * 3, (3, 0))
