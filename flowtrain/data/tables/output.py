"""Tables that commands write: samples and scores with named columns, as .csv or .parquet."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Samples
from flowtrain.data.context import CATEGORICAL, ContextColumn
from flowtrain.data.tables.columns import default_names
from flowtrain.data.tables.typed_files import import_for
from flowtrain.utils.files import replacing

PARQUET = ".parquet"
# endings of tables with named columns
NAMED = (".csv", PARQUET)
# the name of the column of class labels if the training file did not name it
LABEL = "label"
# number of rows that are converted to text at a time
CHUNK = 2**16


def named_columns(
    samples: Tensor, description: Samples, label: Tensor | None = None, context: Tensor | None = None
) -> dict[str, NDArray[Any]]:
    """Returns samples as columns with the names and the types of the training file, in the order of the file to write.

    Columns of whole numbers are int64, categories are given by name, and other columns have the dtype of the samples.
    The pixels of an image are columns c0, c1, ..., channel by channel and row by row. With the setting
    `data.event_shape`, `ArrayData` reads them as images.

    Args:
        samples: (n, *event_shape), in data units. Whole numbers are rounded, see `Flow.quantized`.
        description: the description of the samples that the flow was trained on.
        label: class labels (n,), which become the last column; None without labels.
        context: context values (n, k), which become the first columns; None without context.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.5, 2.0]], dtype=torch.float32)
        >>> found = named_columns(x, Samples((2,), columns=("x", "count"), noisy=(1,)))
        >>> {name: (column.dtype.name, column.tolist()) for name, column in found.items()}
        {'x': ('float32', [0.5]), 'count': ('int64', [2])}
    """
    values = samples.detach().cpu().flatten(1).numpy()
    whole = range(values.shape[1]) if description.integer_valued else description.noisy
    columns = [] if context is None else _context_columns(description.context, context.detach().cpu().numpy())
    columns += [column.astype(np.int64) if i in whole else column for i, column in enumerate(values.T)]
    first = len(columns) - values.shape[1]
    for i, one in enumerate(description.types):
        if one.kind == CATEGORICAL:
            columns[first + i] = np.array(one.categories)[columns[first + i]]
    if label is not None:
        columns.append(label.detach().cpu().numpy())
    return dict(zip(column_names(description, label is not None), columns, strict=True))


def column_names(description: Samples, with_label: bool) -> tuple[str, ...]:
    """Returns the names of the columns of a file of samples: the context, the samples and the label, in this order.

    If two columns have the same name, the position of the second is appended to its name.
    """
    names = [*(column.name for column in description.context), *sample_names(description)]
    names += [description.label or LABEL] if with_label else []
    return tuple(name if name not in names[:i] else f"{name}_{i}" for i, name in enumerate(names))


def sample_names(description: Samples) -> tuple[str, ...]:
    """Returns the names of the columns of the samples. Without names, they are c0, c1, ..., except for used names."""
    taken, width = {column.name for column in description.context}, math.prod(description.event_shape)
    free = [name for name in default_names(range(width + len(taken))) if name not in taken]
    return description.columns or tuple(free[:width])


def _context_columns(description: Sequence[ContextColumn], context: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Returns the columns of a context: numbers, or the names of categories."""
    return [
        np.array(column.categories)[values.astype(np.int64)] if column.kind == CATEGORICAL else values
        for column, values in zip(description, context.T, strict=True)
    ]


def check_can_write(path: Path) -> None:
    """Checks that the package for the format of a table is installed. Commands call this before any other work.

    Raises:
        ConfigError: polars, which writes .parquet, is not installed.
    """
    if path.suffix == PARQUET:
        import_for("polars", path)


def write_columns(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Writes columns (n,) to a .csv or .parquet file; see `replacing`.

    Numbers have all digits of their dtype. NaN, and None in a column of text, are missing values: empty cells of a .csv
    file, and null in a .parquet file.

    Raises:
        ConfigError: see `check_can_write`.
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        if path.suffix == PARQUET:
            _write_parquet(file, path, columns)
        else:
            _write_csv(file, columns)


def _write_parquet(file: IO[bytes], path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    polars = import_for("polars", path)
    series = []
    for name, column in columns.items():
        if column.dtype.kind == "f":
            series.append(polars.Series(name, column).fill_nan(None))
        elif column.dtype.kind == "O":
            series.append(polars.Series(name, column.tolist(), dtype=polars.String))
        else:
            series.append(polars.Series(name, column))
    polars.DataFrame(series).write_parquet(file)


def _write_csv(file: IO[bytes], columns: Mapping[str, NDArray[Any]]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    n = max(len(column) for column in columns.values())
    for start in range(0, n, CHUNK):
        part = (_cells(column[start : start + CHUNK]) for column in columns.values())
        writer.writerows(zip(*part, strict=True))
    text.flush()
    # otherwise the wrapper would close the file
    text.detach()


def _cells(column: NDArray[Any]) -> list[Any]:
    """Returns the cells of a column. The text of a float is the shortest that gives the same number in its dtype."""
    texts = column.astype(str) if column.dtype.kind == "f" else column
    return list(np.where(np.isnan(column), "", texts) if column.dtype.kind == "f" else texts)
