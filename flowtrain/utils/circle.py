"""Angles in radians: points of the circle, represented by numbers in [-pi, pi)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowtrain.utils.errors import ConfigError

# float32 rounds pi up, so this is the largest number of float32 below pi
BELOW_PI = float(np.nextafter(np.float32(np.pi), np.float32(0)))
# for each dtype, the smallest number that is at least -pi and the largest number below pi
LIMITS = {torch.float32: (-BELOW_PI, BELOW_PI), torch.float64: (-math.pi, math.nextafter(math.pi, 0))}
# float16 and bfloat16 round pi down to this number
ROUNDED_DOWN = 3.140625


def wrap(x: Tensor) -> Tensor:
    """Returns x - 2 pi k in [-pi, pi), with a whole number k for each element. The derivative is 1 everywhere.

    Example:
        >>> wrap(torch.tensor([0.5, 0.5 + 2 * math.pi, -4.0]))
        tensor([0.5000, 0.5000, 2.2832])
    """
    low, high = LIMITS.get(x.dtype, (-ROUNDED_DOWN, ROUNDED_DOWN))
    y = x - 2 * math.pi * torch.floor((x.detach() + math.pi) / (2 * math.pi))
    # rounding may give -pi - epsilon or pi. Only the value is clamped, so that the derivative remains 1
    return y + (y.clamp(low, high) - y).detach()


def circular_indices(circular: Sequence[int], d: int, name: str = "circular") -> tuple[int, ...]:
    """Returns the indices of circular columns in increasing order.

    Args:
        circular: the indices.
        d: the number of columns.
        name: the name of the argument, for messages.

    Raises:
        ConfigError: an index that is not a whole number from 0 to d - 1, or is given twice.
    """
    found = tuple(sorted(circular)) if isinstance(circular, Sequence) and not isinstance(circular, str) else None
    valid = found is not None and all(type(i) is int and 0 <= i < d for i in found) and len(set(found)) == len(found)
    if found is None or not valid:
        raise ConfigError(f"{name}={circular!r}: give different column indices from 0 to {d - 1}, such as [0]")
    return found
