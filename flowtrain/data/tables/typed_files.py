"""Readers of Parquet, Feather (Arrow) and Excel files. They need polars and fastexcel, the extra `tables`.

The columns of these files have types. Numbers are read as they are, and booleans as 0 and 1. A column of text is read
as numbers if each cell is a number or a missing value by the rules for text files. Dates and nested values are refused.
"""

import importlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.tables.columns import TextColumn, advice_on_text, pick_table
from flowtrain.data.tables.csv_reader import (
    HEADER_ROWS,
    UNNAMED,
    ChooseColumns,
    codes_of_text,
    is_header,
    is_missing,
    number_of,
)
from flowtrain.utils.errors import ConfigError, DataError

# endings of typed files
TYPED = (".parquet", ".feather", ".arrow", ".xlsx")
# Number of rows of a sheet that are searched for the first row after the comments
_TOP = 1000

# a column of polars, which is not imported unless a file needs it
Series = Any


@dataclass(frozen=True)
class TypedColumns:
    """Columns read from a typed file.

    Attributes:
        values: (n, d), with NaN for missing values.
        names, indices: the names of the columns and their positions in the file.
        lines: the number of each row in the sheet of an .xlsx file, from 1. None for other files.
        cells: the text of the first missing value, by its row and column in `values`; "" for an empty cell. Empty if
            this value is NaN.
        labels: the distinct texts of each column that contains text, by its position, see `Table`.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...]
    indices: tuple[int, ...]
    lines: Sequence[int] | None
    cells: Mapping[tuple[int, int], str]
    labels: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class _Source:
    """A typed file.

    Attributes:
        names: the names of the columns.
        read: returns the columns at the given positions.
        lines: see `TypedColumns`.
    """

    names: tuple[str, ...]
    read: Callable[[Sequence[int]], list[Series]]
    lines: Sequence[int] | None = None

    def row(self, i: int) -> str:
        """Describes a row for messages."""
        return f"row {i} (from 0)" if self.lines is None else f"row {self.lines[i]}"


def read_typed(
    file: Path, key: str | None, choose: ChooseColumns, header: bool | None = None, na: Collection[str] = ()
) -> TypedColumns:
    """Reads the columns whose positions `choose` returns.

    Args:
        file: a file with an ending in TYPED.
        key: the sheet of an .xlsx file.
        choose: see `ChooseColumns`.
        header: whether the first row of an .xlsx file names the columns. None means detected.
        na: text that counts as missing, stripped and in lower case.

    Raises:
        ConfigError: polars or fastexcel is not installed, or a sheet that the file does not have.
        DataError: a damaged or empty file, or columns that are not numbers.
    """
    with _readable(file):
        source = _opened(file, key, header)
        unnamed = [i for i, name in enumerate(source.names) if UNNAMED.fullmatch(name)]
        left_out = [
            i for i, column in zip(unnamed, source.read(unnamed), strict=True) if _is_row_index(column, i, source)
        ]
        indices, may_be_text, needed = choose(source.names, left_out)
        columns = source.read(indices)
    n = len(columns[0])
    if not n:
        raise DataError(f"{file} has no rows")
    values, found, labels = np.empty((n, len(columns))), [], {}
    for k, (i, column) in enumerate(zip(indices, columns, strict=True)):
        numbers, text = _numbers(column, na, i, source)
        if text is None:
            values[:, k] = numbers
        elif text.kind == "text" and i in may_be_text:
            values[:, k], labels[i] = codes_of_text(_texts(column), na)
        else:
            found.append(text)
    if found:
        first = found[0]
        what = (
            f"{first.first!r} is not a number"
            if first.kind == "text"
            else f"this column contains {first.kind}, such as {first.first}"
        )
        raise DataError(
            f"{file}, {first.place}, column {first.name!r}: {what}. {advice_on_text(found, indices, needed)}"
        )
    cells = {}
    if np.isnan(values).any():
        row, k = (int(i) for i in np.argwhere(np.isnan(values))[0])
        cell = columns[k][row]
        cells = {} if isinstance(cell, float) else {(row, k): "" if cell is None else str(cell)}
    names = tuple(source.names[i] for i in indices)
    return TypedColumns(values, names, tuple(indices), source.lines, cells, labels)


def read_raw_column(file: Path, key: str | None, choose: ChooseColumns, header: bool | None = None) -> NDArray[Any]:
    """Reads the column whose position `choose` returns, (n,), whatever it contains; see `read_typed`.

    Numbers are int64 or float64. Other values, and whole numbers with missing values, become text (dtype object), with
    None for missing values.
    """
    with _readable(file):
        polars = import_for("polars", file)
        source = _opened(file, key, header)
        (column,) = source.read(choose(source.names, ()).indices)
        if column.dtype.is_float():
            return np.array(column.cast(polars.Float64).fill_null(float("nan")).to_numpy(), dtype=np.float64)
        if column.dtype.is_integer() and not column.null_count() and int(column.max() or 0) < 2**63:
            return np.array(column.to_numpy(), dtype=np.int64)
        found = np.empty(len(column), object)
        found[:] = column.cast(polars.String).to_list()
        return found


def _opened(file: Path, key: str | None, header: bool | None) -> _Source:
    return _sheet(file, key, header) if file.suffix.lower() == ".xlsx" else _frame(file)


def import_for(name: str, file: Path) -> Any:
    """Imports a package that reads or writes a file.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{file}: {file.suffix.lower()} files need {name}: run pip install 'flowtrain[tables]', or save the table "
            "as .csv"
        ) from error


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Converts all errors of polars and fastexcel while reading a file to DataError."""
    try:
        yield
    except (ConfigError, DataError, OSError, MemoryError, KeyboardInterrupt):
        raise
    # Both packages raise many types of errors for damaged files. Panics of their Rust code are not of type Exception
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = file.suffix.lower()
        words = str(error).partition("\n")[0]
        raise DataError(f"{file} is damaged or is not {kind} ({words}); write or copy it again") from error


# Parquet and Feather


def _frame(file: Path) -> _Source:
    polars = import_for("polars", file)
    if not file.stat().st_size:
        raise DataError(f"{file} is empty")
    is_parquet = file.suffix.lower() == ".parquet"
    # polars gets an open file, because it treats a path with * or ? as a pattern of several files
    with file.open("rb") as stream:
        names = tuple((polars.read_parquet_schema if is_parquet else polars.read_ipc_schema)(stream))

    def read(indices: Sequence[int]) -> list[Series]:
        if not indices:
            return []
        wanted = [names[i] for i in indices]
        with file.open("rb") as stream:
            if is_parquet:
                frame = polars.read_parquet(stream, columns=wanted)
            else:
                frame = polars.read_ipc(stream, columns=wanted)
        return [frame.get_column(name) for name in wanted]

    if not names:
        raise DataError(f"{file} has no columns")
    return _Source(names, read)


# Excel


def sheets_of(file: Path) -> list[str]:
    """Returns the names of the sheets of an .xlsx file that are not empty.

    Raises:
        ConfigError: fastexcel is not installed.
        DataError: a damaged file.
    """
    with _readable(file):
        return _sheets(_book(file))


def _book(file: Path) -> Any:
    # fastexcel logs a warning for each empty column
    logging.getLogger("fastexcel").setLevel(logging.ERROR)
    import_for("polars", file)
    with file.open("rb"):
        pass
    return import_for("fastexcel", file).read_excel(str(file))


def _sheets(book: Any) -> list[str]:
    return [name for name in book.sheet_names if book.load_sheet(name, header_row=None, n_rows=1).width]


def _sheet(file: Path, key: str | None, header: bool | None) -> _Source:
    """Opens a sheet. Skips comments (#) and blank rows above the table, and blank rows below the table."""
    book = _book(file)
    sheet = pick_table(key, _sheets(book), file, "sheet")

    def load(skip: int, n: int | None = None, types: Any = None) -> list[Series]:
        loaded = book.load_sheet(sheet, header_row=None, skip_rows=skip, n_rows=n, dtypes=types).to_polars()
        return list(loaded.get_columns())

    top = [[cell or "" for cell in row] for row in zip(*load(0, _TOP, "string"), strict=True)]
    start = next((i for i, row in enumerate(top) if "".join(row).strip() and not row[0].startswith("#")), None)
    if start is None:
        raise DataError(f"{file} has no rows below its comments")
    first, below = top[start], [row for row in islice(top, start + 1, start + 1 + HEADER_ROWS) if "".join(row).strip()]
    names = tuple(f"c{i}" for i in range(len(first)))
    if is_header(first, below) if header is None else header:
        names, start = tuple(cell.strip() or f"unnamed_{i}" for i, cell in enumerate(first)), start + 1
    columns = load(start) if start < len(top) else []
    filled = [np.flatnonzero(column.is_not_null().to_numpy()) for column in columns]
    n = max((int(rows[-1]) + 1 for rows in filled if len(rows)), default=0)
    if not n:
        raise DataError(f"{file} has no rows below its header")
    # fastexcel gives the numbers in a column of text as text with 9 digits, so these columns are also read as floats
    mixed = {i: "float" for i, column in enumerate(columns) if str(column.dtype) == "String"}
    floats = load(start, None, mixed) if mixed else columns

    def read(indices: Sequence[int]) -> list[Series]:
        return [_with_floats(columns[i][:n], floats[i][:n]) if i in mixed else columns[i][:n] for i in indices]

    return _Source(names, read, range(start + 1, start + 1 + n))


def _with_floats(texts: Series, floats: Series) -> Series:
    """Returns a column of text in which cells with numbers have all digits. Text that has all digits is unchanged."""

    def exact(text: str | None, number: float | None) -> str | None:
        if text is None or number is None or number_of(text, "point") in (None, number):
            return text
        return str(int(number)) if number.is_integer() else repr(number)

    cells = [exact(text, number) for text, number in zip(texts, floats, strict=True)]
    return type(texts)(texts.name, cells, dtype=texts.dtype)


# Columns


def _is_row_index(column: Series, index: int, source: _Source) -> bool:
    """Whether a column without a name is empty, or contains row numbers (distinct whole numbers) or row names."""
    column = column.drop_nulls()
    if not len(column):
        return True
    if column.dtype.is_numeric():
        return bool((column == column.floor()).all()) and column.n_unique() == len(column)
    return _numbers(column, (), index, source)[1] is not None


def _texts(column: Series) -> list[str | None]:
    return list(column.cast(importlib.import_module("polars").String).to_list())


def _numbers(
    column: Series, na: Collection[str], index: int, source: _Source
) -> tuple[NDArray[np.float64], TextColumn | None]:
    """Returns the numbers of a column, (n,), with NaN for missing values.

    If some cells are neither numbers nor missing values, the second value describes them, and there are no numbers.

    Args:
        index: the position of the column in `source`, for the description.
    """
    polars = importlib.import_module("polars")
    dtype, kind = column.dtype, str(column.dtype)
    if dtype.is_numeric() or kind in ("Boolean", "Null"):
        values = column.cast(polars.Float64).fill_null(float("nan"))
        return np.array(values.to_numpy(), dtype=np.float64), None
    n = len(column)
    if not kind.startswith(("String", "Categorical", "Enum")):
        words = "dates" if dtype.is_temporal() else f"values of type {kind}"
        rows = np.flatnonzero(column.is_not_null().to_numpy())
        if not len(rows):
            return np.full(n, np.nan), None
        first = int(rows[0])
        return np.empty(0), TextColumn(
            index, source.names[index], words, source.row(first), str(column[first]), len(rows)
        )
    cells = _texts(column)
    known: dict[str | None, float | None] = {None: float("nan")}
    for cell in {cell for cell in cells if cell is not None}:
        value = number_of(cell, "point")
        known[cell] = float("nan") if is_missing(cell, na) else value
    values = [known[cell] for cell in cells]
    bad = [(i, cell) for i, (cell, value) in enumerate(zip(cells, values, strict=True)) if value is None and cell]
    if not bad:
        return np.array(values, dtype=np.float64), None
    found = TextColumn(index, source.names[index], "text", source.row(bad[0][0]), bad[0][1])
    for _, cell in bad:
        found.add(cell)
    return np.empty(0), found
