"""What the rows of a table are to a flow: real numbers or whole ones, vectors or images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.array_checks import check_levels, check_range, check_whole
from flowtrain.data.memory import Store
from flowtrain.data.read import Table

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """The shape of a sample, and whether samples are whole numbers, from 0 to levels - 1 where there are levels.

    For real vectors, `noisy` are the columns of whole numbers to which noise is added.
    """

    event_shape: tuple[int, ...]
    discrete: bool
    levels: int | None
    noisy: tuple[int, ...] = ()
    # whether real samples are float64 because float32 loses significant digits
    wide: bool = False

    def check(self, table: Table, whole: Iterable[Table] | None = None) -> None:
        """Refuses values that are not of this kind; see `check_levels` for `whole`."""
        check_range(table)
        if self.discrete or self.noisy:
            check_whole(table, range(len(table.columns)) if self.discrete else self.noisy, whole)
        if self.levels is not None:
            check_levels(table, self.levels, whole)

    def samples(self, values: NDArray[Any], real: type[np.floating[Any]] | None = None) -> Tensor:
        """(n, *event_shape) of rows (n, d): whole numbers as uint8 or int64, others of the type `real`.

        `real` None means float64 if samples are wide, else float32.

        Rows of that type already are not copied: the samples share their memory.
        """
        narrow = np.uint8 if self.levels is not None and self.levels <= 256 else np.int64
        real = real or (np.float64 if self.wide else np.float32)
        narrowed = values.astype(narrow if self.discrete else real, copy=False)
        return torch.from_numpy(narrowed).view(-1, *self.event_shape)

    def moments(self, mean: Values, variance: Values) -> tuple[Values, Values]:
        """Mean and standard deviation of samples, from the moments of rows; adds those of U[0, 1) to noisy columns."""
        noise = self.noise(len(mean))
        return mean + noise / 2, np.sqrt(variance + noise / 12)

    def noise(self, d: int) -> Values:
        """1 for each of the d columns with added noise, else 0."""
        noise = np.full(d, float(self.discrete))
        noise[list(self.noisy)] = 1.0
        return noise


@dataclass(frozen=True)
class Part:
    """A held-out set: samples (n, *event_shape) and labels (n,), int64, or None.

    Attributes:
        rows: the rows of the training file that the set holds, (n,). For a set with its own file, the row count and
            checksum of the file.
    """

    x: Tensor
    labels: Tensor | None
    rows: NDArray[np.int64] | tuple[int, str]


@dataclass(frozen=True)
class Divided:
    """A training file: the store of the n rows that are for training, and the parts that are held out of it.

    Attributes:
        mean, variance: of the training rows by column, (d,).
        look: some of them at random, (k, d).
        whole: the columns that hold only whole numbers that noise can be added to, (d,).
        hashes: hashes of one in `hash_step` training rows, see `row_hashes`.
        class_counts: the number of training rows of each label from 0 to the largest; empty without labels.
        checksum: the checksum of the file, including labels.
    """

    store: Store
    n: int
    held: list[Part]
    mean: Values
    variance: Values
    look: NDArray[Any]
    whole: NDArray[np.bool_]
    hashes: NDArray[np.uint64]
    hash_step: int
    class_counts: NDArray[np.int64]
    checksum: str


def as_labels(values: NDArray[Any]) -> Tensor:
    """(n,), int64, of a column (n, 1)."""
    return torch.from_numpy(values.reshape(-1).astype(np.int64))
