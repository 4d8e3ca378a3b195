"""Column types: the grammar of the setting, ranges, and the noise at the ends of intervals."""

import math

import numpy as np
import pytest
import torch

from flowtrain.data.types import (
    EDGE,
    ColumnType,
    circular_columns,
    edge_columns,
    is_column_type,
    spread_edges,
    whole_columns_of,
    with_whole_noise,
)
from flowtrain.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "support"),
    [
        ("real", (-math.inf, math.inf)),
        ("positive", (0, math.inf)),
        ("interval(0,1)", (0, 1)),
        (" interval( -1.5 , 2e3 ) ", (-1.5, 2000)),
        ("interval(5,inf)", (5, math.inf)),
        (["interval", 0, 1], (0, 1)),
        ("circular(360)", (0, 360)),
        ("circular(-180,180)", (-180, 180)),
        ("integer", (-math.inf, math.inf)),
        ("integer(1,6)", (1, 7)),
        ("integer(0,inf)", (0, math.inf)),
    ],
)
def test_types_are_parsed(text: object, support: tuple[float, float]) -> None:
    assert ColumnType.parse(text).support == support


@pytest.mark.parametrize(
    "text",
    ["postive", "interval", "interval(1,0)", "interval(a,b)", "interval(-inf,inf)", "circular", "circular(-1)", 3, None,
     "circular(0,inf)", "integer(0.5,2)", "integer(3)", "positive(1)", "categorical(3)", [], "interval(nan,1)"],
)  # fmt: skip
def test_other_types_are_refused_with_their_key(text: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.types\.age"):
        ColumnType.parse(text, "data.types.age")


@pytest.mark.parametrize("text", ["positive", "interval(0,1)", "interval(5,inf)", "circular(360)", "integer(1,6)"])
def test_text_of_a_type_gives_the_same_type(text: str) -> None:
    assert ColumnType.parse(str(ColumnType.parse(text))) == ColumnType.parse(text)


def test_ranges_follow_the_values() -> None:
    values = np.array([1.0, 2.0, 5.0])
    counts = ColumnType.parse("integer")
    assert counts.fitted(0, 9, values).support == (0, math.inf)
    assert counts.fitted(-1, 9, values).support == (-math.inf, math.inf)
    angle = ColumnType.parse("circular(360)")
    assert angle.fitted(-170, 100, values).support == (-180, 180)
    assert angle.fitted(0, 100, values).support == (0, 360)
    assert angle.fitted(-10, 200, values).support == (0, 360)


def test_scale_of_positive_columns_follows_their_tail() -> None:
    rng = np.random.default_rng(0)
    positive = ColumnType.parse("positive")
    assert positive.fitted(0, 1, np.exp(2 * rng.normal(size=2000))).scale == 0
    assert positive.fitted(0, 1, np.abs(rng.normal(size=2000))).scale > 0


def test_columns_by_kind() -> None:
    types = [ColumnType.parse(t) for t in ("interval(0,1)", "circular(1)", "integer", "interval(0,inf)")]
    types.append(ColumnType("categorical").with_categories(["a", "b"]))
    assert (edge_columns(types), circular_columns(types), whole_columns_of(types)) == ((0,), (1,), (2, 4))


def test_values_at_the_ends_are_spread_inwards() -> None:
    types = [ColumnType.parse("interval(2,4)"), ColumnType()]
    x = torch.tensor([[2.0, 2.0], [4.0, 4.0], [3.0, 3.0]], dtype=torch.float64)
    moved = spread_edges(x, types, torch.full_like(x, 0.5))
    expected = torch.tensor([[2 + EDGE, 2.0], [4 - EDGE, 4.0], [3.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(moved, expected)


def test_noise_is_added_to_whole_numbers_only() -> None:
    x = torch.tensor([[1.0, 1.0], [1.5, 1.5]])
    moved = with_whole_noise(x, [1], torch.full_like(x, 0.25))
    assert moved.tolist() == [[1.0, 1.25], [1.5, 1.5]]


@pytest.mark.parametrize(
    "damaged",
    [
        ColumnType("other"),
        ColumnType("interval", 1.0, 0.0),
        ColumnType("interval", math.nan, 0.0),
        ColumnType("circular", 0.0, math.inf),
        ColumnType("categorical", 0.0, 3.0, ("a",)),
        ColumnType("positive", 0.0, math.inf, scale=-1.0),
        ColumnType("positive", "0", math.inf),  # type: ignore[arg-type]
    ],
)
def test_damaged_types_are_detected(damaged: ColumnType) -> None:
    assert not is_column_type(damaged)
    assert is_column_type(ColumnType.parse("positive"))
