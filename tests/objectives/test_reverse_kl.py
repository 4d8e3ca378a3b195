"""The reverse KL: total gradient by finite differences, path gradient, annealing, and refused flows."""

import math
from copy import deepcopy

import pytest
import torch
from helpers.flows import VECTORS, continuous, flow_of
from torch import Tensor

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.data.base import Samples
from flowtrain.data.targets.base import FunctionTarget
from flowtrain.data.types import ColumnType
from flowtrain.flow import Flow
from flowtrain.objectives.reverse_kl import ReverseKL
from flowtrain.utils.errors import ConfigError

MODELS = ["ffjord", "realnvp", "glow", "nsf", "maf", "spline maf", "affine"]


def banana(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0].square() + (x[:, 1] - x[:, 0].square()).square())


def flow_in_float64(name: str) -> Flow:
    torch.manual_seed(0)
    return flow_of(VECTORS[name], Samples((2,)), ["solver.rtol=1e-9", "solver.train_rtol=1e-9"]).double()


def loss_of(flow: Flow, gradient: str, beta: float = 0.7, log_density=banana) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[no-untyped-def]
    objective = ReverseKL(flow, Regularizer(), FunctionTarget(log_density, 2), 10, gradient).train()
    objective.beta = beta
    torch.manual_seed(1)
    return objective(torch.zeros(20, 2))


def gradient_of(flow: Flow, gradient: str, **options: object) -> Tensor:
    loss = loss_of(flow, gradient, **options)[0]  # type: ignore[arg-type]
    parts = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("name", MODELS)
def test_total_gradient_agrees_with_finite_differences(name: str) -> None:
    flow = flow_in_float64(name)
    gradient = gradient_of(flow, "total")
    direction = torch.randn(len(gradient), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values, step = [], 1e-5
    for sign in (1, -1):
        moved = deepcopy(flow)
        start = torch.nn.utils.parameters_to_vector(flow.parameters())
        torch.nn.utils.vector_to_parameters(start + sign * step * direction, moved.parameters())
        values.append(loss_of(moved, "total")[0].item())
    torch.testing.assert_close(
        (gradient @ direction).item(), (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", MODELS)
def test_path_gradient_is_the_total_gradient_without_the_score(name: str) -> None:
    flow = flow_in_float64(name)
    total, path = gradient_of(flow, "total"), gradient_of(flow, "path")
    torch.manual_seed(1)
    flow.train()
    x = flow.sample_pass(flow.base.rsample(20, like=flow.like)).x.detach()
    log_q = flow.density_pass(x).log_p.mean()
    parts = torch.autograd.grad(log_q, list(flow.parameters()), allow_unused=True, materialize_grads=True)
    score = torch.cat([part.flatten() for part in parts])
    assert score.norm() > 1e-3
    tolerance = 1e-6 if name == "ffjord" else 1e-9
    torch.testing.assert_close(path, total - score, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["ffjord", "nsf", "maf"])
def test_path_gradient_is_zero_if_the_flow_equals_the_target(name: str) -> None:
    flow = flow_in_float64(name)
    target = deepcopy(flow).train()

    def log_density(x: Tensor) -> Tensor:
        return target.density_pass(x).log_p + 3.0

    path = gradient_of(flow, "path", beta=1.0, log_density=log_density)
    total = gradient_of(flow, "total", beta=1.0, log_density=log_density)
    assert float(path.abs().max()) < (1e-6 if name == "ffjord" else 1e-10)
    assert float(total.abs().max()) > 1e-2
    loss, terms = loss_of(flow, "path", 1.0, log_density)
    torch.testing.assert_close(loss.item(), -3.0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(terms["nll"].item(), -3.0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradient", ["path", "total"])
def test_value_of_the_loss_is_annealed_but_nll_is_not(gradient: str) -> None:
    flow = flow_in_float64("nsf")
    loss, terms = loss_of(flow, gradient, beta=0.25)
    torch.manual_seed(1)
    z = flow.base.rsample(20, like=flow.like)
    x, log_det = flow.bijection(z)
    log_q = flow.base.log_prob(z) - log_det
    torch.testing.assert_close(loss, (log_q - 0.25 * banana(x)).mean())
    torch.testing.assert_close(terms["nll"], (log_q - banana(x)).mean())


def test_columns_with_bounds() -> None:
    """The loss of a flow that equals an exponential density is -log Z, with a path gradient of zero."""
    types = (ColumnType.parse("positive"),)
    flow = flow_of(VECTORS["affine"], Samples((1,), types=types), []).double()

    # the affine flow on the line of log x is a lognormal density
    target = deepcopy(flow).train()
    objective = ReverseKL(flow, Regularizer(), FunctionTarget(lambda x: target.density_pass(x).log_p, 1, types), 10)
    loss = objective.train()(torch.zeros(50, 1))[0]
    parts = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True, materialize_grads=True)
    assert abs(loss.item()) < 1e-12
    assert max(float(part.abs().max()) for part in parts) < 1e-12


@pytest.mark.parametrize(("anneal", "betas"), [(0.0, [1, 1, 1]), (0.5, [0.1, 0.55, 1]), (10, [0.1, 0.55, 1])])
def test_beta_grows_from_anneal_from_to_one(anneal: float, betas: list[float]) -> None:
    objective = ReverseKL(flow_in_float64("affine"), Regularizer(), FunctionTarget(banana, 2), 20, anneal=anneal)
    found = []
    for step in (0, 5, 10):
        objective.follow_schedule(step)
        found.append(objective.beta)
    torch.testing.assert_close(found, [float(beta) for beta in betas])


def test_refused_flows() -> None:
    target = FunctionTarget(lambda x: -x.square().sum(1), 3)
    estimated = Flow((3,), continuous(3, train="hutchinson"))
    with pytest.raises(ConfigError, match=r"model\.trace"):
        ReverseKL(estimated, Regularizer(), target, 10)
    with pytest.raises(ConfigError, match="3 columns"):
        ReverseKL(flow_in_float64("nsf"), Regularizer(), target, 10)
    with pytest.raises(ConfigError, match="steer"):
        ReverseKL(Flow((3,), continuous(3, train="exact")), Regularizer(end_time=0.5), target, 10)
    conditional = flow_of([*VECTORS["nsf"], "model.conditional=true"], Samples((2,), classes=2), [])
    with pytest.raises(ConfigError, match="conditional"):
        ReverseKL(conditional, Regularizer(), FunctionTarget(banana, 2), 10)
    with pytest.raises(ConfigError, match="regularizer"):
        ReverseKL(flow_in_float64("nsf"), Regularizer(kinetic=0.1), FunctionTarget(banana, 2), 10)


def test_kinetic_energy_is_a_penalty() -> None:
    flow = Flow((2,), continuous(2, train="exact"))
    objective = ReverseKL(flow, Regularizer(kinetic=0.5), FunctionTarget(banana, 2), 10, "total").train()
    loss, terms = objective(torch.zeros(20, 2))
    assert terms["kinetic"].item() > 0
    torch.testing.assert_close(loss, terms["nll"] + 0.5 * terms["kinetic"])


def test_guard_checks_samples_of_the_flow() -> None:
    flow = flow_in_float64("affine")
    objective = ReverseKL(flow, Regularizer(), FunctionTarget(banana, 2), 10)
    torch.manual_seed(0)
    rows = objective.rows_to_check(torch.full((5, 2), math.nan))
    torch.manual_seed(0)
    torch.testing.assert_close(rows, flow.sample(5))
