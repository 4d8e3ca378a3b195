"""The wells against the energy of the authors' code, log Z by SciPy's quadrature, samples and modes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from flowtrain.data.targets.wells import DoubleWell, ManyWell
from flowtrain.utils.errors import ConfigError

Samples = Callable[..., Tensor]


def well(d: np.ndarray | float) -> np.ndarray:
    """exp(-energy) with a = -0.5, b = -6 and c = 1, as in the authors' code."""
    return np.exp(-(-0.5 * d - 6.0 * d**2 + 1.0 * d**4))


def test_density_equals_the_authors_code(samples: Samples) -> None:
    for target in (DoubleWell(), ManyWell(), ManyWell(6)):
        x = 1.3 * samples(target, 100)
        d, v = x[:, ::2].numpy(), x[:, 1::2].numpy()
        expected = (0.5 * d + 6 * d**2 - d**4 - 0.5 * v**2).sum(1)
        np.testing.assert_allclose(target(x).numpy(), expected, rtol=1e-10)


def test_log_z_equals_a_quadrature() -> None:
    z = integrate.quad(well, -5, 0, epsabs=1e-10)[0] + integrate.quad(well, 0, 5, epsabs=1e-10)[0]
    # the value in the paper's code
    assert z == pytest.approx(11784.50927, rel=1e-8)
    pair = math.log(z) + 0.5 * math.log(2 * math.pi)
    assert DoubleWell().log_z == pytest.approx(pair, abs=1e-10)
    assert ManyWell().log_z == pytest.approx(16 * pair, abs=1e-9)


def test_samples_follow_the_distribution_function(samples: Samples) -> None:
    x = samples(ManyWell(4)).numpy()
    grid = np.linspace(-4, 4, 20001)
    up_to = integrate.cumulative_simpson(well(grid), x=grid, initial=0)
    for column in (x[:, 0], x[:, 2]):
        assert stats.kstest(column, lambda v: np.interp(v, grid, up_to / up_to[-1])).pvalue > 1e-3
    for column in (x[:, 1], x[:, 3]):
        assert stats.kstest(column, stats.norm.cdf).pvalue > 1e-3
    # pairs are independent
    assert abs(np.corrcoef(x[:, 0], x[:, 2])[0, 1]) < 4 / math.sqrt(len(x))


def test_modes_are_all_maxima_for_few_columns() -> None:
    for dim in (2, 4, 8):
        target = ManyWell(dim)
        assert target.modes is not None
        assert len(set(map(tuple, target.modes.sign()[:, ::2].tolist()))) == len(target.modes) == 2 ** (dim // 2)
        x = target.modes.requires_grad_()
        (slope,) = torch.autograd.grad(target(x).sum(), x)
        assert slope.abs().max() < 1e-9
        hessian = torch.autograd.functional.hessian(lambda v, t=target: t(v[None]).sum(), target.modes[0].detach())
        assert torch.linalg.eigvalsh(hessian).max() < 0
    assert ManyWell().modes is None


@pytest.mark.parametrize("dim", [0, 3, "a"])
def test_an_odd_number_of_columns_is_refused(dim: object) -> None:
    with pytest.raises(ConfigError, match=r"target\.dim"):
        ManyWell(dim)  # type: ignore[arg-type]
