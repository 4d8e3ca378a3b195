"""Selection of the columns of a table, and the names of columns in messages."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import consecutive, counted

_log = logging.getLogger("flowtrain")

Columns = Sequence[str | int] | str | int

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")


def default_names(indices: Iterable[int]) -> tuple[str, ...]:
    """Returns the names of columns without a name: c0, c1, ..."""
    return tuple(f"c{i}" for i in indices)


def pick(
    columns: Columns | None,
    names: Sequence[str],
    path: object,
    key: str = "data.columns",
    left_out: Sequence[int] = (),
) -> list[int]:
    """Returns the positions of the chosen columns, in the order of `columns`.

    Args:
        columns: an entry or several. An entry is a name, a position (-1 is the last) or a slice of positions such as
            "0:64". None chooses all columns except `left_out`.
        names: the names of all columns.
        path: the file, for messages.
        key: the setting that `columns` comes from, for messages.
        left_out: positions of the columns that None leaves out.

    Raises:
        ConfigError: an entry that is not in the table, a column that is chosen twice, or no column at all.

    Example:
        >>> pick(["price", "0:2"], ["a", "b", "price"], "file.csv")
        [2, 0, 1]
    """
    if columns is None:
        if left_out:
            _log.warning(
                f"{path}: column {', '.join(map(str, left_out))} is left out because it has no name and is empty or "
                f"contains row numbers or row names; {as_option(range(len(names)))} keeps every column"
            )
        return [i for i in range(len(names)) if i not in left_out]
    # a ListConfig of OmegaConf is a sequence, but not a list
    several = isinstance(columns, Sequence) and not isinstance(columns, str)
    entries: list[Any] = list(columns) if several else [columns]  # type: ignore[arg-type]
    chosen = [i for entry in entries for i in _positions(entry, names, path, key)]
    if not chosen:
        raise ConfigError(f"{key}={columns} keeps no column of {path}; it has {_overview(names)}")
    twice = sorted({i for i in chosen if chosen.count(i) > 1})
    if twice:
        raise ConfigError(f"{key}={columns} keeps {listed([names[i] for i in twice])} twice")
    return chosen


def pick_table(key: str | None, names: Sequence[str], path: object, what: str) -> str:
    """Returns the name of the table to read from a file that contains several.

    Args:
        key: the setting `data.key`; None for the only table.
        names: the names of the tables.
        path: the file, for messages.
        what: the word for a table, for messages: array or sheet.

    Raises:
        ConfigError: a key that is not in the file, or no key although there are several tables.
        DataError: a file without tables.
    """
    if not names:
        raise DataError(f"{path} contains no {what} with values")
    if key is None and len(names) > 1:
        raise ConfigError(f"{path} contains {len(names)} {what}s; choose one with data.key: {', '.join(names)}")
    if key is not None and key not in names:
        raise ConfigError(f"{path} has no {what} {key!r} with values; data.key can be {', '.join(names)}")
    return names[0] if key is None else key


def _positions(entry: object, names: Sequence[str], path: object, key: str) -> list[int]:
    width = len(names)
    if isinstance(entry, str):
        found = [i for i, name in enumerate(names) if name == entry]
        if len(found) > 1:
            raise ConfigError(f"{key}: {path} has {len(found)} columns named {entry!r}; give positions")
        if found:
            return found
        match = _SLICE.fullmatch(entry)
        if match:
            start, stop, step = (int(group) if group else None for group in match.groups())
            bounds = [bound for bound in (start, stop) if bound is not None]
            # Python clips slices silently, so a file with too few columns would not be detected
            if step != 0 and all(-width <= bound <= width for bound in bounds):
                return list(range(width))[start:stop:step]
    elif isinstance(entry, int) and not isinstance(entry, bool) and -width <= entry < width:
        return [entry % width]
    raise ConfigError(f"{key}: {path} has no column {entry!r}; it has {_overview(names)}")


def _overview(names: Sequence[str]) -> str:
    if tuple(names) == default_names(range(len(names))):
        return (
            "1 column without a name, 0"
            if len(names) == 1
            else f"{len(names)} columns without names, 0 to {len(names) - 1}"
        )
    return f"{counted(len(names), 'column')}: {listed(names, most=50)}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Joins quoted names. Names after the first `most` are only counted."""
    return first_of([repr(name) for name in names[:most]], len(names))


