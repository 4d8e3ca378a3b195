"""The step controller of adaptive solvers: the next step size, and step sizes planned from an earlier solve."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# times, step sizes and ratios of rows. They are on the host, where the step control runs
Array = NDArray[np.float64]

# the largest number of retries after steps with an error that is NaN or infinite. Each retry has a shorter step
NON_FINITE_RETRIES = 8
# the safety factor of a new step size, and the limits of its ratio to the last step size
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
# the exponents of the last two ratios in the step size of a single row, and the constant of its first step size
RESPONSE, MEMORY, FIRST = 0.7, 0.2, 1.0
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


def step_factors(ratio: Array, before: Array, order: int) -> Array:
    """Returns the size of the next step divided by the size of the last step, for each row, (n,).

    After a rejected step this is `step_factor`. After an accepted step it is 0.9 ratio^(-0.7/order)
    before^(0.2/order), limited to [0.2, 10], a PI controller (Hairer and Wanner, Solving ODEs II, IV.2). The exponents,
    were chosen by the evaluations that single rows of moons need.

    Args:
        ratio: error / tolerance of the last step. The step was accepted if the ratio is at most 1.
        before: the ratio of the last accepted step before it, NaN if there was none. The ratio then takes its place.
        order: p, if the error of a step of size h is proportional to h^p.

    Example:
        >>> step_factors(np.array([1.0, np.nan]), np.ones(2), 5)
        array([0.9, 0.2])
    """
    least = np.maximum(ratio, 1e-4)
    before = np.where(np.isnan(before), least, np.maximum(before, 1e-4))
    accepted = ratio <= 1
    ideal = SAFETY * np.where(
        accepted, least ** (-RESPONSE / order) * before ** (MEMORY / order), least ** (-1 / order)
    )
    factor = np.minimum(np.maximum(ideal, SHRINK), np.where(accepted, GROW, 1.0))
    return np.where(np.isfinite(ratio), factor, SHRINK)


def step_ends(t: Array, t1: float, h: Array) -> Array:
    """Returns `step_end` of each row, for times and step sizes (n,).

    Example:
        >>> step_ends(np.zeros(2), 1.0, np.array([0.9, 0.3]))
        array([0.5, 0.3])
    """
    left = t1 - t
    length, remaining = np.abs(h), np.abs(left)
    end = t + np.where(2 * length > remaining, left / 2, h)
    return np.where(length >= remaining * (1 - 1e-9), t1, end)


def first_guesses(size: Array, speed: Array, span: float) -> Array:
    """Returns the first guess of each step size, with its sign, from the scaled RMS of x and of the slope, (n,).

    If the state or the slope is nearly zero, the guess is 1e-3. Hairer, Norsett and Wanner use 1e-6. This is too short
    for an untrained flow, whose field is zero.
    """
    with np.errstate(all="ignore"):
        guess = np.where((size < 1e-5) | (speed < 1e-5), 1e-3, 0.01 * size / speed)
    return np.minimum(guess, abs(span)) * math.copysign(1, span)


def first_steps(guess: Array, speed: Array, change: Array, span: float, order: int, smallest: float) -> Array:
    """Returns the first step size of each row, with its sign (Hairer, Norsett and Wanner, II.4, 'starting step size').

    The constant 1 replaces the 0.01 of the book, which makes the first steps of flows too short. With a constant of 2,
    log p of rows far from the data has larger errors than with shared steps. The result is not finite if the guess is
    not finite.

    Args:
        guess: see `first_guesses`, (n,).
        speed: the scaled RMS of the slope, (n,).
        change: the scaled RMS of the change of the slope over a step of size `guess`, (n,).
        span: t1 - t0.
        order: the order of the method.
        smallest: the smallest length of a step. Near the origin the estimate can be below the rounding error of t.
    """
    length = np.abs(guess)
    with np.errstate(all="ignore"):
        largest = np.maximum(speed, change / length)
        ideal = np.where(largest > 1e-15, (FIRST / largest) ** (1 / order), abs(span))
    found = np.minimum(np.minimum(100 * length, ideal), abs(span))
    found = np.maximum(np.where(np.isfinite(largest), found, length), smallest)
    return np.where(np.isfinite(guess), found * math.copysign(1, span), guess)


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
