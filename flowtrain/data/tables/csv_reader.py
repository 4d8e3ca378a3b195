"""Reader of text tables. Delimiter, header, comments and decimal mark are detected.

NumPy's parser reads plain files. If it fails, a slow parser reads the file cell by cell and names the invalid cell in
its error message. The slow parser defines the accepted grammar. NumPy's parser is used only for files that both parsers
read in the same way.
"""

import csv
import gzip
import io
import logging
import re
import warnings
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.tables.columns import TextColumn, advice_on_text, as_option, default_names, listed
from flowtrain.utils.errors import DataError

_log = logging.getLogger("flowtrain")

_MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "?", "-"})
_BOOLEANS = {"true": 1.0, "false": 0.0}
_GZIP = b"\x1f\x8b"
# Number of rows below the first row that are used to detect a header
HEADER_ROWS = 100
_COMMENT_HINT = "; comments are allowed only at the top of a file: remove the line"
UNNAMED = re.compile(r"unnamed_\d+|Unnamed: \d+|__index_level_\d+__|")
_WHOLE = re.compile(r"\s*[+-]?\d+\s*")
_EXPONENT = r"(?:[eE][+-]?\d+)?"
# Numbers with a decimal point and commas between thousands
_GROUPED = re.compile(rf"\s*[+-]?\d{{1,3}}(?:,\d{{3}})+(?:\.\d*)?{_EXPONENT}\s*")
# Numbers with a decimal comma, optionally with points between thousands
_COMMA = re.compile(rf"\s*[+-]?(?:\d+|\d{{1,3}}(?:\.\d{{3}})+)(?:,\d+)?{_EXPONENT}\s*")


class Chosen(NamedTuple):
    """The columns of a file to read.

    Attributes:
        indices: the positions of the columns in the file.
        text: the positions of the columns among these that may contain text.
        needed: the columns among these that `data.columns` cannot leave out: the setting that names the column, by its
            position. The setting is empty for a column that a trained flow needs.
    """

    indices: list[int]
    text: Collection[int] = ()
    needed: Mapping[int, str] = MappingProxyType({})


# A function that returns the columns to keep. Its arguments are the names of all columns, and the positions of the
# columns that contain row numbers or row names
ChooseColumns = Callable[[Sequence[str], Sequence[int]], Chosen]


@dataclass(frozen=True)
class TextFormat:
    """The settings of the format of a text file. The rest is detected.

    Attributes:
        header: whether the first line after the comments names the columns. None means detected.
        decimal: the decimal mark, point or comma. None means detected.
        known: expected column names. A first line that contains all these names is a header, even if the names are
            numbers.
        na: the contents of cells that count as missing besides the usual words, stripped and in lower case.
        drops: whether rows with missing values are left out. If so, no message needs the contents of their cells.
    """

    header: bool | None = None
    decimal: str | None = None
    known: tuple[str, ...] = ()
    na: frozenset[str] = frozenset()
    drops: bool = False


DETECTED = TextFormat()


@dataclass(frozen=True)
class Layout:
    """The detected layout of a text file.

    Attributes:
        delimiter: the delimiter of cells. None means any run of white space.
        names: the names of the columns.
        named: whether the names come from the file.
        first_line: the line number of the first row of data, from 1.
    """

    delimiter: str | None
    names: tuple[str, ...]
    named: bool
    first_line: int


@dataclass(frozen=True)
class TextTable:
    """A table read from a text file.

    Attributes:
        values: (n, d), with NaN for missing values.
        names, indices: the names of the columns and their positions in the file.
        lines: the line number of each row, from 1.
        cells: the text of the first cell with a missing value, by its row and column in `values`; empty if unknown.
        labels: the distinct texts of each column that contains text, by the position of the column in the file. The
            values of such a column are positions in this tuple.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...]
    indices: tuple[int, ...]
    lines: Sequence[int]
    cells: Mapping[tuple[int, int], str]
    labels: Mapping[int, tuple[str, ...]]


class _File:
    """A text file, which may be gzipped.

    The first bytes show whether the file is gzipped. The name does not, because a browser may unpack a .gz file and
    keep the name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.gzipped = file.read(2) == _GZIP

    def open_bytes(self) -> IO[bytes]:
        return cast(IO[bytes], gzip.open(self.path)) if self.gzipped else self.path.open("rb")

    def open_text(self, newline: str | None = None) -> TextIO:
        return io.TextIOWrapper(self.open_bytes(), encoding="utf-8-sig", newline=newline)


