"""The engine's gradient modes, its nodes and the MLP's hand-written derivatives against independent routes."""

import gc
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.divergence import Probes, TraceRule
from flowtrain.errors import ConfigError, FlowtrainError
from flowtrain.fields import mlp_kernels
from flowtrain.fields.activations import ACTIVATIONS
from flowtrain.fields.conv import ConvField
from flowtrain.fields.mlp import LAYERS, MLPField
from flowtrain.solvers import History, Problem, Solver, ode_solver, record_solves, runge_kutta
from flowtrain.solvers.nodes import dense_rows, gauss_nodes, has_dense_output, legendre, panels, stage_nodes
from flowtrain.solvers.tableaus import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.e is not None]
DENSE = [name for name, tableau in TABLEAUS.items() if has_dense_output(tableau)]


def random_field(d: int = 2, layer: str = "concatsquash", activation: str = "tanh", std: float = 0.7) -> MLPField:
    field = MLPField(d, [6, 5, 4], layer, activation)
    for p in field.parameters():
        nn.init.normal_(p, std=std)
    return field


class Plain(nn.Module):
    """The same field with nothing to speed it up."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v: Tensor = self.field(t, x)
        return v


def gradients(field: nn.Module, solver: Solver, x: Tensor, trace: TraceRule | None = None) -> list[Tensor]:
    flow = Continuous(field, solver, trace or TraceRule("exact"))
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    z, log_det = flow.inverse(x)
    loss = (z.square().sum(1) * torch.arange(1.0, len(x) + 1) - 2 * log_det).mean()
    return list(torch.autograd.grad(loss, [x, *field.parameters()]))


def settings_of(method: str) -> dict[str, Any]:
    return {"rtol": 1e-4} if method in ADAPTIVE else {"step_size": 0.2}


@pytest.mark.parametrize("method", list(TABLEAUS))
@pytest.mark.parametrize("control", ["state", "all"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_direct_replay_and_a_plain_module_have_one_gradient(
    method: str, control: str, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # few nodes together, so that replay splits them
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
def test_the_gradient_is_the_adjoints_at_a_tight_tolerance(control: str) -> None:
    field, x = random_field(), torch.randn(7, 2)
    adjoint = gradients(field, ode_solver("dopri5", "adjoint", rtol=1e-11), x)
    for method, gradient in itertools.product(["dopri5", "dopri8"], ["direct", "replay"]):
        found = gradients(field, ode_solver(method, gradient, rtol=1e-10, control=control), x)
        for a, b in zip(found, adjoint, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "heun", "rk4"])
@pytest.mark.parametrize("gradient", ["direct", "replay"])
def test_finite_differences_of_the_discrete_solution(method: str, gradient: str) -> None:
    """On coarse steps only the discrete gradient agrees; the adaptive methods are made to take one step."""
    field, x = random_field(), torch.randn(5, 2)
    # so loose that the whole interval is one accepted step, on either side of the difference
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


def test_a_jacobian_pulls_back_through_one_solve_many_times() -> None:
    field, x = random_field(), torch.randn(1, 2)
    flow = Continuous(field, ode_solver("dopri5", rtol=1e-9), TraceRule("exact"))
    jacobian = torch.autograd.functional.jacobian(lambda y: flow.forward(y)[0], x)
    assert isinstance(jacobian, Tensor)
    log_det = flow.forward(x)[1]
    torch.testing.assert_close(jacobian.view(2, 2).slogdet()[1], log_det.squeeze(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("frozen", ["linear", "layer", "all"])
def test_frozen_parameters_take_no_gradient(layer: str, frozen: str) -> None:
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
def test_pushed_by_hand_is_pushed_by_autograd(
    layer: str, activation: str, tangents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_kernels, "BLOCK", 200)
    field, x = random_field(3, layer, activation, std=0.4), torch.randn(5, 4, 3, requires_grad=True)
    t = torch.rand(5, 1, requires_grad=True)
    e = {"basis": torch.eye(3).view(3, 1, 1, 3), "rows": torch.randn(2, 1, 4, 3), "nodes": torch.randn(2, 5, 4, 3)}
    inputs = [x, t, *field.parameters()]
    found = []
    for push in (field.push, field.push_rows):
        v, je = push(t, x, e[tangents])
        loss = (v.sin() * torch.arange(3)).sum() + (je.cos() * torch.arange(1, len(je) + 1).view(-1, 1, 1, 1)).sum()
        found.append([v, je, *torch.autograd.grad(loss, inputs, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_tangents_that_need_a_gradient_get_it() -> None:
    field, x = random_field(3), torch.randn(4, 3)
    e = torch.randn(1, 4, 3, requires_grad=True)
    field.push(torch.tensor(0.3), x, e)[1].sum().backward()
    assert e.grad is not None
    assert bool(e.grad.any())


def cubic(t: Tensor, x: Tensor) -> Tensor:
    """dx/dt = 4 t^3 - 2t for any x: x(t) = x(0) + t^4 - t^2."""
    return (4 * t**3 - 2 * t) * torch.ones_like(x)


@pytest.mark.parametrize("method", DENSE)
def test_dense_output_is_exact_for_polynomials_of_its_degree(method: str) -> None:
    tableau, h, t0 = TABLEAUS[method], 0.3, 0.2
    degree = 3 if tableau.mid is None else 4
    times = t0 + h * np.array(tableau.c)
    slopes = degree * times ** (degree - 1)
    theta = np.linspace(0, 1, 7)
    found = t0**degree + h * dense_rows(tableau, theta) @ slopes
    np.testing.assert_allclose(found, (t0 + theta * h) ** degree, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 6, 13])
@pytest.mark.parametrize("sign", [1, -1])
def test_gauss_nodes_cover_every_step(method: str, n_steps: int, sign: int) -> None:
    h = np.random.default_rng(0).uniform(0.05, 0.3, n_steps)
    starts = np.concatenate([[0], np.cumsum(h)])
    steps = [(sign * float(t), sign * float(w)) for t, w in zip(starts, h, strict=False)]
    nodes = gauss_nodes(TABLEAUS[method], steps)
    assert sum(len(r) for r in nodes.rows) == len(nodes.times)
    per_step = iter(nodes.times)
    for (t, width), rows in zip(steps, nodes.rows, strict=True):
        for _ in rows:
            assert 0 <= (next(per_step) - t) / width <= 1
    end = sign * float(starts[-1])
    q = torch.tensor(nodes.times).pow(5).view(-1, 1, 1)
    # one step of an order below 5 has too few nodes for this degree
    exact = 1e-12 if len(nodes.times) > 3 else 2e-2
    assert nodes.integrate(q).item() == pytest.approx(end**6 / 6, rel=exact)


def test_stage_nodes_are_the_weights_of_the_method() -> None:
    tableau = TABLEAUS["dopri5"]
    nodes = stage_nodes(tableau, [(0.0, 0.5), (0.5, 0.25)])
    assert sum(nodes.weights) == pytest.approx(0.75)
    q = torch.tensor(nodes.times).pow(4).view(-1, 1, 1)
    assert nodes.integrate(q).item() == pytest.approx(0.75**5 / 5, rel=1e-12)


def test_legendre_tails_see_their_degree_alone() -> None:
    x, w, tails = legendre(6)
    assert w.sum() == pytest.approx(1)
    low = np.polynomial.legendre.legvander(2 * x - 1, 5)
    np.testing.assert_allclose(tails @ low, np.eye(6)[4:], atol=1e-12)


@pytest.mark.parametrize(("method", "control"), [("dopri5", "state"), ("tsit5", "state"), ("dopri5", "all")])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_the_estimated_error_of_the_log_det_tells_its_size(method: str, control: str, rtol: float) -> None:
    field, x = random_field(std=1.2), torch.randn(64, 2)

    def log_det(rtol: float, control: str, method: str) -> tuple[Tensor, Tensor]:
        flow = Continuous(field, ode_solver(method, rtol=rtol, control=control), TraceRule("exact"))
        solution = flow.solve(x, 1.0, 0.0)
        assert solution.integrals is not None
        assert solution.integral_error is not None
        return solution.integrals, solution.integral_error

    exact, _ = log_det(1e-10, "all", "dopri8")
    found, error = log_det(rtol, control, method)
    true = (found - exact).square().mean().sqrt().item()
    estimate = error.square().mean().sqrt().item()
    # the error of the state that reaches the integral is of the order of the tolerance
    assert true < 30 * (estimate + rtol)
    assert estimate < 1e3 * (true + rtol)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_gauss_nodes_are_more_exact_than_stages_on_the_same_steps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_solve_is_planned_by_the_last() -> None:
    torch.manual_seed(1)
    field, x = random_field(), torch.randn(200, 2)
    flow = Continuous(field, ode_solver("dopri5"), TraceRule("exact"))
    nfe = []
    for _ in range(3):
        with record_solves() as solves:
            flow.inverse(x)
        nfe.append(solves[0].nfe_forward)
    assert nfe[2] <= nfe[1] < nfe[0]
    assert not flow.histories[True].steps


def test_evaluation_does_not_depend_on_what_was_solved_before() -> None:
    field, x = random_field(), torch.randn(50, 2)
    flow = Continuous(field, ode_solver("dopri5"), TraceRule("exact")).eval()
    before = flow.inverse(x)[1]
    flow.train().inverse(10 * x)
    assert flow.histories[False].steps
    assert torch.equal(flow.eval().inverse(x)[1], before)


def test_a_wild_first_step_is_rejected_not_believed() -> None:
    field, x = random_field(std=1.5), torch.randn(50, 2)
    problem = Problem(field, None, x, 0.0, 1.0, history=History([(1.0, 1.0)]))
    with record_solves() as solves, torch.no_grad():
        far = ode_solver("dopri5").solve(problem).x
    assert solves[0].rejected
    near = ode_solver("dopri5", rtol=1e-9).solve(Problem(field, None, x, 0.0, 1.0)).x
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


def test_replay_counts_what_it_evaluates_again() -> None:
    field, x = random_field(), torch.randn(5, 2)
    counts = {}
    for gradient in ("direct", "replay"):
        with record_solves() as solves:
            gradients(field, ode_solver("dopri5", gradient, rtol=1e-4), x)
        counts[gradient] = solves[0].nfe_forward, solves[0].nfe_backward, solves[0].accepted
    assert counts["direct"][1] == 0
    # the last step is not taken again; six evaluations a step, and the very first
    assert counts["replay"] == (counts["direct"][0], 6 * (counts["direct"][2] - 1) + 1, counts["direct"][2])


@pytest.mark.parametrize("gradient", ["direct", "replay"])
def test_integrals_of_a_field_without_weights(gradient: str) -> None:
    """x alone needs the gradient: dx/dt = 0 + cubic(t) leaves d x1/d x0 = 1."""

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


def linear(a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: x @ a


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (3, 1, 2, 2)])
def test_odd_shapes(method: str, shape: tuple[int, ...]) -> None:
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    x = torch.randn(shape, requires_grad=True)
    solution = ode_solver(method, rtol=1e-8).solve(Problem(linear(a), None, x, 0.0, 1.0))
    expected = x @ torch.linalg.matrix_exp(a)
    torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(solution.x.square().sum(), x)[0], torch.autograd.grad(expected.square().sum(), x)[0]
    )


def test_compiled_evaluations_serve_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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
    flow.histories[False].steps = []
    flow.compile_field()
    found = torch.autograd.grad(flow.inverse(x)[1].sum(), list(field.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert {"forward", "integrands"} == set(calls)
    assert list(flow.state_dict()) == names
    calls.clear()
    flow.eval().inverse(x)
    assert not calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
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
    """v(t, x) = tanh(x W + c), c from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2))
        self.c = torch.zeros(2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + self.c)


