"""Flows and evaluations agree with closed forms: Gaussians, a linear field, and float64 against float32."""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flowtrain
from flowtrain import models
from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Dataset, step_generator
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.models.ffjord import ffjord
from flowtrain.models.realnvp import realnvp
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError, NonFiniteError

A = torch.tensor([[0.6, -0.3], [0.9, 0.2]], dtype=torch.float64)


class Linear(nn.Module):
    """The field v = A x. Its flow transports a standard normal to N(0, expm(A) expm(A)^T)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(A.to(torch.get_default_dtype()))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


def true_density() -> torch.distributions.MultivariateNormal:
    factor = torch.linalg.matrix_exp(A)
    return torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), factor @ factor.T)


class Gaussian(Dataset):
    """Samples of the density of `linear_flow`, so the KL divergence of this flow is zero."""

    def __init__(self, n: int = 4000) -> None:
        self.event_shape = (2,)
        z = torch.randn(n, 2, generator=step_generator(0, 5), dtype=torch.float64)
        self.val = self.test = (z @ torch.linalg.matrix_exp(A).T).float()
        self.entropy = true_density().entropy().item()

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self.test[:batch_size]

    def log_prob(self, x: Tensor) -> Tensor:
        return true_density().log_prob(x.double())


def linear_flow(rtol: float = 1e-6, **trace: str) -> Flow:
    rule = TraceRule(**trace)  # type: ignore[arg-type]
    return Flow((2,), Chain([Continuous(Linear(), ode_solver("dopri5", rtol=rtol), rule)])).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_flow_equals_the_gaussian(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    x = Gaussian(200).test
    log_p = linear_flow(1e-6 if dtype == torch.float32 else 1e-10).log_prob(x)
    assert log_p.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(log_p.double(), true_density().log_prob(x.double()), rtol=tolerance, atol=tolerance)


def test_evaluation_of_the_true_density_has_zero_kl() -> None:
    torch.set_default_dtype(torch.float32)
    data = Gaussian()
    result = evaluate(linear_flow(1e-5), data, step=7)
    assert result.kl == pytest.approx(0, abs=1e-5)
    assert result.kl_stderr == pytest.approx(0, abs=1e-5)
    assert result.nll == pytest.approx(-data.log_prob(data.test).mean().item(), abs=1e-5)
    assert result.nll_stderr == pytest.approx(data.log_prob(data.test).std().item() / len(data.test) ** 0.5, rel=1e-3)
    assert data.entropy == pytest.approx(1 + math.log(2 * math.pi) + A.trace().item())
    assert (result.trace, result.noise_samples, result.step, result.n) == ("exact", None, 7, 4000)
    assert result.solver_error is not None
    assert result.solver_error < 1e-4
    assert result.roundtrip_error < 1e-3


def test_hutchinson_evaluation_is_reported_and_reproducible() -> None:
    flow = linear_flow(1e-5, evaluate="hutchinson")
    first, second = (evaluate(flow, Gaussian(500)) for _ in range(2))
    assert (first.trace, first.noise_samples) == ("hutchinson", 1)
    assert first.nll == second.nll
    assert first.nll == pytest.approx(evaluate(linear_flow(1e-5), Gaussian(500)).nll, abs=0.2)


def test_solver_error_grows_with_the_tolerance() -> None:
    loose, tight = (evaluate(linear_flow(rtol), Gaussian(100)).solver_error for rtol in (1e-1, 1e-8))
    assert loose is not None
    assert tight is not None
    assert loose > 100 * tight


def test_float32_gradient_matches_float64() -> None:
    torch.manual_seed(0)
    exact = ffjord((2,), solver=ode_solver("dopri5", rtol=1e-10), hidden=[16, 16])
    for p in exact.parameters():
        nn.init.normal_(p, std=0.5)
    single = copy.deepcopy(exact).float()
    assert single.solver is not None
    single.solver.rtol = single.solver.atol = 1e-5
    x = torch.randn(64, 2)
    grads = [
        torch.cat([g.double().flatten() for g in torch.autograd.grad(f.log_prob(x).mean(), list(f.parameters()))])
        for f in (exact, single)
    ]
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 2e-3


def test_nll_gradient_matches_finite_differences() -> None:
    flow = ffjord((3,), solver=ode_solver("rk4", step_size=0.1), hidden=[6])
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(5, 3)
    parameters = list(flow.parameters())
    grads = torch.autograd.grad(flow.log_prob(x).mean(), parameters)
    for p, g in zip(parameters, grads, strict=True):
        index = tuple(torch.tensor(p.shape) // 2)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p[index] += step
                values.append(flow.log_prob(x).mean().item())
                p[index] -= step
        assert g[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_affine_flow_equals_the_gaussian_in_data_units() -> None:
    standardize = Standardize((3,))
    standardize.fit(torch.tensor([5.0, -2.0, 0.0]), torch.tensor([10.0, 0.1, 1.0]))
    flow = Flow((3,), Chain([Affine(3), standardize]))
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    factor = torch.diag(standardize.std) @ next(iter(flow.bijection)).factor()  # type: ignore[call-overload]
    gaussian = torch.distributions.MultivariateNormal(flow(torch.zeros(1, 3))[0], scale_tril=factor)
    x = gaussian.sample((10,))
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x))


def test_samples_follow_the_density_and_the_temperature() -> None:
    flow = linear_flow(1e-6)
    torch.manual_seed(0)
    x = flow.sample(20_000)
    covariance = true_density().covariance_matrix
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.05, atol=0.05)
    torch.manual_seed(0)
    cold = flow.sample(20_000, temperature=0.5)
    torch.testing.assert_close(cold, 0.5 * x, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    torch.testing.assert_close(flow.sample(20_000, chunk=777), x, rtol=1e-4, atol=1e-4)


def test_points_near_the_origin_do_not_underflow() -> None:
    torch.set_default_dtype(torch.float32)
    flow = linear_flow(1e-5)
    for size in (0.0, 1e-12, 1e-9, 1e-7, 1e-5):
        assert flow.log_prob(torch.full((1, 2), size)).item() == pytest.approx(-math.log(2 * math.pi) - 0.8, abs=1e-4)


def test_coarse_solver_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flowtrain").propagate = True
    flow = linear_flow(1e-5)
    fast = Flow((2,), Chain([Continuous(Linear(), ode_solver("euler", step_size=0.5), TraceRule())]))
    evaluate(flow, Gaussian(500))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert evaluate(fast, Gaussian(500)).kl is not None
    assert "solver.rtol" in caplog.text


def test_empty_batches_and_input_gradients_are_supported() -> None:
    flow = linear_flow()
    assert flow.log_prob(torch.zeros(0, 2)).shape == (0,)
    assert flow.inverse(torch.zeros(0, 2)).shape == (0, 2)
    x = torch.randn(3, 2, requires_grad=True)
    (score,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    torch.testing.assert_close(score, -x.detach() @ true_density().precision_matrix, rtol=1e-4, atol=1e-4)


def test_invalid_shapes_and_arguments_are_refused() -> None:
    flow = linear_flow()
    for bad in (torch.zeros(5), torch.zeros(5, 3), torch.zeros(5, 2, 1)):
        with pytest.raises(FlowtrainError, match=r"\(B, 2\)"):
            flow.log_prob(bad)
    with pytest.raises(FlowtrainError, match="n=0"):
        flow.sample(0)
    with pytest.raises(FlowtrainError, match="temperature"):
        flow.sample(1, temperature=-1.0)
    with pytest.raises(ConfigError, match=r"model\.flows=0"):
        ffjord((2,), solver=ode_solver("dopri5"), flows=0)
    with pytest.raises(ConfigError, match="vectors of at least 2 columns"):
        realnvp((1,))


def test_evaluation_refuses_wrong_shapes_and_names_a_bad_row() -> None:
    flow, data = linear_flow(), Gaussian(10)
    data.event_shape = (3,)
    with pytest.raises(DataError, match=r"\(2,\).*\(3,\)"):
        evaluate(flow, data)
    affine, bad = Flow((2,), Affine(2)).eval(), Gaussian(10)
    bad.test = bad.test.clone()
    bad.test[4] = torch.inf
    check = {check.name: check for check in evaluate(affine, bad).checks}["concentration"]
    assert (check.passed, check.rows) == (False, (4,))  # type: ignore[attr-defined]
    bad.test[:] = torch.inf
    with pytest.raises(NonFiniteError, match="10 rows of the test set"):
        evaluate(affine, bad)


def test_evaluation_leaves_the_random_state_unchanged() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    log_probs(linear_flow(evaluate="hutchinson"), torch.randn(5, 2, generator=step_generator(1)))
    assert torch.equal(torch.rand(2), expected)


def test_generator_depends_on_the_whole_key_tuple() -> None:
    draws = [torch.rand(1, generator=step_generator(*key)).item() for key in [(0,), (0, 0), (0, 1), (0, 1, 0), (1, 0)]]
    assert len(set(draws)) == len(draws)
    with pytest.raises(ConfigError, match="seed=-1"):
        step_generator(-1)


def test_package_exports_flow() -> None:
    assert flowtrain.Flow is Flow
    assert Path(flowtrain.__file__).name == "__init__.py"


def extreme_rows(d: int, dtype: torch.dtype) -> Tensor:
    """Returns rows with one or all elements of extreme sizes, and an ordinary row at the end."""
    sizes = [1e10, 1e20, 1e30, torch.finfo(dtype).max, math.inf]
    rows = [torch.full((d,), sign * v) for v in sizes for sign in (1, -1)]
    rows += [torch.where(torch.arange(d) == i, v, 0.1) for v in sizes for i in range(d)]
    rows += [torch.where(torch.arange(d) % 2 == 0, v, -v) for v in sizes]
    return torch.stack([*rows, torch.full((d,), 0.1)]).to(dtype)


FAMILIES: dict[str, Callable[[], Flow]] = {
    "affine": lambda: models.affine(3),
    "mixture": lambda: models.mixture(3, components=4),
    "realnvp": lambda: models.realnvp(3, layers=3, hidden=[8]),
    "nsf": lambda: models.nsf(3, layers=3, hidden=[8]),
    "maf": lambda: models.maf(3, layers=3, hidden=[8]),
    "maf spline": lambda: models.maf(3, layers=3, hidden=[8], transform="spline"),
    "ffjord": lambda: models.ffjord(3, hidden=[8]),
    "ffjord with shared steps": lambda: models.ffjord(3, hidden=[8], solver=ode_solver("rk4", steps=4)),
    "ffjord and affine": lambda: before_affine(models.ffjord(3, hidden=[8])),
}


def before_affine(flow: Flow) -> Flow:
    """Returns a flow whose inverse begins with a matrix product, so that an infinite element becomes NaN."""
    return Flow(flow.base, Chain([flow.bijection, Affine(3)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_p_of_extreme_rows_is_never_nan(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    flow = FAMILIES[family]()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    # columns of small numbers, so that finite values overflow when they are standardised
    scale = Standardize((3,))
    scale.fit(torch.zeros(3), torch.full((3,), 1e-5))
    flow = Flow(flow.base, Chain([flow.bijection, scale])).to(dtype).eval()
    x = extreme_rows(3, dtype)
    for one in (flow, Ensemble([flow, flow], [0.5, 0.5])):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                log_p = one.log_prob(x).detach()
            assert not log_p.isnan().any()
            assert not (log_p == math.inf).any()
            assert (log_p[x.isinf().any(1)] == -math.inf).all()
            assert log_p[-1].isfinite()
            torch.testing.assert_close(log_p[-1:], one.log_prob(x[-1:]).detach())
            _, error = one.log_prob(x, with_error=True)
            assert not error[log_p.isinf()].isfinite().any()
        # a missing value has no density
        assert one.log_prob(torch.tensor([[math.nan, math.inf, 1.0]], dtype=dtype)).isnan().all()


def test_broken_weights_give_nan_for_ordinary_rows() -> None:
    flow = models.affine(3).eval()
    with torch.no_grad():
        next(flow.parameters()).fill_(math.nan)
    assert flow.log_prob(torch.ones(2, 3)).isnan().all()
