"""A finite data set whose training samples are kept in memory, on any device."""

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.epochs import Epochs


class InMemory(Dataset):
    """Epochs of the n training samples, each in an order drawn anew; batches are gathered where the samples are."""

    def keep(self, train: Tensor, labels: Tensor | None, *stream: int) -> None:
        """Takes the training samples (n, *event_shape) and their labels (n,), or None.

        Args:
            stream: the key of the random stream of the orders.
        """
        self._train, self._train_labels = train, labels
        self._epochs = Epochs(len(train), *stream)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Rows step * batch_size to (step + 1) * batch_size of the endless epochs, (batch_size, *event_shape).

        Every row comes once an epoch; a batch may cross from one epoch into the next, or hold several.
        """
        return self._train[self._rows(step, batch_size, seed)]

    def train_labels(self, step: int, batch_size: int, seed: int) -> Tensor | None:
        if self._train_labels is None:
            return None
        return self._train_labels[self._rows(step, batch_size, seed)]

    def to(self, device: torch.device) -> None:
        self._train = self._train.to(device)
        self._train_labels = None if self._train_labels is None else self._train_labels.to(device)

    def _rows(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self._epochs.rows(step, batch_size, seed).to(self._train.device)
