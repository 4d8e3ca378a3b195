"""The checks of an evaluation: each detects its own error, and a check that was not computed does not pass."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bases import Base, GaussianMixture, StandardNormal, StudentT, UniformBox
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine, InvertibleLinear
from flowtrain.bijections.logit import Logit
from flowtrain.data.types import ColumnType
from flowtrain.evaluation import checks as checks_module
from flowtrain.evaluation.checks import (
    base_round_trip,
    check_kl,
    check_log_det,
    check_mass,
    check_own_samples,
    check_round_trip,
    jacobians,
    reference,
)
from flowtrain.evaluation.checks import checks as all_checks
from flowtrain.evaluation.error_budget import budget, subset_of
from flowtrain.evaluation.evaluate import roundtrip_error
from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.flow import Flow
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import ode_solver


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_jacobians_match_autograd(shape: tuple[int, ...]) -> None:
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
    """x = 2 z, with optional errors in forward and factors on both log-determinants."""

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
def test_each_defect_fails_only_the_expected_checks(broken: Broken, trips: set[str]) -> None:
    assert failed_checks(Flow((2,), Chain([broken, Affine(2)])), torch.randn(100, 2)) == trips


class Collapsed(Bijection):
    """A map whose inverse sets the second column to 0."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * torch.tensor([1.0, 0.0]), x.new_zeros(len(x))


class HalfFolded(Bijection):
    """z = |x|, which forward inverts only on positive data."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.abs(), z.new_zeros(len(z))

    inverse = forward


class WrongBase(Flow):
    """A flow that omits the constant of the normal density."""

    def base_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return -0.5 * z.flatten(1).square().sum(1)


def failed_checks(flow: Flow, x: Tensor) -> set[str]:
    flow.eval()
    exact, subset = reference(flow), subset_of(flow, x, None)
    drawn = base_round_trip(exact)
    found = [
        check_mass(exact),
        check_log_det(exact, subset),
        check_round_trip(exact, subset, drawn),
        check_own_samples(exact, drawn),
    ]
    return {check.name for check in found if check is not None and check.passed is False}


def test_checks_fail_for_flows_that_are_wrong_off_the_data() -> None:
    x = torch.randn(200, 3)
    assert failed_checks(Flow((3,), Chain([Affine(3)])), x) == set()
    assert "log-det" in failed_checks(Flow((2,), Chain([Collapsed()])), x[:, :2])
    assert "round trip" in failed_checks(Flow((3,), Chain([HalfFolded()])), x.abs())
    assert failed_checks(WrongBase((3,), Chain([Affine(3)])), x) == {"own samples"}


@pytest.mark.parametrize(("scale", "offset"), [(1000.0, 0.0), (1.0, 500.0), (1e-6, 0.0)])
def test_round_trip_detects_one_bad_column_at_any_scale(scale: float, offset: float) -> None:
    class SecondFolded(Bijection):
        def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return torch.stack([z[:, 0], z[:, 1].abs()], 1), z.new_zeros(len(z))

        inverse = forward

    x = torch.randn(200, 2) * torch.tensor([scale, 1.0]) + torch.tensor([offset, 0.0])
    assert "round trip" in failed_checks(Flow((2,), Chain([SecondFolded()])), x)


def test_mass_check_skips_integer_data_with_bounded_range() -> None:
    """Some of the mass of x + u lies outside the range, where log p cannot be computed."""
    flow = Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), integer_valued=True, levels=4).eval()
    assert check_mass(reference(flow)) is None
    assert failed_checks(flow, torch.randint(0, 4, (100, 2))) == set()


class Stiff(nn.Module):
    """A field with jumps, for which a solver cannot meet any tolerance."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return 3 * torch.sign((40 * x).sin())


@pytest.mark.slow
def test_unsolvable_check_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module, "MAX_NFE", 300)
    flow = Flow((2,), Chain([Continuous(Stiff(), ode_solver("rk4", steps=4), TraceRule())])).eval()
    subset = subset_of(flow, torch.randn(100, 2), None)
    log_p = log_probs(flow, subset.x)
    parts = budget(flow, subset, log_p, draws=1)
    found = {check.name: check for check in all_checks(flow, subset, parts, log_p, (None, None))}
    assert found["log-det"].passed is None
    assert "could not be solved" in str(found["log-det"].message)
    assert found["solver"].passed is False
    # fixed steps have no embedded error estimate
    assert parts.embedded is None


