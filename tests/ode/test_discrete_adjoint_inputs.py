"""Which inputs receive gradients of a solve, which uses are refused, and compiled or subclassed fields."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.equations import Plain, gradients, random_field
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import Problem, StepPlan, ode_solver
from flowtrain.utils.errors import ConfigError, FlowtrainError


def cubic(t: Tensor, x: Tensor) -> Tensor:
    """dx/dt = 4 t^3 - 2 t for any x, so x(t) = x(0) + t^4 - t^2."""
    return (4 * t**3 - 2 * t) * torch.ones_like(x)


@pytest.mark.parametrize("gradient", ["direct", "replay"])
def test_integrals_of_a_field_without_weights(gradient: str) -> None:
    """Only x needs a gradient, and d x1/d x0 = 1 because the field does not depend on x."""

    def integrand(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.sum(-1, keepdim=True)

    x = torch.randn(3, 2, requires_grad=True)
    solution = ode_solver("dopri5", gradient).solve(Problem(cubic, integrand, x, 0.0, 1.0))
    assert solution.integrals is not None
    torch.testing.assert_close(solution.x, x)
    # int_0^1 x0 + t^4 - t^2 dt, for each of two dimensions
    torch.testing.assert_close(solution.integrals[:, 0], x.sum(1) + 2 * (1 / 5 - 1 / 3))
    (dx,) = torch.autograd.grad(solution.integrals.sum() + 3 * solution.x.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 4.0))


def test_compiled_field_is_used_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    field, x = random_field(), torch.randn(5, 2)
    flow = Continuous(field, ode_solver("dopri5", rtol=1e-4), TraceRule("exact"))
    names = list(flow.state_dict())
    expected = torch.autograd.grad(flow.inverse(x)[1].sum(), list(field.parameters()))
    flow.step_plans = dict.fromkeys(flow.step_plans, StepPlan())
    flow.compile_field()
    found = torch.autograd.grad(flow.inverse(x)[1].sum(), list(field.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert {"forward", "integrands"} == set(calls)
    assert list(flow.state_dict()) == names
    calls.clear()
    flow.eval().inverse(x)
    # torch.func cannot enter compiled functions either
    torch.func.vmap(lambda row: flow.train().inverse(row.unsqueeze(0))[1])(x)
    assert not calls


@pytest.mark.slow
# torch's warnings about the code that it traces
@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_compiled_field_has_the_same_gradient() -> None:
    field, x = random_field(), torch.randn(5, 2)
    solver = ode_solver("dopri5", rtol=1e-4)
    expected = gradients(field, solver, x)
    flow = Continuous(field, solver, TraceRule("exact"))
    flow.compile_field()
    x.requires_grad_()
    z, log_det = flow.inverse(x)
    loss = (z.square().sum(1) * torch.arange(1.0, len(x) + 1) - 2 * log_det).mean()
    for a, b in zip(torch.autograd.grad(loss, [x, *field.parameters()]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Conditional(nn.Module):
    """v(t, x) = tanh(x W + c), where c is not a parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2))
        self.c = torch.zeros(2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + self.c)


@pytest.mark.parametrize("gradient", ["direct", "replay"])
def test_gradient_reaches_tensors_outside_the_parameters(gradient: str) -> None:
    field, x, encoder = Conditional(), torch.randn(5, 2), nn.Linear(3, 2)
    code = torch.randn(3)
    flow = Continuous(field, ode_solver("rk4", gradient, step_size=0.25), TraceRule("exact"))

    def loss() -> Tensor:
        field.c = encoder(code)
        z, log_det = flow.inverse(x)
        return (z.square().sum(1) - log_det).mean()

    (grad,) = torch.autograd.grad(loss(), encoder.bias)
    for i in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                encoder.bias[i] += sign * 1e-6
                values.append(loss())
                encoder.bias[i] -= sign * 1e-6
        assert grad[i].item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-5)


def test_gradient_reaches_replaced_weights() -> None:
    field, x = random_field(std=0.4), torch.randn(5, 2)
    flow = Continuous(field, ode_solver("dopri5"), TraceRule("exact"))
    swapped = {name: (p.detach() + 0.1).requires_grad_() for name, p in flow.named_parameters()}
    log_det = torch.func.functional_call(flow, swapped, (x,))[1]
    found = torch.autograd.grad(log_det.sum(), list(swapped.values()))
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1
    flow.step_plans = dict.fromkeys(flow.step_plans, StepPlan())
    expected = torch.autograd.grad(flow.forward(x)[1].sum(), list(flow.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", ["direct", "replay"])
@pytest.mark.parametrize("plain", [False, True])
def test_weights_changed_before_backward_are_refused(gradient: str, plain: bool) -> None:
    field, x = random_field(), torch.randn(5, 2)
    flow = Continuous(Plain(field) if plain else field, ode_solver("dopri5", gradient), TraceRule("exact"))
    z, _ = flow.inverse(x)
    with torch.no_grad():
        field.head.linear.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_second_derivatives_are_refused_not_zero() -> None:
    flow = Continuous(random_field(), ode_solver("dopri5"), TraceRule("exact"))
    x = torch.randn(1, 2)
    with pytest.raises(FlowtrainError, match="only first derivatives"):
        torch.autograd.functional.hessian(lambda y: flow.inverse(y)[1].sum(), x)
    with pytest.raises(FlowtrainError, match="only first derivatives"):
        torch.autograd.functional.hessian(lambda y: flow.inverse(y)[0].sum(), x)


def test_a_subclass_computes_its_own_velocity() -> None:
    class Doubled(MLPField):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return 2 * super().forward(t, x)

    field = random_field(std=0.4)
    twice = Doubled(2, [6, 5, 4], "concatsquash", "tanh")
    twice.load_state_dict(field.state_dict())
    x = torch.randn(3, 2)
    solver = ode_solver("rk4", step_size=0.5)
    expected = solver.solve(Problem(twice, None, x, 0.0, 1.0)).x
    torch.testing.assert_close(Continuous(twice, solver, TraceRule("exact")).map_forward(x), expected)


def test_a_velocity_of_another_shape_is_refused() -> None:
    problem = Problem(lambda t, x: x[:1], None, torch.randn(4, 2), 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"\(1, 2\) .* \(4, 2\)"):
        ode_solver("dopri5").solve(problem)
