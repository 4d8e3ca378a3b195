"""log p of integers, averaged over draws of noise, and rows whose ODE cannot be solved."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.logit import Logit
from flowtrain.evaluation.log_likelihood import bound_of_estimates, log_probs, score_rows
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import SolverError


class Linear(nn.Module):
    """v = A x, whose trace estimate e^T A e has the variance of the sum over i < j of (a_ij + a_ji)^2."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


@pytest.mark.slow
def test_hutchinson_trace_does_not_bias_log_prob_upward() -> None:
    """If probes were averaged inside the log, like dequantization noise, log p would be 1.5 nats too large."""
    a = torch.diag(torch.tensor([0.3, -0.2, 0.1, 0.4])) + 0.5 * (torch.ones(4, 4) - torch.eye(4))
    x = torch.tensor([[3, 4, 4, 3]]).expand(3000, 4)

    def scores(evaluate: str, draws: int) -> Tensor:
        field = Continuous(Linear(a), ode_solver("dopri5", rtol=1e-6), TraceRule("exact", evaluate))
        flow = Flow((4,), Chain([field, Logit(8, 0.05)]), integer_valued=True, levels=8).eval()
        return log_probs(flow, x, draws=draws)

    for draws in (1, 8):
        exact, estimated = scores("exact", draws), scores("hutchinson", draws)
        assert estimated.std() > 1.5 > 2 * exact.std()
        gap, error = (estimated.mean() - exact.mean()).item(), estimated.std().item() / 3000**0.5
        # a linear map has the same trace at every x, so the bound is tight
        assert abs(gap) < 4 * error
    assert scores("exact", 8).mean() > scores("exact", 1).mean()


def test_bound_of_noisy_estimates_is_below_the_exact_log_prob() -> None:
    log_p = torch.randn(5, 7)
    exact = log_p.exp().sum(0).log()
    torch.testing.assert_close(bound_of_estimates(log_p, log_p), exact)
    # an offset that all samples share, as common probes give, cancels in the mean
    torch.testing.assert_close(bound_of_estimates(log_p + 3, log_p - 3), exact)
    noisy = [log_p.unsqueeze(1) + torch.randn(5, 20_000, 7) for _ in range(2)]
    found = bound_of_estimates(*(one.flatten(1) for one in noisy)).view(20_000, 7).mean(0)
    naive = noisy[0].exp().sum(0).log().mean(0)
    assert (naive > exact + 0.1).all()
    assert (found < exact).all()
    # the bound is at least the expectation of a single draw, which is the mean of log p
    assert (found > log_p.mean(0) + math.log(5) - 0.5).all()


class Hole(nn.Module):
    """A field that is NaN for points beyond 50."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.scale * torch.where(x.abs().amax(1, keepdim=True) > 50, torch.nan, x)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_failed_rows_do_not_change_the_scores_of_other_rows(trace: str) -> None:
    field = Continuous(Hole(), ode_solver("dopri5", rtol=1e-6), TraceRule("exact", trace))
    flow = Flow((2,), Chain([field])).eval()
    x = torch.randn(40, 2)
    expected = log_probs(flow, x)
    x[[3, 30]] = 100.0
    with pytest.raises(SolverError):
        log_probs(flow, x)
    found, z, _, error = score_rows(flow, x, batch_size=25, unsolved=2)
    assert (~found.isfinite()).nonzero().flatten().tolist() == [3, 30]
    assert z.isnan().any(1).nonzero().flatten().tolist() == [3, 30]
    assert error.isnan().nonzero().flatten().tolist() == [3, 30]
    kept = found.isfinite()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=0)
    with pytest.raises(SolverError):
        score_rows(flow, x, unsolved=1)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_scores_do_not_depend_on_the_batch_size(trace: str) -> None:
    """The probes of an estimated trace depend on the position of a row in the set."""
    torch.manual_seed(3)
    field = Continuous(MLPField(3, (8,)), ode_solver("dopri5"), TraceRule("exact", trace))
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    flow = Flow((3,), Chain([field])).double().eval()
    x = torch.randn(30, 3, dtype=torch.float64) * torch.tensor([1.0, 20.0]).repeat(15).unsqueeze(1)
    expected = score_rows(flow, x, seed=5)
    for size in (1, 7):
        found = score_rows(flow, x, batch_size=size, seed=5)
        torch.testing.assert_close(found.log_p, expected.log_p, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.error, expected.error, rtol=1e-6, atol=1e-9)
    other = score_rows(flow, x, seed=6).log_p
    assert torch.equal(other, expected.log_p) == (trace == "exact")
    np.testing.assert_allclose(flow.log_prob(x.numpy()), flow.log_prob(x).detach(), rtol=1e-9)
