"""Two interleaved spirals."""

import math

import torch
from torch import Tensor

from flowtrain.data.curve import gauss_legendre, log_mixture, log_uniform_mixture
from flowtrain.data.toy import Toy, choice, normal, uniform

_LAST = 3 * math.pi
_BOX = 0.5 / 3
_STD = 0.1
_LAST_ERFC = 25.0


def _spiral(angle: Tensor) -> Tensor:
    """The lower left corner (n, 2) of the box at angles (n,) of the first spiral, in data units."""
    return torch.stack((-angle.cos() * angle, angle.sin() * angle), dim=1) / 3


def _log_blurred_box(offset: Tensor) -> Tensor:
    """log density of U(-w/2, w/2) + N(0, s^2) at `offset`, any shape, w = 1/6, s = 0.1.

    p(d) = [erfc(a) - erfc(b)] / (2 w),  a = (|d| - w/2) / (s sqrt 2),  b = (|d| + w/2) / (s sqrt 2).

    Taking |d| puts both terms in the tail where erfc keeps its relative accuracy. Beyond a = c = 25 erfc nears
    underflow, and p goes on from there as its leading term, exp(c^2 - a^2) c / a: right to 1e-3 nats at log p
    below -600.
    """
    half = _BOX / 2 / (_STD * math.sqrt(2))
    a = offset.abs() / (_STD * math.sqrt(2)) - half
    near, far = a.clamp_max(_LAST_ERFC), a.clamp_min(_LAST_ERFC)
    mass = (torch.erfc(near) - torch.erfc(near + 2 * half)) / far
    return mass.log() - far.square() + (_LAST_ERFC**2 + math.log(_LAST_ERFC / (2 * _BOX)))


class TwoSpirals(Toy):
    """2spirals: +- [(-n cos n, n sin n) + 0.5 (u1, u2)] / 3 plus N(0, 0.1^2 I), n = 3 pi sqrt(u).

    u, u1, u2 ~ U(0, 1) and a fair sign: a spiral thickened by a box of side 1/6 and by Gaussian noise, and its
    mirror image through the origin. n has density 2 n / (3 pi)^2 on [0, 3 pi].

    Density: p(x) = [q(x) + q(-x)] / 2, q(x) = integral of 2 n / (3 pi)^2 g(x1 - m1(n)) g(x2 - m2(n)) dn
    by quadrature over n, where m(n) is the middle of the box and g a uniform convolved with a Gaussian: a
    difference of two normal distribution functions.

    Source: FFJORD (Grathwohl et al. 2019), lib/toy_data.py.
    Entropy: 2.6455 nats.
    """

    # Midpoint rule on a grid, scripts/entropies.py.
    entropy = 2.6454503

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        corner = _spiral(_LAST * uniform(generator, n).sqrt())
        sign = 2 * choice(generator, n, 2)[:, None] - 1
        return sign * (corner + _BOX * uniform(generator, n, 2)) + _STD * normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        # Edges at the square roots give panels of nearly equal length along the curve.
        angle, weight = gauss_legendre(_LAST * torch.linspace(0, 1, 7, dtype=torch.float64).sqrt())
        middle = _spiral(angle) + _BOX / 2
        log_weight = (weight * 2 * angle / _LAST**2).log()
        arms = []
        for y in (x, -x):
            log_kernel = _log_blurred_box(y[:, :1] - middle[:, 0]) + _log_blurred_box(y[:, 1:] - middle[:, 1])
            arms.append(log_mixture(log_kernel, log_weight))
        return log_uniform_mixture(torch.stack(arms, dim=1))
