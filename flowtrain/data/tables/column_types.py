"""The setting `data.types`: the types of the columns of a table, and the codes of categories."""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.tables.columns import listed
from flowtrain.data.tables.table_checks import MOST_WHOLE
from flowtrain.data.tables.table_reader import Table
from flowtrain.data.types import (
    CATEGORICAL,
    CIRCULAR,
    INTEGER,
    INTERVAL,
    POSITIVE,
    REAL,
    ColumnType,
    category_text,
)
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import counted

_log = logging.getLogger("flowtrain")

# largest number of categories of a column
MOST_CATEGORIES = 1000
# largest number of categories that a message lists
_MOST_LISTED = 12
# types that a context column can have
_OF_CONTEXT = (REAL, INTEGER, CATEGORICAL)


@dataclass(frozen=True)
class AskedTypes:
    """The types that `data.types` gives to columns, which are named or given by their positions in the file."""

    entries: tuple[tuple[str | int, ColumnType], ...] = ()

    def pick(self, names: Sequence[str], path: object) -> dict[int, ColumnType]:
        """Returns the types by the positions of the columns in a file.

        Raises:
            ConfigError: a column that the file does not have, or a column with two types.
        """
        found: dict[int, ColumnType] = {}
        for entry, one in self.entries:
            places = [i for i, name in enumerate(names) if name == str(entry)]
            if not places and (isinstance(entry, int) or entry.lstrip("-").isdigit()):
                places = [int(entry) % len(names)] if -len(names) <= int(entry) < len(names) else []
            if len(places) != 1:
                why = "has no column" if not places else f"has {len(places)} columns named"
                raise ConfigError(f"data.types: {path} {why} {entry!r}; it has {listed(names, most=50)}")
            if places[0] in found:
                raise ConfigError(f"data.types gives the column {names[places[0]]!r} two types: give one")
            found[places[0]] = one
        return found


NO_TYPES = AskedTypes()


def asked_types(setting: Any) -> AskedTypes:
    """Returns the types for the value of `data.types`: a mapping from columns to types, or None.

    Raises:
        ConfigError: another value, or an unknown type.
    """
    if setting is None:
        return NO_TYPES
    if not isinstance(setting, Mapping):
        raise ConfigError(f"data.types={setting}: give the types of columns, as in {{age: positive, 3: integer}}")
    entries = []
    for column, text in setting.items():
        if not isinstance(column, str | int) or isinstance(column, bool):
            raise ConfigError(f"data.types: {column!r} is not the name or the position of a column")
        entries.append((column, ColumnType.parse(text, f"data.types.{column}")))
    return AskedTypes(tuple(entries))


def check_roles(
    types: Mapping[int, ColumnType], names: Sequence[str], context: Iterable[int], others: Iterable[int]
) -> None:
    """Checks that the columns of other roles have types that these roles allow.

    Args:
        types: the types by position in the file.
        context, others: positions of the context columns, and of the columns of labels and weights.

    Raises:
        ConfigError: a type that the role does not allow.
    """
    for i in others:
        if i in types:
            raise ConfigError(f"data.types: {names[i]!r} is a column of labels or weights, which has no type: omit it")
    for i in context:
        if i in types and types[i].kind not in _OF_CONTEXT:
            raise ConfigError(
                f"data.types: {names[i]!r} is a context column, which can be {', '.join(_OF_CONTEXT)}, but not "
                f"{types[i]}"
            )


# Categories


def categories_of(table: Table, column: int) -> tuple[str | float, ...]:
    """Returns the categories of a column in ascending order: text if any cell is text, otherwise numbers.

    Raises:
        DataError: too many distinct values.
    """
    distinct = np.unique(table.values[:, column])
    if len(distinct) > MOST_CATEGORIES:
        raise DataError(
            f"{table.path}: column {table.columns[column]!r} has {len(distinct):,} distinct values, but a categorical "
            f"column has at most {MOST_CATEGORIES:,}; leave it out with data.columns"
        )
    texts = table.labels.get(table.indices[column])
    return tuple(sorted(texts[int(code)] for code in distinct)) if texts else tuple(map(float, distinct))