def first_of(shown: Sequence[str], n: int, separator: str = ", ") -> str:
    """Joins the first of n phrases and counts the others.

    Example:
        >>> first_of(["a", "b"], 2), first_of(["a", "b"], 5)
        ('a, b', 'a, b and 3 more')
    """
    words = separator.join(shown)
    return words if n <= len(shown) else f"{words} and {n - len(shown)} more"


def as_option(indices: Sequence[int]) -> str:
    """Returns the setting that keeps these columns, quoted for a shell: 'data.columns=[1:39,40]'."""
    entries = (str(first) if first == last else f"{first}:{last + 1}" for first, last in consecutive(indices))
    return f"'data.columns=[{','.join(entries)}]'"


# Largest number of columns, and of distinct texts, that a message names
_MOST_COLUMNS, _MOST_TEXTS = 12, 3


@dataclass
class TextColumn:
    """A column with cells that are not numbers.

    Attributes:
        index: the position of the column in the file.
        name: the name of the column.
        kind: what it contains, such as "text" or "dates".
        place: the place of the first such cell, such as "line 3".
        first: the content of this cell.
        count: the number of such cells.
        texts: the distinct contents, or more than _MOST_TEXTS of them.
    """

    index: int
    name: str
    kind: str
    place: str
    first: str
    count: int = 0
    texts: set[str] = field(default_factory=set)

    def add(self, cell: str) -> None:
        """Counts a cell."""
        self.count += 1
        if len(self.texts) <= _MOST_TEXTS:
            self.texts.add(cell.strip())


# advice on text in a column that data.columns cannot leave out, by the setting that names the column
_TEXT_OF_ROLE = {
    "data.label": "Labels are whole numbers 0, 1, 2, ...; text can be a context instead, with data.context",
    "data.weights": "Weights are numbers; give another column as data.weights",
    "data.context": "Leave {} out of data.context, or give it the type categorical",
    "": "The flow was trained on numbers in {}",
}


def advice_on_text(
    found: Sequence[TextColumn],
    indices: Sequence[int],
    needed: Mapping[int, str] = MappingProxyType({}),
    in_memory: bool = False,
) -> str:
    """Names all columns with cells that are not numbers, and the options that leave them out.

    Args:
        found: these columns.
        indices: the positions of all columns that were to be read.
        needed: see `flowtrain.data.tables.csv_reader.Chosen`.
        in_memory: whether the rows were given in memory, so that the options are Python arguments.

    Example:
        >>> column = TextColumn(1, "sex", "text", "line 2", "m", 4, {"m", "f", "d", "x"})
        >>> advice_on_text([column], [0, 1, 2])
        "Not numbers: column 'sex' (text in 4 cells). Keep the other columns with 'data.columns=[0,2]', or model the \
text as categories with 'data.types={sex: categorical}'"
    """

    def given(option: str) -> str:
        return f"overrides=[{option}]" if in_memory else option

    each = [f"{c.name!r} ({c.kind} in {counted(c.count, 'cell')})" for c in found[:_MOST_COLUMNS]]
    words = f"Not numbers: column{'s' * (len(found) > 1)} {first_of(each, len(found))}"
    free = [c for c in found if c.index not in needed]
    if free:
        keep = [i for i in indices if i not in {*needed, *(c.index for c in found)}]
        words += f". Keep the other columns with {given(as_option(keep))}" if keep else ". There are no other columns"
    if free and {c.kind for c in free} == {"text"} and len(free) <= _MOST_COLUMNS:
        keys = [c.name if re.fullmatch(r"[A-Za-z_]\w*", c.name) else str(c.index) for c in free]
        option = f"'data.types={{{','.join(f'{key}: categorical' for key in keys)}}}'"
        words += f", or model the text as categories with {given(option)}"
    for key in dict.fromkeys(needed[c.index] for c in found if c.index in needed):
        names = [c.name for c in found if needed.get(c.index) == key]
        words += f". {_TEXT_OF_ROLE[key].format(listed(names))}"
    texts = sorted(set().union(*(c.texts for c in found)))
    # text with quotes needs other quotes than these
    plain = len(texts) <= _MOST_TEXTS and not re.search(r"[\"'\\\n]", "".join(texts))
    if plain and {c.kind for c in found} == {"text"}:
        quoted = ",".join(f'"{text}"' for text in texts)
        option = f"'data.na=[{quoted}]'"
        words += f". If the text stands for missing values, give {given(option)}"
    return words