def read_delimited(path: Path, choose: ChooseColumns, text_format: TextFormat) -> TextTable:
    """Reads a text table. Only the columns whose positions `choose` returns are kept.

    The other columns may contain anything, but all rows must have the same number of cells.

    Raises:
        DataError: an empty or damaged file, a row with too few or too many cells, a cell that is not a number, or text
            that is not UTF-8.
    """
    file = _File(path)
    with _reading_errors(file):
        layout = find_layout(file, text_format)
        left_out = [i for i, name in enumerate(layout.names) if _is_row_index(file, layout, i)]
        indices, text, needed = choose(layout.names, left_out)
        _warn_of_unnamed(path, layout, indices, left_out)
        rows = _plain_rows(file, layout)
        values = None if rows is None else _read_with_numpy(file, layout, indices, rows, text_format)
        if values is None and rows is not None and text_format.drops:
            values = _read_with_numpy(file, layout, indices, rows, text_format, with_nan=True)
        lines: Sequence[int] = range(layout.first_line, layout.first_line + (rows or 0))
        cells: dict[tuple[int, int], str] = {}
        labels: dict[int, tuple[str, ...]] = {}
        if values is None:
            values, lines, cells, labels = _read_by_cell(file, layout, indices, text_format, text, needed)
    if not lines:
        raise DataError(f"{path} has no rows" + (" below its header" if layout.named else ""))
    return TextTable(values, tuple(layout.names[i] for i in indices), tuple(indices), lines, cells, labels)


def read_text_column(path: Path, choose: ChooseColumns, text_format: TextFormat) -> list[str]:
    """Returns the cells of the column whose position `choose` returns, without blanks around them.

    The rows are the rows that `read_delimited` reads with the same format.

    Raises:
        DataError: see `read_delimited`.
    """
    file = _File(path)
    with _reading_errors(file):
        # the reader of the samples has already warned
        layout = find_layout(file, text_format, warns=False)
        (column,) = choose(layout.names, ()).indices
        rows = ((line, row) for line, row in _rows(file, layout.delimiter, layout.first_line) if row)
        cells = []
        for line, row in rows:
            if len(row) != len(layout.names):
                raise DataError(f"{file.path}, line {line} {_width_error(row, layout)}")
            cells.append(row[column].strip())
        return cells


@contextmanager
def _reading_errors(file: _File) -> Iterator[None]:
    """Raises DataError if the text is not UTF-8 or if a gzip file is damaged."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path}, line {_first_bad_line(file)} is not UTF-8 text; save the file as UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.path} is a damaged gzip file ({error}); download or copy it again") from error


def _first_bad_line(file: _File) -> int:
    """Returns the number of the first line that is not UTF-8. The decoder's error gives only a position in a block."""
    with file.open_bytes() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


# The layout


def find_layout(file: _File, text_format: TextFormat, warns: bool = True) -> Layout:
    """Detects the delimiter, the column names and the first line of data.

    Args:
        warns: whether a doubtful header gives a warning.

    Raises:
        DataError: an empty file or an empty first line.
    """
    path = file.path
    comments, top, lines = _top(file)
    if not lines:
        raise DataError(f"{path} has no rows below its comments" if comments else f"{path} is empty")
    if not lines[0].strip():
        raise DataError(f"{path}, line {top} is empty")
    delimiter = _detect_delimiter([line for line in lines if line.strip()], text_format.decimal)
    found = list(islice(_rows(file, delimiter, top), HEADER_ROWS + 1))
    first, below = found[0][1], found[1:]
    rows = [row for _, row in below if row]
    start = below[0][0] if below else top + 1
    header = text_format.header
    if header is None and text_format.known and set(text_format.known) <= {cell.strip() for cell in first}:
        header = True
    if header is None:
        header = is_header(first, rows)
        if warns:
            _warn_of_odd_header(path, top, first, rows, header)
    if header:
        names = tuple(cell.strip() or f"unnamed_{i}" for i, cell in enumerate(first))
        # a header may contain line breaks, so the data begin where the second row begins
        return Layout(delimiter, names, named=True, first_line=start)
    commented = _commented_names(comments, delimiter, len(first))
    return Layout(delimiter, commented or default_names(range(len(first))), named=bool(commented), first_line=top)


