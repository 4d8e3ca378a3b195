"""Periodic fields: period, JVPs, kernels and tapes against autograd."""

import math

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import PATHS
from flowtrain.nn import mlp_kernels
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import LAYERS
from flowtrain.nn.periodic_field import PeriodicField, PeriodicRecorder
from flowtrain.nn.velocity_field import field_jvp
from flowtrain.ode import SolveOptions, ode_solver


class Plain(nn.Module):
    """A module with the velocity of a field, without `jvp` and without a tape."""

    def __init__(self, field: PeriodicField, context: Tensor | None) -> None:
        super().__init__()
        self.field, self.context = field, context

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v: Tensor = (self.field if self.context is None else self.field.given(self.context))(t, x)
        return v


class ByAutograd(PeriodicField):
    """A `PeriodicField` that is differentiated by autograd, without kernels and tapes."""

    def can_use_kernels(self, t: Tensor, x: Tensor) -> bool:
        return False


def random(field: PeriodicField) -> PeriodicField:
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    return field


@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("per_row", [False, True])
def test_jvp_matches_the_jacobian(layer: str, per_row: bool) -> None:
    field, x = random(PeriodicField(3, [0, 2], [5, 4], layer)), 3 * torch.randn(4, 3)
    t = torch.rand(4) if per_row else torch.rand(())
    tangents = torch.randn(2, 4, 3)
    v, je = field_jvp(field, t, x, tangents)
    torch.testing.assert_close(v, field(t, x))
    for i in range(4):
        at = t[i] if per_row else t
        j = torch.autograd.functional.jacobian(lambda y, at=at: field(at, y.unsqueeze(0)).squeeze(0), x[i])
        assert isinstance(j, Tensor)
        torch.testing.assert_close(je[:, i], tangents[:, i] @ j.T)
    turns = 2 * math.pi * torch.tensor([1.0, 0.0, -3.0])
    torch.testing.assert_close(field(t, x + turns), v)
    assert (field(t, x + torch.tensor([0.0, 2 * math.pi, 0.0])) - v).abs().max() > 1e-3


def test_gradient_of_the_divergence_includes_the_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    # the limit is low, so that each node is a block
    monkeypatch.setattr(mlp_kernels, "BLOCK", 1)
    field, x, t = random(PeriodicField(3, [0, 2], [5, 4])), torch.randn(2, 4, 3, requires_grad=True), torch.rand(2, 1)
    found = []
    for each in (field, Plain(field, None)):
        v, je = field_jvp(each, t, x, torch.eye(3).view(3, 1, 1, 3))
        loss = (v.square() + je.square().sum(0)).sum() + je.diagonal(dim1=0, dim2=-1).sum()
        found.append([v, je, *torch.autograd.grad(loss, [x, *field.parameters()], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", ["direct", "replay"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("context", [None, "labels", "features"])
def test_solve_has_the_gradients_of_autograd(gradient: str, trace: str, context: str | None) -> None:
    start = torch.randn(6, 3)
    given = {None: None, "labels": torch.randint(2, (6,)), "features": torch.randn(6, 2)}[context]
    classes = None if context is None else 2
    fields = [kind(3, [0, 2], [5, 4], classes=classes, init_scale=None) for kind in (PeriodicField, ByAutograd)]
    random(fields[0])
    fields[1].load_state_dict(fields[0].state_dict())
    recorder = fields[0].recorder() if given is None else fields[0].given(given).recorder()
    assert isinstance(recorder, PeriodicRecorder)
    found = []
    for field in fields:
        x = start.clone().requires_grad_()
        flow = Continuous(field, ode_solver("dopri5", gradient, rtol=1e-4), TraceRule(trace))
        torch.manual_seed(1)
        z, log_det, (paths,) = flow.pass_inverse(x, given, SolveOptions(integrals=PATHS))
        loss = z.square().sum(1) @ torch.arange(1.0, 7.0) - log_det.sum() + 0.1 * paths.sum()
        found.append([z, log_det, paths, *torch.autograd.grad(loss, [x, *field.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
