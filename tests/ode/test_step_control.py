"""The steps of a solve are planned from the steps of the previous solve."""

import numpy as np
import pytest

from flowtrain.ode.step_control import MARGIN, StepPlan


def test_plan_without_previous_steps_is_empty() -> None:
    assert StepPlan().plan(0.0, 1.0) == []


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (0.25, 0.5)])
def test_steps_with_small_error_are_planned_again(t0: float, t1: float) -> None:
    lengths = np.array([0.1, 0.2, 0.3, 0.4])
    ends = StepPlan(tuple([(h, h / MARGIN) for h in lengths])).plan(t0, t1)
    np.testing.assert_allclose(ends, t0 + lengths.cumsum() * (t1 - t0), rtol=1e-12)
    assert ends[-1] == t1


def test_short_steps_are_merged_and_long_steps_split() -> None:
    # in the last solve, the first half took four steps but needed one, and the second half took one step but needed two
    ends = StepPlan(tuple([(0.125, 0.5 / MARGIN)] * 4 + [(0.5, 0.25 / MARGIN)])).plan(0.0, 1.0)
    np.testing.assert_allclose(ends, [0.5, 0.75, 1.0], rtol=1e-12)


def test_plan_has_equal_steps() -> None:
    # the interval has room for 2.5 steps of the suitable length, so three equal steps are planned
    ends = StepPlan(((1.0, 0.4 / MARGIN),)).plan(0.0, 1.0)
    np.testing.assert_allclose(ends, [1 / 3, 2 / 3, 1], rtol=1e-12)


def test_one_step_is_planned_when_its_error_allows() -> None:
    assert StepPlan(((0.5, 7.0), (0.5, 9.0))).plan(1.0, 0.0) == [0.0]
