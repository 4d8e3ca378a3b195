"""Uniform noise on the integer columns of a table that also has real columns (data.dequantize=[NAME, ...])."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.data.base import step_generator
from flowtrain.data.columns import first_of
from flowtrain.data.read import Table
from flowtrain.errors import ConfigError

# keys of the random streams
_STREAM = 0x6E6F_6973
_BATCH, _SET = 1, 2


def noisy_columns(entries: Sequence[str | int], table: Table) -> tuple[int, ...]:
    """The elements of a sample that `data.dequantize` names, in ascending order.

    Args:
        entries: names of columns, or their positions in the file.
        table: the table of the samples.

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
            why = "is not a column of the samples" if not named else f"names {len(named)} columns: give a position"
            known = [f"{i} ({name})" for i, name in zip(table.indices[:12], table.columns[:12], strict=True)]
            words = first_of(known, len(table.columns))
            raise ConfigError(f"data.dequantize: {entry!r} {why}; {table.path} has {words}")
        chosen.update(named)
    return tuple(sorted(chosen))


def noised_batch(x: Tensor, noisy: Sequence[int], seed: int, step: int, batch_size: int, share: slice) -> Tensor:
    """Adds noise to rows of a training batch, (k, *event_shape), drawn anew for each step.

    Args:
        noisy: positions in the flattened sample of the elements that get noise.
        share: the rows of the batch that x holds. The noise of a row does not depend on the rank.
    """
    return _added(x, _uniform((batch_size, *x.shape[1:]), noisy, seed, _BATCH, step)[share])


def noised_set(x: Tensor, noisy: Sequence[int], seed: int, which: int = 2) -> Tensor:
    """Adds noise to all rows of a set, (n, *event_shape); the noise depends on the seed only.

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
    # 16 + u may round to 17, which belongs to the next whole number
    return torch.minimum(x + noise, torch.nextafter(x + 1, x))
