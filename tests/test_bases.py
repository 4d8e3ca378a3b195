"""Bases agree with torch.distributions, SciPy and finite differences."""

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import integrate, stats
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor, nn

from flowtrain.bases import (
    Base,
    ConditionalMixture,
    GaussianMixture,
    MixtureOfRows,
    NormalUniform,
    StandardNormal,
    StudentT,
    UniformBox,
    incomplete_beta,
)
from flowtrain.utils.errors import ConfigError, FlowtrainError


def mixture(shape: tuple[int, ...] = (3,), covariance: str = "full") -> GaussianMixture:
    base = GaussianMixture(shape, 4, covariance)
    for p in base.parameters():
        nn.init.normal_(p, std=0.7)
    return base


def student(shape: tuple[int, ...] = (3,)) -> StudentT:
    return StudentT(shape, 2 + 3 * torch.rand(shape), trainable=True)


def box(shape: tuple[int, ...] = (3,)) -> UniformBox:
    return UniformBox(-1 - torch.rand(shape), 1 + torch.rand(shape))


BASES: dict[str, Callable[..., Base]] = {
    "normal": lambda shape=(3,): StandardNormal(shape),
    "student": student,
    "box": box,
    "circular": lambda shape=(3,): NormalUniform(shape, [0, 2]),
    "full": mixture,
    "diagonal": lambda shape=(3,): mixture(shape, "diagonal"),
}


class OfColumns(D.Distribution):
    """Independent columns with one distribution each."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, columns: list[D.Distribution]) -> None:
        super().__init__(event_shape=torch.Size([len(columns)]), validate_args=False)
        self.columns = columns

    def log_prob(self, value: Tensor) -> Tensor:
        return sum(c.log_prob(value[:, i]) for i, c in enumerate(self.columns))  # type: ignore[return-value]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.stack([c.sample(sample_shape) for c in self.columns], -1)


def closed_form(base: Base) -> D.Distribution:
    """Returns torch's distribution that equals the base, over flattened z."""
    d = math.prod(base.event_shape)
    if isinstance(base, NormalUniform):
        real, angle = D.Normal(torch.tensor(0.0), torch.tensor(1.0)), D.Uniform(-math.pi, math.pi)
        return OfColumns([angle if i in base.circular else real for i in range(d)])
    if isinstance(base, StudentT):
        return D.Independent(D.StudentT(base.df.flatten()), 1)
    if isinstance(base, UniformBox):
        return D.Independent(D.Uniform(base.low.flatten(), base.high.flatten()), 1)
    if isinstance(base, GaussianMixture):
        parts = D.MultivariateNormal(base.means, scale_tril=base.scale_tril)
        return D.MixtureSameFamily(D.Categorical(logits=base.logits), parts)
    return D.Independent(D.Normal(torch.zeros(d), torch.ones(d)), 1)


@pytest.fixture(params=BASES)
def make(request: pytest.FixtureRequest) -> Callable[..., Base]:
    return BASES[request.param]


@pytest.mark.parametrize("shape", [(3,), (2, 1, 2)])
def test_log_prob_equals_the_closed_form(make: Callable[..., Base], shape: tuple[int, ...]) -> None:
    if make is BASES["circular"] and len(shape) > 1:
        pytest.skip("only vectors have circular columns")
    base = make(shape)
    z = base.sample(50)
    assert z.shape == (50, *shape)
    assert not z.requires_grad
    torch.testing.assert_close(base.log_prob(z), closed_form(base).log_prob(z.flatten(1)))
    assert base.log_prob(z[:0]).shape == (0,)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("rows", [1, 30])
def test_log_prob_of_a_mixture_without_gradients_equals_the_closed_form(covariance: str, rows: int) -> None:
    base = mixture(covariance=covariance)
    z = 2 * torch.randn(rows, 3)
    with torch.no_grad():
        torch.testing.assert_close(base.log_prob(z), closed_form(base).log_prob(z))


