"""Streaming of training rows from a .npy file: the file is read once for statistics, then in windows of rows."""

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Checksum, Ids, step_generator
from flowtrain.data.in_memory import Extras
from flowtrain.data.tables.columns import Columns, default_names, pick
from flowtrain.data.tables.ids import id_position, whole_ids
from flowtrain.data.tables.missing import REFUSED, Missing
from flowtrain.data.tables.roles import Roles, RoleTables, divided, picked_types
from flowtrain.data.tables.sample_spec import Part, SampleSpec, TrainingSplit, Values
from flowtrain.data.tables.table_checks import check_mean_weight, row_hashes, whole_columns
from flowtrain.data.tables.table_reader import (
    Table,
    check_array,
    check_array_headers,
    check_file,
    check_finite,
    damage_refused,
    npy_header,
)
from flowtrain.data.types import CATEGORICAL, ColumnType
from flowtrain.utils.arguments import flag
from flowtrain.utils.errors import ConfigError, DataError

_log = logging.getLogger("flowtrain")


class NpyRows:
    """The rows of a .npy file: an array (n, width), or (n,) for one column.

    Rows are read, not memory-mapped: mapped pages count as memory of the process, and the process crashes if a mapped
    file becomes shorter. The file stays open, so another file that gets its name is never read.

    Attributes:
        n, width: the numbers of rows and columns.

    Raises:
        DataError: a file that is missing, damaged or truncated, or an array of another shape, order or type.
    """

    def __init__(self, path: str) -> None:
        self.path = file = Path(path).expanduser()
        check_file(file)
        try:
            with damage_refused(file):
                self._file = file.open("rb", buffering=0)
                weakref.finalize(self, self._file.close)
                check_array_headers(self._file, file)
                self.shape, fortran, self.dtype = npy_header(self._file)
                self._begin = self._file.tell()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        check_array(self.shape, self.dtype, file)
        if fortran:
            raise DataError(
                f"{file} is in Fortran order (stored by columns) and cannot be read by rows: save it with "
                "numpy.save(path, numpy.ascontiguousarray(array)), or give data.memory_map=false"
            )
        self.n, self.width = self.shape[0], self.shape[1] if len(self.shape) == 2 else 1
        self._state = self._stat()

    @property
    def row_bytes(self) -> int:
        """The number of bytes of a row in the file."""
        return self.width * self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Reads rows start to stop, (stop - start, width), in the dtype of the file.

        Raises:
            DataError: the file can no longer be read, or it has changed since it was opened.
        """
        rows = np.empty((stop - start, self.width), self.dtype)
        room = rows.reshape(-1).view(np.uint8)
        try:
            self._file.seek(self._begin + start * self.row_bytes)
            while len(room) and (got := self._file.readinto(room.data)):
                room = room[got:]
            # checked after reading, so that changes during reading are detected
            same = self._stat() == self._state and not len(room)
        except OSError as error:
            raise DataError(f"{self.path} can no longer be read: {error.strerror or error}") from error
        if not same:
            raise DataError(
                f"{self.path} has been written to since it was opened, so its rows are not the rows that were checked. "
                "Restore the file, and write new data to another file"
            )
        return rows

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


class Piece(NamedTuple):
    """The part of a batch that lies in one window: positions `start` to `stop` in window `window` of an epoch."""

    epoch: int
    window: int
    start: int
    stop: int


class WindowedEpochs:
    """An endless sequence of epochs, shuffled by blocks. Each epoch contains each of n positions once.

    No permutation of all n positions is stored. In each epoch, blocks of adjacent positions get a new random order.
    Consecutive blocks in this order form a window, and positions are shuffled within a window. As with `Epochs`, the
    batch of a step is a pure function of (step, batch_size, seed).

    Args:
        n: the number of positions.
        block: the number of adjacent positions in a block. A block is read in one operation.
        blocks: the largest number of blocks in a window. Windows differ by at most one block, because a short last
            window would be shuffled less.
        stream: the key of the random stream. The epoch, or the epoch and the window, are appended to this key.
    """

    def __init__(self, n: int, block: int, blocks: int, *stream: int) -> None:
        self.n, self.block, self.stream = n, block, stream
        n_blocks = -(-n // block)
        n_windows = -(-n_blocks // blocks)
        # the first block of each window in the order of blocks, followed by the number of blocks
        self._begins = [n_blocks * i // n_windows for i in range(n_windows + 1)]
        self._order: tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64]] | None = None

    def pieces(self, first: int, count: int, seed: int) -> Iterator[Piece]:
        """Yields the pieces that contain positions first to first + count of the sequence of epochs, in order."""
        while count:
            epoch, offset = divmod(first, self.n)
            ends = self._epoch(epoch, seed)[1]
            window = int(np.searchsorted(ends, offset, side="right"))
            begin = int(ends[window - 1]) if window else 0
            stop = min(offset - begin + count, int(ends[window]) - begin)
            yield Piece(epoch, window, offset - begin, stop)
            taken = stop - (offset - begin)
            first, count = first + taken, count - taken

    def blocks_of(self, epoch: int, window: int, seed: int) -> list[tuple[int, int]]:
        """Returns (start, stop) of each block in a window."""
        order = self._epoch(epoch, seed)[0][self._begins[window] : self._begins[window + 1]]
        return [(int(b) * self.block, min(self.n, (int(b) + 1) * self.block)) for b in order]

    def mixed(self, epoch: int, window: int, size: int, seed: int) -> NDArray[np.int64]:
        """Returns a random permutation of the `size` positions of a window."""
        return torch.randperm(size, generator=step_generator(seed, *self.stream, epoch, window)).numpy()

    def _epoch(self, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the order of the blocks, and the position at which each window ends."""
        if self._order is None or self._order[0] != (epoch, seed):
            n_blocks = self._begins[-1]
            order = torch.randperm(n_blocks, generator=step_generator(seed, *self.stream, epoch)).numpy()
            lengths = np.full(n_blocks, self.block)
            lengths[order == n_blocks - 1] = self.n - (n_blocks - 1) * self.block
            self._order = (epoch, seed), order, lengths.cumsum()[np.array(self._begins[1:]) - 1]
        return self._order[1:]


