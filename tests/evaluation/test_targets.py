"""Evaluation on targets: coverage of log Z by its error, ESS, divergences, modes and invalid targets."""

import json
import logging
import math
from typing import Any

import pytest
import torch
from helpers.flows import continuous
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.support import ToSupport
from flowtrain.data.targets.base import FunctionTarget, Target
from flowtrain.data.types import ColumnType
from flowtrain.evaluation import TargetEvaluation, evaluate_target
from flowtrain.evaluation.log_weights import BalancedWeights, balanced_weights, weighted_samples
from flowtrain.evaluation.report import as_fragment, write_report
from flowtrain.evaluation.targets import nearest_modes
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import ConfigError, DataError, NonFiniteError
from flowtrain.utils.files import to_json

pytestmark = pytest.mark.usefixtures("propagate_logs")
LOG_Z = 1.5


class Gaussians(Target):
    """A mixture of Gaussians with equal weights and unit variances at the modes, times exp(LOG_Z)."""

    centers: Tensor

    def __init__(self, modes: list[list[float]], std: float = 1.0, known: float | None = LOG_Z) -> None:
        super().__init__(len(modes[0]), log_z=known)
        self.modes = torch.tensor(modes)
        self.register_buffer("centers", self.modes)
        self.std = std

    def log_density(self, x: Tensor) -> Tensor:
        squares = ((x.unsqueeze(1) - self.centers) / self.std).square().sum(2)
        log_p = -0.5 * squares - self.dim * math.log(self.std * math.sqrt(2 * math.pi))
        return log_p.logsumexp(1) - math.log(len(self.centers)) + LOG_Z

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        centers = self.centers[torch.randint(len(self.centers), (n,), generator=generator)].double()
        return centers + self.std * torch.randn(n, self.dim, dtype=torch.float64, generator=generator)


def normal(d: int = 1, mean: float = 0.0) -> Flow:
    """N(mean, 1)."""
    flow = Flow((d,), Affine(d))
    torch.nn.init.constant_(flow.bijection.mean, mean)  # type: ignore[arg-type]
    return flow


def positive() -> Flow:
    """A log-normal density."""
    bijection = Chain([Affine(1), ToSupport([0.0], [math.inf])])
    return Flow((1,), bijection, types=[ColumnType.parse("positive", "types")])


def whole_numbers() -> Flow:
    return Flow((1,), Affine(1), integer_valued=True)


def with_modes(modes: Tensor) -> Target:
    target = FunctionTarget(lambda x: -x[:, 0].square(), 1)
    target.modes = modes
    return target


def check(result: TargetEvaluation, name: str) -> Any:
    return {one.name: one for one in result.checks}[name]


def test_shifted_gaussian_agrees_with_closed_forms() -> None:
    """For x ~ N(0, 1), log w = m x - m^2 / 2 + log Z is Gaussian."""
    m, n = 0.7, 20_000
    found = evaluate_target(normal(), Gaussians([[m]]), n)
    error = math.sqrt(math.expm1(m**2) / n)
    alone = BalancedWeights(weighted_samples(normal(), Gaussians([[m]]), n, 0).log_w, n)
    assert alone.stderr == pytest.approx(error, rel=0.1)
    # samples in the tails do not increase the error
    assert error / 3 < found.budget.sampling < 1.02 * alone.stderr
    assert abs(found.log_z - LOG_Z) < 3 * found.log_z_stderr
    assert found.log_z_stderr < 2 * error
    assert found.elbo == pytest.approx(LOG_Z - m**2 / 2, abs=4 * m / n**0.5)
    assert found.nll_stderr == pytest.approx(m / n**0.5, rel=0.05)
    assert found.elbo_gap == pytest.approx(m**2 / 2, abs=0.03)
    assert found.ess == pytest.approx(math.exp(-(m**2)), rel=0.05)
    assert found.forward_ess == pytest.approx(math.exp(-(m**2)), rel=0.1)
    for kl, kl_error in (
        (found.kl_reverse, found.kl_reverse_stderr),
        (found.kl_forward, found.kl_forward_stderr),
    ):
        assert kl is not None
        assert kl_error is not None
        assert kl == pytest.approx(m**2 / 2, abs=4 * kl_error)
    assert (found.mode_shares, found.modes_found, found.failed) == ((1.0,), 1, [])
    low, high = found.budget.interval
    assert high - low == pytest.approx(2 * 1.96 * found.log_z_stderr)
    assert len(found.drawn.x) == n


