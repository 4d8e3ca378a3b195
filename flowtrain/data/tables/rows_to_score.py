"""New data for a flow that is there already: every row of a file, in its order."""

import logging
import math
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from flowtrain.data.base import Dataset, Samples
from flowtrain.data.images import read_idx
from flowtrain.data.tables.columns import Columns, as_option, default_names, listed, pick
from flowtrain.data.tables.csv_reader import TextFormat
from flowtrain.data.tables.sample_spec import SampleSpec, as_labels, noised_set
from flowtrain.data.tables.table_checks import check_labels, warn_of_unseen
from flowtrain.data.tables.table_reader import ARRAYS, TEXTS, Table, ending_of, is_images, read_table
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import counted

_log = logging.getLogger("flowtrain")


class ScoredRows(Dataset):
    """Rows of a table as samples to score, as float64 if they are real numbers; there is nothing to train on.

    Args:
        table: the samples, one in a row.
        labels: (n,), int64, or None.
        samples: what the flow was trained on.
        seed: the seed of the noise on the columns that `samples.noisy` names.

    Raises:
        DataError: values that are not the flow's kind of sample.
    """

    def __init__(self, table: Table, labels: Tensor | None, samples: Samples, seed: int = 0) -> None:
        self.event_shape = samples.event_shape
        self.integer_valued, self.levels, self.alpha = samples.integer_valued, samples.levels, samples.alpha
        self.classes, self.columns, self.noisy = samples.classes, samples.columns, samples.noisy
        self.class_counts = samples.class_counts
        spec = SampleSpec(self.event_shape, self.integer_valued, self.levels, self.noisy)
        spec.check(table)
        # in float64, which a flow may be evaluated in
        x = spec.samples(table.values, real=np.float64)
        self.val = self.test = noised_set(x, self.noisy, seed)
        self.val_labels = self.test_labels = labels
        if labels is not None:
            counts = np.array(self.class_counts, np.int64)
            if np.isin(labels.numpy(), np.flatnonzero(counts == 0)).any():
                warn_of_unseen(table.path, counts, {"scored": labels.numpy()})

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        raise ConfigError("these rows are for scoring alone")

    def split(self, name: str) -> Tensor:
        if name != "all":
            raise ConfigError(f"split={name}: rows of a file given to be scored are one set, split=all")
        return self.test


class RowsInMemory(ScoredRows):
    """Rows given as an array. The training rows of a flow, given so, are what the Gaussian baseline is fitted to."""

    def train_rows(self, most: int) -> Tensor:
        return self.test[:most]


