"""The funnel against SciPy's normal densities, its samples, and its tails."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flowtrain.data.targets.funnel import Funnel
from flowtrain.utils.errors import ConfigError

Samples = Callable[..., Tensor]


def test_the_density_is_a_product_of_normal_densities(samples: Samples) -> None:
    x = samples(Funnel(), 200)
    v, rest = x[:, 0].numpy(), x[:, 1:].numpy()
    expected = stats.norm.logpdf(v, 0, 3) + stats.norm.logpdf(rest, 0, np.exp(v / 2)[:, None]).sum(1)
    np.testing.assert_allclose(Funnel()(x).numpy(), expected, rtol=1e-12)


def test_samples_are_normal(samples: Samples) -> None:
    x = samples(Funnel()).numpy()
    assert stats.kstest(x[:, 0], stats.norm(0, 3).cdf).pvalue > 1e-3
    scaled = x[:, 1:] * np.exp(-x[:, :1] / 2)
    assert min(stats.kstest(column, stats.norm.cdf).pvalue for column in scaled.T) > 1e-3


def test_columns_are_named() -> None:
    assert Funnel(3).columns == ("v", "x1", "x2")


def test_the_bottom_of_the_funnel_has_a_finite_gradient() -> None:
    x = torch.full((1, 10), 1e6)
    x[0, 0] = -1e6
    x.requires_grad_()
    (slope,) = torch.autograd.grad(Funnel()(x).sum(), x)
    assert slope.isfinite().all()


@pytest.mark.parametrize("dim", [1, 0, 2.5])
def test_too_few_columns_are_refused(dim: float) -> None:
    with pytest.raises(ConfigError, match=r"target\.dim"):
        Funnel(dim)  # type: ignore[arg-type]
