"""A Gaussian with full covariance: the baseline that any flow must beat."""

import math

from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine
from flowtrain.flow import Flow


def affine(event_shape: tuple[int, ...]) -> Flow:
    """N(m, L L^T) over the d >= 1 elements of a sample, started at the maximum-likelihood fit of the first data."""
    return Flow(event_shape, Chain([Affine(math.prod(event_shape))]))
