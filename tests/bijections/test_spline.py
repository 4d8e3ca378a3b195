"""Rational-quadratic splines: formula, knots, tails, the float32 inverse and the hand-written gradient."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from flowtrain.bijections.coupling import CheckerboardCoupling, HalfCoupling, IndexCoupling
from flowtrain.bijections.spline import Spline
from flowtrain.nn.conditioners import ConvNet
from flowtrain.nn.residual_mlp import ResidualMLP
from flowtrain.utils.errors import FlowtrainError

B = 3.0


def theta_of(spline: Spline, rows: int, n: int, std: float = 1.0, **keys: object) -> Tensor:
    return std * torch.randn(rows, spline.size * n, **keys)  # type: ignore[call-overload]


def knots(spline: Spline, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the knots in x and z and their slopes, each (K + 1,), for the parameters theta (size,) of one element."""
    k, c = spline.bins, -torch.tensor(spline.least_slope).log()
    sizes, slopes = theta[: 2 * k], theta[2 * k :]
    sizes = (sizes / (1 + 2 * sizes.abs() / c)).view(2, k)
    ends = [torch.cat([torch.zeros(1), s.softmax(0).cumsum(0)]) * 2 * spline.bound - spline.bound for s in sizes]
    inner = (slopes / (1 + slopes.abs() / c)).exp()
    return ends[0], ends[1], torch.cat([torch.ones(1), inner, torch.ones(1)])


def naive(spline: Spline, x: float, theta: Tensor) -> float:
    """Computes z for one number with the formula of Durkan et al. 2019, eq. 4, with a loop over the bins."""
    xs, zs, slopes = knots(spline, theta)
    for i in range(spline.bins):
        if xs[i] <= x <= xs[i + 1]:
            s = (zs[i + 1] - zs[i]) / (xs[i + 1] - xs[i])
            t = (x - xs[i]) / (xs[i + 1] - xs[i])
            top = (zs[i + 1] - zs[i]) * (s * t**2 + slopes[i] * t * (1 - t))
            return float(zs[i] + top / (s + (slopes[i + 1] + slopes[i] - 2 * s) * t * (1 - t)))
    return x


def test_values_are_those_of_the_formula() -> None:
    spline = Spline(5, B)
    theta, x = theta_of(spline, 40, 2, 2.0), B * torch.randn(40, 2)
    z, log_slope = spline.to_base(x, theta)
    by_element = theta.view(40, spline.size, 2)
    expected = [[naive(spline, float(x[i, j]), by_element[i, :, j]) for j in range(2)] for i in range(40)]
    torch.testing.assert_close(z, torch.tensor(expected), rtol=1e-9, atol=1e-9)
    slope = torch.autograd.functional.jacobian(lambda y: spline.to_base(y, theta)[0].sum(0), x)
    assert isinstance(slope, Tensor)
    torch.testing.assert_close(slope.diagonal(dim1=0, dim2=2).log(), log_slope, rtol=1e-8, atol=1e-8)


def test_the_spline_meets_its_knots_with_their_slopes() -> None:
    spline = Spline(6, B)
    theta = theta_of(spline, 1, 1)
    xs, zs, slopes = knots(spline, theta[0])
    theta = theta.expand(7, -1)
    z, log_slope = spline.to_base(xs.unsqueeze(1), theta)
    torch.testing.assert_close(z[:, 0], zs, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_slope[:, 0].exp(), slopes, rtol=1e-6, atol=0)
    x, back = spline.to_data(zs.unsqueeze(1), theta)
    torch.testing.assert_close(x[:, 0], xs, rtol=0, atol=1e-9)
    torch.testing.assert_close(back, -log_slope, rtol=0, atol=1e-6)


