"""Calibration of latents, of all rows and by context, agrees with SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from flowtrain.bases import Base, ConditionalMixture, GaussianMixture, StandardNormal, StudentT, UniformBox
from flowtrain.data.context import ContextColumn
from flowtrain.evaluation.calibration import (
    Transformed,
    calibration,
    calibration_by_context,
    context_groups,
    density_calibration,
    density_ranks,
    ks_distance,
    ks_p_value,
    transforms,
    warn_if_miscalibrated,
)


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


def test_rows_are_grouped_by_quartiles_values_and_categories() -> None:
    columns = [
        ContextColumn("mass"),
        ContextColumn("flag"),
        ContextColumn("kind", "categorical", categories=(*"abcdefgh", 2.5)),
    ]
    n = 400
    kind = torch.cat([torch.arange(9).repeat_interleave(torch.tensor([90, 80, 70, 60, 40, 30, 20, 5, 5]))]).double()
    values = torch.stack([torch.randperm(n) / n, (torch.arange(n) % 2).double(), kind], 1)
    groups = context_groups(columns, values)
    mass = [group for group in groups if group.column == "mass"]
    assert [int(group.rows.sum()) for group in mass] == [100] * 4
    for group in mass:
        assert (values[group.rows, 0].min(), values[group.rows, 0].max()) == (group.low, group.high)
    assert [(group.low, group.high) for group in groups if group.column == "flag"] == [(0, 0), (1, 1)]
    # the most frequent categories, of at least 20 rows
    assert [group.category for group in groups if group.column == "kind"] == list("abcdef")
    # few rows have fewer bins, and very few rows have none
    assert [int(group.rows.sum()) for group in context_groups(columns[:1], values[:50, :1])] == [25, 25]
    assert context_groups(columns[:1], values[:19, :1]) == []


def test_calibration_by_context_finds_the_bin_with_wrong_latents(caplog: pytest.LogCaptureFixture) -> None:
    n, columns = 2000, [ContextColumn("mass")]
    c, z, log_p = torch.rand(n, 1), torch.randn(n, 3), torch.randn(n)
    z[c[:, 0] > 0.75, 1] *= 2
    u = transforms(z, StandardNormal((3,)))
    bins, shown = calibration_by_context(
        context_groups(columns, c), log_p, lambda rows: Transformed(u[rows], None, int(rows.sum()))
    )
    assert [one.p_value > 0.05 for one in bins] == [True, True, True, False]
    last = (c[:, 0] >= bins[3].low) & (c[:, 0] <= bins[3].high)
    assert (bins[3].column, bins[3].n, bins[3].category) == ("mass", int(last.sum()), None)
    assert bins[3].nll == pytest.approx(-float(log_p[last].mean()))
    assert bins[3].nll_stderr == pytest.approx(float(log_p[last].std()) / int(last.sum()) ** 0.5)
    # SciPy's test, corrected for 4 transforms and 4 bins
    tests = [stats.kstest(u[last, j].numpy(), "uniform") for j in range(4)]
    worst = max(range(4), key=lambda j: tests[j].statistic)
    assert bins[3].ks == pytest.approx(tests[worst].statistic, abs=1e-12)
    assert bins[3].worst == ("z1", "z2", "z3", "radius")[worst]
    assert bins[3].p_value == pytest.approx(16 * tests[worst].pvalue, rel=0.1)
    # all bins of a column are drawn with the same transform
    assert {name for name, _ in shown} == {bins[3].worst}
    torch.testing.assert_close(shown[3][1], u[last, worst])
    warn_if_miscalibrated(bins[:3])
    assert not caplog.records
    warn_if_miscalibrated(bins)
    assert "mass from" in caplog.text


def test_density_ranks_are_uniform_and_have_the_size_of_two_samples() -> None:
    u, _, size = density_ranks(torch.randn(300), torch.randn(900))
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.001
    assert size == 225
    assert density_ranks(torch.full((3,), torch.nan), torch.randn(9)).size == 0
