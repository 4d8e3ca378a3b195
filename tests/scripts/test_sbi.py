"""The tasks of the SBI benchmark: simulators agree with likelihoods, and exact posteriors with the benchmark's."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
NAMES = ["two_moons", "slcp", "gaussian_mixture", "gaussian_linear_uniform"]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import sbi_tasks

    return sbi_tasks


# a square of half width 0.3 has the probabilities (2 Phi(0.3) - 1)^2 and (2 Phi(3) - 1)^2 under the two components
# of the mixture. Their mean is 0.525
@pytest.mark.parametrize(
    ("name", "half", "inside"),
    [("two_moons", 0.16, 1.0), ("gaussian_mixture", 4.5, 1.0), ("gaussian_mixture", 0.3, 0.525)],
)
def test_simulations_have_the_density_of_the_likelihood(
    tasks: ModuleType, name: str, half: float, inside: float
) -> None:
    task, rng = tasks.TASKS[name], np.random.default_rng(0)
    theta = 0.5 * task.prior(1, rng)
    x = task.simulate(np.repeat(theta, 20_000, 0), rng)
    centre = x.mean(0)
    # the sum of the density over a fine grid in each of 6 x 6 cells
    edges, fine = np.linspace(-half, half, 7), 120
    grid = -half + 2 * half * (np.arange(fine) + 0.5) / fine
    points = centre + np.stack(np.meshgrid(grid, grid, indexing="ij"), 2).reshape(-1, 2)
    density = np.exp([task.log_likelihood(theta, point)[0] for point in points]) * (2 * half / fine) ** 2
    expected = density.reshape(6, fine // 6, 6, fine // 6).sum((1, 3))
    assert expected.sum() == pytest.approx(inside, abs=0.01)
    found = np.histogram2d(*(x - centre).T, (edges, edges))[0] / len(x)
    assert found == pytest.approx(expected, abs=0.015)


def test_slcp_draws_four_points_of_a_normal_distribution(tasks: ModuleType) -> None:
    task, rng = tasks.TASKS["slcp"], np.random.default_rng(0)
    theta = np.array([0.7, -2.9, -1.0, 0.8, 0.6])
    x = task.simulate(np.repeat(theta[None], 50_000, 0), rng)
    s1, s2, rho = 1.0, 0.64, np.tanh(0.6)
    covariance = np.array([[s1**2, rho * s1 * s2], [rho * s1 * s2, s2**2]])
    assert x.mean(0) == pytest.approx(np.tile(theta[:2], 4), abs=0.02)
    assert np.cov(x.T) == pytest.approx(np.kron(np.eye(4), covariance), abs=0.03)
    for row in x[:5]:
        exact = stats.multivariate_normal(theta[:2], covariance).logpdf(row.reshape(4, 2)).sum()
        assert task.log_likelihood(theta[None], row)[0] == pytest.approx(exact)


def test_the_linear_task_has_normal_noise(tasks: ModuleType) -> None:
    task, rng = tasks.TASKS["gaussian_linear_uniform"], np.random.default_rng(0)
    theta = task.prior(2000, rng)
    x = task.simulate(theta, rng)
    assert stats.kstest(((x - theta) / 0.1**0.5).ravel(), "norm").pvalue > 0.001
    exact = stats.norm(theta, 0.1**0.5).logpdf(x[0]).sum(1)
    assert task.log_likelihood(theta, x[0]) == pytest.approx(exact)


@pytest.mark.parametrize("name", NAMES)
def test_exact_posteriors_agree_with_the_reference(
    tasks: ModuleType, real: Callable[..., list[str]], real_data: Path, name: str
) -> None:
    real(f"sbibm/{name}/1")
    task, rng = tasks.TASKS[name], np.random.default_rng(0)
    x, theta, reference = tasks.observation(name, 1, real_data)
    assert max(np.abs(reference).max(), np.abs(theta).max()) <= task.bound
    exact = task.posterior(x, 500, rng)
    for column in range(task.d):
        assert stats.ks_2samp(exact[:, column], reference[:, column]).pvalue > 1e-3, column
    likelihoods = [task.log_likelihood(part, x) for part in (exact, reference)]
    assert stats.ks_2samp(*likelihoods).pvalue > 1e-3


def test_c2st_of_equal_and_different_sets(tasks: ModuleType) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400, 1))
    assert tasks.c2st(a, b) == pytest.approx(0.5, abs=0.08)
    # the best possible accuracy for two normals at a distance of 2 is Phi(1)
    assert tasks.c2st(a, b + 2) == pytest.approx(stats.norm.cdf(1), abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_map_to_real_numbers_makes_the_prior_normal(tasks: ModuleType, name: str) -> None:
    task = tasks.TASKS[name]
    theta = task.prior(2000, np.random.default_rng(0))
    y = task.unbounded(theta)
    assert stats.kstest(y.ravel(), "norm").pvalue > 1e-3
    assert task.bounded(y) == pytest.approx(theta)
    # of the prior 1 / (2 bound)^d and of the standard normal density of y, the slope is the quotient
    density = -task.d * np.log(2 * task.bound) - stats.norm.logpdf(y).sum(1)
    assert task.log_slope(theta) == pytest.approx(density)
    assert np.abs(task.bounded(np.array([[-40.0] * task.d, [40.0] * task.d]))).max() <= task.bound


def test_a_posterior_is_fitted_and_reported(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import sbi

    monkeypatch.setattr(sbi, "SAMPLES", 300)
    monkeypatch.setattr(sbi, "NEW", 200)
    monkeypatch.setattr(tasks, "c2st", lambda reference, samples: float((np.abs(samples) <= 1).all()))
    few = ["model.hidden=[8]", "model.layers=1", "trainer.steps=40"]
    given = argparse.Namespace(simulations=300, members=2, observations=[1], simulated=True, set=few)
    found = sbi.measure("gaussian_linear_uniform", 0, given)
    # no sample leaves the box of the prior
    assert found["c2st"] == {"1": 1.0}
    # the prior has the NLL 10 log 2, which a few steps improve
    assert found["nll"] < 10 * np.log(2)
    lines = sbi.report([{"task": "gaussian_linear_uniform", "seed": 0, **found}]).splitlines()
    assert len(lines) == 3
    assert "0.567" in lines[2]