class RowsToScore(ScoredRows):
    """The rows of a file as samples to score; there is nothing to train on.

    The columns are those that the flow was trained on. If the file names them, they are found by name, in any order,
    and other columns are ignored. Other files are read by the positions chosen in training. If a file lacks these
    positions but has as many columns as a sample has elements, all columns are read in their order. Images are rows of
    numbers, an array (n, C, H, W) or (n, H, W), or an IDX file.

    Args:
        path: a .npy, .npz or text file, see `read_table`, or an IDX file, plain or gzipped.
        samples: what the flow was trained on.
        key, columns, label, header, decimal: how the training file was read, see `ArrayData`.
        asked: those of these settings that the user gave for this file. They override what the file suggests.
        seed: the seed of the noise on columns that `data.dequantize` names.

    Raises:
        ConfigError: columns that the file does not have.
        DataError: values that are not the flow's kind of sample.
    """

    def __init__(
        self,
        path: str | Path,
        samples: Samples,
        key: str | None = None,
        columns: Columns | None = None,
        label: str | int | None = None,
        header: bool | None = None,
        decimal: str | None = None,
        asked: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        if not isinstance(path, str | Path):
            raise ConfigError(f"data.path={path}: give the path of a file")
        file = Path(path).expanduser()
        if _is_idx(file):
            table, label_column = _of_images(file, samples.event_shape), None
        else:
            key = key if "key" in asked else _key_of(file, key)
            text_format = TextFormat(header if "header" in asked else None, decimal, samples.columns)
            selection = _Selection(file, samples, columns, label, asked)
            table = read_table(file, key, selection.choose, event_shape=samples.event_shape, text_format=text_format)
            table, label_column = selection.divided(table)
        if label_column is not None:
            check_labels(label_column)
        super().__init__(table, None if label_column is None else as_labels(label_column.values), samples, seed)


class _Selection:
    """Chooses the columns of the samples and of the labels as in training; see `RowsToScore`."""

    def __init__(
        self,
        file: Path,
        samples: Samples,
        columns: Columns | None,
        label: str | int | None,
        asked: Collection[str],
    ) -> None:
        self.file, self.samples, self.columns, self.label, self.asked = file, samples, columns, label, asked
        self.width = math.prod(samples.event_shape)
        self.mark: int | None = None

    def choose(self, names: Sequence[str], left_out: Sequence[int]) -> list[int]:
        """Positions of the samples' columns, followed by that of the labels if there is one."""
        named = tuple(names) != default_names(range(len(names)))
        trained = self.samples.columns
        by_name = named and bool(trained) and "columns" not in self.asked
        if by_name and len(set(trained)) == len(trained) and all(names.count(name) < 2 for name in trained):
            indices = pick(trained, names, self.file, "the columns that the flow was trained on")
        else:
            indices = self._by_position(names, left_out)
            if by_name and tuple(names[i] for i in indices) != trained:
                raise DataError(
                    f"{self.file} has {listed([names[i] for i in indices])}, but the flow was trained on "
                    f"{listed(trained)}, and some names occur twice: choose the columns by position with data.columns"
                )
        self.mark = self._mark(names, indices, named)
        return indices if self.mark is None else [*indices, self.mark]

    def divided(self, table: Table) -> tuple[Table, Table | None]:
        """Splits the table into samples and labels (None if there are none)."""
        if self.mark is None:
            return table, None
        return table.only(range(self.width)), table.only([self.width])

    def _by_position(self, names: Sequence[str], left_out: Sequence[int]) -> list[int]:
        """Positions of the samples' columns as in training, or all columns in order."""
        every = [i for i in range(len(names)) if i not in left_out]
        if "columns" in self.asked:
            indices = self._less_label(pick(self.columns, names, self.file), names)
        else:
            try:
                indices = self._less_label(pick(self.columns, names, self.file, left_out=left_out), names)
            except ConfigError:
                if len(every) != self.width:
                    raise
                indices = every
            if len(indices) != self.width and len(every) == self.width:
                indices = every
            if indices != every and len(every) == self.width:
                _log.warning(
                    f"{self.file}: columns are read in the order {', '.join(map(str, indices))}, as data.columns chose "
                    f"them in training; {as_option(range(self.width))} reads them in the order of the file, as for "
                    "samples of flowsample"
                )
        if len(indices) != self.width:
            raise DataError(
                f"{self.file} has {counted(len(indices), 'column')}, but the flow was trained on samples of "
                f"{self.width}: choose the columns with data.columns"
            )
        return indices

    def _less_label(self, indices: list[int], names: Sequence[str]) -> list[int]:
        try:
            label_column = [] if self.label is None else pick([self.label], names, self.file, "data.label")
        except ConfigError:
            # a file without labels
            label_column = []
        return [i for i in indices if i not in label_column]

    def _mark(self, names: Sequence[str], indices: Sequence[int], named: bool) -> int | None:
        """The position of the column of labels; None if the file has none or the flow uses none."""
        if self.label is None or self.samples.classes is None:
            return None
        label: str | int = self.label
        if "label" not in self.asked:
            # the position refers to the training file: a file with names may have another order of columns
            label = self.samples.label if named and self.samples.label else label
            here = names.count(label) == 1 if isinstance(label, str) else len(names) > self.width
            if not here:
                return None
        (mark,) = pick([label], names, self.file, "data.label")
        if mark in indices:
            raise DataError(
                f"{self.file}: data.label={label} is column {names[mark]!r}, which is part of the samples: give the "
                "column of labels with data.label"
            )
        return mark


def _key_of(file: Path, key: str | None) -> str | None:
    """The key to read from an archive: the training file's, or None if its only array has another name."""
    if key is None or ending_of(file) != ".npz":
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        # reading it gives the error
        return key
    return None if key not in names and len(names) == 1 else key


def _is_idx(file: Path) -> bool:
    """By its name, as published: train-images-idx3-ubyte.gz."""
    known = ending_of(file).removesuffix(".gz") in ARRAYS + TEXTS
    return file.suffix == ".idx" or ("-idx" in file.name and not known)


def _of_images(file: Path, event_shape: tuple[int, ...]) -> Table:
    images = read_idx(file)
    if not is_images(images.shape, event_shape):
        raise DataError(f"{file} has shape {images.shape}, and the flow was trained on samples of shape {event_shape}")
    values = images.reshape(len(images), -1).astype(np.float64)
    indices = tuple(range(values.shape[1]))
    return Table(values, default_names(indices), indices, str(file))