def _top(file: _File) -> tuple[list[str], int, list[str]]:
    """Returns the comments (#) at the top, the number of the first line of the table, and the table's first two lines.

    Blank lines between the comments and the table are skipped.
    """
    comments: list[str] = []
    with file.open_text() as stream:
        for number, line in enumerate(stream, 1):
            if line.startswith("#"):
                comments.append(line.strip())
            elif line.strip() or not comments:
                return comments, number, [line, *islice(stream, 1)] if line.strip() or _any_text(stream) else []
    return comments, 1, []


def _any_text(lines: Iterator[str]) -> bool:
    return any(line.strip() for line in lines)


def _commented_names(comments: Sequence[str], delimiter: str | None, width: int) -> tuple[str, ...]:
    """Returns column names from the last comment above a table without a header; () if the comment contains no names.

    numpy.savetxt writes names in a comment. If there are several comments, the last may be a sentence. Its parts are
    then names only if each part is a single word. A prefix such as "columns:" is allowed.
    """
    if not comments:
        return ()
    line = comments[-1].removeprefix("# ")
    if len(comments) > 1:
        line = re.sub(r"^[#\s]*\w+:\s*", "", line)
    cells = next(csv.reader([line], delimiter=delimiter)) if delimiter else _cells_between_blanks(line)
    names = tuple(cell.strip() for cell in cells)
    if delimiter is None and names[:1] == ("#",):
        names = names[1:]
    words = len(comments) == 1 or not any(re.search(r"\s", name) for name in names)
    return names if len(names) == width and all(names) and words and any(map(_is_text, names)) else ()


def _cells_between_blanks(line: str) -> list[str]:
    return next(csv.reader([" ".join(line.split())], delimiter=" "), [])


def _detect_delimiter(lines: Sequence[str], decimal: str | None) -> str | None:
    """Detects the delimiter. None means white space.

    The first choice is a character that occurs equally often in all lines. The second choice is a character that occurs
    in any line. The last choice is white space. In the first choice, semicolons, tabs and bars have priority over
    commas, because commas may be decimal commas.
    """
    bare = [re.sub(r'"[^"]*"', "", line.strip("\r\n")) for line in lines]
    commas = "" if decimal == "comma" or _blanks_between_decimals(bare[-1], decimal) else ","
    for delimiter in f";\t|{commas}":
        counts = {line.count(delimiter) for line in bare}
        if len(counts) == 1 and counts != {0}:
            return delimiter
    for delimiter in f"{commas};\t|":
        if any(delimiter in line for line in bare):
            return delimiter
    # Blanks in the first line do not count, because the name of a single column may contain blanks
    return None if len(bare[-1].split()) > 1 else commas or ";"


def _blanks_between_decimals(line: str, decimal: str | None) -> bool:
    """Whether a line has numbers with decimal commas, separated by blanks: "10,38   1993,39"."""
    cells = line.split()
    return decimal is None and len(cells) > 1 and "," in line and all(_COMMA.fullmatch(cell) for cell in cells)


def is_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first line names the columns, judged by its cells and the cells of some rows below."""
    text = [i for i, cell in enumerate(first) if _is_text(cell)]
    if (
        first
        and not first[0].strip()
        and all(cell.strip() for cell in first[1:])
        and _are_row_numbers(row[0] for row in rows)
    ):
        # pandas writes an empty name for its index, and 0, 1, ... for columns without names
        return len(first) > 1 and bool(rows)
    if not text or not rows or not any(_is_number(cell) for cell in first):
        return bool(text)
    # A file without a header may contain labels: text in the same column of every row
    return any(i >= len(rows[0]) or not _is_text(rows[0][i]) for i in text)


def _are_row_numbers(cells: Iterator[str]) -> bool:
    """Whether the cells are row numbers, counted from 0 or from 1."""
    return all(cell.strip() in (str(i), str(i + 1)) for i, cell in enumerate(cells))


def _warn_of_odd_header(
    path: Path, line: int, first: Sequence[str], rows: Sequence[Sequence[str]], header: bool
) -> None:
    numbers = [cell for cell in first if _is_number(cell)]
    if header and numbers:
        _log.warning(
            f"{path}: line {line} is read as the header, but it contains numbers: {listed(numbers)}; data.header=false "
            "reads it as data"
        )
    if not header and _looks_like_header(first, rows):
        _log.warning(
            f"{path}: line {line} ({listed(first)}) is read as data but looks like a header; data.header=true reads "
            "it as the header, and data.header=false turns this warning off"
        )


def _looks_like_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a line of numbers may be a header: 0, 1, 2, ... (pandas), or whole numbers above columns of decimals."""
    if [cell.strip() for cell in first] == [str(i) for i in range(len(first))] and len(first) > 2:
        return True
    same = [row for row in rows if len(row) == len(first)]
    decimals = all(_is_text(cell) or not _WHOLE.fullmatch(cell) for row in same for cell in row)
    return len(same) > 1 and all(_WHOLE.fullmatch(cell) for cell in first) and decimals


