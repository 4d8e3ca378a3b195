"""Reads the file of contexts of `flowsample context=FILE`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flowtrain.data.context import CATEGORICAL, ContextColumn, context_values
from flowtrain.data.tables.columns import default_names, listed
from flowtrain.data.tables.csv_reader import ChooseColumns, Chosen, TextFormat
from flowtrain.data.tables.ids import read_ids
from flowtrain.data.tables.table_reader import read_table
from flowtrain.utils.errors import DataError
from flowtrain.utils.formatting import counted


def read_context(path: str | Path, columns: Sequence[ContextColumn]) -> Tensor:
    """Reads the context columns of a file, (n, k), float64.

    The columns are found by name, in any order, and other columns are ignored. A file without column names must have
    exactly the k columns of the context, in their order. The categories of a categorical column are given by name.

    Args:
        path: a file that `read_table` reads.
        columns: the description of the k columns.

    Raises:
        DataError: missing columns, values that are missing or are not finite numbers, or unknown categories.
    """
    names = [column.name for column in columns]
    text_format = TextFormat(known=tuple(names))
    numbers = [column.name for column in columns if column.kind != CATEGORICAL]
    found: dict[str, Any] = {}
    if numbers:
        table = read_table(path, None, _chooser(path, names, numbers), text_format=text_format)
        found = dict(zip(numbers, table.values.T, strict=True))
    for column in columns:
        if column.kind == CATEGORICAL:
            found[column.name] = read_ids(path, None, _chooser(path, names, [column.name]), text_format).values
    try:
        return context_values(columns, found, len(found[names[0]]))
    except DataError as e:
        raise DataError(f"{path}: {e}") from e


def _chooser(path: str | Path, names: Sequence[str], wanted: Sequence[str]) -> ChooseColumns:
    """Returns a function that finds the columns `wanted`, a part of the columns `names` of the context."""

    def choose(there: Sequence[str], left_out: Sequence[int]) -> Chosen:
        missing = [name for name in wanted if name not in there]
        if tuple(there) == default_names(range(len(there))) and missing:
            if len(there) != len(names):
                raise DataError(
                    f"{path} has {counted(len(there), 'column')} without names: give a file with the columns of the "
                    f"context by name, or exactly the columns {', '.join(names)}"
                )
            return Chosen([names.index(name) for name in wanted])
        twice = [name for name in wanted if there.count(name) > 1]
        if missing or twice:
            what = "has no column" if missing else "has several columns named"
            raise DataError(
                f"{path} {what} {listed(missing or twice)}; the columns of the context are {', '.join(names)}, and the "
                f"file has {listed(there, most=50)}"
            )
        return Chosen([list(there).index(name) for name in wanted])

    return choose
