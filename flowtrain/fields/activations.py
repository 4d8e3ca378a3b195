"""Smooth activations with their slopes: a field pushes tangents through the slope, with no second graph."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ValueAndSlope = tuple[Tensor, Tensor]


def tanh(x: Tensor) -> ValueAndSlope:
    y = torch.tanh(x)
    return y, 1 - y * y


def softplus(x: Tensor) -> ValueAndSlope:
    return F.softplus(x), torch.sigmoid(x)


def swish(x: Tensor) -> ValueAndSlope:
    """x sigmoid(x), also known as SiLU."""
    gate = torch.sigmoid(x)
    y = x * gate
    return y, gate + y * (1 - gate)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "softplus": F.softplus, "swish": F.silu}
SLOPES: dict[str, Callable[[Tensor], ValueAndSlope]] = {"tanh": tanh, "softplus": softplus, "swish": swish}
