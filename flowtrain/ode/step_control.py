"""The step controller of adaptive solvers: the next step size, and step sizes planned from an earlier solve."""

import math
from dataclasses import dataclass

import numpy as np

# the safety factor of a new step size, and the limits of its ratio to the last step size
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
# the safety factor of planned steps. Without it, steps that just met the tolerance for one batch could be rejected for
# the next batch
MARGIN = 0.95


def step_factor(ratio: float, order: int) -> float:
    """Returns the size of the next step divided by the size of the last step.

    The factor is 0.9 ratio^(-1/order), limited to [0.2, 10], and to at most 1 after a rejected step. It is 0.2 if the
    error is not finite (Hairer, Norsett and Wanner, Solving ODEs I, II.4).

    Args:
        ratio: error / tolerance of the last step. The step was accepted if the ratio is at most 1.
        order: p, if the error of a step of size h is proportional to h^p.

    Example:
        >>> step_factor(1.0, 5), step_factor(float("nan"), 5)
        (0.9, 0.2)
    """
    if not math.isfinite(ratio):
        return SHRINK
    grow = 1.0 if ratio > 1 else GROW
    ideal: float = SAFETY * max(ratio, 1e-10) ** (-1 / order)
    return min(grow, max(SHRINK, ideal))


def step_end(t: float, t1: float, h: float) -> float:
    """Returns the end of a step of size h from t. Near t1, two equal steps replace a long one and a very short one.

    Example:
        >>> step_end(0.0, 1.0, 0.9), step_end(0.0, 1.0, 0.3)
        (0.5, 0.3)
    """
    left = t1 - t
    if abs(h) >= abs(left) * (1 - 1e-9):
        return t1
    return t + (left / 2 if 2 * abs(h) > abs(left) else h)


@dataclass(frozen=True)
class StepPlan:
    """The accepted steps of the last solve, from which the steps of the next solve are planned.

    In training the flow changes little from one update to the next. So the last solve tells how long a step may be at
    each time. `plan` divides the interval into the smallest number of steps that should be accepted, all with about the
    same ratio of error and tolerance. The plan saves the estimate of the first step size, and most rejected steps.

    Attributes:
        steps: (length, ideal length) of each step in order. With the ideal length the error would have been about
            the tolerance.
    """

    steps: tuple[tuple[float, float], ...] = ()

    def plan(self, t0: float, t1: float) -> list[float]:
        """Returns the ends of the steps to attempt from t0 to t1. The last end is t1. Without steps the list is empty.

        Let s(t) be 0.95 times the ideal length. Then n(t) = int_t0^t dt / s counts steps. The j-th end is the time t
        with n(t) = j n(t1) / ceil(n(t1)).

        Example:
            >>> StepPlan(((1.0, 0.6),)).plan(0.0, 1.0)  # one step that was too long
            [0.5, 1.0]
        """
        if not self.steps:
            return []
        lengths, ideal = np.array(self.steps).T
        fractions = np.concatenate([[0], lengths.cumsum() / lengths.sum()])
        counts = np.concatenate([[0], (lengths / (MARGIN * ideal)).cumsum()])
        n = max(1, math.ceil(counts[-1] - 1e-6))
        ends = np.interp(np.arange(1, n) * counts[-1] / n, counts, fractions)
        return [*(t0 + ends * (t1 - t0)).tolist(), t1]
