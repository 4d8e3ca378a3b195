"""New data for a flow that is there already: every row of a file, in its order."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from flowtrain.data.array_checks import check_labels
from flowtrain.data.base import Dataset, Samples
from flowtrain.data.columns import Columns, default_names, pick
from flowtrain.data.idx import read_idx
from flowtrain.data.kind import Kind, as_labels
from flowtrain.data.read import Table, is_images, read_table
from flowtrain.errors import ConfigError, DataError


class Rows(Dataset):
    """The rows of a file as samples to score; there is nothing to train on.

    A file whose columns have the names of the training file's is read by them, in whatever order it has them, and may
    have others beside. Otherwise it has as many columns as a sample has elements, or is read as the training file was.
    Images are rows of numbers, an array (n, C, H, W) or (n, H, W), or an IDX file.

    Args:
        path: .npy .npz .csv .txt .data .tra .tes, or an IDX file, plain or gzipped.
        samples: what the flow was trained on.
        key, columns, label: how the training file was read, see `flowtrain.data.array.ArrayData`.
        asked: whether `columns` were asked for, and are to be taken whatever the file has.

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
        asked: bool = False,
    ) -> None:
        self.event_shape = samples.event_shape
        self.discrete, self.levels, self.alpha = samples.discrete, samples.levels, samples.alpha
        self.classes, self.columns = samples.classes, samples.columns
        table, marks = _read(path, samples, key, columns, label, asked)
        kind = Kind(self.event_shape, self.discrete, self.levels)
        kind.check(table)
        # in float64, which a flow may be evaluated in
        self.val = self.test = kind.samples(table.values, real=np.float64)
        if marks is not None:
            check_labels(marks)
            self.val_labels = self.test_labels = as_labels(marks.values)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        raise ConfigError("these rows are for scoring alone")

    def split(self, name: str) -> Tensor:
        if name != "all":
            raise ConfigError(f"split={name}: rows of a file given to be scored are one set, split=all")
        return self.test


def _read(
    path: str | Path, samples: Samples, key: str | None, columns: Columns | None, label: str | int | None, asked: bool
) -> tuple[Table, Table | None]:
    """The table, and the column of labels where there is one."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"data.path={path}: give the path of a file")
    file = Path(path).expanduser()
    if _is_idx(file):
        return _of_images(file, samples.event_shape), None
    width = math.prod(samples.event_shape)
    found: list[str] = []

    def choose(names: Sequence[str]) -> list[int]:
        found[:] = names
        named = tuple(names) != default_names(range(len(names)))
        if named and samples.columns and not asked:
            return pick(samples.columns, names, file, "the columns that the flow was trained on")
        if len(names) == width and not asked:
            return list(range(width))
        indices = pick(columns, names, file)
        if label is not None:
            indices = [i for i in indices if i not in pick([label], names, file, "data.label")]
        if len(indices) != width:
            raise DataError(f"{file} has {len(indices)} columns, and the flow was trained on samples of {width}")
        return indices

    table = read_table(file, key, choose, event_shape=samples.event_shape)
    # by name, or by its place in a file that has more than the samples
    labelled = label in found if isinstance(label, str) else len(found) > width
    if label is None or samples.classes is None or not labelled:
        return table, None
    return table, read_table(file, key, [label], "data.label")


def _is_idx(file: Path) -> bool:
    """By its name, as published: train-images-idx3-ubyte.gz."""
    return "-idx" in file.name or file.suffix == ".idx"


def _of_images(file: Path, event_shape: tuple[int, ...]) -> Table:
    images = read_idx(file)
    if not is_images(images.shape, event_shape):
        raise DataError(f"{file} has shape {images.shape}, and the flow was trained on samples of shape {event_shape}")
    values = images.reshape(len(images), -1).astype(np.float64)
    indices = tuple(range(values.shape[1]))
    return Table(values, default_names(indices), indices, str(file))
