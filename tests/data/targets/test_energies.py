"""The energies against the formulas of the paper in NumPy, and log Z by SciPy's quadrature."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.data.targets.energies import Energy1

Named = Callable[..., Target]
Samples = Callable[..., Tensor]


def energy(name: str, z1: np.ndarray, z2: np.ndarray) -> np.ndarray:
    """U of table 1 of Rezende and Mohamed 2015."""
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    match name:
        case "energy1":
            ends = np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2)
            return 0.5 * ((np.sqrt(z1**2 + z2**2) - 2) / 0.4) ** 2 - np.log(ends)
        case "energy2":
            return 0.5 * ((z2 - w1) / 0.4) ** 2
        case "energy3":
            return -np.log(np.exp(-0.5 * ((z2 - w1) / 0.35) ** 2) + np.exp(-0.5 * ((z2 - w1 + w2) / 0.35) ** 2))
        case _:
            return -np.log(np.exp(-0.5 * ((z2 - w1) / 0.4) ** 2) + np.exp(-0.5 * ((z2 - w1 + w3) / 0.35) ** 2))


ENERGIES = [f"energy{i}" for i in range(1, 5)]


@pytest.mark.parametrize("name", ENERGIES)
def test_density_equals_the_formula_of_the_paper(name: str, named: Named) -> None:
    grid = torch.linspace(-3.9, 3.9, 40, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid / 2)
    np.testing.assert_allclose(named(name)(x).numpy(), -energy(name, *x.numpy().T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ENERGIES)
def test_log_z_equals_a_quadrature(name: str, named: Named) -> None:
    def inner(z1: float) -> float:
        def p(z2: float) -> float:
            return float(np.exp(-energy(name, np.float64(z1), np.float64(z2))))

        return integrate.quad(p, -8, 7, points=[-4, -2, 0, 2], limit=200, epsabs=1e-9)[0]

    z1, weights = np.polynomial.legendre.leggauss(80)
    width = 6.0 if name == "energy1" else 4.0
    with np.errstate(divide="ignore"):
        found = width * sum(w * inner(width * z) for z, w in zip(z1, weights, strict=True))
    assert named(name).log_z == pytest.approx(math.log(found), abs=1e-6)


@pytest.mark.parametrize("name", ENERGIES[1:])
def test_the_support_of_x1_is_the_window(name: str, named: Named, samples: Samples) -> None:
    target = named(name)
    x = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [4.0001, 0.0], [-4.0001, 0.0]])
    assert target(x).isfinite().tolist() == [True, True, False, False]
    assert [str(one) for one in target.types] == ["interval(-4,4)", "real"]
    assert stats.kstest(samples(target)[:, 0].numpy(), stats.uniform(-4, 8).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("name", "weight"), [("energy2", 1.0), ("energy3", 0.5), ("energy4", 0.4 / 0.75)])
def test_samples_of_x2_lie_around_the_branches(name: str, weight: float, named: Named, samples: Samples) -> None:
    x1, x2 = samples(named(name)).numpy().T
    w1 = np.sin(np.pi * x1 / 2)
    shift = {"energy2": 0 * x1, "energy3": 3 * np.exp(-0.5 * ((x1 - 1) / 0.6) ** 2)}.get(
        name, 3 / (1 + np.exp(-(x1 - 1) / 0.3))
    )
    s = {"energy3": (0.35, 0.35)}.get(name, (0.4, 0.35))
    # the distribution function of x2 given x1 is uniform
    u = weight * stats.norm.cdf((x2 - w1) / s[0]) + (1 - weight) * stats.norm.cdf((x2 - w1 + shift) / s[1])
    assert stats.kstest(u, stats.uniform.cdf).pvalue > 1e-3


def test_samples_of_the_ring_have_its_moments(samples: Samples) -> None:
    x = samples(Energy1(), 100_000)
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    weights = Energy1()(points).softmax(0)
    # the columns and their product are symmetric about 0, so only even functions are compared
    for f in (lambda v: v[:, 0].square(), lambda v: v[:, 1].square(), lambda v: v.norm(dim=1), lambda v: v[:, 1].abs()):
        values = f(x)
        assert abs(values.mean() - (weights * f(points)).sum()) < 4 * values.std() / math.sqrt(len(x))
    assert abs((x[:, 0] > 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(len(x))


def test_the_modes_of_the_ring_are_maxima() -> None:
    target = Energy1()
    assert target.modes is not None
    around = 0.05 * torch.randn(2, 100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mode, other in zip(target.modes, target.modes[:, None] + around, strict=True):
        assert (target(other) < target(mode[None]) + 1e-9).all()
