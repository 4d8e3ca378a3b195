"""Training rows that stay in their file, and are read a window at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.kind import as_labels
from flowtrain.data.npy_rows import NpyRows
from flowtrain.data.windows import Windows

# bytes of the file that are read together, and of a window with the order of its rows; two windows are kept
BLOCK, WINDOW = 2**18, 2**26
KEPT = 2


class Windowed:
    """The rows of a .npy file less those held out; see `Store`.

    Args:
        held: the rows held out, sorted.
        columns: positions of those that are samples.
        label: position of the column of labels, or None.
        to_samples: from values (k, d) to samples.
        stream: the key of the random stream of the orders.

    Attributes:
        n: rows for training.
        in_window: how many may be asked for that are in one window, as a rule.
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
        # how many rows for training there are before each that is held out
        self._before = held - np.arange(len(held))
        self.n = rows.n - len(held)
        block = max(1, BLOCK // rows.row_bytes)
        blocks = max(1, WINDOW // (block * (rows.row_bytes + 8)))
        self._windows = Windows(self.n, block, blocks, *stream)
        self.in_window = min(self.n, block * max(1, blocks // 2))
        self._kept: dict[tuple[int, int, int], NDArray[Any]] = {}
        self._pinned = False

    def samples(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Those rows of a step's batch, (k, *event_shape), read from the file."""
        found = self._to_samples(self._batch(step, batch_size, seed, share)[:, self._columns])
        return found.pin_memory() if self._pinned else found

    def values(self, n: int) -> NDArray[Any]:
        """The first n rows of the epochs as they are in the file, (n, d)."""
        return self._batch(0, n, 0, slice(None))[:, self._columns]

    def labels(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Their labels, (k,), or None."""
        if self._label is None:
            return None
        found = as_labels(self._batch(step, batch_size, seed, share)[:, [self._label]])
        return found.pin_memory() if self._pinned else found

    def to(self, device: torch.device) -> None:
        """Batches come in pinned memory where they go to a GPU: what is read goes there a batch at a time."""
        self._pinned = device.type == "cuda"

    def _batch(self, step: int, batch_size: int, seed: int, share: slice) -> NDArray[Any]:
        """Those rows of a step's batch as they are in the file, (k, width)."""
        first, last, _ = share.indices(batch_size)
        pieces = [
            self._window(piece.epoch, piece.window, seed)[piece.start : piece.stop]
            for piece in self._windows.pieces(step * batch_size + first, max(0, last - first), seed)
        ]
        return np.concatenate([self._rows.read(0, 0), *pieces])

    def _window(self, epoch: int, window: int, seed: int) -> NDArray[Any]:
        """The rows of a window, in their mixed order: kept, because the next batches want them too."""
        key = (epoch, window, seed)
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            blocks = self._windows.blocks_of(epoch, window, seed)
            size = sum(stop - start for start, stop in blocks)
            places = self._windows.mixed(epoch, window, size, seed)
            # each block goes to its places at once: the window is never in memory twice
            rows, done = np.empty((size, self._rows.width), self._rows.dtype), 0
            for start, stop in blocks:
                rows[places[done : done + stop - start]] = self._block(start, stop)
                done += stop - start
            self._kept[key] = rows
        return self._kept[key]

    def _block(self, start: int, stop: int) -> NDArray[Any]:
        """Training rows start to stop: a stretch of the file less the rows in it that are held out."""
        first, last = self._place(start), self._place(stop - 1)
        out = self._held[slice(*np.searchsorted(self._held, (first, last)))] - first
        stretch = self._rows.read(first, last + 1)
        return np.delete(stretch, out, axis=0) if len(out) else stretch

    def _place(self, row: int) -> int:
        """Where a training row is in the file: behind the ith row that is held out once i are before it."""
        return row + int(np.searchsorted(self._before, row, side="right"))
