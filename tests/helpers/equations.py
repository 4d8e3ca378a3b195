"""Fields and equations shared by the solver tests."""

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import Problem, Solver
from flowtrain.ode.tableaus import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.e is not None]


def random_field(d: int = 2, layer: str = "concatsquash", activation: str = "tanh", std: float = 0.7) -> MLPField:
    field = MLPField(d, [6, 5, 4], layer, activation, init_scale=None)
    for p in field.parameters():
        nn.init.normal_(p, std=std)
    return field


class Plain(nn.Module):
    """The same field without its optimizations."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v: Tensor = self.field(t, x)
        return v


def gradients(field: nn.Module, solver: Solver, x: Tensor, trace: TraceRule | None = None) -> list[Tensor]:
    flow = Continuous(field, solver, trace or TraceRule("exact"))
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    z, log_det = flow.inverse(x)
    loss = (z.square().sum(1) * torch.arange(1.0, len(x) + 1) - 2 * log_det).mean()
    return list(torch.autograd.grad(loss, [x, *field.parameters()]))


class Wave(nn.Module):
    """dx/dt = a cos(3 t) x, with the solution x(t) = x0 exp(a sin(3 t) / 3) and the divergence d a cos(3 t)."""

    def __init__(self, a: float = 1.3) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.a * torch.cos(3 * t) * x

    def integrand(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        q = x.shape[-1] * self.a * torch.cos(3 * t)
        return self(t.unsqueeze(-1), x), q.expand(x.shape[:-1]).unsqueeze(-1)

    def problem(self, x: Tensor, t0: float = 0.0, t1: float = 1.0) -> Problem:
        return Problem(self, self.integrand, x, t0, t1, tuple(self.parameters()))

    def growth(self, t0: float, t1: float) -> Tensor:
        return (self.a * (math.sin(3 * t1) - math.sin(3 * t0)) / 3).exp()
