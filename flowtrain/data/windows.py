"""Batches of a data set that is too large to be shuffled at once: blocks at random, rows mixed within a window."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flowtrain.data.base import step_generator


class Piece(NamedTuple):
    """The part of a batch that lies in one window of one epoch: which, and from where to where in it."""

    epoch: int
    window: int
    start: int
    stop: int


class Windows:
    """Epochs of n positions laid end to end, each position once an epoch, without an order of all n being drawn.

    Blocks of neighbours are laid in an order drawn anew each epoch; so many in a row are a window, whose positions are
    mixed. As with `Epochs`, the batch of a step is a pure function of (step, batch_size, seed).

    Args:
        block: neighbours that stay in a window together, and are read together.
        blocks: in a window at most; windows differ by one at most, for a short last one would be mixed less.
        stream: the key of the random stream; the epoch, or the epoch and the window, are added to it.
    """

    def __init__(self, n: int, block: int, blocks: int, *stream: int) -> None:
        self.n, self.block, self.stream = n, block, stream
        n_blocks = -(-n // block)
        n_windows = -(-n_blocks // blocks)
        # where in the order of the blocks each window begins, and the last one ends
        self._begins = [n_blocks * i // n_windows for i in range(n_windows + 1)]
        self._order: tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64]] | None = None

    def pieces(self, first: int, count: int, seed: int) -> Iterator[Piece]:
        """Where positions first to first + count of the endless epochs are, in order."""
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
        """(start, stop) of each block in a window."""
        order = self._epoch(epoch, seed)[0][self._begins[window] : self._begins[window + 1]]
        return [(int(b) * self.block, min(self.n, (int(b) + 1) * self.block)) for b in order]

    def mixed(self, epoch: int, window: int, size: int, seed: int) -> NDArray[np.int64]:
        """A new place for each of a window's positions, of which there are `size`."""
        return torch.randperm(size, generator=step_generator(seed, *self.stream, epoch, window)).numpy()

    def _epoch(self, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the blocks, and the position at which each window ends."""
        if self._order is None or self._order[0] != (epoch, seed):
            n_blocks = self._begins[-1]
            order = torch.randperm(n_blocks, generator=step_generator(seed, *self.stream, epoch)).numpy()
            lengths = np.full(n_blocks, self.block)
            lengths[order == n_blocks - 1] = self.n - (n_blocks - 1) * self.block
            self._order = (epoch, seed), order, lengths.cumsum()[np.array(self._begins[1:]) - 1]
        return self._order[1:]
