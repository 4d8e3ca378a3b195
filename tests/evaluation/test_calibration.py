"""Calibration of latents agrees with SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from flowtrain.bases import Base, ConditionalMixture, GaussianMixture, StandardNormal, StudentT, UniformBox
from flowtrain.evaluation.calibration import calibration, density_calibration, ks_distance, ks_p_value


@pytest.mark.parametrize("n", [5, 40, 2000])
def test_kolmogorov_smirnov_matches_scipy(n: int) -> None:
    u = torch.rand(n, 3) ** 1.05
    for j, found in enumerate(ks_distance(u).tolist()):
        expected = stats.kstest(u[:, j].numpy(), "uniform")
        assert found == pytest.approx(expected.statistic, abs=1e-12)
        assert ks_p_value(found, n) == pytest.approx(expected.pvalue, abs=0.02)
    assert ks_p_value(0.9, 2000) == 0.0
    assert ks_p_value(0.0, 5) == 1.0


def test_calibration_detects_shifted_and_dependent_latents() -> None:
    z, normal = torch.randn(4000, 12), StandardNormal((12,))
    good, pit = calibration(z, normal)
    assert good.p_value > 0.01
    assert len(pit) == 9
    # the transforms equal SciPy's normal and chi-square distribution functions
    name = next(iter(pit))
    np.testing.assert_allclose(pit[name].numpy(), stats.norm.cdf(z[:, int(name[1:]) - 1].numpy()), atol=1e-12)
    np.testing.assert_allclose(pit["radius"].numpy(), stats.chi2.cdf(z.square().sum(1).numpy(), 12), atol=1e-10)
    shifted = z.clone()
    shifted[:, 7] += 0.3
    found, _ = calibration(shifted, normal)
    assert (found.worst, found.p_value < 1e-6) == ("z8", True)
    # rows without latents are excluded
    lost, _ = calibration(torch.cat([shifted, torch.full((500, 12), torch.nan)]), normal)
    assert lost == found
    assert calibration(torch.full((5, 12), torch.nan), normal)[0].n == 0
    # each column is normal but all are equal, so only the radius reveals the dependence
    same, _ = calibration(z[:, :1].expand(4000, 12), normal)
    assert (same.worst, same.p_value < 1e-6, same.radius) == ("radius", True, same.statistic)


@pytest.mark.parametrize(
    "base", [StudentT((3,), 1.5), UniformBox([0.0, -1.0, 5.0], [1.0, 1.0, 5.5]), GaussianMixture(3, 4)]
)
def test_samples_of_every_base_pass_and_shifted_samples_fail(base: Base) -> None:
    z = base.double().sample(4000)
    good, pit = calibration(z.float(), base)
    assert good.p_value > 1e-3
    assert set(pit) == {"z1", "z2", "z3", "radius"}
    assert all(((u >= 0) & (u <= 1)).all() for u in pit.values())
    z[:, 1] += 0.3
    found, _ = calibration(z, base)
    assert (found.worst, found.p_value < 1e-6) == ("z2", True)


def test_base_with_context_is_calibrated_with_the_context_of_each_row() -> None:
    base, labels = ConditionalMixture(2, 2, classes=2, hidden=[4]), torch.arange(4000) % 2
    for p in base.parameters():
        torch.nn.init.normal_(p)
    z = base.given(labels).sample(4000)
    # rows without latents are excluded together with their labels
    z[:101] = torch.nan
    assert calibration(z, base, labels)[0].p_value > 1e-3
    assert calibration(z, base, 1 - labels)[0].p_value < 1e-6


def test_latents_outside_a_box_are_clamped_to_its_edges() -> None:
    z = torch.tensor([[2.0], [-3.0], [0.5]])
    _, pit = calibration(z, UniformBox([0.0], [1.0]))
    assert pit["z1"].tolist() == [1.0, 0.0, 0.5]
    assert pit["radius"].tolist() == [1.0, 1.0, 0.0]


def test_density_calibration_matches_the_two_sample_ks_test() -> None:
    _, pit = density_calibration(torch.tensor([-10.0, 0.5, 10.0, torch.nan]), torch.linspace(0, 1, 101))
    assert pit["density"].tolist() == pytest.approx([0.0, 0.5, 1.0])
    rows, samples = torch.randn(200) + 0.2, torch.randn(4000)
    found, _ = density_calibration(rows, samples)
    expected = stats.ks_2samp(rows.numpy(), samples.numpy(), method="asymp")
    assert found.statistic == pytest.approx(expected.statistic, abs=1e-3)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)
    lost, _ = density_calibration(torch.full((4,), torch.nan), samples)
    assert (lost.n, lost.worst) == (0, "density")
