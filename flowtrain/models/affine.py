"""A Gaussian with full covariance: the baseline that any flow must beat."""

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Chain
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow


def affine(event_shape: tuple[int, ...]) -> Flow:
    """N(m, L L^T) over vectors of length d >= 1, started at the maximum-likelihood fit of the first data.

    Raises:
        ConfigError: images.
    """
    if len(event_shape) != 1:
        raise ConfigError(f"model=affine is for vectors; the data has samples of shape {event_shape}")
    return Flow(event_shape, Chain([Affine(event_shape[0])]))
