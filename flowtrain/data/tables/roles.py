"""Columns of a table with another role than the samples: class labels, context and weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.in_memory import Extras
from flowtrain.data.tables.column_types import NO_TYPES, AskedTypes, check_roles
from flowtrain.data.tables.columns import Columns, listed, pick
from flowtrain.data.tables.csv_reader import DETECTED, Chosen, TextFormat
from flowtrain.data.tables.ids import id_position
from flowtrain.data.tables.missing import REFUSED, Missing
from flowtrain.data.tables.table_checks import check_labels, check_weights
from flowtrain.data.tables.table_reader import Table, read_table
from flowtrain.data.types import CATEGORICAL, ColumnType
from flowtrain.utils.errors import ConfigError


@dataclass(frozen=True)
class Roles:
    """The settings `data.label`, `data.context`, `data.weights`, `data.id` and `data.types`.

    Attributes:
        label: name or position of the column of class labels, or None.
        context: names, positions or slices of the context columns, or None.
        weights: name or position of the column of weights, or None.
        signed: whether weights may be negative.
        id: name or position of the column of ids, or None. It is not read with the samples, see `read_ids`, and it may
            also be a column of labels, context or weights.
        types: the types of columns of samples and context.

    Raises:
        ConfigError: both a label and a context.
    """

    label: str | int | None = None
    context: Columns | None = None
    weights: str | int | None = None
    signed: bool = False
    id: str | int | None = None
    types: AskedTypes = NO_TYPES

    def __post_init__(self) -> None:
        if self.label is not None and self.context is not None:
            raise ConfigError(
                f"data.label and data.context exclude each other: omit data.label, and give the column {self.label!r} "
                "in data.context, as a categorical column"
            )

    def pick(self, names: Sequence[str], path: object) -> "RolePositions":
        """Returns the positions of the columns of each role.

        Raises:
            ConfigError: a column that the table does not have or that has two roles, or several columns of labels or
                weights.
        """
        found = []
        for key, wanted, single in (
            ("data.label", self.label, True),
            ("data.context", self.context, False),
            ("data.weights", self.weights, True),
        ):
            indices = [] if wanted is None else pick(wanted, names, path, key)
            if single and len(indices) > 1:
                raise ConfigError(f"{key}={wanted} names {len(indices)} columns of {path}: name one")
            found.append(tuple(indices))
        positions = RolePositions(*found)
        twice = sorted({i for i in positions.all if positions.all.count(i) > 1})
        if twice:
            raise ConfigError(
                f"{listed([names[i] for i in twice])} of {path} has two roles: name each column in only one of "
                "data.label, data.context and data.weights"
            )
        return positions

    def without_ids(self, indices: Sequence[int], names: Sequence[str], path: object) -> list[int]:
        """Returns the positions of the samples' columns without the column of ids.

        Raises:
            ConfigError: a column of ids that the table does not have, or no column is left.
        """
        of_ids = None if self.id is None else id_position(self.id, names, path)
        left = [i for i in indices if i != of_ids]
        if not left:
            raise ConfigError(f"data.id={self.id} is the only column of {path}: there are no columns for samples")
        return left


class RolePositions(NamedTuple):
    """The positions of the columns of each role in a file; () for a role that is not used."""

    label: tuple[int, ...]
    context: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """All positions."""
        return self.label + self.context + self.weights

    @property
    def settings(self) -> dict[int, str]:
        """The setting that names each column, by its position."""
        return {i: f"data.{role}" for role, indices in zip(self._fields, self, strict=True) for i in indices}


@dataclass(frozen=True)
class RoleTables:
    """A table that is divided by the roles of its columns.

    Attributes:
        samples: the columns of the samples.
        label, context, weights: the columns of these roles, or None.
        signed: whether weights may be negative.
        types: the types that the user has given to columns, by the positions of the columns in the file.
    """

    samples: Table
    label: Table | None = None
    context: Table | None = None
    weights: Table | None = None
    signed: bool = False
    types: Mapping[int, ColumnType] = field(default_factory=dict)

    @property
    def others(self) -> dict[str, Table]:
        """The tables of the roles other than samples, by the name of the role."""
        named = {"label": self.label, "context": self.context, "weights": self.weights}
        return {name: table for name, table in named.items() if table is not None}

    @property
    def other_values(self) -> NDArray[np.float64] | None:
        """The values of all columns that are not samples, (n, k), or None."""
        others = [table.values for table in self.others.values()]
        return np.column_stack(others) if others else None

    def map(self, function: Callable[[Table], Table]) -> "RoleTables":
        """Applies a function to each table."""
        others = {k: function(t) for k, t in self.others.items()}
        return RoleTables(function(self.samples), signed=self.signed, types=self.types, **others)

    def types_of(self, table: Table) -> tuple[ColumnType, ...]:
        """Returns the type of each column of a table. A context column with text is categorical."""
        found = []
        for index in table.indices:
            default = ColumnType(CATEGORICAL) if index in table.labels else ColumnType()
            found.append(self.types.get(index, default))
        return tuple(found)

    def check(self) -> None:
        """Checks labels and weights.

        Raises:
            DataError: labels that are not 0, 1, 2, ..., or weights that `check_weights` refuses.
        """
        if self.label is not None:
            check_labels(self.label)
        if self.weights is not None:
            check_weights(self.weights, self.signed)

    def extras(self, rows: Any = slice(None)) -> Extras:
        """Returns the values of some rows."""

        def tensor(table: Table | None, dtype: type[np.generic]) -> Tensor | None:
            return None if table is None else torch.from_numpy(table.values[rows].astype(dtype))

        label, weights = tensor(self.label, np.int64), tensor(self.weights, np.float64)
        return Extras(
            None if label is None else label.reshape(-1),
            tensor(self.context, np.float64),
            None if weights is None else weights.reshape(-1),
        )


def read_roles(
    path: str | Table,
    key: str | None,
    columns: Columns | None,
    roles: Roles,
    text_format: TextFormat = DETECTED,
    missing: Missing = REFUSED,
) -> RoleTables:
    """Reads a table and divides its columns by role; see `read_table` for the arguments.

    If `columns` names a column that has another role, it is not part of the samples.

    Raises:
        ConfigError: see `Roles.pick`; or no column is left for the samples.
    """
    source = path.path if isinstance(path, Table) else path
    positions, types = RolePositions((), (), ()), dict[int, ColumnType]()

    def choose(names: Sequence[str], left_out: Sequence[int]) -> Chosen:
        nonlocal positions, types
        positions = roles.pick(names, source)
        indices = roles.without_ids(pick(columns, names, source, left_out=left_out), names, source)
        indices = [*indices, *(i for i in positions.all if i not in indices)]
        types = picked_types(roles, names, source, positions, indices)
        text = [i for i in indices if i in types and types[i].kind == CATEGORICAL]
        text += [i for i in positions.context if i not in types]
        return Chosen(indices, text, positions.settings)

    table = read_table(path, key, choose, text_format=text_format, missing=missing)
    # a table in memory may be part of another table, with other positions
    moved = {path.indices[i]: one for i, one in types.items()} if isinstance(path, Table) else types
    places = [tuple(path.indices[i] for i in each) for each in positions] if isinstance(path, Table) else positions
    return divided(table, RolePositions(*places), roles, moved)


def picked_types(
    roles: Roles, names: Sequence[str], path: object, positions: RolePositions, indices: Sequence[int]
) -> dict[int, ColumnType]:
    """Returns the types that `data.types` gives to columns, by their positions in the file.

    Args:
        indices: the positions of the columns that are read.

    Raises:
        ConfigError: a column that the file does not have or that is not read, or a type that its role does not allow.
    """
    types = roles.types.pick(names, path)
    check_roles(types, names, positions.context, positions.label + positions.weights)
    unused = [names[i] for i in types if i not in indices]
    if unused:
        raise ConfigError(f"data.types: data.columns does not keep {listed(unused)}: omit the type, or keep the column")
    return types


def divided(
    table: Table, positions: RolePositions, roles: Roles, types: Mapping[int, ColumnType] | None = None
) -> RoleTables:
    """Divides a table by the roles of its columns.

    Args:
        types: the types of columns by their positions in the file.

    Raises:
        ConfigError: no column is left for the samples.
    """

    def only(indices: tuple[int, ...]) -> Table | None:
        return table.only([table.indices.index(i) for i in indices]) if indices else None

    samples = table.only([i for i, index in enumerate(table.indices) if index not in positions.all])
    if not samples.columns:
        keys = [f"data.{name}" for name, indices in zip(RolePositions._fields, positions, strict=True) if indices]
        raise ConfigError(f"{' and '.join(keys)} name all columns of {table.path}: there are no columns for samples")
    label, context, weights = (only(indices) for indices in positions)
    return RoleTables(samples, label, context, weights, roles.signed, types or {})
