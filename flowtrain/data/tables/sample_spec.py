"""Conversion of the rows of a table to samples: real or integer-valued, vectors or images, with noise on columns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import step_generator
from flowtrain.data.in_memory import Extras, Store
from flowtrain.data.tables.column_types import check_types
from flowtrain.data.tables.columns import first_of
from flowtrain.data.tables.table_checks import check_levels, check_range, check_whole
from flowtrain.data.tables.table_reader import Table
from flowtrain.data.types import NODES, ColumnType, circular_columns, edge_columns, on_line, spread_edges
from flowtrain.utils.errors import ConfigError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class SampleSpec:
    """The shape and type of samples.

    Attributes:
        event_shape: the shape of one sample.
        integer_valued: whether samples are whole numbers.
        levels: whole numbers are 0 to levels - 1. None if they are not bounded.
        noisy: the columns of whole numbers to which noise is added. Only real-valued vectors have such columns.
        wide: whether real samples are float64 because float32 loses significant digits.
        types: the type of each column; () if all columns are real.
    """

    event_shape: tuple[int, ...]
    integer_valued: bool
    levels: int | None
    noisy: tuple[int, ...] = ()
    wide: bool = False
    types: tuple[ColumnType, ...] = ()

    def check(self, table: Table, blocks: Iterable[Table] | None = None, ranges: bool = True) -> None:
        """Raises DataError if values do not fit this specification; see `check_levels` for `blocks`.

        Args:
            ranges: whether values outside of the range of their type are refused. In new data, their density is 0.
        """
        check_range(table)
        check_types(table, self.types, ranges)
        if (self.integer_valued or self.noisy) and not self.types:
            check_whole(table, range(len(table.columns)) if self.integer_valued else self.noisy, blocks)
        if self.levels is not None:
            check_levels(table, self.levels, blocks)

    def samples(self, values: NDArray[Any], real: type[np.floating[Any]] | None = None) -> Tensor:
        """Converts rows (n, d) to samples (n, *event_shape): whole numbers to uint8 or int64, others to `real`.

        `real` None means float64 if `wide`, else float32. Rows that already have the type are not copied; the samples
        share their memory.
        """
        narrow = np.uint8 if self.levels is not None and self.levels <= 256 else np.int64
        real = real or (np.float64 if self.wide else np.float32)
        for i in circular_columns(self.types):
            # wrapped in float64, because float32 does not resolve an angle after many turns
            low, high = self.types[i].support
            values = values.astype(np.float64)
            values[:, i] = low + np.mod(values[:, i] - low, high - low)
        narrowed = values.astype(narrow if self.integer_valued else real, copy=False)
        return torch.from_numpy(narrowed).view(-1, *self.event_shape)

    def moments(self, mean: Values, variance: Values) -> tuple[Values, Values]:
        """Returns mean and standard deviation of samples, (d,): moments of rows plus moments of the noise U[0, 1)."""
        noise = self.noise(len(mean))
        return mean + noise / 2, np.sqrt(variance + noise / 12)

    def on_line(self, values: Values) -> list[Values]:
        """Returns rows (n, d), mapped to the real line by their types; [] without types.

        For bounded whole numbers, there is an array for each noise value of NODES, so that moments over all arrays
        include the noise and are not random.
        """
        nodes = NODES if any(one.is_whole and one.is_bounded for one in self.types) else (0.0,)
        return [on_line(self.types, values, u) for u in nodes] if self.types else []

    def line_moments(self, mean: Values, variance: Values) -> tuple[Values, Values]:
        """Returns mean and standard deviation on the real line, (d,), from the moments of the rows of `on_line`.

        Circular columns are not standardised: they have the mean 0 and the standard deviation 1.
        """
        unbounded = np.array([float(one.is_whole and not one.is_bounded) for one in self.types])
        mean, std = mean + unbounded / 2, np.sqrt(variance + unbounded / 12)
        circular = list(circular_columns(self.types))
        mean[circular], std[circular] = 0.0, 1.0
        return mean, std

    def noise(self, d: int) -> Values:
        """Returns 1 for columns with added noise and 0 for others, (d,)."""
        noise = np.full(d, float(self.integer_valued))
        noise[list(self.noisy)] = 1.0
        return noise


@dataclass(frozen=True)
class Part:
    """A held-out set.

    Attributes:
        x: samples, (n, *event_shape).
        extras: labels, context and weights.
        rows: the row numbers of the set in the training file, (n,). If the set has a separate file, the row count and
            checksum of that file.
        numbers: the row numbers of the set in its separate file, (n,). Empty for a set of the training file.
    """

    x: Tensor
    extras: Extras
    rows: NDArray[np.int64] | tuple[int, str]
    numbers: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class TrainingSplit:
    """A training file, split into training rows and held-out sets, with statistics of the rows.

    Attributes:
        store: the training rows.
        n: the number of training rows.
        held: the held-out sets.
        mean, variance: of each column over the training rows, (d,).
        subset: a random subset of the training rows, (k, d).
        whole: whether each column contains only whole numbers that noise can be added to, (d,).
        hashes: hashes of about one in `hash_step` training rows, see `row_hashes`.
        class_counts: the number of training rows of each label from 0 to the largest; empty without labels.
        checksum: the checksum of the file, including labels, context and weights.
        context: mean and variance of each context column over the training rows, (2, k); None without context.
        subset_extras: labels, context and weights of `subset`.
        mean_weight: the mean weight of the training rows. 1 without weights.
        on_line: mean and variance of the training rows on the real line, (2, d), see `SampleSpec.on_line`. None
            without types.
    """

    store: Store
    n: int
    held: list[Part]
    mean: Values
    variance: Values
    subset: NDArray[Any]
    whole: NDArray[np.bool_]
    hashes: NDArray[np.uint64]
    hash_step: int
    class_counts: NDArray[np.int64]
    checksum: str
    context: Values | None
    subset_extras: Extras
    mean_weight: float
    on_line: Values | None = None


# keys of the random streams
_NOISE_STREAM = 0x6E6F_6973
_BATCH_NOISE, _SET_NOISE = 1, 2


def noisy_columns(entries: Sequence[str | int], table: Table) -> tuple[int, ...]:
    """Returns the positions in a sample of the columns that `data.dequantize` names, in ascending order.

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
            why = "is not a column of the samples" if not named else f"names {len(named)} columns, so give a position"
            known = [f"{i} ({name})" for i, name in zip(table.indices[:12], table.columns[:12], strict=True)]
            words = first_of(known, len(table.columns))
            raise ConfigError(f"data.dequantize: {entry!r} {why}; {table.path} has {words}")
        chosen.update(named)
    return tuple(sorted(chosen))


