"""A training file that is larger than one wants in memory: looked through once, and read by windows after that."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.checks import flag
from flowtrain.data.array_checks import check_labels
from flowtrain.data.base import step_generator
from flowtrain.data.columns import Columns, default_names, pick
from flowtrain.data.npy_rows import NpyRows
from flowtrain.data.read import Table, check_finite, less_labels
from flowtrain.data.windows import Windows
from flowtrain.errors import ConfigError

# rows that are read together
BLOCK = 4096
# bytes of the file in a window, of which two are kept, and of what is looked through at once, as float64
WINDOW, CHUNK = 2**26, 2**23
# bytes from which on a file is read so unless it is asked not to be
LARGE = 2**28
# rows of the training file that are held out of it at the most, for each set
MOST_HELD_OUT = 100_000

Check = Callable[[Table], None]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What looking through the file has found.

    `held` are the values of the held-out sets, (k, d), `marks` their labels, (k, 1), or None; mean and variance are
    those of the training rows, (d,), and most is the largest label.
    """

    held: list[Values]
    marks: list[Values | None]
    mean: Values
    variance: Values
    most: int


class Mapped:
    """The rows of a .npy file less those held out, and batches of them.

    Args:
        first: a table with the columns that are samples, and `mark`, one with that of the labels, or None; see `head`.
        sizes: rows to hold out for each set, drawn at random by the stream (seed, *split).
        order: the key of the random stream of the batches.
        samples: from values (k, d) to samples.
    """

    def __init__(
        self,
        rows: NpyRows,
        first: Table,
        mark: Table | None,
        sizes: list[int],
        seed: int,
        split: tuple[int, ...],
        order: tuple[int, ...],
        samples: Callable[[NDArray[Any]], Tensor],
    ) -> None:
        self.rows, self.first, self.mark, self.samples = rows, first, mark, samples
        drawn = _drawn(rows.n, sum(sizes), step_generator(seed, *split))
        self.sets = np.split(drawn, np.cumsum(sizes)[:-1])
        self.held = np.sort(drawn)
        self.n = rows.n - len(drawn)
        blocks = max(1, WINDOW // (BLOCK * rows.row_bytes))
        self.windows = Windows(self.n, BLOCK, blocks, *order)
        self._kept: dict[tuple[int, int, int], NDArray[Any]] = {}

    def look_through(self, check: Check) -> Seen:
        """Everything that is asked of the values, in one pass.

        Raises:
            DataError: what `check` raises, naming the row of the file; values that are not finite, and labels that are
                none.
        """
        size = max(1, CHUNK // (8 * self.rows.width))
        moments = _Moments(len(self.first.columns))
        held: list[Values] = []
        marks: list[Values] = []
        most = 0
        for start in range(0, self.rows.n, size):
            chunk = self.rows.read(start, min(self.rows.n, start + size))
            out = self.held[slice(*np.searchsorted(self.held, (start, start + len(chunk))))] - start
            table = part_of(chunk, self.first, start)
            check_finite(table)
            check(table)
            moments.add(np.delete(table.values, out, axis=0))
            held.append(table.values[out])
            if self.mark is not None:
                labels = part_of(chunk, self.mark, start)
                check_finite(labels)
                check_labels(labels)
                most = max(most, int(labels.values.max()))
                marks.append(labels.values[out])
        places = [np.searchsorted(self.held, rows) for rows in self.sets]
        of_set = [[np.concatenate(parts)[at] if parts else None for at in places] for parts in (held, marks)]
        return Seen([v for v in of_set[0] if v is not None], of_set[1], moments.mean, moments.variance, most)

    def share(self, step: int, batch_size: int, seed: int, share: slice) -> tuple[Tensor, Tensor | None]:
        first, last, _ = share.indices(batch_size)
        pieces = [
            self._window(piece.epoch, piece.window, seed)[piece.start : piece.stop]
            for piece in self.windows.pieces(step * batch_size + first, last - first, seed)
        ]
        rows = np.concatenate(pieces)
        labels = None if self.mark is None else as_labels(rows[:, self.mark.indices])
        return self.samples(rows[:, self.first.indices]), labels

    def to(self, device: torch.device) -> None:
        """Nothing: what is read goes where the batch goes."""

    def _window(self, epoch: int, window: int, seed: int) -> NDArray[Any]:
        """The rows of a window, in their mixed order: kept, because the next batches want them too."""
        key = (epoch, window, seed)
        if key not in self._kept:
            while len(self._kept) >= 2:
                del self._kept[next(iter(self._kept))]
            rows = np.concatenate([self._block(*ends) for ends in self.windows.blocks_of(epoch, window, seed)])
            self._kept[key] = np.take(rows, self.windows.mixed(epoch, window, len(rows), seed), axis=0)
        return self._kept[key]

    def _block(self, start: int, stop: int) -> NDArray[Any]:
        """Training rows start to stop: a stretch of the file less the rows in it that are held out."""
        at = self.places(np.arange(start, stop))
        stretch = self.rows.read(int(at[0]), int(at[-1]) + 1)
        kept: NDArray[Any] = np.take(stretch, at - at[0], axis=0)
        return kept

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where training rows are in the file: behind the ith row that is held out once i are before them."""
        before: NDArray[np.int64] = np.searchsorted(self.held - np.arange(len(self.held)), rows, side="right")
        return rows + before


class _Moments:
    """Mean and variance by column, of parts (Chan et al. 1983, Algorithms for computing the sample variance)."""

    def __init__(self, d: int) -> None:
        self.n, self.mean, self._squares = 0, np.zeros(d), np.zeros(d)

    def add(self, values: Values) -> None:
        if not len(values):
            return
        n, mean = len(values), values.mean(0)
        apart = mean - self.mean
        self._squares += n * values.var(0) + apart**2 * (self.n * n / (self.n + n))
        self.mean = self.mean + apart * (n / (self.n + n))
        self.n += n

    @property
    def variance(self) -> Values:
        """Over n."""
        return self._squares / self.n


def _drawn(n: int, k: int, generator: torch.Generator) -> NDArray[np.int64]:
    """k of n rows without one twice, in random order, in memory of the size of k (Floyd's algorithm)."""
    chosen: dict[int, None] = {}
    uniform = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    for top, u in zip(range(n - k, n), uniform, strict=True):
        row = min(int(u * (top + 1)), top)
        chosen[top if row in chosen else row] = None
    rows = np.fromiter(chosen, np.int64, k)
    return np.take(rows, torch.randperm(k, generator=generator).numpy())


def head(rows: NpyRows, columns: Columns | None, label: str | int | None) -> tuple[Table, Table | None]:
    """The first row as `read_labelled` would have it: which columns there are of samples, and which of labels."""
    names = default_names(range(rows.width))
    chunk = rows.read(0, 1)

    def table(wanted: Columns | None, option: str) -> Table:
        indices = tuple(pick(wanted, names, rows.path, option))
        return part_of(chunk, Table(np.empty((0, 0)), default_names(indices), indices, str(rows.path)), 0)

    return less_labels(table(columns, "data.columns"), None if label is None else table([label], "data.label"), label)


def part_of(chunk: NDArray[Any], like: Table, first: int) -> Table:
    """The columns of a table in rows of the file, (k, width), of which the first is the file's row `first`."""
    return replace(like, values=chunk[:, like.indices].astype(np.float64), first=first)


def is_mapped(path: str, asked: bool | None) -> bool:
    """Whether a file is read by windows: as asked, or a .npy of 256 MiB or more.

    Raises:
        ConfigError: asked for, of a file that is no .npy.
    """
    file = Path(path).expanduser()
    is_npy = file.suffix.lower() == ".npy"
    if asked is None:
        return is_npy and file.is_file() and file.stat().st_size >= LARGE
    if flag("data.memory_map", asked) and not is_npy:
        raise ConfigError(
            f"data.memory_map=true is for .npy files, and {path} is none: save it as one, or leave it out"
        )
    return asked


def as_labels(values: NDArray[Any]) -> Tensor:
    """(k,), int64, of (k, 1)."""
    return torch.from_numpy(values.reshape(-1).astype(np.int64))