def test_theta_of_zero_is_the_identity() -> None:
    spline, x = Spline(7, B), 2 * torch.randn(50, 3)
    for function in (spline.to_base, spline.to_data):
        y, log_slope = function(x, torch.zeros(50, spline.size * 3))
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bins", [2, 8, 16])
@pytest.mark.parametrize("bound", [1.0, 5.0])
def test_the_inverse_is_exact_in_float32(bins: int, bound: float) -> None:
    spline = Spline(bins, bound)
    inside = torch.linspace(-bound, bound, 1001)
    edges = torch.tensor([-bound, bound]).float()
    edges = torch.cat([edges, torch.nextafter(edges, 2 * edges), torch.nextafter(edges, 0 * edges)])
    x = torch.cat([inside.float(), edges, 1e6 * edges, torch.zeros(1)]).unsqueeze(1)
    theta = theta_of(spline, len(x), 1, 0.5, dtype=torch.float32)
    z, log_slope = spline.to_base(x, theta)
    back, back_log_slope = spline.to_data(z, theta)
    # the inverse divides a rounding error of z by the slope
    steep = log_slope.exp().clamp_max(1)
    assert ((back - x).abs() * steep).max() < 2e-6 * max(1, bound)
    assert (back - x).abs().max() < 1e-5 * max(1, bound)
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=0, atol=1e-3)
    outside = x.abs() > bound
    assert torch.equal(z[outside], x[outside])
    assert not log_slope[outside].any()


@pytest.mark.parametrize("bins", [8, 16])
def test_the_inverse_of_steep_splines_is_exact_up_to_the_slope(bins: int) -> None:
    spline = Spline(bins, 5.0)
    x = 3 * torch.randn(200_000, 1, dtype=torch.float32)
    theta = theta_of(spline, len(x), 1, 3.0, dtype=torch.float32)
    z, log_slope = spline.to_base(x, theta)
    assert ((spline.to_data(z, theta)[0] - x).abs() * log_slope.exp().clamp_max(1)).max() < 2e-5


def test_extreme_theta_stays_invertible_and_finite() -> None:
    spline = Spline(8, B)
    theta, x = theta_of(spline, 500, 1, 1e4), B * torch.randn(500, 1)
    theta[0] = 1e30
    for dtype in (torch.float32, torch.float64):
        y, t = x.to(dtype).requires_grad_(), theta.to(dtype).requires_grad_()
        z, log_slope = spline.to_base(y, t)
        assert z.isfinite().all()
        assert log_slope.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(z.sum() + log_slope.sum(), [y, t]))
        back, back_log_slope = spline.to_data(z.detach(), t)
        assert back.isfinite().all()
        assert back_log_slope.isfinite().all()
        assert torch.autograd.grad(back.sum() + back_log_slope.sum(), t)[0].isfinite().all()
    assert (back - x).abs().max() < 1e-4


def test_not_a_number_stays_one() -> None:
    spline, x = Spline(4, B), torch.tensor([[torch.nan, torch.inf, -torch.inf]])
    theta = theta_of(spline, 1, 3)
    for function in (spline.to_base, spline.to_data):
        assert torch.equal(function(x, theta)[0].nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(6, 3), (2, 2, 3, 1), (0, 3), (1, 1)])
