"""Evaluations of ensembles: NLL, members, the parts of the error, and checks of each member."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flows import VECTORS, flow_of, images, perturbed, vectors
from torch import Tensor, nn

from flowtrain import Ensemble, Flow
from flowtrain.bijections import Affine, Bijection, Continuous
from flowtrain.data.base import Samples
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.nn import MLPField
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import SolverError

pytestmark = pytest.mark.usefixtures("propagate_logs")


def gaussian(mean: float, d: int = 2) -> Flow:
    flow = Flow((d,), Affine(d)).eval()
    nn.init.constant_(flow.bijection.mean, mean)
    return flow


def array(n: int = 60, d: int = 2, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, d))


class Stretch(Bijection):
    """x = 2 z, with log-determinants that are multiplied by wrong factors."""

    def __init__(self, forward: float = 1.0, inverse: float = 1.0) -> None:
        super().__init__()
        self.factors = forward, inverse

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 2 * z, z.new_full((len(z),), 2 * self.factors[0] * math.log(2))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x / 2, x.new_full((len(x),), -2 * self.factors[1] * math.log(2))


class Hole(nn.Module):
    """A field that is NaN for coordinates beyond 50."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.where(x.abs() > 50, torch.nan, 0.0 * x)


def flow_with_hole() -> Flow:
    return Flow((2,), Continuous(Hole(), ode_solver("dopri5", rtol=1e-4))).eval()


def test_nll_member_scores_and_spread_match_their_definitions() -> None:
    x, means, w = array(), (0.0, 1.0, 3.0), (0.5, 0.3, 0.2)
    found = evaluate(Ensemble([gaussian(m) for m in means], w, ["a", "b", "c"]), x)
    log_p = np.stack([-0.5 * ((x - m) ** 2).sum(1) - math.log(2 * math.pi) for m in means], 1)
    total = np.log(np.exp(log_p) @ np.array(w))
    np.testing.assert_allclose(found.scores, total)
    np.testing.assert_allclose(found.member_scores, log_p)
    assert found.nll == pytest.approx(-total.mean())
    assert found.members is not None
    assert [(m.path, m.weight) for m in found.members] == [("a", 0.5), ("b", 0.3), ("c", 0.2)]
    assert [m.nll for m in found.members] == pytest.approx(list(-log_p.mean(0)))
    spread = np.sqrt((log_p**2) @ np.array(w) - (log_p @ np.array(w)) ** 2).mean()
    assert found.spread == pytest.approx(spread)
    content = found.to_dict()
    assert set(content) == {*evaluate(gaussian(0.0), x).to_dict(), "members", "spread"}
    assert content["members"][1] == dataclasses.asdict(found.members[1])
    assert not found.failed
    made = {check.name for check in found.checks if check.passed}
    assert made == {"concentration", "mass", "log-det", "round trip", "own samples"}
    assert all(name in found.table() for name in ("weight 0.500", "density rank"))
    assert "0.3 b (NLL" in repr(found)
    assert evaluate(gaussian(0.0), x).members is None


@pytest.mark.parametrize("draws", [1, 3])
def test_ensemble_of_equal_members_equals_the_flow_on_integer_data(draws: int) -> None:
    flow = images("realnvp")
    x = np.random.default_rng(0).integers(0, 16, (20, 1, 4, 4))
    one = evaluate(flow, x, dequantization_samples=draws, thorough=False)
    two = evaluate(Ensemble([flow, flow], [0.3, 0.7]), x, dequantization_samples=draws, thorough=False)
    torch.testing.assert_close(two.scores, one.scores)
    for key in ("nll", "bits_per_dim", "roundtrip_error"):
        assert getattr(two, key) == pytest.approx(getattr(one, key), rel=1e-9), key
    assert two.budget.dequantization_gap == pytest.approx(one.budget.dequantization_gap)


def test_ode_ensemble_of_equal_members_has_the_same_solver_error() -> None:
    flow, x = vectors("ffjord", solver=["solver.rtol=1e-3"]), array()
    one, two = (evaluate(each, x, thorough=False) for each in (flow, Ensemble([flow, flow], [0.3, 0.7])))
    assert (two.trace, two.noise_samples, two.solver) == (one.trace, one.noise_samples, one.solver)
    assert two.nfe == 2 * one.nfe
    for key in ("solver", "solver_per_row", "embedded"):
        assert getattr(two.budget, key) == pytest.approx(getattr(one.budget, key), rel=1e-6), key


def test_solver_error_matches_the_error_of_the_ensemble_density() -> None:
    flows = [vectors("ffjord", solver=["solver.rtol=1e-2"]), vectors("two ffjords", solver=["solver.rtol=1e-3"])]
    ensemble, x = Ensemble([*flows, gaussian(0.0)], [0.5, 0.2, 0.3]).eval(), array(200)
    found = evaluate(ensemble, x)
    assert found.solver is not None
    assert found.solver["rtol"] == 1e-2
    tight = ensemble.with_solvers(lambda solver: solver.replace(rtol=1e-10, atol=1e-10))
    truth = abs(float((tight.log_prob(x) - ensemble.log_prob(x)).mean()))
    assert truth / 5 < found.budget.solver < 5 * truth + 1e-4
    assert 0 < found.budget.embedded < 10
    single = [evaluate(flow, x, thorough=False).budget.embedded for flow in flows]
    # the errors of the members are weighted by their shares
    assert found.budget.embedded < max(single)


