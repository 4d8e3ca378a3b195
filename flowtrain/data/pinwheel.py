"""Five bent arms."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.data.toy import Toy, choice, normal

_ARMS = 5
_RADIAL_STD, _TANGENTIAL_STD = 0.3, 0.1
_RATE = 0.25
_PERIOD = 2 * math.pi / _ARMS
# 13 radial standard deviations out, at log p near -90; the number of roots grows as exp(rho).
_LAST_RHO = 5.0
# On the edge of the fold, a set of measure zero far in the tail, the density is infinite.
_SMALLEST_JACOBIAN = 1e-9


class Pinwheel(Toy):
    """pinwheel: x = 2 R(theta) f with f = (r, t), r ~ N(1, 0.3^2), t ~ N(0, 0.1^2).

    R turns clockwise by theta = 2 pi k / 5 + 0.25 exp(r), k = 0 .. 4 equally likely.

    Density: a change of variables with a scalar root. R keeps the length, so x / 2 = rho (cos phi, sin phi) can
    come only from f = (r, t) = rho (cos alpha, sin alpha), alpha in [-pi, pi) being a root of

        h(alpha) = alpha - 0.25 exp(rho cos alpha) - phi = 0  mod 2 pi / 5,

    where the modulus stands for the five arms. det df/dx = 1 / (4 h'(alpha)), h' = 1 + 0.25 exp(r) t, so

        p(x) = 1/4 * 1/5 sum over the roots of N(r; 1, 0.3^2) N(t; 0, 0.1^2) / |h'(alpha)|.

    There are five roots, one per arm, until the map folds (at t < -4 exp(-r), probability 1e-9), and more after
    that. Farther than 10 from the origin, where log p is near -90, log_prob gives the mean over the angle.

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
    """log N(r; 1, 0.3^2) N(t; 0, 0.1^2)."""
    exponent = -((r - 1) / _RADIAL_STD).square() / 2 - (t / _TANGENTIAL_STD).square() / 2
    return exponent - math.log(2 * math.pi * _RADIAL_STD * _TANGENTIAL_STD)


def _log_sum_over_roots(rho: Tensor, phi: Tensor) -> Tensor:
    """log of 1/5 sum over roots of N(r) N(t) / |h'| at polar coordinates (B,), (B,): shape (B,)."""
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
    """h(alpha): a root is where it is a multiple of 2 pi / 5."""
    return alpha - _RATE * (rho * alpha.cos()).exp() - phi


def _monotone_pieces(rho: Tensor) -> Tensor:
    """Edges (B, 4) in [-pi, pi] between which h is monotone in alpha.

    h' = 1 - q(-alpha) with q(u) = 0.25 rho sin(u) exp(rho cos u) can vanish only for alpha in (-pi, 0). There q
    has one maximum, where cos u = rho sin^2 u, so h falls between the two solutions of q(u) = 1, if there are
    any, and rises elsewhere. Without a fold the middle piece is empty.
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
    """Root of an increasing f between lo and hi, elementwise, to the last bit of an angle."""
    for _ in range(54):
        middle = (lo + hi) / 2
        above = f(middle) > 0
        lo, hi = torch.where(above, lo, middle), torch.where(above, middle, hi)
    return (lo + hi) / 2


def _log_mean_over_angle(rho: Tensor) -> Tensor:
    """log of 1/(2 pi) integral of N(r) N(t) d alpha on the circle of radius rho >= 5: shape (B,).

    The integrand is a narrow peak at alpha = 0 (t = 0), so Laplace's method: its curvature there is
    k = rho^2 / 0.1^2 - rho (rho - 1) / 0.3^2, and the integral sqrt(2 pi / k) times the peak.
    """
    curvature = rho * (rho / _TANGENTIAL_STD**2 - (rho - 1) / _RADIAL_STD**2)
    return _log_features(rho, torch.zeros_like(rho)) - (2 * math.pi * curvature).log() / 2