def _is_row_index(file: _File, layout: Layout, column: int) -> bool:
    """Whether a column without a name contains row numbers (distinct whole numbers) or row names (text)."""
    if not layout.named or not UNNAMED.fullmatch(layout.names[column]):
        return False
    numbers: set[str] = set()
    texts = 0
    for _, row in _rows(file, layout.delimiter, layout.first_line):
        cell = row[column].strip() if len(row) > column else None
        if cell is None or cell in numbers or not (_WHOLE.fullmatch(cell) or _is_text(cell)):
            if row:
                return False
        elif _is_text(cell):
            texts += 1
        else:
            numbers.add(cell)
    return bool(numbers) != bool(texts)


def _warn_of_unnamed(path: Path, layout: Layout, indices: Sequence[int], left_out: Sequence[int]) -> None:
    if layout.named and layout.names[0] == "unnamed_0" and 0 in indices and 0 not in left_out:
        _log.warning(
            f"{path}: the first column has no name; if it contains row names, leave it out with "
            f"{as_option(range(1, len(layout.names)))}"
        )


# Numbers


def _is_number(cell: str) -> bool:
    # float() accepts 1_000, but NumPy's parser and other CSV readers refuse it
    if "_" in cell or "\n" in cell or not cell.isascii():
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_text(cell: str) -> bool:
    numeric = _is_number(cell) or _GROUPED.fullmatch(cell) or _COMMA.fullmatch(cell)
    return not numeric and not is_missing(cell)


def is_missing(cell: str, na: Collection[str] = ()) -> bool:
    """Whether a cell stands for a missing value: one of the usual words, or one of `na`."""
    return cell.strip().lower() in (_MISSING.union(na) if na else _MISSING)


def codes_of_text(cells: Iterable[str | None], na: Collection[str] = ()) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Returns the positions of cells in the tuple of their distinct texts, and this tuple. Missing values are NaN.

    Example:
        >>> codes_of_text(["red", "blue", "", "red "])
        (array([ 0.,  1., nan,  0.]), ('red', 'blue'))
    """
    words: dict[str, int] = {}
    codes = [
        float("nan") if cell is None or is_missing(cell, na) else float(words.setdefault(cell.strip(), len(words)))
        for cell in cells
    ]
    return np.array(codes), tuple(words)


def number_of(cell: str, decimal: str) -> float | None:
    """Parses the number in a cell, or 1 and 0 for true and false; None if the cell is not a number."""
    if (boolean := _BOOLEANS.get(cell.strip().lower())) is not None:
        return boolean
    if decimal == "point":
        if _is_number(cell):
            return float(cell)
        return float(cell.replace(",", "")) if _GROUPED.fullmatch(cell) else None
    if _COMMA.fullmatch(cell):
        return float(cell.replace(".", "").replace(",", "."))
    return float(cell) if "." not in cell and _is_number(cell) else None


def _decimal_mark(file: _File, layout: Layout, indices: Sequence[int]) -> str:
    """Detects the decimal mark, point or comma, from the cells that contain one.

    Raises:
        DataError: the cells are ambiguous, such as 1,234.
    """
    doubtful, possible = "", {"point", "comma"}
    for line, row in _rows(file, layout.delimiter, layout.first_line):
        for i in indices:
            cell = row[i] if i < len(row) else ""
            if not {",", "."} & set(cell):
                continue
            fits = {mark for mark in possible if number_of(cell, mark) is not None}
            if fits and fits != possible:
                possible = fits
            if "," in cell and not doubtful:
                doubtful = f"line {line}, column {layout.names[i]!r}: {cell!r}"
    if not doubtful:
        return "point"
    if len(possible) > 1:
        raise DataError(
            f"{file.path}, {doubtful} has either a decimal comma or a comma between thousands, and the other cells do "
            "not show which: give data.decimal=comma or data.decimal=point"
        )
    (mark,) = possible
    _log.info(
        f"{file.path}: numbers are read with "
        + ("a decimal comma" if mark == "comma" else "a decimal point, and commas between thousands")
        + " (data.decimal)"
    )
    return mark


# The rows


def _rows(file: _File, delimiter: str | None, first_line: int) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the cells of each row from `first_line` on. A blank line gives an empty row.

    A row may continue over several lines. The line number is the number of the first of them.
    """
    with file.open_text(newline="") as stream:
        lines: Iterator[str] = islice(stream, first_line - 1, None)
        if not delimiter:
            lines = (" ".join(line.split()) for line in lines)
        reader = csv.reader(lines, delimiter=delimiter or " ")
        line = first_line
        try:
            for row in reader:
                yield line, row if any(cell.strip() for cell in row) or len(row) > 1 else []
                line = first_line + reader.line_num
        except csv.Error as error:
            raise DataError(f"{file.path}, line {line}: {error}") from error


