"""One training step by different engines on the same field: solve x to z, NLL, gradient in the parameters.

A step is a function without arguments that returns a `Step`. Timing is done by `common.interleave`.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from common import interleave, median_and_spread, progress, table
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import Probes, TraceRule, rademacher
from flowtrain.ode import ode_solver, record_solves
from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.precision import full_precision


class Skip(Exception):  # noqa: N818
    """The reason why an engine cannot be measured here."""


@dataclass(frozen=True)
class Problem:
    """The input of every engine: x (B, *event), and noise of its shape, or None for the exact trace.

    `before` is the batch of the previous training step. flowtrain plans the steps of a solve from the previous solve.
    """

    field: nn.Module
    x: Tensor
    noise: Tensor | None
    before: Tensor
    solver: dict[str, Any] = field(default_factory=lambda: {"method": "dopri5", "rtol": 1e-5})

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.field.parameters())

    def to(self, where: torch.device | torch.dtype | str) -> "Problem":
        noise = None if self.noise is None else self.noise.to(where)
        return Problem(copy.deepcopy(self.field).to(where), self.x.to(where), noise, self.before.to(where), self.solver)


@dataclass(frozen=True)
class Step:
    """The NLL in nats, its gradient with respect to all parameters as one vector, and evaluations of the velocity."""

    nll: float
    gradient: Tensor
    nfe_forward: int | None = None
    nfe_backward: int | None = None


Contestant = Callable[[], Step]


def fixed_noise(x: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return rademacher(tuple(x.shape), x)


def randomize_last_layer(velocity: nn.Module, scale: float, seed: int = 0) -> None:
    """Draws the last layer, which starts at zero, from torch's default distribution, multiplied by `scale`."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in velocity.head.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
        for p in velocity.head.parameters():  # type: ignore[union-attr]
            p.mul_(scale)


def nll(z: Tensor, log_det: Tensor) -> Tensor:
    z = z.flatten(1)
    return (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi) - log_det).mean()


def gradient(loss: Tensor, problem: Problem) -> Tensor:
    found = torch.autograd.grad(loss, problem.parameters)
    return torch.cat([g.flatten() for g in found])


@dataclass(frozen=True)
class FixedTrace(TraceRule):
    """A trace rule that uses the given noise."""

    noise_given: Tensor | None = None

    def draw(self, x: Tensor, training: bool) -> Probes:
        return Probes.exact(x) if self.noise_given is None else Probes(self.noise_given.unsqueeze(0), 1.0, noisy=True)


def flowtrain_step(problem: Problem, **settings: Any) -> Contestant:
    """A step of flowtrain, with the class that its models use.

    Raises:
        Skip: this version of flowtrain lacks the setting, or has no continuous flow over this shape.
    """
    try:
        solver = ode_solver(**{**problem.solver, **settings})
    except FlowtrainError as e:
        raise Skip(str(e).splitlines()[0]) from e
    flow = Continuous(problem.field, solver, FixedTrace(noise_given=problem.noise)).train()
    plans = flow.step_plans
    for _ in range(3 if solver.adaptive else 0):
        flow.inverse(problem.before)
        plans = flow.step_plans

    def step() -> Step:
        # start from the step plans of another batch, as in training
        flow.step_plans = plans
        with record_solves() as solves:
            loss = nll(*flow.inverse(problem.x))
            found = gradient(loss, problem)
        return Step(loss.item(), found, solves[0].nfe_forward, solves[0].nfe_backward)

    # a graph is captured when the structure of its solve occurs for the second time
    for _ in range(2 if solver.cuda_graphs else 0):
        step()
    return step


