"""How many rows of a training file are held out for validation and test, and which."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flowtrain.data.base import step_generator
from flowtrain.errors import ConfigError, DataError

SETS = ("val", "test")


def held_out(
    n: int, path: str, given: Sequence[bool], fractions: Sequence[float], most: int | None = None
) -> list[int]:
    """How many of a file's n rows are for validation and for test: none for a set with a file of its own.

    Args:
        given: whether each set has one.
        most: rows for each at the most.

    Raises:
        ConfigError: fractions that leave nothing for training.
        DataError: fewer than two rows for training.
    """
    shares = {name: _fraction(name, f) for name, f, own in zip(SETS, fractions, given, strict=True) if not own}
    if sum(shares.values()) >= 1:
        asked = " and ".join(f"data.{name}_fraction={share}" for name, share in shares.items())
        raise ConfigError(f"{asked} leave nothing for training; their sum must be below 1")
    held = {name: min(max(1, round(n * share)), most or n) for name, share in shares.items()}
    left = n - sum(held.values())
    if left < 2:
        rest = "".join(f", {count} for {name}" for name, count in held.items())
        raise DataError(
            f"{path} has {n} row{'s' * (n != 1)}: {max(left, 0)} for training{rest}; at least 2 are "
            "needed for training and 1 for each held-out set"
        )
    return [held.get(name, 0) for name in SETS]


def split(n: int, sizes: Sequence[int], seed: int, *stream: int) -> list[NDArray[np.int64]]:
    """Which of n rows are for training, and for each of the sizes, at random."""
    order = torch.randperm(n, generator=step_generator(seed, *stream)).numpy()
    ends = np.cumsum([n - sum(sizes), *sizes[:-1]])
    return list(np.split(order, ends))


def _fraction(name: str, fraction: float) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(
            f"data.{name}_fraction={fraction}: a number between 0 and 1 is needed, or give data.{name}_path"
        )
    return float(fraction)
