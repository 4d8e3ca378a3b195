"""The solution of a row does not depend on the rows beside it, and agrees with closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.flow import Flow
from flowtrain.models.ffjord import ffjord
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.periodic_field import PeriodicField
from flowtrain.ode import SolveOptions, Solver, Tableau, ode_solver, record_solves
from flowtrain.ode.tableaus import TABLEAUS
from flowtrain.utils.errors import SolverError
from flowtrain.utils.row_noise import rows_from


def randomized(module: nn.Module) -> nn.Module:
    """Returns the module in float64 with random parameters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator)
    return module.double().eval()


class UserField(nn.Module):
    """A field without hand-written derivatives, whose t is a scalar or (B,)."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x) * (1 + t.reshape(-1, *(1,) * (x.dim() - 1))) - x.flip(1)


def of(field: nn.Module, event: tuple[int, ...], trace: str = "exact", solver: Solver | None = None) -> Flow:
    return Flow(event, Chain([Continuous(randomized(field), solver, TraceRule("exact", trace))])).eval()


FLOWS: dict[str, Callable[[], Flow]] = {
    "concatsquash": lambda: of(MLPField(3, (8, 8)), (3,)),
    "concat": lambda: of(MLPField(3, (8,), layer="concat", activation="softplus"), (3,)),
    "time_embedding": lambda: of(MLPField(3, (8,), layer="time_embedding", activation="swish"), (3,)),
    "periodic": lambda: of(PeriodicField(3, [1], (8,)), (3,)),
    "user": lambda: of(UserField(), (3,)),
    "hutchinson": lambda: of(MLPField(3, (8,)), (3,), "hutchinson"),
    "tsit5": lambda: of(MLPField(3, (8,)), (3,), solver=ode_solver("tsit5")),
    "bosh3": lambda: of(MLPField(3, (8,)), (3,), solver=ode_solver("bosh3", rtol=1e-3)),
    "dopri8": lambda: of(MLPField(3, (8,)), (3,), solver=ode_solver("dopri8")),
    "images": lambda: of(ConvField(1, (4,), size=(4, 4)), (1, 4, 4)),
    "images concat": lambda: of(ConvField(1, (4,), layer="concat"), (1, 4, 4)),
    "images hutchinson": lambda: of(ConvField(1, (4,), layer="time_embedding"), (1, 4, 4), "hutchinson"),
    "multiscale": lambda: randomized(ffjord((1, 4, 4), hidden=(4,), scales=1)),  # type: ignore[dict-item, return-value]
}


def rows_of(flow: Flow, n: int = 9) -> Tensor:
    """Returns rows of which two are outliers with much shorter steps."""
    x = torch.randn(n, *flow.event_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[2] *= 10
    x[5] *= 40
    return x


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_log_p_of_a_row_does_not_depend_on_other_rows(name: str) -> None:
    flow = FLOWS[name]()
    x = rows_of(flow)
    (log_p, z, _), error = flow.density_pass_with_error(x)
    for i in (0, 2, 5, 8):
        with rows_from(i):
            (alone, _, _), its_error = flow.density_pass_with_error(x[i : i + 1])
            close(alone, log_p[i : i + 1])
            close(its_error, error[i : i + 1])
            close(flow.log_prob(x[i:]), log_p[i:])
    if "hutchinson" not in name:
        order = torch.randperm(len(x))
        close(flow.log_prob(x[order]), log_p[order])
    close(flow.forward(z.flip(0)).flip(0), flow.forward(z))
    close(flow.inverse(x[4:]), flow.inverse(x)[4:])


@torch.no_grad()
def test_log_p_given_a_context_does_not_depend_on_other_rows() -> None:
    field = MLPField(2, (8, 8), classes=3)
    flow = Flow((2,), Chain([Continuous(randomized(field))]), context=3).eval()
    x, context = rows_of(flow), torch.randn(9, 3, dtype=torch.float64)
    log_p, order = flow.log_prob(x, context), torch.randperm(9)
    close(flow.log_prob(x[order], context[order]), log_p[order])
    for i in range(9):
        close(flow.log_prob(x[i : i + 1], context[i : i + 1]), log_p[i : i + 1])


class Linear(nn.Module):
    """v = A x cos t, so that x(1) = exp(A sin 1) x(0), with one stiff row for A = -rate I."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T * torch.cos(t).reshape(-1, 1)


