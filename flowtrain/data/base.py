"""Data sets: training batches as a function of the step, held-out sets, and a record of the data."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.utils.arguments import choose
from flowtrain.utils.errors import ConfigError

# (name, rows, checksum) of the training file, named FILE, and of each held-out set
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
    """The record of a training file and its held-out sets.

    Args:
        file: row count and checksum of the training file.
        rows: (name, rows) of each set: the rows of the training file that it holds, or, for a set with its own file,
            the row count and checksum of that file.
    """
    found = [(FILE, *file)]
    for name, held in rows:
        if isinstance(held, tuple):
            found.append((name, *held))
        else:
            found.append((name, len(held), f"{zlib.crc32(np.ascontiguousarray(held).data):08x}@{file[1]}"))
    return tuple(found)


def changes(before: Record, now: Record, sets: Iterable[str] = (FILE, "val", "test")) -> str | None:
    """Describes how these sets have changed; None if they have not, or if either record lacks them.

    Example:
        >>> before = ("file", 150, "a5"), ("test", 15, "07@a5")
        >>> changes(before, (("file", 153, "b1"), ("test", 15, "1f@b1")), ["test"])
        'the training file had 150 rows and has 153 now'
    """
    old, new = ({name: (n, checksum) for name, n, checksum in record} for record in (before, now))
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


def _difference(before: tuple[int, str], now: tuple[int, str]) -> str:
    if before[0] != now[0]:
        return f"had {before[0]:,} rows and has {now[0]:,} now"
    return f"still has {now[0]:,} rows, but the values, their order, or the columns have changed"


def step_generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends on `seed` and the integers of `stream` alone.

    Randomness keyed by (seed, step) rather than carried from step to step is what lets a run resume
    exactly with no generator state to save.

    Raises:
        ConfigError: a negative seed.
    """
    if min((seed, *stream)) < 0:
        raise ConfigError(f"seed={seed}: a seed must be a whole number that is not negative")
    # the length as well, because SeedSequence takes (0, 1) and (0, 1, 0) for the same
    words = np.random.SeedSequence((seed, len(stream), *stream)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


# the stream of a step's own randomness (trace noise); data sets key theirs by other numbers
STEP_STREAM = 0x73_74_65_70
# of the logit, unless the data say otherwise: the background of images is easiest to fit where it is spread out
ALPHA = 1e-5


@dataclass(frozen=True)
class Samples:
    """What a flow must know of the samples it is a density of; checkpoints keep it. See `Dataset` for the meanings.

    Two instances are equal if they describe the same kind of sample; `class_counts` and `record` do not count.

    Attributes:
        columns: the names of the columns if the training file has names. New data are read by these names.
        label: the name of the column of labels if it has one. New data are read by this name.
        centered: whether float32 cannot resolve the samples. They are then float64, and the flow subtracts
            `Dataset.offset` from them.
        noisy: for real vectors, the columns of whole numbers to which the data set adds noise.
        class_counts: the number of training rows of each class; () if unknown.
        record: row counts and checksums of the data, see `flowtrain.data.base`; () if there are none.
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


class Dataset(ABC):
    """Samples x of shape (B, *event_shape) in data units.

    Whole numbers are integers. Other samples are float32, or float64 if float32 loses significant digits.

    Attributes:
        event_shape: the shape of one sample.
        val, test: fixed held-out samples, the same for every seed of a run.
        integer_valued: whether samples are integers, to be dequantized by the flow.
        levels: of integer-valued samples with values 0 .. levels - 1, else None.
        alpha: of the logit that takes [0, levels] to the real line.
        classes: labels are 0 .. classes - 1; None where there are none.
        val_labels, test_labels: (n,), int64, or None.
        columns: names of the columns of vector data, for plots and messages; may be empty.
        offset: the offset that the flow subtracts from samples, (*event_shape), float64. Its values are exact in
            float32. None if float32 resolves the samples.
        n_train: the number of training samples; None if they are drawn anew.
        gaussian_start: whether the flow starts at the Gaussian of the training rows.
        noisy, class_counts, record: see `Samples`.
        entropy: differential entropy of the true density in nats, where it is known.
        held_rows: the numbers of the rows that each held-out set has of the training data, (n,), by its name; a set of
            its own is left out.

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
    columns: tuple[str, ...] = ()
    offset: Tensor | None = None
    n_train: int | None = None
    gaussian_start: bool = False
    noisy: tuple[int, ...] = ()
    class_counts: tuple[int, ...] = ()
    record: Record = ()
    entropy: float | None = None
    held_rows: Mapping[str, NDArray[np.int64]] = MappingProxyType({})

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The training batch of `step`, shape (batch_size, *event_shape): a pure function of its arguments."""

    def train_labels(self, step: int, batch_size: int, seed: int) -> Tensor | None:
        """The labels of that batch, (batch_size,), int64; None where there are none."""
        return None

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Those rows of `train_batch`, (k, *event_shape): what one of several ranks trains on."""
        return self.train_batch(step, batch_size, seed)[share]

    def labels_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        """Their labels, (k,); None where there are none."""
        labels = self.train_labels(step, batch_size, seed)
        return None if labels is None else labels[share]

    def train_rows(self, most: int) -> Tensor | None:
        """Up to `most` distinct training samples (k, *event_shape); None if the data are endless."""
        return None

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Moves the training samples to a device; nothing, for data sets that keep none."""

    @property
    def samples(self) -> Samples:
        """What a flow must know of them."""
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
        )

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of the training set by element, (*event_shape), float64; None if not standardised."""
        return None

    def log_prob(self, x: Tensor) -> Tensor | None:
        """True log density in nats, shape (B,), float64, or None where it is not known."""
        return None

    def split(self, name: str) -> Tensor:
        """The held-out set called `name`, val or test: (n, *event_shape).

        Raises:
            ConfigError: another name.
        """
        if name not in ("val", "test"):
            raise ConfigError(f"split={name}: there is no such split; {choose(name, ('val', 'test'))}")
        return self.val if name == "val" else self.test

    def split_labels(self, name: str) -> Tensor | None:
        """Its labels, (n,), or None."""
        return self.val_labels if name == "val" else self.test_labels