@pytest.mark.parametrize("gradient", ["direct", "replay"])
def test_gradient_of_what_a_field_uses_besides_its_parameters(gradient: str) -> None:
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


def test_gradient_reaches_weights_that_were_swapped_in() -> None:
    field, x = random_field(std=0.4), torch.randn(5, 2)
    flow = Continuous(field, ode_solver("dopri5"), TraceRule("exact"))
    swapped = {name: (p.detach() + 0.1).requires_grad_() for name, p in flow.named_parameters()}
    log_det = torch.func.functional_call(flow, swapped, (x,))[1]
    found = torch.autograd.grad(log_det.sum(), list(swapped.values()))
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1
    flow.histories[True].steps = []
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
    with pytest.raises(FlowtrainError, match="first derivatives only"):
        torch.autograd.functional.hessian(lambda y: flow.inverse(y)[1].sum(), x)
    with pytest.raises(FlowtrainError, match="first derivatives only"):
        torch.autograd.functional.hessian(lambda y: flow.inverse(y)[0].sum(), x)


def test_replay_keeps_no_activations_of_the_integrand() -> None:
    """Neither where torch counts them (saved tensors) nor where it does not (attributes of a Function's context)."""
    field = ConvField(1, [3], "concatsquash", "tanh")
    nn.init.normal_(field.head.conv.weight)
    x = torch.randn(2, 1, 6, 6)
    hidden = 3 * x.numel()

    def kept(gradient: str) -> int:
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

    assert kept("replay") < kept("direct") / 3


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
    with pytest.raises(ConfigError, match=r"returned \(1, 2\) for x \(4, 2\)"):
        ode_solver("dopri5").solve(problem)