def add_batch_noise(
    x: Tensor,
    noisy: Sequence[int],
    seed: int,
    step: int,
    batch_size: int,
    share: slice,
    types: Sequence[ColumnType] = (),
) -> Tensor:
    """Adds noise to rows of a training batch, (k, *event_shape). Each step has new noise.

    Args:
        noisy: positions in the flattened sample of the elements that get noise.
        share: the rows of the batch that x consists of. The noise of a row does not depend on the rank.
        types: the types of the columns. Values at the ends of an interval are spread, see `spread_edges`.
    """
    columns = (*noisy, *edge_columns(types))
    if not columns:
        return x
    return _add_noise(x, _uniform((batch_size, *x.shape[1:]), columns, seed, _BATCH_NOISE, step)[share], types)


def add_set_noise(
    x: Tensor, noisy: Sequence[int], seed: int, which: int = 2, types: Sequence[ColumnType] = ()
) -> Tensor:
    """Adds noise to all rows of a set, (n, *event_shape). The noise depends only on the seed and on `which`.

    Args:
        which: the number of the set: 0 for the validation set, 1 for the test set, 2 for rows to score.
        types: see `add_batch_noise`.
    """
    columns = (*noisy, *edge_columns(types))
    return _add_noise(x, _uniform(tuple(x.shape), columns, seed, _SET_NOISE, which), types) if columns else x


def _uniform(shape: tuple[int, ...], noisy: Sequence[int], seed: int, *place: int) -> Tensor:
    """Returns noise of this shape, float64: U[0, 1) on the elements `noisy` of each row, 0 on the others."""
    u = torch.zeros(shape, dtype=torch.float64)
    generator = step_generator(seed, _NOISE_STREAM, *place)
    u.flatten(1)[:, list(noisy)] = torch.rand(shape[0], len(noisy), dtype=torch.float64, generator=generator)
    return u


def _add_noise(x: Tensor, u: Tensor, types: Sequence[ColumnType] = ()) -> Tensor:
    edges = list(edge_columns(types))
    if edges:
        x = spread_edges(x, types, u.to(x.dtype).to(x.device))
        u[:, edges] = 0
    noise = u.to(x.dtype).to(x.device, non_blocking=True)
    # x + u may round up to the next whole number, which is a different value
    return torch.minimum(x + noise, torch.nextafter(x + 1, x))