def _plain_rows(file: _File, layout: Layout) -> int | None:
    """Counts the rows; None if rows differ in their numbers of cells, or if a row follows a blank line.

    NumPy does not check this. It skips blank lines and, if columns are chosen, ignores the number of cells in a row.
    """
    rows, ended, width = 0, False, len(layout.names)
    with file.open_text() as stream:
        for line in islice(stream, layout.first_line - 1, None):
            # a line of tabs is a row without values if tabs separate the cells
            if not line.strip() and (layout.delimiter or "\n") not in line.rstrip("\r\n"):
                ended = True
            elif ended or _width(line, layout.delimiter) != width:
                return None
            else:
                rows += 1
    return rows


def _width(line: str, delimiter: str | None) -> int:
    return line.count(delimiter) + 1 if delimiter else len(line.split())


def _read_with_numpy(
    file: _File, layout: Layout, indices: list[int], rows: int, text_format: TextFormat, with_nan: bool = False
) -> NDArray[np.float64] | None:
    """Reads the table with NumPy's C parser; None if the parser fails.

    Args:
        with_nan: whether cells that stand for missing values are replaced by nan before parsing. This takes several
            times as long.
    """
    if not rows or text_format.decimal == "comma":
        return None
    with warnings.catch_warnings(), file.open_text() as stream:
        warnings.simplefilter("error")
        # NumPy reads a path in blocks, but a stream line by line, which is slower
        source: Any = stream if file.gzipped or file.path.suffix == ".gz" else str(file.path.absolute())
        if with_nan:
            missing = _missing_cells(layout.delimiter, text_format.na)
            lines = islice(stream, layout.first_line - 1, None)
            source = (missing.sub("nan", line.rstrip("\r\n")) for line in lines)
        try:
            return np.loadtxt(
                source,
                delimiter=layout.delimiter,
                skiprows=0 if with_nan else layout.first_line - 1,
                usecols=indices,
                max_rows=rows,
                ndmin=2,
                comments=None,
                quotechar='"',
                encoding="utf-8-sig",
            )
        except (ValueError, UserWarning):
            return None


def _missing_cells(delimiter: str | None, na: Collection[str]) -> re.Pattern[str]:
    """Returns a pattern for the cells of a line that stand for missing values.

    Example:
        >>> _missing_cells(",", []).sub("nan", ",1, NA,-1,-")
        'nan,1,nan,-1,nan'
    """
    words = sorted(filter(None, _MISSING.union(na)))
    if delimiter is None:
        return re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, words))})(?!\S)", re.IGNORECASE)
    ends = re.escape(delimiter)
    return re.compile(rf"(?<![^{ends}]) *(?:{'|'.join(map(re.escape, words))}|) *(?![^{ends}])", re.IGNORECASE)


