"""Uniform noise on the integer columns of a table that has real columns beside them (data.dequantize=[NAME, ...])."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.data.base import step_generator
from flowtrain.data.read import Table
from flowtrain.errors import ConfigError

# keys of the random streams
_STREAM = 0x6E6F_6973
_BATCH, _SET = 1, 2


def noisy_columns(entries: Sequence[str | int], table: Table) -> tuple[int, ...]:
    """Which elements of a sample `data.dequantize` names, in ascending order.

    Args:
        entries: names of columns, or their positions in the file.
        table: the columns that samples consist of.

    Raises:
        ConfigError: an entry that is not one of these columns.

    Example:
        >>> import numpy as np
        >>> noisy_columns(["n", 1], Table(np.ones((2, 2)), ("x", "n"), (1, 3), "file.csv"))
        (0, 1)
    """
    chosen = set()
    for entry in entries:
        named = [i for i, name in enumerate(table.columns) if name == entry]
        if not named and isinstance(entry, int) and not isinstance(entry, bool):
            named = [i for i, position in enumerate(table.indices) if position == entry]
        if len(named) != 1:
            why = "names no column of the samples" if not named else f"names {len(named)} columns: give a position"
            known = ", ".join(f"{i} ({name})" for i, name in zip(table.indices[:12], table.columns[:12], strict=True))
            more = f" and {len(table.columns) - 12} more" if len(table.columns) > 12 else ""
            raise ConfigError(f"data.dequantize: {entry!r} {why}; {table.path} has {known}{more}")
        chosen.update(named)
    return tuple(sorted(chosen))


def noised_batch(x: Tensor, noisy: Sequence[int], seed: int, step: int, batch_size: int, share: slice) -> Tensor:
    """Rows of a training batch, (k, *event_shape), with noise that is drawn anew for each step.

    Args:
        noisy: the elements of a sample that get noise, counted row by row.
        share: which rows of the batch x is: the noise of a row does not depend on the rank that has it.
    """
    return _added(x, _uniform((batch_size, *x.shape[1:]), noisy, seed, _BATCH, step)[share])


def noised_set(x: Tensor, noisy: Sequence[int], seed: int, which: int = 2) -> Tensor:
    """All rows of a set, (n, *event_shape), with noise that is the same for the same seed.

    Args:
        which: 0 and 1 for the validation and the test set, 2 for the rows of a file that is scored.
    """
    return _added(x, _uniform(tuple(x.shape), noisy, seed, _SET, which)) if noisy else x


def _uniform(shape: tuple[int, ...], noisy: Sequence[int], seed: int, *place: int) -> Tensor:
    """U[0, 1) on some elements of each row, and 0 on the others, in float64."""
    u = torch.zeros(shape, dtype=torch.float64)
    generator = step_generator(seed, _STREAM, *place)
    u.flatten(1)[:, list(noisy)] = torch.rand(shape[0], len(noisy), dtype=torch.float64, generator=generator)
    return u


def _added(x: Tensor, u: Tensor) -> Tensor:
    noise = u.to(x.dtype).to(x.device, non_blocking=True)
    # rounding can carry 16 + u up to 17, which belongs to the next number
    return torch.minimum(x + noise, torch.nextafter(x + 1, x))
