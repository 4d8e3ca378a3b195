"""Streaming of training rows from a .npy file: the file is read once for statistics, then in windows of rows."""

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Checksum, step_generator
from flowtrain.data.tables.columns import Columns, default_names, pick
from flowtrain.data.tables.missing import REFUSED, Missing
from flowtrain.data.tables.sample_spec import Part, SampleSpec, TrainingSplit, Values, as_labels
from flowtrain.data.tables.table_checks import check_labels, row_hashes, whole_columns
from flowtrain.data.tables.table_reader import (
    Table,
    check_array,
    check_array_headers,
    check_file,
    check_finite,
    damage_refused,
    npy_header,
    split_off_labels,
)
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
        columns: positions of the columns of the samples.
        label: position of the column of labels, or None.
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
        columns: tuple[int, ...],
        label: int | None,
        to_samples: Callable[[NDArray[Any]], Tensor],
        *stream: int,
    ) -> None:
        self._rows, self._held, self._label, self._to_samples = rows, held, label, to_samples
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

    def labels(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the labels of these rows, (k,), or None."""
        if self._label is None:
            return None
        found = as_labels(self._batch(step, batch_size, seed, share)[:, [self._label]])
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
LOOK = 10_000
# Approximate number of training rows whose hashes are compared with the hashes of held-out rows, to find copies
HASHES = 200_000


class StreamedTable:
    """A table that stays in a .npy file, with its labels if there are any; see `read_labelled` for the arguments.

    Rows with missing values are never left out, because the rows are read again in each epoch. They are refused.

    Attributes:
        rows: the file.
        table: the columns of the samples, without rows.
        label_column: the column of labels, without rows, or None.
        n: the number of rows.
    """

    def __init__(self, path: str, columns: Columns | None, label: str | int | None, missing: Missing = REFUSED) -> None:
        self.rows, self._missing = NpyRows(path), missing
        self.n = self.rows.n
        names = default_names(range(self.rows.width))

        def table(wanted: Columns | None, option: str) -> Table:
            indices = tuple(pick(wanted, names, self.rows.path, option))
            return Table(np.empty((0, len(indices))), default_names(indices), indices, str(self.rows.path))

        label_column = None if label is None else table([label], "data.label")
        self.table, self.label_column = split_off_labels(table(columns, "data.columns"), label_column, label)

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
        return replace(part, rows=(self.n, str(statistics.checksum)))

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
        label = None if self.label_column is None else self.label_column.indices[0]
        store = StreamedStore(self.rows, np.sort(held), self.table.indices, label, spec.samples, *order_key)
        labels = [None] * len(sizes) if part.labels is None else list(torch.split(part.labels, sizes))
        rows = [r.numpy() for r in torch.split(torch.from_numpy(held), sizes)]
        parts = [Part(*each) for each in zip(torch.split(part.x, sizes), labels, rows, strict=True)]
        # the rows are random, because the first rows of a file may not represent the others
        look = store.values(min(store.n, LOOK, store.in_window)).astype(np.float64)
        return TrainingSplit(
            store=store,
            n=store.n,
            held=parts,
            mean=statistics.moments.mean,
            variance=statistics.moments.variance,
            look=look,
            whole=statistics.whole,
            hashes=np.concatenate([np.empty(0, np.uint64), *statistics.hashes]),
            hash_step=statistics.hash_step,
            class_counts=statistics.class_counts,
            checksum=str(statistics.checksum),
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
        found = _HeldOutRows(spec, len(wanted), self.label_column is not None)
        statistics = StreamStatistics(len(self.table.columns), max(1, self.n // HASHES))
        for start, (table, label_column) in self._chunks():
            ends = np.searchsorted(wanted, (start, start + len(table.values)), sorter=order)
            places = order[slice(*ends)]
            check_finite(table, (t for _, (t, _) in self._chunks()), self._missing.drops)
            spec.check(table, (t for _, (t, _) in self._chunks()))
            if label_column is not None:
                labels_of_chunks = (m for _, (_, m) in self._chunks() if m is not None)
                check_finite(label_column, labels_of_chunks, self._missing.drops)
                check_labels(label_column)
            out = wanted[places] - start
            labels = None if label_column is None else label_column.values
            found.add(places, table.values[out], None if labels is None else labels[out])
            statistics.add(spec, table.values, labels, out if training else None)
        return found.part, statistics

    def _chunks(self) -> Iterator[tuple[int, tuple[Table, Table | None]]]:
        """Yields chunks of the table and of its labels, each with the number of its first row."""
        size = max(1, CHUNK // (8 * self.rows.width))
        for start in range(0, self.n, size):
            chunk = self.rows.read(start, min(self.n, start + size))
            label_column = None if self.label_column is None else self._part_of(chunk, self.label_column, start)
            yield start, (self._part_of(chunk, self.table, start), label_column)

    def _part_of(self, chunk: NDArray[Any], like: Table, first: int) -> Table:
        """Converts a chunk (k, width) of the file to a table with the columns of `like`; its first row is `first`."""
        kept = chunk if like.indices == tuple(range(chunk.shape[1])) else chunk[:, like.indices]
        return replace(like, values=self._missing.mark(kept.astype(np.float64)), first=first)

    def in_file(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the row numbers in the file of rows of the table, (k,)."""
        return rows


class StreamStatistics:
    """Statistics of a file that is read in chunks, over its training rows and over all rows.

    Attributes:
        moments, hashes, class_counts: statistics of the training rows, see `TrainingSplit`.
        whole, checksum: statistics of all rows, see `TrainingSplit`.
    """

    def __init__(self, d: int, hash_step: int) -> None:
        self.moments, self.checksum, self.hash_step = Moments(d), Checksum(), hash_step
        self.whole = np.ones(d, dtype=bool)
        self.hashes: list[NDArray[np.uint64]] = []
        self.class_counts = np.zeros(0, np.int64)

    def add(self, spec: SampleSpec, values: Values, labels: Values | None, held: NDArray[np.int64] | None) -> None:
        """Adds rows (n, d) and labels (n, 1). The rows `held` are not training rows; None means that no row is."""
        self.checksum.add(values, labels)
        if held is None:
            return
        self.whole[self.whole] = whole_columns(values[:, self.whole])
        train = np.delete(values, held, axis=0) if len(held) else values
        self.moments.add(train)
        if not spec.integer_valued:
            self.hashes.append(row_hashes(spec.samples(train).numpy(), self.hash_step))
        if labels is not None:
            counts = np.bincount(np.delete(labels, held).astype(np.int64), minlength=len(self.class_counts))
            counts[: len(self.class_counts)] += self.class_counts
            self.class_counts = counts


class _HeldOutRows:
    """A held-out set of k samples that is filled in chunks."""

    def __init__(self, spec: SampleSpec, k: int, labelled: bool) -> None:
        self.spec = spec
        like = spec.samples(np.empty((0, int(np.prod(spec.event_shape)))))
        labels = torch.empty(k, dtype=torch.int64) if labelled else None
        self.part = Part(like.new_empty(k, *spec.event_shape), labels, np.empty(0, np.int64))

    def add(self, places: NDArray[np.int64], values: Values, label_column: Values | None) -> None:
        """Writes rows (m, d) and their labels to the positions `places`, (m,)."""
        at = torch.from_numpy(places)
        self.part.x[at] = self.spec.samples(values)
        if self.part.labels is not None and label_column is not None:
            self.part.labels[at] = as_labels(label_column)


class Moments:
    """Mean and variance of each column, updated in chunks.

    Source: Chan et al. 1983, Algorithms for computing the sample variance.
    """

    def __init__(self, d: int) -> None:
        self.n, self.mean, self._squares = 0, np.zeros(d), np.zeros(d)

    def add(self, values: Values) -> None:
        """Adds rows (n, d); n may be 0."""
        if not len(values):
            return
        n, mean = len(values), values.mean(0)
        apart = mean - self.mean
        self._squares += ((values - mean) ** 2).sum(0) + apart**2 * (self.n * n / (self.n + n))
        self.mean = self.mean + apart * (n / (self.n + n))
        self.n += n

    @property
    def variance(self) -> Values:
        """The variance, dividing by n."""
        return self._squares / max(1, self.n)


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
