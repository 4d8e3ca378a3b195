"""The step controller of adaptive solvers: the next step size, and step sizes planned from an earlier solve."""

import math
from dataclasses import dataclass

import numpy as np

# an accepted step aims at this share of the tolerance; limits of the change from one step size to the next
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
# the errors of two batches differ, and a plan that just held the tolerance on one would be rejected on the next
MARGIN = 0.95


def step_factor(ratio: float, order: int) -> float:
    """The factor from the size of the last step to that of the next.

    0.9 ratio^(-1/order), between 0.2 and 10; at most 1 after a rejected step, and 0.2 if the error is not finite
    (Hairer, Norsett and Wanner, Solving ODEs I, II.4).

    Args:
        ratio: error over tolerance; the step is accepted if it is at most 1.
        order: of the error estimate, in the sense that the error of a step is proportional to its size^order.

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
    """The end of a step of size h from t. Near t1, two equal steps replace a long one and a very short one.

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
    """The accepted steps of the last solve, each (length, the length that would have suited it), in the order taken.

    The flow of a training run changes little from one update to the next. So the last solve's steps say how long a
    step may be at each time, and `plan` cuts the interval into the fewest steps that should pass, all equally well:
    neither a first step that is guessed, nor steps that grow until one is rejected.
    """

    steps: tuple[tuple[float, float], ...] = ()

    def plan(self, t0: float, t1: float) -> list[float]:
        """The ends of the steps to attempt from t0 to t1, the last of them t1; empty where nothing is known.

        With s(t) the suited length less a margin, n(t) = int_t0^t dt / s counts steps, and the ends are where n is
        j n(t1) / ceil(n(t1)).

        Example:
            >>> StepPlan(((1.0, 0.6),)).plan(0.0, 1.0)  # one step, longer than its error allowed
            [0.5, 1.0]
        """
        if not self.steps:
            return []
        lengths, suited = np.array(self.steps).T
        fractions = np.concatenate([[0], lengths.cumsum() / lengths.sum()])
        counts = np.concatenate([[0], (lengths / (MARGIN * suited)).cumsum()])
        n = max(1, math.ceil(counts[-1] - 1e-6))
        ends = np.interp(np.arange(1, n) * counts[-1] / n, counts, fractions)
        return [*(t0 + ends * (t1 - t0)).tolist(), t1]
