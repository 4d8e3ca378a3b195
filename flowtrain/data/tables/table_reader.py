"""Reads tables from files as float64. Error messages name the place in the file."""

import logging
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from flowtrain.data.tables.columns import (
    Columns,
    TextColumn,
    advice_on_text,
    as_option,
    default_names,
    first_of,
    listed,
    pick,
    pick_table,
)
from flowtrain.data.tables.csv_reader import DETECTED, ChooseColumns, Chosen, TextFormat, read_delimited
from flowtrain.data.tables.missing import REFUSED, Missing
from flowtrain.data.tables.typed_files import TYPED, read_typed
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import counted

_log = logging.getLogger("flowtrain")

# Deflate compresses by at most this factor, because at least one bit is needed for 129 bytes
MOST_RATIO = 1032


def check_array_headers(stream: IO[bytes], file: Path) -> None:
    """Checks, before memory is allocated, that array headers do not announce more bytes than the file has.

    The position of the stream does not change. Headers that cannot be read pass this check; NumPy reports them later.

    Raises:
        DataError: a header that announces more bytes than follow.
    """
    begin = stream.tell()
    magic = stream.read(4)
    stream.seek(begin)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if member.file_size > MOST_RATIO * max(1, member.compress_size):
                    raise DataError(_too_large(file, member.file_size, MOST_RATIO * member.compress_size))
                with archive.open(member) as inside:
                    _check(inside, member.file_size, file)
    else:
        _check(stream, file.stat().st_size, file)
    stream.seek(begin)


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of a .npy array: its shape, whether it is in Fortran order, and its dtype.

    Raises:
        ValueError: no header at the position of the stream, or a header of an unknown version.
    """
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its format has version {version}, which is not supported")
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def _check(stream: IO[bytes], size: int, file: Path) -> None:
    try:
        shape, _, dtype = npy_header(stream)
    except ValueError:
        return
    if dtype.hasobject:
        # pickled arrays are refused by check_array
        return
    promised, room = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if promised > room:
        raise DataError(_too_large(file, promised, room))


def _too_large(file: Path, promised: int, room: int) -> str:
    return f"{file} is cut short, or its header is damaged: it announces {promised} bytes, but {max(0, room)} follow"


ARRAYS = (".npy", ".npz")
# names of the arrays in an .npz file that stores a table with column names
VALUES, COLUMNS = "x", "columns"
# prefix of the names of the arrays that contain the texts of a column, followed by its position
LABELS = "labels"
TEXTS = (".csv", ".tsv", ".txt", ".data", ".tra", ".tes")
# the setting that names context columns
CONTEXT = "data.context"
# Largest number of columns in a message on missing values
_MOST_COLUMNS = 10


class Kept(NamedTuple):
    """The rows of a file that are in a table.

    Attributes:
        rows: their row numbers in the file, (n,), in ascending order.
        of: the number of rows in the file.
    """

    rows: NDArray[np.int64]
    of: int


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        values: (n, d).
        columns: the d column names. If the file has no names, they are c0, c1, ... by position in the file.
        indices: the d positions of the columns in the file.
        path: the file, as the user named it.
        lines: for text files, the line number of each row of the file, from 1; for .xlsx, the row number in the sheet.
            None for other files.
        first: the number of the first row in the file, if the table is a block of a file.
        cells: the text of the first missing value, by its row and column. It is empty for an empty cell. For text files
            and typed files.
        unit: the word for `lines` in messages.
        kept: the rows of the file that are in `values`, if rows with missing values were left out. None means all.
        labels: the distinct texts of each column that contains text, by the position of the column in the file. The
            values of such a column are positions in this tuple.
    """

    values: NDArray[np.float64]
    columns: tuple[str, ...]
    indices: tuple[int, ...]
    path: str
    lines: Sequence[int] | None = None
    first: int = 0
    cells: Mapping[tuple[int, int], str] = field(default_factory=dict)
    unit: str = "line"
    kept: Kept | None = None
    labels: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def named(self) -> bool:
        """Whether the file names its columns."""
        return self.columns != default_names(self.indices)

    def without(self, index: int) -> "Table":
        """Returns the table without the column at this position in the file."""
        return self.only([i for i, other in enumerate(self.indices) if other != index])

    def only(self, columns: Sequence[int]) -> "Table":
        """Returns the table of these columns. Columns are given by their positions in this table."""
        kept = list(columns)
        # a copy of all columns would have another memory layout, and the noise of whole numbers depends on it
        if kept == list(range(len(self.columns))):
            return self
        names, indices = tuple(self.columns[i] for i in kept), tuple(self.indices[i] for i in kept)
        return replace(self, values=self.values[:, kept], columns=names, indices=indices)

    def place(self, row: int, column: int) -> str:
        """Describes the place of a value for messages: the file, the line or the row, and the column."""
        return f"{self.path}, {self.row_name(row)}, column {self.columns[column]!r}"

    def row_name(self, row: int) -> str:
        """Describes a row for messages by its line or its number in the file."""
        row = row if self.kept is None else int(self.kept.rows[row])
        return f"row {self.first + row} (from 0)" if self.lines is None else f"{self.unit} {self.lines[row]}"


