"""Text tables: read by NumPy's C parser, or cell by cell where that fails, to name the culprit.

The slow pass defines the grammar; the fast one is tried only on files where both must agree.
"""

import csv
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.columns import default_names, listed
from flowtrain.errors import DataError

_log = logging.getLogger("flowtrain")

_MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "?", "-"})


@dataclass(frozen=True)
class Layout:
    """How a text file is laid out; `delimiter` None is any run of white space, `first_line` counts from 1."""

    delimiter: str | None
    names: tuple[str, ...]
    named: bool
    first_line: int


@dataclass(frozen=True)
class Text:
    """Values (n, d), the names and positions of their columns, and the line, from 1, of every row."""

    values: NDArray[np.float64]
    names: tuple[str, ...]
    indices: tuple[int, ...]
    lines: Sequence[int]


def read_delimited(path: Path, choose: Callable[[Sequence[str]], list[int]]) -> Text:
    """The columns that `choose(names)` picks, by their positions.

    Columns that are not picked may hold anything, but every row must have every cell.

    Raises:
        DataError: an empty file, a ragged row, a cell that is empty or not a number, text that is not UTF-8.
    """
    with _readable(path):
        layout = find_layout(path)
        indices = choose(layout.names)
        _warn_of_odd_header(path, layout, indices)
        rows = _plain_rows(path, layout)
        values = None if rows is None else _fast(path, layout, indices, rows)
        lines: Sequence[int] = range(layout.first_line, layout.first_line + (rows or 0))
        if values is None:
            values, lines = _exact(path, layout, indices)
    if not lines:
        raise DataError(f"{path} has no rows" + (" below its header" if layout.named else ""))
    return Text(values, tuple(layout.names[i] for i in indices), tuple(indices), lines)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {_undecodable(path)} is not UTF-8 text; save the file as UTF-8") from error


def _undecodable(path: Path) -> int:
    """The first line, from 1, that is not UTF-8: the decoder knows only its place in a block of the file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def find_layout(path: Path) -> Layout:
    """Delimiter, names and first line of data, from the first two lines.

    Raises:
        DataError: an empty file or an empty first line.
    """
    with path.open(encoding="utf-8-sig") as file:
        lines = [line for line in (file.readline(), file.readline()) if line.strip()]
        if not lines:
            raise DataError(f"{path} is empty" if not file.read().strip() else f"{path}, line 1 is empty")
    delimiter = _sniff(lines)
    rows = _rows(path, delimiter)
    (_, first), (start, second) = next(rows), next(rows, (0, None))
    if not first:
        raise DataError(f"{path}, line 1 is empty")
    if not _is_header(first, second):
        return Layout(delimiter, default_names(range(len(first))), named=False, first_line=1)
    # numpy.savetxt marks its header as a comment, and with white space between, the mark is a cell
    cells = first[1:] if first[0] == "#" and delimiter is None else [first[0].removeprefix("# "), *first[1:]]
    names = tuple(cell.strip() or f"unnamed_{i}" for i, cell in enumerate(cells))
    # An embedded line break makes a header longer than one line, so ask where the second row begins
    return Layout(delimiter, names, named=True, first_line=start or 2)


def _sniff(lines: Sequence[str]) -> str | None:
    """The delimiter that occurs equally often in the lines, else one that occurs at all, else white space.

    Semicolons and tabs come before commas, which may be decimal commas beside them.
    """
    bare = [re.sub(r'"[^"]*"', "", line.strip("\r\n")) for line in lines]
    for delimiter in ";\t,":
        counts = {line.count(delimiter) for line in bare}
        if len(counts) == 1 and counts != {0}:
            return delimiter
    for delimiter in ",;\t":
        if any(delimiter in line for line in bare):
            return delimiter
    # Only the last line counts: a single column may well be called "my name"
    return None if len(bare[-1].split()) > 1 else ","


def _is_header(first: Sequence[str], second: Sequence[str] | None) -> bool:
    text = [i for i, cell in enumerate(first) if _is_text(cell)]
    if not text or second is None or not any(_is_number(cell) for cell in first):
        return bool(text)
    # A file without a header may hold labels: text in the same column of every row
    return any(i >= len(second) or not _is_text(second[i]) for i in text)


def _warn_of_odd_header(path: Path, layout: Layout, indices: Sequence[int]) -> None:
    numbers = [name for name in layout.names if _is_number(name)]
    if layout.named and numbers:
        _log.warning(f"{path}: line 1 is taken for the header, though it holds numbers: {listed(numbers)}")
    if layout.names[0] == "unnamed_0" and 0 in indices:
        _log.warning(
            f"{path}: the first column has no name; if it is a row index, as pandas writes, "
            "leave it out with 'data.columns=[1:]'"
        )
    if not layout.named and len(layout.names) > 2:
        row = next(_rows(path, layout.delimiter))[1]
        if row == [str(i) for i in range(len(row))]:
            _log.warning(
                f"{path}: line 1 is 0, 1, 2, ... and is read as data; if it is the header "
                "that pandas writes for columns without names, remove it"
            )


def _is_number(cell: str) -> bool:
    # float() takes 1_000, which NumPy's parser and every other CSV reader refuse
    if "_" in cell or "\n" in cell or not cell.isascii():
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_text(cell: str) -> bool:
    return not _is_number(cell) and cell.strip().lower() not in _MISSING


def _rows(path: Path, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """Every row with the line, counted from 1, on which it begins; a blank line is an empty row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = file if delimiter else (" ".join(line.split()) for line in file)
        reader = csv.reader(lines, delimiter=delimiter or " ")
        line = 1
        try:
            for row in reader:
                yield line, row if any(cell.strip() for cell in row) or len(row) > 1 else []
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: {error}") from error