def test_a_noisy_integrand_takes_fewer_nodes() -> None:
    steps = [(0.0, 0.5), (0.5, 0.5)]
    for name, exact, noisy in (("dopri5", 8, 6), ("bosh3", 6, 4)):
        assert len(gauss_nodes(TABLEAUS[name], steps).times) == exact
        assert len(gauss_nodes(TABLEAUS[name], steps, noisy=True).times) == noisy
    assert Probes.hutchinson(torch.randn(3, 2), "gaussian", 2).noisy
    assert not Probes.exact(torch.randn(3, 2)).noisy


def test_panels_part_where_the_step_size_jumps() -> None:
    found = [p.tolist() for p in panels([0.3, 0.3, -0.01, 0.02, 0.02, 0.4])]
    assert found == [[0, 1], [2, 3, 4], [5]]
    assert [len(p) for p in panels([0.1] * 7)] == [4, 3]


def test_a_burst_between_long_steps_is_not_passed_over() -> None:
    """v = x g(t), g a narrow bump: log-det d int g; the short steps about it need nodes of their own."""

    def bump(t: Tensor) -> Tensor:
        return torch.exp(-200 * (t - 0.37).square())

    def integrand(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        g = bump(t).unsqueeze(-1)
        return x * g, (2 * g).expand(*x.shape[:-1], 1)

    x = torch.randn(4, 2)
    found = ode_solver("dopri5", rtol=1e-6).solve(Problem(lambda t, y: y * bump(t), integrand, x, 0.0, 1.0)).integrals
    assert found is not None
    torch.testing.assert_close(found, torch.full((4, 1), 2 * (np.pi / 200) ** 0.5), rtol=1e-4, atol=1e-4)