def read_table(
    path: str | Path | Table,
    key: str | None = None,
    columns: Columns | ChooseColumns | None = None,
    option: str = "data.columns",
    event_shape: tuple[int, ...] = (),
    text_format: TextFormat = DETECTED,
    missing: Missing = REFUSED,
) -> Table:
    """Reads the table in a file. A 1-D array is a table of one column.

    Args:
        path: a file with an ending in ARRAYS, TEXTS or TYPED (text files may also end in .gz); or a table in memory.
        key: the array to read from an .npz file with several arrays, or the sheet of an .xlsx file with several sheets.
        columns: names, positions or slices such as "0:64" to keep, in this order. None keeps all columns except unnamed
            columns of row numbers or row names. `columns` may also be a function, see `ChooseColumns`.
        option: the name of the setting that `columns` comes from, for messages.
        event_shape: (C, H, W) if the file may be an array of images (n, C, H, W), or (n, H, W) for C = 1.
        text_format: the format of a text file.
        missing: the values that count as missing, and whether rows with missing values are left out.

    Raises:
        DataError: a file that is missing or damaged, or that is not a table of finite real numbers.
        ConfigError: `key` or `columns` that are not in the file, or a package that is not installed.
    """
    file = Path(path.path if isinstance(path, Table) else path).expanduser()
    needed: Mapping[int, str] = {}

    def choose(names: Sequence[str], left_out: Sequence[int]) -> Chosen:
        nonlocal needed
        found = columns(names, left_out) if callable(columns) else Chosen(pick(columns, names, file, option, left_out))
        needed = found.needed
        return found

    if isinstance(path, Table):
        indices, text, _ = choose(path.columns, ())
        # a table in memory may be part of another table, with other positions
        needed = {path.indices[i]: key for i, key in needed.items()}
        refuse_text(path, indices, text, needed, in_memory=True)
        return _complete(path.only(indices), missing, needed)
    ending = ending_of(file)
    check_file(file)
    if key is not None and not takes_key(file):
        raise ConfigError(
            f"data.key={key} names an array of an .npz file or a sheet of an .xlsx file, but {path} is neither; omit "
            "data.key"
        )
    try:
        if ending in ARRAYS:
            table = read_array(file, key, choose, event_shape)
        elif ending in TYPED:
            typed = read_typed(file, key, choose, text_format.header, missing.texts)
            table = Table(
                typed.values,
                typed.names,
                typed.indices,
                str(file),
                typed.lines,
                cells=typed.cells,
                unit="row",
                labels=typed.labels,
            )
        else:
            table = _from_text(file, choose, replace(text_format, na=missing.texts, drops=missing.drops))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return _complete(table, missing, needed)


def takes_key(file: Path) -> bool:
    """Whether a file may contain several tables, which `data.key` chooses from."""
    return ending_of(file) in (".npz", ".xlsx")


