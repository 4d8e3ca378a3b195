"""A .npy file that is not to be in memory as a whole: looked through once, and read by windows after that."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowtrain.checks import flag
from flowtrain.data.array_checks import check_labels, row_hashes, whole_columns
from flowtrain.data.base import step_generator
from flowtrain.data.columns import Columns, default_names, pick
from flowtrain.data.kind import Divided, Kind, Part, Values, as_labels
from flowtrain.data.npy_rows import NpyRows
from flowtrain.data.read import Table, check_finite, less_labels
from flowtrain.data.record import Checksum
from flowtrain.data.windowed import Windowed
from flowtrain.errors import ConfigError

_log = logging.getLogger("flowtrain")

# bytes from which on a file is read so unless it is asked not to be
LARGE = 2**28
# bytes of float64 that are looked through at once
CHUNK = 2**20
# rows that are looked at for being discrete
LOOK = 10_000
# approximate number of hashes of training rows that held-out rows are compared with to find copies
HASHES = 200_000


class Mapped:
    """The table in a .npy file, and its labels where there are any; see `read_labelled` for the arguments.

    Attributes:
        table: of the samples, without rows.
        n: rows.
    """

    def __init__(self, path: str, columns: Columns | None, label: str | int | None) -> None:
        self.rows = NpyRows(path)
        self.n = self.rows.n
        names = default_names(range(self.rows.width))

        def table(wanted: Columns | None, option: str) -> Table:
            indices = tuple(pick(wanted, names, self.rows.path, option))
            return Table(np.empty((0, len(indices))), default_names(indices), indices, str(self.rows.path))

        marks = None if label is None else table([label], "data.label")
        self.table, self.marks = less_labels(table(columns, "data.columns"), marks, label)

    def all(self, kind: Kind, most: int, seed: int, *stream: int) -> Part:
        """Every row, once checked; of more than `most` so many, drawn by the stream (seed, *stream)."""
        if self.n <= most:
            wanted = np.arange(self.n)
        else:
            _log.info(f"{self.rows.path}: {most:,} of its {self.n:,} rows are held in memory, drawn at random")
            wanted = drawn(self.n, most, step_generator(seed, *stream))
        part, seen = self._look_through(kind, wanted, training=False)
        return replace(part, rows=(self.n, str(seen.checksum)))

    def divided(
        self, kind: Kind, sizes: list[int], seed: int, split_key: tuple[int, ...], order_key: tuple[int, ...]
    ) -> Divided:
        """The rows, once checked, of which so many are held out, drawn by the stream (seed, *split_key)."""
        held = drawn(self.n, sum(sizes), step_generator(seed, *split_key))
        part, seen = self._look_through(kind, held)
        label = None if self.marks is None else self.marks.indices[0]
        store = Windowed(self.rows, np.sort(held), self.table.indices, label, kind.samples, *order_key)
        labels = [None] * len(sizes) if part.labels is None else list(torch.split(part.labels, sizes))
        rows = [r.numpy() for r in torch.split(torch.from_numpy(held), sizes)]
        parts = [Part(*each) for each in zip(torch.split(part.x, sizes), labels, rows, strict=True)]
        # rows of all the file, which its first are not
        look = store.values(min(store.n, LOOK, store.in_window)).astype(np.float64)
        return Divided(
            store=store,
            n=store.n,
            held=parts,
            mean=seen.moments.mean,
            variance=seen.moments.variance,
            look=look,
            whole=seen.whole,
            hashes=np.concatenate([np.empty(0, np.uint64), *seen.hashes]),
            hash_step=seen.hash_step,
            class_counts=seen.class_counts,
            checksum=str(seen.checksum),
        )

    def _look_through(self, kind: Kind, wanted: NDArray[np.int64], training: bool = True) -> tuple[Part, "Seen"]:
        """Collects the wanted rows and the statistics of the other rows in one pass.

        Args:
            training: whether the other rows are training rows.

        Raises:
            DataError: values that are not finite, not of that kind, or no labels, naming the row of the file.
        """
        order = np.argsort(wanted, kind="stable")
        found = _Collected(kind, len(wanted), self.marks is not None)
        seen = Seen(len(self.table.columns), max(1, self.n // HASHES))
        for start, (table, marks) in self._chunks():
            ends = np.searchsorted(wanted, (start, start + len(table.values)), sorter=order)
            places = order[slice(*ends)]
            check_finite(table, (t for _, (t, _) in self._chunks()))
            kind.check(table, (t for _, (t, _) in self._chunks()))
            if marks is not None:
                check_finite(marks, (m for _, (_, m) in self._chunks() if m is not None))
                check_labels(marks)
            out = wanted[places] - start
            labels = None if marks is None else marks.values
            found.add(places, table.values[out], None if labels is None else labels[out])
            seen.add(kind, table.values, labels, out if training else None)
        return found.part, seen

    def _chunks(self) -> Iterator[tuple[int, tuple[Table, Table | None]]]:
        """The table and its labels in parts, each with the row it begins at."""
        size = max(1, CHUNK // (8 * self.rows.width))
        for start in range(0, self.n, size):
            chunk = self.rows.read(start, min(self.n, start + size))
            marks = None if self.marks is None else _part_of(chunk, self.marks, start)
            yield start, (_part_of(chunk, self.table, start), marks)


class Seen:
    """Statistics of a file that is read in parts, over its training rows and over all rows.

    Attributes:
        moments, hashes, class_counts: statistics of the training rows, see `Divided`.
        whole, checksum: statistics of all rows, see `Divided`.
    """

    def __init__(self, d: int, hash_step: int) -> None:
        self.moments, self.checksum, self.hash_step = Moments(d), Checksum(), hash_step
        self.whole = np.ones(d, dtype=bool)
        self.hashes: list[NDArray[np.uint64]] = []
        self.class_counts = np.zeros(0, np.int64)

    def add(self, kind: Kind, values: Values, labels: Values | None, held: NDArray[np.int64] | None) -> None:
        """Adds rows (n, d) and labels (n, 1). The rows `held` are not training rows; None means that no row is."""
        self.checksum.add(values, labels)
        if held is None:
            return
        self.whole[self.whole] = whole_columns(values[:, self.whole])
        train = np.delete(values, held, axis=0) if len(held) else values
        self.moments.add(train)
        if not kind.discrete:
            self.hashes.append(row_hashes(kind.samples(train).numpy(), self.hash_step))
        if labels is not None:
            counts = np.bincount(np.delete(labels, held).astype(np.int64), minlength=len(self.class_counts))
            counts[: len(self.class_counts)] += self.class_counts
            self.class_counts = counts


class _Collected:
    """k samples of a kind, with their labels or without, that come in parts."""

    def __init__(self, kind: Kind, k: int, labelled: bool) -> None:
        self.kind = kind
        like = kind.samples(np.empty((0, int(np.prod(kind.event_shape)))))
        labels = torch.empty(k, dtype=torch.int64) if labelled else None
        self.part = Part(like.new_empty(k, *kind.event_shape), labels, np.empty(0, np.int64))

    def add(self, places: NDArray[np.int64], values: Values, marks: Values | None) -> None:
        """Takes rows (m, d) to their places (m,)."""
        at = torch.from_numpy(places)
        self.part.x[at] = self.kind.samples(values)
        if self.part.labels is not None and marks is not None:
            self.part.labels[at] = as_labels(marks)


class Moments:
    """Mean and variance by column, of parts (Chan et al. 1983, Algorithms for computing the sample variance)."""

    def __init__(self, d: int) -> None:
        self.n, self.mean, self._squares = 0, np.zeros(d), np.zeros(d)

    def add(self, values: Values) -> None:
        """Takes rows (n, d) in; n may be 0."""
        if not len(values):
            return
        n, mean = len(values), values.mean(0)
        apart = mean - self.mean
        self._squares += ((values - mean) ** 2).sum(0) + apart**2 * (self.n * n / (self.n + n))
        self.mean = self.mean + apart * (n / (self.n + n))
        self.n += n

    @property
    def variance(self) -> Values:
        """Over n."""
        return self._squares / max(1, self.n)


def drawn(n: int, k: int, generator: torch.Generator) -> NDArray[np.int64]:
    """k of n rows without one twice, in random order, in memory of the size of k (Floyd's algorithm)."""
    chosen: dict[int, None] = {}
    uniform = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    for top, u in zip(range(n - k, n), uniform, strict=True):
        row = min(int(u * (top + 1)), top)
        chosen[top if row in chosen else row] = None
    rows = np.fromiter(chosen, np.int64, k)
    return np.take(rows, torch.randperm(k, generator=generator).numpy())


def _part_of(chunk: NDArray[Any], like: Table, first: int) -> Table:
    """The columns of a table in rows of the file, (k, width), of which the first is the file's row `first`."""
    kept = chunk if like.indices == tuple(range(chunk.shape[1])) else chunk[:, like.indices]
    return replace(like, values=kept.astype(np.float64), first=first)


def is_mapped(path: str, key: str | None, asked: bool | None) -> bool:
    """Whether a file is read by windows: as asked, or a .npy of 256 MiB or more.

    Raises:
        ConfigError: asked for, of a file that is no .npy, or with a key of an .npz.
    """
    file = Path(path).expanduser()
    is_npy = file.suffix.lower() == ".npy" and key is None
    if asked is None:
        return is_npy and file.is_file() and file.stat().st_size >= LARGE
    if flag("data.memory_map", asked) and not is_npy:
        what = "data.key names an array of an .npz file" if key is not None else f"{path} is none"
        raise ConfigError(f"data.memory_map=true is for .npy files, and {what}: save it as one, or leave it out")
    return asked
