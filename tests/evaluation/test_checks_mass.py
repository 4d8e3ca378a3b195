"""The mass of a density by quadrature, including thin, distant and scattered densities."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowtrain.bases import NormalUniform
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.support import ToSupport
from flowtrain.data.types import ColumnType, circular_columns, whole_columns_of
from flowtrain.evaluation.checks import check_mass, mass, measured_mass, remaining_error
from flowtrain.flow import Flow


def gaussian_log_prob(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2 - x.shape[1] * math.log(2 * math.pi) / 2


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_mass_of_a_scaled_gaussian_equals_the_factor(d: int, factor: float) -> None:
    found = mass(lambda x: gaussian_log_prob(x) + math.log(factor), torch.randn(2000, d))
    assert found.value == pytest.approx(factor, abs=1e-5)
    assert abs(found.value - factor) < found.error + 1e-5


def test_mass_of_thin_rings_and_far_outliers_is_one() -> None:
    """The ring's radial integral is int_0^oo r exp(-(r - 2)^2 / 2 s^2) dr = 2 s sqrt(2 pi) for s << 2."""
    s = 0.03
    constant = math.log(2 * math.pi * 2 * s * math.sqrt(2 * math.pi))
    angle, radius = 2 * math.pi * torch.rand(2000), 2 + s * torch.randn(2000)
    samples = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    found = mass(lambda x: -((x.norm(dim=1) - 2) ** 2) / (2 * s * s) - constant, samples)
    assert found.value == pytest.approx(1, abs=1e-3)
    # one sample in a thousand comes from a Gaussian that is a hundred times wider
    samples = torch.randn(2000, 2)
    samples[::1000] *= 100

    def log_prob(x: Tensor) -> Tensor:
        wide = gaussian_log_prob(x / 100) - 2 * math.log(100)
        return torch.logaddexp(gaussian_log_prob(x) + math.log(0.999), wide + math.log(0.001))

    assert mass(log_prob, samples).value == pytest.approx(1, abs=1e-3)


def gaussian_modes(means: Tensor, std: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns log p of an equally weighted mixture of isotropic Gaussians in the plane, and samples."""

    def log_prob(x: Tensor) -> Tensor:
        u = (x.unsqueeze(1) - means) / std.unsqueeze(-1)
        return (-u.square().sum(-1) / 2 - 2 * std.log() - math.log(2 * math.pi * len(means))).logsumexp(1)

    which = torch.randint(len(means), (2000,))
    return log_prob, means[which] + std[which].unsqueeze(1) * torch.randn(2000, 2)


@pytest.mark.parametrize("seed", range(6))
def test_mass_includes_modes_between_the_first_nodes(seed: int) -> None:
    """A grid refined only near the mass that it has found would miss these modes and report a small error."""
    torch.manual_seed(seed)
    side = 4 * torch.arange(-2.0, 3.0)
    cases = [
        (torch.cartesian_prod(side, side), torch.full((25,), 0.03)),
        (2 * torch.randn(6, 2), 0.02 + 0.15 * torch.rand(6)),
        (3 * torch.randn(3, 2), torch.full((3,), 0.01)),
    ]
    for means, std in cases:
        found = mass(*gaussian_modes(means, std))
        # if the modes cannot be resolved, the reported error must be large
        assert found.value == pytest.approx(1, abs=max(1e-3, 10 * found.error))
        assert found.points < 120_000


def test_remaining_error_is_extrapolated_from_grid_doublings() -> None:
    # the remaining error is the last change for first-order convergence, and a third of the last change for second
    # order
    assert remaining_error([0.2, 0.1, 0.05]) == pytest.approx(0.05)
    assert remaining_error([0.4, 0.1]) == pytest.approx(0.1 / 3)
    assert remaining_error([0.01, 0.0001]) == pytest.approx(1e-6, rel=0.02)
    assert remaining_error([0.1, 0.2]) == 0.2
    assert remaining_error([0.0]) == 0.0


@pytest.mark.parametrize(
    "kinds",
    [["positive"], ["interval(0,1)"], ["circular(360)"], ["integer(0,9)"], ["positive", "circular(1)"]],
    ids="-".join,
)
@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_mass_of_typed_columns_is_over_their_supports(kinds: list[str], factor: float) -> None:
    types = [ColumnType.parse(kind) for kind in kinds]
    angles = circular_columns(types)
    low, high = zip(*(one.support for one in types), strict=True)
    support = ToSupport(low, high, angles, whole_columns_of(types))
    flow = Flow(NormalUniform(len(types), angles), support, noisy=whole_columns_of(types), types=types).double().eval()
    assert measured_mass(flow).value == pytest.approx(1, abs=1e-3)
    # a wrong log-determinant is detected
    flow.bijection = Scaled(support, factor)
    found = check_mass(flow)
    assert found is not None
    assert found.passed is (factor == 1)


class Scaled(Bijection):
    """A bijection with a wrong log-determinant of the inverse."""

    def __init__(self, inner: Bijection, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.inner(z)
        return found

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse(x)
        return z, log_det + math.log(self.factor)
