"""The base class of data sets, the description of their samples, and checksums that detect changed data."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.context import ContextColumn
from flowtrain.data.types import ColumnType
from flowtrain.utils.arguments import choose
from flowtrain.utils.errors import ConfigError

# (name, number of rows, checksum) of the training file, whose name is FILE, and of each held-out set
Record = tuple[tuple[str, int, str], ...]
FILE = "file"


class Checksum:
    """CRC-32 of the rows of a table and of their labels, computed in parts.

    It depends only on the values, not on their format in the file or on the size of the parts.
    """

    def __init__(self) -> None:
        self._values = self._labels = 0

    def add(self, values: NDArray[Any], labels: NDArray[Any] | None) -> "Checksum":
        """Adds rows (n, d) and labels (n, 1) or None; returns self."""
        self._values = zlib.crc32(np.ascontiguousarray(values).data, self._values)
        if labels is not None:
            self._labels = zlib.crc32(np.ascontiguousarray(labels).data, self._labels)
        return self

    def __str__(self) -> str:
        return f"{self._values:08x}{self._labels:08x}"


def record_of(file: tuple[int, str], rows: Iterable[tuple[str, NDArray[np.int64] | tuple[int, str]]]) -> Record:
    """Returns the record of a training file and its held-out sets.

    Args:
        file: row count and checksum of the training file.
        rows: (name, rows) of each held-out set. `rows` are row numbers of the training file, or, if the set has a
            separate file, the row count and checksum of that file.
    """
    found = [(FILE, *file)]
    for name, held in rows:
        if isinstance(held, tuple):
            found.append((name, *held))
        else:
            found.append((name, len(held), f"{zlib.crc32(np.ascontiguousarray(held).data):08x}@{file[1]}"))
    return tuple(found)


def changes(
    before: Record, now: Record, sets: Iterable[str] = (FILE, "val", "test"), samples_only: bool = False
) -> str | None:
    """Describes how sets have changed between two records. Returns None if all sets in both records are unchanged.

    Args:
        before, now: the records.
        sets: the names of the sets to compare.
        samples_only: whether labels, context and weights are ignored.

    Example:
        >>> before = ("file", 150, "a5"), ("test", 15, "07@a5")
        >>> changes(before, (("file", 153, "b1"), ("test", 15, "1f@b1")), ["test"])
        'the training file had 150 rows and has 153 now'
    """
    old, new = (
        {name: (n, _of_samples(checksum) if samples_only else checksum) for name, n, checksum in record}
        for record in (before, now)
    )
    changed = [name for name in sets if name in old and name in new and old[name] != new[name]]
    if not changed:
        return None
    file = old.get(FILE), new.get(FILE)
    split_off = [name for name in changed if name == FILE or "@" in new[name][1]]
    if split_off and file[0] is not None and file[1] is not None and file[0] != file[1]:
        return f"the training file {_difference(file[0], file[1])}"
    if split_off:
        why = "another data.seed, fraction, data.n_val or data.memory_map"
        return f"other rows are held out for {' and '.join(split_off)} ({why})"
    return " and ".join(f"the {name} set {_difference(old[name], new[name])}" for name in changed)


def _of_samples(checksum: str) -> str:
    """Returns the part of a checksum of a record that does not depend on labels, context and weights."""
    rows, at, of_file = checksum.rpartition("@")
    return f"{rows}{at}{of_file[:8]}"


def _difference(before: tuple[int, str], now: tuple[int, str]) -> str:
    if before[0] != now[0]:
        return f"had {before[0]:,} rows and has {now[0]:,} now"
    return f"still has {now[0]:,} rows, but the values, their order, or the columns have changed"


def step_generator(seed: int, *stream: int) -> torch.Generator:
    """Returns a CPU generator whose state depends only on `seed` and the integers in `stream`.

    The randomness of a step is keyed by (seed, step) and not carried from step to step. A run can therefore be resumed
    exactly without saving the state of a generator.

    Raises:
        ConfigError: a negative seed.
    """
    if min((seed, *stream)) < 0:
        raise ConfigError(f"seed={seed}: a seed must be a whole number that is not negative")
    # the length is included because SeedSequence does not distinguish (0, 1) from (0, 1, 0)
    words = np.random.SeedSequence((seed, len(stream), *stream)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


# the random stream of a training step (trace noise); data sets use other numbers for their streams
STEP_STREAM = 0x73_74_65_70
# default of the logit: a small alpha spreads out the background of images, which makes it easier to fit
ALPHA = 1e-5


class Ids(NamedTuple):
    """The column of ids of a file, `data.id`.

    Attributes:
        name: the name of the column.
        values: (n,): int64 if all ids are whole numbers, float64 if they are other numbers, else text (dtype object),
            with None for a missing id.
    """

    name: str
    values: NDArray[Any]

    def of(self, rows: NDArray[np.int64]) -> "Ids":
        """Returns the ids of some rows."""
        return self._replace(values=self.values[rows])


@dataclass(frozen=True)
class Samples:
    """A description of the samples that a flow is trained on, stored in checkpoints.

    `Dataset` documents the attributes that are not listed here. Two instances are equal if they describe the same kind
    of sample. The comparison ignores `class_counts` and `record`.

    Attributes:
        columns: the names of the columns if the training file has names. They select the columns of new data.
        label: the name of the column of labels if it has a name. It selects the labels of new data.
        centered: whether float32 cannot resolve the samples. The samples are then float64, and the flow subtracts
            `Dataset.offset` from them.
        noisy: the columns of whole numbers to which the data set adds noise. Only data of real-valued vectors have such
            columns.
        class_counts: the number of training rows of each class; () if unknown.
        record: row counts and checksums of the data, see `record_of`; () if unknown.
        context: the context columns of a flow p(x | c). () without context.
        context_rows: the context of some training rows, for figures and checks.
        weights: the name of the column of weights if there is one and it has a name.
        types: the type of each column; () if all columns are real or if samples are integer-valued.
    """

    event_shape: tuple[int, ...]
    integer_valued: bool = False
    levels: int | None = None
    alpha: float = ALPHA
    classes: int | None = None
    standardized: bool = False
    columns: tuple[str, ...] = ()
    label: str | None = None
    centered: bool = False
    gaussian_start: bool = False
    noisy: tuple[int, ...] = ()
    class_counts: tuple[int, ...] = field(default=(), compare=False)
    record: Record = field(default=(), compare=False)
    context: tuple[ContextColumn, ...] = ()
    context_rows: tuple[tuple[float, ...], ...] = field(default=(), compare=False)
    weights: str | None = None
    types: tuple[ColumnType, ...] = ()


class Dataset(ABC):
    """A data set: training batches, and held-out sets for validation and test.

    Samples x have shape (B, *event_shape) and are in data units. Integer-valued samples have an integer dtype. Other
    samples are float32, or float64 if float32 loses significant digits.

    Attributes:
        event_shape: the shape of one sample.
        val, test: fixed held-out samples, the same for every seed of a run.
        integer_valued: whether samples are integers, which the flow dequantizes.
        levels: the number of values of integer-valued samples 0 .. levels - 1. None if the values are not bounded.
        alpha: the parameter of the logit that maps [0, levels] to the real line.
        classes: the number of classes, with labels 0 .. classes - 1. None without labels.
        val_labels, test_labels: (n,), int64, or None.
        context: the context columns. () without context.
        val_context, test_context: context values (n, k), float64, or None.
        context_rows: see `Samples`.
        val_weights, test_weights: weights (n,), float64, or None. Only their ratios matter.
        columns: names of the columns of vector data, for plots and messages. They may be empty.
        offset: the offset that the flow subtracts from samples, (*event_shape), float64. Its values are exact in
            float32. None if float32 resolves the samples.
        n_train: the number of training samples. None if every batch has new samples.
        gaussian_start: whether the flow starts at the Gaussian of the training rows.
        noisy, class_counts, record, types: see `Samples`.
        entropy: differential entropy of the true density in nats. None if unknown.
        held_rows: for each held-out set, by name, its row numbers in the training data, (n,). Sets that have a separate
            file are not included.

    Example:
        >>> class Line(Dataset):
        ...     event_shape = (1,)
        ...     val = test = torch.linspace(0, 1, 5).unsqueeze(1)
        ...
        ...     def train_batch(self, step, batch_size, seed):
        ...         return torch.rand(batch_size, 1, generator=step_generator(seed, step))
        >>> line = Line()
        >>> torch.equal(line.train_batch(7, 4, seed=0), line.train_batch(7, 4, seed=0))
        True
    """

    event_shape: tuple[int, ...]
    val: Tensor
    test: Tensor
    integer_valued: bool = False
    levels: int | None = None
    alpha: float = ALPHA
    classes: int | None = None
    val_labels: Tensor | None = None
    test_labels: Tensor | None = None
    context: tuple[ContextColumn, ...] = ()
    val_context: Tensor | None = None
    test_context: Tensor | None = None
    context_rows: tuple[tuple[float, ...], ...] = ()
    val_weights: Tensor | None = None
    test_weights: Tensor | None = None
    columns: tuple[str, ...] = ()
    offset: Tensor | None = None
    n_train: int | None = None
    gaussian_start: bool = False
    noisy: tuple[int, ...] = ()
    class_counts: tuple[int, ...] = ()
    record: Record = ()
    types: tuple[ColumnType, ...] = ()
    entropy: float | None = None
    held_rows: Mapping[str, NDArray[np.int64]] = MappingProxyType({})

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Returns the training batch of `step`, (batch_size, *event_shape): a pure function of its arguments."""

    def train_labels(self, step: int, batch_size: int, seed: int) -> Tensor | None:
        """Returns the labels of the training batch of `step`, (batch_size,), int64; None without labels."""
        return None

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Returns the rows `share` of the training batch, (k, *event_shape), for one of several ranks."""
        return self.train_batch(step, batch_size, seed)[share]

    def labels_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the labels of the rows `share` of the training batch, (k,); None without labels."""
        labels = self.train_labels(step, batch_size, seed)
        return None if labels is None else labels[share]

    def context_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the context of the rows `share` of the training batch, (k, n_context); None without context."""
        return None

    def weights_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Returns the weights of the rows `share` of the training batch, (k,), float64; None without weights.

        Their mean over all training rows is 1.
        """
        return None

    def train_rows(self, most: int) -> Tensor | None:
        """Returns up to `most` distinct training samples (k, *event_shape); None if the data are endless."""
        return None

    def train_context(self, most: int) -> Tensor | None:
        """Returns the context of the rows of `train_rows`, (k, n_context); None without context."""
        return None

    def row_weights(self, most: int) -> Tensor | None:
        """Returns the weights of `train_rows(most)`, (k,), float64; None without weights."""
        return None

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Moves the training samples to a device. Does nothing for data sets that store no training samples."""

    @property
    def samples(self) -> Samples:
        """The description of the samples that a flow needs."""
        standardized = self.statistics() is not None
        return Samples(
            self.event_shape,
            self.integer_valued,
            self.levels,
            self.alpha,
            self.classes,
            standardized,
            centered=self.offset is not None,
            gaussian_start=self.gaussian_start,
            noisy=self.noisy,
            class_counts=self.class_counts,
            record=self.record,
            context=self.context,
            context_rows=self.context_rows,
            types=self.types,
        )

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and standard deviation of the training samples; None if the flow does not standardize.

        Both have shape (*event_shape) and are float64.
        """
        return None

    def log_prob(self, x: Tensor) -> Tensor | None:
        """Returns the true log density of x in nats, shape (B,), float64; None if it is unknown."""
        return None

    def split(self, name: str) -> Tensor:
        """Returns the held-out set `name`, which is "val" or "test": (n, *event_shape).

        Raises:
            ConfigError: another name.
        """
        if name not in ("val", "test"):
            raise ConfigError(f"split={name}: there is no such split; {choose(name, ('val', 'test'))}")
        return self.val if name == "val" else self.test

    def row_numbers(self, name: str) -> NDArray[np.int64]:
        """Returns the row number of each sample of the held-out set `name` in the file of this set, from 0, (n,).

        For data without a file, it is the position in the set.
        """
        return self.held_rows.get(name, np.arange(len(self.split(name))))

    def ids(self, name: str) -> Ids | None:
        """Returns the ids of the rows `row_numbers(name)`; None if the data have no column of ids."""
        return None

    def split_labels(self, name: str) -> Tensor | None:
        """Returns the labels of the held-out set `name`, (n,), or None."""
        return self.val_labels if name == "val" else self.test_labels

    def split_context(self, name: str) -> Tensor | None:
        """Returns the context of the held-out set `name`: values (n, k), or labels (n,) without context columns."""
        if not self.context:
            return self.split_labels(name)
        return self.val_context if name == "val" else self.test_context

    def split_weights(self, name: str) -> Tensor | None:
        """Returns the weights of the held-out set `name`, (n,), or None."""
        return self.val_weights if name == "val" else self.test_weights
