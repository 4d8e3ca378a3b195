"""Simulation-based calibration and expected coverage: calibrated samplers pass, and each kind of fault is found."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import flowtrain
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.linear import Affine
from flowtrain.evaluation.sbc import (
    coverage,
    jittered_ranks,
    rank_test,
    reference_points,
    simulation_calibration,
    simultaneous_band,
    tarp_ranks,
)
from flowtrain.flow import Flow
from flowtrain.utils.errors import ConfigError

N, L = 1000, 100


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def test_ranks_are_uniform_only_for_equal_distributions() -> None:
    x, samples = normal(N, 3), normal(N, L, 3, seed=1)
    for changed, passes in (
        (samples, True),
        (samples + 0.2, False),
        (samples * 0.7, False),
        (samples * 1.4, False),
    ):
        p = [rank_test(u).p_value for u in jittered_ranks(x, changed, generator()).T]
        assert all((value > 0.01) == passes for value in p), (changed.std(), p)


def test_ties_are_broken_at_random() -> None:
    draw = generator()
    x = torch.randint(0, 3, (N, 2), generator=draw)
    u = jittered_ranks(x, torch.randint(0, 3, (N, L, 2), generator=draw), draw)
    assert all(rank_test(column).p_value > 0.01 for column in u.T)
    # all samples equal the row, so its rank is any of 0 .. L
    u = jittered_ranks(torch.zeros(N), torch.zeros(N, L), draw)
    assert rank_test(u).p_value > 0.01
    assert u.max() > 0.95


def test_the_p_value_is_uniform_and_the_band_holds_with_its_probability() -> None:
    p, inside = [], []
    points, low, high = simultaneous_band(200)
    for seed in range(300):
        u = torch.rand(200, dtype=torch.float64, generator=generator(seed))
        p.append(rank_test(u).p_value)
        share = (u.unsqueeze(1) < points).double().mean(0)
        inside.append(bool(((share >= low) & (share <= high)).all()))
    assert stats.kstest(p, "uniform").pvalue > 0.01
    # 95% within four standard errors
    assert abs(np.mean(inside) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)
    # the test and the band agree
    assert [value > 0.05 for value in p] == inside


def test_the_band_is_made_of_binomial_quantiles() -> None:
    points, low, high = simultaneous_band(50)
    for k in (0, 30, 98):
        gamma = 2 * min(
            stats.binom.cdf(round(50 * float(low[k])), 50, float(points[k])),
            stats.binom.sf(round(50 * float(high[k])) - 1, 50, float(points[k])),
        )
        below = 2 * stats.binom.cdf(round(50 * float(low[k])) - 1, 50, float(points[k]))
        assert below < gamma, k
        assert float(low[k]) <= float(points[k]) <= float(high[k])


def test_the_statistic_is_the_kolmogorov_smirnov_distance() -> None:
    u = torch.rand(77, dtype=torch.float64, generator=generator()) ** 1.1
    assert rank_test(u).statistic == pytest.approx(stats.kstest(u.numpy(), "uniform").statistic)
    assert math.isnan(rank_test(u[:0]).p_value)


def test_tarp_finds_a_wrong_correlation_that_the_ranks_of_columns_do_not_show() -> None:
    correlated = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    x, independent = normal(N, 2) @ correlated.T, normal(N, L, 2, seed=1)
    for samples, passes in ((independent @ correlated.T, True), (independent, False)):
        assert all(rank_test(u).p_value > 0.01 for u in jittered_ranks(x, samples, generator()).T)
        u = tarp_ranks(x, samples, reference_points(x, None, generator(4)), generator())
        assert (rank_test(u).p_value > 0.01) == passes


def test_tarp_finds_a_sampler_that_ignores_the_context() -> None:
    c = normal(N, 2)
    x = (c + 0.5 * normal(N, 2, seed=1)) / math.sqrt(1.25)
    exact = (c.unsqueeze(1) + 0.5 * normal(N, L, 2, seed=2)) / math.sqrt(1.25)
    for samples, passes in ((exact, True), (normal(N, L, 2, seed=3), False)):
        assert all(rank_test(u).p_value > 0.01 for u in jittered_ranks(x, samples, generator()).T)
        u = tarp_ranks(x, samples, reference_points(x, c, generator(4)), generator())
        assert (rank_test(u).p_value > 0.01) == passes
    # references without the context do not find it
    u = tarp_ranks(x, normal(N, L, 2, seed=3), reference_points(x, None, generator(4)), generator())
    assert rank_test(u).p_value > 0.01


def test_a_reference_point_does_not_depend_on_its_row() -> None:
    c, x = normal(64, 1), normal(64, 2, seed=1)
    other = x.clone()
    other[40] += 100
    same = reference_points(x, c, generator()) == reference_points(other, c, generator())
    assert same[:41].all()
    assert not same[48:].any()


def test_coverage_is_the_share_of_rows_inside_of_regions() -> None:
    u = torch.tensor([0.1, 0.2, 0.6, 0.85, 0.99], dtype=torch.float64)
    found = coverage(u)
    assert dict(zip(found.levels, found.coverage, strict=True)) == pytest.approx(
        {0.5: 0.4, 0.8: 0.6, 0.9: 0.8, 0.95: 0.8}
    )


def test_an_evaluation_finds_faults_of_a_flow() -> None:
    flow = Flow((2,), Affine(2))
    x = normal(3000, 2).float()
    good = flowtrain.evaluate(flow, x, sbc=50, thorough=False)
    assert good.sbc is not None
    assert good.ranks is not None
    assert (good.sbc.n, good.sbc.samples, list(good.sbc.columns)) == (1000, 50, ["x1", "x2"])
    assert min(good.sbc.p_value, good.sbc.tarp.p_value, good.sbc.density.p_value) > 0.01
    assert good.ranks.columns.shape == (1000, 2)
    found = good.to_dict()["sbc"]
    assert set(found) == {"n", "samples", "columns", "tarp", "density"}
    assert found["columns"]["x1"].keys() == {"statistic", "p_value"}
    assert "sbc" not in flowtrain.evaluate(flow, x, thorough=False).to_dict()
    wide = flowtrain.evaluate(flow, 1.5 * x, sbc=50, thorough=False).sbc
    assert wide is not None
    assert max(wide.p_value, wide.density.p_value) < 0.01
    # the regions are too small
    assert all(share < level for level, share in zip(wide.density.levels, wide.density.coverage, strict=True))
    shifted = flowtrain.evaluate(flow, x + torch.tensor([0.0, 0.5]), sbc=50, thorough=False).sbc
    assert shifted is not None
    assert (shifted.worst, shifted.p_value < 0.01) == ("x2", True)


def test_density_ranks_equal_the_probability_of_the_smallest_region() -> None:
    flow = Flow((2,), Affine(2))
    x = normal(200, 2).float()
    log_p = flow.log_prob(x).detach()
    _, ranks = simulation_calibration(flow, x, None, log_p, ["a", "b"], samples=1000)
    # for a standard normal of two columns, the region inside of radius r has the probability 1 - exp(-r^2 / 2)
    exact = 1 - torch.exp(-x.square().sum(1) / 2)
    torch.testing.assert_close(ranks.density, exact.double(), atol=0.07, rtol=0)
    normal_cdf = torch.special.ndtr(x.double())
    torch.testing.assert_close(ranks.columns, normal_cdf, atol=0.07, rtol=0)


class Shifted(Bijection):
    """The map x = z + weight c, which has the density N(weight c, I)."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return z + self.weight * context, z.new_zeros(len(z))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return x - self.weight * context, x.new_zeros(len(x))


