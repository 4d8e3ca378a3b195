"""Context columns: conversion of values, features for networks, and checks of descriptions from files."""

from typing import Any

import numpy as np
import pytest
import torch

from flowtrain.data.context import (
    ContextColumn,
    context_values,
    feature_count,
    features,
    is_context_column,
    unnamed_context,
)
from flowtrain.utils.errors import DataError

MASS = ContextColumn("mass", mean=2.0, std=0.5)
COLOUR = ContextColumn("colour", "categorical", categories=("blue", "red"))
LEVEL = ContextColumn("level", "categorical", categories=(1.0, 2.5))


class Frame:
    """A data frame with the methods that flowtrain uses."""

    def __init__(self, **columns: list[Any]) -> None:
        self.data = columns
        self.columns = list(columns)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(self.data[name])

    def to_numpy(self) -> np.ndarray:
        return np.column_stack(list(self.data.values()))


def test_features_are_standardised_and_one_hot() -> None:
    values = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    found = features([MASS, COLOUR], values, torch.float64)
    assert found.tolist() == [[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert feature_count([MASS, COLOUR]) == found.shape[1]


def test_features_are_standardised_before_rounding() -> None:
    """Seconds since 1970 differ by less than the resolution of float32."""
    column = ContextColumn("t", mean=1.7e9, std=10.0)
    found = features([column], torch.tensor([[1.7e9 + 1.0]], dtype=torch.float64), torch.float32)
    assert found.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.tensor([[3.0, 1.0], [2.0, 0.0]]), [[3, 1], [2, 0]]),
        (np.array([3.0, 1.0]), [[3, 1], [3, 1]]),
        ([[3, 1], [2, 0]], [[3, 1], [2, 0]]),
        ({"mass": 3, "colour": "red"}, [[3, 1], [3, 1]]),
        ({"colour": ["red", "blue"], "mass": [3, 2]}, [[3, 1], [2, 0]]),
        ({"mass": torch.tensor([3.0, 2.0]), "colour": "blue"}, [[3, 0], [2, 0]]),
        (Frame(colour=["red", "blue"], other=[7, 8], mass=[3, 2]), [[3, 1], [2, 0]]),
        (np.array([["3", "red"], ["2", "blue"]], dtype=object), [[3, 1], [2, 0]]),
    ],
)
def test_contexts_of_all_forms_are_read(given: Any, expected: list[list[float]]) -> None:
    found = context_values([MASS, COLOUR], given, 2)
    assert found.dtype == torch.float64
    assert found.tolist() == expected


@pytest.mark.parametrize("given", [2.5, [2.5], np.array([[2.5]]), {"level": 2.5}, {"level": "2.5"}])
def test_one_column_accepts_one_value(given: Any) -> None:
    column = MASS if not isinstance(given, dict) else LEVEL
    expected = 2.5 if column is MASS else 1.0
    assert context_values([column], given, 3).flatten().tolist() == [expected] * 3


def test_one_value_for_each_row_of_one_column() -> None:
    assert context_values([MASS], [1.0, 2.0, 3.0], 3).tolist() == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mass": 1.0}, ["colour"]),
        ({"mass": 1.0, "color": "red"}, ["colour"]),
        ({"mass": 1.0, "colour": "red", "extra": 1}, ["extra"]),
        ({"mass": 1.0, "colour": "green"}, ["green", "blue, red"]),
        ({"mass": "heavy", "colour": "red"}, ["mass"]),
        ({"mass": [1.0, 2.0, 3.0], "colour": "red"}, ["mass", "(3,)"]),
        ({"mass": float("nan"), "colour": "red"}, ["mass", "nan"]),
        ({"mass": 1e300, "colour": "red"}, ["mass", "1e+300"]),
        (torch.zeros(3, 2), ["(3, 2)", "(2, 2)"]),
        (torch.zeros(2, 3), ["(2, 3)"]),
        (torch.tensor([[1.0, 2.0]]), ["colour", "0 to 1"]),
        (torch.tensor([[1.0, 0.5]]), ["colour"]),
        (torch.tensor([[float("inf"), 0.0]]), ["mass"]),
    ],
)
def test_invalid_contexts_are_refused(given: Any, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        context_values([MASS, COLOUR], given, 2)
    assert all(word in str(error.value) for word in words), error.value


def test_gradients_reach_the_context() -> None:
    c = torch.tensor([[1.0]], requires_grad=True)
    features(unnamed_context(1), context_values(unnamed_context(1), c, 2), torch.float32).sum().backward()
    assert c.grad is not None
    assert c.grad.item() == 2.0


@pytest.mark.parametrize(
    "bad",
    [
        ContextColumn("a", std=0.0),
        ContextColumn("a", mean=float("nan")),
        ContextColumn("a", "categorical"),
        ContextColumn("a", "other"),
        ContextColumn(3),  # type: ignore[arg-type]
    ],
)
def test_invalid_descriptions_are_detected(bad: ContextColumn) -> None:
    assert is_context_column(MASS)
    assert is_context_column(COLOUR)
    assert not is_context_column(bad)
