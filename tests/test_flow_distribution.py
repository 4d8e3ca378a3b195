"""Flows behave like other torch objects: as distributions, and with generators, copies, pickles and dtypes."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributions as D
from helpers.flows import IMAGES, TIGHT, continuous, flow_of, vectors
from torch import Tensor, nn

from flowtrain.bases import GaussianMixture, StudentT
from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.support import ToSupport
from flowtrain.data.base import Samples
from flowtrain.data.types import ColumnType
from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.flow import Flow, FlowDistribution
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.process import seeded, seeding_active


def affine(d: int = 2) -> Flow:
    flow = Flow((d,), Affine(d))
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    return flow.eval()


def gaussian(flow: Flow) -> D.MultivariateNormal:
    """Returns the distribution of an affine flow."""
    assert isinstance(flow.bijection, Affine)
    # torch cannot validate the values of empty tensors
    return D.MultivariateNormal(flow.bijection.mean, scale_tril=flow.bijection.factor(), validate_args=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0)])
def test_distribution_equals_torch_multivariate_normal(batch: tuple[int, ...]) -> None:
    flow = affine()
    ours, theirs = flow.distribution(), gaussian(flow)
    x = torch.randn(*batch, 2)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    for name in ("sample", "rsample"):
        found, expected = getattr(ours, name)(torch.Size(batch)), getattr(theirs, name)(torch.Size(batch))
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert (ours.event_shape, ours.batch_shape, ours.has_rsample) == (theirs.event_shape, theirs.batch_shape, True)
    assert ours.arg_constraints == {}


@pytest.mark.parametrize("batch", [(4,), (3, 4), (1,)])
def test_expanded_distribution_broadcasts_like_torch(batch: tuple[int, ...]) -> None:
    flow = affine()
    ours, theirs = (p.expand(batch) for p in (flow.distribution(), gaussian(flow)))
    assert isinstance(ours, FlowDistribution)
    assert ours.batch_shape == theirs.batch_shape
    assert ours.sample((7,)).shape == theirs.sample((7,)).shape
    for shape in ((2,), (*batch, 2), (5, *batch, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    wider = ours.expand((6, *batch))
    assert wider.sample().shape == (6, *batch, 2)
    # samples of different batch elements are independent
    assert len(wider.sample().flatten(0, -2).unique(dim=0)) == 6 * math.prod(batch)
    for p in (wider, theirs.expand((6, *batch))):
        with pytest.raises(RuntimeError, match="expand"):
            p.expand((2,))


def test_distribution_composes_with_torch_distributions() -> None:
    flow = affine()
    p, truth, x = flow.distribution(), gaussian(flow), torch.randn(5, 3, 2)
    torch.testing.assert_close(D.Independent(p.expand((3,)), 1).log_prob(x), truth.log_prob(x).sum(1))
    moved = D.TransformedDistribution(p, [D.AffineTransform(1.0, 3.0, event_dim=1)])
    torch.testing.assert_close(moved.log_prob(x), truth.log_prob((x - 1) / 3) - 2 * math.log(3))
    assert moved.sample((4,)).shape == (4, 2)


def test_methods_without_closed_form_raise_not_implemented() -> None:
    p = affine().distribution()
    asked: list[Callable[[], object]] = [
        lambda: p.mean,
        lambda: p.variance,
        p.entropy,
        p.enumerate_support,
        lambda: p.cdf(torch.zeros(2)),
        lambda: D.kl_divergence(p, p),
    ]
    for ask in asked:
        with pytest.raises(NotImplementedError):
            ask()
    assert not p.has_enumerate_support


def test_monte_carlo_kl_matches_the_closed_form() -> None:
    flow, other = affine(), affine()
    p, q = flow.distribution(), other.distribution()
    x = p.sample((20_000,))
    gap = (p.log_prob(x) - q.log_prob(x)).detach()
    expected = float(D.kl_divergence(gaussian(flow), gaussian(other)).detach())
    assert float(gap.mean()) == pytest.approx(expected, abs=4 * float(gap.std()) / len(gap) ** 0.5)


def test_sample_is_detached_and_rsample_has_gradients() -> None:
    p = vectors("realnvp").distribution().expand((3,))
    assert not p.sample((2,)).requires_grad
    assert p.rsample((2,)).requires_grad
    assert p.log_prob(p.sample()).requires_grad
    mixture = D.MixtureSameFamily(D.Categorical(torch.ones(3)), p)
    x = mixture.sample((4,))
    assert x.shape == (4, 2)
    # all components are equal
    torch.testing.assert_close(mixture.log_prob(x), p.log_prob(x[:, None])[:, 0])


def test_wrong_shapes_are_refused_like_torch() -> None:
    flow = affine()
    for p in (flow.distribution(), D.MultivariateNormal(torch.zeros(2), torch.eye(2))):
        for bad in (torch.zeros(3), torch.tensor(1.0), 1.0, [0.0, 0.0]):
            with pytest.raises(ValueError, match="value"):
                p.log_prob(bad)
    unchecked = FlowDistribution(flow, validate_args=False)
    with pytest.raises(FlowtrainError, match="shape"):
        unchecked.log_prob(torch.zeros(4, 3))
    assert unchecked.log_prob(torch.tensor([0.0, torch.nan])).isnan()
    for p in (unchecked, FlowDistribution(flow, validate_args=True)):
        assert p.expand((2,))._validate_args == p._validate_args


def test_distribution_repr_contains_its_shapes() -> None:
    p = vectors("realnvp", classes=3).distribution(2).expand((4,))
    for words in ("context: 2", "[4]", "[2]"):
        assert words in repr(p)


@pytest.fixture
def pyro() -> Any:
    found = pytest.importorskip("pyro")
    found.clear_param_store()
    return found


def test_distribution_works_in_pyro(pyro: Any) -> None:
    flow = affine()
    p, truth = flow.distribution(), gaussian(flow)

    def model() -> Tensor:
        with pyro.plate("rows", 5):
            x: Tensor = pyro.sample("x", p)
        return x

    trace = pyro.poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 2)
    torch.testing.assert_close(trace.log_prob_sum(), truth.log_prob(x).sum())
    # if the guide equals the posterior, the ELBO has no noise
    loss = pyro.infer.Trace_ELBO().differentiable_loss(model, model)
    torch.testing.assert_close(loss.detach(), torch.zeros(()))


def test_pyro_reshapes_and_copies_a_distribution(pyro: Any) -> None:
    flow = affine()
    p, x = flow.distribution(), torch.randn(4, 3, 2)
    expected = gaussian(flow).log_prob(x)
    events = p.expand_by([3]).to_event(1)
    assert (events.batch_shape, events.event_shape) == ((), (3, 2))
    torch.testing.assert_close(events.log_prob(x), expected.sum(1))
    torch.testing.assert_close(p.mask(torch.tensor([True, False, True])).log_prob(x)[:, 1], torch.zeros(4))
    for other in (pickle.loads(pickle.dumps(p.expand((3,)))), copy.deepcopy(p).expand((3,))):
        assert type(other) is type(p)
        assert other.flow is not flow
        torch.testing.assert_close(other.log_prob(x), expected)


def test_flow_works_as_a_pyro_guide(pyro: Any) -> None:
    """For x ~ N(0, I) and y | x ~ N(x0 + x1, 1/2), the posterior is Gaussian, which an affine flow can represent."""
    flow, y = affine().train(), torch.tensor(1.5)
    normal = pyro.distributions.Normal

    def model() -> None:
        x = pyro.sample("x", normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", normal(x.sum(-1), 0.5), obs=y)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("x", flow.distribution())

    # y ~ N(0, 2 + 1/4)
    evidence = float(D.Normal(0.0, 1.5).log_prob(y))
    elbo = pyro.infer.Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    first, *_, last = (svi.step() for _ in range(200))
    assert last == pytest.approx(-evidence, abs=0.05)
    assert first > last + 0.1


def test_distribution_validates_its_support() -> None:
    p = affine().distribution()
    assert p.support.check(torch.randn(4, 2)).tolist() == [True] * 4
    assert p.support.event_dim == 1
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor([[0.0, torch.nan]]))
    flow = Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), integer_valued=True, levels=4).eval()
    p = flow.distribution()
    assert p.support.check(torch.tensor([[0.0, 4.0], [1.0, 4.1]])).tolist() == [True, False]
    assert p.log_prob(torch.randint(0, 4, (3, 2))).shape == (3,)


def test_support_is_the_range_of_the_column_types() -> None:
    types = [ColumnType.parse(each) for each in ("positive", "interval(0,1)", "integer(1,6)", "real")]
    bijection = ToSupport(*zip(*(one.support for one in types), strict=True), whole=[2])
    flow = Flow((4,), bijection, noisy=(2,), types=types).eval()
    p = flow.distribution()
    inside = torch.tensor([[1.0, 0.0, 1.0, -5.0], [2.0, 1.0, 6.9, 0.0]])
    outside = inside[0] + torch.tensor([[-1.0, 0, 0, 0], [0, 1.1, 0, 0], [0, 0, 6, 0], [0, 0, 0, math.nan]])
    assert p.support.event_dim == 1
    assert p.support.check(torch.stack([inside, inside])).tolist() == [[True, True]] * 2
    assert p.support.check(outside).tolist() == [False] * 4
    assert p.log_prob(inside).isfinite().all()
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(outside[:1])
    assert p.support.check(p.sample((50,))).all()


def test_conditional_distribution_requires_a_label() -> None:
    flow = vectors("realnvp", classes=3)
    p, x = flow.distribution(1), torch.randn(2, 4, 2)
    torch.testing.assert_close(p.log_prob(x), flow.log_prob(x.view(8, 2), 1).view(2, 4))
    torch.manual_seed(0)
    expected = flow.sample(4, label=1)
    torch.manual_seed(0)
    assert torch.equal(p.sample((4,)), expected)
    for label in (None, 3):
        with pytest.raises(FlowtrainError, match="label"):
            flow.distribution(label)
    with pytest.raises(FlowtrainError, match="not conditional"):
        affine().distribution(1)


@pytest.mark.parametrize("name", ["ffjord", "realnvp", "glow"])
def test_rsample_gradient_matches_finite_differences(name: str) -> None:
    flow, f = vectors(name), lambda x: (x.sin() * torch.tensor([1.0, 2.0])).sum()
    # samples without gradients are computed by other operations
    without = flow.sample(3, generator=generator())
    torch.testing.assert_close(flow.rsample(3, generator=generator()).detach(), without)
    p = max(flow.parameters(), key=lambda p: p.numel())
    index = tuple(torch.tensor(p.shape) // 2)
    (gradient,) = torch.autograd.grad(f(flow.rsample(3, generator=generator())), p, allow_unused=True)
    values = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            p[index] += step
            values.append(float(f(flow.sample(3, generator=generator()))))
            p[index] -= step
    assert float(gradient[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_rsample_gradient_reaches_the_base_parameters() -> None:
    for base in (StudentT((2,), 4.0, trainable=True), GaussianMixture(2, 3)):
        flow = Flow(base, Affine(2))
        flow.rsample(5).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.base.parameters())
    assert not flow.sample(2).requires_grad


def test_entropy_gradient_matches_the_gaussian() -> None:
    """Variational inference needs this gradient of the reverse KL divergence by reparametrization."""
    flow = affine()
    p = flow.distribution()
    x = p.rsample((2000,))
    ours = torch.autograd.grad(-p.log_prob(x).mean(), list(flow.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(gaussian(flow).entropy(), list(flow.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        expected = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-6)


def test_generator_determines_the_samples() -> None:
    flows = [affine(), vectors("realnvp", classes=3), Flow(GaussianMixture(2, 2), Affine(2))]
    for flow in flows:
        flow.class_counts = (1, 2, 3) if flow.classes else ()
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        first = flow.sample(9, generator=generator(4))
        assert torch.equal(first, flow.sample(9, generator=generator(4)))
        assert torch.equal(first, flow.sample(9, generator=generator(4), chunk=2))
        assert torch.equal(torch.rand(2), expected)
        assert not torch.equal(first, flow.sample(9, generator=generator(5)))
    # a generator in the same state as the global generator gives the same samples
    torch.manual_seed(7)
    assert torch.equal(flows[0].sample(9), flows[0].sample(9, generator=generator(7)))


def every_flow() -> dict[str, Callable[[], Flow]]:
    images = Samples((1, 4, 4), integer_valued=True, levels=16)
    return {
        **{name: partial(vectors, name) for name in ("ffjord", "realnvp", "glow")},
        "images": partial(flow_of, IMAGES["glow"], images, TIGHT),
        "student": lambda: Flow(StudentT((2,), 3.0), Affine(2)),
        "mixture": lambda: Flow(GaussianMixture(2, 3), Affine(2)),
    }


@pytest.fixture(params=every_flow())
def flow(request: pytest.FixtureRequest) -> Flow:
    return every_flow()[request.param]().eval()


def points(flow: Flow) -> Tensor:
    """Returns points at which the flow has a density."""
    x = flow.sample(3, generator=generator())
    return x if flow.levels is None else x.clamp(0.1, flow.levels - 0.1)


def test_copies_and_pickles_are_equal_and_independent(flow: Flow) -> None:
    x = points(flow)
    expected = flow.log_prob(x).detach()
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for other in (copy.deepcopy(flow), torch.load(file, weights_only=False)):
        assert torch.equal(other.log_prob(x), expected)
        assert torch.equal(other.sample(3, generator=generator(1)), flow.sample(3, generator=generator(1)))
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1)
        assert not torch.equal(other.log_prob(x), expected)
        assert torch.equal(flow.log_prob(x), expected)


def test_state_dict_restores_the_whole_flow(flow: Flow) -> None:
    x, other = points(flow), copy.deepcopy(flow)
    expected = flow.log_prob(x).detach()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    assert not torch.equal(other.log_prob(x), expected)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), expected)


def test_deepcopy_has_independent_step_plans() -> None:
    flow = vectors("ffjord").train()
    flow.log_prob(torch.randn(5, 2))
    before = [plan.steps for plan in flow.step_plans]
    assert any(before)
    other = copy.deepcopy(flow)
    assert [plan.steps for plan in other.step_plans] == before
    other.log_prob(30 * torch.randn(50, 2))
    assert [plan.steps for plan in other.step_plans] != before
    assert [plan.steps for plan in flow.step_plans] == before
    assert other.solver is not flow.solver


def test_copy_of_a_compiled_flow_uses_the_copied_field() -> None:
    """A compiled function is bound to the field it was compiled from and cannot be pickled."""
    flow = vectors("ffjord").train()
    (block,) = flow.ode_blocks
    field = block.field
    block.compiled = (lambda t, x: field(t, x), lambda *arguments: None)
    torch.save(flow, io.BytesIO())
    (copied,) = copy.deepcopy(flow).ode_blocks
    with torch.no_grad():
        for p in copied.field.parameters():
            p.zero_()
    assert not copied.velocity()(torch.tensor(0.5), torch.randn(3, 2)).any()


def test_dtype_conversion_is_reversible(flow: Flow) -> None:
    x = points(flow)
    expected, drawn = flow.log_prob(x).detach(), flow.sample(3, generator=generator())
    single = flow.float()
    log_p = single.log_prob(x)
    assert log_p.dtype == single.sample(2).dtype == single.rsample(2).dtype == torch.float32
    torch.testing.assert_close(log_p.double(), expected, rtol=2e-3, atol=2e-3)
    double = single.double().to("cpu")
    assert double.log_prob(x).dtype == double.distribution().sample().dtype == torch.float64
    torch.testing.assert_close(double.log_prob(x), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(double.sample(3, generator=generator()), drawn, rtol=2e-3, atol=2e-3)


def wide(d: int = 130) -> Flow:
    """Returns a flow that estimates its trace at evaluation."""
    field = MLPField(d, [4], "concatsquash", "tanh")
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    return Flow((d,), Chain([Continuous(field, ode_solver("rk4", steps=2), TraceRule())]))


def test_hutchinson_log_prob_is_deterministic_in_eval_mode() -> None:
    flow, x = wide().eval(), torch.randn(4, 130)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = flow.log_prob(x)
    assert torch.equal(flow.log_prob(x), first)
    assert torch.equal(torch.rand(3), expected)
    # training draws new probes for each call, because the noise must average out
    flow.train()
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))


def test_evaluation_seed_determines_the_probes() -> None:
    flow, x = wide().eval(), torch.randn(4, 130)
    one, same, other = (log_probs(flow, x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with seeded(1, x.device):
        assert seeding_active()
        inside = flow.log_prob(x)
        # the next call draws other probes
        assert not torch.equal(flow.log_prob(x), inside)
    assert torch.equal(inside.detach(), one)
    assert not seeding_active()


def test_exact_log_prob_does_not_depend_on_the_seed() -> None:
    flow = Flow((2,), Chain([continuous(2)])).eval()
    x = torch.randn(3, 2)
    with seeded(5, x.device):
        inside = flow.log_prob(x)
    assert torch.equal(flow.log_prob(x), inside)