@pytest.mark.parametrize(("method", "rtol"), [("dopri5", 1e-9), ("tsit5", 1e-9), ("dopri8", 1e-9), ("bosh3", 1e-6)])
@torch.no_grad()
def test_solution_agrees_with_the_closed_form(method: str, rtol: float) -> None:
    a = torch.tensor([[0.3, 1.0], [-2.0, 0.1]], dtype=torch.float64)
    flow = Continuous(Linear(a), ode_solver(method, rtol=rtol)).eval()
    z = torch.tensor([[1.0, 2.0], [0.0, 0.0], [300.0, -1.0], [1e-6, 1e-7]], dtype=torch.float64)
    x, log_det = flow(z)
    torch.testing.assert_close(x, z @ torch.linalg.matrix_exp(a * math.sin(1)).T, rtol=50 * rtol, atol=50 * rtol)
    torch.testing.assert_close(
        log_det, torch.full((4,), 0.4 * math.sin(1), dtype=torch.float64), rtol=50 * rtol, atol=0
    )
    torch.testing.assert_close(flow.inverse(x)[0], z, rtol=200 * rtol, atol=200 * rtol)


class Rates(nn.Module):
    """v = -(10 |x| + 1) x for scalars: stiff for large x, and NaN beyond 1e6."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.where(x.abs() > 1e6, torch.nan, -(10 * x.abs() + 1) * x)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@torch.no_grad()
def test_rows_that_fail_do_not_change_the_others(method: str) -> None:
    solver = ode_solver("rk4", steps=100) if method == "rk4" else ode_solver(method, rtol=1e-8, max_nfe=600)
    flow = Flow((1,), Chain([Continuous(Rates(), solver)])).double().eval()
    block = flow.ode_blocks[0]
    good = torch.tensor([[0.1], [-0.5], [1.0]], dtype=torch.float64)
    # NaN in the state, NaN in the field, and for the adaptive solver a row that is too stiff for max_nfe
    bad = [math.nan, 2e6, 2e5]
    x = torch.tensor([[0.1], [bad[0]], [-0.5], [bad[1]], [1.0], [bad[2]]], dtype=torch.float64)
    lost: dict[int, SolverError] = {}
    found = block.pass_forward(x, None, SolveOptions(unsolved=lost))
    assert sorted(lost) == [1, 3, 5]
    expected = block.forward(good)
    close(found[0][[0, 2, 4]], expected[0])
    close(found[1][[0, 2, 4]], expected[1])
    assert found[0][[1, 3, 5]].isnan().all()
    assert found[1][[1, 3, 5]].isnan().all()
    with pytest.raises(SolverError):
        block.forward(x)


@pytest.mark.parametrize("event", [(3,), (1, 4, 4)])
def test_gradients_agree_with_finite_differences_and_do_not_change_the_value(event: tuple[int, ...]) -> None:
    field: nn.Module = MLPField(3, (8,)) if len(event) == 1 else ConvField(1, (4,))
    flow = of(field, event, solver=ode_solver("dopri5", rtol=1e-8))
    x = rows_of(flow, 6)[:4]
    with torch.no_grad():
        expected = flow.log_prob(x)
    x.requires_grad_()
    log_p = flow.log_prob(x)
    close(log_p.detach(), expected)
    weights = next(flow.parameters())
    of_x, of_weights = torch.autograd.grad(log_p[:2].sum(), (x, weights))
    assert (of_x[2:] == 0).all()
    h = 1e-5

    def difference(change: Callable[[float], None]) -> float:
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                change(sign * h)
                values.append(float(flow.log_prob(x)[:2].sum()))
            change(h)
        return (values[0] - values[1]) / (2 * h)

    direction = torch.randn_like(x)
    slope = difference(lambda step: x.data.add_(step * direction))
    assert slope == pytest.approx(float((of_x * direction).sum()), rel=1e-4, abs=1e-4)
    direction = torch.randn_like(weights)
    slope = difference(lambda step: weights.data.add_(step * direction))
    assert slope == pytest.approx(float((of_weights * direction).sum()), rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_nfe_is_the_mean_over_rows() -> None:
    flow = of(MLPField(2, (8,)), (2,))
    x = rows_of(flow)
    # rows far from 0 need more steps
    x = x * torch.logspace(-1, 1.5, len(x), dtype=x.dtype).unsqueeze(1)
    with record_solves() as outer, record_solves(also_outside=True) as solves:
        flow.log_prob(x)
        for row in x.split(1):
            flow.log_prob(row)
    whole, *single = [s.nfe_forward for s in solves]
    assert whole == pytest.approx(sum(single) / len(x))
    assert len({*single}) > 1
    assert outer == solves


@torch.no_grad()
def test_a_method_whose_last_stage_is_not_the_first_of_the_next_step() -> None:
    """The midpoint method with Euler's method embedded, which evaluates both stages again in each step."""
    midpoint = TABLEAUS["midpoint"]
    tableau = Tableau(2, midpoint.c, midpoint.a, midpoint.b, e=(-1.0, 1.0))
    flow = of(MLPField(2, (8,)), (2,), solver=ode_solver("own", tableau=tableau, rtol=1e-5))
    exact = flow.with_solver(ode_solver("dopri5", rtol=1e-10))
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=0, atol=1e-3)
    close(flow.log_prob(x[1:]), flow.log_prob(x)[1:])
