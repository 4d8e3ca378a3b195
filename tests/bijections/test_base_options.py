"""Solve options reach the solver through containers, including user containers with only forward and inverse."""

import pytest
import torch
from helpers.equations import random_field
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.squeeze import Squeeze
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import SolveOptions, Solver, ode_solver, record_solves


class Doubled(Bijection):
    """A user's container, which doubles the output of another bijection."""

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.inner = inner

    @property
    def solver(self) -> Solver:
        solver: Solver = self.inner.solver  # type: ignore[assignment]
        return solver

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.forward(z, label)
        return 2 * x, log_det + 2 * torch.tensor(2.0).log()

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse(x / 2, label)
        return z, log_det - 2 * torch.tensor(2.0).log()


class Shifted(Chain):
    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, label)
        return x + 3, log_det

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(x - 3, label)


class ShiftedContinuous(Continuous):
    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z, label)
        return x + 3, log_det

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(x - 3, label)


def block(field: nn.Module, kind: type[Continuous] = Continuous) -> Continuous:
    return kind(field, ode_solver("dopri5", rtol=1e-8), TraceRule("exact"))


@pytest.mark.parametrize("nested", [False, True])
def test_options_reach_an_ode_inside_a_container_with_forward_and_inverse_only(nested: bool) -> None:
    field, x = random_field(), torch.randn(5, 2)
    options = Regularizer(kinetic=1.0, jacobian=1.0).options(SolveOptions(rtol=1e-2, atol=1e-2))
    # each pass uses new blocks, because solves in training leave a step plan behind
    plain = block(field).train().pass_inverse(x, None, options)
    inner = Chain([Doubled(block(field)), Chain([])]) if nested else Doubled(block(field))
    with record_solves() as solves:
        wrapped = Chain([inner]).train().pass_inverse(2 * x, None, options)
    torch.testing.assert_close(wrapped.x, plain.x)
    (found,), (expected,) = wrapped.integrals, plain.integrals
    torch.testing.assert_close(found, expected)
    with record_solves() as tight:
        Chain([Doubled(block(field))]).train().pass_inverse(2 * x)
    assert solves[0].nfe_forward < tight[0].nfe_forward


def test_forward_passes_hand_options_down_too() -> None:
    field, z = random_field(), torch.randn(5, 2)
    options = Regularizer(kinetic=1.0).options(SolveOptions(rtol=1e-2, atol=1e-2))
    plain, wrapped = (b.train().pass_forward(z, None, options) for b in (block(field), Chain([Doubled(block(field))])))
    torch.testing.assert_close(wrapped.x, 2 * plain.x)
    torch.testing.assert_close(wrapped.integrals[0], plain.integrals[0])


@pytest.mark.parametrize("options", [SolveOptions(), SolveOptions(rtol=1e-9)])
@pytest.mark.parametrize("kind", ["chain", "continuous"])
def test_density_is_that_of_an_overridden_inverse(kind: str, options: SolveOptions) -> None:
    field, x = random_field(), torch.randn(5, 2)
    shifted = Shifted([block(field)]) if kind == "chain" else block(field, ShiftedContinuous)
    found = Flow((2,), shifted).eval().density_pass(x + 3, None, options).log_p
    torch.testing.assert_close(found, Flow((2,), block(field)).eval().log_prob(x), rtol=1e-6, atol=1e-6)


def test_solver_of_a_view_replaces_that_of_blocks_and_not_a_property() -> None:
    field = random_field()
    shared = block(field)
    flow = Flow((2,), Chain([Doubled(shared), shared])).eval()
    view = flow.with_solver(ode_solver("euler", steps=3))
    assert [b.solver.method for b in view.ode_blocks] == ["euler"]
    assert [b.solver.method for b in flow.ode_blocks] == ["dopri5"]
    assert all(p is q for p, q in zip(view.parameters(), flow.parameters(), strict=True))


def test_squeeze_hands_options_down() -> None:
    class Mean(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.sin(3 * x)

    inner = Continuous(Mean(), ode_solver("dopri5", rtol=1e-8), TraceRule("exact"))
    x = torch.randn(2, 1, 2, 2)
    options = Regularizer(kinetic=1.0).options(SolveOptions())
    assert Squeeze(inner).train().pass_inverse(x, None, options).integrals[0].shape == (2, 1)
