"""Flows with bases other than a standard normal: densities, training, names in checkpoints, and pictures."""

import copy

import pytest
import torch
import torch.distributions as D
from torch import nn

from flowtrain.bases import Base, GaussianMixture, StandardNormal, StudentT, UniformBox
from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.scale import Standardize
from flowtrain.data.toys.shapes import Moons
from flowtrain.evaluation import evaluate
from flowtrain.flow import Context, Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.objectives.flow_matching import FlowMatching, Rectified
from flowtrain.ode import ode_solver
from flowtrain.plotting.drawing import draw_latents
from flowtrain.plotting.image_pictures import interpolations, temperatures
from flowtrain.plotting.trajectory import Trajectory
from flowtrain.utils.errors import ConfigError, FlowtrainError


def every_base() -> list[Base]:
    return [StudentT((2,), 3.0, trainable=True), UniformBox([0.0, -1.0], [2.0, 3.0]), GaussianMixture(2, 3)]


def affine(base: Base | tuple[int, ...]) -> Flow:
    flow = Flow(base, Affine(2))
    for p in flow.bijection.parameters():
        nn.init.normal_(p, std=0.5)
    return flow.eval()


def continuous_flow(base: Base) -> Flow:
    field = MLPField(2, [8], "concatsquash", "tanh")
    return Flow(base, Chain([Continuous(field, ode_solver("dopri5", rtol=1e-4), TraceRule())]))


def test_event_shape_implies_a_standard_normal_base() -> None:
    torch.manual_seed(0)
    short = Flow((2,), Affine(2))
    long = Flow(StandardNormal((2,)), Affine(2))
    assert isinstance(short.base, StandardNormal)
    assert short.event_shape == long.event_shape == (2,)
    # names in checkpoints
    assert list(short.state_dict()) == list(long.state_dict()) == [f"bijection.{k}" for k in Affine(2).state_dict()]
    x = torch.randn(4, 2)
    assert torch.equal(short.log_prob(x), long.log_prob(x))


