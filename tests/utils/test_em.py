"""EM for Gaussian mixtures agrees with formulas written with torch.distributions. k-means finds clusters."""

import math

import pytest
import torch
from torch import Tensor
from torch import distributions as D

from flowtrain.utils import em
from flowtrain.utils.em import Mixture, Prior, clusters, e_step, fit_mixture, log_prior, m_step


def rows(n: int = 400, d: int = 3) -> Tensor:
    centres = 3 * torch.randn(4, d)
    return centres[torch.arange(n) % 4] + torch.randn(n, d) @ torch.randn(d, d)


def some_mixture(k: int, d: int, diagonal: bool) -> Mixture:
    factors = torch.randn(k, d, d).tril(-1) + torch.diag_embed(torch.rand(k, d) + 0.5)
    covariances = torch.rand(k, d) + 0.5 if diagonal else factors @ factors.mT
    return Mixture(torch.randn(k).log_softmax(0), torch.randn(k, d), covariances)


def joint(x: Tensor, mixture: Mixture) -> Tensor:
    """Returns log w_k N(x; m_k, S_k), (n, K)."""
    s = mixture.covariances
    parts = D.MultivariateNormal(mixture.means, torch.diag_embed(s) if s.dim() == 2 else s)
    return mixture.log_weights + parts.log_prob(x.unsqueeze(1))


def naive_step(x: Tensor, mixture: Mixture, prior: Prior) -> Mixture:
    """Computes one EM step with sums over rows."""
    q = joint(x, mixture).softmax(1)
    means, covariances = [], []
    for share in q.T:
        mean = (share.unsqueeze(1) * x).sum(0) / share.sum()
        outer = torch.stack([r * torch.outer(row - mean, row - mean) for r, row in zip(share, x, strict=True)]).sum(0)
        if mixture.covariances.dim() == 2:
            outer = outer.diagonal()
        means.append(mean)
        covariances.append((outer + prior.rows * prior.target) / (share.sum() + prior.rows))
    return Mixture(q.mean(0).log(), torch.stack(means), torch.stack(covariances))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("prior_rows", [0.0, 7.0])
@pytest.mark.parametrize("part", [2**22, 70])
def test_em_step_equals_a_naive_implementation(
    monkeypatch: pytest.MonkeyPatch, diagonal: bool, prior_rows: float, part: int
) -> None:
    """The features of the rows are stored in one part, or computed again in small parts."""
    monkeypatch.setattr(em, "PART", part)
    monkeypatch.setattr(em, "KEPT", 0 if part == 70 else 2**25)
    x, mixture = rows(100), some_mixture(5, 3, diagonal)
    target = torch.rand(3) if diagonal else torch.cov(torch.randn(3, 20))
    prior = Prior(prior_rows, target)
    mean_log_p, sums = e_step(em._Rows(x, diagonal), mixture)
    assert mean_log_p == pytest.approx(joint(x, mixture).logsumexp(1).mean().item(), abs=1e-12)
    found, expected = m_step(sums, diagonal, 0.0, prior), naive_step(x, mixture, prior)
    torch.testing.assert_close(found.log_weights, expected.log_weights)
    torch.testing.assert_close(found.means, expected.means)
    torch.testing.assert_close(found.covariances, expected.covariances)


@pytest.mark.parametrize("diagonal", [False, True])
def test_em_step_is_accurate_far_from_the_mean(diagonal: bool) -> None:
    """In components of variance 1e-6, rows 100 standard deviations away lose digits in the products of features."""
    x = torch.cat([torch.randn(50, 2), 100 + 1e-3 * torch.randn(50, 2)])
    variances = torch.tensor([[1.0, 1.0], [1e-6, 1e-6]])
    mixture = Mixture(
        torch.tensor([0.5, 0.5]).log(),
        torch.tensor([[0.0, 0.0], [100.0, 100.0]]),
        variances if diagonal else torch.diag_embed(variances),
    )
    found, _ = e_step(em._Rows(x, diagonal), mixture)
    assert found == pytest.approx(joint(x, mixture).logsumexp(1).mean().item(), abs=1e-5)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("prior_rows", [0.0, 5.0])
