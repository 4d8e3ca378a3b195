"""Targets of a user's function: mistakes of the function and of its settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.densities import banana
from torch import Tensor

from flowtrain.data.targets.base import FunctionTarget
from flowtrain.utils.errors import ConfigError, DataError


def raising(x: Tensor) -> Tensor:
    raise KeyError("a mistake of the user")


def doubled(x: Tensor) -> Tensor:
    x *= 2
    return banana(x)


@pytest.mark.parametrize(("function", "words"), [(raising, f"{__file__}, line"), (doubled, "in place")])
def test_mistake_in_the_function_is_one_message(function: Callable[..., Tensor], words: str) -> None:
    target = FunctionTarget(function, 2)
    with pytest.raises(DataError, match=words):
        target(torch.randn(5, 2))


@pytest.mark.parametrize("function", [lambda x: banana(x.detach()), lambda x: banana(x).long()])
def test_function_without_gradient_is_refused_only_if_a_gradient_is_needed(function: Callable[..., Tensor]) -> None:
    target, x = FunctionTarget(function, 2), 3 * torch.randn(5, 2)
    assert len(target(x)) == 5
    with pytest.raises(DataError, match="gradient"):
        target(x.requires_grad_())
    with torch.no_grad():
        assert len(target(x)) == 5


def test_constant_function_needs_no_gradient() -> None:
    assert FunctionTarget(lambda x: x.new_zeros(len(x)), 2)(torch.randn(5, 2, requires_grad=True)).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": "ab"}, "target.columns"),
        ({"columns": ["a", "a"]}, "target.columns"),
        ({"columns": [["a"], ["b"]]}, "target.columns"),
        ({"types": "positive"}, "target.types={x1: positive}"),
    ],
)
def test_wrong_columns_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FunctionTarget(banana, 2, **settings)


def test_columns_may_be_named_by_numbers() -> None:
    target = FunctionTarget(banana, 2, columns=[1, 2], types={2: "positive"})  # type: ignore[list-item]
    assert target.columns == ("1", "2")
    assert [str(one) for one in target.types] == ["real", "positive"]
