"""Flow matching: its minimizer, its loss against a hand computation, its times and its couplings."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.regularizers import Regularizer, spectral
from flowtrain.bijections.scale import Standardize
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.objectives.flow_matching import CONTEXT_RADIUS, Ends, FlowMatching, optimal, stratified
from flowtrain.ode import ode_solver, record_solves
from flowtrain.runs.build import build_flow, build_objective
from flowtrain.utils.errors import ConfigError


class GaussianField(nn.Module):
    """The minimizer E[x1 - x0 | x_t] in closed form, for independent x0 ~ N(0, 1) and x1 ~ N(m, s^2) per coordinate."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m, self.s = m, s
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(-1, 1) if t.dim() else t
        variance = (1 - t) ** 2 + (t * self.s) ** 2
        return self.m + (t * self.s**2 - (1 - t)) / variance * (x - t * self.m) + 0 * self.unused


def test_exact_field_gives_the_data_density(flow_with_field: Callable[..., Flow]) -> None:
    """Theorem 1 of Lipman et al.: with the exact field of a Gaussian, the flow has the density of the Gaussian."""
    flow = flow_with_field(GaussianField(1.5, 0.4)).eval()
    x = 1.5 + 0.4 * torch.randn(200, 2)
    expected = torch.distributions.Normal(1.5, 0.4).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-6, atol=1e-6)


def test_exact_field_has_the_minimal_loss(flow_with_field: Callable[..., Flow]) -> None:
    """The minimal loss is E Var[x1 - x0 | x_t] = 2 int_0^1 s^2 / ((1 - t)^2 + t^2 s^2) dt."""
    s, n = 0.4, 200_000
    x = 1.5 + s * torch.randn(n, 2)

    def loss(m: float, spread: float) -> float:
        torch.manual_seed(1)
        return FlowMatching(flow_with_field(GaussianField(m, spread)), Regularizer())(x)[0].item()

    t = (torch.arange(10_000) + 0.5) / 10_000
    least = float((2 * s**2 / ((1 - t) ** 2 + (t * s) ** 2)).mean())
    assert loss(1.5, s) == pytest.approx(least, rel=0.01)
    assert min(loss(1.7, s), loss(1.3, s), loss(1.5, 0.5), loss(1.5, 0.3)) > loss(1.5, s)


def test_loss_and_gradient_match_hand_computation(
    linear_field: type[nn.Module], flow_with_field: Callable[..., Flow]
) -> None:
    field = linear_field(torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.1], [-0.4, 0.2]]))
    objective = FlowMatching(flow_with_field(field), Regularizer())
    x = torch.randn(50, 2)
    torch.manual_seed(3)
    loss, terms = objective(x)
    loss.backward()
    torch.manual_seed(3)
    x0, t = torch.randn(50, 2), stratified(50, x).unsqueeze(1)
    at = (1 - t) * x0 + t * x
    error = field.a + at @ field.b.T - (x - x0)
    assert set(terms) == {"matching"}
    torch.testing.assert_close(loss, error.square().sum(1).mean())
    torch.testing.assert_close(field.a.grad, 2 * error.mean(0))
    torch.testing.assert_close(field.b.grad, 2 * error.T @ at / 50)


def test_only_the_field_receives_gradients_and_no_ode_is_solved(flow_with_field: Callable[..., Flow]) -> None:
    after = Affine(2)
    objective = FlowMatching(flow_with_field(MLPField(2, [8], "concat", "tanh"), after=(after,)), Regularizer()).train()
    with record_solves() as solves:
        objective(torch.randn(10, 2))[0].backward()
    assert solves == []
    assert all(p.grad is None for p in after.parameters())
    assert all(p.grad is not None for p in objective.ends.ode_block.field.parameters())


def test_times_are_stratified_and_uniform() -> None:
    t = torch.stack([stratified(20, torch.zeros(())) for _ in range(500)])
    assert bool((t.sort(1).values * 20).floor().eq(torch.arange(20)).all())
    # the times of each row cover the whole interval over many batches
    assert float(t[:, 0].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(t[:, 0].var()) == pytest.approx(1 / 12, rel=0.15)


def test_optimal_coupling_has_the_minimal_cost() -> None:
    z, x = torch.randn(7, 2), 2 * torch.randn(7, 2) + 1

    def cost(order: tuple[int, ...]) -> float:
        return float((z[list(order)] - x).square().sum())

    best = min(itertools.permutations(range(7)), key=cost)
    assert torch.equal(optimal(z, x), z[list(best)])


def test_optimal_coupling_of_images_is_a_permutation() -> None:
    z, x = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    found = optimal(z, x)
    assert found.shape == z.shape
    assert {tuple(row.flatten().tolist()) for row in found} == {tuple(row.flatten().tolist()) for row in z}


def test_missing_scipy_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"flowtrain\[ot\]"):
        optimal(torch.randn(3, 2), torch.randn(3, 2))


def test_optimal_coupling_stays_within_classes() -> None:
    """The base points of a class must have the base distribution, from which its samples are drawn."""
    field = MLPField(2, [8], "concat", "tanh", classes=2)
    flow = Flow((2,), Chain([Continuous(field, ode_solver("dopri5"), TraceRule("exact"))]), classes=2)
    label = torch.arange(200) % 2
    # the classes are far apart: pairing across classes would send all base points left of 0 to class 0
    x = torch.randn(200, 2) * 0.1 + (2.0 * label - 1).unsqueeze(1)
    x0, x1, labels = FlowMatching(flow, Regularizer(), "optimal").pairs(x, label)
    assert labels is not None
    assert torch.equal(x1, x)
    for y in (0, 1):
        assert float(x0[labels == y].mean()) == pytest.approx(0, abs=0.3)
    # within a class, base points are paired with near samples
    assert float((x0 - x1)[labels == 0].square().sum()) < float((torch.randn(100, 2) - x1[labels == 0]).square().sum())


