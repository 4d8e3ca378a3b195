"""The Gaussian mixture against torch.distributions, and its centers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flowtrain.data.targets.mixtures import GaussianMixture
from flowtrain.utils.errors import ConfigError

Samples = Callable[..., Tensor]


def test_density_equals_torch_distributions(samples: Samples) -> None:
    target = GaussianMixture(n_modes=7, dim=3, loc_range=5.0, std=0.7, seed=2)
    assert target.modes is not None
    each = Independent(Normal(target.modes, torch.tensor(0.7).double()), 1)
    x = torch.cat([samples(target, 50), 10 * torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double()])
    expected = MixtureSameFamily(Categorical(torch.ones(7).double()), each).log_prob(x)
    torch.testing.assert_close(target(x), expected, rtol=1e-12, atol=1e-12)


def test_centers_equal_the_authors_code() -> None:
    target = GaussianMixture()
    assert target.modes is not None
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    expected = (torch.rand((40, 2), dtype=torch.float32) - 0.5) * 2 * 40
    torch.random.set_rng_state(state)
    assert torch.equal(target.modes.float(), expected)
    assert target.std == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(1.0).double())))


def test_samples_are_equally_often_at_each_center(samples: Samples) -> None:
    target = GaussianMixture(n_modes=5, dim=2, loc_range=100.0)
    assert target.modes is not None
    x = samples(target, 20_000)
    distances = torch.cdist(x, target.modes)
    nearest = distances.argmin(1)
    shares = torch.bincount(nearest, minlength=5) / len(x)
    assert (shares - 0.2).abs().max() < 4 * math.sqrt(0.16 / len(x))
    assert (x - target.modes[nearest]).std() == pytest.approx(target.std, rel=0.02)


def test_initial_distribution_covers_the_centers_unless_a_scale_is_given() -> None:
    assert GaussianMixture(loc_range=30.0).scale.tolist() == pytest.approx([30 / math.sqrt(3)] * 2)
    assert GaussianMixture(scale=1.0).scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("keys", [{"n_modes": 0}, {"std": 0.0}, {"loc_range": -1.0}, {"seed": 0.5}, {"dim": 0}])
def test_numbers_out_of_range_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"target.{next(iter(keys))}"):
        GaussianMixture(**keys)  # type: ignore[arg-type]
