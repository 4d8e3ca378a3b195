"""What one solve leaves for the next of its kind: the step sizes that its errors asked for."""

import math
from dataclasses import dataclass, field

import numpy as np

# the errors of two batches differ, and a plan that just held the tolerance on one would be rejected on the next
MARGIN = 0.95


@dataclass
class StepPlan:
    """The accepted steps of the last solve, each (length, the length that would have suited it), in the order taken.

    The flow of a training run changes little from one update to the next. So the last solve's steps say how long a
    step may be at each time, and `plan` cuts the interval into the fewest steps that should pass, all equally well:
    neither a first step that is guessed, nor steps that grow until one is rejected.
    """

    steps: list[tuple[float, float]] = field(default_factory=list)

    def plan(self, t0: float, t1: float) -> list[float]:
        """The ends of the steps to attempt from t0 to t1, the last of them t1; empty where nothing is known.

        With s(t) the suited length less a margin, n(t) = int_t0^t dt / s counts steps, and the ends are where n is
        j n(t1) / ceil(n(t1)).

        Example:
            >>> History([(1.0, 0.6)]).plan(0.0, 1.0)  # one step, longer than its error allowed
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
