"""The weighted forward KL: gradient of the loss, corrections, exact resume, rewinds, and failures of the annealing."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flows import VECTORS, flow_of
from helpers.processes import FORWARD_KL, trainer
from torch import Tensor

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Samples
from flowtrain.data.targets.base import FunctionTarget
from flowtrain.flow import Flow
from flowtrain.objectives.weighted_forward_kl import WeightedForwardKL
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import CheckpointError, ConfigError, NonFiniteError, SolverError

MEAN, SD = 1.0, 0.7


def gaussian(x: Tensor) -> Tensor:
    return -0.5 * ((x - MEAN) / SD).square().sum(1)


def flow_in_float64(name: str = "affine") -> Flow:
    torch.manual_seed(0)
    return flow_of(VECTORS[name], Samples((2,)), ["solver.rtol=1e-9", "solver.train_rtol=1e-9"]).double()


def objective_of(flow: Flow, log_density: Any = gaussian, batch_size: int = 32, **settings: Any) -> WeightedForwardKL:
    small = {"intermediate": 2, "leapfrog": 3, "step_size": 0.3, "buffer_min": 100, "chains": 100, "buffer_size": 500}
    small |= {"transition": "hmc", "updates": 4}
    target = FunctionTarget(log_density, 2)
    return WeightedForwardKL(flow, Regularizer(), target, batch_size, **{**small, **settings}).train()


@pytest.mark.parametrize("name", ["nsf", "realnvp", "ffjord"])
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    """The corrections are constants in the gradient."""
    flow = flow_in_float64(name)
    objective = objective_of(flow, clip=1.5, intermediate=1, leapfrog=1)
    objective.begin(0)
    # log q in the buffer belongs to another flow, so the corrections are not 1
    objective.buffer.log_q += 0.5 * torch.randn_like(objective.buffer.log_q)
    objective.begin(1)
    x, old = objective.buffer.x[objective.rows].double(), objective.buffer.log_q[objective.rows].double()
    loss, terms = objective(torch.zeros(32, 2))
    parts = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in parts])
    flow.train()
    with torch.no_grad():
        correction = (old - flow.density_pass(x).log_p).exp().clamp(max=1.5)
    assert 0 < (correction == 1.5).double().mean() < 1
    torch.testing.assert_close(loss, -(correction * flow.density_pass(x).log_p).mean())
    torch.testing.assert_close(terms["cross_entropy"], loss)
    direction, values, h = torch.randn_like(gradient), [], 1e-5
    for sign in (1, -1):
        moved = deepcopy(flow)
        start = torch.nn.utils.parameters_to_vector(flow.parameters())
        torch.nn.utils.vector_to_parameters(start + sign * h * direction, moved.parameters())
        values.append(-(correction * moved.density_pass(x).log_p).mean().item())
    torch.testing.assert_close((gradient @ direction).item(), (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("transition", ["hmc", "metropolis"])
def test_gradient_equals_the_gradient_of_the_divergence(alpha: float, transition: str) -> None:
    """For q = N(0, I), g = p^alpha q^(1 - alpha) is Gaussian. The gradient of -E_g[log q] at the mean of q is -E_g[x],
    and at the logarithm of its standard deviation 1 - E_g[x^2]."""
    shift = torch.zeros(4, requires_grad=True)
    flow = Flow((2,), Standardize((2,), False, ())).double()
    flow.bijection.fit(torch.zeros(2), torch.ones(2), None)
    settings = {"chains": 20_000, "buffer_size": 20_000, "buffer_min": 20_000, "batch_size": 100, "updates": 99}
    objective = objective_of(flow, alpha=alpha, transition=transition, seed=3, **settings)
    density_pass = flow.density_pass

    def moved(x: Tensor, *rest: Any, **options: Any) -> Any:
        found = density_pass((x - shift[:2]) * (-shift[2:]).exp(), *rest, **options)
        return found._replace(log_p=found.log_p - shift[2:].sum())

    torch.testing.assert_close(flow.log_prob(torch.zeros(1, 2)).item(), -math.log(2 * math.pi))
    objective.begin(0)
    flow.density_pass = moved  # type: ignore[method-assign]
    found = torch.zeros(4)
    for step in range(1, 21):
        objective.begin(step)
        found += torch.autograd.grad(objective(torch.zeros(100, 2))[0], shift)[0] / 20
    precision = (1 - alpha) + alpha / SD**2
    mean, variance = alpha * MEAN / SD**2 / precision, 1 / precision
    expected = torch.tensor([-mean, -mean, 1 - variance - mean**2, 1 - variance - mean**2])
    # standard errors over 2000 rows, and over the samples with their effective sample size
    n = 1 / (1 / 2000 + 1 / (20_000 * objective.ais_ess.item()))
    spread = torch.tensor([variance**0.5] * 2 + [(2 * variance**2 + 4 * variance * mean**2) ** 0.5] * 2)
    assert bool(((found - expected).abs() < 5 * spread / math.sqrt(n)).all())


def test_weights_belong_to_the_flow_of_the_last_step() -> None:
    flow = flow_in_float64()
    objective = objective_of(flow)
    objective.begin(0)
    rows, before = objective.rows, objective.buffer.state()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    # the batch of a step may come in parts
    for n in (20, 12):
        objective(torch.zeros(n, 2))
    assert torch.equal(objective.buffer.log_w, before["log_w"])
    after = objective.state()
    log_q = flow.log_prob(objective.buffer.x.double()).float()
    expected = before["log_w"] + before["log_q"] - log_q
    torch.testing.assert_close(after["log_w"][rows], expected[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["log_q"][rows], log_q[rows], rtol=1e-4, atol=1e-5)
    others = torch.ones(len(log_q), dtype=torch.bool)
    others[rows] = False
    assert bool(others.any())
    assert torch.equal(after["log_w"][others], before["log_w"][others])
    # a second call corrects nothing
    assert all(torch.equal(after[key], value) for key, value in objective.state().items() if isinstance(value, Tensor))


def test_annealing_runs_at_the_given_steps() -> None:
    objective = objective_of(flow_in_float64(), updates=3, buffer_min=250)
    sizes = []
    for step in range(7):
        objective.begin(step)
        sizes.append(len(objective.buffer))
    assert sizes == [300, 300, 300, 400, 400, 400, 500]


def test_guard_checks_rows_of_the_buffer() -> None:
    objective = objective_of(flow_in_float64())
    objective.begin(0)
    rows = objective.rows_to_check(torch.full((5, 2), math.nan))
    assert rows.shape == (5, 2)
    assert bool((rows[:, None] == objective.buffer.x.double()).all(2).any(1).all())


def test_dropout_is_off_in_the_annealing() -> None:
    torch.manual_seed(0)
    flow = flow_of([*VECTORS["nsf"], "model.dropout=0.5"], Samples((2,)), []).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    objective = objective_of(flow)
    objective.begin(0)
    assert flow.training
    log_q = flow.eval().log_prob(objective.buffer.x.double()).float()
    torch.testing.assert_close(objective.buffer.log_q, log_q, rtol=1e-3, atol=1e-3)


def test_samples_without_a_density_are_dropped() -> None:
    def half(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] < 0, math.nan, gaussian(x))

    objective = objective_of(flow_in_float64(), half)
    objective.begin(0)
    assert 100 <= len(objective.buffer) < 200
    assert bool((objective.buffer.x[:, 0] >= 0).all())
    nowhere = objective_of(flow_in_float64(), lambda x: gaussian(x) * math.nan)
    with pytest.raises(NonFiniteError, match=r"target\.scale"):
        nowhere.begin(0)
    few = objective_of(flow_in_float64(), lambda x: torch.where(x[:, 0] < 1.0, math.nan, gaussian(x)), buffer_min=500)
    with pytest.raises(NonFiniteError, match=r"buffer_min|target\.scale"):
        few.begin(0)


# Runs


def fitted(run_dir: Path, stop_at: Callable[..., None] | None = None, stop: int | None = None, *keys: str) -> Trainer:
    last = run_dir / "checkpoints/last.pt"
    run = trainer(run_dir, *FORWARD_KL, *keys, saved=checkpoint.load(last) if last.exists() else None)
    if stop and stop_at is not None:
        stop_at(run, stop)
    run.fit()
    return run


def assert_equal_states(run: Trainer, again: Trainer) -> None:
    for key, value in run.flow.state_dict().items():
        assert torch.equal(value, again.flow.state_dict()[key]), key
    left, right = run.objective.state(), again.objective.state()
    assert left is not None
    assert right is not None
    for key, value in left.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_bitwise_exact(dtype: torch.dtype, tmp_path: Path, stop_at: Callable[..., None]) -> None:
    """The annealing runs every 4 steps, so the run is stopped before, at and after such a step."""
    torch.set_default_dtype(dtype)
    whole = fitted(tmp_path / "whole")
    assert len(whole.objective.buffer) == 300  # type: ignore[union-attr, arg-type]
    for stop in (3, 4, 5, 9):
        fitted(tmp_path / str(stop), stop_at, stop)
        assert checkpoint.load(tmp_path / str(stop) / "checkpoints/last.pt")["step"] == stop
        assert_equal_states(whole, fitted(tmp_path / str(stop)))


def test_rewind_restores_the_buffer(tmp_path: Path) -> None:
    run = trainer(tmp_path, *FORWARD_KL, "trainer.on_nonfinite=rewind")
    objective = run.objective
    assert isinstance(objective, WeightedForwardKL)
    add, states = objective.add_samples, []

    def failing() -> None:
        # the run of step 8 fails once, and the run is rewound to step 6
        if run.step == 8 and not states:
            states.append(objective.state())
            raise SolverError("stiff")
        if run.step == 8:
            states.append(objective.state())
        add()

    objective.add_samples = failing  # type: ignore[method-assign]
    run.fit()
    assert (run.step, run.failure_policy.rewinds) == (12, 1)
    # the annealing continues from the same samples
    assert len(states) == 2
    assert torch.equal(states[0]["x"], states[1]["x"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("step_sizes", torch.tensor([1.0, math.nan], dtype=torch.float64)), ("step_sizes", torch.tensor([1.0, 1.0])),
     ("step_sizes", torch.ones(3, dtype=torch.float64)), ("step_sizes", None), ("effective", 2.0), ("effective", "1"),
     ("x", torch.zeros(10, 3)), ("log_w", None)],
)  # fmt: skip
def test_damaged_states_are_refused(key: str, value: Any) -> None:
    objective = objective_of(flow_in_float64())
    objective.begin(0)
    state = objective.state()
    objective.load(state)
    with pytest.raises(CheckpointError):
        objective.load({**state, key: value})
    with pytest.raises(CheckpointError):
        objective.load([])  # type: ignore[arg-type]
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[k])) for k, v in objective.state().items())


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"updates": 0}, {"clip": 0.5}, {"buffer_min": 501}, {"chains": 0}, {"alpha": 0.0}):
        with pytest.raises(ConfigError, match=f"objective.{next(iter(settings))}"):
            objective_of(flow_in_float64(), **settings)
    with pytest.raises(ConfigError, match="regularizer"):
        WeightedForwardKL(flow_in_float64(), Regularizer(kinetic=0.1), FunctionTarget(gaussian, 2), 32)


@pytest.mark.slow
def test_finds_modes_that_the_flow_misses(tmp_path: Path) -> None:
    """The flow begins at N(0, I), and the modes are 8 standard deviations apart."""
    torch.set_default_dtype(torch.float32)
    keys = ["target._target_=helpers.densities.far_modes", "model=nsf", "model.layers=4", "objective.step_size=1"]
    keys += ["trainer.steps=300", "trainer.batch_size=128", "objective.chains=256", "trainer.lr=0.005"]
    run = fitted(tmp_path, None, None, *keys)
    assert run.best is not None
    x = run.flow.eval().sample(2000)
    for center in torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]]):
        assert float(((x - center).norm(dim=1) < 4).double().mean()) > 0.2
    assert abs(run.best["nll"]) < 0.5
