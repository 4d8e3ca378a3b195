"""Tables from arrays, tensors and data frames in memory, and the .npz file that keeps one in a run directory."""

from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.tables.columns import default_names
from flowtrain.data.tables.table_reader import COLUMNS, VALUES, Table
from flowtrain.utils.errors import DataError
from flowtrain.utils.files import replacing

# arrays (n, d) or (n, *event_shape), tensors, and data frames: anything with `columns` and `to_numpy`
Rows = Any


def is_frame(x: Any) -> bool:
    """Whether x is a data frame, such as one of pandas or polars."""
    return hasattr(x, "columns") and hasattr(x, "to_numpy")


def column_names(frame: Any) -> tuple[str, ...]:
    """The names of the columns of a data frame."""
    return tuple(map(str, frame.columns))


def as_array(x: Rows, name: str = "x") -> NDArray[Any]:
    """x as an array of real numbers, not a copy where it is one; a table of text or objects is converted.

    Args:
        name: the name of x in messages.

    Raises:
        DataError: values that are not real numbers.
    """
    if isinstance(x, Tensor):
        x = (
            x.detach().cpu().resolve_conj().numpy()
            if x.dtype.itemsize > 2 or not x.is_floating_point()
            else (x.detach().cpu().float().numpy())
        )
    elif is_frame(x):
        x = x.to_numpy()
    try:
        array = np.asarray(x)
    except ValueError as e:
        raise DataError(f"{name}: not an array ({e}); give rows of equal length") from e
    if array.dtype.kind in "biuf":
        return array
    if array.dtype.kind in "OUS" and array.size:
        try:
            return array.astype(np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{name}: {_first_text(array)} is not a number; encode or remove such values") from None
    raise DataError(f"{name} has dtype {array.dtype}; give real numbers")


def _first_text(array: NDArray[Any]) -> str:
    """The first value that is not a number, and its place."""
    for place in np.ndindex(array.shape):
        try:
            float(array[place])
        except (TypeError, ValueError):
            return f"{array[place]!r} in row {', column '.join(map(str, place[:2]))}"
    return "a value"


def table_of(x: Rows, name: str = "x", label: Any = None, label_name: str = "label") -> Table:
    """The table of rows in memory, with the columns of the samples first and that of the labels, if any, last.

    Args:
        x: (n, d), (n,) for one column, or (n, C, H, W) for images, whose elements become columns.
        name: the name of x in messages.
        label: (n,), or None.

    Raises:
        DataError: an array of another rank, without rows, or with values that are not real numbers; labels of another
            length.
    """
    names = column_names(x) if is_frame(x) else ()
    array = as_array(x, name)
    if array.ndim == 0 or array.ndim in (3,) or array.ndim > 4 or not array.size:
        raise DataError(f"{name} has shape {array.shape}; give rows (n, d), or images (n, C, H, W), with n > 0")
    values = np.ascontiguousarray(array.reshape(len(array), -1), dtype=np.float64)
    if label is not None:
        labels = as_array(label, f"the label of {name}")
        if labels.shape not in ((len(values),), (len(values), 1)):
            raise DataError(f"label has shape {labels.shape}; give one for each of the {len(values)} rows of {name}")
        values = np.column_stack([values, labels.reshape(-1, 1).astype(np.float64)])
        if names:
            names = (*names, label_name)
    indices = tuple(range(values.shape[1]))
    return Table(values, names or default_names(indices), indices, name)


def event_shape_of(x: Rows) -> list[int] | None:
    """(C, H, W) of images (n, C, H, W); None for rows of vectors."""
    shape = x.shape if hasattr(x, "shape") else np.shape(x)
    return [int(side) for side in shape[1:]] if len(shape) == 4 else None


def write_table(path: Path, table: Table) -> None:
    """Writes a table with its column names as an .npz file that `read_table` reads; all of it or nothing.

    Whole numbers are written as integers, which take less room.
    """
    values = table.values
    for narrow in (np.uint8, np.int64):
        bound = np.iinfo(narrow)
        if (
            values.size
            and values.min() >= bound.min
            and values.max() < bound.max
            and (values == values.astype(narrow)).all()
        ):
            values = values.astype(narrow)
            break
    arrays: dict[str, NDArray[Any]] = {VALUES: values}
    if table.named:
        arrays[COLUMNS] = np.array(table.columns)
    with replacing(path, durable=True) as f:
        np.savez(f, **cast(Any, arrays))
