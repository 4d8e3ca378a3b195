"""The exact gradient of a discrete solution: the accepted steps in reverse, their sizes held constant.

For a step x1 = x + h sum_i b_i k_i with k_i = v(t_i, x_i), x_i = x + h sum_j a_ij k_j, and cotangents l of x1 and g_n
of the nodes y_n = x + h sum_j r_nj k_j that the path integrals take from it, the cotangents c_i of k_i are found last
stage first (Hager 2000, Runge-Kutta methods in optimal control; Sanz-Serna 2016, Symplectic Runge-Kutta schemes for
adjoint equations):

    c_i = h (b_i l + sum_n r_ni g_n + sum_(j>i) a_ji p_j),    p_i = c_i^T dv/dx(t_i, x_i),
    dL/dx = l + sum_n g_n + sum_i p_i,                        dL/dtheta = sum_i c_i^T dv/dtheta(t_i, x_i).

Each stage is pulled back once, and nothing is solved again. With gradient=replay only the last step's stages are kept:
the others are taken again from their stored beginnings, one at a time. That needs the activations of one step, and of
every step what has the size of x: where it begins, its first slope, its nodes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.derivatives import first_derivative
from flowtrain.solvers.base import Statistics
from flowtrain.solvers.nodes import Nodes
from flowtrain.solvers.precision import full_precision
from flowtrain.solvers.stages import Stage, Weights, combined, on_device, record, take
from flowtrain.solvers.tableaus import Tableau
from flowtrain.solvers.tape import Recorder, Tape, add


@dataclass
class Step:
    """An accepted step from x at t: its slopes (stages, B, *event), of which a replay needs the first; its stages."""

    t: float
    h: float
    x: Tensor
    slopes: Tensor
    stages: list[Stage] | None


class Trajectory:
    """The accepted steps of one solve, what they end in, and how a cotangent comes back through them."""

    def __init__(
        self,
        recorder: Recorder,
        tableau: Tableau,
        weights: Weights,
        steps: list[Step],
        x1: Tensor,
        nodes: Nodes | None,
        statistics: Statistics,
        replay: bool,
    ) -> None:
        self.replay = replay
        self.recorder, self.tableau, self.weights = recorder, tableau, weights
        self.steps, self.x1, self.statistics = steps, x1, statistics
        self.rows = [on_device(rows, x1) for rows in nodes.rows] if nodes is not None else None
        # whether any node of a step takes from its last stage
        self.last_used = [bool(rows[:, -1].any()) for rows in nodes.rows] if nodes is not None else [False] * len(steps)

    def points(self) -> Tensor:
        """x at the nodes, (nodes, B, *event)."""
        parts = [self.x1.new_empty(0, *self.x1.shape)]
        for s, rows in zip(self.steps, self.rows or (), strict=False):
            parts.append(s.x + combined(s.h * rows, s.slopes))
        if self.replay:
            for s in self.steps:
                s.slopes = s.slopes[:1].clone()
        return torch.cat(parts)

    def pull(self, at_end: Tensor, at_nodes: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Cotangents of x at the start (B, *event) and of the parameters, from those of x1 and of `points`."""
        same = self.tableau.first_same_as_last
        gradients: list[Tensor | None] = [None] * len(self.recorder.parameters)
        tapes: dict[int, Tape] = {}
        carried: Tensor | None = None
        by_step = torch.split(at_nodes, [len(rows) for rows in self.rows]) if self.rows is not None else None
        for k in reversed(range(len(self.steps))):
            step = self.steps[k]
            here = by_step[k] if by_step is not None and self.rows is not None and len(self.rows[k]) else None
            begins = k == 0 or not same
            stages = step.stages or self.replayed(step, begins)
            c = torch.zeros_like(step.x).expand(len(stages), *step.x.shape).clone()
            start = torch.zeros_like(step.x) if same else at_end.clone()
            if here is not None and self.rows is not None:
                c += combined((step.h * self.rows[k]).T, here)
                start += here.sum(0)
            if carried is not None:
                c[-1] += carried
            if not same:
                c += outer(step.h * self.weights.b, at_end)
            a = step.h * self.weights.a
            for i in reversed(range(1, len(stages))):
                ends = same and i == len(stages) - 1
                if ends and carried is None and not self.last_used[k]:
                    pulled = at_end
                else:
                    pulled = stages[i].pull(c[i])
                    if ends:
                        pulled = pulled + at_end
                start += pulled
                c[:i] += outer(a[i, :i], pulled)
            if begins:
                start += stages[0].pull(c[0])
            # the first slope is the last one of the step before, which pulls it with its own
            carried = c[0] if same and k else None
            at_end = start
            tapes |= {id(s.tape): s.tape for s in stages}
            if self.replay:
                add(gradients, self.recorder.gradients(list(tapes.values())))
                tapes, step.stages = {}, None
        if tapes:
            add(gradients, self.recorder.gradients(list(tapes.values())))
        return at_end, gradients

    def replayed(self, step: Step, begins: bool) -> list[Stage]:
        """The stages of a step, taken again; the first only where no step before has it as its last."""
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
    def forward(ctx: Any, trajectory: Trajectory, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.trajectory = trajectory
        # read again in backward, where torch refuses weights that were changed in between
        ctx.save_for_backward(x, *parameters)
        return trajectory.x1.clone(), trajectory.points()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_end: Tensor, at_nodes: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        with full_precision(at_end.device):
            x, parameters = ctx.trajectory.pull(at_end, at_nodes)
        return None, x, *parameters


def differentiable(trajectory: Trajectory, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x1, x at the nodes), with a graph that leads to x, where the solve began, and to the parameters."""
    x1, points = _Differentiable.apply(trajectory, x, *trajectory.recorder.parameters)  # type: ignore[no-untyped-call]
    return x1, points
