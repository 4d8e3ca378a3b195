"""The column of ids, `data.id`: it identifies the rows of a file and is not part of a sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.base import Ids
from flowtrain.data.tables.columns import pick
from flowtrain.data.tables.csv_reader import TextFormat, read_text_column
from flowtrain.data.tables.table_reader import ARRAYS, ending_of, read_array
from flowtrain.data.tables.typed_files import TYPED, read_raw_column
from flowtrain.utils.errors import ConfigError, DataError


def read_ids(
    path: str | Path,
    key: str | None,
    column: str | int,
    text_format: TextFormat,
    n: int | None = None,
    option: str = "data.id",
) -> Ids:
    """Reads the column of ids of a file, which may contain anything. Text is not changed, except for blanks around it.

    Args:
        path: a file that `read_table` reads.
        key: the array of an .npz file or the sheet of an .xlsx file, see `read_table`.
        column: the name or the position of the column.
        text_format: the format with which the samples of the file were read.
        n: the number of rows when the samples were read; None if it is not known.
        option: the name of the setting that `column` comes from, for messages.

    Raises:
        ConfigError: a column that is not in the file, or several columns.
        DataError: a file that is missing or damaged, or that has another number of rows.
    """
    file = Path(path).expanduser()
    name = ""

    def choose(names: Sequence[str], left_out: Sequence[int]) -> list[int]:
        nonlocal name
        position = id_position(column, names, path, option)
        name = names[position]
        return [position]

    ending = ending_of(file)
    if ending in ARRAYS:
        values: NDArray[Any] = read_array(file, key, choose).values[:, 0]
    elif ending in TYPED:
        values = read_raw_column(file, key, choose, text_format.header)
    else:
        values = _as_whole(read_text_column(file, choose, text_format))
    if n is not None and len(values) != n:
        raise DataError(f"{file} has {len(values):,} rows, but had {n:,} when the samples were read; run this again")
    return Ids(name, whole_ids(values))


def whole_ids(values: NDArray[Any]) -> NDArray[Any]:
    """Returns float ids as int64 if all of them are whole numbers, and other ids unchanged."""
    is_whole = values.dtype.kind == "f" and (np.abs(values) < 2**53).all() and (values == np.floor(values)).all()
    return values.astype(np.int64) if is_whole else values


def id_position(column: str | int, names: Sequence[str], path: object, option: str = "data.id") -> int:
    """Returns the position of the column of ids.

    Raises:
        ConfigError: a column that is not in the file, or several columns.
    """
    found = pick([column], names, path, option)
    if len(found) > 1:
        raise ConfigError(f"{option}={column} names {len(found)} columns of {path}: name one")
    return found[0]


def _as_whole(cells: Sequence[str]) -> NDArray[Any]:
    """Returns text as int64 if this changes no cell, as it would change 007, else as objects with None for empty."""
    if all(cell.removeprefix("-").isdecimal() and cell.isascii() and len(cell) < 19 for cell in cells):
        numbers = np.array([int(cell) for cell in cells], np.int64)
        if all(str(number) == cell for number, cell in zip(numbers.tolist(), cells, strict=True)):
            return numbers
    found = np.empty(len(cells), object)
    found[:] = [cell or None for cell in cells]
    return found
