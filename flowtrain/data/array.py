"""data=array: the user's own table from .npy, .npz or text files."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.checks import below_half, flag, whole
from flowtrain.data.array_checks import (
    check_alike,
    check_labels,
    check_levels,
    check_range,
    check_spread,
    check_whole,
    warn_if_discrete,
)
from flowtrain.data.base import ALPHA, Samples
from flowtrain.data.columns import Columns
from flowtrain.data.mapped import MOST_HELD_OUT, Mapped, as_labels, head, is_mapped
from flowtrain.data.memory import Finite, Resident
from flowtrain.data.npy_rows import NpyRows
from flowtrain.data.read import Table, read_labelled
from flowtrain.data.splits import held_out, split
from flowtrain.errors import ConfigError

_log = logging.getLogger("flowtrain")

# Keys of the random streams. None is 0: a generator keyed by (seed, 5) is the one keyed by (seed, 5, 0)
_STREAM = 0x6172_7279
_SPLIT, _ORDER = 1, 2


class ArrayData(Finite):
    """Rows of a table as samples x of shape (B, d), or (B, *event_shape), in the units of the file.

    What is not given as a file of its own is split off the training file, at random but the same for every
    run with the same `seed` of the data. The density of values that repeat is unbounded, so a column that is
    constant in training is refused, and counts or pixels want `dequantize` or `levels`: samples are then integers,
    to which the flow adds u ~ U[0, 1).

    Args:
        path: the training file, .npy .npz .csv .txt .data .tra or .tes; see `read_table`.
        val_path, test_path: held-out files with the same columns.
        key: which array of an .npz file with several.
        columns: names, positions or slices such as "0:64" of the columns to keep.
        label: name or position of a column of class labels 0, 1, ..., which is no part of a sample; None for none.
        event_shape: shape (C, H, W) of the images that rows hold, channel by channel and row by row; None for vectors.
        val_fraction, test_fraction: the share of the training file to hold out where there is no such file.
        standardize: give the flow the mean and deviation of the training rows; None: unless `levels` is given.
        dequantize: samples are whole numbers.
        levels: samples are whole numbers from 0 to levels - 1, which a logit takes to the real line.
        alpha: of that logit.
        memory_map: read the training file, a .npy, as its rows are wanted, in memory that does not grow with it; None:
            from 256 MiB on. Batches are then shuffled by blocks, and at most 100,000 rows held out for each set.
        seed: of the split; batches have the seed of the run.

    Raises:
        ConfigError: no path, a fraction outside (0, 1), columns, a key or a shape that the file does not fit.
        DataError: files that do not fit together, too few rows, values that no density can be fitted to.
    """

    def __init__(
        self,
        path: str | None,
        val_path: str | None = None,
        test_path: str | None = None,
        key: str | None = None,
        columns: Columns | None = None,
        label: str | int | None = None,
        event_shape: Sequence[int] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        standardize: bool | None = None,
        seed: int = 0,
        dequantize: bool = False,
        levels: int | None = None,
        alpha: float = ALPHA,
        memory_map: bool | None = None,
    ) -> None:
        if path is None:
            raise ConfigError(
                "data.path is not set: data=array reads your own file, so give data.path=FILE (.npy, .npz or .csv)"
            )
        for name, given in (("path", path), ("val_path", val_path), ("test_path", test_path)):
            if given is not None and not isinstance(given, str):
                raise ConfigError(f"data.{name}={given}: give the path of a file")
        self.levels = None if levels is None else whole("data.levels", levels, least=2)
        self.alpha = below_half("data.alpha", alpha)
        self.discrete = flag("data.dequantize", dequantize) or levels is not None
        self._standardize = _standardizes(standardize, levels)
        file = NpyRows(Path(path).expanduser()) if key is None and is_mapped(path, memory_map) else None
        pairs = [(None, None) if p is None else read_labelled(p, key, columns, label) for p in (val_path, test_path)]
        begin = read_labelled(path, key, columns, label) if file is None else head(file, columns, label)
        tables, marks = ([pair[i] for pair in (begin, *pairs)] for i in range(2))
        first = self._checked(tables)
        self.event_shape = _event_shape(event_shape, len(first.columns))
        self.columns = first.columns if event_shape is None else ()
        self._names = first.columns if first.named else ()

        fractions = (val_fraction, test_fraction)
        read = self._take if file is None else partial(self._map, file)
        n = read(tables, marks, fractions, seed)
        sizes = f"{n} + {len(self.val)} + {len(self.test)}"
        _log.info(f"{path}: {sizes} rows for train, val and test, {len(first.columns)} columns")

    def _check(self, table: Table) -> None:
        """Refuses values that are not what the data set promises."""
        check_range(table)
        if self.discrete:
            check_whole(table)
        if self.levels is not None:
            check_levels(table, self.levels)

    def _take(
        self,
        tables: list[Table | None],
        marks: list[Table | None],
        fractions: tuple[float, float],
        seed: int,
    ) -> int:
        """Takes all the rows into memory: how many are for training."""
        first = tables[0]
        assert first is not None
        n = len(first.values)
        sizes = held_out(n, first.path, [table is not None for table in tables[1:]], fractions)
        rows = split(n, sizes, seed, _STREAM, _SPLIT)
        parts = _parts(tables, rows)
        self._settle(first, parts[0].mean(0), parts[0].var(0), parts[0])
        train, self.val, self.test = (self._samples(part) for part in parts)
        labels = None if marks[0] is None else self._labels(marks, rows)
        self.keep(Resident(train, labels, _STREAM, _ORDER))
        return len(train)

    def _map(
        self,
        file: NpyRows,
        tables: list[Table | None],
        marks: list[Table | None],
        fractions: tuple[float, float],
        seed: int,
    ) -> int:
        """Looks the file through, and keeps none of its rows but those held out: how many are for training."""
        first, mark = tables[0], marks[0]
        assert first is not None
        sizes = held_out(file.n, first.path, [t is not None for t in tables[1:]], fractions, MOST_HELD_OUT)
        store = Mapped(file, first, mark, sizes, seed, (_STREAM, _SPLIT), (_STREAM, _ORDER), self._samples)
        seen = store.look_through(self._check)
        self.val, self.test = (
            self._samples(held if own is None else own.values) for held, own in zip(seen.held, tables[1:], strict=True)
        )
        # the held-out rows are from all over the file, of which the first may not tell much
        self._settle(first, seen.mean, seen.variance, seen.held[0] if sizes[0] else first.values)
        if mark is not None:
            for own in filter(None, marks[1:]):
                check_labels(own)
            found = [own.values if own is not None else held for held, own in zip(seen.marks, marks[1:], strict=True)]
            self.val_labels, self.test_labels = (as_labels(part) for part in found if part is not None)
            self.classes = 1 + max(seen.most, int(self.val_labels.max()), int(self.test_labels.max()))
        self.keep(store)
        return store.n

    def _settle(
        self, first: Table, mean: NDArray[np.float64], variance: NDArray[np.float64], values: NDArray[np.float64]
    ) -> None:
        """Takes over the moments of the training rows, with u ~ U[0, 1) added where discrete, and looks at them."""
        if self.discrete:
            mean, variance = mean + 1 / 2, variance + 1 / 12
        self._mean, self._std = mean, np.sqrt(variance)
        check_spread(first, self._mean, self._std, self.discrete)
        if not self.discrete:
            warn_if_discrete(first, values)

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        return self._store.share(step, batch_size, seed, share)[0]

    def labels_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor | None:
        return self._store.share(step, batch_size, seed, share)[1]

    def _checked(self, tables: list[Table | None]) -> Table:
        """The training table, once all of them are what the data set promises."""
        first = tables[0]
        assert first is not None
        for table in filter(None, tables):
            check_alike(first, table)
            self._check(table)
        return first

    def _labels(self, marks: list[Table | None], rows: list[NDArray[np.int64]]) -> Tensor:
        """The labels for training, with those for val and test set, and how many classes there are."""
        for mark in filter(None, marks):
            check_labels(mark)
        train, self.val_labels, self.test_labels = parts = [as_labels(part) for part in _parts(marks, rows)]
        self.classes = 1 + max(int(part.max()) for part in parts)
        return train

    @property
    def samples(self) -> Samples:
        return replace(super().samples, columns=self._names)

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (over n) of the training rows, (*event_shape), float64, noise included."""
        if not self._standardize:
            return None
        mean, std = (torch.from_numpy(v.copy()).view(self.event_shape) for v in (self._mean, self._std))
        return mean, std

    def _samples(self, values: NDArray[Any]) -> Tensor:
        narrow = np.uint8 if self.levels is not None and self.levels <= 256 else np.int64
        return torch.from_numpy(values.astype(narrow if self.discrete else np.float32)).view(-1, *self.event_shape)


