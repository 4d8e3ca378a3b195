"""Tests on a CUDA device, run by `pytest -m gpu`."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import write_set
from helpers.small_fits import CASES, TYPES, fitted, rows_of
from torch import nn

import flowtrain
from flowtrain.bijections.continuous import Continuous
from flowtrain.cli.config_files import compose_defaults
from flowtrain.evaluation import evaluate
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.velocity_field import Field
from flowtrain.ode import StepPlan, ode_solver
from flowtrain.plotting.transport_pictures import animate
from flowtrain.runs.build import build_data
from flowtrain.runs.console import messages
from flowtrain.runs.load import load
from flowtrain.runs.run import train
from flowtrain.utils.cuda_graphs import CudaRecorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("model", ["affine", "realnvp", "ffjord"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_training_works_and_log_prob_matches_the_cpu(model: str, trace: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    keys = [f"model={model}", "device=cuda", "trainer.steps=5", "trainer.val_every=5", "data.n_test=100"]
    config = compose_defaults([*keys, *([f"model.trace={trace}"] if model == "ffjord" else [])])
    with messages():
        _, code = train(config, tmp_path)
    assert code == 0
    x = build_data(config).test
    on_gpu = load(tmp_path, "cuda").log_prob(x)
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), load(tmp_path).log_prob(x), rtol=1e-4, atol=1e-4)


def step_gradients(flow: Continuous, x: torch.Tensor) -> list[torch.Tensor]:
    flow.step_plans = dict.fromkeys(flow.step_plans, StepPlan())
    z, log_det = flow.inverse(x)
    loss = (z.square().flatten(1).sum(1) - 2 * log_det).mean()
    return [g.cpu() for g in torch.autograd.grad(loss, list(flow.parameters()))]


@pytest.mark.parametrize("gradient", ["direct", "replay"])
@pytest.mark.parametrize("images", [False, True])
def test_gradients_match_the_cpu(gradient: str, images: bool) -> None:
    """TF32 is allowed outside the solve and must be off inside it, so float32 gradients agree."""
    torch.set_default_dtype(torch.float32)
    field: Field = MLPField(2, [32, 32], "concat", "tanh")
    if images:
        field = ConvField(1, [8, 8], "concatsquash", "softplus")
    for p in field.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(16, 1, 8, 8) if images else torch.randn(64, 2)
    # with one probe per pixel the trace is exact, so the results do not depend on the noise of the device
    flow = Continuous(field, ode_solver("dopri5", gradient, rtol=1e-4), TraceRule("exact"))
    expected = step_gradients(flow, x)
    found = step_gradients(flow.to("cuda"), x.to("cuda"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_cuda_graphs_have_the_gradients_of_ordinary_solves() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    field = MLPField(2, [32, 32])
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    batches = [torch.randn(64, 2, device="cuda") for _ in range(6)]
    found = []
    for graphs in (True, False):
        flow = Continuous(copy.deepcopy(field), ode_solver("dopri5", rtol=1e-4, cuda_graphs=graphs)).to("cuda")
        for x in batches:
            z, log_det = flow.inverse(x)
            loss = (z.square().sum(1) - 2 * log_det).mean()
            loss.backward()
            found += [loss.detach(), *(p.grad for p in flow.parameters() if p.grad is not None)]
            with torch.no_grad():
                for p in flow.parameters():
                    assert p.grad is not None
                    p -= 0.01 * p.grad
                    p.grad = None
        assert graphs == bool(flow.graphs.calls)
    for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_random_numbers_are_drawn_after_a_failed_capture() -> None:
    device = torch.device("cuda", 0)
    recorder, stream = CudaRecorder(device), torch.cuda.current_stream()
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError), recorder.record():
        x.sum().item()
    assert torch.cuda.current_stream() == stream
    assert len(torch.randn(3, device=device).unique()) == 3
    with recorder.warm_up():
        x.sum()
    with recorder.record() as graph:
        y = 2 * x
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6, 6, 6]


@pytest.mark.parametrize("name", ["realnvp", "glow", "ffjord"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_image_training_works_and_log_prob_matches_the_cpu(name: str, precision: str, tmp_path: Path) -> None:
    """After training in reduced precision, the likelihood of the weights is computed in full precision."""
    if name == "ffjord" and precision != "float32":
        pytest.skip("refused: ODEs are solved in float32")
    torch.set_default_dtype(torch.float32)
    root = write_set(tmp_path / "data")
    small = [f"data.root={root}", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=5", "trainer.val_every=5"]
    keys = [
        f"model={name}",
        "data=mnist",
        "model.hidden=[8]",
        "model.scales=1",
        "model.conditional=true",
        "recipe=none",
    ]
    chosen = ["device=cuda", f"trainer.precision={precision}"]
    config = compose_defaults([*keys, *small, *chosen])
    with messages():
        _, code = train(config, tmp_path / "run")
    assert code == 0
    data = build_data(config)
    on_cpu = load(tmp_path / "run")
    x = on_cpu.dequantized(data.test)
    if on_cpu.solver is not None:
        for continuous in (m for m in on_cpu.modules() if isinstance(m, Continuous)):
            continuous.trace = TraceRule("exact", "exact")
    on_gpu = copy.deepcopy(on_cpu).to("cuda")
    found, expected = on_gpu.log_prob(x, data.test_labels), on_cpu.log_prob(x, data.test_labels)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-2)


# warnings of torch: its compiler uses a deprecated function and recommends TF32
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:TensorFloat32:UserWarning",
    # warnings of torch 2.11 about the code that it traces
    "ignore:The .grad attribute:UserWarning",
    "ignore:The CUDA Graph is empty:UserWarning",
)
def test_compiled_flow_trains_with_cuda_graphs(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    keys = ["device=cuda", "trainer.steps=5", "trainer.val_every=5", "data.n_test=100", "trainer.compile=true"]
    with messages():
        _, code = train(compose_defaults(keys), tmp_path)
    assert code == 0


@pytest.mark.parametrize("objective", ["flow_matching", "hybrid"])
def test_flow_matching_objectives_and_reflow_train(objective: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    keys = ["device=cuda", "trainer.steps=40", "trainer.val_every=20", "data.n_test=100"]
    config = compose_defaults([f"objective={objective}", *keys, "objective.coupling=optimal"])
    again = compose_defaults(["objective=rectified", *keys, f"from={tmp_path / 'first'}", "objective.pairs=1000"])
    # the command makes this change when it composes the config
    again["model"] = config["model"]
    with messages():
        assert train(config, tmp_path / "first")[1] == 0
        assert train(again, tmp_path / "second")[1] == 0
    x = build_data(config).test
    torch.testing.assert_close(
        load(tmp_path / "second", "cuda").log_prob(x).cpu(), load(tmp_path / "second").log_prob(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("model", ["affine", "realnvp", "ffjord"])
def test_evaluation_matches_the_cpu(model: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    config = compose_defaults([f"model={model}", "device=cuda", "trainer.steps=5", "data.n_test=300"])
    with messages():
        train(config, tmp_path)
    data = build_data(config)
    found, expected = (evaluate(load(tmp_path, device), data, other=("val", data.val)) for device in ("cuda", "cpu"))
    assert found.device.startswith("cuda")
    assert found.nll == pytest.approx(expected.nll, abs=1e-4)
    assert found.ood is not None
    assert expected.ood is not None
    assert found.ood.auroc == pytest.approx(expected.ood.auroc, abs=1e-3)
    assert [(check.name, check.passed) for check in found.checks] == [(c.name, c.passed) for c in expected.checks]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_fit_scores_as_on_the_cpu(case: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    flow = fitted(case, "cuda")
    flow.save(tmp_path / "flow.pt")
    x, context = rows_of(case)
    found = flow.log_prob(x, context)
    if not flow.integer_valued and not any(CASES[case][1].get(key) for key in TYPES):
        # the noise of integer columns differs between devices
        np.testing.assert_allclose(
            found, flowtrain.load(tmp_path / "flow.pt").log_prob(x, context), rtol=1e-3, atol=0.01
        )
    assert np.isfinite(found).all()
    assert np.isfinite(flow.sample(3, context=None if context is None else context[:3])).all()


def test_fit_and_evaluate_leave_gpu_rng_and_settings_unchanged() -> None:
    torch.cuda.manual_seed_all(3)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        x = torch.randn(200, 2, device="cuda")
        state = torch.cuda.get_rng_state_all()
        flow = flowtrain.fit(x, model="realnvp", steps=5, device="cuda", progress=False)
        found = flowtrain.evaluate(flow, x, trained_on=x)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert all(torch.equal(a, b) for a, b in zip(state, torch.cuda.get_rng_state_all(), strict=True))
    assert found.device.startswith("cuda")
    log_p = flow.log_prob(x.cpu().numpy())
    assert log_p.dtype == np.float32
    np.testing.assert_allclose(log_p, flow.log_prob(x).detach().cpu().numpy(), rtol=1e-4, atol=1e-4)


def test_figures_and_animations_of_a_gpu_flow_are_drawn(tmp_path: Path) -> None:
    """Pictures evaluate functions on CPU grids for a flow on the GPU."""
    torch.set_default_dtype(torch.float32)
    config = compose_defaults(["device=cuda", "trainer.steps=5", "data.n_test=200", "solver.rtol=1e-3"])
    with messages():
        assert train(config, tmp_path)[1] == 0
    assert {p.stem for p in (tmp_path / "plots").iterdir()} >= {"transport", "paths", "samples", "curves"}
    data = build_data(config)
    animate(load(tmp_path, "cuda"), data, [tmp_path / "a.gif"], "", n=20)
    assert (tmp_path / "a.gif").stat().st_size > 1000
