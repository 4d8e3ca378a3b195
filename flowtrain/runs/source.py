"""The data arguments of `flowtrain.runs.fit`: converts rows in memory, files and data sets to settings and tables."""

import logging
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flowtrain.data.base import Dataset
from flowtrain.data.tables.from_memory import (
    column_names,
    date_columns,
    event_shape_of,
    is_frame,
    refuse_dates,
    table_of,
    table_with,
    with_columns,
)
from flowtrain.data.tables.missing import missing_of
from flowtrain.data.tables.table_reader import Table
from flowtrain.runs.compose import options, read_yaml, values_of, with_quoted_types
from flowtrain.utils.arguments import choose, path_of, shortened
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.files import config_dir
from flowtrain.utils.formatting import flattened

log = logging.getLogger("flowtrain")

# the roles of columns that are not part of a sample, in the order in which arrays are appended to the rows
ROLES = ("label", "context", "weights")
# the key of the rows in the mapping of a held-out set
ROWS = "x"


@dataclass(frozen=True)
class Source:
    """The data of a fit.

    Attributes:
        settings: the choice of the data and its keys.
        tables: tables in memory, by the keys of the data that they replace.
        data: a data set that the caller has built, or None.
        labelled: whether the caller has given labels.
    """

    settings: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    data: Dataset | None = None
    labelled: bool = False

    @property
    def held_keys(self) -> list[str]:
        """The keys of the data whose files are replaced by tables in memory."""
        return [f"data.{key}" for key in self.tables]


