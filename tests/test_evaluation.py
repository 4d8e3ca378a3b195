"""What evaluations are made of, against closed forms, scipy and scikit-learn."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from analytic.models import linear
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.logit import Logit
from flowtrain.divergence import TraceRule
from flowtrain.evaluation import checks as checks_module
from flowtrain.evaluation.budget import budget, dequantization_gap, of_mean, subset_of, trace_error
from flowtrain.evaluation.checks import checks as all_checks
from flowtrain.evaluation.checks import (
    drawn_from,
    jacobians,
    of_kl,
    of_log_det,
    of_mass,
    of_round_trip,
    of_samples,
    reference,
)
from flowtrain.evaluation.digits import brief, decimals, with_error
from flowtrain.evaluation.latents import calibration, ks_distance, ks_p_value
from flowtrain.evaluation.mass import left_after, mass
from flowtrain.evaluation.separation import auroc, separation
from flowtrain.flow import Flow
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.scores import log_probs
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
        (2.5, 0.0, "2.5000"),
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


def of_modes(means: Tensor, std: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An even mixture of round Gaussians on the plane, and samples of it."""

    def log_prob(x: Tensor) -> Tensor:
        u = (x.unsqueeze(1) - means) / std.unsqueeze(-1)
        return (-u.square().sum(-1) / 2 - 2 * std.log() - math.log(2 * math.pi * len(means))).logsumexp(1)

    which = torch.randint(len(means), (2000,))
    return log_prob, means[which] + std[which].unsqueeze(1) * torch.randn(2000, 2)


@pytest.mark.parametrize("seed", range(6))
def test_mass_of_modes_that_fall_between_the_first_nodes(seed: int) -> None:
    """A grid that is refined only where it has found mass would never see them, and believe itself."""
    torch.manual_seed(seed)
    side = 4 * torch.arange(-2.0, 3.0)
    cases = [
        (torch.cartesian_prod(side, side), torch.full((25,), 0.03)),
        (2 * torch.randn(6, 2), 0.02 + 0.15 * torch.rand(6)),
        (3 * torch.randn(3, 2), torch.full((3,), 0.01)),
    ]
    for means, std in cases:
        found = mass(*of_modes(means, std))
        # what cannot be resolved is not claimed to be
        assert found.value == pytest.approx(1, abs=max(1e-3, 10 * found.error))
        assert found.points < 120_000


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
    first, again, other = (log_probs(flow, x, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dequantization_gap_is_that_of_two_bounds() -> None:
    flow = Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), discrete=True, levels=4).eval()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randint(0, 4, (500, 2))
    subset = subset_of(flow, x, None)
    gap = dequantization_gap(flow, subset, draws=1)
    assert gap == pytest.approx(
        float(log_probs(flow, subset.raw, draws=10).mean() - log_probs(flow, subset.raw).mean())
    )
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
    assert failing(Flow((2,), Chain([broken, Affine(2)])), torch.randn(100, 2)) == trips


class Collapsed(Bijection):
    """Forgets the second column."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * torch.tensor([1.0, 0.0]), x.new_zeros(len(x))


class HalfFolded(Bijection):
    """z = |x|: on data that are all positive, forward undoes it."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.abs(), z.new_zeros(len(z))

    inverse = forward


class WrongBase(Flow):
    """Leaves the constant of the normal density out."""

    def base_log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.flatten(1).square().sum(1)


def failing(flow: Flow, x: Tensor) -> set[str]:
    flow.eval()
    exact, subset = reference(flow), subset_of(flow, x, None)
    drawn = drawn_from(exact)
    found = [of_mass(exact), of_log_det(exact, subset), of_round_trip(exact, subset, drawn), of_samples(exact, drawn)]
    return {check.name for check in found if check is not None and check.passed is False}


def test_what_looks_right_on_the_data_alone_is_found_out() -> None:
    x = torch.randn(200, 3)
    assert failing(Flow((3,), Chain([Affine(3)])), x) == set()
    assert "log-det" in failing(Flow((2,), Chain([Collapsed()])), x[:, :2])
    assert "round trip" in failing(Flow((3,), Chain([HalfFolded()])), x.abs())
    assert failing(WrongBase((3,), Chain([Affine(3)])), x) == {"own samples"}


@pytest.mark.parametrize(("scale", "offset"), [(1000.0, 0.0), (1.0, 500.0), (1e-6, 0.0)])
def test_round_trip_sees_one_bad_column_beside_others_of_any_scale(scale: float, offset: float) -> None:
    class SecondFolded(Bijection):
        def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return torch.stack([z[:, 0], z[:, 1].abs()], 1), z.new_zeros(len(z))

        inverse = forward

    x = torch.randn(200, 2) * torch.tensor([scale, 1.0]) + torch.tensor([offset, 0.0])
    assert "round trip" in failing(Flow((2,), Chain([SecondFolded()])), x)


def test_whole_numbers_in_a_range_are_not_integrated() -> None:
    """Some of the mass of x + u lies beyond the range, and log p is not to be had there."""
    flow = Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), discrete=True, levels=4).eval()
    assert of_mass(reference(flow)) is None
    assert failing(flow, torch.randint(0, 4, (100, 2))) == set()


class Stiff(nn.Module):
    """A field with a jump, which no tolerance can be held on."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return 3 * torch.sign((40 * x).sin())


def test_a_check_that_cannot_be_solved_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module, "MAX_NFE", 300)
    flow = Flow((2,), Chain([Continuous(Stiff(), ode_solver("rk4", steps=4), TraceRule())])).eval()
    subset = subset_of(flow, torch.randn(100, 2), None)
    log_p = log_probs(flow, subset.x)
    parts = budget(flow, subset, log_p, draws=1)
    found = {check.name: check for check in all_checks(flow, subset, parts, 0.01, (None, None))}
    assert found["log-det"].passed is None
    assert "could not be solved" in str(found["log-det"].message)
    assert found["solver"].passed is False
    # fixed steps have no estimate of their own
    assert parts.embedded is None


def test_the_budget_does_not_depend_on_the_order_of_the_rows() -> None:
    flow = Flow((2,), Chain([Affine(2)])).float().eval()
    near, far = torch.randn(500, 2).float(), 1e6 * torch.randn(2000, 2).float()
    found = []
    for x in (torch.cat([near, far]), torch.cat([far, near])):
        found.append(budget(flow, subset_of(flow, x, None), log_probs(flow, x), draws=1).precision or 0.0)
    assert max(found) < 3 * min(found)


def test_errors_that_cancel_on_the_subset_are_still_errors() -> None:
    difference = torch.tensor([1.0, -1.0]).repeat(50)
    assert of_mean(difference) == pytest.approx(0.1, rel=0.01)
    assert of_mean(torch.full((100,), 0.2)) == pytest.approx(0.2)


def test_kl_may_be_negative_within_its_error_only() -> None:
    assert of_kl((None, None)) is None
    passed = [of_kl(kl).passed for kl in ((-0.02, 0.01), (-0.04, 0.01), (0.5, 0.01))]  # type: ignore[union-attr]
    assert passed == [True, False, True]
