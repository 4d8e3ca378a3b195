"""Runge-Kutta stages whose evaluations of the velocity can be differentiated in reverse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flowtrain.ode.tableaus import Tableau

Velocity = Callable[[Tensor, Tensor], Tensor]


class Tape(Protocol):
    """The stages of one step: evaluations of a velocity at fixed times, without an outer autograd graph."""

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """Returns v(t_i, x) for x (B, *event)."""
        ...

    def vjp(self, i: int, cotangent: Tensor) -> Tensor:
        """Returns cotangent^T dv/dx at stage i, (B, *event). The vjp of the parameters is added up for `gradients`."""
        ...


class Recorder(Protocol):
    """Makes tapes of one velocity. A field with hand-written derivatives has a recorder that replaces autograd.

    Attributes:
        parameters: the tensors that get `gradients`. The list is complete after the first stage with keep=True.
    """

    parameters: list[Tensor]

    def record(self, times: Tensor, keep: bool) -> Tape:
        """Returns a tape for stages at `times` (s,). With keep=False its stages have no vjp."""
        ...

    def gradients(self, tapes: Sequence[Tape]) -> list[Tensor | None]:
        """Returns the sum of the vjps of the tapes for each of `parameters`, or None, and resets the sums."""
        ...


def add(totals: list[Tensor | None], shares: Sequence[Tensor | None]) -> None:
    """Adds `shares` to the entries of `totals`. None counts as 0."""
    for j, share in enumerate(shares):
        so_far = totals[j]
        if share is not None:
            totals[j] = share if so_far is None else so_far + share


class AutogradTape:
    """A tape of any velocity, with one small autograd graph for each stage."""

    def __init__(self, recorder: "AutogradRecorder", times: Tensor, keep: bool) -> None:
        self.recorder, self.times, self.keep = recorder, times, keep
        self.stages: dict[int, tuple[Tensor, Tensor]] = {}
        self.sums: list[Tensor | None] = []

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """Returns v(t_i, x) for x (B, *event). With keep=True its graph is kept for `vjp`."""
        field = self.recorder.field
        if not self.keep:
            return field(self.times[i], x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = field(self.times[i], x)
        self.recorder.discover(v, x)
        self.stages[i] = x, v
        return v.detach()

    def vjp(self, i: int, cotangent: Tensor) -> Tensor:
        """Returns cotangent^T dv/dx at stage i, (B, *event). It is zero if v does not depend on x."""
        x, v = self.stages[i]
        if not v.requires_grad:
            return torch.zeros_like(x)
        trained = self.recorder.trained
        self.sums += [None] * (len(trained) - len(self.sums))
        # the graph is retained, because a Jacobian needs many vjps through one solve
        dx, *shares = torch.autograd.grad(v, (x, *trained), cotangent, retain_graph=True, allow_unused=True)
        add(self.sums, shares)
        return torch.zeros_like(x) if dx is None else dx


class AutogradRecorder:
    """Tapes of any velocity (t scalar, x) -> v, differentiated by autograd.

    The velocity may use tensors that are not in `parameters`, such as the encoding of a condition. They are found in
    the autograd graph of the first stage.
    """

    def __init__(self, field: Velocity, parameters: Sequence[Tensor]) -> None:
        self.field = field
        self.parameters = list(parameters)
        self.discovered = False

    @property
    def trained(self) -> list[Tensor]:
        """The parameters with requires_grad."""
        return [p for p in self.parameters if p.requires_grad]

    def discover(self, v: Tensor, x: Tensor) -> None:
        """Adds the leaf tensors in the graph of v, except x, to the parameters. Only the first call does this."""
        if self.discovered:
            return
        self.discovered = True
        known = {id(p) for p in (x, *self.parameters)}
        self.parameters += [leaf for leaf in graph_leaves(v) if id(leaf) not in known]

    def record(self, times: Tensor, keep: bool) -> AutogradTape:
        """Returns a tape for stages at `times` (s,)."""
        return AutogradTape(self, times, keep)

    def gradients(self, tapes: Sequence[Tape]) -> list[Tensor | None]:
        """Returns the sum of the vjps for each parameter, or None without requires_grad, and resets the sums."""
        total: list[Tensor | None] = [None] * len(self.trained)
        for tape in tapes:
            assert isinstance(tape, AutogradTape)
            add(total, tape.sums)
            tape.sums = []
        sums = iter(total)
        return [next(sums) if p.requires_grad else None for p in self.parameters]


def graph_leaves(v: Tensor) -> list[Tensor]:
    """Returns the leaf tensors in the autograd graph of v."""
    found: dict[int, Tensor] = {}
    seen: set[object] = set()
    ahead = [v.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        ahead += [following for following, _ in node.next_functions]
    return list(found.values())


@dataclass(frozen=True)
class Stage:
    """One evaluation on a tape."""

    tape: Tape
    i: int

    def velocity(self, x: Tensor) -> Tensor:
        """Returns v at x, both (B, *event)."""
        return self.tape.velocity(self.i, x)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Returns cotangent^T dv/dx, (B, *event); see `Tape.vjp`."""
        return self.tape.vjp(self.i, cotangent)


class Weights:
    """The coefficients a (stages, stages), b and e (stages,) of a tableau, with the device and dtype of a state."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        n = len(tableau.b)
        rows = [(), *tableau.a, tableau.b, tableau.e or ()]
        matrix = on_device([[*row, *(0.0,) * (n - len(row))] for row in rows], like)
        self.a, self.b, self.e = matrix[:n], matrix[n], matrix[n + 1]


def on_device(values: Sequence[object] | np.ndarray | Tensor, like: Tensor) -> Tensor:
    """Copies numbers from the host to the device and dtype of `like`, without waiting for the device.

    Tensors are returned as they are.
    """
    if isinstance(values, Tensor):
        return values
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def record(recorder: Recorder, times: Sequence[float] | Tensor, like: Tensor, keep: bool) -> list[Stage]:
    """Returns stages at `times`, all on one tape."""
    tape = recorder.record(on_device(times, like), keep)
    return [Stage(tape, i) for i in range(len(times))]


def compute_stages(
    x: Tensor, h: float | Tensor, weights: Weights, first: Tensor, velocity: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Computes the points x_i = x + h sum_(j<i) a_ij k_j and the slopes k_i = velocity(i, x_i), (stages, B, *event).

    Args:
        first: k_0, which is known from the previous step or from a rejected attempt.
    """
    n = len(weights.b)
    slopes = x.new_empty(n, *x.shape)
    slopes[0] = first
    scaled, flat = h * weights.a, slopes.flatten(1)
    points = [x]
    for i in range(1, n):
        points.append(x + (scaled[i, :i] @ flat[:i]).view_as(x))
        slopes[i] = velocity(i, points[i])
    return points, slopes


def compute_stages_functional(
    x: Tensor, h: float | Tensor, weights: Weights, first: Tensor, velocity: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Computes the same as `compute_stages` without in-place writes, which autograd and vmap do not allow."""
    points, slopes = [x], [first]
    for i in range(1, len(weights.b)):
        points.append(x + weighted_sum(h * weights.a[i, :i], torch.stack(slopes)))
        slopes.append(velocity(i, points[i]))
    return points, torch.stack(slopes)


def weighted_sum(weights: Tensor, slopes: Tensor) -> Tensor:
    """Returns sum_i w_i k_i: (B, *event) for w (stages,), and (n, B, *event) for w (n, stages)."""
    return (weights @ slopes.flatten(1)).view(*weights.shape[:-1], *slopes.shape[1:])
