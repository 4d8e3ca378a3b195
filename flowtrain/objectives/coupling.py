"""Which base point is led to which sample: at random, or by optimal transport within the batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowtrain.errors import ConfigError

Coupling = Callable[[Tensor, Tensor], Tensor]


def independent(z: Tensor, x: Tensor) -> Tensor:
    """z (B, *event) as it is: any base point to any sample."""
    return z


def optimal(z: Tensor, x: Tensor) -> Tensor:
    """z in the order that minimizes sum_i |z_i - x_i|^2 over all pairings of the batch, exactly.

    (Pooladian et al. 2023, Multisample flow matching, eq. 9; Tong et al. 2024, Improving and generalizing flow-based
    generative models with minibatch optimal transport, section 3.2.) Solved on the CPU, in time that grows with B^3.

    Shapes: z, x and the result (B, *event).

    Raises:
        ConfigError: scipy is not installed.

    Example:
        >>> optimal(torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]]))
        tensor([[5.],
                [0.]])
    """
    # |z|^2 and |x|^2 are the same for every pairing
    cost = -(x.flatten(1) @ z.flatten(1).T)
    order = _assignment()(cost.detach().cpu().numpy())[1]
    return z[torch.as_tensor(order, device=z.device)]


def _assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as e:
        raise ConfigError(
            "objective.coupling=optimal needs scipy (pip install 'flowtrain[ot]'); or take coupling=independent"
        ) from e
    return linear_sum_assignment  # type: ignore[no-any-return]


COUPLINGS: dict[str, Coupling] = {"independent": independent, "optimal": optimal}
