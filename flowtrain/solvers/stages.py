"""One explicit Runge-Kutta step from x at t: its stages, for the step that is tried and for the one replayed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtrain.solvers.tableaus import Tableau
from flowtrain.solvers.tape import Recorder, Tape


@dataclass(frozen=True)
class Stage:
    """One evaluation of a tape."""

    tape: Tape
    i: int

    def velocity(self, x: Tensor) -> Tensor:
        """v at x, both (B, *event)."""
        return self.tape.velocity(self.i, x)

    def pull(self, cotangent: Tensor) -> Tensor:
        """cotangent^T dv/dx, (B, *event); see `Tape`."""
        return self.tape.pull(self.i, cotangent)


class Weights:
    """A tableau's a (stages, stages), b and e (stages,) on the device and in the dtype of a state."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        n = len(tableau.b)
        rows = [(), *tableau.a, tableau.b, tableau.e or ()]
        matrix = on_device([[*row, *(0.0,) * (n - len(row))] for row in rows], like)
        self.a, self.b, self.e = matrix[:n], matrix[n], matrix[n + 1]


def on_device(values: Sequence[object] | np.ndarray, like: Tensor) -> Tensor:
    """Numbers from the host in the dtype and on the device of `like`, without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def record(recorder: Recorder, times: Sequence[float], like: Tensor, keep: bool) -> list[Stage]:
    """Stages at `times`, on one tape."""
    tape = recorder.record(on_device(times, like), keep)
    return [Stage(tape, i) for i in range(len(times))]


def take(
    x: Tensor, h: float, weights: Weights, first: Tensor, velocity: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """x_i = x + h sum_(j<i) a_ij k_j and k_i = velocity(i, x_i): the points, and the slopes (stages, B, *event).

    Args:
        first: k_0, known from the step before or from an attempt that was rejected.
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


def take_ordinary(
    x: Tensor, h: float, weights: Weights, first: Tensor, velocity: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """`take` without in-place writes, which autograd and vmap do not allow."""
    points, slopes = [x], [first]
    for i in range(1, len(weights.b)):
        points.append(x + combined(h * weights.a[i, :i], torch.stack(slopes)))
        slopes.append(velocity(i, points[i]))
    return points, torch.stack(slopes)


def combined(weights: Tensor, slopes: Tensor) -> Tensor:
    """sum_i w_i k_i, w (stages,) or (n, stages): (B, *event) or (n, B, *event)."""
    return (weights @ slopes.flatten(1)).view(*weights.shape[:-1], *slopes.shape[1:])
