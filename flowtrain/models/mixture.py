"""A Gaussian mixture fitted by EM (expectation maximization): a strong baseline on small and clustered tables.

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
    """p(x) = sum_k w_k N(x; m_k, L_k L_k^T), k = 1 .. K, with weights, means and factors from EM on the first data.

    Training then changes all of them by gradient steps. Over images (C, H, W), x is the vector of the pixels.

    Args:
        event_shape: the shape of a sample; a number d for vectors of length d.
        components: K. On a table the command chooses it by validation NLL, see `flowtrain.runs.components`.
        covariance: full | diagonal. On a table the command chooses it too.
        prior: the strength of the prior on the covariances, see `flowtrain.bases.GaussianMixture`.

    Raises:
        ConfigError: a setting out of range.
    """
    shape = shape_of(event_shape)
    return Flow(GaussianMixture(shape, whole("model.components", components), covariance, prior), Chain([]))
