"""Maps of angles: splines of the circle, wrapping, and bijections of some columns only."""

import math

import pytest
import torch
from helpers.flows import perturbed
from torch import Tensor

from flowtrain.bijections.circular import CircularSpline, RealThenCircular, WrapAngles
from flowtrain.bijections.columns import OnColumns
from flowtrain.bijections.elementwise import ScaleShift
from flowtrain.bijections.linear import Affine, FromGaussian, Preconditioned
from flowtrain.bijections.scale import Standardize
from flowtrain.bijections.spline import Spline
from flowtrain.models.ffjord import ffjord
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.ode import ode_solver
from flowtrain.utils.circle import wrap
from flowtrain.utils.errors import ConfigError

# angles at and next to the seam
SEAM = [-math.pi, -3.1415925, -3.14, 0.0, 3.14, 3.1415925, math.pi]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Returns the distances on the circle."""
    return wrap(a - b).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapped_angles_lie_in_the_interval_and_are_the_same_points(dtype: torch.dtype) -> None:
    angles = torch.tensor([*SEAM, *(a + 2 * math.pi * k for a in SEAM for k in (-3, 1, 2))], dtype=dtype)
    angles.requires_grad_()
    y = wrap(angles)
    assert all(-math.pi <= v < math.pi for v in y.tolist())
    torch.testing.assert_close(
        torch.stack([y.cos(), y.sin()]), torch.stack([angles.cos(), angles.sin()]), rtol=0, atol=2e-6
    )
    assert torch.equal(torch.autograd.grad(y.sum(), angles)[0], torch.ones_like(y))
    inside = torch.tensor([-3.1, 1e-7, 3.14], dtype=dtype)
    assert torch.equal(wrap(inside), inside)


@pytest.mark.parametrize("bins", [2, 5])
def test_circular_spline_has_the_slope_of_finite_differences_at_every_angle(bins: int) -> None:
    spline, h = CircularSpline(bins), 1e-6
    theta = torch.randn(1, spline.size)
    x = torch.linspace(-4, 9, 997).unsqueeze(1)
    z, log_slope = spline.to_base(x, theta.expand(len(x), -1))
    above, below = (spline.to_base(x + s, theta.expand(len(x), -1))[0] for s in (h, -h))
    torch.testing.assert_close(wrap(above - below) / (2 * h), log_slope.exp(), rtol=1e-4, atol=1e-4)
    assert bool(((z >= -math.pi) & (z < math.pi)).all())


def test_circular_spline_has_a_continuous_slope_at_the_seam_and_maps_the_circle_once_around() -> None:
    spline = CircularSpline(4)
    theta = torch.randn(1, spline.size)
    z, log_slope = spline.to_base(torch.tensor([[-math.pi], [math.pi - 1e-12], [3 * math.pi]]), theta.expand(3, -1))
    assert distance(z, z[0]).max() < 1e-9
    torch.testing.assert_close(log_slope, log_slope[:1].expand(3, 1), rtol=0, atol=1e-8)
    x = torch.linspace(-math.pi, math.pi, 20_001).unsqueeze(1)
    turned = spline.to_base(x, theta.expand(len(x), -1))[1].exp()
    assert float(torch.trapezoid(turned, x, dim=0)) == pytest.approx(2 * math.pi, rel=1e-5)


def test_slope_of_the_spline_without_a_phase_agrees_at_both_ends() -> None:
    spline = CircularSpline(3)
    theta = torch.randn(1, spline.size)
    theta[:, -2:] = 0
    x = torch.tensor([[-math.pi], [math.pi - 1e-9]])
    z, log_slope = spline.to_base(x, theta.expand(2, -1))
    assert distance(z, x).max() < 1e-6
    torch.testing.assert_close(log_slope[0], log_slope[1], rtol=0, atol=1e-6)
    assert log_slope.abs().max() > 0.01


def test_zero_theta_is_the_identity_of_the_circle() -> None:
    x = torch.tensor([SEAM]).T
    spline = CircularSpline(4)
    z, log_slope = spline.to_base(x, torch.zeros(len(x), spline.size))
    assert distance(z, x).max() < 1e-12
    assert log_slope.abs().max() < 1e-12


def test_round_trip_in_float32_is_exact_at_the_seam() -> None:
    spline = CircularSpline(8)
    x = torch.cat([torch.tensor(SEAM), torch.linspace(-9, 9, 400)]).float().unsqueeze(1)
    theta = torch.randn(len(x), spline.size, dtype=torch.float32)
    z, log_slope = spline.to_base(x, theta)
    back, back_log_slope = spline.to_data(z, theta)
    assert distance(back, x).max() < 1e-5
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=0, atol=1e-4)
    again, _ = spline.to_base(spline.to_data(x, theta)[0], theta)
    assert distance(again, x).max() < 1e-5
    for y in (z, back):
        assert all(-math.pi <= v < math.pi for v in y.flatten().tolist())


def test_handwritten_gradient_of_the_circular_spline_equals_autograd() -> None:
    spline = CircularSpline(5)
    x, theta = (4 * torch.randn(50, 3)).requires_grad_(), torch.randn(50, 3 * spline.size, requires_grad=True)
    z, log_slope = spline.to_base(x, theta)
    loss = (z.sin() * torch.arange(3.0) + log_slope.square()).sum()
    found = torch.autograd.grad(loss, [x, theta])

    def by_autograd(x: Tensor, theta: Tensor) -> Tensor:
        z, log_slope = spline.to_base(x, theta)
        return (z.sin() * torch.arange(3.0) + log_slope.square()).sum()

    # inside torch.func the spline uses operations of autograd
    expected = torch.func.grad(by_autograd, (0, 1))(x.detach(), theta.detach())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_finite_at_knots_and_without_a_direction_of_the_phase() -> None:
    spline = CircularSpline(4)
    theta = torch.zeros(len(SEAM), spline.size)
    # u = 0 and 1 + v = 0 have no angle
    theta[::2, -1] = -1
    theta.requires_grad_()
    x = torch.tensor([SEAM]).T.requires_grad_()
    for call in (spline.to_base, spline.to_data):
        y, log_slope = call(x, theta)
        assert all(g.isfinite().all() for g in torch.autograd.grad((y + log_slope).sum(), [x, theta]))


def test_real_and_circular_elements_have_different_maps() -> None:
    both = RealThenCircular(2, ScaleShift(), CircularSpline(3))
    owners = both.owners(5)
    theta = torch.randn(4, len(owners))
    x = torch.randn(4, 5)
    z, log_slope = both.to_base(x, theta)
    for i in range(5):
        kind = both.real if i < 2 else both.circular
        expected = kind.to_base(x[:, i : i + 1], theta[:, owners == i])
        torch.testing.assert_close((z[:, i : i + 1], log_slope[:, i : i + 1]), expected)
    back, back_log_slope = both.to_data(z, theta)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_log_slope, -log_slope)


def test_size_of_other_splines_is_unchanged() -> None:
    assert (Spline(4).size, len(Spline(4).owners(3))) == (11, 33)


def test_wrap_angles_and_columns_leave_other_columns_unchanged() -> None:
    x = 5 * torch.randn(20, 3)
    z, log_det = WrapAngles(3, [1]).inverse(x)
    assert torch.equal(z[:, [0, 2]], x[:, [0, 2]])
    assert z[:, 1].abs().max() <= math.pi < x[:, 1].abs().max()
    assert not log_det.any()
    inner = perturbed(Affine(2))
    y, log_det = OnColumns(inner, [2, 0])(x)
    torch.testing.assert_close(y[:, [2, 0]], inner(x[:, [2, 0]])[0])
    torch.testing.assert_close(log_det, inner(x[:, [2, 0]])[1])
    assert torch.equal(y[:, 1], x[:, 1])
    torch.testing.assert_close(OnColumns(inner, [2, 0]).inverse(y)[0], x)


@pytest.mark.parametrize("circular", [[2], [-1], [0, 0], [0.5], "0", 1])
def test_invalid_indices_are_refused(circular: object) -> None:
    for make in (nsf, maf, ffjord):
        with pytest.raises(ConfigError, match="circular"):
            make(2, circular=circular)


TIGHT = ode_solver("dopri8", rtol=1e-9)
CASES = [(1, [0]), (2, [0]), (2, [0, 1]), (3, [1]), (5, [0, 1, 4])]
MODELS = {
    "nsf": lambda d, c, **keys: nsf(d, circular=c, layers=3, hidden=[8], bins=4, **keys),
    "nsf bounded": lambda d, c, **keys: nsf(d, circular=c, layers=2, hidden=[8], bins=4, input_bound=3.0, **keys),
    "nsf permutation": lambda d, c, **keys: nsf(d, circular=c, layers=2, hidden=[8], mixing="permutation", **keys),
    "nsf alternate": lambda d, c, **keys: nsf(d, circular=c, layers=2, hidden=[8], mixing="alternate", **keys),
    "maf": lambda d, c, **keys: maf(d, circular=c, layers=3, hidden=[8], bins=4, **keys),
    "maf spline": lambda d, c, **keys: maf(d, circular=c, layers=2, hidden=[8], transform="spline", **keys),
    "maf linear": lambda d, c, **keys: maf(
        d, circular=c, layers=2, hidden=[8], mixing="linear", input_bound=3.0, **keys
    ),
    "maf permutation": lambda d, c, **keys: maf(
        d, circular=c, layers=2, hidden=[8], mixing="permutation", passes=2, **keys
    ),
    "ffjord": lambda d, c, **keys: ffjord(d, circular=c, hidden=[8], solver=TIGHT, **keys),
    "two ffjords": lambda d, c, **keys: ffjord(d, circular=c, hidden=[8], flows=2, solver=TIGHT, **keys),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("d", "circular"), CASES, ids=str)
@pytest.mark.parametrize("context", [None, "labels", "features"])
def test_models_of_angles_round_trip_and_log_det(name: str, d: int, circular: list[int], context: str | None) -> None:
    keys = {} if context is None else {"conditional": True, "classes": 2}
    bijection = perturbed(MODELS[name](d, circular, **keys).bijection, 0.2).eval()
    given = {None: None, "labels": torch.tensor([1, 0, 1]), "features": torch.randn(3, 2)}[context]
    z = 2 * torch.randn(3, d)
    z[:, circular] = wrap(z[:, circular])
    x, log_det = bijection(z, given)
    back, back_log_det = bijection.inverse(x, given)
    assert x[:, circular].abs().max() <= math.pi
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-6, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(lambda y: bijection.inverse(y, given)[0].sum(0), x.detach())
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.movedim(0, 1))[1], -log_det, rtol=1e-6, atol=1e-6)
    turns = torch.zeros(3, d)
    turns[:, circular] = 2 * math.pi * torch.randint(-2, 3, (3, len(circular))).double()
    again, again_log_det = bijection.inverse(x + turns, given)
    torch.testing.assert_close(again, back, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again_log_det, back_log_det, rtol=1e-6, atol=1e-6)
    if context == "features":
        assert given is not None
        assert (bijection(z, given + 1)[0] - x).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["nsf", "nsf alternate", "maf"])
def test_every_column_is_transformed(name: str) -> None:
    """Each column of z depends on its own column of x in a nonlinear way."""
    bijection = perturbed(MODELS[name](4, [1, 3]).bijection, 0.3)
    x = torch.linspace(-1, 1, 3).unsqueeze(1).expand(3, 4)

    def diagonal(row: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda y: bijection.inverse(y[None])[0][0], row)
        assert isinstance(jacobian, Tensor)
        return jacobian.abs().sum(0)

    slopes = torch.stack([diagonal(row) for row in x])
    assert (slopes.std(0) > 1e-3).all()


@pytest.mark.parametrize("kind", [Preconditioned, FromGaussian])
def test_gaussian_start_does_not_touch_circular_columns(kind: type[Preconditioned] | type[FromGaussian]) -> None:
    x = torch.randn(2000, 4) @ torch.randn(4, 4) + 3
    x[:, [0, 2]] = wrap(x[:, [0, 2]])
    model = nsf(4, circular=[0, 2], layers=3, hidden=[8], mixing="alternate")
    bijection = kind(model.bijection, 4, circular=[0, 2])
    z = bijection.initialize(x)
    torch.testing.assert_close(z[:, [0, 2]], x[:, [0, 2]])
    # real columns are whitened with their shrunk covariance, which is close to the sample covariance
    torch.testing.assert_close(z[:, [1, 3]].T.cov(), torch.eye(2), rtol=0, atol=0.05)
    assert z[:, [1, 3]].mean(0).abs().max() < 1e-6


def test_standardize_does_not_touch_circular_columns() -> None:
    standardize = Standardize((3,), circular=[1])
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0, 4.0])
    standardize.fit(mean, std)
    assert standardize.mean.tolist() == [1, 0, 3]
    assert standardize.std.tolist() == [2, 1, 4]
    assert mean.tolist() == [1, 2, 3]
    offset = Standardize((3,), offset=True, circular=[1])
    offset.fit(mean + 1000, std, torch.full((3,), 1000.0))
    x = torch.tensor([[1001.0, 0.5, 1003.0]], dtype=torch.float64)
    torch.testing.assert_close(offset.inverse(x)[0].double(), torch.tensor([[0.0, 0.5, 0.0]]))
