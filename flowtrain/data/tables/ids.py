"""The column of ids, `data.id`: it identifies the rows of a file and is not part of a sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.base import Ids
from flowtrain.data.tables.columns import pick
from flowtrain.data.tables.csv_reader import ChooseColumns, Chosen, TextFormat, read_text_column
from flowtrain.data.tables.table_reader import ARRAYS, ending_of, read_array
from flowtrain.data.tables.typed_files import TYPED, read_raw_column
from flowtrain.utils.errors import ConfigError, DataError


def read_ids(
    path: str | Path, key: str | None, column: str | int | ChooseColumns, text_format: TextFormat, n: int | None = None
) -> Ids:
    """Reads the column of ids of a file. The column may contain any values. Blanks around text are removed.

    Args:
        path: a file that `read_table` reads.
        key: the array of an .npz file or the sheet of an .xlsx file, see `read_table`.
        column: the name or the position of the column, or a function that returns its position, see `ChooseColumns`.
        text_format: the format with which the samples of the file were read.
        n: the number of rows when the samples were read; None if it is not known.

    Raises:
        ConfigError: a column that is not in the file, or several columns.
        DataError: a file that is missing or damaged, or that has another number of rows.
    """
    file = Path(path).expanduser()
    name = ""

    def choose(names: Sequence[str], left_out: Sequence[int]) -> Chosen:
        nonlocal name
        position = column(names, left_out).indices[0] if callable(column) else id_position(column, names, path)
        name = names[position]
        return Chosen([position], [position])

    ending = ending_of(file)
    if ending in ARRAYS:
        table = read_array(file, key, choose)
        values: NDArray[Any] = table.values[:, 0]
        for texts in table.labels.values():
            values = np.array([None if np.isnan(code) else texts[int(code)] for code in values], object)
    elif ending in TYPED:
        values = read_raw_column(file, key, choose, text_format.header)
    else:
        values = _as_whole(read_text_column(file, choose, text_format))
    if n is not None and len(values) != n:
        raise DataError(
            f"{file} has {len(values):,} rows, but had {n:,} when the samples were read. The file was changed in "
            "between: repeat the command"
        )
    return Ids(name, whole_ids(values))


def whole_ids(values: NDArray[Any]) -> NDArray[Any]:
    """Returns float ids as int64 if all of them are whole numbers, and other ids unchanged."""
    is_whole = values.dtype.kind == "f" and (np.abs(values) < 2**53).all() and (values == np.floor(values)).all()
    return values.astype(np.int64) if is_whole else values


def id_position(column: str | int, names: Sequence[str], path: object) -> int:
    """Returns the position of the column of ids.

    Raises:
        ConfigError: a column that is not in the file, or several columns.
    """
    found = pick([column], names, path, "data.id")
    if len(found) > 1:
        raise ConfigError(f"data.id={column} names {len(found)} columns of {path}: name one")
    return found[0]


def _as_whole(cells: Sequence[str]) -> NDArray[Any]:
    """Converts text to int64 if no cell would change (007 would), else to objects with None for an empty cell."""
    if all(cell.removeprefix("-").isdecimal() and cell.isascii() and len(cell) < 19 for cell in cells):
        numbers = np.array([int(cell) for cell in cells], np.int64)
        if all(str(number) == cell for number, cell in zip(numbers.tolist(), cells, strict=True)):
            return numbers
    found = np.empty(len(cells), object)
    found[:] = [cell or None for cell in cells]
    return found
