"""A validation NLL that has clearly risen above its best: a sign of overfitting from which runs do not come back."""

import math

import torch
from torch import Tensor

# rows of the validation set that are compared one by one, at most and at least
MOST, LEAST = 2000, 5
# standard errors that the difference must exceed
SIGMAS = 4.0
# differences beyond so many times their median size count as that many: one row must not decide
CLIP = 3.0
# the share of rows that settles the question whatever the spread of the differences is
MANY = 0.75
# columns of a sample from which on the margin grows with them
COLUMNS = 10


def margin(max_rise: float, d: int) -> float:
    """The nats by which the NLL of samples of d numbers may be above the best one."""
    return max_rise * max(1.0, d / COLUMNS)


def clearly_worse(best: Tensor, now: Tensor, least: float) -> bool:
    """Whether log p of the same rows, (n,) each, has become worse by more than `least` nats, beyond doubt.

    The mean of the differences exceeds `least`, and so do either MANY of the rows, or the mean of clipped differences,
    which also exceeds SIGMAS standard errors of its own. Neither one bad row nor one good row decides.

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
    """Up to MOST rows of a set of n, evenly spread; of log_p, which has the rows of the set from `start` on."""
    every = max(1, math.ceil(n / MOST))
    return log_p[-start % every :: every].to(torch.float32)
