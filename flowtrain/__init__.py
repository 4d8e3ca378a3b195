"""flowtrain: train, evaluate and look at normalizing flows.

Example:
    >>> import flowtrain
    >>> flow = flowtrain.load("outputs/2026-01-01/12-00-00")  # doctest: +SKIP
    >>> flow.log_prob(flow.sample(5)).shape  # doctest: +SKIP
    torch.Size([5])
"""

from flowtrain.flow import Flow
from flowtrain.loading import load

__all__ = ["Flow", "load"]
