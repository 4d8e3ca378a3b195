"""The eight toys: moons, circles, rings, 8gaussians, checkerboard, pinwheel, swissroll, 2spirals."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.data.toys.base import (
    Toy,
    choice,
    gauss_legendre,
    log_blurred_circles,
    log_gaussians,
    log_mixture,
    log_uniform_mixture,
    normal,
    polar,
    sample_blurred_circles,
    uniform,
)

_LOG_SQUARE_DENSITY = -math.log(32)


def _square_centres() -> Tensor:
    """Returns the centres (8, 2) of the squares of side 2 whose column and row numbers have an even sum."""
    grid = torch.arange(4)
    cells = torch.cartesian_prod(grid, grid)
    return 2.0 * cells[cells.sum(dim=1) % 2 == 0].double() - 3


_SQUARE_CENTRES = _square_centres()


class Checkerboard(Toy):
    """checkerboard: uniform on the 8 squares of side 2 in [-4, 4]^2 with floor(x1 / 2) + floor(x2 / 2) even.

    Density: 1/32 on the squares, 0 elsewhere, so log_prob is -inf outside. The squares include their edges, because
    float32 may round a sample onto an edge.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py: x1 ~ U(-2, 2),
    x2 = u - 2 b + (floor(x1) mod 2) with u ~ U(0, 1) and b a fair coin, everything times 2.
    Entropy: ln 32 = 3.4657 nats.
    """

    entropy = math.log(32)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return _SQUARE_CENTRES[choice(generator, n, len(_SQUARE_CENTRES))] + 2 * uniform(generator, n, 2) - 1

    def _log_density(self, x: Tensor) -> Tensor:
        inside = ((x[:, None] - _SQUARE_CENTRES).abs() <= 1).all(dim=2).any(dim=1)
        return x.new_full((len(x),), -torch.inf).masked_fill(inside, _LOG_SQUARE_DENSITY)


# FFJORD divides by 1.414, not by the square root of 2.
_GAUSSIAN_STD = 0.5 / 1.414
_GAUSSIAN_ANGLES = math.pi / 4 * torch.arange(8, dtype=torch.float64)
_GAUSSIAN_CENTRES = polar(torch.full_like(_GAUSSIAN_ANGLES, 4 / 1.414), _GAUSSIAN_ANGLES)


class EightGaussians(Toy):
    """8gaussians: one of 8 centres at radius 4 and angles k pi / 4, plus N(0, 0.5^2 I), everything / 1.414.

    Density: p(x) = 1/8 sum_k N(x; c_k, s^2 I), s = 0.5 / 1.414.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py.
    Entropy: 2.8319 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.831880

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return _GAUSSIAN_CENTRES[choice(generator, n, len(_GAUSSIAN_CENTRES))] + _GAUSSIAN_STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        return log_uniform_mixture(log_gaussians(x, _GAUSSIAN_CENTRES, _GAUSSIAN_STD))


_RING_RADII = torch.tensor([3.0, 2.25, 1.5, 0.75], dtype=torch.float64)
_RING_STD = 0.08


class Rings(Toy):
    """rings: radius 3, 2.25, 1.5 or 0.75 with equal chance, uniform angle, plus N(0, 0.08^2 I).

    The noise is added after the scaling by 3, unlike in circles, so the rings are thin.

    Density: p(x) = 1/4 sum_R exp(-(|x| - R)^2 / (2 s^2)) i0e(|x| R / s^2) / (2 pi s^2), s = 0.08.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py, with the angles drawn at random.
    Entropy: 2.6232 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.623183

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return sample_blurred_circles(n, _RING_RADII, _RING_STD, generator)

    def _log_density(self, x: Tensor) -> Tensor:
        return log_uniform_mixture(log_blurred_circles(x, _RING_RADII, _RING_STD))


_CIRCLE_RADII = torch.tensor([3.0, 1.5], dtype=torch.float64)
_CIRCLE_STD = 0.24


class Circles(Toy):
    """circles: radius 1 or 0.5 with equal chance, uniform angle, plus N(0, 0.08^2 I), everything times 3.

    In data units, the radii are 3 and 1.5, and the noise has standard deviation 0.24.

    Density: p(x) = 1/2 sum_R exp(-(|x| - R)^2 / (2 s^2)) i0e(|x| R / s^2) / (2 pi s^2), s = 0.24.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py, with the angles drawn at random.
    Entropy: 3.2681 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 3.268136

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return sample_blurred_circles(n, _CIRCLE_RADII, _CIRCLE_STD, generator)

    def _log_density(self, x: Tensor) -> Tensor:
        return log_uniform_mixture(log_blurred_circles(x, _CIRCLE_RADII, _CIRCLE_STD))


