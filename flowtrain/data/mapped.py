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
from flowtrain.data.array_checks import check_labels
from flowtrain.data.base import step_generator
from flowtrain.data.columns import Columns, default_names, pick
from flowtrain.data.kind import Divided, Kind, Part, Values, as_labels
from flowtrain.data.npy_rows import NpyRows
from flowtrain.data.read import Table, check_finite, less_labels
from flowtrain.data.windowed import Windowed
from flowtrain.errors import ConfigError

_log = logging.getLogger("flowtrain")

# bytes from which on a file is read so unless it is asked not to be
LARGE = 2**28
# bytes of float64 that are looked through at once
CHUNK = 2**20
# rows that are looked at for being discrete
LOOK = 10_000


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
            return self._look_through(kind, np.arange(self.n))[0]
        _log.info(f"{self.rows.path}: {most:,} of its {self.n:,} rows are held in memory, drawn at random")
        return self._look_through(kind, drawn(self.n, most, step_generator(seed, *stream)))[0]

    def divided(
        self, kind: Kind, sizes: list[int], seed: int, split_key: tuple[int, ...], order_key: tuple[int, ...]
    ) -> Divided:
        """The rows, once checked, of which so many are held out, drawn by the stream (seed, *split_key)."""
        _log.info(f"{self.rows.path}: {self.n:,} rows are checked now and read again by windows (data.memory_map)")
        held = drawn(self.n, sum(sizes), step_generator(seed, *split_key))
        part, moments, most = self._look_through(kind, held)
        label = None if self.marks is None else self.marks.indices[0]
        store = Windowed(self.rows, np.sort(held), self.table.indices, label, kind.samples, *order_key)
        labels = [None] * len(sizes) if part.labels is None else list(torch.split(part.labels, sizes))
        parts = [Part(x, y) for x, y in zip(torch.split(part.x, sizes), labels, strict=True)]
        # rows of all the file, which its first are not
        look = store.values(min(store.n, LOOK, store.in_window)).astype(np.float64)
        return Divided(store, store.n, parts, moments.mean, moments.variance, look, most)

    def _look_through(self, kind: Kind, wanted: NDArray[np.int64]) -> tuple[Part, "Moments", int]:
        """Everything that is asked of the values, in one pass: the wanted rows, the moments of the others, the largest
        label.

        Raises:
            DataError: values that are not finite, not of that kind, or no labels, naming the row of the file.
        """
        order = np.argsort(wanted, kind="stable")
        found, moments, most = (
            _Collected(kind, len(wanted), self.marks is not None),
            Moments(len(self.table.columns)),
            -1,
        )
        for start, (table, marks) in self._chunks():
            ends = np.searchsorted(wanted, (start, start + len(table.values)), sorter=order)
            places = order[slice(*ends)]
            check_finite(table, (t for _, (t, _) in self._chunks()))
            kind.check(table, (t for _, (t, _) in self._chunks()))
            if marks is not None:
                check_finite(marks, (m for _, (_, m) in self._chunks() if m is not None))
                check_labels(marks)
                most = max(most, int(marks.values.max()))
            out = wanted[places] - start
            found.add(places, table.values[out], None if marks is None else marks.values[out])
            moments.add(np.delete(table.values, out, axis=0) if len(out) else table.values)
        return found.part, moments, most

    def _chunks(self) -> Iterator[tuple[int, tuple[Table, Table | None]]]:
        """The table and its labels in parts, each with the row it begins at."""
        size = max(1, CHUNK // (8 * self.rows.width))
        for start in range(0, self.n, size):
            chunk = self.rows.read(start, min(self.n, start + size))
            marks = None if self.marks is None else _part_of(chunk, self.marks, start)
            yield start, (_part_of(chunk, self.table, start), marks)


class _Collected:
    """k samples of a kind, with their labels or without, that come in parts."""

    def __init__(self, kind: Kind, k: int, labelled: bool) -> None:
        self.kind = kind
        like = kind.samples(np.empty((0, int(np.prod(kind.event_shape)))))
        self.part = Part(like.new_empty(k, *kind.event_shape), torch.empty(k, dtype=torch.int64) if labelled else None)

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
