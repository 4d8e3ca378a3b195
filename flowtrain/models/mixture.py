"""A Gaussian mixture, fitted by expectation maximization (EM): a strong baseline on small and clustered tables.

Example:
    >>> import torch
    >>> flow = mixture(2, components=3)
    >>> flow.base.initialize(torch.randn(100, 2))
    >>> flow.log_prob(torch.zeros(4, 2)).shape
    torch.Size([4])
"""

import math
from collections.abc import Sequence

from flowtrain.bases import ConditionalMixture, GaussianMixture
from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import ContextShift
from flowtrain.flow import Flow
from flowtrain.models.multiscale import conditioned
from flowtrain.utils.arguments import flag, shape_of, whole


def mixture(
    event_shape: int | Sequence[int],
    *,
    components: int = 16,
    covariance: str = "full",
    prior: float = 0.0,
    hidden: Sequence[int] = (64, 64),
    activation: str = "swish",
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
) -> Flow:
    """The Gaussian mixture p(x) = sum_k w_k N(x; m_k, L_k L_k^T), k = 1 .. K.

    EM on the first training rows initializes the weights, means and factors. Training then changes them by gradient
    steps. Images (C, H, W) are flattened. A conditional mixture is a mixture density network, see
    `flowtrain.bases.ConditionalMixture`: its weights, means and factors depend on the context. EM then fits the
    residuals of a linear regression of the data on the context, see `flowtrain.bijections.linear.ContextShift`.

    Args:
        event_shape: d, (d,) or (C, H, W).
        components: K. The command `flowtrain` chooses K for a table by validation NLL, see `flowtrain.runs.components`.
        covariance: full | diagonal. The command `flowtrain` chooses this for a table too.
        prior: the strength of the prior on the covariances, see `flowtrain.bases.GaussianMixture`.
        hidden, activation: the widths of the hidden layers of the network, and relu | tanh | swish. They have an effect
            only with `conditional` or `context`.
        conditional: whether the mixture is p(x | label).
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.

    Raises:
        ConfigError: `conditional` without `classes` or together with `context`, or a setting out of range.
    """
    shape, k = shape_of(event_shape), whole("model.components", components)
    given, kind = conditioned("mixture", flag("model.conditional", conditional), classes, context)
    if given is None:
        return Flow(GaussianMixture(shape, k, covariance, prior), Chain([]))
    base = ConditionalMixture(shape, k, given, covariance, prior, hidden, activation)
    return Flow(base, Chain([ContextShift(math.prod(shape), given)]), **kind)
