"""Calibration of latents against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from flowtrain.evaluation.calibration import calibration, ks_distance, ks_p_value


@pytest.mark.parametrize("n", [5, 40, 2000])
def test_kolmogorov_smirnov_matches_scipy(n: int) -> None:
    u = torch.rand(n, 3) ** 1.05
    for j, found in enumerate(ks_distance(u).tolist()):
        expected = stats.kstest(u[:, j].numpy(), "uniform")
        assert found == pytest.approx(expected.statistic, abs=1e-12)
        assert ks_p_value(found, n) == pytest.approx(expected.pvalue, abs=0.02)
    assert ks_p_value(0.9, 2000) == 0.0
    assert ks_p_value(0.0, 5) == 1.0


def test_calibration_sees_the_latent_and_the_dependence_that_are_off() -> None:
    z = torch.randn(4000, 12)
    good, pit = calibration(z)
    assert good.p_value > 0.01
    assert len(pit) == 9
    # by scipy: normal and chi-square distribution functions
    name = next(iter(pit))
    np.testing.assert_allclose(pit[name].numpy(), stats.norm.cdf(z[:, int(name[1:]) - 1].numpy()), atol=1e-12)
    np.testing.assert_allclose(pit["radius"].numpy(), stats.chi2.cdf(z.square().sum(1).numpy(), 12), atol=1e-10)
    shifted = z.clone()
    shifted[:, 7] += 0.3
    found, _ = calibration(shifted)
    assert (found.worst, found.p_value < 1e-6) == ("z8", True)
    # rows that have no latents are left out
    lost, _ = calibration(torch.cat([shifted, torch.full((500, 12), torch.nan)]))
    assert lost == found
    assert calibration(torch.full((5, 12), torch.nan))[0].n == 0
    # each column normal, all of them equal: nothing but the radius can tell
    same, _ = calibration(z[:, :1].expand(4000, 12))
    assert (same.worst, same.p_value < 1e-6, same.radius) == ("radius", True, same.statistic)