def test_samples_are_drawn_for_the_context_of_each_row() -> None:
    c = normal(N, 2).float()
    x = c + normal(N, 2, seed=1).float()
    for weight, passes in ((1.0, True), (0.5, False)):
        found = flowtrain.evaluate(Flow((2,), Shifted(weight), context=2), x, context=c, sbc=50, thorough=False).sbc
        assert found is not None
        assert (found.p_value > 0.01) == (found.density.p_value > 0.01) == (found.tarp.p_value > 0.01) == passes


def test_labels_are_a_context() -> None:
    label = torch.arange(N) % 3
    x = label.unsqueeze(1) + normal(N, 1).float()
    flow = Flow((1,), OneHotShift(), classes=3)
    found = flowtrain.evaluate(flow, x, label=label, sbc=50, thorough=False).sbc
    assert found is not None
    assert min(found.p_value, found.tarp.p_value, found.density.p_value) > 0.01


class OneHotShift(Shifted):
    """The map x = z + label."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return super().forward(z, context.unsqueeze(1))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return super().inverse(x, context.unsqueeze(1))


def test_rows_of_sbc_are_drawn_by_weight_and_no_row_twice() -> None:
    x = normal(800, 2).float()
    # half of the rows are far too wide. With weight 0 they do not count
    x[::2] *= 3
    flow = Flow((2,), Affine(2)).eval()
    log_p = flow.log_prob(x).detach()
    weights = torch.ones(800, dtype=torch.float64)
    weights[::2] = 0
    plain, _ = simulation_calibration(flow, x, None, log_p, ("a", "b"), 100)
    weighted, _ = simulation_calibration(flow, x, None, log_p, ("a", "b"), 100, weights=weights)
    assert plain.p_value < 1e-3
    assert weighted.p_value > 0.01
    assert weighted.n == 400
    weights[1] = 4
    assert simulation_calibration(flow, x, None, log_p, ("a", "b"), 100, weights=weights)[0].n == 100
    with pytest.raises(ConfigError, match="weights"):
        simulation_calibration(flow, x, None, log_p, ("a", "b"), 100, weights=-weights)