def codes_of(table: Table, column: int, categories: Sequence[str | float]) -> NDArray[np.float64]:
    """Returns the positions of the values of a column in the categories, (n,).

    The number 2 equals the text "2" and the text "2.0".

    Raises:
        DataError: a value that is not one of the categories. The message names the place.
    """
    values, texts = table.values[:, column], table.labels.get(table.indices[column])
    distinct, places = np.unique(values, return_inverse=True)
    words = [texts[int(value)] if texts else float(value) for value in distinct]
    codes = np.array([code_of(word, categories) for word in words], dtype=np.float64)
    unknown = np.flatnonzero(np.isnan(codes[places]))
    if len(unknown):
        row = int(unknown[0])
        shown = ", ".join(map(category_text, categories[:_MOST_LISTED]))
        more = f" and {len(categories) - _MOST_LISTED} more" if len(categories) > _MOST_LISTED else ""
        raise DataError(
            f"{table.place(row, column)}: the category {category_text(words[int(places[row])])!r} does not occur in "
            f"training ({counted(len(unknown), 'row')} with unknown categories). The categories are {shown}"
            f"{more}. Remove these rows"
        )
    found: NDArray[np.float64] = codes[places]
    return found


def code_of(word: str | float, categories: Sequence[str | float]) -> float:
    """Returns the position of a category, or NaN if it is unknown.

    Example:
        >>> code_of("red", ["blue", "red"]), code_of(2.0, ["1", "2"])
        (1.0, 1.0)
    """
    for code, category in enumerate(categories):
        if word == category or (type(word) is not type(category) and _number(word) == _number(category)):
            return float(code)
    return float("nan")


def _number(word: str | float) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def with_codes(table: Table, column: int, categories: Sequence[str | float]) -> Table:
    """Returns the table with the values of a column replaced by positions in the categories, see `codes_of`."""
    values = table.values.copy()
    values[:, column] = codes_of(table, column, categories)
    labels = {i: texts for i, texts in table.labels.items() if i != table.indices[column]}
    return replace(table, values=values, labels=labels)


def encoded(table: Table, types: Sequence[ColumnType]) -> Table:
    """Returns the table of the samples with the codes of all categorical columns."""
    for i, one in enumerate(types):
        if one.kind == CATEGORICAL:
            table = with_codes(table, i, one.categories)
    return table


# Checks


def check_types(table: Table, types: Sequence[ColumnType], ranges: bool = True) -> None:
    """Checks that the values of a table, or of a block of it, fit their types.

    Args:
        ranges: whether values outside of the range of their type are refused.

    Raises:
        DataError: a value outside of its range, or a value of a column of whole numbers that is not a whole number or
            too large for noise. The message names the place.
    """
    for i, one in enumerate(types):
        column = table.values[:, i]
        odd = np.flatnonzero(((column != np.rint(column)) | (np.abs(column) > MOST_WHOLE)) & one.is_whole)
        if len(odd):
            value = float(column[odd[0]])
            what = "too large" if value == round(value) else "not a whole number"
            raise DataError(
                f"{table.place(int(odd[0]), i)}: {value:.17g} is {what}; the type {one} that data.types gives the "
                f"column needs whole numbers up to {MOST_WHOLE:,}"
            )
        bad = np.flatnonzero(~one.contains(column) & ranges)
        if len(bad):
            value = float(table.values[bad[0], i])
            raise DataError(
                f"{table.place(int(bad[0]), i)}: {value:g} is not in the range of the type {one} that data.types gives "
                f"the column ({counted(len(bad), 'row')}){_advice(one, value)}"
            )


def _advice(one: ColumnType, value: float) -> str:
    if value == 0 and one.kind == POSITIVE:
        return (
            ". A value with a positive probability has no density: remove these rows, or give the type integer if all "
            "values are whole numbers"
        )
    if one.kind in (POSITIVE, INTERVAL, INTEGER):
        return ". Remove these rows, or give the column another type or range"
    return ""


# Hints

