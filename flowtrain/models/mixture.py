"""A Gaussian mixture, fitted by expectation maximization (EM): a strong baseline on small and clustered tables.

Example:
    >>> import torch
    >>> flow = mixture(2, components=3)
    >>> flow.base.initialize(torch.randn(100, 2))
    >>> flow.log_prob(torch.zeros(4, 2)).shape
    torch.Size([4])
"""

from collections.abc import Sequence

from flowtrain.bases import GaussianMixture
from flowtrain.bijections.base import Chain
from flowtrain.flow import Flow
from flowtrain.utils.arguments import shape_of, whole


def mixture(
    event_shape: int | Sequence[int], *, components: int = 16, covariance: str = "full", prior: float = 0.0
) -> Flow:
    """The Gaussian mixture p(x) = sum_k w_k N(x; m_k, L_k L_k^T), k = 1 .. K.

    EM on the first training rows initializes the weights, means and factors. Training then changes them by gradient
    steps. Images (C, H, W) are flattened.

    Args:
        event_shape: d, (d,) or (C, H, W).
        components: K. The command `flowtrain` chooses K for a table by validation NLL, see `flowtrain.runs.components`.
        covariance: full | diagonal. The command `flowtrain` chooses this for a table too.
        prior: the strength of the prior on the covariances, see `flowtrain.bases.GaussianMixture`.

    Raises:
        ConfigError: a setting out of range.
    """
    shape = shape_of(event_shape)
    return Flow(GaussianMixture(shape, whole("model.components", components), covariance, prior), Chain([]))
