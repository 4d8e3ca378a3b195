"""Densities of a one-parameter family blurred by noise: the toys that live along a curve.

A sample is x = c(a) + noise with a drawn from a density w(a), so

    p(x) = integral of w(a) k(x - c(a)) da,

k being the density of the noise. Composite Gauss-Legendre quadrature turns the integral into a finite mixture
with one component per node, summed in the log domain so that far points keep a finite value. The error
falls exponentially once neighbouring nodes lie closer than half a standard deviation of the noise.

Shapes: B points, N nodes or mixture components.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.toy import choice, normal, uniform

_LOG_2PI = math.log(2 * math.pi)


@cache
def _unit_rule(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def gauss_legendre(edges: Tensor, order: int = 48) -> tuple[Tensor, Tensor]:
    """Nodes and weights (N,) of the `order`-point rule on each of the panels between the edges (P + 1,).

    Exact for polynomials of degree 2 order - 1 on each panel; N = P order. A few panels of high order need a
    third fewer nodes than many of low order, which crowd their nodes at every edge.
    """
    unit_nodes, unit_weights = _unit_rule(order)
    half = edges.diff()[:, None] / 2
    centre = (edges[1:] + edges[:-1])[:, None] / 2
    return (centre + half * unit_nodes).flatten(), (half * unit_weights).flatten()


def log_mixture(log_kernels: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_n exp(log_weights_n + log_kernels_bn): (B, N) and (N,) give (B,)."""
    return torch.logsumexp(log_kernels + log_weights, dim=1)


def log_uniform_mixture(log_kernels: Tensor) -> Tensor:
    """log of the mean over components: (B, N) gives (B,)."""
    return torch.logsumexp(log_kernels, dim=1) - math.log(log_kernels.shape[1])


def log_gaussians(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """log N(x; c, std^2 I) of points (B, 2) about every centre (N, 2): shape (B, N)."""
    d1 = x[:, :1] - centres[:, 0]
    d2 = x[:, 1:] - centres[:, 1]
    return -(d1.square() + d2.square()) / (2 * std**2) - _LOG_2PI - 2 * math.log(std)


def log_blurred_circles(x: Tensor, radii: Tensor, std: float) -> Tensor:
    """log density of points (B, 2) under a uniform angle on each circle (K,) plus N(0, std^2 I): shape (B, K).

    With rho = |x| and s = std the integral over the angle is a Bessel function,

        p(x) = exp(-(rho - R)^2 / (2 s^2)) i0e(rho R / s^2) / (2 pi s^2),    i0e(z) = exp(-z) I0(z).
    """
    rho = torch.hypot(x[:, :1], x[:, 1:])
    bessel: Tensor = torch.special.i0e(rho * radii / std**2)
    return bessel.log() - (rho - radii).square() / (2 * std**2) - _LOG_2PI - 2 * math.log(std)


def sample_blurred_circles(n: int, radii: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """`n` samples (n, 2): a circle at random, a uniform angle on it, then N(0, std^2 I)."""
    radius = radii[choice(generator, n, len(radii))]
    angle = 2 * math.pi * uniform(generator, n)
    return polar(radius, angle) + std * normal(generator, n, 2)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """(r cos a, r sin a): two arrays (n,) give (n, 2)."""
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
