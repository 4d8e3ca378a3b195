"""data=array: the user's own table from .npy, .npz or text files."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

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
from flowtrain.data.base import ALPHA, Samples, step_generator
from flowtrain.data.columns import Columns
from flowtrain.data.memory import InMemory
from flowtrain.data.read import Table, read_labelled, read_table
from flowtrain.errors import ConfigError, DataError

_log = logging.getLogger("flowtrain")

# Keys of the random streams. None is 0: a generator keyed by (seed, 5) is the one keyed by (seed, 5, 0)
_STREAM = 0x6172_7279
_SPLIT, _ORDER = 1, 2


class ArrayData(InMemory):
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
        paths = [path, val_path, test_path]
        if label is None:
            tables = [None if p is None else read_table(p, key, columns) for p in paths]
            marks: list[Table | None] = [None, None, None]
        else:
            pairs = [(None, None) if p is None else read_labelled(p, key, columns, label) for p in paths]
            tables, marks = [table for table, _ in pairs], [mark for _, mark in pairs]
        first = self._checked(tables)
        self.event_shape = _event_shape(event_shape, len(first.columns))
        self.columns = first.columns if event_shape is None else ()
        self._names = first.columns if first.named else ()

        rows = _split(first, tables[1:], (val_fraction, test_fraction), seed)
        parts = _parts(tables, rows)
        self._mean, self._std = _moments(parts[0], self.discrete)
        check_spread(first, self._mean, self._std, self.discrete)
        if not self.discrete:
            warn_if_discrete(first, parts[0])
        train, self.val, self.test = (self._samples(part) for part in parts)
        labels = None if label is None else self._labels(marks, rows)
        self.keep(train, labels, _STREAM, _ORDER)
        sizes = " + ".join(str(len(part)) for part in parts)
        _log.info(f"{path}: {sizes} rows for train, val and test, {len(first.columns)} columns")

    def _checked(self, tables: list[Table | None]) -> Table:
        """The training table, once all of them are what the data set promises."""
        first = tables[0]
        assert first is not None
        for table in filter(None, tables):
            check_alike(first, table)
            check_range(table)
            if self.discrete:
                check_whole(table)
            if self.levels is not None:
                check_levels(table, self.levels)
        return first

    def _labels(self, marks: list[Table | None], rows: list[NDArray[np.int64]]) -> Tensor:
        """The labels for training, with those for val and test set, and how many classes there are."""
        for mark in filter(None, marks):
            check_labels(mark)
        train, self.val_labels, self.test_labels = parts = [
            torch.from_numpy(part[:, 0].astype(np.int64)) for part in _parts(marks, rows)
        ]
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

    def _samples(self, values: NDArray[np.float64]) -> Tensor:
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


def _moments(values: NDArray[np.float64], discrete: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and population deviation per column, of x + u with u ~ U[0, 1) where discrete."""
    mean, variance = values.mean(0), values.var(0)
    if discrete:
        mean, variance = mean + 1 / 2, variance + 1 / 12
    return mean, np.sqrt(variance)


def _split(
    train: Table, others: list[Table | None], fractions: tuple[float, float], seed: int
) -> list[NDArray[np.int64]]:
    """Which rows of the training file are for training, val and test; none for a set with a file of its own.

    Raises:
        ConfigError: fractions that leave nothing for one of the sets.
        DataError: fewer than two rows for training.
    """
    n = len(train.values)
    shares: dict[str, float] = {}
    for name, fraction, table in zip(("val", "test"), fractions, others, strict=True):
        if table is None:
            shares[name] = _fraction(name, fraction)
    if sum(shares.values()) >= 1:
        asked = " and ".join(f"data.{name}_fraction={share}" for name, share in shares.items())
        raise ConfigError(f"{asked} leave nothing for training; their sum must be below 1")
    held = {name: max(1, round(n * share)) for name, share in shares.items()}
    left = n - sum(held.values())
    if left < 2:
        rest = "".join(f", {count} for {name}" for name, count in held.items())
        raise DataError(
            f"{train.path} has {n} row{'s' * (n != 1)}: {max(left, 0)} for training{rest}; at least 2 are "
            "needed for training and 1 for each held-out set"
        )
    order = torch.randperm(n, generator=step_generator(seed, _STREAM, _SPLIT)).numpy()
    ends = np.cumsum([left, held.get("val", 0)])
    return list(np.split(order, ends))


def _fraction(name: str, fraction: float) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(
            f"data.{name}_fraction={fraction}: a number between 0 and 1 is needed, or give data.{name}_path"
        )
    return float(fraction)