def test_sample_marginals_match_the_density(make: Callable[..., Base]) -> None:
    """Projections of the samples pass a Kolmogorov-Smirnov test against samples of torch.distributions."""
    base, n = make(), 4000
    ours, theirs = base.sample(n), closed_form(base).sample((n,))
    for direction in torch.cat([torch.eye(3), torch.randn(2, 3)]):
        assert stats.ks_2samp((ours @ direction).numpy(), (theirs @ direction).numpy()).pvalue > 1e-4


def test_probability_transforms_are_uniform_and_independent(make: Callable[..., Base]) -> None:
    base = make()
    u, y = base.to_uniform(base.sample(4000)), base.to_normal(base.sample(4000))
    assert u.shape == y.shape == (4000, 3)
    for j in range(3):
        assert stats.kstest(u[:, j].detach().numpy(), "uniform").pvalue > 1e-4
        assert stats.kstest(y[:, j].detach().numpy(), "norm").pvalue > 1e-4
    correlation = torch.corrcoef(y.detach().T) - torch.eye(3)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_probability_transform_jacobian_equals_the_density(make: Callable[..., Base]) -> None:
    """For the Rosenblatt transformation u(z), log |det du/dz| equals log p0(z)."""
    base = make()
    z = base.sample(5)
    if isinstance(base, StudentT):
        # central differences are used, because to_uniform computes no gradients
        h = 1e-5
        columns = [(base.to_uniform(z + h * e) - base.to_uniform(z - h * e)) / (2 * h) for e in torch.eye(3)]
        jacobian = torch.stack(columns, 2)
    else:
        jacobian = torch.stack(
            [torch.autograd.functional.jacobian(lambda one: base.to_uniform(one[None])[0], row) for row in z]
        )
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], base.log_prob(z).detach(), rtol=1e-6, atol=1e-6)


def test_first_mixture_transform_equals_the_marginal_cdf() -> None:
    base = mixture()
    z = base.sample(3)
    with torch.no_grad():
        std = base.scale_tril[:, 0, 0]
        expected = [
            float((base.weights * torch.tensor(stats.norm.cdf(float(row[0]), base.means[:, 0], std))).sum())
            for row in z
        ]
        np.testing.assert_allclose(base.to_uniform(z)[:, 0].numpy(), expected, atol=1e-12)


