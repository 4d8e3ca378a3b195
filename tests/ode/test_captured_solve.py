"""Captured solves have the values and gradients of ordinary solves, to the last bit.

`recorded` tests run on a stand-in for CUDA graphs, see helpers/graphs.py. The others run on the same buffers without
graphs, as solver.cuda_graphs does on a CPU.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.graphs import Recorder
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import kinetic
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import SolveOptions, StepPlan, captured_solve, ode_solver, record_solves
from flowtrain.utils import cuda_graphs
from flowtrain.utils.errors import ConfigError, FlowtrainError, SolverError

Batch = Callable[[int], tuple[Tensor, Tensor | None]]


@pytest.fixture(params=["buffers", "recorded"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder | None:
    """Returns the stand-in for CUDA graphs, or None for buffers without graphs."""
    found = Recorder() if request.param == "recorded" else None
    monkeypatch.setattr(cuda_graphs, "recorder_of", lambda device: found)
    # every structure is captured when it first occurs
    monkeypatch.setattr(captured_solve, "BEFORE_CAPTURE", 1)
    return found


def field(std: float = 0.7, **settings: Any) -> MLPField:
    torch.manual_seed(0)
    made = MLPField(2, [8, 8], **settings)
    for p in made.parameters():
        nn.init.normal_(p, std=std)
    return made


def flow_of(velocity: MLPField, graphs: bool, method: str = "dopri5", trace: str = "exact") -> Continuous:
    return Continuous(copy.deepcopy(velocity), ode_solver(method, rtol=1e-4, cuda_graphs=graphs), TraceRule(trace))


def rows(n: int) -> Batch:
    return lambda step: (torch.randn(n, 2, generator=torch.Generator().manual_seed(step)), None)


def train(flow: Continuous, batch: Batch, steps: int = 4, **options: Any) -> list[Any]:
    """Returns everything that a solve returns, and its gradients, for some steps of gradient descent."""
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        x, context = batch(step)
        # the tolerance changes in every step, as in the warm-up of training
        rtol = 1e-4 * 1.1**step
        with record_solves(also_outside=True) as solves:
            passed = flow.pass_inverse(x, context, SolveOptions(rtol=rtol, atol=rtol, **options))
        loss = (passed.x.square().sum(1) / 2 - passed.log_det).mean() + sum(q.mean() for q in passed.integrals)
        loss.backward()
        found += [passed.x.detach(), passed.log_det.detach(), *(q.detach() for q in passed.integrals)]
        found += [p.grad for p in flow.parameters()] + [solves[0].integral_error]
        found += [solves[0].nfe_forward, solves[0].accepted, solves[0].rejected, flow.step_plans]
        with torch.no_grad():
            for p in flow.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
                    p.grad = None
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def labels(step: int) -> tuple[Tensor, Tensor]:
    return rows(20)(step)[0], torch.arange(20) % 3


def features(step: int) -> tuple[Tensor, Tensor]:
    return rows(20)(step)[0], torch.randn(20, 3, generator=torch.Generator().manual_seed(-step - 1))


@pytest.mark.parametrize(
    ("settings", "method", "trace", "batch", "options"),
    [
        ({"std": 1.0}, "dopri5", "exact", rows(20), {}),
        ({"activation": "softplus", "layer": "concat"}, "tsit5", "hutchinson", rows(20), {}),
        ({"activation": "swish", "layer": "time_embedding", "std": 0.4}, "dopri8", "exact", rows(7), {}),
        ({"classes": 3}, "bosh3", "exact", labels, {}),
        ({"classes": 3}, "dopri5", "hutchinson", features, {"integrals": {"kinetic": kinetic}, "end_time": 0.5}),
    ],
)
def test_values_and_gradients_equal_ordinary_solves(
    settings: dict[str, Any],
    method: str,
    trace: str,
    batch: Batch,
    options: dict[str, Any],
    recorder: Recorder | None,
) -> None:
    velocity = field(**settings)
    flow = flow_of(velocity, True, method, trace)
    found = train(flow, batch, **options)
    assert_same(found, train(flow_of(velocity, False, method, trace), batch, **options))
    memory = flow.graphs.memory
    assert memory is not None
    # all solves but the first are planned
    assert memory.generation == 3
    if recorder is not None:
        assert len(recorder.recordings) == 2 * len(flow.graphs.calls)


def test_shapes_and_dtypes_may_change(recorder: Recorder | None) -> None:
    sizes = [20, 20, 20, 5, 5, 5, 20, 20]

    def batch(step: int) -> tuple[Tensor, None]:
        return rows(sizes[step])(step)[0], None

    velocity = field()
    flow, plain = flow_of(velocity, True), flow_of(velocity, False)
    assert_same(train(flow, batch, len(sizes)), train(plain, batch, len(sizes)))
    flow.float()
    plain.float()

    def in_float(step: int) -> tuple[Tensor, None]:
        return rows(20)(step)[0].float(), None

    assert_same(train(flow, in_float), train(plain, in_float))
    assert len({call.buffers[1].dtype for call in flow.graphs.calls.values()}) == 2


def test_parameters_at_other_addresses_are_captured_again(recorder: Recorder | None) -> None:
    # as with the averaged weights, which replace the data of the parameters
    outcomes = []
    for graphs in (True, False):
        flow = planned(graphs)
        for p in flow.parameters():
            p.data = p.data * 0.9
        outcomes.append(train(flow, rows(20), 2))
    assert_same(*outcomes)


def test_gradient_of_x_equals_an_ordinary_solve(recorder: Recorder | None) -> None:
    velocity = field()
    gradients = []
    for graphs in (True, False):
        flow = flow_of(velocity, graphs)
        for step in range(4):
            x = rows(20)(step)[0].requires_grad_()
            z, log_det = flow.inverse(x)
            gradients.append(torch.autograd.grad((z.sum(1) + log_det).square().sum(), (x, *flow.parameters())))
    for found, expected in zip(gradients[:4], gradients[4:], strict=True):
        assert_same(list(found), list(expected))


def test_rejected_step_repeats_the_solve_without_a_graph(recorder: Recorder | None) -> None:
    velocity = field(std=1.0)

    def batch(step: int) -> tuple[Tensor, None]:
        # the steps of batch 4 do not suit batch 5
        return rows(20)(step)[0] * (4 if step == 4 else 0.3), None

    with record_solves() as solves:
        found = train(flow_of(velocity, True), batch, 7)
    assert solves[5].rejected
    assert_same(found, train(flow_of(velocity, False), batch, 7))


def planned(graphs: bool, steps: int = 3) -> Continuous:
    flow = flow_of(field(), graphs)
    train(flow, rows(20), steps)
    return flow


def test_batch_with_nan_does_not_change_later_solves(recorder: Recorder | None) -> None:
    flow = planned(True)
    x = rows(20)(3)[0]
    bad = x.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(SolverError):
        flow.inverse(bad)
    plain = planned(False)
    assert_same(list(flow.inverse(x)), list(plain.inverse(x)))


def test_second_solve_before_the_backward_pass_uses_no_graph(recorder: Recorder | None) -> None:
    gradients = []
    for graphs in (True, False):
        flow = planned(graphs)
        first, second = (flow.inverse(rows(20)(step)[0])[1].sum() for step in (3, 4))
        gradients.append(
            [*torch.autograd.grad(first, flow.parameters()), *torch.autograd.grad(second, flow.parameters())]
        )
        if graphs:
            memory = flow.graphs.memory
            assert memory is not None
            before = memory.generation
            # a result that is never differentiated does not block the graphs
            flow.inverse(rows(20)(5)[0])
            flow.inverse(rows(20)(6)[0])
            assert memory.generation == before + 2
    assert_same(*gradients)


def test_backward_after_another_solve_is_refused(recorder: Recorder | None) -> None:
    flow = planned(True)
    parameters = list(flow.parameters())
    first = flow.inverse(rows(20)(3)[0])[1].sum()
    once = torch.autograd.grad(first, parameters, retain_graph=True)
    assert_same(list(torch.autograd.grad(first, parameters, retain_graph=True)), list(once))
    flow.inverse(rows(20)(4)[0])
    with pytest.raises(FlowtrainError, match="cuda_graphs"):
        torch.autograd.grad(first, parameters)


def test_parameters_changed_before_the_backward_pass_are_detected(recorder: Recorder | None) -> None:
    flow = planned(True)
    loss = flow.inverse(rows(20)(3)[0])[1].sum()
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_gradients_that_accumulate_are_not_overwritten(recorder: Recorder | None) -> None:
    gradients = []
    for graphs in (True, False):
        flow = planned(graphs)
        for step in (3, 4, 5):
            flow.inverse(rows(20)(step)[0])[1].sum().backward()
        gradients.append([p.grad for p in flow.parameters()])
    assert_same(*gradients)


def test_copied_blocks_have_no_graphs(recorder: Recorder | None) -> None:
    flow = planned(True)
    assert flow.graphs.calls
    names = set(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert not other.graphs.calls
        assert set(other.state_dict()) == names
        assert_same(train(other, rows(20)), train(copy.deepcopy(flow), rows(20)))


def test_least_recently_used_graph_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_solve, "MOST_GRAPHS", 1)
    flow = flow_of(field(), True)
    for n in (20, 10):
        flow.step_plans = dict.fromkeys(flow.step_plans, StepPlan())
        train(flow, rows(n), 4)
    [call] = flow.graphs.calls.values()
    assert len(call.buffers[1]) == 10


def test_failed_capture_warns_and_continues(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Recorder):
        def warm_up(self) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "recorder_of", lambda device: Failing())
    velocity = field()
    found = train(flow_of(velocity, True), rows(20))
    assert_same(found, train(flow_of(velocity, False), rows(20)))
    assert "not permitted" in caplog.text


def test_evaluation_and_solves_without_gradient_use_no_graph() -> None:
    flow = planned(True)
    memory = flow.graphs.memory
    assert memory is not None
    before = memory.generation
    with torch.no_grad():
        flow.inverse(rows(20)(3)[0])
    flow.eval().inverse(rows(20)(3)[0])
    assert memory.generation == before


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rk4", "steps": 4},
        {"method": "dopri5", "gradient": "replay"},
        {"method": "dopri5", "gradient": "adjoint"},
        {"method": "dopri5", "control": "all"},
        {"method": "adaptive_heun"},
        {"method": "dopri5", "cuda_graphs": "yes"},
    ],
)
def test_solvers_without_graphs_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"solver\.cuda_graphs"):
        ode_solver(**{"cuda_graphs": True, **settings})
