"""The exact gradient of a discrete solution: the accepted steps in reverse, with constant step sizes.

A step is

    x1 = x + h sum_i b_i k_i,    k_i = v(t_i, x_i),    x_i = x + h sum_j a_ij k_j.

The path integrals use the nodes y_n = x + h sum_j r_nj k_j of the step. Let l be the cotangent of x1 and g_n the
cotangent of y_n. The cotangents c_i of k_i are computed from the last stage to the first (Hager 2000, Runge-Kutta
methods in optimal control; Sanz-Serna 2016, Symplectic Runge-Kutta schemes for adjoint equations):

    c_i = h (b_i l + sum_n r_ni g_n + sum_(j>i) a_ji p_j),    p_i = c_i^T dv/dx(t_i, x_i),
    dL/dx = l + sum_n g_n + sum_i p_i,                        dL/dtheta = sum_i c_i^T dv/dtheta(t_i, x_i).

Each stage needs one vector-Jacobian product, and no ODE is solved backwards. With gradient=replay only the stages of
the last step are kept. The stages of the other steps are recomputed, one step at a time. Replay needs memory for the
activations of one step and, for every step, for the initial state, the first slope and the nodes, each of the size of
x.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.ode.quadrature import Nodes
from flowtrain.ode.solver import Statistics
from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import Recorder, Stage, Tape, Weights, add, compute_stages, on_device, record, weighted_sum
from flowtrain.utils.autograd import first_derivative
from flowtrain.utils.precision import full_precision


@dataclass
class AcceptedStep:
    """An accepted step of size h from x at time t.

    Attributes:
        slopes: k_i, (stages, B, *event). For a replay, only the first slope is kept.
        stages: the recorded stages, or None if they must be recomputed.
    """

    t: float
    h: float | Tensor
    x: Tensor
    slopes: Tensor
    stages: list[Stage] | None


class AcceptedSteps:
    """The accepted steps of one solve, with their vector-Jacobian product.

    Attributes:
        x1: the state at the end, (B, *event).
        rows: r_nj of each step, (nodes of the step, stages).
        replay: whether stages are recomputed in the backward pass.
    """

    def __init__(
        self,
        recorder: Recorder,
        tableau: Tableau,
        weights: Weights,
        steps: list[AcceptedStep],
        x1: Tensor,
        nodes: Nodes | None,
        statistics: Statistics,
        replay: bool,
    ) -> None:
        self.replay = replay
        self.recorder, self.tableau, self.weights = recorder, tableau, weights
        self.steps, self.x1, self.statistics = steps, x1, statistics
        rows = nodes.rows if nodes is not None else [np.zeros((0, len(tableau.b)))] * len(steps)
        self.rows = [on_device(each, x1) for each in rows]
        self.last_used = nodes.last_used if nodes is not None else [False] * len(steps)

    def points(self) -> Tensor:
        """Returns x at the nodes, (nodes, B, *event). Call this before `forget_slopes`, because it needs all slopes."""
        counts = [len(rows) for rows in self.rows]
        # the tensor is filled in place, because torch.cat would need memory for all nodes twice
        found = self.x1.new_empty(sum(counts), *self.x1.shape)
        for s, rows, part in zip(self.steps, self.rows, torch.split(found, counts), strict=True):
            part.copy_(s.x + weighted_sum(s.h * rows, s.slopes))
        return found

    def forget_slopes(self) -> None:
        """Frees all slopes except the first of each step, if steps are replayed."""
        if self.replay:
            for s in self.steps:
                # the slope is cloned, because a view would keep the memory of all slopes
                s.slopes = s.slopes[:1].clone()

    def vjp(self, at_end: Tensor, at_nodes: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Returns the cotangents of x at the start, (B, *event), and of the parameters.

        Args:
            at_end: cotangent of x1, (B, *event).
            at_nodes: cotangent of `points`, (nodes, B, *event).
        """
        gradients: list[Tensor | None] = [None] * len(self.recorder.parameters)
        by_step = torch.split(at_nodes, [len(rows) for rows in self.rows])
        at_first: Tensor | None = None
        tapes: dict[int, Tape] = {}
        for k in reversed(range(len(self.steps))):
            stages = self.steps[k].stages or self.recompute(k)
            at_end, at_first = self.vjp_step(k, stages, at_end, by_step[k], at_first)
            tapes |= {id(s.tape): s.tape for s in stages}
            if self.replay or k == 0:
                add(gradients, self.recorder.gradients(list(tapes.values())))
                tapes = {}
            if self.replay:
                self.steps[k].stages = None
        return at_end, gradients

    def vjp_step(
        self, k: int, stages: list[Stage], at_end: Tensor, at_nodes: Tensor, at_last: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Differentiates step k: returns the cotangents of its initial state and of its first slope.

        The second is None if the previous step does not share this slope.

        Args:
            k: index of the step.
            stages: the recorded stages of the step.
            at_end: cotangent of the state at the end of the step, (B, *event).
            at_nodes: cotangents of the nodes of the step, (nodes of the step, B, *event).
            at_last: cotangent of the last slope as the first slope of the following step, or None.
        """
        h, same, last = self.steps[k].h, self.tableau.first_same_as_last, len(stages) - 1
        a = h * self.weights.a
        c = weighted_sum((h * self.rows[k]).T, at_nodes)
        start = at_nodes.sum(0)
        if at_last is not None:
            c[last] += at_last
        if not same:
            c += outer(h * self.weights.b, at_end)
            start += at_end
        for i in reversed(range(1, last + 1)):
            # the last stage of a first-same-as-last method is evaluated at x1; skip its vjp if its slope is unused
            idle = same and i == last and at_last is None and not self.last_used[k]
            at_stage = torch.zeros_like(at_end) if idle else stages[i].vjp(c[i])
            if same and i == last:
                at_stage = at_stage + at_end
            start += at_stage
            c[:i] += outer(a[i, :i], at_stage)
        if self.owns_first(k):
            return start + stages[0].vjp(c[0]), None
        return start, c[0]

    def owns_first(self, k: int) -> bool:
        """Whether the first slope of step k was computed in step k, and is not the last slope of step k - 1."""
        return k == 0 or not self.tableau.first_same_as_last

    def recompute(self, k: int) -> list[Stage]:
        """Recomputes the stages of step k, except a first slope that is the last slope of the previous step."""
        step, owns_first = self.steps[k], self.owns_first(k)
        times = [step.t + c * float(step.h) for c in self.tableau.c]
        stages = record(self.recorder, times, step.x, keep=True)
        first = stages[0].velocity(step.x) if owns_first else step.slopes[0]
        compute_stages(step.x, step.h, self.weights, first, lambda i, x: stages[i].velocity(x))
        self.statistics.nfe_backward += len(times) - (not owns_first)
        return stages


def outer(weights: Tensor, x: Tensor) -> Tensor:
    """Returns w_i x, (n, *x.shape)."""
    return weights.view(-1, *(1,) * x.dim()) * x


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, accepted: AcceptedSteps, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.accepted = accepted
        # the parameters are saved, so that torch raises an error in backward if they were changed in place
        ctx.save_for_backward(x, *parameters)
        return accepted.x1.clone(), accepted.points()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_end: Tensor, at_nodes: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        with full_precision(at_end.device):
            x, parameters = ctx.accepted.vjp(at_end, at_nodes)
        return None, x, *parameters


def differentiable(accepted: AcceptedSteps, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x1, x at the nodes), differentiable with respect to the initial state x and the parameters."""
    x1, points = _Differentiable.apply(accepted, x, *accepted.recorder.parameters)  # type: ignore[no-untyped-call]
    return x1, points