def source_of(
    x: Any,
    roles: Mapping[str, Any] | None = None,
    val: Any = None,
    test: Any = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> Source:
    """Converts the data arguments of `fit`. Only the overrides `data.na` and `data.columns` are used.

    Args:
        roles: the arguments label, context and weights.

    Raises:
        ConfigError: a name that is neither a data set nor a file, or incompatible arguments.
        DataError: rows that are not a table of numbers.
    """
    roles = {role: plain(given) for role, given in (roles or {}).items() if given is not None}
    if {"label", "context"} <= roles.keys():
        raise ConfigError(
            "label and context exclude each other: give one of them. A label can be a categorical column of the context"
        )
    if not isinstance(x, str | Path | Dataset):
        keys = flattened(as_mapping(overrides))
        na = missing_of(None, keys.get("data.na")).texts
        return _in_memory(x, roles, val, test, na, picked=keys.get("data.columns") is not None)
    for name, given in (("val", val), ("test", test)):
        if given is not None:
            raise ConfigError(f"{name}: only for rows in memory; {_by_overrides(x, name)}")
    named = not isinstance(x, Dataset) and str(x) in options("data", [config_dir()])
    if isinstance(x, Dataset) or named:
        label = roles.pop("label", None)
        if label is not None and label is not True:
            raise ConfigError("label: this data set contains labels; give label=True to use them")
        if roles:
            raise ConfigError(f"{next(iter(roles))}: only for rows in memory and for files, not for a data set")
        chosen = _settings_of(x) if isinstance(x, Dataset) else {"data": str(x)}
        return Source(chosen, data=x if isinstance(x, Dataset) else None, labelled=label is True)
    path = path_of("x", x)
    if not path.is_file():
        names = choose(str(x), options("data", [config_dir()]), "the data sets are")
        raise ConfigError(f"x={str(x)!r}: no data set and no file has this name; {names}")
    settings: dict[str, Any] = {"data": "array", "data.path": str(path.absolute())}
    for role, given in roles.items():
        if not _is_column(given) and not (role == "context" and _is_columns(given)):
            several = "names or the positions of its context columns" if role == "context" else "name or the position"
            of_role = "" if role == "context" else f" of its column of {'labels' if role == 'label' else role}"
            raise ConfigError(f"{role}: for a file, give the {several}{of_role}")
        settings[f"data.{role}"] = list(given) if isinstance(given, list | tuple) else given
    return Source(settings, labelled="label" in roles)


def _by_overrides(x: Any, name: str) -> str:
    if isinstance(x, Dataset):
        return "a Dataset contains its held-out sets"
    return f"for data by name or path, give overrides={{'data.{name}_path': FILE}}"


def _settings_of(data: Dataset) -> dict[str, Any]:
    """Returns settings for the caller's data set: the config of its class, or defaults for finite or endless data."""
    target = f"{type(data).__module__}.{type(data).__qualname__}"
    folders = [config_dir()]
    named = (
        name for name in options("data", folders) if values_of("data", name, folders)["data"]["_target_"] == target
    )
    endless = {"data": "moons", "recipe": "none"}
    return {"data": found} if (found := next(named, None)) else endless if data.n_train is None else {"data": "array"}


def _in_memory(
    x: Any, roles: Mapping[str, Any], val: Any, test: Any, na: Collection[str], picked: bool = False
) -> Source:
    """Converts rows in memory to tables that replace the files of data=array.

    Args:
        na: text that counts as missing.
        picked: whether data.columns selects columns. The others may then contain dates.
    """
    settings: dict[str, Any] = {"data": "array"}
    dates = date_columns(x) if picked and is_frame(x) else {}
    rows = extended = table_of(x, "x", na, dates_as_text=picked)
    layout: dict[str, tuple[str, ...]] = {}
    for role in ROLES:
        given = roles.get(role)
        if given is None:
            continue
        if isinstance(given, bool):
            raise ConfigError(f"{role}={given}: for rows in memory, give an array, or the name or position of a column")
        if _is_column(given) or (role == "context" and _is_columns(given) and len(given) != len(rows.values)):
            chosen = given if isinstance(given, list | tuple) else [given]
            refuse_dates({column: dates[column] for column in chosen if column in dates}, role)
            settings[f"data.{role}"] = _in_frame(given, x)
            continue
        if isinstance(given, Mapping) and not is_frame(given):
            raise DataError(f"{role}: give an array with one row for each row of x, or a data frame, not a mapping")
        before = len(extended.columns)
        extended = with_columns(extended, given, role, _names(role, given, x, before), na)
        layout[role] = extended.columns[before:]
        # if x has no column names, labels and weights are given by position
        added = list(layout[role]) if role == "context" or is_frame(x) else [before]
        settings[f"data.{role}"] = added if role == "context" else added[0]
    event_shape = event_shape_of(x)
    if event_shape is not None:
        settings["data.event_shape"] = event_shape
        if event_shape[-1] in (1, 3, 4) and event_shape[0] > event_shape[-1]:
            log.warning(
                f"x has images of shape {tuple(event_shape)}, read as {event_shape[0]} channels. If the channels are "
                "last, give x.transpose(0, 3, 1, 2)"
            )
    tables = {"path": extended}
    for key, given in (("val", plain(val)), ("test", plain(test))):
        if isinstance(given, int | float):
            settings[f"data.{key}_fraction"] = given
        elif given is not None:
            parts, arrays = _parts(key, given, list(layout))
            held = _held_out(key, parts, rows, event_shape, is_frame(x), na, picked)
            for role, columns in layout.items():
                held = with_columns(held, arrays[role], f"{role} of {key}", columns, na)
            # the data set refuses another number of columns
            alike = len(held.columns) == len(extended.columns)
            tables[f"{key}_path"] = replace(held, indices=extended.indices) if alike else held
    return Source(settings, tables, labelled="label" in roles)


def _is_column(given: Any) -> bool:
    """Whether an argument is the name or the position of a column."""
    return isinstance(given, str | int) and not isinstance(given, bool)


def _is_columns(given: Any) -> bool:
    """Whether an argument is a list of names and positions of columns."""
    return isinstance(given, list | tuple) and len(given) > 0 and all(map(_is_column, given))


def _in_frame(given: Any, x: Any) -> Any:
    """Converts names and positions of columns: a number that is a name in the data frame x becomes its position."""
    if isinstance(given, list | tuple):
        return [_in_frame(each, x) for each in given]
    names = list(x.columns) if is_frame(x) and not isinstance(given, str) else []
    return names.index(given) if given in names else given


def _names(role: str, given: Any, x: Any, before: int) -> tuple[str, ...] | None:
    """Returns the names of columns that are appended to x; None for the names of a data frame.

    Args:
        before: the number of columns before them.
    """
    taken = column_names(x) if is_frame(x) else ()
    if role == "context":
        if is_frame(given):
            return None
        shape: tuple[int, ...] = np.shape(given)
        name = getattr(given, "name", None)
        names = [name] if isinstance(name, str) else []
        names = names or [f"context_{i}" for i in range(shape[1] if len(shape) > 1 else 1)]
        return tuple(name if name not in taken else f"_{name}" for name in names)
    if not taken:
        # a column without a name
        return (f"c{before}",)
    words = ("label", "class_label", "_label") if role == "label" else ("weights", "row_weights", "_weights")
    return (next(name for name in words if name not in taken),)


def _parts(key: str, given: Any, roles: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Returns the rows of a held-out set, and its arrays by role.

    Args:
        key: val or test.
        given: the argument `val` or `test` of `fit`.
        roles: the roles that x has as arrays.

    Raises:
        ConfigError: neither rows nor a share.
        DataError: other arrays than for x.
    """
    if isinstance(given, str | Path | Dataset):
        raise ConfigError(f"{key}={shortened(given)}: give rows like x, (rows, labels), or the share to hold out")
    if isinstance(given, Mapping) and not is_frame(given):
        found = {name: one for name, one in given.items() if one is not None and name != ROWS}
        rows = given.get(ROWS)
    elif isinstance(given, tuple) and len(given) == 2:
        rows, found = given[0], {roles[0] if len(roles) == 1 else "": given[1]}
    else:
        rows, found = given, {}
    if rows is None or set(found) != set(roles):
        words = {0: "rows alone", 1: f"(rows, {''.join(roles)})"}
        example = "{'x': rows, " + ", ".join(f"'{role}': {role}" for role in roles) + "}"
        raise DataError(f"{key}: give {words.get(len(roles), example)}, like x")
    return rows, found


def _held_out(
    key: str,
    rows: Any,
    table: Table,
    event_shape: list[int] | None,
    is_named: bool,
    na: Collection[str],
    picked: bool,
) -> Table:
    """Returns the table of a held-out set, with the columns of the table of x.

    Args:
        key: val or test.
        rows: the rows.
        table: the table of x.
        event_shape: the shape of the images of x; None for vectors.
        is_named: whether x is a data frame.
        na: text that counts as missing.
        picked: whether data.columns selects columns. The others may then contain dates.
    """
    if is_frame(rows) and is_named and column_names(rows) != table.columns:
        return table_with(rows, table.columns, key, na, picked)
    held = table_of(rows, key, na, picked)
    shape = event_shape_of(rows)
    if shape not in (None, event_shape):
        raise DataError(f"{key} has images of shape {shape}, but x has {event_shape or 'vectors'}")
    if is_named and len(held.columns) == len(table.columns):
        return replace(held, columns=table.columns)
    return held


def plain(value: Any) -> Any:
    """Converts a NumPy or torch number, or an array of rank 0, to a Python number. Other values are not changed."""
    scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    found = value.item() if scalar else value
    return found if isinstance(found, numbers.Real) else value


def as_mapping(overrides: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Returns overrides by their keys, from a mapping or a list of KEY=VALUE.

    Raises:
        ConfigError: an entry of a list that is not KEY=VALUE.
    """
    if overrides is None or isinstance(overrides, Mapping):
        return dict(overrides or {})
    if not isinstance(overrides, Iterable):
        raise ConfigError(f"overrides={shortened(overrides)}: give a mapping, or a list of KEY=VALUE")
    found = {}
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = str(override).partition("=")
        if not equals:
            raise ConfigError(f"overrides: {override!r}: give KEY=VALUE")
        found[key] = read_yaml(with_quoted_types(key, value))
    return found
