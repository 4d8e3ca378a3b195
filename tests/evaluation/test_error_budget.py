"""The error budget of an evaluation: trace, rounding, sampling and dequantization."""

import copy
import math

import pytest
import torch
from analytic.models import linear
from torch import nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.logit import Logit
from flowtrain.evaluation.error_budget import budget, dequantization_gap, mean_error, subset_of, trace_error
from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.flow import Flow
from flowtrain.ode import ode_solver


def hutchinson_flow(d: int = 5) -> Flow:
    torch.manual_seed(1)
    flow = linear((d,), solver=ode_solver("dopri5", rtol=1e-6), eval_trace="hutchinson")
    for p in flow.parameters():
        nn.init.normal_(p, std=0.4)
    return flow.eval()


def test_trace_error_matches_the_hutchinson_variance() -> None:
    """With Rademacher noise, e^T A e has the variance 2 |S - diag S|_F^2, where S is the symmetric part of A."""
    flow = hutchinson_flow()
    (part,) = flow.ode_blocks
    a = part.field.a.detach()
    symmetric = (a + a.T) / 2
    variance = 2 * float((symmetric - symmetric.diag().diag()).square().sum())
    x = torch.randn(500, 5)
    found = trace_error(flow, subset_of(flow, x, None), n=10_000, draws=1)
    assert found == pytest.approx(math.sqrt(variance / 10_000), rel=0.06)
    exact = copy.deepcopy(flow)
    exact.ode_blocks[0].trace = type(part.trace)("auto", "exact")
    assert trace_error(exact, subset_of(exact, x, None), n=10_000, draws=1) == 0.0


def test_budget_total_is_the_root_sum_of_squares() -> None:
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


def test_seed_determines_the_noise() -> None:
    flow, x = hutchinson_flow(), torch.randn(50, 5)
    first, again, other = (log_probs(flow, x, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dequantization_gap_equals_the_difference_of_two_bounds() -> None:
    flow = Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), integer_valued=True, levels=4).eval()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randint(0, 4, (500, 2))
    subset = subset_of(flow, x, None)
    gap = dequantization_gap(flow, subset, draws=1)
    assert gap == pytest.approx(
        float(log_probs(flow, subset.raw, draws=10).mean() - log_probs(flow, subset.raw).mean())
    )
    assert gap > 0


def test_budget_does_not_depend_on_row_order() -> None:
    flow = Flow((2,), Chain([Affine(2)])).float().eval()
    near, far = torch.randn(500, 2).float(), 1e6 * torch.randn(2000, 2).float()
    found = []
    for x in (torch.cat([near, far]), torch.cat([far, near])):
        found.append(budget(flow, subset_of(flow, x, None), log_probs(flow, x), draws=1).precision or 0.0)
    assert max(found) < 3 * min(found)


def test_error_of_a_mean_includes_errors_that_cancel() -> None:
    difference = torch.tensor([1.0, -1.0]).repeat(50)
    assert mean_error(difference) == pytest.approx(0.1, rel=0.01)
    assert mean_error(torch.full((100,), 0.2)) == pytest.approx(0.2)


def test_bias_of_fixed_steps_is_the_difference_from_the_exact_nll() -> None:
    """Compares with the matrix exponential, the solution of a linear field."""
    flow = linear((3,), solver=ode_solver("midpoint", steps=4))
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    flow.eval()
    (part,) = flow.ode_blocks
    nn.init.zeros_(part.field.b)
    x = torch.randn(200, 3)
    a = part.field.a.detach().double()
    z = x.double() @ torch.linalg.matrix_exp(-a).T
    exact = flow.base_log_prob(z) - a.trace()
    log_p = log_probs(flow, x)
    found = budget(flow, subset_of(flow, x, None), log_p, draws=1).bias
    assert found is not None
    assert found.nll == pytest.approx(float((exact - log_p).mean()), rel=1e-3, abs=1e-5)
    assert found.per_row == pytest.approx(float((exact - log_p).square().mean().sqrt()), rel=1e-3)
    assert abs(found.nll) > 1e-4
    adaptive = flow.with_solver(ode_solver("dopri5"))
    assert budget(adaptive, subset_of(flow, x, None), log_p, draws=1).bias is None