def test_em_never_decreases_the_objective(diagonal: bool, prior_rows: float) -> None:
    x = rows()
    parts = em._Rows(x, diagonal)
    prior = Prior(prior_rows, torch.full((3,), 0.3) if diagonal else 0.3 * torch.eye(3))
    mixture, values = some_mixture(6, 3, diagonal), []
    for _ in range(40):
        mean_log_p, sums = e_step(parts, mixture)
        values.append(mean_log_p + log_prior(mixture, prior) / len(x))
        mixture = m_step(sums, diagonal, 1e-6, prior)
    steps = torch.tensor(values).diff()
    assert steps.min() > -1e-12
    assert steps[0] > 0.1


@pytest.mark.parametrize("diagonal", [False, True])
def test_covariance_with_a_prior_maximizes_the_objective(diagonal: bool) -> None:
    """For one component, no change of the covariance raises the objective."""
    x = rows(30)
    prior = Prior(12.0, torch.rand(3) + 0.1 if diagonal else torch.cov(torch.randn(3, 20)))
    parts = em._Rows(x, diagonal)
    mode = m_step(em.sum_features(parts, torch.ones(30, 1)), diagonal, 0.0, prior)

    def objective(covariances: Tensor) -> float:
        mixture = Mixture(mode.log_weights, mode.means, covariances)
        return joint(x, mixture).sum().item() + log_prior(mixture, prior)

    best = objective(mode.covariances)
    for _ in range(50):
        change = 1e-3 * torch.randn_like(mode.covariances)
        change = change if diagonal else change + change.mT
        assert objective(mode.covariances + change) < best


def test_log_prior_equals_inverse_wishart_up_to_a_constant() -> None:
    """S^-1 has a Wishart distribution, and the log-densities of S and S^-1 differ by (d + 1) log|S|."""
    d, a = 3, 9.0
    target = torch.cov(torch.randn(d, 20))
    # an inverse Wishart with nu degrees of freedom has the exponent (nu + d + 1) / 2
    wishart = D.Wishart(a - d - 1, torch.linalg.inv(a * target))
    differences = []
    for _ in range(4):
        s = torch.cov(torch.randn(d, 20)).unsqueeze(0)
        precision = torch.linalg.inv(s)
        expected = wishart.log_prob(precision).sum() - (d + 1) * torch.logdet(s).sum()
        differences.append(log_prior(Mixture(torch.zeros(1), torch.zeros(1, d), s), Prior(a, target)) - expected)
    torch.testing.assert_close(torch.stack(differences), differences[0].expand(4))


def test_covariance_eigenvalues_stay_above_the_floor() -> None:
    covariances = torch.stack([torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)])
    found = em.floor_eigenvalues(covariances, 0.01)
    torch.testing.assert_close(found[0], torch.eye(3))
    torch.testing.assert_close(torch.linalg.eigvalsh(found[1]), torch.tensor([0.01, 0.01, 3.0]))
    torch.testing.assert_close(found[2], 0.01 * torch.eye(3))


def test_fit_is_finite_for_equal_rows_or_too_many_components() -> None:
    for x in (torch.zeros(5, 2), torch.randn(3, 2)):
        for diagonal in (False, True):
            mixture = fit_mixture(x, 8, diagonal)
            assert math.isfinite(joint(x, mixture).logsumexp(1).mean().item())


def test_clusters_recover_well_separated_groups() -> None:
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0], [25.0, 100.0]])
    truth = torch.arange(5).repeat_interleave(20)
    x = centres[truth] + torch.randn(100, 2)
    for seed in range(5):
        found = clusters(x, 5, torch.Generator().manual_seed(seed))
        assert len({(int(a), int(b)) for a, b in zip(found, truth, strict=True)}) == 5
