"""Finite data sets: random splits, epochs, and batches of rows in memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Dataset, step_generator
from flowtrain.utils.errors import ConfigError, DataError


class Epochs:
    """An endless sequence of epochs. Each epoch contains each of the `n` rows once, in a new random order.

    The batch of a step is a pure function of (step, batch_size, seed), so no position is saved for resuming.

    Args:
        n: the number of rows in an epoch, at least 1.
        stream: the key of the random stream that the orders are drawn from. The number of the epoch is appended to this
            key.
    """

    def __init__(self, n: int, *stream: int) -> None:
        self._n = n
        self._stream = stream
        self._orders: dict[tuple[int, int], Tensor] = {}

    def rows(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Returns the row numbers of the batch of a step, (batch_size,), int64, on the CPU.

        These are the positions step * batch_size to (step + 1) * batch_size of the sequence of epochs. A batch may
        cross the end of an epoch or contain several epochs.
        """
        first, count = step * batch_size, batch_size
        pieces = []
        while count:
            epoch, offset = divmod(first, self._n)
            piece = self._order(epoch, seed)[offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        # cat copies even a single piece, so a caller that changes the result does not change the cached order
        return torch.cat(pieces)

    def _order(self, epoch: int, seed: int) -> Tensor:
        order = self._orders.get((epoch, seed))
        if order is None:
            order = torch.randperm(self._n, generator=step_generator(seed, *self._stream, epoch))
            # a batch usually crosses at most two epochs, and each cached order has n entries
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch, seed] = order
        return order


SETS = ("val", "test")


def held_out(
    n: int, path: str, given: Sequence[bool], fractions: Sequence[float], most: int | None = None
) -> list[int]:
    """Returns how many of the n rows of a file are held out for validation and for test.

    A set that has a separate file gets 0 rows.

    Args:
        given: whether the validation set and the test set have separate files.
        fractions: the fraction of the rows for each set.
        most: the largest number of rows for each set. None if it is not limited.

    Raises:
        ConfigError: fractions that leave nothing for training.
        DataError: fewer than two rows for training.
    """
    shares = {name: _fraction(name, f) for name, f, own in zip(SETS, fractions, given, strict=True) if not own}
    if sum(shares.values()) >= 1:
        asked = " and ".join(f"data.{name}_fraction={share}" for name, share in shares.items())
        raise ConfigError(f"{asked} leave nothing for training; their sum must be below 1")
    held = {name: min(max(1, round(n * share)), most or n) for name, share in shares.items()}
    left = n - sum(held.values())
    if left < 2:
        rest = "".join(f", {count} for {name}" for name, count in held.items())
        raise DataError(
            f"{path} has {n} row{'s' * (n != 1)}: {max(left, 0)} for training{rest}; at least 2 are "
            "needed for training and 1 for each held-out set"
        )
    return [held.get(name, 0) for name in SETS]


def split(n: int, sizes: Sequence[int], seed: int, *stream: int) -> list[NDArray[np.int64]]:
    """Splits n row numbers at random: first the training rows, then one array per size in `sizes`."""
    order = torch.randperm(n, generator=step_generator(seed, *stream)).numpy()
    ends = np.cumsum([n - sum(sizes), *sizes[:-1]])
    return list(np.split(order, ends))


def _fraction(name: str, fraction: float) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(
            f"data.{name}_fraction={fraction}: give a number between 0 and 1, or a file with data.{name}_path"
        )
    return float(fraction)


class Extras(NamedTuple):
    """The labels, context and weights of some rows. They are not part of the samples.

    Attributes:
        label: class labels (n,), int64, or None.
        context: context values (n, k), float64, or None.
        weights: weights (n,), float64, or None.
    """

    label: Tensor | None = None
    context: Tensor | None = None
    weights: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Extras":
        """Applies a function to each tensor."""
        return Extras(*(None if one is None else function(one) for one in self))

    def normalized(self, mean_weight: float) -> "Extras":
        """Divides the weights by `mean_weight`."""
        return self if self.weights is None else self._replace(weights=self.weights / mean_weight)

    def split(self, sizes: Sequence[int]) -> "list[Extras]":
        """Splits the rows into parts of these sizes."""
        parts = [[None] * len(sizes) if one is None else torch.split(one, list(sizes)) for one in self]
        return [Extras(*each) for each in zip(*parts, strict=True)]


class Store(Protocol):
    """Training samples, in memory or in a file, with batches from an endless sequence of epochs.

    Each epoch contains each row once. The batch of a step is rows step * batch_size to (step + 1) * batch_size of the
    sequence. A batch may cross the end of an epoch or contain several epochs. A share is a slice of the batch with
    stride 1.

    Attributes:
        n: the number of training samples.
    """

    n: int

    def samples(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Returns the rows `share` of the batch of a step, (k, *event_shape)."""

    def extra(self, role: str, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the values of these rows in the field `role` of `Extras`."""

    def to(self, device: torch.device) -> None:
        """Moves the samples to a device if they are in memory."""


class InMemoryStore:
    """A store of training samples in memory. Batches are gathered on the device of the samples.

    Args:
        train: samples, (n, *event_shape).
        extras: labels, context and weights of the samples.
        stream: the key of the random stream that the order of each epoch is drawn from.
    """

    def __init__(self, train: Tensor, extras: Extras, *stream: int) -> None:
        self.train, self._extras, self.n = train, extras, len(train)
        self._epochs = Epochs(len(train), *stream)

    def samples(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Returns the rows `share` of the batch of a step, (k, *event_shape), on the device of the samples."""
        return self.train[self._rows(step, batch_size, seed, share)]

    def extra(self, role: str, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the values of these rows in the field `role` of `Extras`."""
        values: Tensor | None = getattr(self._extras, role)
        return None if values is None else values[self._rows(step, batch_size, seed, share)]

    def to(self, device: torch.device) -> None:
        """Moves samples, labels, context and weights to a device."""
        self.train = self.train.to(device)
        self._extras = self._extras.map(lambda one: one.to(device))

    def _rows(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        return self._epochs.rows(step, batch_size, seed)[share].to(self.train.device)


class Finite(Dataset):
    """A data set with a finite number of training samples. Each epoch has a new random order."""

    def keep(self, store: Store) -> None:
        """Sets the store that training batches come from."""
        self._store = store

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self.train_share(step, batch_size, seed, slice(None))

    def train_rows(self, most: int) -> Tensor:
        return self.train_batch(0, min(most, self._store.n), 0)

    def train_context(self, most: int) -> Tensor | None:
        return self.context_share(0, min(most, self._store.n), 0, slice(None))

    def row_weights(self, most: int) -> Tensor | None:
        return self.weights_share(0, min(most, self._store.n), 0, slice(None))

    def train_labels(self, step: int, batch_size: int, seed: int) -> Tensor | None:
        return self.labels_share(step, batch_size, seed, slice(None))

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        return self._store.samples(step, batch_size, seed, share)

    def labels_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        return self._store.extra("label", step, batch_size, seed, share)

    def context_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        return self._store.extra("context", step, batch_size, seed, share)

    def weights_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        return self._store.extra("weights", step, batch_size, seed, share)

    def to(self, device: torch.device) -> None:
        self._store.to(device)