def flow_with_base(base: Base) -> Flow:
    flow = Flow(base, Chain([Affine(2), Affine(2)]))
    for p in flow.bijection.parameters():
        nn.init.normal_(p, std=0.3)
    return flow.eval()


# the density of a box jumps, so the grid finds too little mass or reports that it is too coarse
@pytest.mark.parametrize(
    "base", [StudentT((2,), 1.0), StudentT((2,), 3.0), UniformBox([0.0, -1.0], [1.0, 1.0]), GaussianMixture(2, 3)]
)
def test_checks_detect_a_wrong_base_density(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = flow_with_base(base.double())
    x = flow.sample(100)
    assert failed_checks(flow, x) - ({"mass"} if isinstance(base, UniformBox) else set()) == set()
    exact, right = reference(flow), type(base).log_prob
    assert check_own_samples(exact, base_round_trip(exact)).passed
    monkeypatch.setattr(type(base), "log_prob", lambda self, z: right(self, z) + 0.1)
    assert "own samples" in failed_checks(flow, x)


def test_mass_check_does_not_fail_for_a_uniform_box_base() -> None:
    flow = flow_with_base(UniformBox([0.0, -1.0], [1.0, 1.0]))
    x = flow.sample(300)
    subset, log_p = subset_of(flow, x, None), log_probs(flow, x)
    found = {c.name: c for c in all_checks(flow, subset, budget(flow, subset, log_p, 1), log_p, (None, None))}
    assert found["mass"].passed is not False
    assert all(found[name].passed for name in ("log-det", "round trip", "own samples"))


def test_checks_detect_a_wrong_log_det_for_every_base() -> None:
    for base in (StudentT((2,), 2.0), UniformBox([0.0, 0.0], [1.0, 1.0]), GaussianMixture(2, 2)):
        flow = Flow(base, Chain([Broken(down=1.1)])).eval()
        assert failed_checks(flow, flow.sample(50)) >= {"log-det", "own samples"}


def test_sample_check_is_skipped_for_a_user_defined_base() -> None:
    class UserBase(Base):
        log_prob = StandardNormal.log_prob
        rsample = StandardNormal.rsample
        to_uniform = StandardNormal.to_uniform

    exact = reference(flow_with_base(UserBase((2,))))
    check = check_own_samples(exact, base_round_trip(exact))
    assert check.passed is None
    assert "UserBase" in str(check.message)
    # a subclass is compared with the exact density of its base class
    exact = reference(flow_with_base(type("Sub", (StandardNormal,), {})((2,))))
    assert check_own_samples(exact, base_round_trip(exact)).passed


def test_kl_check_allows_negative_values_within_the_error() -> None:
    assert check_kl((None, None)) is None
    passed = [check_kl(kl).passed for kl in ((-0.02, 0.01), (-0.04, 0.01), (0.5, 0.01))]  # type: ignore[union-attr]
    assert passed == [True, False, True]


def test_log_det_check_is_correct_with_several_threads() -> None:
    """torch's batched determinants of such matrices are wrong on several threads."""
    flow = Flow((180,), InvertibleLinear(180)).eval()
    torch.set_num_threads(2)
    check = check_log_det(reference(flow), subset_of(flow, torch.randn(60, 180), None))
    assert check.passed, check.message


def test_round_trip_errors_of_angles_are_arcs() -> None:
    class FullTurns(Bijection):
        """Adds a full turn to angles."""

        def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return z + torch.tensor([0.0, 360.0]).to(z), z.new_zeros(len(z))

        def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x, x.new_zeros(len(x))

    types = (ColumnType(), ColumnType.parse("circular(360)"))
    x = torch.randn(60, 2)
    for given, passed in ((types, True), ((), False)):
        flow = Flow((2,), FullTurns(), types=given).eval()
        assert (roundtrip_error(flow, x) < 1e-3) == passed
        exact = copy.deepcopy(flow).double()
        z = torch.zeros(1, 2, dtype=torch.float64)
        drawn = replace(checks_module.base_round_trip(exact), z=z, again=z)
        assert checks_module.check_round_trip(exact, subset_of(flow, x, None), drawn).passed == passed