def test_endpoints_are_mapped_through_the_ode_block(
    flow_with_field: Callable[..., Flow], linear_field: type[nn.Module]
) -> None:
    before, after, scale = Affine(2), Affine(2), Standardize((2,))
    with torch.no_grad():
        for p in (*before.parameters(), *after.parameters()):
            p.add_(0.3 * torch.randn_like(p))
    scale.fit(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5]))
    flow = flow_with_field(
        linear_field(torch.ones(2), -torch.eye(2)), before=(before,), after=(Chain([after]), scale)
    ).eval()
    ends, z = Ends(flow), torch.randn(5, 2)
    x = flow(z)
    x0, x1 = ends.from_base(z, None), ends.from_data(x, None)
    torch.testing.assert_close(ends.ode_block.map_forward(x0), x1)


@pytest.mark.parametrize(
    ("bijection", "words"),
    [
        (lambda: Chain([Affine(2)]), "has 0"),
        (lambda: Chain([continuous(), continuous()]), "has 2"),
        (lambda: Nested(continuous()), "has 1"),
    ],
)
def test_unsuitable_flows_are_refused(bijection: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FlowMatching(Flow((2,), bijection()), Regularizer())


def continuous() -> Continuous:
    return Continuous(MLPField(2, [4], "concat", "tanh"), ode_solver("dopri5"), TraceRule("exact"))


class Nested(Affine):
    """A bijection other than a chain that contains a continuous part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(2)
        self.inner = inner


@pytest.mark.parametrize("key", ["kinetic", "jacobian", "acceleration", "end_time"])
def test_path_regularizers_are_refused(key: str, flow_with_field: Callable[..., Flow]) -> None:
    with pytest.raises(ConfigError, match="solves no ODE"):
        FlowMatching(flow_with_field(MLPField(2, [4], "concat", "tanh")), Regularizer(**{key: 0.1}))


def test_spectral_norm_is_added_to_the_matching_loss(flow_with_field: Callable[..., Flow]) -> None:
    field = MLPField(2, [4], "concat", "tanh")
    objective = FlowMatching(flow_with_field(field), Regularizer(spectral=0.3))
    loss, terms = objective(torch.randn(9, 2))
    torch.testing.assert_close(terms["spectral"], spectral(field))
    torch.testing.assert_close(loss, terms["matching"] + 0.3 * terms["spectral"])


def test_initial_ridges_of_the_field_cover_the_data() -> None:
    """The ridges w x + b = 0 lie at distances -b / |w| that spread like the data along w, not all near 0."""
    torch.manual_seed(0)
    layer = MLPField(3, [4000, 2], "concatsquash", "tanh", init_scale=1.5).requires_grad_(False).body[0].linear
    norms = layer.weight.norm(dim=1)
    assert float(norms.square().mean().sqrt()) == pytest.approx(1.5 * 2**0.5, rel=0.05)
    assert float((-layer.bias / norms).std()) == pytest.approx(2, rel=0.05)


def test_conditional_image_flow_has_a_finite_matching_loss(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    samples = Samples((1, 4, 4), integer_valued=True, levels=16, classes=3)
    keys = ["model.field=concat", "model.activation=softplus", "model.scales=0", "model.conditional=true"]
    config = compose_defaults(["objective=flow_matching", *keys, "model.hidden=[4]"])
    flow = build_flow(config, samples)
    x, label = torch.randint(16, (9, 1, 4, 4), dtype=torch.uint8), torch.arange(9) % 3
    flow.bijection.initialize(flow.dequantized(x), label)
    loss, _ = build_objective(config, flow).train()(x, label)
    loss.backward()
    assert bool(torch.isfinite(loss))
    with pytest.raises(ConfigError, match="scales=0"):
        build_objective(config, build_flow({**config, "model": {**config["model"], "scales": 1}}, samples))


def test_optimal_coupling_pairs_only_similar_contexts() -> None:
    """The base points of a context must be standard normal, so only rows with similar contexts exchange them."""
    n = 400
    context = torch.rand(n, 2)
    x, z = 10 * context[:, :1] + 0.1 * torch.randn(n, 1), torch.randn(n, 1)
    paired = optimal(z, x, context)
    source = (paired == z.T).float().argmax(1)
    assert sorted(source.tolist()) == list(range(n))
    assert float((context - context[source]).norm(dim=1).max()) <= CONTEXT_RADIUS
    moved = source != torch.arange(n)
    assert float(moved.float().mean()) > 0.2
    # the pairing without context makes the base points depend on the context
    assert abs(float(torch.corrcoef(torch.stack([optimal(z, x)[:, 0], context[:, 0]]))[0, 1])) > 0.9
    assert abs(float(torch.corrcoef(torch.stack([paired[:, 0], context[:, 0]]))[0, 1])) < 0.3
    cost = ((paired - x) ** 2).sum()
    assert float(cost) < float(((z - x) ** 2).sum())


def test_categories_are_paired_within_each_category() -> None:
    context = torch.nn.functional.one_hot(torch.arange(60) % 3, 3).double()
    x, z = torch.randn(60, 2), torch.randn(60, 2)
    paired = optimal(z, x, context)
    for k in range(3):
        rows = context[:, k] == 1
        torch.testing.assert_close(paired[rows], optimal(z[rows], x[rows]))