@pytest.mark.parametrize(
    ("bad", "failed"), [(Stretch(inverse=1.1), {"log-det", "mass"}), (Stretch(forward=1.1), {"own samples"})]
)
def test_failed_check_names_the_wrong_member(bad: Stretch, failed: set[str]) -> None:
    flows = [Flow((2,), Stretch()), Flow((2,), bad)]
    found = evaluate(Ensemble(flows, [0.9, 0.1], ["runs/good", "runs/bad"]), 2 * array())
    assert {check.name for check in found.failed} >= failed
    (check,) = [check for check in found.checks if check.name == next(iter(failed - {"mass"}))]
    assert check.message is not None
    assert "runs/bad" in check.message
    # a member of weight 0 does not affect the density
    found = evaluate(Ensemble(flows, [1.0, 0.0]), 2 * array())
    assert not found.failed
    assert found.members is not None
    expected = evaluate(flows[1], 2 * array(), thorough=False).nll
    assert found.members[1].nll == pytest.approx(expected)
    assert found.spread is None


def test_rows_with_a_failed_member_are_scored_by_the_others() -> None:
    x = array(40)
    x[7] = 60.0
    hole, good = flow_with_hole(), gaussian(0.0)
    found = evaluate(Ensemble([hole, good], [0.75, 0.25]), x, thorough=False)
    expected = torch.from_numpy(good.log_prob(x))
    expected[7] += math.log(0.25)
    torch.testing.assert_close(found.scores, expected)
    assert found.member_scores is not None
    assert found.member_scores[7].isnan().tolist() == [True, False]
    # a member of weight 0 may fail. It is then listed without an NLL
    found = evaluate(Ensemble([hole, good], [0.0, 1.0]), x, thorough=False)
    assert found.members is not None
    assert math.isnan(found.members[0].nll)
    assert "no NLL" in found.table()
    with pytest.raises(SolverError):
        log_probs(Ensemble([hole, good]), torch.from_numpy(x))


def test_calibration_uses_density_ranks() -> None:
    ensemble = Ensemble([gaussian(-2.0), gaussian(2.0)], [0.3, 0.7])
    torch.manual_seed(3)
    own = evaluate(ensemble, ensemble.sample(3000), thorough=False)
    assert own.calibration.p_value > 1e-3
    assert (own.calibration.worst, own.calibration.radius, own.calibration.n) == ("density", None, 250)
    (u,) = own.pit.values()
    assert abs(u.mean() - 0.5) < 0.1
    wide = evaluate(ensemble, 1.5 * ensemble.sample(3000), thorough=False)
    assert wide.calibration.p_value < 1e-6


def test_calibration_of_integer_data_uses_quantized_samples() -> None:
    ensemble = Ensemble([images("realnvp"), images("glow")], [0.5, 0.5]).eval()
    found = evaluate(ensemble, ensemble.quantized(ensemble.sample(800)), dequantization_samples=3, thorough=False)
    assert found.calibration.p_value > 1e-3
    # the log of the mean over noise draws is larger than log p for one draw
    assert abs(found.pit["density"].mean() - 0.5) < 0.1


def test_conditional_ensemble_is_evaluated_with_labels() -> None:
    flows = [vectors(name, classes=3) for name in ("realnvp", "glow")]
    ensemble, x, y = Ensemble(flows, [0.6, 0.4]).eval(), array(50), np.arange(50) % 3
    found = evaluate(ensemble, x, label=y, other=("far", torch.from_numpy(x + 30)))
    assert found.nll == pytest.approx(-ensemble.log_prob(x, y).mean())
    assert found.ood is not None
    assert found.ood.auroc > 0.9
    # the scores are the marginal over the classes, p(x) = sum_y P(y) p(x | y)
    rows = torch.from_numpy(x)
    marginal = torch.stack([ensemble.log_prob(rows, label).exp() for label in range(3)]).mean(0).log()
    assert found.sets is not None
    torch.testing.assert_close(found.sets[0], marginal.detach())


@pytest.mark.slow
def test_hutchinson_traces_do_not_increase_the_density() -> None:
    def noisy(seed: int) -> Flow:
        torch.manual_seed(seed)
        rule = TraceRule(evaluate="hutchinson", noise="gaussian")
        flow = Flow((3,), Continuous(MLPField(3, [8], "concat", "tanh"), ode_solver("rk4", steps=4), rule))
        return perturbed(flow, 0.4).eval()  # type: ignore[arg-type, return-value]

    flows = [noisy(0), noisy(1), noisy(2)]
    exact = [with_exact_trace(flow) for flow in flows]
    x = torch.from_numpy(array(20, 3))
    truth = Ensemble(exact).log_prob(x).detach()
    scores = torch.stack([log_probs(Ensemble(flows), x, seed=seed) for seed in range(80)])
    error = scores.std(0) / math.sqrt(len(scores))
    assert error.max() < 0.2
    assert (scores.mean(0) < truth + 4 * error).all()
    naive = torch.stack(
        [torch.stack([log_probs(f, x, seed=s + 999 * i) for i, f in enumerate(flows)]) for s in range(60)]
    )
    naive = (naive.logsumexp(1) - math.log(3)).mean(0)
    # the log of the mean over members is biased upward
    assert (naive - truth).mean() > 0.02
    assert evaluate(Ensemble(flows), x, thorough=False).budget.trace > 0


def with_exact_trace(flow: Flow) -> Flow:
    exact = flow.with_solvers(lambda solver: solver.replace())
    for block in exact.ode_blocks:
        block.trace = dataclasses.replace(block.trace, evaluate="exact")
    return exact


def test_ensemble_with_dequantized_columns_is_evaluated() -> None:
    samples = Samples((2,), noisy=(1,))
    flows = [flow_of(VECTORS[name], samples, []) for name in ("realnvp", "glow")]
    x = array(30)
    x[:, 1] = np.round(3 * x[:, 1])
    found = evaluate(Ensemble(flows), x, thorough=False)
    assert math.isfinite(found.nll)
    assert found.dequantization_samples is None
