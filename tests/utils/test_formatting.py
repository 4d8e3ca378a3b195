"""Numbers in text are rounded to their error."""

import numpy as np
import pytest

from flowtrain.utils.formatting import brief, decimals, with_error


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (2.40163, 0.00612, "2.402 +- 0.006"),
        (2.40163, 0.0146, "2.402 +- 0.015"),
        (2.40163, 0.0196, "2.40 +- 0.02"),
        (2.40163, 0.0096, "2.402 +- 0.010"),
        (2.40163, 0.095, "2.40 +- 0.10"),
        (-1234.5, 31.0, "-1230 +- 30"),
        (-1234.5, 120.0, "-1230 +- 120"),
        (5.0, 1.2, "5.0 +- 1.2"),
        (0.0, 3.2e-7, "0.0000000 +- 0.0000003"),
        (2.5, 0.0, "2.5000"),
        (2.40163, float("nan"), "2.4016"),
        (float("nan"), 0.1, "nan"),
    ],
)
def test_numbers_end_where_their_error_begins(value: float, error: float, words: str) -> None:
    assert with_error(value, error) == words


@pytest.mark.parametrize("error", np.geomspace(1e-9, 1e9, 181).tolist())
def test_an_error_keeps_one_digit_or_two(error: float) -> None:
    shown = round(error, decimals(error))
    assert abs(shown - error) <= 0.26 * error
    assert 1 <= round(shown * 10.0 ** decimals(error)) <= 20


def test_brief_keeps_one_digit() -> None:
    shown = [brief(v) for v in (0.0, 3.1e-6, 0.02, 0.0061, 0.35, 4.2, 9.7, 123.4, 2e7, 1e-12)]
    assert shown == ["0", "3e-6", "0.02", "0.006", "0.3", "4", "10", "123", "2e7", "1e-12"]