def test_generator_determines_the_samples(make: Callable[..., Base]) -> None:
    base = make()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first, second = (base.sample(6, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.equal(first, base.sample(6, torch.Generator().manual_seed(6)))


def test_samples_have_the_requested_dtype(make: Callable[..., Base]) -> None:
    base = make()
    assert base.sample(2).dtype == torch.float64
    assert base.sample(2, like=torch.zeros(1, dtype=torch.float32)).dtype == torch.float32
    assert base.float().sample(2, like=torch.zeros(1, dtype=torch.float32)).dtype == torch.float32
    z = base.sample(2, like=torch.zeros(1, dtype=torch.float32)).double()
    assert base.log_prob(z).dtype == torch.float64
    assert base.to_uniform(z).dtype == torch.float64


def test_standard_normal_has_no_state_and_samples_like_randn() -> None:
    base = StandardNormal((2, 3))
    assert not base.state_dict()
    assert not [*base.parameters(), *base.buffers()]
    for like in (None, torch.zeros((), dtype=torch.float32), torch.zeros(7, 3, 2).transpose(1, 2)):
        torch.manual_seed(0)
        found = base.sample(7, like=like)
        torch.manual_seed(0)
        expected = torch.randn(7, 2, 3) if like is None or not like.dim() else torch.randn_like(like)
        if like is not None and like.dtype == torch.float32:
            torch.manual_seed(0)
            expected = torch.randn(7, 2, 3, dtype=torch.float32)
        assert torch.equal(found, expected)


def test_bases_can_be_built_on_the_meta_device() -> None:
    """Loading a checkpoint builds bases on the meta device, to compare the shapes of weights."""

    def shapes() -> list[dict[str, torch.Size]]:
        bases = [StudentT((2,), 3.0), UniformBox([0.0, 0.0], [1.0, 1.0]), GaussianMixture(2, 3), NormalUniform(2, [1])]
        return [{name: value.shape for name, value in base.state_dict().items()} for base in bases]

    expected = shapes()
    with torch.device("meta"):
        assert shapes() == expected
        assert StudentT((2,), 3.0).log_df.is_meta


@pytest.mark.parametrize("df", [0.3, 1.0, 4.5, 60.0, 3e4])
def test_student_t_cdf_matches_scipy(df: float) -> None:
    z = torch.cat([torch.linspace(-6, 6, 25), torch.tensor([-1e6, -300.0, 300.0, 1e6, torch.inf])]).unsqueeze(1)
    np.testing.assert_allclose(
        StudentT((1,), df).to_uniform(z)[:, 0].numpy(), stats.t.cdf(z[:, 0].numpy(), df), rtol=1e-9, atol=1e-300
    )


def test_incomplete_beta_equals_numerical_integration() -> None:
    for a, b, x in ((0.5, 2.0, 0.9), (3.0, 0.5, 0.2), (7.0, 8.0, 0.5), (2.0, 2.0, 0.0), (2.0, 2.0, 1.0)):
        whole, part = (integrate.quad(lambda t, a=a, b=b: t ** (a - 1) * (1 - t) ** (b - 1), 0, s)[0] for s in (1, x))
        found = incomplete_beta(*(torch.tensor(v) for v in (a, b, x)))
        assert found.item() == pytest.approx(part / whole, abs=1e-9)


def test_uniform_box_density_is_zero_outside() -> None:
    base = UniformBox([0.0, -1.0], [2.0, 1.0])
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.1, 0.0], [1.0, -1.1], [torch.nan, 0.0]])
    log_p = base.log_prob(z)
    assert log_p[:2].tolist() == pytest.approx([-math.log(4)] * 2)
    assert log_p[2:4].tolist() == [-math.inf] * 2
    assert log_p[4].isnan()


def test_density_is_periodic_in_circular_columns_and_there_is_no_temperature() -> None:
    base = NormalUniform(3, [0, 2])
    z = base.sample(5)
    turns = 2 * math.pi * torch.tensor([1.0, 0.0, -2.0])
    torch.testing.assert_close(base.log_prob(z + turns), base.log_prob(z))
    torch.testing.assert_close(base.to_uniform(z + turns), base.to_uniform(z))
    assert base.log_prob(torch.tensor([[torch.nan, 0.0, 0.0]])).isnan().all()
    with pytest.raises(FlowtrainError, match="temperature"):
        base.sample(2, temperature=0.5)
    for shape, circular in (((1, 2), [0]), ((2,), [2])):
        with pytest.raises(FlowtrainError):
            NormalUniform(shape, circular)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_mixture_rsample_gradients_match_the_expectation(covariance: str) -> None:
    """The expectation is E[a^T z + |z|^2] = sum_k w_k (a^T m_k + |m_k|^2 + |L_k|^2)."""
    base, a = mixture((2,), covariance), torch.tensor([0.3, -1.0])
    parameters = list(base.parameters())
    z = base.rsample(60_000)
    found = torch.autograd.grad((z @ a + z.square().sum(1)).mean(), parameters)
    m, factor = base.means, base.scale_tril
    expected = base.weights @ (m @ a + m.square().sum(1) + factor.square().sum((1, 2)))
    for ours, exact in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.03)


