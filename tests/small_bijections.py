"""Bijections with random parameters."""

import torch

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import Solver, ode_solver


def perturbed(module: Bijection, std: float = 0.4) -> Bijection:
    """With random parameters: at its start a bijection may be the identity, which hides mistakes."""
    for p in module.parameters():
        with torch.no_grad():
            p.add_(std * torch.randn_like(p))
    return module


def continuous(d: int, solver: Solver | None = None, **rule: object) -> Continuous:
    field = MLPField(d, [8, 8], "concatsquash", "tanh")
    perturbed(field, 0.5)  # type: ignore[arg-type]
    return Continuous(field, solver or ode_solver("dopri5", rtol=1e-9), TraceRule(**rule))  # type: ignore[arg-type]
