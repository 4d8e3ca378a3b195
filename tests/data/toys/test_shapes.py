"""Every toy in configs/data: density, samples and entropy agree with each other and with FFJORD's code."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from flowtrain.data.base import step_generator
from flowtrain.data.toys.base import Toy

# A square that contains all the mass. Its cells align with the checkerboard and with bins of side 0.5.
HALF_SIDE, CELLS, CELLS_PER_BIN = 6.0, 192, 8


# Entropies in nats by Monte Carlo, +-0.01, computed independently from the definitions of the toys.
MONTE_CARLO = {
    "moons": 2.394,
    "circles": 3.26,
    "rings": 2.63,
    "8gaussians": 2.83,
    "swissroll": 2.67,
    "checkerboard": math.log(32),
    "pinwheel": 2.32,
    "2spirals": 2.65,
}


@cache
def log_density_on_grid(toy: Callable[[str], Toy], name: str) -> tuple[Tensor, float]:
    """Returns log p at the cell centers, (CELLS, CELLS), and the area of a cell."""
    width = 2 * HALF_SIDE / CELLS
    centres = -HALF_SIDE + width * (torch.arange(CELLS, dtype=torch.float64) + 0.5)
    return toy(name).log_prob(torch.cartesian_prod(centres, centres)).view(CELLS, CELLS), width**2


def reference_samples(name: str, n: int) -> np.ndarray:
    """Returns samples (n, 2) of the toys, implemented again in NumPy like the reference code."""
    rng = np.random.default_rng(1)
    u, noise, k = rng.random((3, n)), rng.standard_normal((2, n)), rng.integers(0, 1000, n)
    match name:
        case "moons":
            a = np.pi * u[0]
            m = np.where(k % 2, [np.cos(a), np.sin(a)], [1 - np.cos(a), 0.5 - np.sin(a)])
            x = (m + 0.1 * noise) * 2 + np.array([[-1], [-0.2]])
        case "circles":
            a, r = 2 * np.pi * u[0], np.where(k % 2, 1, 0.5)
            x = (np.stack([r * np.cos(a), r * np.sin(a)]) + 0.08 * noise) * 3
        case "rings":
            a, r = 2 * np.pi * u[0], (1 + k % 4) / 4
            x = np.stack([r * np.cos(a), r * np.sin(a)]) * 3 + 0.08 * noise
        case "8gaussians":
            x = (4 * np.stack([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)]) + 0.5 * noise) / 1.414
        case "swissroll":
            a = 1.5 * np.pi * (1 + 2 * u[0])
            x = (np.stack([a * np.cos(a), a * np.sin(a)]) + noise) / 5
        case "checkerboard":
            x1 = 4 * u[0] - 2
            x = 2 * np.stack([x1, u[1] - 2 * (k % 2) + np.floor(x1) % 2])
        case "pinwheel":
            r, t = 1 + 0.3 * noise[0], 0.1 * noise[1]
            a = 2 * np.pi * (k % 5) / 5 + 0.25 * np.exp(r)
            x = 2 * np.stack([r * np.cos(a) + t * np.sin(a), -r * np.sin(a) + t * np.cos(a)])
        case "2spirals":
            a, s = 3 * np.pi * np.sqrt(u[0]), np.where(k % 2, 1, -1)
            x = s * np.stack([-a * np.cos(a) + 0.5 * u[1], a * np.sin(a) + 0.5 * u[2]]) / 3 + 0.1 * noise
        case _:
            pytest.skip(f"no reference sampler for {name}")
    return x.T


def own_samples(toy: Callable[[str], Toy], name: str, n: int) -> np.ndarray:
    return toy(name).sample(n, step_generator(5, 9)).numpy()


def test_the_eight_toys_exist(toys: dict[str, type[Toy]]) -> None:
    assert set(MONTE_CARLO) <= set(toys)


def test_density_integrates_to_one(name: str, toy: Callable[[str], Toy]) -> None:
    log_p, area = log_density_on_grid(toy, name)
    assert float(log_p.exp().sum()) * area == pytest.approx(1, abs=1e-6 if name != "pinwheel" else 1e-5)


def test_entropy_is_the_integral_of_the_density(name: str, toy: Callable[[str], Toy]) -> None:
    log_p, area = log_density_on_grid(toy, name)
    assert float(torch.special.entr(log_p.exp()).sum()) * area == pytest.approx(toy(name).entropy, abs=1e-4)


def test_entropy_matches_an_independent_estimate(name: str, toy: Callable[[str], Toy]) -> None:
    if name not in MONTE_CARLO:
        pytest.skip(f"no independent entropy for {name}")
    assert toy(name).entropy == pytest.approx(MONTE_CARLO[name], abs=0.01)


def test_entropy_is_the_mean_score_of_samples(name: str, toy: Callable[[str], Toy]) -> None:
    nll = -toy(name).log_prob(torch.from_numpy(own_samples(toy, name, 50_000)))
    stderr = float(nll.std()) / math.sqrt(len(nll))
    assert float(nll.mean()) == pytest.approx(toy(name).entropy, abs=4 * stderr + 1e-9)


@pytest.mark.parametrize("source", ["own", "reference"])
def test_samples_follow_the_density(name: str, source: str, toy: Callable[[str], Toy]) -> None:
    n, bins = 40_000, CELLS // CELLS_PER_BIN
    log_p, area = log_density_on_grid(toy, name)
    mass = log_p.exp().view(bins, CELLS_PER_BIN, bins, CELLS_PER_BIN).sum(dim=(1, 3)).numpy() * area
    x1, x2 = (own_samples(toy, name, n) if source == "own" else reference_samples(name, n)).T
    counts, _, _ = np.histogram2d(x1, x2, bins=bins, range=[[-HALF_SIDE, HALF_SIDE]] * 2)

    filled = mass * n >= 10
    rest, expected_rest = n - counts[filled].sum(), n * (1 - mass[filled].sum())
    assert abs(rest - expected_rest) <= 4 * math.sqrt(abs(expected_rest)) + 1
    chi_square = ((counts - n * mass)[filled] ** 2 / (n * mass[filled])).sum()
    assert chi_square < filled.sum() + 4 * math.sqrt(2 * filled.sum())


def trapezoid(log_integrand: Callable[[Tensor], Tensor], last: float, nodes: int) -> Tensor:
    """Returns the log of the integral over [0, last] of exp(log_integrand), which maps N nodes to (..., N) values."""
    a = torch.linspace(0, last, nodes, dtype=torch.float64)
    terms = log_integrand(a)
    ends = torch.stack((terms[..., 0], terms[..., -1]), dim=-1) - math.log(2)
    inner = torch.cat((terms[..., 1:-1], ends), dim=-1)
    return inner.logsumexp(dim=-1) + math.log(last / (nodes - 1))


def log_normal(offset: Tensor, std: float) -> Tensor:
    return torch.distributions.Normal(0.0, std).log_prob(offset)


def brute_force_moons(x1: Tensor, x2: Tensor) -> Tensor:
    def upper(a: Tensor) -> Tensor:
        return log_normal(x1 + 1 - 2 * a.cos(), 0.2) + log_normal(x2 + 0.2 - 2 * a.sin(), 0.2)

    def lower(a: Tensor) -> Tensor:
        return log_normal(x1 - 1 + 2 * a.cos(), 0.2) + log_normal(x2 - 0.8 + 2 * a.sin(), 0.2)

    halves = [trapezoid(moon, math.pi, 200_000) for moon in (upper, lower)]
    return torch.logaddexp(*halves) - math.log(2 * math.pi)


def brute_force_swissroll(x1: Tensor, x2: Tensor) -> Tensor:
    def kernel(b: Tensor) -> Tensor:
        a = b + 1.5 * math.pi
        return log_normal(x1 - a * a.cos() / 5, 0.2) + log_normal(x2 - a * a.sin() / 5, 0.2)

    return trapezoid(kernel, 3 * math.pi, 200_000) - math.log(3 * math.pi)


def brute_force_two_spirals(x1: Tensor, x2: Tensor) -> Tensor:
    def log_box(offset: Tensor) -> Tensor:
        right = torch.special.log_ndtr(-(offset.abs() - 1 / 12) / 0.1)
        left = torch.special.log_ndtr(-(offset.abs() + 1 / 12) / 0.1)
        return right + torch.log1p(-(left - right).exp()) + math.log(6)

    def arm(sign: int) -> Tensor:
        def kernel(a: Tensor) -> Tensor:
            m1, m2 = (0.25 - a.cos() * a) / 3, (0.25 + a.sin() * a) / 3
            return (2 * a / (3 * math.pi) ** 2).log() + log_box(sign * x1 - m1) + log_box(sign * x2 - m2)

        return trapezoid(kernel, 3 * math.pi, 20_000)

    return torch.logaddexp(arm(1), arm(-1)) - math.log(2)


def brute_force_pinwheel(x1: Tensor, x2: Tensor) -> Tensor:
    """Finds the roots in r instead of the angle, by sign changes of g(r) = first entry of R(theta) x / 2 - r."""
    r = torch.linspace(-4, 5, 200_000, dtype=torch.float64)
    total = torch.zeros(len(x1), dtype=torch.float64)
    for arm in range(5):
        theta = 2 * math.pi * arm / 5 + 0.25 * r.exp()
        back1 = (theta.cos() * x1 - theta.sin() * x2) / 2
        t = (theta.sin() * x1 + theta.cos() * x2) / 2
        g = back1 - r
        p = (log_normal(r - 1, 0.3) + log_normal(t, 0.1)).exp() / (1 + 0.25 * r.exp() * t).abs()
        crossing = g[:, :-1] * g[:, 1:] < 0
        weight = g[:, :-1].abs() / (g[:, :-1].abs() + g[:, 1:].abs())
        total += (crossing * (p[:, :-1] * (1 - weight) + p[:, 1:] * weight)).sum(dim=1)
    return (total / 20).log()


@pytest.mark.parametrize(
    ("name", "brute_force", "tolerance"),
    [
        ("moons", brute_force_moons, 1e-8),
        ("swissroll", brute_force_swissroll, 1e-8),
        ("2spirals", brute_force_two_spirals, 1e-6),
        ("pinwheel", brute_force_pinwheel, 1e-5),
    ],
)
def test_density_agrees_with_brute_force(
    name: str, brute_force: Callable[[Tensor, Tensor], Tensor], tolerance: float, toy: Callable[[str], Toy]
) -> None:
    x = torch.cat((toy(name).test[:22].double(), torch.tensor([[0.0, 0.0], [0.3, -2.5], [-2.0, 2.2]])))
    expected = torch.cat([brute_force(row[:, :1], row[:, 1:]) for row in x.split(5)])
    torch.testing.assert_close(toy(name).log_prob(x), expected, rtol=0, atol=tolerance)


def test_two_spirals_tail_agrees_with_brute_force(toy: Callable[[str], Toy]) -> None:
    """The points lie on both sides of the switch to the asymptotic tail of the box."""
    x = torch.tensor([[5.0, 0.0], [6.5, 0.2], [6.9, 0.0], [0.0, 8.0], [7.0, -9.0]])
    expected = brute_force_two_spirals(x[:, :1], x[:, 1:])
    torch.testing.assert_close(toy("2spirals").log_prob(x), expected, rtol=1e-3, atol=0)


def test_pinwheel_counts_every_root_where_the_map_folds(toy: Callable[[str], Toy]) -> None:
    """r = 2.6, t = -0.45 is past the fold (1 + 0.25 exp(r) t < 0), where an arm covers the point three times."""
    theta = torch.tensor(0.25 * math.exp(2.6))
    r, t = 2.6, -0.45
    x = 2 * torch.stack((r * theta.cos() + t * theta.sin(), t * theta.cos() - r * theta.sin()))[None]
    expected = brute_force_pinwheel(x[:, :1], x[:, 1:])
    torch.testing.assert_close(toy("pinwheel").log_prob(x), expected, rtol=0, atol=1e-4)
