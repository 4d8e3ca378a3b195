"""Evaluations of the velocity that remember enough for their vector-Jacobian products."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor], Tensor]


class Tape(Protocol):
    """The stages of one step: evaluations at times fixed beforehand, without a graph around them."""

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """v(t_i, x) for x (B, *event)."""
        ...

    def pull(self, i: int, cotangent: Tensor) -> Tensor:
        """cotangent^T dv/dx at stage i, (B, *event); the share of the parameters is kept for `gradients`."""
        ...


class Recorder(Protocol):
    """Makes tapes of one velocity. A field that knows a faster way than autograd brings its own."""

    def record(self, times: Tensor, keep: bool) -> Tape:
        """A tape for stages at `times` (s,); with keep=False its stages cannot be pulled."""
        ...

    def gradients(self, tapes: Sequence[Tape]) -> list[Tensor | None]:
        """What the pulls so far sum to, for each of the parameters."""
        ...


def add(totals: list[Tensor | None], shares: Sequence[Tensor | None]) -> None:
    """Adds what there is, in place of the list's entries."""
    for j, share in enumerate(shares):
        so_far = totals[j]
        if share is not None:
            totals[j] = share if so_far is None else so_far + share


class AutogradTape:
    """Any velocity: a small autograd graph for each stage."""

    def __init__(self, velocity: Velocity, parameters: Sequence[nn.Parameter], times: Tensor, keep: bool) -> None:
        self.field, self.parameters, self.times, self.keep = velocity, parameters, times, keep
        self.stages: dict[int, tuple[Tensor, Tensor]] = {}
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def velocity(self, i: int, x: Tensor) -> Tensor:
        if not self.keep:
            return self.field(self.times[i], x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = self.field(self.times[i], x)
        self.stages[i] = x, v
        return v.detach()

    def pull(self, i: int, cotangent: Tensor) -> Tensor:
        x, v = self.stages[i]
        if not v.requires_grad:
            return torch.zeros_like(x)
        # retained, because a Jacobian is computed by pulling back through one solve many times
        dx, *shares = torch.autograd.grad(v, (x, *self.parameters), cotangent, retain_graph=True, allow_unused=True)
        add(self.sums, shares)
        return torch.zeros_like(x) if dx is None else dx


class AutogradRecorder:
    """Tapes of any velocity (t scalar, x) -> v, differentiated by autograd."""

    def __init__(self, velocity: Velocity, parameters: Sequence[nn.Parameter]) -> None:
        self.field = velocity
        self.parameters = parameters
        self.trained = [p for p in parameters if p.requires_grad]

    def record(self, times: Tensor, keep: bool) -> AutogradTape:
        return AutogradTape(self.field, self.trained, times, keep)

    def gradients(self, tapes: Sequence[Tape]) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * len(self.trained)
        for tape in tapes:
            assert isinstance(tape, AutogradTape)
            add(total, tape.sums)
            tape.sums = [None] * len(self.trained)
        sums = iter(total)
        return [next(sums) if p.requires_grad else None for p in self.parameters]
