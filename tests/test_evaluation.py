"""What evaluations are made of, against closed forms, scipy and scikit-learn."""

import copy
import math

import numpy as np
import pytest
import torch
from analytic.models import linear
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.logit import Logit
from flowtrain.evaluation.budget import budget, dequantization_gap, subset_of, trace_error
from flowtrain.evaluation.checks import jacobians, of_kl, of_log_det, of_mass, of_round_trip, of_samples, reference
from flowtrain.evaluation.digits import brief, decimals, with_error
from flowtrain.evaluation.latents import calibration, ks_distance, ks_p_value
from flowtrain.evaluation.mass import left_after, mass
from flowtrain.evaluation.separation import auroc, separation
from flowtrain.flow import Flow
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.scores import located, log_probs
from flowtrain.solvers import ode_solver


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (2.40163, 0.00612, "2.402 +- 0.006"),
        (2.40163, 0.0146, "2.402 +- 0.015"),
        (2.40163, 0.0196, "2.40 +- 0.02"),
        (2.40163, 0.0096, "2.402 +- 0.010"),
        (2.40163, 0.095, "2.40 +- 0.10"),
        (-1234.5, 31.0, "-1230 +- 30"),
        (-1234.5, 120.0, "-1230 +- 120"),
        (5.0, 1.2, "5.0 +- 1.2"),
        (0.0, 3.2e-7, "0.0000000 +- 0.0000003"),
        (2.5, 0.0, "2.500000 +- 0.000000"),
        (2.40163, float("nan"), "2.4016"),
        (float("nan"), 0.1, "nan"),
    ],
)
def test_numbers_end_where_their_error_begins(value: float, error: float, words: str) -> None:
    assert with_error(value, error) == words


@pytest.mark.parametrize("error", np.geomspace(1e-9, 1e9, 181).tolist())
def test_an_error_keeps_one_digit_or_two(error: float) -> None:
    shown = round(error, decimals(error))
    assert abs(shown - error) <= 0.26 * error
    assert 1 <= round(shown * 10.0 ** decimals(error)) <= 20


def test_brief() -> None:
    shown = [brief(v) for v in (0.0, 3.1e-6, 0.02, 0.0061, 0.35, 4.2, 9.7, 123.4, 2e7, 1e-12)]
    assert shown == ["0", "3e-6", "0.02", "0.006", "0.3", "4", "10", "123", "2e7", "1e-12"]


@pytest.mark.parametrize("n", [5, 40, 2000])
def test_kolmogorov_smirnov_is_scipys(n: int) -> None:
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
    # each column normal, all of them equal: nothing but the radius can tell
    same, _ = calibration(z[:, :1].expand(4000, 12))
    assert (same.worst, same.p_value < 1e-6, same.radius) == ("radius", True, same.statistic)


def gaussian_log_prob(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2 - x.shape[1] * math.log(2 * math.pi) / 2


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_mass_of_a_gaussian(d: int, factor: float) -> None:
    found = mass(lambda x: gaussian_log_prob(x) + math.log(factor), torch.randn(2000, d))
    assert found.value == pytest.approx(factor, abs=1e-5)
    assert abs(found.value - factor) < found.error + 1e-5


def test_mass_of_thin_rings_and_of_far_outliers() -> None:
    """p of a ring with sigma 0.03 at radius 2, int_0^oo r exp(-(r - 2)^2 / 2 s^2) dr = 2 s sqrt(2 pi) for s << 2."""
    s = 0.03
    constant = math.log(2 * math.pi * 2 * s * math.sqrt(2 * math.pi))
    angle, radius = 2 * math.pi * torch.rand(2000), 2 + s * torch.randn(2000)
    samples = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    found = mass(lambda x: -((x.norm(dim=1) - 2) ** 2) / (2 * s * s) - constant, samples)
    assert found.value == pytest.approx(1, abs=1e-3)
    # one sample in a thousand comes from a Gaussian a hundred times as wide
    samples = torch.randn(2000, 2)
    samples[::1000] *= 100

    def log_prob(x: Tensor) -> Tensor:
        wide = gaussian_log_prob(x / 100) - 2 * math.log(100)
        return torch.logaddexp(gaussian_log_prob(x) + math.log(0.999), wide + math.log(0.001))

    assert mass(log_prob, samples).value == pytest.approx(1, abs=1e-3)


def test_what_is_left_after_doublings() -> None:
    # of first and second order what is left is the last change, and a third of it
    assert left_after([0.2, 0.1, 0.05]) == pytest.approx(0.05)
    assert left_after([0.4, 0.1]) == pytest.approx(0.1 / 3)
    assert left_after([0.01, 0.0001]) == pytest.approx(1e-6, rel=0.02)
    assert left_after([0.1, 0.2]) == 0.2
    assert left_after([0.0]) == 0.0


def test_auroc_is_scikit_learns_with_ties_and_infinities() -> None:
    inside, outside = torch.randint(0, 9, (200,)).double(), torch.randint(3, 15, (300,)).double()
    for other in (outside, torch.cat([outside, torch.tensor([1e9])])):
        labels = [0] * len(inside) + [1] * len(other)
        expected = roc_auc_score(labels, torch.cat([inside, other]).numpy())
        assert auroc(inside, other)[0] == pytest.approx(expected, abs=1e-12)
    assert auroc(inside, torch.full((4,), torch.inf))[0] == 1.0
    assert auroc(torch.zeros(3), torch.zeros(5))[0] == 0.5
    assert math.isnan(auroc(torch.zeros(1), torch.zeros(5))[1])


def test_error_of_auroc_is_its_spread() -> None:
    found = [auroc(torch.randn(80), 1 + torch.randn(50)) for _ in range(400)]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.12)
    assert values.mean() == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.01)