_MOON_STD = 0.2


def _half_circles(angle: Tensor) -> Tensor:
    """Returns the points (2, n, 2) of both moons at angles (n,) in [0, pi], in data units."""
    upper = torch.stack((2 * angle.cos() - 1, 2 * angle.sin() - 0.2), dim=1)
    lower = torch.stack((1 - 2 * angle.cos(), 0.8 - 2 * angle.sin()), dim=1)
    return torch.stack((upper, lower))


class Moons(Toy):
    """moons: x = 2 m + (-1, -0.2) with m on one of two half circles plus noise.

    m = (cos a, sin a) or (1 - cos a, 1/2 - sin a) with equal chance, a ~ U(0, pi), plus N(0, 0.1^2 I). In data units,
    the half circles have radius 2, and the noise has standard deviation 0.2.

    Density: p(x) = 1/2 sum_m 1/pi integral_0^pi N(x; c_m(a), 0.2^2 I) da, by quadrature over a.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py, with the angles drawn at random.
    Entropy: 2.3939 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.393879

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        both = _half_circles(math.pi * uniform(generator, n))
        moon = choice(generator, n, 2)
        return both[moon, torch.arange(n)] + _MOON_STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        angle, weight = gauss_legendre(torch.linspace(0, math.pi, 3, dtype=torch.float64))
        moons = [log_mixture(log_gaussians(x, c, _MOON_STD), (weight / math.pi).log()) for c in _half_circles(angle)]
        return log_uniform_mixture(torch.stack(moons, dim=1))


_ARMS = 5
_RADIAL_STD, _TANGENTIAL_STD = 0.3, 0.1
_RATE = 0.25
_PERIOD = 2 * math.pi / _ARMS
# The largest radius at which roots are searched, because their number grows as exp(rho). It is 13 radial standard
# deviations from the mean, where log p is near -90
_LAST_RHO = 5.0
# On the edge of the fold, a set of measure zero far in the tail, the density is infinite
_SMALLEST_JACOBIAN = 1e-9


class Pinwheel(Toy):
    """pinwheel: x = 2 R(theta) f with f = (r, t), r ~ N(1, 0.3^2), t ~ N(0, 0.1^2).

    R rotates clockwise by theta = 2 pi k / 5 + 0.25 exp(r), k = 0 .. 4 equally likely.

    Density: a change of variables with a scalar root. Rotations preserve lengths, so x / 2 = rho (cos phi, sin phi) can
    come only from f = (r, t) = rho (cos alpha, sin alpha), where alpha in [-pi, pi) is a root of

        h(alpha) = alpha - 0.25 exp(rho cos alpha) - phi = 0  mod 2 pi / 5.

    The modulus represents the five arms. With det df/dx = 1 / (4 h'(alpha)) and h' = 1 + 0.25 exp(r) t,

        p(x) = 1/4 * 1/5 sum over the roots of N(r; 1, 0.3^2) N(t; 0, 0.1^2) / |h'(alpha)|.

    There are five roots, one per arm, and more where the map folds (t < -4 exp(-r), probability 1e-9). Farther than 10
    from the origin, where log p is near -90, log_prob returns the log of the mean density over the angle.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py.
    Entropy: 2.3178 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.317788
    _chunk = 2048

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        std = torch.tensor([_RADIAL_STD, _TANGENTIAL_STD], dtype=torch.float64)
        r, t = (normal(generator, n, 2) * std).unbind(dim=1)
        r = r + 1
        theta = _PERIOD * choice(generator, n, _ARMS).double() + _RATE * r.exp()
        cos, sin = theta.cos(), theta.sin()
        return 2 * torch.stack((r * cos + t * sin, t * cos - r * sin), dim=1)

    def _log_density(self, x: Tensor) -> Tensor:
        y = x / 2
        rho = torch.hypot(y[:, 0], y[:, 1])
        phi = torch.atan2(y[:, 1], y[:, 0])
        near = rho < _LAST_RHO
        out = _log_mean_over_angle(rho.clamp_min(_LAST_RHO))
        out[near] = _log_sum_over_roots(rho[near], phi[near])
        return out - math.log(4)


def _log_features(r: Tensor, t: Tensor) -> Tensor:
    """Returns log N(r; 1, 0.3^2) N(t; 0, 0.1^2)."""
    exponent = -((r - 1) / _RADIAL_STD).square() / 2 - (t / _TANGENTIAL_STD).square() / 2
    return exponent - math.log(2 * math.pi * _RADIAL_STD * _TANGENTIAL_STD)


def _log_sum_over_roots(rho: Tensor, phi: Tensor) -> Tensor:
    """Returns the log of 1/5 sum over roots of N(r) N(t) / |h'| at polar coordinates (B,), (B,): shape (B,)."""
    edges = _monotone_pieces(rho)
    left, right = edges[:, :-1], edges[:, 1:]
    rho3, phi3 = rho[:, None].expand_as(left), phi[:, None].expand_as(left)
    ends = torch.stack((_turn(left, rho3, phi3), _turn(right, rho3, phi3)))
    first, past = (ends.amin(dim=0) / _PERIOD).ceil(), (ends.amax(dim=0) / _PERIOD).ceil()

    number = first[..., None] + torch.arange(_largest(past - first), dtype=torch.float64)
    exists = number < past[..., None]
    target = _PERIOD * number[exists]
    lo, hi, rho_r, phi_r, sign = (
        a[..., None].expand_as(number)[exists] for a in (left, right, rho3, phi3, (ends[1] - ends[0]).sign())
    )
    alpha = _bisect(lambda a: sign * (_turn(a, rho_r, phi_r) - target), lo, hi)
    r, t = rho_r * alpha.cos(), rho_r * alpha.sin()
    jacobian = (1 + _RATE * r.exp() * t).abs().clamp_min(_SMALLEST_JACOBIAN)

    terms = torch.full_like(number, -torch.inf)
    terms[exists] = _log_features(r, t) - jacobian.log()
    return torch.logsumexp(terms, dim=(1, 2)) - math.log(_ARMS)


def _largest(count: Tensor) -> int:
    return int(count.max()) if count.numel() else 0


def _turn(alpha: Tensor, rho: Tensor, phi: Tensor) -> Tensor:
    """Returns h(alpha). alpha is a root if h(alpha) is a multiple of 2 pi / 5."""
    return alpha - _RATE * (rho * alpha.cos()).exp() - phi


def _monotone_pieces(rho: Tensor) -> Tensor:
    """Returns edges (B, 4) in [-pi, pi] between which h is monotone in alpha.

    h' = 1 - q(-alpha) with q(u) = 0.25 rho sin(u) exp(rho cos u) can vanish only for alpha in (-pi, 0). There q has one
    maximum, at cos u = rho sin^2 u. If q(u) = 1 has two solutions, h decreases between them; elsewhere h increases.
    Without solutions (no fold) the middle interval is empty.
    """

    def excess(u: Tensor) -> Tensor:
        return _RATE * rho * u.sin() * (rho * u.cos()).exp() - 1

    peak = (2 * rho / (1 + (1 + 4 * rho.square()).sqrt())).acos()
    folds = excess(peak) > 0
    near = torch.where(folds, _bisect(excess, torch.zeros_like(peak), peak), peak)
    far = torch.where(folds, _bisect(lambda u: -excess(u), peak, torch.full_like(peak, math.pi)), peak)
    end = torch.full_like(peak, math.pi)
    return torch.stack((-end, -far, -near, end), dim=1)


def _bisect(f: Callable[[Tensor], Tensor], lo: Tensor, hi: Tensor) -> Tensor:
    """Finds the root of an increasing f between lo and hi by bisection, elementwise, to the last bit of an angle."""
    for _ in range(54):
        middle = (lo + hi) / 2
        above = f(middle) > 0
        lo, hi = torch.where(above, lo, middle), torch.where(above, middle, hi)
    return (lo + hi) / 2


def _log_mean_over_angle(rho: Tensor) -> Tensor:
    """Returns the log of 1/(2 pi) integral of N(r) N(t) d alpha on the circle of radius rho >= 5: shape (B,).

    The integrand is a narrow peak at alpha = 0 (t = 0), so Laplace's method applies. The curvature of the log integrand
    at the peak is -k with k = rho^2 / 0.1^2 - rho (rho - 1) / 0.3^2. The integral is sqrt(2 pi / k) times the peak.
    """
    curvature = rho * (rho / _TANGENTIAL_STD**2 - (rho - 1) / _RADIAL_STD**2)
    return _log_features(rho, torch.zeros_like(rho)) - (2 * math.pi * curvature).log() / 2


_ROLL_STD = 0.2
_ROLL_FIRST, _ROLL_LAST = 1.5 * math.pi, 4.5 * math.pi


class SwissRoll(Toy):
    """swissroll: x = (a cos a, a sin a) / 5 plus noise, a = 1.5 pi (1 + 2 u), u ~ U(0, 1).

    The noise is N(0, I) before the division by 5, so its standard deviation is 0.2 in data units.

    Density: p(x) = 1/(3 pi) integral of N(x; (a cos a, a sin a) / 5, 0.2^2 I) da over [1.5 pi, 4.5 pi], by
    quadrature over a.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py: columns 0 and 2 of scikit-learn's Swiss roll.
    Entropy: 2.6696 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.669646

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        angle = _ROLL_FIRST + (_ROLL_LAST - _ROLL_FIRST) * uniform(generator, n)
        return polar(angle / 5, angle) + _ROLL_STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        angle, weight = gauss_legendre(torch.linspace(_ROLL_FIRST, _ROLL_LAST, 6, dtype=torch.float64))
        return log_mixture(
            log_gaussians(x, polar(angle / 5, angle), _ROLL_STD), (weight / (_ROLL_LAST - _ROLL_FIRST)).log()
        )


_SPIRAL_LAST = 3 * math.pi
_SPIRAL_BOX = 0.5 / 3
_SPIRAL_STD = 0.1
_LAST_ERFC = 25.0


def _spiral(angle: Tensor) -> Tensor:
    """Returns the lower left corners (n, 2) of the boxes at angles (n,) of the first spiral, in data units."""
    return torch.stack((-angle.cos() * angle, angle.sin() * angle), dim=1) / 3


def _log_blurred_box(offset: Tensor) -> Tensor:
    """Returns the log density of U(-w/2, w/2) + N(0, s^2) at `offset` (any shape), w = 1/6, s = 0.1.

    p(d) = [erfc(a) - erfc(b)] / (2 w),  a = (|d| - w/2) / (s sqrt 2),  b = (|d| + w/2) / (s sqrt 2).

    With |d| both arguments are in the tail in which erfc keeps its relative accuracy. For a > c = 25, erfc is close to
    underflow, so p(d) is computed as its value at a = c times exp(c^2 - a^2) c / a, the ratio of the leading terms.
    There log p is below -600, and its error is 1e-3 nats.
    """
    half = _SPIRAL_BOX / 2 / (_SPIRAL_STD * math.sqrt(2))
    a = offset.abs() / (_SPIRAL_STD * math.sqrt(2)) - half
    near, far = a.clamp_max(_LAST_ERFC), a.clamp_min(_LAST_ERFC)
    mass = (torch.erfc(near) - torch.erfc(near + 2 * half)) / far
    return mass.log() - far.square() + (_LAST_ERFC**2 + math.log(_LAST_ERFC / (2 * _SPIRAL_BOX)))


class TwoSpirals(Toy):
    """2spirals: +- [(-n cos n, n sin n) + 0.5 (u1, u2)] / 3 plus N(0, 0.1^2 I), n = 3 pi sqrt(u).

    u, u1, u2 ~ U(0, 1), and both signs have equal chance. The result is a spiral thickened by a box of side 1/6 and by
    Gaussian noise, and its mirror image through the origin. n has density 2 n / (3 pi)^2 on [0, 3 pi].

    Density: p(x) = [q(x) + q(-x)] / 2, q(x) = integral of 2 n / (3 pi)^2 g(x1 - m1(n)) g(x2 - m2(n)) dn by quadrature
    over n. Here m(n) is the middle of the box, and g is a uniform density convolved with a Gaussian, which is a
    difference of two normal distribution functions.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py.
    Entropy: 2.6455 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.6454503

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        corner = _spiral(_SPIRAL_LAST * uniform(generator, n).sqrt())
        sign = 2 * choice(generator, n, 2)[:, None] - 1
        return sign * (corner + _SPIRAL_BOX * uniform(generator, n, 2)) + _SPIRAL_STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        # edges at square roots give panels of nearly equal length along the curve
        angle, weight = gauss_legendre(_SPIRAL_LAST * torch.linspace(0, 1, 7, dtype=torch.float64).sqrt())
        middle = _spiral(angle) + _SPIRAL_BOX / 2
        log_weight = (weight * 2 * angle / _SPIRAL_LAST**2).log()
        arms = []
        for y in (x, -x):
            log_kernel = _log_blurred_box(y[:, :1] - middle[:, 0]) + _log_blurred_box(y[:, 1:] - middle[:, 1])
            arms.append(log_mixture(log_kernel, log_weight))
        return log_uniform_mixture(torch.stack(arms, dim=1))
