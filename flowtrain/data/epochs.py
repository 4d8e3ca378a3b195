"""Which rows of a finite data set make up the batch of a step: endless epochs, each in an order of its own."""

import torch
from torch import Tensor

from flowtrain.data.base import step_generator


class Epochs:
    """Epochs of `n` rows laid end to end: each row comes once an epoch, in an order drawn anew.

    The batch of a step is a pure function of (step, batch_size, seed), so resuming needs no position to be saved.

    Args:
        n: rows in an epoch, at least 1.
        stream: the key of the random stream that the orders are drawn from; the epoch's number is added to it.
    """

    def __init__(self, n: int, *stream: int) -> None:
        self._n = n
        self._stream = stream
        self._orders: dict[tuple[int, int], Tensor] = {}

    def rows(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Positions step * batch_size to (step + 1) * batch_size of the endless epochs, (batch_size,), int64, CPU.

        A batch may cross from one epoch into the next, or hold several.
        """
        first, count = step * batch_size, batch_size
        pieces = []
        while count:
            epoch, offset = divmod(first, self._n)
            piece = self._order(epoch, seed)[offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        # a copy even of a single piece, so that what a caller does to it does not reach the order kept here
        return torch.cat(pieces)

    def _order(self, epoch: int, seed: int) -> Tensor:
        order = self._orders.get((epoch, seed))
        if order is None:
            order = torch.randperm(self._n, generator=step_generator(seed, *self._stream, epoch))
            # Two epochs are all that one batch crosses as a rule, and an order is as long as the data
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch, seed] = order
        return order
