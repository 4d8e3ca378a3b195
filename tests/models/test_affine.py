"""model=affine: the conditional Gaussian is the linear regression of the samples on the context."""

import numpy as np
import pytest
import torch
import torch.distributions as D
from helpers.flows import perturbed
from torch import Tensor

from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine, ContextShift, FromGaussian
from flowtrain.models.affine import affine
from flowtrain.runs.fit import fit


def linear_gaussian(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns samples x (n, 2), features c (n, 3), and the exact log p(x | c)."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 0.3]])
    factor = torch.tensor([[0.7, 0.0], [-0.4, 0.2]])
    c = torch.randn(n, 3, generator=generator)
    mean = 5 + c @ slope
    x = mean + torch.randn(n, 2, generator=generator) @ factor.T
    return x, c, D.MultivariateNormal(mean, scale_tril=factor).log_prob(x)


@pytest.mark.parametrize("start", [False, True])
def test_initialization_reaches_the_exact_conditional_density(start: bool) -> None:
    x, c, _ = linear_gaussian(4000, 0)
    bijection = affine(2, conditional=True, classes=3).bijection
    bijection = FromGaussian(bijection, 2) if start else bijection
    bijection.initialize(x, c)
    x, c, expected = linear_gaussian(4000, 1)
    z, log_det = bijection.inverse(x, c)
    found = D.Independent(D.Normal(torch.zeros(2), torch.ones(2)), 1).log_prob(z) + log_det
    # 11 parameters cost 11 / 2 / 4000 nats
    assert (expected - found).mean().item() == pytest.approx(0.0, abs=0.005)


def test_fit_with_labels_is_a_gaussian_for_each_class() -> None:
    rng = np.random.default_rng(0)
    means, label = np.array([[0.0, 0.0], [9.0, -4.0], [3.0, 50.0]]), rng.integers(0, 3, 3000)
    x = means[label] + rng.normal(size=(3000, 2)) * [0.1, 2.0]
    flow = fit(x, model="affine", label=label, progress=False)
    normal = D.Independent(D.Normal(torch.tensor(means[label]), torch.tensor([0.1, 2.0])), 1)
    assert normal.log_prob(torch.tensor(x)).mean() - flow.log_prob(x, label).mean() == pytest.approx(0, abs=0.01)
    drawn = flow.sample(4000, label=1)
    torch.testing.assert_close(drawn.mean(0).double(), torch.tensor(means[1]), rtol=0.0, atol=0.2)


def test_shift_by_collinear_or_constant_features_is_finite() -> None:
    x, c, _ = linear_gaussian(100, 0)
    c = torch.cat([c, 2 * c[:, :1], torch.ones(100, 1)], 1)
    shift = ContextShift(2, 5)
    residual = shift.initialize(x, c)
    assert shift.embedding.isfinite().all()
    design = torch.cat([c, torch.ones(100, 1)], 1)
    best = x - design @ torch.linalg.pinv(design) @ x
    torch.testing.assert_close(residual - residual.mean(0), best, rtol=1e-6, atol=1e-8)


def test_shift_is_a_translation() -> None:
    shift, x = perturbed(ContextShift(4, 3)), torch.randn(5, 1, 2, 2)
    labels = torch.tensor([0, 1, 2, 1, 0])
    z, log_det = shift.inverse(x, labels)
    torch.testing.assert_close((x - z).flatten(1), torch.eye(3)[labels] @ shift.embedding)
    torch.testing.assert_close(shift(z, labels)[0], x)
    assert not log_det.any()


def test_flow_without_context_has_no_new_parameters() -> None:
    assert list(affine(2).bijection.state_dict()) == list(Chain([Affine(2)]).state_dict())
