"""The engine's gradient modes and the hand-written derivatives of the MLP agree with independent computations."""

import gc
import itertools
from typing import Any

import pytest
import torch
from helpers.equations import ADAPTIVE, Plain, gradients, random_field
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn import mlp_kernels
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import LAYERS
from flowtrain.nn.velocity_field import ACTIVATIONS
from flowtrain.ode import ode_solver, record_solves, runge_kutta
from flowtrain.ode.tableaus import TABLEAUS


def settings_of(method: str) -> dict[str, Any]:
    return {"rtol": 1e-4} if method in ADAPTIVE else {"step_size": 0.2}


@pytest.mark.parametrize("method", list(TABLEAUS))
@pytest.mark.parametrize("control", ["state", "all"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_direct_and_replay_gradients_match_autograd(
    method: str, control: str, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the limit is low, so that replay splits the nodes into several batches
    monkeypatch.setattr(runge_kutta, "REPLAYED_NUMBERS", 40)
    field, x = random_field(), torch.randn(7, 2)
    known = {"control": control, **settings_of(method)}
    direct = gradients(field, ode_solver(method, "direct", **known), x, TraceRule(trace))
    replay = gradients(field, ode_solver(method, "replay", **known), x, TraceRule(trace))
    plain = gradients(Plain(field), ode_solver(method, "direct", **known), x, TraceRule(trace))
    plain_replay = gradients(Plain(field), ode_solver(method, "replay", **known), x, TraceRule(trace))
    for a, *others in zip(direct, replay, plain, plain_replay, strict=True):
        for b in others:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("control", ["state", "all"])
def test_gradient_matches_the_continuous_adjoint_at_tight_tolerance(control: str) -> None:
    field, x = random_field(), torch.randn(7, 2)
    adjoint = gradients(field, ode_solver("dopri8", "adjoint", rtol=1e-10), x)
    for method, gradient in itertools.product(["dopri5", "dopri8"], ["direct", "replay"]):
        found = gradients(field, ode_solver(method, gradient, rtol=1e-9, control=control), x)
        for a, b in zip(found, adjoint, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "heun", "rk4"])
@pytest.mark.parametrize("gradient", ["direct", "replay"])
def test_gradient_matches_finite_differences_of_the_discrete_solution(method: str, gradient: str) -> None:
    """On coarse steps only the discrete gradient agrees. The adaptive methods are made to take a single step."""
    field, x = random_field(), torch.randn(5, 2)
    # a loose tolerance accepts the whole interval as one step, for both values of the difference
    known = {"rtol": 1e3} if method in ADAPTIVE else {"step_size": 0.5}
    solver = ode_solver(method, gradient, **known)
    flow = Continuous(field, solver, TraceRule("exact"))

    def loss() -> Tensor:
        z, log_det = flow.inverse(x)
        return (z.square().sum(1) - log_det).mean()

    weight = field.head.linear.weight
    for index in [(0, 0), (1, 3)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * 1e-6
                with record_solves() as solves:
                    values.append(loss())
                weight[index] -= sign * 1e-6
            assert method not in ADAPTIVE or (solves[0].accepted, solves[0].rejected) == (1, 0)
        expected = ((values[0] - values[1]) / 2e-6).item()
        (grad,) = torch.autograd.grad(loss(), weight)
        assert grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_jacobian_uses_one_solve_for_many_backward_passes() -> None:
    field, x = random_field(), torch.randn(1, 2)
    flow = Continuous(field, ode_solver("dopri5", rtol=1e-9), TraceRule("exact"))
    jacobian = torch.autograd.functional.jacobian(lambda y: flow.forward(y)[0], x)
    assert isinstance(jacobian, Tensor)
    log_det = flow.forward(x)[1]
    torch.testing.assert_close(jacobian.view(2, 2).slogdet()[1], log_det.squeeze(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("frozen", ["linear", "layer", "all"])
def test_frozen_parameters_receive_no_gradient(layer: str, frozen: str) -> None:
    field, x = random_field(layer=layer, std=0.4), torch.randn(4, 2, requires_grad=True)
    parts = {"linear": field.body[0].linear, "layer": field.body[0], "all": field}
    for p in parts[frozen].parameters():
        p.requires_grad_(False)
    trained = [p for p in field.parameters() if p.requires_grad]
    found = []
    for each in (field, Plain(field)):
        flow = Continuous(each, ode_solver("dopri5"), TraceRule("exact"))
        loss = flow.inverse(x)[1].mean()
        found.append(torch.autograd.grad(loss, [x, *trained], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert bool(found[0][0].any())


@pytest.mark.parametrize(("layer", "activation"), list(itertools.product(LAYERS, ACTIVATIONS)))
@pytest.mark.parametrize("tangents", ["basis", "rows", "nodes"])
def test_handwritten_jvp_gradients_match_autograd(
    layer: str, activation: str, tangents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_kernels, "BLOCK", 200)
    field, x = random_field(3, layer, activation, std=0.4), torch.randn(5, 4, 3, requires_grad=True)
    t = torch.rand(5, 1, requires_grad=True)
    e = {"basis": torch.eye(3).view(3, 1, 1, 3), "rows": torch.randn(2, 1, 4, 3), "nodes": torch.randn(2, 5, 4, 3)}
    inputs = [x, t, *field.parameters()]
    found = []
    for jvp in (field.jvp, field.jvp_rows):
        v, je = jvp(t, x, e[tangents])
        loss = (v.sin() * torch.arange(3)).sum() + (je.cos() * torch.arange(1, len(je) + 1).view(-1, 1, 1, 1)).sum()
        found.append([v, je, *torch.autograd.grad(loss, inputs, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_tangents_receive_gradients() -> None:
    field, x = random_field(3), torch.randn(4, 3)
    e = torch.randn(1, 4, 3, requires_grad=True)
    field.jvp(torch.tensor(0.3), x, e)[1].sum().backward()
    assert e.grad is not None
    assert bool(e.grad.any())


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_gauss_nodes_are_more_accurate_than_stage_nodes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, x = random_field(std=1.2), torch.randn(64, 2)
    exact = Continuous(field, ode_solver("dopri8", rtol=1e-10), TraceRule("exact")).eval().inverse(x)[1]

    def error() -> tuple[float, int]:
        flow = Continuous(field, ode_solver(method, rtol=1e-6), TraceRule("exact"))
        with record_solves() as solves:
            log_det = flow.inverse(x)[1]
        return (log_det - exact).square().mean().sqrt().item(), solves[0].accepted

    gauss, n = error()
    monkeypatch.setattr(runge_kutta, "has_dense_output", lambda tableau: False)
    stages, m = error()
    assert n == m
    assert gauss < stages / 2


def test_replay_nfe_counts_six_evaluations_per_step() -> None:
    field, x = random_field(), torch.randn(5, 2)
    counts = {}
    for gradient in ("direct", "replay"):
        with record_solves() as solves:
            gradients(field, ode_solver("dopri5", gradient, rtol=1e-4), x)
        counts[gradient] = solves[0].nfe_forward, solves[0].nfe_backward, solves[0].accepted
    assert counts["direct"][1] == 0
    # replay does not repeat the last step. It needs six evaluations for each other step, and one at the start
    assert counts["replay"] == (counts["direct"][0], 6 * (counts["direct"][2] - 1) + 1, counts["direct"][2])


def test_replay_keeps_no_activations_of_the_integrand() -> None:
    """Counts saved tensors and also tensors in attributes of a Function's context, which torch's hooks do not see."""
    field = ConvField(1, [3], "concatsquash", "tanh")
    nn.init.normal_(field.head.conv.weight)
    x = torch.randn(2, 1, 6, 6)
    hidden = 3 * x.numel()

    def retained_tensors(gradient: str) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel() >= hidden
            return tensor

        flow = Continuous(field, ode_solver("rk4", gradient, step_size=0.1), TraceRule("hutchinson"))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            solution = flow.inverse(x)
        gc.collect()
        alive = sum(type(o) is Tensor and o.numel() >= hidden for o in gc.get_objects())
        del solution
        return count + alive

    assert retained_tensors("replay") < retained_tensors("direct") / 3
