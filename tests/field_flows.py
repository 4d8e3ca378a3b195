"""Flows of two columns around a field."""

from typing import Any

from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous, Regularizer
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import ode_solver

PLAIN = Regularizer()


def around(field: nn.Module, *, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()) -> Flow:
    continuous = Continuous(field, ode_solver("dopri5", rtol=1e-9), TraceRule("exact"))
    return Flow((2,), Chain([*before, continuous, *after]))


class Linear(nn.Module):
    """v = a + B x, whatever the time: the regression on it is solved by hand."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.a + x @ self.b.T