@pytest.mark.parametrize(("variance", "warned"), [(1.3, False), (10.0, True)])
def test_pareto_k_of_a_wider_gaussian(variance: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """P(w > t) decreases like t^(-1/k) with k = 1 - 1 / variance, up to a logarithm."""
    found = evaluate_target(normal(), Gaussians([[0.0]], variance**0.5), 20_000)
    assert found.pareto_k == pytest.approx(1 - 1 / variance, abs=0.2)
    assert check(found, "pareto_k").passed is not warned
    assert ("pareto_k" in caplog.text) is warned
    assert ("FAILED: pareto_k" in found.table()) is warned


@pytest.mark.parametrize("variance", [1.1, 1.5, 2.2])
def test_interval_covers_log_z(variance: float) -> None:
    """Coverage of the 95% interval and of 3 errors over 200 repetitions, for k = 0.09, 0.33 and 0.55."""
    flow, target = normal(2).float(), Gaussians([[0.0, 0.0]], variance**0.5)
    inside = {1.96: 0, 3.0: 0}
    for seed in range(200):
        found = evaluate_target(flow, target, 300, seed, thorough=False)
        for width in inside:
            inside[width] += abs(found.log_z - LOG_Z) <= width * found.log_z_stderr
    # P(Binomial(200, 0.95) < 180) < 0.002. With an error that is 1.5 times too large, more than 199 would be covered
    assert 180 <= inside[1.96] < 200
    assert inside[3.0] >= 196


def test_wrong_log_z_fails_its_check(caplog: pytest.LogCaptureFixture) -> None:
    right = evaluate_target(normal(), Gaussians([[0.3]]), 20_000)
    assert check(right, "log_z").passed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    wrong = evaluate_target(normal(), Gaussians([[0.3]], known=LOG_Z + 0.02), 20_000)
    assert [one.name for one in wrong.failed] == ["log_z"]
    assert "target.log_z" in caplog.text
    unknown = evaluate_target(normal(), Gaussians([[0.3]], known=None), 100)
    assert "log_z" not in {one.name for one in unknown.checks}
    assert (unknown.kl_reverse, unknown.kl_forward) == (None, None)
    assert unknown.forward_ess is not None


@pytest.mark.parametrize("solver", [ode_solver("dopri5", rtol=0.1), ode_solver("midpoint", step_size=0.25)])
def test_error_includes_the_solver(solver: Any) -> None:
    """The target is the density of the flow, so only the solver has an error."""
    flow = Flow((2,), continuous(2, ode_solver("dopri5", rtol=1e-7)))
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    target = FunctionTarget(lambda x: flow.log_prob(x) + LOG_Z, 2, log_z=LOG_Z)
    exact = evaluate_target(flow, target, 50, thorough=False)
    assert exact.log_z == pytest.approx(LOG_Z, abs=1e-5)
    assert exact.log_z_stderr < 1e-5
    coarse = evaluate_target(flow.with_solvers(lambda _: solver), target, 1000, thorough=False)
    apart = abs(coarse.log_z - LOG_Z)
    b = coarse.budget
    assert apart > 1e-4
    assert apart < 3 * coarse.log_z_stderr
    assert apart / 5 < b.solver < 5 * apart
    assert coarse.log_z_stderr == pytest.approx(math.sqrt(b.sampling**2 + b.tail**2 + b.solver**2))
    assert (coarse.solver or {})["method"] == solver.method
    assert coarse.to_dict()["solver_error"] == b.solver
    assert abs(coarse.elbo - LOG_Z) < 3 * b.elbo_total
    # a solver error above 1e-3 nats and a tenth of the sampling error fails its check
    assert check(coarse, "solver").passed is (b.solver <= 1e-3)


def test_estimated_trace_is_replaced_by_the_exact_trace() -> None:
    flow = Flow((2,), continuous(2, ode_solver("dopri5", rtol=1e-6), evaluate="hutchinson"))
    target = Gaussians([[0.0, 0.0]])
    one, two = (evaluate_target(flow, target, 100, thorough=False).log_z for _ in range(2))
    again = Flow((2,), continuous(2, ode_solver("dopri5", rtol=1e-6)))
    again.load_state_dict(flow.state_dict())
    assert one == two == pytest.approx(evaluate_target(again, target, 100, thorough=False).log_z, abs=1e-9)
    assert flow.ode_blocks[0].trace.evaluate == "hutchinson"


def test_float32_reports_its_rounding() -> None:
    flow, target = normal(2, mean=1e3).float(), Gaussians([[1e3, 1e3]])
    rounded = evaluate_target(flow, target, 1000)
    exact = evaluate_target(flow, target, 1000, dtype=torch.float64)
    assert (rounded.dtype, exact.dtype, exact.budget.precision) == ("float32", "float64", None)
    assert rounded.budget.precision is not None
    assert 1e-9 < rounded.budget.precision < 1e-2
    assert flow.like.dtype == torch.float32
    # a function with constants in float32 that cannot be multiplied with float64
    matrix = torch.eye(2, dtype=torch.float32)
    product = FunctionTarget(lambda x: -0.5 * ((x - 1e3) @ matrix).square().sum(1), 2)
    assert evaluate_target(flow, product, 1000).log_z == pytest.approx(math.log(2 * math.pi), abs=1e-2)


def test_modes_and_exact_samples_show_a_missed_mode(caplog: pytest.LogCaptureFixture) -> None:
    target = Gaussians([[0.0], [30.0]])
    missed = evaluate_target(normal(), target, 2000)
    assert (missed.mode_shares, missed.modes_found) == ((1.0, 0.0), 1)
    assert {one.name for one in missed.failed} == {"modes", "log_z"}
    assert "modes" in caplog.text
    # the weights do not show the missed mode
    assert missed.ess > 0.99
    assert missed.log_z == pytest.approx(LOG_Z - math.log(2), abs=1e-2)
    assert missed.forward_ess is not None
    assert missed.forward_ess < 1e-6
    both = evaluate_target(Ensemble([normal(), normal(mean=30.0)]), target, 2000)
    assert (both.modes_found, both.failed) == (2, [])
    assert both.mode_shares == pytest.approx((0.5, 0.5), abs=0.05)


class LightTails(Bijection):
    """x = asinh(z). The density of x has much lighter tails than a Gaussian."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.asinh(), -0.5 * (1 + z.square()).log().sum(1)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.sinh(), x.cosh().log().sum(1)


def test_samples_in_the_tails_show_a_missed_part_of_the_density() -> None:
    """Almost none of 5,000 samples of the flow has |x| > 2, but the target has a mass of 0.012 in this region."""
    flow, target = Flow((1,), LightTails()), Gaussians([[0.0]], 0.8)
    drawn = [weighted_samples(flow, target, 5000, seed) for seed in range(40)]
    alone = [BalancedWeights(each.log_w, 5000) for each in drawn]
    found = [balanced_weights(flow, target, each, seed) for seed, each in enumerate(drawn)]
    errors = torch.tensor([[one.log_z - LOG_Z for one in each] for each in (alone, found)])
    estimated = torch.tensor([one.stderr for one in found])
    assert float(errors[0].median()) < -0.003
    assert abs(float(errors[1].median())) < 0.002
    assert bool((errors[1].abs() < 3 * estimated).all())
    result = evaluate_target(flow, target, 5000, seed=int(errors[0].argmin()))
    assert result.missed_mass is not None
    assert 0.005 < result.missed_mass < 0.02


def test_equal_densities_have_no_error_with_samples_in_the_tails() -> None:
    found = evaluate_target(normal(3), Gaussians([[0.0, 0.0, 0.0]]), 1000)
    assert found.log_z == pytest.approx(LOG_Z, abs=1e-12)
    assert found.log_z_stderr < 1e-12
    assert found.missed_mass == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("d", [1, 4])
def test_balanced_weights_have_the_mean_z(d: int) -> None:
    """For a target that is wider than the flow and shifted, the expectation over both sets of samples is Z."""
    flow, target = normal(d), Gaussians([[0.5] * d], 1.2)
    found = [balanced_weights(flow, target, weighted_samples(flow, target, 500, seed), seed) for seed in range(200)]
    z = torch.tensor([one.log_z for one in found]).exp()
    estimated = torch.tensor([one.stderr for one in found])
    assert abs(float(z.mean()) / math.exp(LOG_Z) - 1) < 4 * float(z.std() / z.mean()) / 200**0.5 + 2e-3
    assert float(estimated.mean()) == pytest.approx(float(z.std() / z.mean()), rel=0.2)


def test_ensemble_that_equals_the_target_has_equal_weights() -> None:
    target = Gaussians([[0.0], [3.0]])
    found = evaluate_target(Ensemble([normal(), normal(mean=3.0)], names=["a", "b"]), target, 500)
    assert found.log_z == pytest.approx(LOG_Z, abs=1e-9)
    assert found.ess == pytest.approx(1)
    assert found.members is not None
    assert [(m.path, m.weight) for m in found.members] == [("a", 0.5), ("b", 0.5)]
    # for each member, KL(N(0, 1) || p) is log 2 minus a small contribution of the other mode
    assert 0.4 < found.members[0].nll + LOG_Z < math.log(2)
    uneven = evaluate_target(Ensemble([normal(), normal(mean=3.0)], [0.2, 0.8]), target, 5000)
    assert uneven.ess < 0.9
    assert abs(uneven.log_z - LOG_Z) < 3 * uneven.log_z_stderr
    solved = Ensemble([Flow((1,), continuous(1)), normal(mean=3.0)]).with_solvers(
        lambda _: ode_solver("midpoint", step_size=0.5)
    )
    assert evaluate_target(solved, target, 200, thorough=False).budget.solver > 1e-4


def half_line(x: Tensor) -> Tensor:
    return torch.where(x[:, 0] > 0, -0.5 * x[:, 0].square(), -torch.inf)


def test_weights_that_are_zero_or_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    found = evaluate_target(normal(), FunctionTarget(half_line, 1), 5000)
    assert abs(found.log_z - 0.5 * math.log(math.pi / 2)) < 3 * found.log_z_stderr
    assert (found.nll, math.isnan(found.nll_stderr)) == (math.inf, True)
    assert check(found, "finite weights").value == pytest.approx(2500, abs=150)
    assert "target.types" in caplog.text
    json.loads(to_json(found.to_dict()))
    assert "log Z" in found.table()

    def rarely_nan(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 3, torch.nan, -0.5 * x[:, 0].square())

    few = evaluate_target(normal(), FunctionTarget(rarely_nan, 1), 5000)
    assert [one.name for one in few.failed] == ["finite weights"]
    assert few.log_z == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.01)
    assert math.isfinite(few.nll)
    with pytest.raises(NonFiniteError, match="nan"):
        evaluate_target(normal(), FunctionTarget(lambda x: rarely_nan(x + 2), 1), 5000)
    with pytest.raises(NonFiniteError):
        evaluate_target(normal(), FunctionTarget(lambda x: half_line(x - 50), 1), 100)


def test_json_has_the_keys_of_an_evaluation() -> None:
    found = evaluate_target(normal(), Gaussians([[0.5]]), 100, step=7)
    content = json.loads(to_json(found.to_dict()))
    keys = "nll nll_stderr n split step bits_per_dim entropy kl kl_stderr trace noise_samples dequantization_samples "
    keys += "solver nfe solver_error roundtrip_error seconds device dtype total_seconds budget checks calibration ood "
    keys += "headline baselines log_z log_z_stderr ess pareto_k elbo elbo_gap forward_ess kl_reverse kl_reverse_stderr "
    keys += "mode_shares modes"
    assert {*keys.split()} <= {*content}
    assert (content["n"], content["step"], content["split"], content["trace"]) == (100, 7, "test", "exact")
    assert content["kl"] == found.kl_forward
    assert content["nll"] == -content["elbo"]
    assert content["solver_error"] is None
    assert "drawn" not in content
    assert content["headline"].startswith("log Z 1.")


def test_samples_depend_only_on_the_seed(tmp_path: Any) -> None:
    state = torch.get_rng_state()
    flow, target = normal(), Gaussians([[0.5]])
    one, two, other, parts = (
        evaluate_target(flow, target, 100, seed, batch_size=size)
        for seed, size in ((0, None), (0, 100), (1, 7), (0, 7))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert one.log_z == two.log_z != other.log_z
    assert parts.log_z == pytest.approx(one.log_z, abs=1e-12)
    files = write_report(one, "title", "best.pt", tmp_path / "report.json", [])
    assert all("pareto_k" in path.read_text() for path in files)
    assert "Error budget of log Z" in as_fragment(one)


def test_too_few_samples_have_no_tail() -> None:
    found = evaluate_target(normal(), Gaussians([[0.5]]), 20)
    assert (found.pareto_k, check(found, "pareto_k").passed) == (None, None)
    assert "unknown" in found.headline


def test_nearest_modes() -> None:
    modes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).double()
    x = modes.repeat(2000, 1) + torch.rand(6000, 2)
    assert torch.equal(nearest_modes(x, modes), torch.arange(3).repeat(2000))


@pytest.mark.parametrize(
    ("flow", "target", "options"),
    [
        (normal(2), Gaussians([[0.0]]), {}),
        (normal(), torch.zeros(3, 1), {}),
        ("flow", Gaussians([[0.0]]), {}),
        (normal(), Gaussians([[0.0]]), {"n": 1}),
        (normal(), Gaussians([[0.0]]), {"seed": -1}),
        (normal(), Gaussians([[0.0]]), {"batch_size": 0}),
        (normal(), Gaussians([[0.0]]), {"dtype": torch.int64}),
        (normal(), Gaussians([[0.0]]), {"dtype": torch.float16}),
        (positive(), Gaussians([[0.0]]), {}),
        (whole_numbers(), Gaussians([[0.0]]), {}),
        (normal(), with_modes(torch.zeros(3)), {}),
    ],
)
def test_invalid_arguments_are_refused(flow: Any, target: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        evaluate_target(flow, target, **options)


def test_density_is_zero_outside_of_the_support() -> None:
    # log x is undefined for half of the samples
    target = FunctionTarget(lambda x: x[:, 0].log() - 0.5 * x[:, 0].square(), 1, types=["positive"])
    result = evaluate_target(normal(), target, n=20_000)
    assert abs(result.log_z) < 3 * result.log_z_stderr < 0.1
    assert check(result, "finite weights").passed is False


def test_function_in_float32_and_wrong_exact_samples() -> None:
    matrix = torch.eye(1)
    result = evaluate_target(normal(), FunctionTarget(lambda x: -0.5 * (x @ matrix).square().sum(1), 1), n=100)
    assert result.log_z == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-5)
    target = Gaussians([[0.0]])
    target.sample = lambda n, generator: torch.zeros(n, 2)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="sample"):
        evaluate_target(normal(), target, n=100)


def test_control_variate_that_would_make_z_negative_is_not_used() -> None:
    log_w = torch.tensor([0.0, -math.inf, -math.inf, -math.inf], dtype=torch.float64)
    found = BalancedWeights(log_w, 3, torch.tensor([10.0, 8.0, 8.0, 8.0], dtype=torch.float64))
    assert found.log_z == pytest.approx(math.log(0.25))