def test_separation_counts_what_is_not_finite_as_least_likely() -> None:
    inside, outside = -2 + torch.randn(100), torch.tensor([-50.0, -torch.inf, torch.nan])
    found = separation("noise", inside, outside)
    assert (found.n, found.infinite, found.auroc, found.typicality_auroc) == (3, 2, 1.0, 1.0)
    assert found.nll == 50.0
    assert found.entropy == pytest.approx(-inside.mean().item())
    # more likely than the set itself, as Fashion-MNIST's flows find MNIST: log p fails, typicality does not
    likely = separation("likely", inside, 40 + torch.randn(100))
    assert (likely.auroc, likely.typicality_auroc) == (0.0, 1.0)


def hutchinson_flow(d: int = 5) -> Flow:
    torch.manual_seed(1)
    flow = linear((d,), solver=ode_solver("dopri5", rtol=1e-6), eval_trace="hutchinson")
    for p in flow.parameters():
        nn.init.normal_(p, std=0.4)
    return flow.eval()


def test_trace_error_is_that_of_the_estimator() -> None:
    """Rademacher noise leaves e^T A e a variance of 2 |S - diag S|_F^2, S the symmetric part of A."""
    flow = hutchinson_flow()
    (part,) = flow.continuous
    a = part.field.a.detach()
    symmetric = (a + a.T) / 2
    variance = 2 * float((symmetric - symmetric.diag().diag()).square().sum())
    x = torch.randn(500, 5)
    found = trace_error(flow, subset_of(flow, x, None), n=10_000, draws=1)
    assert found == pytest.approx(math.sqrt(variance / 10_000), rel=0.06)
    exact = copy.deepcopy(flow)
    exact.continuous[0].trace = type(part.trace)("auto", "exact")
    assert trace_error(exact, subset_of(exact, x, None), n=10_000, draws=1) == 0.0


def test_budget_adds_up() -> None:
    flow, x = hutchinson_flow().float(), torch.randn(700, 5).float()
    log_p = log_probs(flow, x)
    found = budget(flow, subset_of(flow, x, None), log_p, draws=1)
    over_rows = log_p.std().item() / 700**0.5
    assert math.hypot(found.sampling, found.trace) == pytest.approx(over_rows)
    assert found.precision is not None
    assert found.total == pytest.approx(math.sqrt(over_rows**2 + found.solver**2 + found.precision**2))
    assert 0 < found.precision < 1e-5
    assert found.embedded is not None
    assert found.dequantization_gap is None
    assert found.rows == 500
    assert found.interval == pytest.approx(
        (-log_p.mean().item() - 1.96 * found.total, -log_p.mean().item() + 1.96 * found.total)
    )
    assert budget(copy.deepcopy(flow).double(), subset_of(flow, x, None), log_p, draws=1).precision is None


def test_seed_is_that_of_the_noise() -> None:
    flow, x = hutchinson_flow(), torch.randn(50, 5)
    first, again, other = (located(flow, x, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dequantization_gap_is_that_of_two_bounds() -> None:
    flow = Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), discrete=True, levels=4).eval()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randint(0, 4, (500, 2))
    gap = dequantization_gap(flow, subset_of(flow, x, None), draws=1)
    assert gap == pytest.approx(float(log_probs(flow, x, draws=10).mean() - log_probs(flow, x).mean()))
    assert gap > 0


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_jacobians_are_those_of_the_inverse(shape: tuple[int, ...]) -> None:
    flow = realnvp(shape) if len(shape) == 1 else glow(shape)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.2)
    flow.eval()
    x = torch.randn(3, *shape)
    found = jacobians(flow, x, None)
    d = math.prod(shape)
    for i in range(3):
        expected = torch.autograd.functional.jacobian(lambda one: flow.inverse(one[None])[0], x[i]).view(d, d)
        torch.testing.assert_close(found[i], expected)


class Broken(Bijection):
    """x = 2 z, with what is wrong left to the caller: factors of forward, of the two log-determinants."""

    def __init__(self, forward: float = 2.0, up: float = 1.0, down: float = 1.0) -> None:
        super().__init__()
        self.factor, self.up, self.down = forward, up, down

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.factor * z, (self.up * z.shape[1] * math.log(2)) * z.new_ones(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x / 2, (-self.down * x.shape[1] * math.log(2)) * x.new_ones(len(x))


@pytest.mark.parametrize(
    ("broken", "trips"),
    [
        (Broken(), set()),
        (Broken(forward=2.2), {"round trip", "own samples"}),
        (Broken(up=1.01), {"own samples"}),
        (Broken(down=1.01), {"mass", "log-det", "own samples"}),
        (Broken(up=1.01, down=1.01), {"mass", "log-det"}),
    ],
)
def test_each_check_finds_its_own_cause(broken: Broken, trips: set[str]) -> None:
    flow = Flow((2,), Chain([broken, Affine(2)])).eval()
    exact, subset = reference(flow), subset_of(flow, torch.randn(100, 2), None)
    found = [of_mass(flow), of_log_det(exact, subset), of_round_trip(exact, subset), of_samples(exact)]
    assert {check.name for check in found if check is not None and not check.passed} == trips


def test_kl_may_be_negative_within_its_error_only() -> None:
    assert of_kl(None) is None
    passed = [of_kl(kl).passed for kl in ((-0.02, 0.01), (-0.04, 0.01), (0.5, 0.01))]  # type: ignore[union-attr]
    assert passed == [True, False, True]
