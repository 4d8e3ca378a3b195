"""Solves without work: a batch without rows, and an interval of length zero."""

import itertools

import pytest
import torch
from helpers.equations import random_field
from torch import nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import Problem, SolveOptions, ode_solver
from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.tableaus import TABLEAUS
from flowtrain.ode.torchdiffeq_engine import METHODS, Torchdiffeq
from flowtrain.utils.errors import ConfigError

WAYS = [
    (method, gradient)
    for method, gradient in itertools.product(sorted({*TABLEAUS, *METHODS}), ("direct", "replay", "adjoint"))
    if not (gradient == "replay" and method not in TABLEAUS)
]
CASES = list(itertools.product(["vectors", "images"], ["exact", "hutchinson"], [True, False]))


@pytest.mark.parametrize(("method", "gradient"), WAYS)
def test_empty_solve_returns_its_input_with_zero_gradients(method: str, gradient: str) -> None:
    """Gradients of weights are 0 and not None, so that ranks with and without rows are treated alike."""
    try:
        solver = ode_solver(method, gradient=gradient)
    except ConfigError:
        solver = ode_solver(method, gradient=gradient, steps=2)
    for kind, trace, training in CASES:
        field: nn.Module = random_field() if kind == "vectors" else ConvField(1, [2], "concat", "tanh")
        weights = list(field.parameters())
        flow = Continuous(field, solver, TraceRule(trace, trace)).train(training)
        for rows, part in ((0, flow), (3, flow.between(0.3, 0.3))):
            x = torch.randn(rows, *((2,) if kind == "vectors" else (1, 2, 2)), requires_grad=True)
            for there, log_det in (part.forward(x), part.inverse(x)):
                assert torch.equal(there, x)
                assert torch.equal(log_det, torch.zeros(rows))
                at_x, *at_weights = torch.autograd.grad(2 * there.sum(), [x, *weights], retain_graph=True)
                assert torch.equal(at_x, torch.full_like(x, 2))
                at_x, *more = torch.autograd.grad(log_det.sum(), [x, *weights])
                assert torch.equal(at_x, torch.zeros_like(x))
                for share, weight in zip([*at_weights, *more], [*weights, *weights], strict=True):
                    assert torch.equal(share, torch.zeros_like(weight))
            for there in (part.map_forward(x), part.map_inverse(x)):
                assert torch.equal(there, x)
                assert torch.equal(torch.autograd.grad(there.sum(), x)[0], torch.ones_like(x))


def test_empty_solve_ignores_non_finite_weights() -> None:
    field = random_field()
    nn.init.constant_(field.head.linear.weight, torch.nan)
    flow, x = Continuous(field, ode_solver("dopri5"), TraceRule()).between(0.5, 0.5), torch.randn(2, 2)
    assert torch.equal(flow.inverse(x)[0], x)


def test_path_integrals_of_an_empty_batch() -> None:
    flow = Continuous(random_field(), ode_solver("dopri5"), TraceRule()).train()
    options = Regularizer(kinetic=1.0, jacobian=1.0).options(SolveOptions())
    (found,) = flow.pass_inverse(torch.zeros(0, 2), options=options).integrals
    assert found.shape == (0, 2)


@pytest.mark.parametrize("engine", [RungeKutta, Torchdiffeq])
def test_interval_that_rounds_to_zero_is_empty(engine: type[RungeKutta] | type[Torchdiffeq]) -> None:
    """torchdiffeq asserts that the two times differ, so times that are equal in float32 must not reach it."""
    x = torch.ones(2, 2, dtype=torch.float32)
    solved = engine("dopri5", rtol=1e-5).solve(Problem(lambda t, y: y, None, x, 0.5, 0.5 + 1e-12))
    assert torch.equal(solved.x, x)
    assert solved.statistics.nfe_forward == 0


def test_part_of_the_interval_is_solved_in_training() -> None:
    flow = Continuous(random_field(), ode_solver("rk4", steps=8), TraceRule("exact")).train()
    x, part = torch.randn(3, 2), flow.between(0.25, 0.75)
    training = part.pass_inverse(x, options=SolveOptions(end_time=0.5))[:2]
    torch.testing.assert_close(training, part.eval().inverse(x))
