"""A Gaussian with full covariance: the baseline that any flow must beat."""

import math
from collections.abc import Sequence

from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine
from flowtrain.flow import Flow
from flowtrain.utils.arguments import shape_of


def affine(event_shape: int | Sequence[int]) -> Flow:
    """A Gaussian N(m, L L^T) over the elements of a sample.

    `flowtrain.train` and `fit` initialize it with the maximum-likelihood fit to the first training rows.

    Args:
        event_shape: d, (d,) or (C, H, W).
    """
    event_shape = shape_of(event_shape)
    return Flow(event_shape, Chain([Affine(math.prod(event_shape))]))