def _plain_rows(path: Path, layout: Layout) -> int | None:
    """How many rows of data there are, or None unless all have the header's width, with blank lines only last.

    NumPy skips blank lines and, when columns are chosen, does not look at the width of a row.
    """
    rows, ended, width = 0, False, len(layout.names)
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if number < layout.first_line:
                continue
            if not line.strip():
                ended = True
            elif ended or _width(line, layout.delimiter) != width:
                return None
            else:
                rows += 1
    return rows


def _width(line: str, delimiter: str | None) -> int:
    return line.count(delimiter) + 1 if delimiter else len(line.split())


def _fast(path: Path, layout: Layout, indices: list[int], rows: int) -> NDArray[np.float64] | None:
    """The table by NumPy's C parser, or None where it stumbles."""
    if not rows:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return np.loadtxt(
                str(path.absolute()),
                delimiter=layout.delimiter,
                skiprows=layout.first_line - 1,
                usecols=indices,
                max_rows=rows,
                ndmin=2,
                comments=None,
                quotechar='"',
                encoding="utf-8-sig",
            )
        except (ValueError, UserWarning):
            return None


def _exact(path: Path, layout: Layout, indices: Sequence[int]) -> tuple[NDArray[np.float64], list[int]]:
    """The table cell by cell, and the line of every row."""
    table: list[list[float]] = []
    lines: list[int] = []
    blank = 0
    for line, row in _rows(path, layout.delimiter):
        if line < layout.first_line:
            continue
        if not row:
            blank = blank or line
            continue
        if blank:
            raise DataError(f"{path}, line {blank} is empty, and rows follow it; take it out")
        if len(row) != len(layout.names):
            raise DataError(f"{path}, line {line} {_ragged(len(row), layout)}")
        table.append([_cell(path, line, layout.names[i], row[i]) for i in indices])
        lines.append(line)
    return np.array(table, dtype=np.float64).reshape(len(table), len(indices)), lines


def _ragged(cells: int, layout: Layout) -> str:
    width = len(layout.names)
    where = (
        f"it ends before column {layout.names[cells]!r}"
        if cells < width
        else f"it goes on after column {layout.names[-1]!r}"
    )
    return f"has {cells} cell{'s' * (cells != 1)} where line 1 has {width}: {where}"


def _cell(path: Path, line: int, name: str, cell: str) -> float:
    if _is_number(cell):
        return float(cell)
    where = f"{path}, line {line}, column {name!r}"
    if not cell.strip():
        raise DataError(f"{where}: the cell is empty; fill it in or leave the row out")
    if not _is_text(cell):
        raise DataError(f"{where}: {cell!r} is a missing value; fill it in or leave the row out")
    hint = "; write decimals with a point" if re.fullmatch(r"\s*[+-]?\d*,\d+\s*", cell) else ""
    raise DataError(f"{where}: {cell!r} is not a number{hint}")
