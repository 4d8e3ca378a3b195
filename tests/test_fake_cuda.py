"""Every model, objective and option runs on a stand-in for a CUDA device, see helpers/fake_cuda.py.

Tensors on different devices, generators of another device, and values read on the host in a training step would be
found. The values equal those of the CPU.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run
from helpers.fake_cuda import Calls, FakeCudaTensor, fake_cuda
from helpers.files import save
from helpers.small_fits import CASES, fitted, rows_of, table
from torch import nn

import flowtrain
from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import captured_solve, ode_solver
from flowtrain.training.update import Update
from flowtrain.utils.cuda_graphs import CudaRecorder


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def gpu() -> Any:
    with fake_cuda() as calls:
        yield calls


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, gpu: Calls) -> list[Counter[str]]:
    """Returns a list to which each training step adds its reads of values on the host."""
    found: list[Counter[str]] = []
    take = Update.take

    def counted(self: Update, step: int, lr: float) -> Any:
        before = Counter(gpu.reads)
        result = take(self, step, lr)
        found.append(gpu.reads - before)
        return result

    monkeypatch.setattr(Update, "take", counted)
    return found


# cases whose code other cases run too
SLOW = ("realnvp", "realnvp-tf32", "nsf", "nsf-types", "ffjord", "ffjord-hybrid", "mixture")


def fast(names: Iterable[Any], *slow: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("case", fast(CASES, *SLOW))
@pytest.mark.filterwarnings("ignore")
def test_a_fit_equals_that_of_the_cpu(case: str, steps: list[Counter[str]], tmp_path: Path) -> None:
    flow = fitted(case, "cuda")
    assert all(isinstance(value, FakeCudaTensor) for value in flow.state_dict().values())
    # the loss and the norm of the gradient are read once, and the error of each step of an ODE
    for reads in steps[1:]:
        allowed = {name for name in reads if "autograd.py" in name or "adam.py" in name or "runge_kutta.py" in name}
        assert sum(n for name, n in reads.items() if name not in allowed) <= 1, reads
    flow.save(tmp_path / "flow.pt")
    on_cpu = flowtrain.load(tmp_path / "flow.pt")
    again = flowtrain.load(tmp_path / "flow.pt", device="cuda")
    assert not any(isinstance(value, FakeCudaTensor) for value in on_cpu.state_dict().values())
    x, context = rows_of(case)
    # the noise of integer columns
    torch.manual_seed(0)
    expected = on_cpu.log_prob(x, context)
    for one in (flow, again):
        torch.manual_seed(0)
        np.testing.assert_allclose(one.log_prob(x, context), expected, rtol=1e-4, atol=1e-4)
    assert flow.log_prob(torch.as_tensor(x), context).device.type == "cuda"
    assert len(flow.sample(3, context=None if context is None else context[:3])) == 3


@pytest.mark.parametrize("model", fast(["glow", "realnvp", "ffjord"], "ffjord"))
@pytest.mark.filterwarnings("ignore")
def test_images_are_scored_in_full_precision(model: str, gpu: Calls) -> None:
    """By default, a GPU computes convolutions in TF32."""
    precision = "bfloat16" if model == "glow" else "float32"
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4))
    keys = {"model.hidden": [4], "model.scales": 1, "trainer.batch_size": 16, "trainer.precision": precision}
    keys |= {"recipe": "none", "model.steps": 1} if model == "glow" else {"recipe": "none"}
    flow = flowtrain.fit(x, model=model, levels=256, steps=2, device="cuda", progress=False, overrides=keys)
    gpu.clear()
    flow.log_prob(x[:8])
    flow.sample(2)
    assert any("convolution" in name for name in gpu.kernels)
    assert not gpu.tf32


TARGET = ["data=target", "data.n_val=50", "data.n_test=100", "recipe=none", "model=nsf", "model.layers=2"]
TARGET += ["model.hidden=[8]", "model.bins=4"]
ANNEALING = ["objective=weighted_forward_kl", "objective.chains=32", "objective.buffer_min=30", "objective.updates=2"]
ANNEALING += ["objective.buffer_size=100", "objective.transition=hmc"]
COMMANDS = {
    "table": ["data=array", "data.path=table.csv", "model=nsf", "model.layers=2", "model.hidden=[8]", "model.df=5"],
    "reverse_kl": [*TARGET, "target=energy1", "objective=reverse_kl"],
    "annealing": [*TARGET, "target=gaussian_mixture", *ANNEALING],
}


@pytest.mark.parametrize("name", fast(COMMANDS, "reverse_kl", "annealing"))
@pytest.mark.usefixtures("without_figures", "gpu")
@pytest.mark.filterwarnings("ignore")
def test_commands_run(name: str, run: Run) -> None:
    save(Path("table.csv"), table(80), ["a", "b", "c", "d"])
    few = ["trainer.steps=4", "trainer.val_every=2", "trainer.batch_size=16", "device=cuda", "name=first"]
    for command, *arguments in (
        ["flowtrain", *COMMANDS[name], *few],
        ["flowtrain", "resume=outputs/first", "trainer.steps=6"],
        ["floweval", "outputs/first", "device=cuda"],
        ["flowsample", "outputs/first", "device=cuda", "n=10"],
    ):
        code, _, err = run(command, *arguments)
        assert code == 0, err
    assert json.loads(Path("outputs/first/eval.json").read_text())["device"].startswith("cuda")


def test_captured_solves_copy_nothing_between_devices(gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_solve, "BEFORE_CAPTURE", 1)
    torch.manual_seed(0)
    field = MLPField(2, [8, 8])
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    found: list[torch.Tensor] = []
    for graphs in (True, False):
        flow = Continuous(copy.deepcopy(field), ode_solver("dopri5", rtol=1e-4, cuda_graphs=graphs), TraceRule())
        flow.to("cuda")
        for step in range(3):
            x = torch.randn(20, 2, generator=torch.Generator().manual_seed(step)).to("cuda")
            gpu.clear()
            z, log_det = flow.inverse(x)
            (z.square().sum(1) / 2 - log_det).mean().backward()
            if graphs and step:
                assert sum(gpu.reads.values()) == 1, gpu.reads
        found += [p.grad.cpu() for p in flow.parameters() if p.grad is not None]
        assert graphs == bool(flow.graphs.calls)
    for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        assert torch.equal(a, b)


def test_what_a_gpu_refuses_is_refused(gpu: Calls) -> None:
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    for refused in (
        lambda: x + y,
        lambda: torch.cat([x, y]),
        lambda: torch.stack([x.sum(), y.sum()]),
        lambda: torch.where(x > 0, x, y),
        lambda: x.index_add(0, torch.tensor([0]), x[:1]),
        lambda: y.add_(x.sum()),
        lambda: x.expand(3, 3) @ y,
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.randn(3, generator=torch.Generator("cuda")),
    ):
        with pytest.raises(RuntimeError, match="device"):
            refused()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    # a scalar on the CPU and indices on the CPU are allowed
    assert (x + y.sum()).device.type == x[torch.tensor([0])].device.type == "cuda"
    assert not gpu.reads
    gpu.clear()
    assert bool((x == 1).all())
    x[x > 0].tolist()
    assert gpu.reads.total() == 3


def test_random_numbers_of_the_device_have_their_own_state(gpu: Calls) -> None:
    torch.manual_seed(0)
    first = torch.randn(3, device="cuda").tolist()
    torch.rand(5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.randn(3, device="cuda").tolist() == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("gpu")
def test_work_without_graphs_continues_after_a_failed_capture() -> None:
    recorder, stream = CudaRecorder(torch.device("cuda", 0)), torch.cuda.current_stream()
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="capture"), recorder.record():
        x.sum().item()
    assert torch.cuda.current_stream() is stream
    assert len(torch.randn(3, device="cuda").unique()) == 3