def test_rsample_gradients_keep_the_transform_constant() -> None:
    """u(z(parameters), parameters) is constant if z moves along its implicit derivative."""
    base = mixture((2,))
    direction = [torch.randn_like(p) for p in base.parameters()]
    z = base.rsample(4)
    parameters = list(base.parameters())
    dz = torch.zeros(4, 2)
    for i, j in itertools.product(range(4), range(2)):
        gradients = torch.autograd.grad(z[i, j], parameters, retain_graph=True)
        dz[i, j] = torch.stack([(g * v).sum() for g, v in zip(gradients, direction, strict=True)]).sum()
    moved, h = [], 1e-5
    with torch.no_grad():
        for step in (h, -h):
            for p, v in zip(parameters, direction, strict=True):
                p.add_(step * v)
            moved.append(base.to_uniform(z.detach() + step * dz))
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(step * v)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-9)


def test_student_t_rsample_gradients_match_the_expectation() -> None:
    base = StudentT((1,), 6.0, trainable=True)
    (found,) = torch.autograd.grad(base.rsample(200_000).square().mean(), base.log_df)
    # E z^2 = nu / (nu - 2), so its derivative with respect to log nu is -2 nu / (nu - 2)^2
    assert found.item() == pytest.approx(-2 * 6 / 16, rel=0.1)


def test_temperature_scales_the_sample_noise() -> None:
    for base in (StandardNormal((2,)), StudentT((2,), 3.0)):
        hot, cold = (base.sample(5, torch.Generator().manual_seed(1), t) for t in (1.0, 0.5))
        torch.testing.assert_close(cold, 0.5 * hot)
    parts = mixture((2,))
    frozen = parts.sample(100, temperature=0.0)
    assert set(map(tuple, frozen.tolist())) <= set(map(tuple, parts.means.tolist()))
    with pytest.raises(FlowtrainError, match=r"temperature=0\.5"):
        box().sample(3, temperature=0.5)
    with pytest.raises(FlowtrainError, match="gradients at temperature 1"):
        parts.rsample(3, temperature=0.5)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_fit_recovers_the_mixture_and_matches_scikit_learn(covariance: str) -> None:
    truth = mixture((2,), covariance)
    with torch.no_grad():
        truth.means.copy_(torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 500.0], [9.0, 510.0]]))
    x = truth.sample(3000)
    base = GaussianMixture(2, 4, covariance).fit(x, generator=torch.Generator().manual_seed(0))
    order = [int((base.means - m).norm(dim=1).argmin()) for m in truth.means]
    assert sorted(order) == [0, 1, 2, 3]
    torch.testing.assert_close(base.weights[order], truth.weights, rtol=0, atol=0.05)
    torch.testing.assert_close(base.scale_tril[order], truth.scale_tril, rtol=0.2, atol=0.2)
    kind = {"full": "full", "diagonal": "diag"}[covariance]
    other = SklearnMixture(4, covariance_type=kind, random_state=0, tol=1e-8, max_iter=500).fit(x.numpy())
    assert base.log_prob(x).mean().item() == pytest.approx(other.score(x.numpy()), abs=1e-3)


def test_em_with_one_component_equals_the_sample_gaussian() -> None:
    x = torch.randn(500, 3) @ torch.randn(3, 3) + 5
    base = GaussianMixture((3,), 1).fit(x, floor=0.0)
    torch.testing.assert_close(base.means[0], x.mean(0))
    torch.testing.assert_close((base.scale_tril @ base.scale_tril.mT)[0], torch.cov(x.T, correction=0))


def test_prior_does_not_change_one_component() -> None:
    """The prior pulls covariances toward the covariance within clusters. Both are equal if there is one cluster."""
    x = torch.randn(50, 3) @ torch.randn(3, 3) + 5
    base = GaussianMixture((3,), 1, prior=20).fit(x, floor=0.0)
    torch.testing.assert_close((base.scale_tril @ base.scale_tril.mT)[0], torch.cov(x.T, correction=0))


def test_initialization_does_not_depend_on_row_order() -> None:
    x, found = torch.randn(300, 2), []
    for seed, rows in ((1, x), (1, x[torch.randperm(300)]), (2, x)):
        base = GaussianMixture(2, 12)
        torch.manual_seed(seed)
        torch.rand(seed)
        base.initialize(rows)
        found.append(base.log_prob(x))
    torch.testing.assert_close(found[1], found[0])
    assert (found[2] - found[0]).abs().max() > 1e-3


