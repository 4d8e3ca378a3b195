"""Fixtures for tests of objectives: flows over two columns with a given field."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import ode_solver


class Linear(nn.Module):
    """v = a + B x at all times, for which the regression has a closed form."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.a + x @ self.b.T


@pytest.fixture(scope="session")
def linear_field() -> type[nn.Module]:
    """Returns the class of linear fields, which are built from an offset and a matrix."""
    return Linear


@pytest.fixture(scope="session")
def flow_with_field() -> Callable[..., Flow]:
    """Returns a function that builds a continuous flow from a field, between other bijections."""

    def build(field: nn.Module, *, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()) -> Flow:
        continuous = Continuous(field, ode_solver("dopri5", rtol=1e-9), TraceRule("exact"))
        return Flow((2,), Chain([*before, continuous, *after]))

    return build