def check_file(file: Path) -> None:
    """Checks that a file exists and has a known ending.

    Raises:
        DataError: a directory, an unknown ending, or a missing file.
    """
    ending = ending_of(file)
    if file.is_dir():
        raise DataError(f"{file} is a directory; give a file")
    if ending.removesuffix(".gz") in ARRAYS + TYPED and ending not in ARRAYS + TYPED:
        raise DataError(f"{file} is gzipped, but only text files may be gzipped: unpack it with gunzip")
    if ending.removesuffix(".gz") not in ARRAYS + TEXTS + TYPED:
        found = f"ends in {ending!r}" if ending else "has no ending"
        raise DataError(
            f"{file} {found}; data files end in {', '.join(ARRAYS + TEXTS + TYPED)}; text files may be gzipped, as in "
            ".csv.gz"
        )
    if not file.exists():
        raise DataError(f"there is no file {file.absolute()}")


def ending_of(file: Path) -> str:
    """Returns the suffix of a file name in lower case, or both suffixes of a gzipped file.

    Example:
        >>> ending_of(Path("a.CSV.gz")), ending_of(Path("b.npy"))
        ('.csv.gz', '.npy')
    """
    ending = file.suffix.lower()
    return Path(file.stem).suffix.lower() + ending if ending == ".gz" else ending


def _from_text(file: Path, choose: ChooseColumns, text_format: TextFormat) -> Table:
    text = read_delimited(file, choose, text_format)
    return Table(text.values, text.names, text.indices, str(file), text.lines, cells=text.cells, labels=text.labels)


def read_array(file: Path, key: str | None, choose: ChooseColumns, event_shape: tuple[int, ...] = ()) -> Table:
    """Reads columns of a .npy or .npz file, which may have missing values; see `read_table` for the arguments."""
    array, names, labels = _load(file, key)
    if is_images(array.shape, event_shape):
        array = array.reshape(len(array), -1)
    check_array(array.shape, array.dtype, file, event_shape)
    table = array.reshape(len(array), -1) if array.ndim == 1 else array
    everything = range(table.shape[1])
    if names and len(names) != len(everything):
        raise DataError(f"{file} names {counted(len(names), 'column')} in {COLUMNS!r}, but has {len(everything)}")
    names = names or default_names(everything)
    indices, text, needed = choose(names, ())
    kept = table if indices == list(everything) else table[:, indices]
    chosen = tuple(names[i] for i in indices)
    values = np.ascontiguousarray(kept, dtype=np.float64)
    found = Table(values, chosen, tuple(indices), str(file), labels={i: labels[i] for i in indices if i in labels})
    refuse_text(found, range(len(indices)), [k for k, i in enumerate(indices) if i in text], needed)
    return found