class OtherUnits(Flow):
    """A flow whose base density is in other units."""

    def base_log_prob(self, z: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        return super().base_log_prob(z, features) + 2


class Tempered(Flow):
    def log_prob_and_latents(self, x: torch.Tensor, context: Context = None) -> tuple[torch.Tensor, torch.Tensor]:
        log_p, z = super().log_prob_and_latents(x, context)
        return log_p / 2, z


def test_densities_use_the_methods_of_a_subclass() -> None:
    x, bijection = torch.randn(4, 2), Affine(2)
    expected = Flow((2,), bijection).log_prob(x)
    one = OtherUnits((2,), bijection)
    torch.testing.assert_close(one.log_prob(x), expected + 2)
    torch.testing.assert_close(one.sample_pass(one.inverse(x)).log_p, expected + 2)
    torch.testing.assert_close(Tempered((2,), bijection).log_prob(x), expected / 2)


def test_density_equals_torch_transformed_distribution() -> None:
    for base in every_base():
        flow = affine(base)
        assert isinstance(flow.bijection, Affine)
        z = base.sample(20)
        x = flow(z)
        factor, mean = flow.bijection.factor(), flow.bijection.mean
        torch.testing.assert_close(x, z @ factor.T + mean)
        torch.testing.assert_close(flow.log_prob(x), base.log_prob(z) - torch.linalg.slogdet(factor)[1])
    mixture = every_base()[2]
    assert isinstance(mixture, GaussianMixture)
    flow = affine(mixture)
    assert isinstance(flow.bijection, Affine)
    # the image of a mixture of Gaussians under an affine map is a mixture of Gaussians
    factor, mean = flow.bijection.factor(), flow.bijection.mean
    parts = D.MultivariateNormal(mixture.means @ factor.T + mean, scale_tril=factor @ mixture.scale_tril)
    expected = D.MixtureSameFamily(D.Categorical(logits=mixture.logits), parts)
    x = torch.randn(20, 2)
    torch.testing.assert_close(flow.log_prob(x), expected.log_prob(x))


def test_samples_use_the_base_and_its_temperature() -> None:
    for base in every_base():
        flow = affine(base)
        torch.manual_seed(3)
        expected = flow(base.sample(7))
        torch.manual_seed(3)
        assert torch.equal(flow.sample(7), expected)
    with pytest.raises(FlowtrainError, match="temperature"):
        affine(UniformBox([0.0, 0.0], [1.0, 1.0])).sample(3, temperature=0.7)
    cold = affine(StudentT((2,), 3.0)).sample(1, temperature=0.0)
    assert cold.shape == (1, 2)


def test_trainable_base_is_trained_with_the_flow() -> None:
    """A trained base fits two distant clusters, which the affine map cannot separate."""
    x = torch.cat([torch.randn(200, 2) - 5, torch.randn(200, 2) + 5])
    base = GaussianMixture(2, 2)
    with torch.no_grad():
        base.means.copy_(torch.tensor([[-0.5, 0.0], [0.5, 0.0]]))
    flow = Flow(base, Affine(2))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    # the entropy of the true density is log 2 + log(2 pi e)
    assert -flow.log_prob(x).mean().item() == pytest.approx(3.53, abs=0.15)
    assert -affine((2,)).log_prob(x).mean().item() > 4


def test_state_of_a_base_is_saved_and_restored() -> None:
    for make in (
        lambda: StudentT((2,), 5.0),
        lambda: UniformBox([0.0, -1.0], [2.0, 3.0]),
        lambda: GaussianMixture(2, 3),
    ):
        flow, other = affine(make()), affine(make())
        other.load_state_dict(flow.state_dict())
        x = flow.sample(5)
        assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_evaluation_of_flows_with_other_bases() -> None:
    data = Moons(n_val=50, n_test=200)
    for base in (StudentT((2,), 5.0), GaussianMixture(2, 4).fit(data.test)):
        standardize = Standardize((2,))
        result = evaluate(Flow(base, Chain([Affine(2), standardize])).float(), data)
        assert {check.name: check.passed for check in result.checks}["own samples"]
        assert result.calibration.n == 200
        assert result.calibration.worst in ("z1", "z2", "radius")


def test_flow_matching_starts_at_base_samples() -> None:
    base = UniformBox([10.0, 20.0], [11.0, 21.0])
    for coupling in ("independent", "optimal"):
        x0, x1, _ = FlowMatching(continuous_flow(base), Regularizer(), coupling).pairs(torch.randn(50, 2), None)
        assert base.log_prob(x0).isfinite().all()
        assert x1.shape == x0.shape


def test_student_must_share_the_base_of_the_teacher() -> None:
    base = UniformBox([10.0, 20.0], [11.0, 21.0])
    teacher = continuous_flow(base).eval()
    objective = Rectified(copy.deepcopy(teacher), Regularizer(), teacher, seed=0, pairs=20)
    assert base.log_prob(objective.pool[0]).isfinite().all()
    with pytest.raises(ConfigError, match=r"UniformBox.*StandardNormal"):
        Rectified(continuous_flow(StandardNormal((2,))), Regularizer(), teacher, seed=0, pairs=20)


def test_figures_use_base_samples() -> None:
    flow = affine(GaussianMixture(2, 3))
    torch.manual_seed(0)
    z = draw_latents(flow, 5)
    torch.manual_seed(0)
    assert torch.equal(z, flow.base.sample(5))
    trajectory = Trajectory(flow, 3)
    x = flow.sample(6)
    torch.testing.assert_close(trajectory.log_density(x, trajectory.moments[-1]), flow.log_prob(x))
    torch.testing.assert_close(trajectory.log_density(z, trajectory.moments[0]), flow.base.log_prob(z))


class Images(Moons):
    """Random images in place of moons."""

    def __init__(self) -> None:
        self.event_shape = (1, 2, 2)
        self.val = self.test = torch.randn(30, 1, 2, 2)


def test_interpolation_requires_a_standard_normal_base() -> None:
    shape = (1, 2, 2)
    assert interpolations(Flow(shape, Affine(4)).eval(), Images())
    with pytest.raises(FlowtrainError, match="StudentT"):
        interpolations(Flow(StudentT(shape, 3.0), Affine(4)).eval(), Images())


def test_temperature_figure_shares_noise_across_temperatures() -> None:
    shape = (1, 2, 2)
    for base in (StandardNormal(shape), StudentT(shape, 3.0)):
        rows = temperatures(Flow(base, Affine(4)).eval(), Images())
        half, whole = rows[0][1], rows[-1][1]
        torch.testing.assert_close(half, 0.5 * whole)
    with pytest.raises(FlowtrainError, match="uniform base"):
        temperatures(Flow(UniformBox(torch.zeros(shape), torch.ones(shape)), Affine(4)).eval(), Images())