# Size in bytes of a block, and of a window including the order of its rows
BLOCK, WINDOW = 2**18, 2**26
# Number of windows in memory
KEPT = 2


class StreamedStore:
    """A store of the training rows of a .npy file; see `Store`.

    Args:
        rows: the file.
        held: the row numbers that are held out, sorted.
        tables: the columns by role, without rows.
        mean_weight: the mean weight of the training rows, by which weights are divided.
        to_samples: converts values (k, d) to samples.
        stream: the key of the random stream of the order.

    Attributes:
        n: the number of training rows.
        in_window: a number of rows that usually fits in one window.
    """

    def __init__(
        self,
        rows: NpyRows,
        held: NDArray[np.int64],
        tables: RoleTables,
        mean_weight: float,
        to_samples: Callable[[NDArray[Any]], Tensor],
        *stream: int,
    ) -> None:
        self._rows, self._held, self._to_samples = rows, held, to_samples
        self._tables, self._mean_weight = tables, mean_weight
        columns = tables.samples.indices
        self._columns = slice(None) if columns == tuple(range(rows.width)) else list(columns)
        # the number of training rows before each held-out row
        self._before = held - np.arange(len(held))
        self.n = rows.n - len(held)
        block = max(1, BLOCK // rows.row_bytes)
        blocks = max(1, WINDOW // (block * (rows.row_bytes + 8)))
        self._windows = WindowedEpochs(self.n, block, blocks, *stream)
        self.in_window = min(self.n, block * max(1, blocks // 2))
        self._kept: dict[tuple[int, int, int], NDArray[Any]] = {}
        self._pinned = False

    def samples(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Returns the rows `share` of the batch of a step, (k, *event_shape), read from the file."""
        found = self._to_samples(self._batch(step, batch_size, seed, share)[:, self._columns])
        return found.pin_memory() if self._pinned else found

    def values(self, n: int) -> NDArray[Any]:
        """Returns the first n rows of the sequence of epochs as stored in the file, (n, d)."""
        return self._batch(0, n, 0, slice(None))[:, self._columns]

    def extra(self, role: str, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the values of these rows in the field `role` of `Extras`."""
        like = self._tables.others.get(role)
        if like is None:
            return None
        table: dict[str, Any] = {role: of_rows(self._batch(step, batch_size, seed, share), like)}
        extras = RoleTables(self._tables.samples, **table).extras().normalized(self._mean_weight)
        found: Tensor = getattr(extras, role)
        return found.pin_memory() if self._pinned else found

    def to(self, device: torch.device) -> None:
        """Returns batches in pinned memory from now on if the device is a GPU. No rows are moved to the device."""
        self._pinned = device.type == "cuda"

    def _batch(self, step: int, batch_size: int, seed: int, share: slice) -> NDArray[Any]:
        """Returns the rows `share` of the batch of a step as stored in the file, (k, width)."""
        first, last, _ = share.indices(batch_size)
        pieces = [
            self._window(piece.epoch, piece.window, seed)[piece.start : piece.stop]
            for piece in self._windows.pieces(step * batch_size + first, max(0, last - first), seed)
        ]
        return np.concatenate([self._rows.read(0, 0), *pieces])

    def _window(self, epoch: int, window: int, seed: int) -> NDArray[Any]:
        """Returns the shuffled rows of a window. The rows are cached, because the next batches usually need them."""
        key = (epoch, window, seed)
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            blocks = self._windows.blocks_of(epoch, window, seed)
            size = sum(stop - start for start, stop in blocks)
            places = self._windows.mixed(epoch, window, size, seed)
            # blocks are written to their final positions, so the window is never in memory twice
            rows, done = np.empty((size, self._rows.width), self._rows.dtype), 0
            for start, stop in blocks:
                rows[places[done : done + stop - start]] = self._block(start, stop)
                done += stop - start
            self._kept[key] = rows
        return self._kept[key]

    def _block(self, start: int, stop: int) -> NDArray[Any]:
        """Reads training rows start to stop: a range of the file without the held-out rows in it."""
        first, last = self._place(start), self._place(stop - 1)
        out = self._held[slice(*np.searchsorted(self._held, (first, last)))] - first
        stretch = self._rows.read(first, last + 1)
        return np.delete(stretch, out, axis=0) if len(out) else stretch

    def _place(self, row: int) -> int:
        """Returns the row number in the file of a training row: its index plus the count of held-out rows before it."""
        return row + int(np.searchsorted(self._before, row, side="right"))


# Size in bytes from which files are streamed by default
LARGE = 2**28
# Bytes of float64 in a chunk of the pass over the whole file
CHUNK = 2**20
# Number of training rows for checks such as the check for repeated values
SUBSET = 10_000
# Approximate number of training rows whose hashes are compared with the hashes of held-out rows, to find copies
HASHES = 200_000


def of_rows(rows: NDArray[Any], like: Table, first: int = 0) -> Table:
    """Converts rows (k, width) of a file to a table with the columns of `like`; the first row has number `first`."""
    kept = rows if like.indices == tuple(range(rows.shape[1])) else rows[:, like.indices]
    return replace(like, values=kept.astype(np.float64), first=first)


def ids_of(rows: NpyRows, column: int) -> Ids:
    """Reads the ids of all rows of a file in chunks."""
    size = max(1, CHUNK // rows.row_bytes)
    starts = range(0, rows.n, size)
    parts = [rows.read(start, min(rows.n, start + size))[:, column].astype(np.float64) for start in starts]
    (name,) = default_names([column])
    return Ids(name, whole_ids(np.concatenate(parts)))


class StreamedTable:
    """A table that stays in a .npy file; see `read_roles` for the arguments.

    Rows with missing values are never left out, because the rows are read again in each epoch. They are refused.

    Attributes:
        rows: the file.
        tables: the columns by role, without rows.
        table: the columns of the samples, without rows.
        n: the number of rows.
        read_ids: a function that reads the ids of all rows; None without ids.
    """

    def __init__(self, path: str, columns: Columns | None, roles: Roles, missing: Missing = REFUSED) -> None:
        self.rows, self._missing = NpyRows(path), missing
        self.n = self.rows.n
        names = default_names(range(self.rows.width))
        positions = roles.pick(names, self.rows.path)
        chosen = roles.without_ids(pick(columns, names, self.rows.path), names, self.rows.path)
        indices = (*chosen, *(i for i in positions.all if i not in chosen))
        types = picked_types(roles, names, self.rows.path, positions, indices)
        table = Table(np.empty((0, len(indices))), default_names(indices), indices, str(self.rows.path))
        self.tables = divided(table, positions, roles, types)
        self.table = self.tables.samples
        self.read_ids: Callable[[], Ids] | None = None
        if roles.id is not None:
            self.read_ids = partial(ids_of, self.rows, id_position(roles.id, names, self.rows.path))

    def values_range(self) -> tuple[Values, Values]:
        """Returns the smallest and the largest value of each column of the samples, (d,), ignoring missing values."""
        low, high = np.full(len(self.table.columns), np.inf), np.full(len(self.table.columns), -np.inf)
        for _, tables in self._chunks():
            low = np.fmin(low, np.fmin.reduce(tables.samples.values))
            high = np.fmax(high, np.fmax.reduce(tables.samples.values))
        return low, high

    def some_values(self, most: int) -> Values:
        """Returns at most `most` rows of the samples at equal distances, (n, d). Missing values are NaN."""
        rows = np.concatenate([self.rows.read(i, i + 1) for i in range(0, self.n, -(-self.n // most))])
        return of_rows(self._missing.mark(rows.astype(np.float64)), self.table).values

    def encode(self, types: Sequence[ColumnType], context: Sequence[ColumnType]) -> None:
        """Refuses categorical columns, because the rows are read again in each epoch.

        Raises:
            ConfigError: a categorical column.
        """
        if any(one.kind == CATEGORICAL for one in (*types, *context)):
            raise ConfigError(
                f"data.types: {self.rows.path} is read in blocks, which categorical columns do not support; give "
                "data.memory_map=false, or for whole numbers the type integer(LOW,HIGH)"
            )

    def all(self, spec: SampleSpec, most: int, seed: int, *stream: int) -> Part:
        """Checks all rows and returns them as a held-out set. If there are more than `most`, returns a random subset.

        Args:
            stream: the key of the random stream that the subset is drawn from.
        """
        if self.n <= most:
            wanted = np.arange(self.n)
        else:
            _log.info(f"{self.rows.path}: {most:,} of {self.n:,} rows are drawn at random and used")
            wanted = draw_rows(self.n, most, step_generator(seed, *stream))
        part, statistics = self._look_through(spec, wanted, training=False)
        return replace(part, rows=(self.n, str(statistics.checksum)), numbers=wanted)

    def split_rows(
        self, spec: SampleSpec, sizes: list[int], seed: int, split_key: tuple[int, ...], order_key: tuple[int, ...]
    ) -> TrainingSplit:
        """Checks all rows and splits them into training rows and held-out sets of these sizes.

        Args:
            sizes: the number of rows of each held-out set.
            seed: the seed of the split.
            split_key: the key of the random stream of the split.
            order_key: the key of the random stream of the order of training rows.
        """
        held = draw_rows(self.n, sum(sizes), step_generator(seed, *split_key))
        part, statistics = self._look_through(spec, held)
        mean_weight = 1.0
        if self.tables.weights is not None:
            mean_weight = check_mean_weight(self.table.path, statistics.moments.total / statistics.moments.n)
        order = np.sort(held)
        store = StreamedStore(self.rows, order, self.tables, mean_weight, spec.samples, *order_key)
        rows = [r.numpy() for r in torch.split(torch.from_numpy(held), sizes)]
        parts = [Part(*each) for each in zip(torch.split(part.x, sizes), part.extras.split(sizes), rows, strict=True)]
        # the rows are random, because the first rows of a file may not represent the others
        n_subset = min(store.n, SUBSET, store.in_window)
        subset = store.values(n_subset).astype(np.float64)
        of_context = statistics.of_context
        return TrainingSplit(
            store=store,
            n=store.n,
            held=parts,
            mean=statistics.moments.mean,
            variance=statistics.moments.variance,
            subset=subset,
            whole=statistics.whole,
            hashes=np.concatenate([np.empty(0, np.uint64), *statistics.hashes]),
            hash_step=statistics.hash_step,
            class_counts=statistics.class_counts,
            checksum=str(statistics.checksum),
            context=None if of_context is None else np.stack([of_context.mean, of_context.variance]),
            subset_extras=Extras(*(store.extra(role, 0, n_subset, 0, slice(None)) for role in Extras._fields)),
            mean_weight=mean_weight,
            on_line=statistics.on_line_moments,
        )

    def _look_through(
        self, spec: SampleSpec, wanted: NDArray[np.int64], training: bool = True
    ) -> tuple[Part, "StreamStatistics"]:
        """Collects the wanted rows and the statistics of the other rows in one pass.

        Args:
            training: whether the other rows are training rows.

        Raises:
            DataError: values that are not finite or do not fit `spec`, or invalid labels. The message names the row.
        """
        order = np.argsort(wanted, kind="stable")
        found = _HeldOutRows(spec, len(wanted), self.tables)
        statistics = StreamStatistics(self.tables, max(1, self.n // HASHES))
        for start, tables in self._chunks():
            ends = np.searchsorted(wanted, (start, start + len(tables.samples.values)), sorter=order)
            places = order[slice(*ends)]
            check_finite(tables.samples, (t.samples for _, t in self._chunks()))
            spec.check(tables.samples, (t.samples for _, t in self._chunks()))
            for role, table in tables.others.items():
                needed = dict.fromkeys(table.indices, f"data.{role}")
                check_finite(table, (t.others[role] for _, t in self._chunks()), needed)
            tables.check()
            out = wanted[places] - start
            found.add(places, tables.samples.values[out], tables.extras(out))
            statistics.add(spec, tables, out if training else None)
        return found.part, statistics

    def _chunks(self) -> Iterator[tuple[int, RoleTables]]:
        """Yields chunks of the table, each with the number of its first row."""
        size = max(1, CHUNK // (8 * self.rows.width))
        for start in range(0, self.n, size):
            chunk = self._missing.mark(self.rows.read(start, min(self.n, start + size)).astype(np.float64))
            yield start, self.tables.map(partial(of_rows, chunk, first=start))

    def in_file(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the row numbers in the file of rows of the table, (k,)."""
        return rows


class StreamStatistics:
    """Statistics of a file that is read in chunks, over its training rows and over all rows.

    Attributes:
        moments, of_context, hashes, class_counts: statistics of the training rows, see `TrainingSplit`.
        whole, checksum: statistics of all rows, see `TrainingSplit`.
    """

    def __init__(self, tables: RoleTables, hash_step: int) -> None:
        d = len(tables.samples.columns)
        self.moments, self.checksum, self.hash_step = Moments(d), Checksum(), hash_step
        self.of_context = None if tables.context is None else Moments(len(tables.context.columns))
        self._on_line = Moments(d)
        self.whole = np.ones(d, dtype=bool)
        self.hashes: list[NDArray[np.uint64]] = []
        self.class_counts = np.zeros(0, np.int64)

    def add(self, spec: SampleSpec, tables: RoleTables, held: NDArray[np.int64] | None) -> None:
        """Adds rows. The rows at the positions `held` are not training rows. None: there are no training rows."""
        values = tables.samples.values
        self.checksum.add(values, tables.other_values)
        if held is None:
            return
        self.whole[self.whole] = whole_columns(values[:, self.whole])
        mine = np.delete(np.arange(len(values)), held)
        train, extras = values[mine], tables.extras(mine)
        weights = None if extras.weights is None else extras.weights.numpy()
        self.moments.add(train, weights)
        if self.of_context is not None and extras.context is not None:
            self.of_context.add(extras.context.numpy(), weights)
        for on_line in spec.on_line(train):
            self._on_line.add(on_line, weights)
        if not spec.integer_valued:
            self.hashes.append(row_hashes(spec.samples(train).numpy(), self.hash_step))
        if extras.label is not None:
            counts = np.bincount(extras.label.numpy(), minlength=len(self.class_counts))
            counts[: len(self.class_counts)] += self.class_counts
            self.class_counts = counts

    @property
    def on_line_moments(self) -> Values | None:
        """See `TrainingSplit.on_line`."""
        return np.stack([self._on_line.mean, self._on_line.variance]) if self._on_line.n else None


class _HeldOutRows:
    """A held-out set of k samples that is filled in chunks."""

    def __init__(self, spec: SampleSpec, k: int, tables: RoleTables) -> None:
        self.spec = spec
        like = spec.samples(np.empty((0, int(np.prod(spec.event_shape)))))
        extras = tables.extras().map(lambda one: one.new_empty(k, *one.shape[1:]))
        self.part = Part(like.new_empty(k, *spec.event_shape), extras, np.empty(0, np.int64))

    def add(self, places: NDArray[np.int64], values: Values, extras: Extras) -> None:
        """Writes rows (m, d) and their extras to the positions `places`, (m,)."""
        at = torch.from_numpy(places)
        self.part.x[at] = self.spec.samples(values)
        for mine, given in zip(self.part.extras, extras, strict=True):
            if mine is not None and given is not None:
                mine[at] = given


class Moments:
    """Weighted mean and variance of each column, updated in chunks.

    Source: Chan et al. 1983, Algorithms for computing the sample variance.

    Attributes:
        n: the number of rows.
        total: the sum of their weights.
        mean: (d,).
    """

    def __init__(self, d: int) -> None:
        self.n, self.total, self.mean, self._squares = 0, 0.0, np.zeros(d), np.zeros(d)
        # for weighted rows, the sum of the weighted distances to a fixed point near the mean
        self._near, self._sum, self._near_is_set = np.zeros(d), np.zeros(d), False

    def add(self, values: Values, weights: Values | None = None) -> None:
        """Adds rows (n, d) with weights (n,), or with weights of 1. n may be 0."""
        if not len(values):
            return
        if weights is not None:
            self._add_weighted(values, weights)
            return
        n, mean = len(values), values.mean(0)
        apart = mean - self.mean
        self._squares += ((values - mean) ** 2).sum(0) + apart**2 * (self.n * n / (self.n + n))
        self.mean = self.mean + apart * (n / (self.n + n))
        self.n, self.total = self.n + n, self.total + n

    def _add_weighted(self, values: Values, weights: Values) -> None:
        """Adds weighted rows. Sums are used instead of means, because signed weights of a chunk may have the sum 0."""
        self.n += len(values)
        kept = weights != 0
        values, weights = values[kept], weights[kept]
        if not len(values):
            return
        if not self._near_is_set:
            self._near, self._near_is_set = values.mean(0), True
        self.total += float(weights.sum())
        apart = values - self._near
        self._sum += weights @ apart
        self._squares += weights @ apart**2
        self.mean = self._near + self._sum / self.total if self.total else self._near

    @property
    def variance(self) -> Values:
        """The variance, dividing by the total weight."""
        if not self.total:
            return np.zeros_like(self._squares)
        variance = self._squares / self.total - (self._sum / self.total) ** 2
        return np.maximum(variance, 0.0)


def draw_rows(n: int, k: int, generator: torch.Generator) -> NDArray[np.int64]:
    """Draws k distinct rows of n, in random order, with O(k) memory (Floyd's algorithm)."""
    chosen: dict[int, None] = {}
    uniform = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    for top, u in zip(range(n - k, n), uniform, strict=True):
        row = min(int(u * (top + 1)), top)
        chosen[top if row in chosen else row] = None
    rows = np.fromiter(chosen, np.int64, k)
    return np.take(rows, torch.randperm(k, generator=generator).numpy())


def is_streamed(path: str, key: str | None, asked: bool | None) -> bool:
    """Whether a file is streamed. The default is true for .npy files of 256 MiB or more.

    Raises:
        ConfigError: true for a file that is not .npy, or together with a key of an .npz file.
    """
    file = Path(path).expanduser()
    is_npy = file.suffix.lower() == ".npy" and key is None
    if asked is None:
        return is_npy and file.is_file() and file.stat().st_size >= LARGE
    if flag("data.memory_map", asked) and not is_npy:
        what = "data.key names an array of an .npz file" if key is not None else f"{path} is not a .npy file"
        raise ConfigError(
            f"data.memory_map=true is for .npy files only, but {what}: save the array as .npy, or omit the option"
        )
    return asked