def _read_by_cell(
    file: _File,
    layout: Layout,
    indices: Sequence[int],
    text_format: TextFormat,
    text: Collection[int] = (),
    needed: Mapping[int, str] = MappingProxyType({}),
) -> tuple[NDArray[np.float64], Sequence[int], dict[tuple[int, int], str], dict[int, tuple[str, ...]]]:
    """Reads the table cell by cell. Returns the values, the line numbers, the first missing cell, and the labels.

    Args:
        text: the positions of the columns that may contain text.
        needed: see `Chosen`.
    """
    decimal = text_format.decimal or _decimal_mark(file, layout, [i for i in indices if i not in text])
    values, lines = array("d"), array("q")
    # the distinct texts of each column that may contain text, and their positions
    words: dict[int, dict[str, int]] = {i: {} for i in indices if i in text}
    cells: dict[tuple[int, int], str] = {}
    blank, commas, pointed = 0, False, ""
    for line, row in _rows(file, layout.delimiter, layout.first_line):
        if not row:
            blank = blank or line
            continue
        if blank:
            raise DataError(f"{file.path}, line {blank} is empty, but rows follow; remove the line")
        if len(row) != len(layout.names):
            raise DataError(f"{file.path}, line {line} {_width_error(row, layout)}")
        for column, i in enumerate(indices):
            value = _code_of(row[i], words[i], text_format.na) if i in words else number_of(row[i], decimal)
            if value is None:
                if not is_missing(row[i], text_format.na):
                    error = _number_error(file.path, line, layout, i, row[i], decimal)
                    numeric = [j for j in indices if j not in words]
                    found = _text_columns(file, layout, numeric, text_format.na, decimal)
                    raise DataError(f"{error}. {advice_on_text(found, indices, needed)}")
                value = float("nan")
                if not cells:
                    cells[len(lines), column] = row[i]
            values.append(value)
            if decimal == "comma":
                commas = commas or "," in row[i]
                pointed = pointed or ("." in row[i] and f"line {line}, column {layout.names[i]!r}: {row[i]!r}") or ""
        lines.append(line)
    if pointed and not commas:
        raise DataError(
            f"{file.path}, {pointed} has a point, and no number in the file has a decimal comma: omit "
            "data.decimal=comma"
        )
    table = np.frombuffer(values, np.float64).reshape(len(lines), len(indices))
    labels = {i: texts for i in words if (texts := _texts(table[:, indices.index(i)], words[i], decimal))}
    return table, lines, cells, labels


def _code_of(cell: str, words: dict[str, int], na: Collection[str]) -> float | None:
    """Returns the position of a cell in the distinct texts `words`, to which it is added; None for a missing value."""
    return None if is_missing(cell, na) else words.setdefault(cell.strip(), len(words))


def _texts(column: NDArray[np.float64], words: Mapping[str, int], decimal: str) -> tuple[str, ...]:
    """Returns the distinct texts of a column in which each value is a position of a text.

    If all texts are numbers, the values of the column are replaced by these numbers, and the result is empty.
    """
    numbers = [number for word in words if (number := number_of(word, decimal)) is not None]
    if len(numbers) < len(words):
        return tuple(words)
    known = ~np.isnan(column)
    column[known] = np.array(numbers, np.float64)[column[known].astype(np.int64)]
    return ()


def _text_columns(
    file: _File, layout: Layout, indices: Sequence[int], na: Collection[str], decimal: str
) -> list[TextColumn]:
    """Returns the columns with cells that are neither numbers nor missing values."""
    found: dict[int, TextColumn] = {}
    for line, row in _rows(file, layout.delimiter, layout.first_line):
        for i in indices:
            if i < len(row) and number_of(row[i], decimal) is None and not is_missing(row[i], na):
                default = TextColumn(i, layout.names[i], "text", f"line {line}", row[i])
                found.setdefault(i, default).add(row[i])
    return [found[i] for i in sorted(found)]


def _width_error(row: Sequence[str], layout: Layout) -> str:
    width, cells = len(layout.names), len(row)
    where = (
        f"the row ends before column {layout.names[cells]!r}"
        if cells < width
        else f"the row continues after column {layout.names[-1]!r}"
    )
    hint = ""
    if row[0].startswith("#"):
        hint = _COMMENT_HINT
    elif width == 1 and cells == 2 and layout.delimiter == ",":
        hint = "; if the comma is a decimal mark, give data.decimal=comma"
    expected = "the header has" if layout.named else "the first row has"
    return f"has {cells} cell{'s' * (cells != 1)}, but {expected} {width}: {where}{hint}"


def _number_error(path: Path, line: int, layout: Layout, column: int, cell: str, decimal: str) -> str:
    hint = ""
    if cell.startswith("#"):
        hint = _COMMENT_HINT
    elif line == layout.first_line and not layout.named:
        hint = (
            "; if the line names the columns, give data.header=true; otherwise leave the column out with data.columns"
        )
    elif _COMMA.fullmatch(cell) or _GROUPED.fullmatch(cell) or _is_number(cell):
        hint = f" with a decimal {decimal}, which the other cells have (data.decimal)"
    return f"{path}, line {line}, column {layout.names[column]!r}: {cell!r} is not a number{hint}"