def test_float32_fit_computes_in_float64() -> None:
    """The rows are so far from 0 that a covariance computed in float32 would be wrong."""
    x = (1e4 + torch.randn(400, 2)).float()
    base = GaussianMixture(2, 1).float()
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    base.fit(x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(1), expected)
    assert base.means.dtype == torch.float32
    torch.testing.assert_close(
        (base.scale_tril @ base.scale_tril.mT)[0].double(), torch.cov(x.double().T, correction=0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_fit_of_degenerate_rows_is_finite(covariance: str) -> None:
    for x in (torch.zeros(5, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 2.0]])):
        base = GaussianMixture(2, 3, covariance).fit(x)
        assert base.log_prob(x).isfinite().all()
        assert base.sample(5).isfinite().all()
    with pytest.raises(FlowtrainError, match="NaN or infinite"):
        base.fit(torch.tensor([[torch.nan, 0.0]]))
    with pytest.raises(FlowtrainError, match="shape"):
        base.fit(torch.zeros(5, 3))


def test_log_prob_gradients_match_finite_differences() -> None:
    for base in (mixture((2,)), mixture((2,), "diagonal"), student((2,))):
        z = base.sample(4)

        def of_parameters(*values: Tensor, base: Base = base, z: Tensor = z) -> Tensor:
            names = [name for name, _ in base.named_parameters()]
            found: Tensor = torch.func.functional_call(base, dict(zip(names, values, strict=True)), (z,))
            return found

        base.forward = base.log_prob  # type: ignore[assignment]
        assert torch.autograd.gradcheck(of_parameters, tuple(base.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentT((2,), 0.0), "greater than 0"),
        (lambda: StudentT((2,), torch.ones(3)), "shape"),
        (lambda: UniformBox([0.0, 1.0], [1.0, 1.0]), "less than high"),
        (lambda: UniformBox([0.0], [1.0, 1.0]), "shapes"),
        (lambda: GaussianMixture(2, 0), "components=0"),
        (lambda: GaussianMixture(2, 2, "spherical"), "covariance=spherical"),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], Base], message: str) -> None:
    with pytest.raises((FlowtrainError, ConfigError), match=message):
        make()


def conditional(shape: tuple[int, ...] = (3,), covariance: str = "full") -> ConditionalMixture:
    """Returns a mixture density network of 2 features with random weights."""
    base = ConditionalMixture(shape, 3, 2, covariance, hidden=[5])
    for p in base.parameters():
        nn.init.normal_(p, std=0.7)
    return base


def rows_of(base: MixtureOfRows) -> D.Distribution:
    parts = D.MultivariateNormal(base.means, scale_tril=base.scale_tril)
    return D.MixtureSameFamily(D.Categorical(logits=base.logits), parts)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1, 2)])
def test_conditional_mixture_equals_the_closed_form_of_each_row(covariance: str, shape: tuple[int, ...]) -> None:
    base, c = conditional(shape, covariance), torch.randn(20, 2)
    rows = base.given(c)
    assert isinstance(rows, MixtureOfRows)
    z = rows.sample(20)
    assert z.shape == (20, *shape)
    torch.testing.assert_close(rows.log_prob(z), rows_of(rows).log_prob(z.flatten(1)))
    # the density of a row depends only on the context of this row
    torch.testing.assert_close(base.given(c[3:5]).log_prob(z[3:5]), rows.log_prob(z)[3:5])
    with pytest.raises(FlowtrainError):
        base.log_prob(z)


