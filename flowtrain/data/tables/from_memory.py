"""Tables from arrays, tensors and data frames in memory, and the .npz file that stores a table in a run directory."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.tables.column_types import with_codes
from flowtrain.data.tables.columns import default_names, listed
from flowtrain.data.tables.csv_reader import codes_of_text, is_missing
from flowtrain.data.tables.table_reader import COLUMNS, LABELS, VALUES, Table, refuse_text
from flowtrain.utils.arguments import shortened
from flowtrain.utils.errors import DataError, first_line
from flowtrain.utils.files import write_npz

# arrays (n, d) or (n, *event_shape), tensors, and data frames: anything with `columns` and `to_numpy`
Rows = Any


class Frame(Protocol):
    """A data frame, for example of pandas or polars."""

    @property
    def columns(self) -> Any:
        """The names of the columns."""

    def to_numpy(self) -> Any:
        """Returns the values, (n, d)."""


def is_frame(x: Any) -> bool:
    """Whether x is a data frame, for example of pandas or polars."""
    return hasattr(x, "columns") and hasattr(x, "to_numpy")


def column_names(frame: Any) -> tuple[str, ...]:
    """Returns the names of the columns of a data frame."""
    return tuple(map(str, frame.columns))


def columns_of(frame: Any, columns: Sequence[str], name: str = "x", na: Collection[str] | None = None) -> NDArray[Any]:
    """Returns the values of these columns of a data frame, (n, d), in this order. The other columns are not read.

    Args:
        name: the name of the frame in messages.
        na: see `as_array`.

    Raises:
        DataError: a column is missing, occurs twice, or has values that are not real numbers.
    """
    part = _part_of(frame, columns, name)
    names = column_names(part)
    if names == tuple(columns):
        return as_array(part, name)
    return as_array(np.asarray(part.to_numpy())[:, [names.index(column) for column in columns]], name)


def _part_of(frame: Any, columns: Sequence[str], name: str) -> Any:
    """Returns these columns of a data frame as a data frame, so that the values of the others are not read.

    A frame that cannot be indexed by a list of names is returned with all columns.

    Raises:
        DataError: a column is missing or occurs twice.
    """
    names, keys = column_names(frame), list(frame.columns)
    _check_names(names, columns, name)
    try:
        return frame[[keys[names.index(column)] for column in columns]]
    except (TypeError, LookupError):
        return frame


def _check_names(names: Sequence[str], columns: Sequence[str], name: str) -> None:
    """Raises DataError if a column is not one of the names of a data frame, or occurs twice."""
    for words, bad in (
        ("lacks the columns", [column for column in columns if column not in names]),
        ("has several columns named", [column for column in columns if names.count(column) > 1]),
    ):
        if bad:
            raise DataError(f"{name} {words} {listed(bad)}; it has {listed(names, most=50)}")


def rows_and_labels(
    x: Rows,
    label: Any,
    columns: Sequence[str],
    label_name: str | None,
    name: str = "x",
    categories: Mapping[int, Sequence[str | float]] = MappingProxyType({}),
) -> tuple[NDArray[Any], Any]:
    """Returns the rows of x as an array, and their labels.

    Args:
        x: an array, a tensor, lists of numbers, or a data frame.
        label: the labels, or the name of their column in a data frame. None means the column `label_name` if the frame
            has it.
        columns: the names of the columns that the flow was trained on, which are read from a data frame in this order.
            If it is empty or contains a name twice, all columns are read in their order.
        label_name: the column of labels that the flow was trained on. None if there is none.
        name: the name of x in messages.
        categories: the categories of each categorical column, by its position in a sample. In a data frame, and in a
            column with text, categories are given by name. In other rows, they are given by position.

    Raises:
        DataError: columns are missing, values are not real numbers, or categories are unknown.
    """
    if not is_frame(x):
        if isinstance(label, str):
            raise DataError(f"label={label!r}: {name} is not a data frame, so it has no column of that name")
        if categories and (found := _coded(x, name, categories)) is not None:
            return found, label
        return as_array(x, name), label
    if label is None and label_name in column_names(x):
        label = label_name
    if isinstance(label, str):
        label = columns_of(x, [label], name).reshape(-1)
    by_name = columns and len(set(columns)) == len(columns)
    if categories:
        table = table_with(x, columns, name) if by_name else table_of(x, name)
        for i, each in categories.items():
            table = with_codes(table, i, each)
        refuse_text(table, range(len(table.columns)), needed=dict.fromkeys(table.indices, ""))
        return table.values, label
    return columns_of(x, columns, name) if by_name else as_array(x, name), label


def _coded(x: Rows, name: str, categories: Mapping[int, Sequence[str | float]]) -> NDArray[np.float64] | None:
    """Returns rows (n, d) with codes in place of the text of categorical columns. None for rows without text."""
    if isinstance(x, Tensor) or (getattr(x, "dtype", None) is not None and x.dtype.kind in "biuf"):
        return None
    array = _object_array(x)
    if array is None or array.ndim != 2:
        return None
    table = table_of(array, name)
    for i in [i for i in categories if i in table.labels]:
        table = with_codes(table, i, categories[i])
    refuse_text(table, range(len(table.columns)), needed=dict.fromkeys(table.indices, ""))
    return table.values


def check_all_finite(rows: NDArray[Any], name: str = "x") -> None:
    """Refuses rows (n, ...) with values that are missing, NaN or infinite.

    Raises:
        DataError: there are such rows. The message gives their number and the first of them.
    """
    if not rows.size:
        return
    bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
    if len(bad):
        raise DataError(
            f"{name} has missing or infinite values in {len(bad)} of {len(rows)} rows, first in row {bad[0]} (from 0); "
            "remove these rows, or fill in values"
        )


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """Returns a copy of rows as a tensor: whole numbers as uint8 or int64, others as float32 or float64."""
    kind, size = rows.dtype.kind, rows.dtype.itemsize
    if kind == "f":
        return torch.from_numpy(np.array(rows, dtype=np.float32 if size <= 4 else np.float64, order="C"))
    if rows.dtype == np.uint64 and rows.size and rows.max() > np.iinfo(np.int64).max:
        raise DataError(f"{rows.max()} is too large for int64; give it as a float")
    return torch.from_numpy(np.array(rows, dtype=np.uint8 if kind in "bu" and size == 1 else np.int64, order="C"))


def whole_labels(label: Any) -> Tensor | None:
    """Converts a number, a list, an array or a column of a data frame to labels, int64, () or (n,).

    Returns None if the values are not whole numbers.

    Example:
        >>> whole_labels([2, 0.0]), whole_labels([0.5])
        (tensor([2, 0]), None)
    """
    try:
        values = as_array(label.to_numpy() if hasattr(label, "to_numpy") else label)
    except DataError:
        return None
    if values.dtype.kind == "b" or not (np.isfinite(values) & (values == np.floor(values))).all():
        return None
    return torch.from_numpy(values.astype(np.int64))


def as_array(x: Rows, name: str = "x", na: Collection[str] | None = None) -> NDArray[Any]:
    """Converts x to an array of real numbers. An array of numbers is not copied; text and objects are converted.

    Args:
        name: the name of x in messages.
        na: text that counts as missing besides words such as NA, stripped and in lower case. Missing values become NaN.
            None means that masked values, and objects and text that stand for missing values, are refused.

    Raises:
        DataError: values that are not real numbers.
    """
    names: tuple[str, ...] = ()
    if isinstance(x, Tensor):
        x = _array_of_tensor(x, name)
    elif is_frame(x):
        refuse_dates(date_columns(x), name)
        x, names = x.to_numpy(), column_names(x)
    if np.ma.is_masked(x):
        if na is None or x.dtype.kind not in "biuf":
            raise DataError(f"{name} has masked values; remove these rows, or fill in values")
        x = x.astype(np.float64).filled(np.nan)
    try:
        array = np.asarray(x)
    except ValueError as e:
        raise DataError(f"{name}: not an array ({e}); give rows of equal length") from e
    except (TypeError, RuntimeError, NotImplementedError) as e:
        # NumPy raises such an error for a list of tensors, for example
        raise DataError(f"{name}: not an array ({first_line(e)}); give a NumPy array, a tensor or a data frame") from e
    if array.dtype.kind in "biuf":
        return array
    if array.dtype.kind in "OUS" and array.size:
        try:
            return array.astype(np.float64)
        except (TypeError, ValueError):
            if na is not None and (numbers := _with_nan(array, na)) is not None:
                return numbers
            advice = _text_columns(array, names, na or (), name) if array.ndim == 2 else ""
            words = f"{name}: {_first_text(array)} is not a number; encode or remove such values"
            raise DataError(words + advice) from None
        except OverflowError:
            raise DataError(f"{name}: {_first_text(array)} is too large for a float; scale the column down") from None
    raise DataError(f"{name} has dtype {array.dtype}; give real numbers")


def _text_columns(array: NDArray[Any], names: Sequence[str], na: Collection[str], name: str) -> str:
    """Names the columns of a data frame with text, and the code that leaves them out; empty without names."""
    text = [column for column, cells in zip(names, array.T, strict=False) if _with_nan(cells, na) is None]
    keep = [column for column in names if column not in text]
    if not text:
        return ""
    return f". Text is in {listed(text)}" + (f"; {name}[{keep}] leaves it out" if keep else "")


def _with_nan(array: NDArray[Any], na: Collection[str]) -> NDArray[np.float64] | None:
    """Returns an array of objects or text as numbers, with NaN for missing values; None if there is other text."""
    cells = array.ravel().tolist()
    # pandas.NA has the type NAType
    absent = [c is None or type(c).__name__ == "NAType" or (isinstance(c, str) and is_missing(c, na)) for c in cells]
    try:
        numbers = [np.nan if lost else float(cell) for cell, lost in zip(cells, absent, strict=True)]
    except (TypeError, ValueError, OverflowError):
        return None
    return np.array(numbers).reshape(array.shape)


def _array_of_tensor(x: Tensor, name: str) -> NDArray[Any]:
    """Converts a tensor to an array. Floats narrower than float32 become float32, because NumPy lacks bfloat16."""
    kinds = {
        "nested": x.is_nested,
        "sparse": not x.is_nested and x.layout != torch.strided,
        "quantized": x.is_quantized,
        "meta": x.device.type == "meta",
    }
    wrong = [kind for kind, is_so in kinds.items() if is_so]
    if wrong:
        raise DataError(f"{name} is a {wrong[0]} tensor; give a dense tensor of real numbers with its values")
    x = x.detach().cpu()
    x = x.float() if x.is_floating_point() and x.dtype.itemsize <= 2 else x
    found: NDArray[Any] = x.resolve_conj().resolve_neg().numpy()
    return found


def date_columns(frame: Any) -> dict[str, str]:
    """Returns the dtypes of the columns of dates and durations, by the names of the columns."""
    dtypes = [str(dtype).lower() for dtype in getattr(frame, "dtypes", ())]
    pairs = zip(column_names(frame), dtypes, strict=False)
    return {column: dtype for column, dtype in pairs if dtype.startswith(("date", "time", "duration"))}


def refuse_dates(dates: Mapping[str, str], name: str) -> None:
    """Raises DataError for the first of `date_columns`, if there is one.

    Some data frames convert dates and durations to numbers of an unknown unit.
    """
    for column, dtype in dates.items():
        raise DataError(f"{name}: column {column!r} has dtype {dtype}; convert it to numbers or leave it out")


def _as_text(cells: NDArray[Any]) -> NDArray[Any]:
    """Returns the text of cells. Missing values are not changed."""
    return np.array([cell if _is_absent(cell) else str(cell) for cell in cells.tolist()], dtype=object)


def _is_absent(cell: Any) -> bool:
    """Whether a cell is None, NaN, NaT or pandas.NA."""
    # pandas.NA has the type NAType, and its comparisons have no truth value
    return cell is None or type(cell).__name__ == "NAType" or bool(cell != cell)


def _first_text(array: NDArray[Any]) -> str:
    """Describes the first value that is not a number, and its place."""
    for place in np.ndindex(array.shape):
        try:
            float(array[place])
        except (TypeError, ValueError, OverflowError):
            where = f" in row {', column '.join(map(str, place[:2]))}" if place else ""
            return f"{shortened(array[place])}{where}"
    return "a value"


def table_of(x: Rows, name: str = "x", na: Collection[str] = (), dates_as_text: bool = False) -> Table:
    """Converts rows in memory to a table.

    Args:
        x: (n, d), (n,) for one column, or (n, C, H, W) for images, whose elements become columns.
        name: the name of x in messages.
        na: text that counts as missing. Missing values become NaN; `read_table` refuses them or leaves out their rows.
        dates_as_text: whether the columns of dates of a data frame are read as text. False means that they are refused.

    The text of a column is stored in `Table.labels`. `read_table` refuses it unless the column is categorical.

    Raises:
        DataError: an array of another rank, without rows, or with values that are not real numbers.
    """
    names = column_names(x) if is_frame(x) else ()
    if is_frame(x) and not dates_as_text:
        refuse_dates(date_columns(x), name)
    array, labels = _with_codes(x, name, na)
    if array.ndim not in (1, 2, 4) or not array.size:
        raise DataError(f"{name} has shape {array.shape}; give rows (n, d), or images (n, C, H, W), with n > 0")
    values = np.ascontiguousarray(array.reshape(len(array), -1), dtype=np.float64)
    indices = tuple(range(values.shape[1]))
    return Table(values, names or default_names(indices), indices, name, labels=labels)


def table_with(
    frame: Any, columns: Sequence[str], name: str = "x", na: Collection[str] = (), dates_as_text: bool = False
) -> Table:
    """Converts these columns of a data frame to a table, see `table_of`. The other columns are not read.

    Raises:
        DataError: a column is missing or occurs twice, or values are not real numbers.
    """
    table = table_of(_part_of(frame, columns, name), name, na, dates_as_text)
    return table.only([table.columns.index(column) for column in columns])


def _with_codes(x: Rows, name: str, na: Collection[str]) -> tuple[NDArray[Any], dict[int, tuple[str, ...]]]:
    """Returns the values of rows, (n, d), and the distinct texts of their columns with text, by position.

    The values of a column with text are positions of texts.
    """
    array: NDArray[Any] | None
    dates: Collection[str] = ()
    if is_frame(x):
        array, names, dates = np.asarray(x.to_numpy()), column_names(x), date_columns(x)
        if array.dtype.kind in "mM":
            absent, array = np.isnat(array), array.astype(str).astype(object)
            array[absent] = None
    else:
        array = _object_array(x)
        names = () if array is None else default_names(range(array.shape[-1]))
    if array is None or array.dtype.kind not in "OUS" or array.ndim not in (1, 2) or not array.size:
        return as_array(x, name, na), {}
    array = array.reshape(len(array), -1)
    columns, labels = [], {}
    for i in range(array.shape[1]):
        texts = _texts_of(_as_text(array[:, i]) if names[i] in dates else array[:, i], na)
        if texts is None:
            columns.append(as_array(array[:, i], f"{name}, column {names[i]!r}", na).astype(np.float64))
        else:
            codes, labels[i] = codes_of_text(texts, na)
            columns.append(codes)
    return np.column_stack(columns), labels


def _object_array(x: Rows) -> NDArray[Any] | None:
    """Returns rows without column names as an array of objects or text; None for numbers and for other values."""
    if isinstance(x, Tensor) or np.ma.isMaskedArray(x):
        return None
    try:
        array = np.asarray(x)
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return None
    if array.dtype.kind == "U" and not isinstance(x, np.ndarray):
        # in a list of text and numbers, the numbers stay numbers
        array = np.asarray(x, dtype=object)
    return array if array.dtype.kind in "OUS" and array.ndim else None


def _texts_of(column: NDArray[Any], na: Collection[str]) -> list[str | None] | None:
    """Returns the cells of a column that contains text, with None for missing values; None for other columns."""
    cells = column.tolist()
    absent = [_is_absent(cell) for cell in cells]
    present = [cell for cell, lost in zip(cells, absent, strict=True) if not lost]
    if not any(isinstance(cell, str) for cell in present) or _with_nan(column, na) is not None:
        return None
    if not all(isinstance(cell, str | int | float | np.number) for cell in present):
        return None
    return [None if lost else str(cell) for cell, lost in zip(cells, absent, strict=True)]


def with_columns(
    table: Table, given: Any, name: str, columns: Sequence[str] | None = None, na: Collection[str] = ()
) -> Table:
    """Appends columns to a table.

    Args:
        given: an array (n, k) or (n,), or a data frame.
        name: the name of `given` in messages.
        columns: the k names. They are read from a data frame. None means all columns of a data frame.
        na: text that counts as missing.

    Raises:
        DataError: another number of rows or columns, a name that the table has already, or values that are not real
            numbers.
    """
    if is_frame(given):
        columns = column_names(given) if columns is None else columns
        other = table_with(given, columns, name, na)
    else:
        other = table_of(given, name, na)
    columns = tuple(columns or ())
    n, k = len(table.values), len(columns)
    if other.values.shape != (n, k):
        one = " or (n,)" if k == 1 else ""
        raise DataError(
            f"{name} has shape {other.values.shape}; give shape (n, {k}){one} with n = {n}, one row for each row of "
            f"{table.path}"
        )
    if twice := [column for column in columns if column in table.columns]:
        raise DataError(
            f"{name} and {table.path} both have a column {twice[0]!r}: rename one, or give the name of the column of "
            f"{table.path}"
        )
    added = range(len(table.indices), len(table.indices) + k)
    texts = {new: other.labels[old] for new, old in zip(added, other.indices, strict=True) if old in other.labels}
    return replace(
        table,
        values=np.column_stack([table.values, other.values]),
        columns=(*table.columns, *columns),
        indices=(*table.indices, *added),
        labels={**table.labels, **texts},
    )


def event_shape_of(x: Rows) -> list[int] | None:
    """Returns (C, H, W) of images (n, C, H, W); None for rows of vectors."""
    shape = x.shape if hasattr(x, "shape") else np.shape(x)
    return [int(side) for side in shape[1:]] if len(shape) == 4 else None


def write_table(path: Path, table: Table) -> None:
    """Writes a table with its column names atomically as an .npz file that `read_table` reads.

    Whole numbers are written as integers, which take less space.
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
    for index, texts in table.labels.items():
        arrays[f"{LABELS}{table.indices.index(index)}"] = np.array(texts)
    write_npz(path, arrays, durable=True)