def test_the_gradient_is_that_of_finite_differences_and_of_autograd(shape: tuple[int, ...]) -> None:
    spline = Spline(4, B)
    x = (1.5 * B * torch.rand(shape) - 0.5 * B).requires_grad_()
    theta = torch.randn(shape[0], spline.size * shape[1], *shape[2:], requires_grad=True)
    assert torch.autograd.gradcheck(spline.to_base, (x, theta))
    # create_graph and torch.func use ordinary operations instead of the hand-written gradient
    assert torch.autograd.gradgradcheck(spline.to_base, (x, theta))
    given = (x.detach(), theta.detach())
    hand = torch.autograd.grad(sum(y.sum() for y in spline.to_base(x, theta)), [x, theta])
    functional = grad(lambda *v: sum(y.sum() for y in spline.to_base(*v)), argnums=(0, 1))(*given)
    for a, b in zip(hand, functional, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(spline.to_data, (x, theta))


@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (3, 2, 4, 5), (2, 3, 1, 4), (1, 6, 2, 1), (4, 5), (0, 2, 3, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_elements_of_images_are_mapped_by_their_own_theta(shape: tuple[int, ...], channels_last: bool) -> None:
    spline = Spline(5, B)
    rows, n, *sides = shape
    x, theta = B * torch.randn(shape), torch.randn(rows, spline.size * n, *sides)
    if channels_last and sides:
        x, theta = (y.to(memory_format=torch.channels_last) for y in (x, theta))
    for function in (spline.to_base, spline.to_data):
        y, log_slope = function(x, theta)
        assert y.shape == log_slope.shape == x.shape
        own = theta.unflatten(1, (spline.size, n)).movedim(1, -1).reshape(-1, spline.size)
        one_by_one = function(x.reshape(-1, 1), own)
        torch.testing.assert_close(y.reshape(-1, 1), one_by_one[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_slope.reshape(-1, 1), one_by_one[1], rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func() -> None:
    spline = Spline(4, B)
    x, theta = torch.randn(5, 2), theta_of(spline, 5, 2)

    def of_row(row: Tensor, t: Tensor) -> Tensor:
        return spline.to_base(row.unsqueeze(0), t.unsqueeze(0))[1].sum()

    torch.testing.assert_close(vmap(of_row)(x, theta), spline.to_base(x, theta)[1].sum(1))
    step = 1e-5 * torch.eye(2)
    differences = [(grad(of_row)(x[0] + e, theta[0]) - grad(of_row)(x[0] - e, theta[0])) / 2e-5 for e in step]
    torch.testing.assert_close(hessian(of_row)(x[0], theta[0]), torch.stack(differences), rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    total = sum(spline.to_base(x, theta))
    cotangents = torch.randn(3, 5, 2)
    one_by_one = [torch.autograd.grad(total, x, c, retain_graph=True)[0] for c in cotangents]
    batched = torch.autograd.grad(total, x, cotangents, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


@pytest.mark.parametrize(
    "keys", [{"bins": 1}, {"bound": 0.0}, {"bound": -1.0}, {"least_slope": 0.0}, {"least_slope": 1.0}]
)
def test_settings_out_of_range_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(FlowtrainError):
        Spline(**keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["index", "half", "swapped", "checkerboard"])
def test_every_coupling_takes_splines(kind: str) -> None:
    spline = Spline(5, B)
    if kind == "checkerboard":
        coupling = CheckerboardCoupling((3, 3), False, ConvNet(2, [4], 2 * spline.size), transform=spline)
        x = torch.randn(3, 2, 3, 3)
    elif kind == "index":
        mask = torch.tensor([True, False, True, False, False])
        coupling = IndexCoupling(mask, ResidualMLP(2, [6], 3 * spline.size), transform=spline)
        x = torch.randn(3, 5)
    else:
        kept = 2 if kind == "swapped" else 3
        net = ResidualMLP(kept, [6], (5 - kept) * spline.size)
        coupling = HalfCoupling(5, kind == "swapped", net, input_bound=2.0, transform=spline)
        x = torch.randn(3, 5)
    torch.testing.assert_close(coupling.inverse(x)[0], x)
    for p in coupling.parameters():
        p.data.add_(0.5 * torch.randn_like(p))
    z, log_det = coupling.inverse(x)
    back, back_log_det = coupling(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_log_det, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda y: coupling.inverse(y)[0].sum(0), x)
    assert isinstance(jacobian, Tensor)
    rows = jacobian.reshape(x[0].numel(), len(x), -1).transpose(0, 1)
    torch.testing.assert_close(torch.linalg.slogdet(rows)[1], log_det)
    unchanged = (z == x).flatten(1).all(0)
    assert unchanged.any()
    assert not unchanged.all()
