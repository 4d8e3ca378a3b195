"""What evaluations are made of, against closed forms, scipy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from flowtrain.evaluation.calibration import calibration, ks_distance, ks_p_value
from flowtrain.evaluation.ood import auroc, ood_detection
from flowtrain.utils.formatting import brief, decimals, with_error


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (2.40163, 0.00612, "2.402 +- 0.006"),
        (2.40163, 0.0146, "2.402 +- 0.015"),
        (2.40163, 0.0196, "2.40 +- 0.02"),
        (2.40163, 0.0096, "2.402 +- 0.010"),
        (2.40163, 0.095, "2.40 +- 0.10"),
        (-1234.5, 31.0, "-1230 +- 30"),
        (-1234.5, 120.0, "-1230 +- 120"),
        (5.0, 1.2, "5.0 +- 1.2"),
        (0.0, 3.2e-7, "0.0000000 +- 0.0000003"),
        (2.5, 0.0, "2.5000"),
        (2.40163, float("nan"), "2.4016"),
        (float("nan"), 0.1, "nan"),
    ],
)
def test_numbers_end_where_their_error_begins(value: float, error: float, words: str) -> None:
    assert with_error(value, error) == words


@pytest.mark.parametrize("error", np.geomspace(1e-9, 1e9, 181).tolist())
def test_an_error_keeps_one_digit_or_two(error: float) -> None:
    shown = round(error, decimals(error))
    assert abs(shown - error) <= 0.26 * error
    assert 1 <= round(shown * 10.0 ** decimals(error)) <= 20


def test_brief() -> None:
    shown = [brief(v) for v in (0.0, 3.1e-6, 0.02, 0.0061, 0.35, 4.2, 9.7, 123.4, 2e7, 1e-12)]
    assert shown == ["0", "3e-6", "0.02", "0.006", "0.3", "4", "10", "123", "2e7", "1e-12"]


@pytest.mark.parametrize("n", [5, 40, 2000])
def test_kolmogorov_smirnov_is_scipys(n: int) -> None:
    u = torch.rand(n, 3) ** 1.05
    for j, found in enumerate(ks_distance(u).tolist()):
        expected = stats.kstest(u[:, j].numpy(), "uniform")
        assert found == pytest.approx(expected.statistic, abs=1e-12)
        assert ks_p_value(found, n) == pytest.approx(expected.pvalue, abs=0.02)
    assert ks_p_value(0.9, 2000) == 0.0
    assert ks_p_value(0.0, 5) == 1.0


def test_calibration_sees_the_latent_and_the_dependence_that_are_off() -> None:
    z = torch.randn(4000, 12)
    good, pit = calibration(z)
    assert good.p_value > 0.01
    assert len(pit) == 9
    # by scipy: normal and chi-square distribution functions
    name = next(iter(pit))
    np.testing.assert_allclose(pit[name].numpy(), stats.norm.cdf(z[:, int(name[1:]) - 1].numpy()), atol=1e-12)
    np.testing.assert_allclose(pit["radius"].numpy(), stats.chi2.cdf(z.square().sum(1).numpy(), 12), atol=1e-10)
    shifted = z.clone()
    shifted[:, 7] += 0.3
    found, _ = calibration(shifted)
    assert (found.worst, found.p_value < 1e-6) == ("z8", True)
    # rows that have no latents are left out
    lost, _ = calibration(torch.cat([shifted, torch.full((500, 12), torch.nan)]))
    assert lost == found
    assert calibration(torch.full((5, 12), torch.nan))[0].n == 0
    # each column normal, all of them equal: nothing but the radius can tell
    same, _ = calibration(z[:, :1].expand(4000, 12))
    assert (same.worst, same.p_value < 1e-6, same.radius) == ("radius", True, same.statistic)


def test_auroc_is_scikit_learns_with_ties_and_infinities() -> None:
    inside, outside = torch.randint(0, 9, (200,)).double(), torch.randint(3, 15, (300,)).double()
    for other in (outside, torch.cat([outside, torch.tensor([1e9])])):
        labels = [0] * len(inside) + [1] * len(other)
        expected = roc_auc_score(labels, torch.cat([inside, other]).numpy())
        assert auroc(inside, other)[0] == pytest.approx(expected, abs=1e-12)
    assert auroc(inside, torch.full((4,), torch.inf))[0] == 1.0
    assert auroc(torch.zeros(3), torch.zeros(5))[0] == 0.5
    assert math.isnan(auroc(torch.zeros(1), torch.zeros(5))[1])


def test_error_of_auroc_is_its_spread() -> None:
    found = [auroc(torch.randn(80), 1 + torch.randn(50)) for _ in range(400)]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.12)
    assert values.mean() == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.01)


def test_separation_counts_what_is_not_finite_as_least_likely() -> None:
    inside, outside = -2 + torch.randn(100), torch.tensor([-50.0, -torch.inf, torch.nan])
    found = ood_detection("noise", inside, outside, 1.5, "validation set")
    assert (found.n, found.infinite, found.auroc, found.typicality_auroc) == (3, 2, 1.0, 1.0)
    assert found.nll == 50.0
    assert (found.entropy, found.entropy_of) == (1.5, "validation set")
    # more likely than the set itself, as Fashion-MNIST's flows find MNIST: log p fails, typicality does not
    likely = ood_detection("likely", inside, 40 + torch.randn(100), 2.0, "validation set")
    assert (likely.auroc, likely.typicality_auroc) == (0.0, 1.0)
    # rows of the set itself count alike
    lost = torch.cat([inside, torch.tensor([torch.nan, -torch.inf])])
    found = ood_detection("noise", lost, outside, 2.0, "validation set")
    labels, ranks = [0] * 102 + [1] * 3, np.concatenate([lost.nan_to_num(-1e9, neginf=-1e9), [-50, -1e9, -1e9]])
    assert found.auroc == pytest.approx(roc_auc_score(labels, -ranks), abs=1e-12)
    assert found.typicality_auroc == pytest.approx(roc_auc_score(labels, abs(ranks + 2.0)), abs=1e-12)