# circumferences of common angles, as they are written in the setting
_CIRCLES = (360.0, 2 * math.pi)
# a column looks circular if the first and the last _PART of the circle have _SHARE times the rows of a uniform density
_PART, _SHARE = 0.02, 0.2
# a column looks positive if it has at least this skewness, and its logarithm has less than half of it
_SKEWNESS = 1.5
# a column looks like an interval if a part _NEAR at each end has more than _OFTEN times the rows of a uniform density.
# Most columns that were scaled to [0, 1] have fewer rows there, and other rows can be outside of [0, 1]
_NEAR, _OFTEN = 0.05, 0.5
# smallest number of rows for a hint
_LEAST_ROWS = 50


def hint_of_types(
    table: Table, values: NDArray[np.float64], types: Sequence[ColumnType], skipped: Collection[int]
) -> None:
    """Logs which columns without a type look like they have one, and the option that sets these types.

    The option has at most 12 of these columns, and all columns that have a type.

    Args:
        table: gives the names of the columns.
        values: some training rows, (n, d).
        types: the types of the columns; () if all are real.
        skipped: positions of columns for which no hint is given.
    """
    if len(values) < _LEAST_ROWS:
        return
    found = {
        i: guess
        for i in range(values.shape[1])
        if i not in skipped and (not types or types[i].kind == REAL) and (guess := guessed_type(values[:, i]))
    }
    if found:
        given = {i: str(one) for i, one in enumerate(types) if one.kind != REAL}
        chosen = {**given, **dict(list(found.items())[:_MOST_LISTED])}
        each = [f"{setting_key(table, i)}: {chosen[i]}" for i in sorted(chosen)]
        looks = {POSITIVE: "positive", INTERVAL: "bounded", CIRCULAR: "circular", INTEGER: "integer"}
        words = []
        for kind, look in looks.items():
            names = [table.columns[i] for i, guess in found.items() if guess.partition("(")[0] == kind]
            words += [f"{listed(names)} look{'s' * (len(names) == 1)} {look}"] if names else []
        _log.info(
            f"{table.path}: {', '.join(words)}. If this is so, give the types of columns: "
            f"'data.types={{{', '.join(each)}}}'"
        )


def setting_key(table: Table, column: int) -> str:
    """Returns the key of a column in `data.types`: its name, or its position if the name needs quotes."""
    name = table.columns[column]
    is_plain = re.fullmatch(r"[A-Za-z_]\w*", name) and table.columns.count(name) == 1 and table.named
    return name if is_plain else str(table.indices[column])


def guessed_type(column: NDArray[np.float64]) -> str | None:
    """Returns the type that a column (n,) of real numbers looks like, as in `data.types`; None for a real column.

    Example:
        >>> guessed_type(np.linspace(0, 1, 101)), guessed_type(np.linspace(0, 360, 100, endpoint=False))
        ('interval(0,1)', 'circular(360)')
    """
    low, high = float(column.min()), float(column.max())
    if circle := _circle(column, low, high):
        return circle
    if (column == np.rint(column)).all():
        return INTEGER if len(np.unique(column)) <= len(column) // 20 else None
    ends = ((column <= _NEAR).sum(), (column >= 1 - _NEAR).sum())
    if low >= 0 and high <= 1 and min(ends) > _OFTEN * _NEAR * len(column):
        return "interval(0,1)"
    if low > 0:
        skewness = _skewness(column)
        if skewness > _SKEWNESS and abs(_skewness(np.log(column))) < skewness / 2:
            return POSITIVE
    return None


def _circle(column: NDArray[np.float64], low: float, high: float) -> str | None:
    """Returns the circular type of a column whose values cover a circle of a usual circumference, or None."""
    for period in _CIRCLES:
        for start in (0.0, -period / 2):
            if low < start or high > start + period:
                continue
            turns = (column - start) / period
            ends = ((turns < _PART).mean(), (turns > 1 - _PART).mean())
            if min(ends) >= _SHARE * _PART and high - low > (1 - 2 * _PART) * period:
                return f"circular({period:.16g})"
    return None


def _skewness(column: NDArray[np.float64]) -> float:
    std = float(column.std())
    return float((((column - column.mean()) / std) ** 3).mean()) if std > 0 else 0.0
