"""A Gaussian with full covariance: the baseline that any flow must beat."""

import math
from collections.abc import Sequence

from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine, ContextShift
from flowtrain.flow import Flow
from flowtrain.models.multiscale import conditioned
from flowtrain.utils.arguments import flag, shape_of


def affine(
    event_shape: int | Sequence[int],
    *,
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
) -> Flow:
    """A Gaussian N(m, L L^T) over the elements of a sample, or N(m + A c, L L^T) for a context c.

    `flowtrain.train` and `fit` initialize it with the maximum-likelihood fit to the first training rows.

    Args:
        event_shape: d, (d,) or (C, H, W).
        conditional: whether the flow is p(x | label). c is then the one-hot label.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.

    Raises:
        ConfigError: `conditional` without `classes` or together with `context`, or a setting out of range.
    """
    event_shape = shape_of(event_shape)
    given, kind = conditioned("affine", flag("model.conditional", conditional), classes, context)
    d = math.prod(event_shape)
    return Flow(event_shape, Chain([Affine(d), *([] if given is None else [ContextShift(d, given)])]), **kind)
