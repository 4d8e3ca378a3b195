"""Detects a validation NLL that has clearly risen above its best. Runs that overfit so much do not recover."""

import math

import torch
from torch import Tensor

# the largest and smallest number of validation rows that are compared row by row
MOST, LEAST = 2000, 5
# the mean difference must exceed so many standard errors
SIGMAS = 4.0
# differences are clipped at this multiple of their median size, so that one row does not decide
CLIP = 3.0
# if this share of rows is worse, the spread of the differences does not matter
MANY = 0.75
# for samples of more numbers than this, the margin grows in proportion
COLUMNS = 10


def margin(max_rise: float, d: int) -> float:
    """How far the NLL of samples of d numbers may be above the best one, in nats."""
    return max_rise * max(1.0, d / COLUMNS)


def clearly_worse(best: Tensor, now: Tensor, least: float) -> bool:
    """Whether log p of the same rows, (n,) each, is significantly worse, by more than `least` nats.

    The mean difference must exceed `least`. In addition, either a share MANY of the rows must be worse by more than
    `least`, or the mean of the clipped differences must exceed `least` and SIGMAS of its standard errors. No single row
    decides.

    Example:
        >>> before = torch.arange(10.0)
        >>> clearly_worse(before, before - 2 - 0.1 * before, least=1.0), clearly_worse(before, before - 0.5, least=1.0)
        (True, False)
        >>> clearly_worse(before, before - 1000 * (before == 3), least=1.0)
        False
    """
    worse = (best - now).double()
    if len(worse) < LEAST or not bool(worse.isfinite().all()):
        return False
    if float(worse.mean()) <= least:
        return False
    if float((worse > least).double().mean()) >= MANY:
        return True
    limit = float(CLIP * worse.abs().median())
    clipped = worse.clamp(-limit, limit)
    mean, error = float(clipped.mean()), float(clipped.std()) / math.sqrt(len(clipped))
    return mean > max(least, SIGMAS * error)


def some_rows(log_p: Tensor, start: int, n: int) -> Tensor:
    """The entries of log_p that belong to up to MOST evenly spaced rows of a set of n. log_p begins at row `start`."""
    every = max(1, math.ceil(n / MOST))
    return log_p[-start % every :: every].to(torch.float32)
