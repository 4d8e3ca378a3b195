"""A finite data set: where its training samples are kept, and the batches of them."""

from typing import Protocol

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.epochs import Epochs


class Store(Protocol):
    """Training samples, in memory or not."""

    def share(self, step: int, batch_size: int, seed: int, share: slice) -> tuple[Tensor, Tensor | None]:
        """Those rows of rows step * batch_size to (step + 1) * batch_size of the endless epochs, and their labels.

        Every row comes once an epoch; a batch may cross from one epoch into the next, or hold several.
        """

    def to(self, device: torch.device) -> None:
        """Moves the samples, where they are in memory."""


class Resident:
    """Samples (n, *event_shape) and labels (n,), or None, in memory on any device; batches are gathered there.

    Args:
        stream: the key of the random stream of the orders, of which each epoch has one drawn anew.
    """

    def __init__(self, train: Tensor, labels: Tensor | None, *stream: int) -> None:
        self.train, self.labels = train, labels
        self._epochs = Epochs(len(train), *stream)

    def share(self, step: int, batch_size: int, seed: int, share: slice) -> tuple[Tensor, Tensor | None]:
        rows = self._epochs.rows(step, batch_size, seed)[share].to(self.train.device)
        return self.train[rows], None if self.labels is None else self.labels[rows]

    def to(self, device: torch.device) -> None:
        self.train = self.train.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)


class Finite(Dataset):
    """Epochs of the training samples in a store, each in an order drawn anew."""

    def keep(self, store: Store) -> None:
        self._store = store

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self._store.share(step, batch_size, seed, slice(None))[0]

    def train_labels(self, step: int, batch_size: int, seed: int) -> Tensor | None:
        return self._store.share(step, batch_size, seed, slice(None))[1]

    def to(self, device: torch.device) -> None:
        self._store.to(device)
