"""A finite data set: where its training samples are kept, and the batches of them."""

from typing import Protocol

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.epochs import Epochs


class Store(Protocol):
    """Training samples, in memory or not, in endless epochs: every row comes once an epoch.

    The batch of a step is rows step * batch_size to (step + 1) * batch_size; it may cross from one epoch into the next,
    or hold several. A share is a slice of it, without a stride.

    Attributes:
        n: the number of training samples.
    """

    n: int

    def samples(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Those rows of a step's batch, (k, *event_shape)."""

    def labels(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Their labels, (k,), or None."""

    def to(self, device: torch.device) -> None:
        """Moves the samples, where they are in memory."""


class Resident:
    """Samples (n, *event_shape) and labels (n,), or None, in memory on any device; batches are gathered there.

    Args:
        stream: the key of the random stream of the orders, of which each epoch has one drawn anew.
    """

    def __init__(self, train: Tensor, labels: Tensor | None, *stream: int) -> None:
        self.train, self._labels, self.n = train, labels, len(train)
        self._epochs = Epochs(len(train), *stream)

    def samples(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Those rows of a step's batch, (k, *event_shape), on the device of the samples."""
        return self.train[self._rows(step, batch_size, seed, share)]

    def labels(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Their labels, (k,), or None."""
        return None if self._labels is None else self._labels[self._rows(step, batch_size, seed, share)]

    def to(self, device: torch.device) -> None:
        """Moves samples and labels to a device."""
        self.train = self.train.to(device)
        self._labels = None if self._labels is None else self._labels.to(device)

    def _rows(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        return self._epochs.rows(step, batch_size, seed)[share].to(self.train.device)


class Finite(Dataset):
    """Epochs of the training samples in a store, each in an order drawn anew."""

    def keep(self, store: Store) -> None:
        """Takes the store of the training samples."""
        self._store = store

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self.train_share(step, batch_size, seed, slice(None))

    def train_rows(self, most: int) -> Tensor:
        return self.train_batch(0, min(most, self._store.n), 0)

    def train_labels(self, step: int, batch_size: int, seed: int) -> Tensor | None:
        return self.labels_share(step, batch_size, seed, slice(None))

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        return self._store.samples(step, batch_size, seed, share)

    def labels_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        return self._store.labels(step, batch_size, seed, share)

    def to(self, device: torch.device) -> None:
        self._store.to(device)
