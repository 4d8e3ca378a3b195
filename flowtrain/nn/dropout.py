"""Factors of dropout, drawn several times as fast as by `torch.nn.functional.dropout` on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowtrain.utils.autograd import transforms_active

# a factor takes 16 random bits
LEVELS = 2**16


def dropout_factors(rate: float, width: int, x: Tensor) -> Tensor | None:
    """Draws a factor for each of `width` hidden units and each row of x (B, n), from the default generator.

    A factor is 0 with probability `rate`, and otherwise 1 / (1 - rate), so that its mean is 1. On a CPU, `rate` is
    rounded to a multiple of 2^-16: torch draws a random number for each factor, and here four factors share one.

    Returns:
        The factors (width, B) with the dtype and the device of x, or None if `rate` is 0.

    Example:
        >>> factors = dropout_factors(0.5, 100, torch.zeros(100, 2))
        >>> sorted(set(factors.flatten().tolist())), 0.9 < factors.mean().item() < 1.1
        ([0.0, 2.0], True)
    """
    kept = round((1 - rate) * LEVELS)
    if kept == LEVELS:
        return None
    shape = (width, len(x))
    # vmap and torch.compile support random numbers only in functions that they know, such as dropout. Whether x is
    # batched is not tested, because vmap may map over the parameters alone, and grad inside of vmap wraps x
    known_only = torch.compiler.is_compiling() or transforms_active()
    if x.device.type != "cpu" or kept == 0 or known_only:
        return F.dropout(x.new_ones(shape), rate)
    n = width * len(x)
    numbers = torch.empty((n + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = numbers.view(torch.int16)[:n].view(shape)
    return torch.lt(bits, kept - LEVELS // 2, out=x.new_empty(shape)).mul_(LEVELS / kept)