def test_conditional_mixture_accepts_labels() -> None:
    base, labels = conditional(), torch.tensor([1, 0, 1])
    torch.testing.assert_close(
        base.given(labels).log_prob(torch.zeros(3, 3)), base.given(torch.eye(2)[labels]).log_prob(torch.zeros(3, 3))
    )


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_conditional_samples_and_transforms_match_the_density(covariance: str) -> None:
    base, n = conditional((2,), covariance), 4000
    c = torch.randn(1, 2).expand(n, 2)
    rows = base.given(c)
    ours, theirs = rows.sample(n), rows_of(base.given(c[:1])).sample((n,)).squeeze(1)
    for direction in torch.cat([torch.eye(2), torch.randn(2, 2)]):
        assert stats.ks_2samp((ours @ direction).numpy(), (theirs @ direction).numpy()).pvalue > 1e-4
    # contexts that differ from row to row
    rows = base.given(torch.randn(n, 2))
    u = rows.to_uniform(rows.sample(n)).detach()
    for j in range(2):
        assert stats.kstest(u[:, j].numpy(), "uniform").pvalue > 1e-4
    assert abs(float(torch.corrcoef(rows.to_normal(rows.sample(n)).detach().T)[0, 1])) < 5 / n**0.5


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_implicit_gradients_of_conditional_samples_keep_the_transform(covariance: str) -> None:
    """u(z; parameters) is constant along dz, by finite differences of the transform."""
    base, c = conditional((2,), covariance), torch.randn(3, 2)
    weight = base.net[0].weight
    z = base.given(c).rsample(3)
    slope = torch.zeros_like(z)
    for i, j in itertools.product(range(3), range(2)):
        slope[i, j] = torch.autograd.grad(z[i, j], weight, retain_graph=True)[0][0, 0]
    h = 1e-5
    u = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[0, 0] += sign * h
            u.append(base.given(c).to_uniform(z + sign * h * slope))
            weight[0, 0] -= sign * h
    assert slope.abs().max() > 1e-4
    torch.testing.assert_close(u[0], u[1], rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_conditional_mixture_starts_at_the_mixture_of_all_rows(covariance: str) -> None:
    z = torch.cat([torch.randn(200, 3) @ torch.randn(3, 3), 5 + 0.3 * torch.randn(100, 3)])
    base, plain = ConditionalMixture(3, 2, 4, covariance), GaussianMixture(3, 2, covariance)
    base.initialize(z)
    plain.initialize(z)
    found = base.given(torch.randint(4, (300,))).log_prob(z)
    torch.testing.assert_close(found, plain.log_prob(z), rtol=1e-6, atol=1e-6)


def test_too_large_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="diagonal"), torch.device("meta"):
        ConditionalMixture(784, 16, 10)


@pytest.mark.parametrize("df", [0.1, 1.0, 5.0, 20.0, 1e3, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_p_of_a_t_distribution_has_no_cancellation(df: float, dtype: torch.dtype) -> None:
    base, z = StudentT(1, df).to(dtype), torch.tensor([[0.0], [1.0], [-3.0]], dtype=dtype)
    # log_df is rounded
    expected = stats.t.logpdf(z[:, 0].numpy(), float(base.df.double()))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-7 if df > 1e7 else 2e-10}[dtype]
    for mode in (True, False):
        np.testing.assert_allclose(base.train(mode).log_prob(z).numpy(), expected, rtol=0, atol=tolerance)


def test_log_p_of_a_t_distribution_is_finite_if_squares_overflow() -> None:
    base, z = StudentT(2, 3.0).float().eval(), torch.tensor([[1e30, -2e25], [0.0, 1.0]])
    expected = stats.t.logpdf(z.double().numpy(), 3.0).sum(1)
    np.testing.assert_allclose(base.log_prob(z.float()).numpy(), expected, rtol=1e-6)
    z = torch.tensor([[torch.inf, 0.0], [-torch.inf, 1.0], [torch.nan, 0.0]])
    assert base.log_prob(z.float()).tolist()[:2] == [-torch.inf, -torch.inf]
    assert base.log_prob(z.float())[2].isnan()
