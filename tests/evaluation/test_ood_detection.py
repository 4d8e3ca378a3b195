"""AUROC and typicality agree with scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from flowtrain.evaluation.ood_detection import auroc, ood_detection


def test_auroc_matches_scikit_learn_with_ties_and_infinities() -> None:
    inside, outside = torch.randint(0, 9, (200,)).double(), torch.randint(3, 15, (300,)).double()
    for other in (outside, torch.cat([outside, torch.tensor([1e9])])):
        labels = [0] * len(inside) + [1] * len(other)
        expected = roc_auc_score(labels, torch.cat([inside, other]).numpy())
        assert auroc(inside, other)[0] == pytest.approx(expected, abs=1e-12)
    assert auroc(inside, torch.full((4,), torch.inf))[0] == 1.0
    assert auroc(torch.zeros(3), torch.zeros(5))[0] == 0.5
    assert math.isnan(auroc(torch.zeros(1), torch.zeros(5))[1])


def test_auroc_standard_error_matches_the_empirical_spread() -> None:
    found = [auroc(torch.randn(80), 1 + torch.randn(50)) for _ in range(400)]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.12)
    assert values.mean() == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.01)


def test_ood_detection_counts_non_finite_rows_as_least_likely() -> None:
    inside, outside = -2 + torch.randn(100), torch.tensor([-50.0, -torch.inf, torch.nan])
    found = ood_detection("noise", inside, outside, 1.5, "validation set")
    assert (found.n, found.infinite, found.auroc, found.typicality_auroc) == (3, 2, 1.0, 1.0)
    assert found.nll == 50.0
    assert (found.entropy, found.entropy_of) == (1.5, "validation set")
    # other rows may be more likely than the evaluated set, like MNIST under a flow of Fashion-MNIST. Typicality detects
    # such rows
    likely = ood_detection("likely", inside, 40 + torch.randn(100), 2.0, "validation set")
    assert (likely.auroc, likely.typicality_auroc) == (0.0, 1.0)
    # non-finite rows of the set itself are treated in the same way
    lost = torch.cat([inside, torch.tensor([torch.nan, -torch.inf])])
    found = ood_detection("noise", lost, outside, 2.0, "validation set")
    labels, ranks = [0] * 102 + [1] * 3, np.concatenate([lost.nan_to_num(-1e9, neginf=-1e9), [-50, -1e9, -1e9]])
    assert found.auroc == pytest.approx(roc_auc_score(labels, -ranks), abs=1e-12)
    assert found.typicality_auroc == pytest.approx(roc_auc_score(labels, abs(ranks + 2.0)), abs=1e-12)