class Augmented(nn.Module):
    """d(x, log p)/dt with the trace by autograd, as in FFJORD's code."""

    def __init__(self, velocity: nn.Module, noise: Tensor | None) -> None:
        super().__init__()
        self.velocity, self.noise, self.nfe = velocity, noise, 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            v = self.velocity(t, x)
            return v, self.trace(v, x)

    def trace(self, v: Tensor, x: Tensor) -> Tensor:
        if self.noise is not None:
            (ej,) = torch.autograd.grad(v, x, self.noise, create_graph=True)
            return (ej * self.noise).flatten(1).sum(1)
        columns = [torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
        return torch.stack(columns).sum(0)


def torchdiffeq_step(problem: Problem, adjoint: bool, **settings: Any) -> Contestant:
    """torchdiffeq with the trace by autograd. `adjoint` is the method of FFJORD's code and of most later codes."""
    dynamics = Augmented(problem.field, problem.noise)
    arguments = {**problem.solver, **settings}
    if "rtol" in arguments:
        arguments["atol"] = arguments["rtol"]
    if "step_size" in arguments:
        arguments["options"] = {"step_size": arguments.pop("step_size")}
    integrate = odeint_adjoint if adjoint else odeint
    x, t = problem.x, problem.x.new_tensor([1.0, 0.0])

    def step() -> Step:
        dynamics.nfe = 0
        z, log_det = integrate(dynamics, (x, x.new_zeros(len(x))), t, **arguments)
        loss = nll(z[-1], log_det[-1])
        forward = dynamics.nfe
        found = gradient(loss, problem)
        return Step(loss.item(), found, forward, dynamics.nfe - forward)

    return step


def zuko_step(problem: Problem) -> Contestant:
    """zuko's engine with its adaptive checkpoint adjoint, on our field instead of the network of zuko's CNF.

    zuko controls the largest error over the batch, where others control the RMS, and divides the error of the trace by
    100.

    Raises:
        Skip: zuko is not installed.
    """
    try:
        from zuko.transforms import FreeFormJacobianTransform
    except ImportError as e:
        raise Skip("zuko is not installed") from e
    count = 0

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        v: Tensor = problem.field(t, x)
        return v

    rtol, exact = problem.solver["rtol"], problem.noise is None
    transform = FreeFormJacobianTransform(velocity, 1.0, 0.0, problem.parameters, rtol, rtol, exact)

    def same_noise() -> AbstractContextManager[Any]:
        # zuko draws its own Gaussian noise
        return nullcontext() if exact else mock.patch("torch.randn_like", return_value=problem.noise)

    def step() -> Step:
        nonlocal count
        count = 0
        with same_noise():
            z, log_det = transform.call_and_ladj(problem.x)
        loss = nll(z, log_det)
        forward = count
        found = gradient(loss, problem)
        return Step(loss.item(), found, forward, count - forward)

    return step


def reference(problem: Problem, rows: int = 128, rtol: float = 1e-10) -> Step:
    """A reference in float64 with torchdiffeq, autograd trace, direct gradient and a tight tolerance.

    The reference shares no code with flowtrain's engine. dopri8 solves a few rows at a time to limit the memory of the
    graph, and ends its last step at t = 0.
    """
    exact = problem.to(torch.float64)
    parts = []
    for i in range(0, len(exact.x), rows):
        noise = None if exact.noise is None else exact.noise[i : i + rows]
        part = Problem(exact.field, exact.x[i : i + rows], noise, exact.before, {"method": "dopri8", "rtol": rtol})
        step = torchdiffeq_step(part, adjoint=False, options={"step_t": part.x.new_zeros(1)})()
        parts.append((len(part.x) / len(exact.x), step))
    return Step(sum(w * s.nll for w, s in parts), torch.stack([w * s.gradient for w, s in parts]).sum(0))


def synchronized(contestant: Contestant) -> Contestant:
    """Returns a step that waits until the GPU is idle."""

    def step() -> Step:
        found = contestant()
        torch.cuda.synchronize()
        return found

    return step


def relative(a: Tensor, b: Tensor) -> str:
    b = b.to(a.device)
    return f"{((a.double() - b.double()).norm() / b.double().norm()).item():.1e}"


def compare(
    makers: Mapping[str, Callable[[Problem], Contestant]],
    problem: Problem,
    true: Step,
    repeats: int,
    checked: Problem | None = None,
) -> str:
    """Returns the table of one problem. After one warm-up per engine, all engines take turns in rounds.

    Ratios are to the first engine in the same round.

    TF32 is off for all engines, as in flowtrain's solves. torch uses it by default for convolutions on a GPU.

    Args:
        true: the reference on the problem `checked`, which is smaller than `problem` if `problem` is too large.
            Gradients on the whole problem are then compared with the first engine's.
    """
    steps, first, small, skipped = {}, {}, {}, {}
    with full_precision(problem.x.device):
        for name, make in makers.items():
            progress(f"warming up {name}")
            try:
                step = synchronized(make(problem)) if problem.x.is_cuda else make(problem)
                first[name] = step()
                small[name] = first[name] if checked is None else make(checked)()
                steps[name] = step
            except (Skip, FlowtrainError) as e:
                skipped[name] = str(e).splitlines()[0]
        times = interleave(steps, repeats)
    of, base = ("", None) if checked is None else (f" ({len(checked.x)} rows)", first[next(iter(steps))])
    head = ["engine", "ms", "least to most", "ratio", "NFE forward", "backward"]
    head += [] if base is None else ["gradient difference to the first"]
    head += [f"gradient error{of}", f"NLL error{of}"]
    unit = times[next(iter(steps))]
    rows = []
    for name in steps:
        nfe = ["-" if n is None else str(n) for n in (first[name].nfe_forward, first[name].nfe_backward)]
        ratio = statistics.median(mine / its for mine, its in zip(times[name], unit, strict=True))
        row = [name, *median_and_spread(times[name]), f"{ratio:.2f}", *nfe]
        row += [] if base is None else [relative(first[name].gradient, base.gradient)]
        row += [relative(small[name].gradient, true.gradient), f"{abs(small[name].nll - true.nll):.1e}"]
        rows.append(row)
    return table(head, rows) + "".join(f"\nskipped: {name}: {reason}" for name, reason in skipped.items())