def is_images(shape: tuple[int, ...], event_shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape contains images (C, H, W): (n, C, H, W), or (n, H, W) for C = 1."""
    return len(shape) > 2 and shape[1:] in (event_shape, event_shape[1:] if event_shape[:1] == (1,) else event_shape)


def _load(file: Path, key: str | None) -> tuple[NDArray[Any], tuple[str, ...], dict[int, tuple[str, ...]]]:
    """Loads an array, its column names, and the texts of its columns. Nothing is unpickled.

    The names are (), and there are no texts, unless an .npz file contains them.
    """
    # numpy.load does not close a file that it opened if the archive is damaged, so the file is opened here
    with damage_refused(file), file.open("rb") as stream:
        check_array_headers(stream, file)
        loaded = np.load(stream, allow_pickle=False)
        if not isinstance(loaded, NpzFile):
            return np.asarray(loaded), (), {}
        members, names, labels = loaded.files, tuple[str, ...](), dict[int, tuple[str, ...]]()
        if COLUMNS in members and key != COLUMNS and (named := loaded[COLUMNS]).dtype.kind == "U" and named.ndim == 1:
            members, names = [name for name in members if name != COLUMNS], tuple(map(str, named))
            for name in [member for member in members if re.fullmatch(rf"{LABELS}\d+", member)]:
                labels[int(name.removeprefix(LABELS))] = tuple(map(str, loaded[name]))
            members = [name for name in members if not re.fullmatch(rf"{LABELS}\d+", name)]
        return np.asarray(loaded[pick_table(key, members, file, "array")]), names, labels


@contextmanager
def damage_refused(file: Path) -> Iterator[None]:
    """Converts all errors of NumPy while reading an array file to DataError."""
    try:
        yield
    except (ConfigError, DataError, PermissionError):
        raise
    # NumPy raises a dozen types of errors for damaged files, including errors of zlib and tokenize
    except Exception as error:
        if "pickle" in str(error):
            raise _pickled(file) from error
        raise DataError(f"{file} is damaged or is not a NumPy file ({error}); write or copy it again") from error


def _pickled(file: Path) -> DataError:
    return DataError(
        f"{file} contains Python objects or is not a NumPy file. It is not loaded because loading it could run code. "
        "Save numbers: numpy.save(path, array.astype(float))"
    )


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any], file: Path, event_shape: tuple[int, ...] = ()) -> None:
    """Checks that an array is a table of real numbers.

    Raises:
        DataError: objects, values that are not real numbers, an array of another rank, or an empty array.
    """
    if dtype.hasobject:
        raise _pickled(file)
    if dtype.kind not in "biuf":
        raise DataError(f"{file} has dtype {dtype}; real numbers are needed (integers, floats, booleans)")
    if len(shape) not in (1, 2):
        images = f", or (n, {', '.join(map(str, event_shape))})" if len(event_shape) > 1 else ""
        raise DataError(f"{file} has shape {shape}; (rows, columns) is needed, or (rows,) for one column{images}")
    if min(shape) < 1:
        raise DataError(f"{file} has shape {shape}: it is empty")


def _complete(table: Table, missing: Missing, needed: Mapping[int, str]) -> Table:
    """Leaves out the rows that have a missing value, if `missing.drops`, and checks that all other values are finite.

    Args:
        needed: see `flowtrain.data.tables.csv_reader.Chosen`.

    Raises:
        DataError: missing values that are not left out, infinite values, or no row without missing values.
    """
    table = replace(table, values=_marked(table, missing))
    lost = np.isnan(table.values) if missing.drops else np.zeros((0, 0), bool)
    if lost.any():
        n, by_column = len(table.values), lost.sum(0)
        rows = np.flatnonzero(~lost.any(1))
        left, columns = n - len(rows), _by_column(table, by_column)
        words = (
            f"{table.path}: {left:,} of {counted(n, 'row')} {'has' if left == 1 else 'have'} missing values ({columns})"
        )
        if not len(rows):
            advice = "Fill in values, or leave out the columns with the most missing values"
            raise DataError(f"{words}, so no row is left. {advice}" + ("" if needed else ", with data.columns"))
        _log.info(f"{words} and {'is' if left == 1 else 'are'} left out (data.missing=drop)")
        table = replace(table, values=table.values[rows], kept=Kept(rows, n))
    check_finite(table, needed=needed)
    return table


def _marked(table: Table, missing: Missing) -> NDArray[np.float64]:
    """Returns the values of a table, with NaN for the numbers that count as missing."""
    values = missing.mark(table.values)
    for i, index in enumerate(table.indices):
        if index in table.labels and missing.numbers:
            # the values are not numbers, but positions of texts
            absent = [code for code, text in enumerate(table.labels[index]) if _number(text) in missing.numbers]
            values[:, i] = np.where(np.isin(table.values[:, i], absent), np.nan, table.values[:, i])
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def refuse_text(
    table: Table,
    columns: Iterable[int],
    text: Collection[int] = (),
    needed: Mapping[int, str] = MappingProxyType({}),
    in_memory: bool = False,
) -> None:
    """Checks that only some columns contain text.

    Args:
        columns: the positions in the table of the columns that are used.
        text: the positions in the table of the columns that may contain text.
        needed: see `flowtrain.data.tables.csv_reader.Chosen`.
        in_memory: whether the rows were given in memory, for the message.

    Raises:
        DataError: another column contains text.
    """
    columns, found = list(columns), []
    for i in columns:
        texts = table.labels.get(table.indices[i])
        if texts and i not in text:
            # cells with numbers are not the cause, unless there are no others
            words = [text for text in texts if math.isnan(_number(text))] or list(texts)
            rows = np.isin(table.values[:, i], [texts.index(text) for text in words])
            place = table.row_name(int(rows.argmax()) if len(rows) else 0)
            one = TextColumn(table.indices[i], table.columns[i], "text", place, words[0], int(rows.sum()))
            one.texts.update(words)
            found.append(one)
    if found:
        advice = advice_on_text(found, [table.indices[i] for i in columns], needed, in_memory)
        raise DataError(f"{table.path}, column {found[0].name!r}: {found[0].first!r} is not a number. {advice}")


def _by_column(table: Table, counts: NDArray[np.int64], first: Sequence[str] = ()) -> str:
    """Lists the numbers of missing values by column, largest first.

    Args:
        counts: the number of each column, (d,).
        first: the place of the first missing value of each column; empty if the list does not name places.
    """
    some = int((counts > 0).sum())
    most = np.argsort(-counts, kind="stable")[: min(_MOST_COLUMNS, some)]
    places = [f", first in {first[i]}" if first else "" for i in most]
    each = [f"{table.columns[i]!r}: {counts[i]:,}{place}" for i, place in zip(most, places, strict=True)]
    return first_of(each, some, "; ")


def drop_option(na: str | None, in_blocks: bool) -> str:
    """Returns the options that leave out rows with missing values, and with values of the list `na`.

    Args:
        na: the value of data.na, or None.
        in_blocks: whether the file is read in blocks, from which rows cannot be left out.
    """
    options = "data.missing=drop" if na is None else f"'data.na={na}' data.missing=drop"
    if in_blocks:
        options += " data.memory_map=false, which reads the file into memory"
    # a list on the command line replaces the list of a config
    return options if na is None else f"{options} (if data.na is already set, add its entries to this list)"


def check_finite(
    table: Table,
    whole: Iterable[Table] | None = None,
    needed: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Raises DataError if values are missing, NaN or infinite.

    The message gives the number of these values by column, and the place of the first.

    Args:
        table: a file or a block of a file.
        whole: all blocks of the file, for the numbers in the message. None if `table` is the whole file.
        needed: see `flowtrain.data.tables.csv_reader.Chosen`.
    """
    bad = ~np.isfinite(table.values)
    if not bad.any():
        return
    row, column = (int(i) for i in np.argwhere(bad)[0])
    by_column, rows, of_rows = np.zeros(len(table.columns), dtype=np.int64), 0, 0
    empty = infinite = False
    places = [""] * len(table.columns)
    for block in whole or [table]:
        each = ~np.isfinite(block.values)
        for i in np.flatnonzero(each.any(0) & (by_column == 0)):
            places[i] = block.row_name(int(each[:, i].argmax()))
        by_column += each.sum(0)
        rows, of_rows = rows + int(each.any(1).sum()), of_rows + len(each)
        empty = empty or bool(np.isnan(block.values).any())
        infinite = infinite or bool(np.isinf(block.values).any())
    total = int(by_column.sum())
    # data.columns can leave out columns of the samples only
    lost = {index: name for index, name, n in zip(table.indices, table.columns, by_column, strict=True) if n}
    keep = [index for index in table.indices if index not in lost and index not in needed]
    context = [name for index, name in lost.items() if needed.get(index) == CONTEXT]
    others = []
    if any(index not in needed for index in lost):
        others = [f"keep only the complete columns: {as_option(keep)}"] if keep else []
    if context:
        others.append(f"leave {listed(context)} out of {CONTEXT}")
    if {needed.get(index, CONTEXT) for index in lost} != {CONTEXT}:
        # columns of labels and weights, and columns that a trained flow needs, cannot be left out
        others = []
    in_file = row if table.kept is None else int(table.kept.rows[row])
    cell = table.cells.get((in_file, column))
    found = f"the value is {table.values[row, column]}"
    if cell is not None and np.isnan(table.values[row, column]):
        found = f"{cell!r} is a missing value" if cell.strip() else "the cell is empty"
    options = drop_option("[inf,-inf]" if infinite else None, in_blocks=whole is not None)
    advice = f"Leave out these rows with {options}" if empty else f"Remove these rows, or leave them out with {options}"
    raise DataError(
        f"{table.path}: {total:,} of {counted(of_rows * len(table.columns), 'value')} "
        f"{'is' if total == 1 else 'are'} missing or not finite, in {rows:,} of {counted(of_rows, 'row')} (by column, "
        f"{_by_column(table, by_column, places)}). The first: "
        f"{table.place(row, column).removeprefix(f'{table.path}, ')}: {found}. {advice}"
        + (f", or {' and '.join(others)}" if others else "")
    )
