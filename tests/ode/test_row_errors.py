"""The errors of single rows cover the true errors, and are NaN without an estimate."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import ode_solver


def random_flow(trace: str = "exact", seed: int = 0, **settings: Any) -> Flow:
    field = MLPField(2, (16, 16))
    generator = torch.Generator().manual_seed(seed)
    for p in field.parameters():
        p.data = 0.6 * torch.randn(p.shape, generator=generator)
    rule = TraceRule("exact", trace)
    return Flow((2,), Chain([Continuous(field, ode_solver(**settings), rule), Affine(2)])).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7])
@torch.no_grad()
def test_error_covers_the_true_error_of_most_rows(rtol: float, dtype: torch.dtype) -> None:
    flow = random_flow(rtol=rtol).to(dtype)
    x = 2 * torch.randn(400, 2).to(dtype)
    log_p, error = flow.log_prob(x, with_error=True)
    torch.testing.assert_close(log_p, flow.log_prob(x), rtol=0, atol=0)
    exact = copy.deepcopy(flow).double().with_solver(ode_solver(rtol=1e-10)).log_prob(x.double())
    true = (log_p.double() - exact).abs()
    assert float((true <= error).double().mean()) >= 0.95
    # the error is not a trivial bound
    assert float(error.median()) < 500 * max(float(true.median()), torch.finfo(dtype).eps)


@torch.no_grad()
def test_error_of_an_estimated_trace_covers_its_noise() -> None:
    flow = random_flow("hutchinson").double()
    x = torch.randn(300, 2, dtype=torch.float64)
    log_p, error = flow.log_prob(x, with_error=True)
    torch.testing.assert_close(log_p, flow.log_prob(x), rtol=0, atol=0)
    exact = random_flow().double().log_prob(x)
    assert float(((log_p - exact).abs() <= error).double().mean()) > 0.9
    assert float(error.mean()) < 20 * float((log_p - exact).abs().mean())


@pytest.mark.parametrize(
    "settings", [{"method": "midpoint", "steps": 4}, {"method": "adaptive_heun", "rtol": 1e-3}, {"gradient": "adjoint"}]
)
@torch.no_grad()
def test_error_is_nan_without_an_estimate(settings: dict[str, Any]) -> None:
    log_p, error = random_flow(**settings).log_prob(torch.randn(3, 2), with_error=True)
    assert log_p.isfinite().all()
    assert error.isnan().all()


@torch.no_grad()
def test_error_in_training_mode_is_nan_and_without_an_ode_it_is_rounding() -> None:
    x = torch.randn(3, 2)
    assert random_flow().train().log_prob(x, with_error=True)[1].isnan().all()
    _, error = Flow((2,), Affine(2)).log_prob(x, with_error=True)
    assert ((error > 0) & (error < 1e-4)).all()


def test_arrays_and_ensembles_have_errors() -> None:
    a, b = random_flow(seed=1), random_flow(seed=2)
    x = np.random.default_rng(0).normal(size=(2003, 2))
    log_p, error = a.log_prob(x, with_error=True)
    assert log_p.shape == error.shape == (2003,)
    np.testing.assert_array_equal(log_p, a.log_prob(x))
    mixed, mixed_error = Ensemble([a, b], [0.3, 0.7]).log_prob(x, with_error=True)
    of_b, error_of_b = b.log_prob(x, with_error=True)
    share = 1 / (1 + np.exp(of_b - log_p + math.log(0.7 / 0.3)))
    np.testing.assert_allclose(mixed_error, share * error + (1 - share) * error_of_b, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(mixed, np.logaddexp(log_p + math.log(0.3), of_b + math.log(0.7)), rtol=1e-5, atol=1e-5)
