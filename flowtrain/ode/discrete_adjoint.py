"""The exact gradient of a discrete solution: the accepted steps in reverse, their sizes held constant.

For a step x1 = x + h sum_i b_i k_i with k_i = v(t_i, x_i), x_i = x + h sum_j a_ij k_j, and cotangents l of x1 and g_n
of the nodes y_n = x + h sum_j r_nj k_j that the path integrals take from it, the cotangents c_i of k_i are found last
stage first (Hager 2000, Runge-Kutta methods in optimal control; Sanz-Serna 2016, Symplectic Runge-Kutta schemes for
adjoint equations):

    c_i = h (b_i l + sum_n r_ni g_n + sum_(j>i) a_ji p_j),    p_i = c_i^T dv/dx(t_i, x_i),
    dL/dx = l + sum_n g_n + sum_i p_i,                        dL/dtheta = sum_i c_i^T dv/dtheta(t_i, x_i).

Each stage takes part in one vector-Jacobian product, and nothing is solved again. With gradient=replay only the stages
of the last step are kept; those of the others are computed again, one step at a time. That needs the activations of one
step, and of every step the point where it begins, its first slope and its nodes, each of the size of x.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.ode.quadrature import Nodes
from flowtrain.ode.solver import Statistics
from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import Recorder, Stage, Tape, Weights, add, combined, on_device, record, take
from flowtrain.utils.autograd import first_derivative
from flowtrain.utils.precision import full_precision


@dataclass
class AcceptedStep:
    """The step from x at t: its slopes (stages, B, *event), of which a replay needs the first; its stages."""

    t: float
    h: float
    x: Tensor
    slopes: Tensor
    stages: list[Stage] | None


class AcceptedSteps:
    """The accepted steps of one solve, what they end in, and how a cotangent comes back through them."""

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
        # whether any node of a step takes from its last stage
        self.last_used = [bool(each[:, -1].any()) for each in rows]

    def points(self) -> Tensor:
        """x at the nodes, (nodes, B, *event), by the slopes of every step: to be taken before `forget_slopes`."""
        counts = [len(rows) for rows in self.rows]
        # filled in place: all the slopes are still held, and parts to be joined would be held twice beside them
        found = self.x1.new_empty(sum(counts), *self.x1.shape)
        for s, rows, part in zip(self.steps, self.rows, torch.split(found, counts), strict=True):
            part.copy_(s.x + combined(s.h * rows, s.slopes))
        return found

    def forget_slopes(self) -> None:
        """Lets go of all slopes but the first of each step where steps are replayed: a replay needs the first alone."""
        if self.replay:
            for s in self.steps:
                # a copy: a view would keep the others
                s.slopes = s.slopes[:1].clone()

    def vjp(self, at_end: Tensor, at_nodes: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Cotangents of x at the start (B, *event) and of the parameters, from those of x1 and of `points`."""
        gradients: list[Tensor | None] = [None] * len(self.recorder.parameters)
        by_step = torch.split(at_nodes, [len(rows) for rows in self.rows])
        at_first: Tensor | None = None
        tapes: dict[int, Tape] = {}
        for k in reversed(range(len(self.steps))):
            stages = self.steps[k].stages or self.replayed(k)
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
        """Step k in reverse: the cotangents of x where it begins, and of its first slope if the step before shares it.

        Args:
            at_end: the cotangent of x where it ends.
            at_nodes: those of its nodes, (nodes in it, B, *event).
            at_last: that of its last slope as the first of the step after, or None.
        """
        h, same, last = self.steps[k].h, self.tableau.first_same_as_last, len(stages) - 1
        a = h * self.weights.a
        c = combined((h * self.rows[k]).T, at_nodes)
        start = at_nodes.sum(0)
        if at_last is not None:
            c[last] += at_last
        if not same:
            c += outer(h * self.weights.b, at_end)
            start += at_end
        for i in reversed(range(1, last + 1)):
            # a last stage at the end of the step shares its vjp with the end itself
            idle = same and i == last and at_last is None and not self.last_used[k]
            at_stage = torch.zeros_like(at_end) if idle else stages[i].vjp(c[i])
            if same and i == last:
                at_stage = at_stage + at_end
            start += at_stage
            c[:i] += outer(a[i, :i], at_stage)
        if self.begins(k):
            return start + stages[0].vjp(c[0]), None
        return start, c[0]

    def begins(self, k: int) -> bool:
        """Whether the first slope of step k is not the last one of the step before."""
        return k == 0 or not self.tableau.first_same_as_last

    def replayed(self, k: int) -> list[Stage]:
        """The stages of step k, taken again; the first only where no step before has it as its last."""
        step, begins = self.steps[k], self.begins(k)
        times = [step.t + c * step.h for c in self.tableau.c]
        stages = record(self.recorder, times, step.x, keep=True)
        first = stages[0].velocity(step.x) if begins else step.slopes[0]
        take(step.x, step.h, self.weights, first, lambda i, x: stages[i].velocity(x))
        self.statistics.nfe_backward += len(times) - (not begins)
        return stages


def outer(weights: Tensor, x: Tensor) -> Tensor:
    """w_i x, (n, *x.shape)."""
    return weights.view(-1, *(1,) * x.dim()) * x


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, accepted: AcceptedSteps, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.accepted = accepted
        # read again in backward, where torch refuses weights that were changed in between
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
    """(x1, x at the nodes), with a graph that leads to x, where the solve began, and to the parameters."""
    x1, points = _Differentiable.apply(accepted, x, *accepted.recorder.parameters)  # type: ignore[no-untyped-call]
    return x1, points