def _standardizes(asked: bool | None, levels: int | None) -> bool:
    """Whether samples are standardised: as asked, or unless a logit takes them to the real line.

    Raises:
        ConfigError: both at once.
    """
    if asked is None:
        return levels is None
    if flag("data.standardize", asked) and levels is not None:
        raise ConfigError("data.standardize=true and data.levels: the logit of levels takes its place; leave one out")
    return asked


def _event_shape(asked: Sequence[int] | None, width: int) -> tuple[int, ...]:
    if asked is None:
        return (width,)
    if not isinstance(asked, list | tuple) or len(asked) != 3:
        raise ConfigError(f"data.event_shape={asked}: give channels, height and width of an image, as in [1,8,8]")
    shape = [whole(f"data.event_shape[{i}]", side) for i, side in enumerate(asked)]
    if math.prod(shape) != width:
        raise ConfigError(
            f"data.event_shape={shape} takes {math.prod(shape)} columns, and there are {width}: choose data.columns, "
            "and name a column of labels with data.label"
        )
    return tuple(shape)


def _parts(tables: list[Table | None], rows: list[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
    """The values for training, val and test: a table of their own, or rows of the first."""
    first, *others = tables
    assert first is not None
    held = zip(rows[1:], others, strict=True)
    return [first.values[rows[0]], *(first.values[mine] if own is None else own.values for mine, own in held)]
