"""Context columns: the values c in p(x | c), their description, and the features that networks receive."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.utils.arguments import choose, shortened
from flowtrain.utils.autograd import plain_values
from flowtrain.utils.errors import DataError

REAL, CATEGORICAL = "real", "categorical"
# the largest number of categories that a message lists
MOST_LISTED = 12


@dataclass(frozen=True)
class ContextColumn:
    """A column c of the context in p(x | c), stored in checkpoints.

    The networks of the flow receive features: (c - mean) / std for a real column, and one-hot vectors for a categorical
    column. The first layer of a network multiplies a one-hot vector by a matrix, which is an embedding of the category.

    Attributes:
        name: the name of the column.
        kind: real | categorical. Whole numbers are real.
        mean, std: mean and standard deviation of a real column over the training rows.
        categories: the categories of a categorical column, text or numbers. In tensors, a category is its position in
            this tuple.

    Example:
        >>> column = ContextColumn("colour", "categorical", categories=("blue", "red"))
        >>> mass = ContextColumn("mass", mean=2.0, std=0.5)
        >>> features([column, mass], torch.tensor([[1.0, 3.0]]), torch.float32).tolist()
        [[0.0, 1.0, 2.0]]
    """

    name: str
    kind: str = REAL
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str | float, ...] = ()

    @property
    def size(self) -> int:
        """The number of features."""
        return len(self.categories) if self.kind == CATEGORICAL else 1

    def text(self, value: float) -> str:
        """Returns a value for messages and titles. A category is given by its name."""
        if self.kind == CATEGORICAL:
            category = self.categories[int(value)]
            return category if isinstance(category, str) else f"{category:g}"
        return f"{value:.4g}"


def is_context_column(column: ContextColumn) -> bool:
    """Whether the attributes of a column that was read from a file have the right types and ranges."""
    numbers = (column.mean, column.std)
    real = all(isinstance(v, float | int) and math.isfinite(v) for v in numbers) and column.std > 0
    names = all(isinstance(v, str | float | int) for v in column.categories)
    kinds = column.kind == REAL or (column.kind == CATEGORICAL and len(column.categories) > 0)
    return isinstance(column.name, str) and real and names and kinds


def context_text(columns: Sequence[ContextColumn], values: Sequence[float]) -> str:
    """Returns one context for messages and titles.

    Example:
        >>> colour = ContextColumn("colour", "categorical", categories=("blue", "red"))
        >>> context_text([ContextColumn("mass"), colour], [1.5, 1.0])
        'mass = 1.5, colour = red'
    """
    return ", ".join(f"{column.name} = {column.text(v)}" for column, v in zip(columns, values, strict=True))


def unnamed_context(k: int) -> tuple[ContextColumn, ...]:
    """Returns k real columns without standardization, for a flow that is built by hand."""
    return tuple(ContextColumn(f"c{i}") for i in range(k))


def feature_count(columns: Sequence[ContextColumn]) -> int:
    """Returns the number F of features of a context."""
    return sum(column.size for column in columns)


def example_of(columns: Sequence[ContextColumn]) -> str:
    """Returns an example of one context as a mapping, for commands in messages: the mean, or the first category.

    Example:
        >>> example_of([ContextColumn("mass", mean=1.25), ContextColumn("colour", "categorical", categories=("blue",))])
        '{mass: 1.25, colour: blue}'
    """
    values = (f"{c.mean:.3g}" if c.kind == REAL else c.text(0) for c in columns)
    return "{" + ", ".join(f"{column.name}: {value}" for column, value in zip(columns, values, strict=True)) + "}"


def features(columns: Sequence[ContextColumn], values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the features (B, F) of context values (B, k), in the order of the columns.

    Real columns are standardised in the dtype of `values`, and the result is rounded to `dtype`.
    """
    # numbers of Python, because a tensor of means would be copied to the device in each step
    parts = []
    for column, c in zip(columns, values.unbind(1), strict=True):
        if column.kind == REAL:
            parts.append(((c - column.mean) / column.std).unsqueeze(1))
        else:
            parts.append((c.unsqueeze(1) == torch.arange(column.size, device=c.device)).to(values.dtype))
    return torch.cat(parts, 1).to(dtype)


def context_values(columns: Sequence[ContextColumn], given: Any, n: int, checked: bool = True) -> Tensor:
    """Converts a context to values (n, k), float64.

    Args:
        columns: the description of the k columns.
        given: a tensor or an array (n, k), (k,) for one context for all rows, or (n,) for k = 1; a number for k = 1; a
            mapping or a data frame from names to values or columns. In mappings and in arrays of text, categories are
            given by name. In tensors and in arrays of numbers, they are given by position.
        n: the number of rows.
        checked: whether the values are checked. In training they are not, because they were checked when they were
            read, and a check would wait for the device.

    Raises:
        DataError: columns that are missing or unknown, another number of rows, values that are not finite, or unknown
            categories.

    Example:
        >>> columns = [ContextColumn("mass"), ContextColumn("colour", "categorical", categories=("blue", "red"))]
        >>> context_values(columns, {"mass": 1.5, "colour": ["red", "blue"]}, 2).tolist()
        [[1.5, 1.0], [1.5, 0.0]]
    """
    if isinstance(given, Tensor):
        values = _real(given)
    elif isinstance(given, Mapping) or (hasattr(given, "columns") and hasattr(given, "to_numpy")):
        values = _of_named(columns, given, n)
    else:
        values = torch.from_numpy(_numbers_of(columns, given))
    k = len(columns)
    if values.dim() == 0 or (values.dim() == 1 and (k > 1 or len(values) == 1 != n)):
        values = values.reshape(1, -1)
    elif values.dim() == 1:
        values = values.unsqueeze(1)
    if values.dim() != 2 or values.shape[1] != k or len(values) not in (1, n):
        names = ", ".join(column.name for column in columns)
        raise DataError(
            f"context has shape {tuple(values.shape)}, but this flow needs one context ({k},), or one for each row "
            f"({n}, {k}), with the columns {names}"
        )
    # the values are float64, because float32 does not resolve columns such as times in seconds
    values = values.double().expand(n, k)
    if checked:
        _check(columns, values)
    return values


def _real(values: Tensor) -> Tensor:
    """Returns a tensor after a check that it is not complex, because a conversion would drop the imaginary part."""
    if values.is_complex():
        raise DataError(f"context has dtype {values.dtype}: give real numbers")
    return values


def _of_named(columns: Sequence[ContextColumn], given: Any, n: int) -> Tensor:
    names = list(given) if isinstance(given, Mapping) else list(map(str, given.columns))
    known = [column.name for column in columns]
    unknown = [str(name) for name in names if name not in known]
    # a data frame may have further columns, such as the samples
    if unknown and isinstance(given, Mapping):
        words = choose(unknown[0], known, "the columns are")
        raise DataError(f"context: this flow has no context column {unknown[0]}; {words}")
    missing = [name for name in known if name not in names]
    if missing:
        raise DataError(f"context lacks {', '.join(missing)}; this flow needs {', '.join(known)}")
    found = []
    for column in columns:
        one = given[column.name]
        one = one.to_numpy() if hasattr(one, "to_numpy") else one
        numbers = _real(one).cpu().double() if isinstance(one, Tensor) else torch.from_numpy(_column(column, one))
        if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) not in (1, n)):
            raise DataError(f"context {column.name} has shape {tuple(numbers.shape)}: give one value, or {n}")
        found.append(numbers.reshape(-1).expand(n))
    return torch.stack(found, 1)


def _numbers_of(columns: Sequence[ContextColumn], given: Any) -> NDArray[np.float64]:
    """Converts numbers, or an array of text with one column for each context column, to values."""
    array = np.asarray(given)
    if array.dtype.kind in "biuf":
        return array.astype(np.float64)
    cells = np.asarray(given, dtype=object)
    rows = cells.reshape(-1, 1) if cells.ndim < 2 and len(columns) == 1 else np.atleast_2d(cells)
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise DataError(f"context has shape {cells.shape}: give {len(columns)} columns")
    return np.column_stack([_column(column, rows[:, i]) for i, column in enumerate(columns)])


def _column(column: ContextColumn, given: Any) -> NDArray[np.float64]:
    """Converts the values of one column, () or (n,), to numbers. Categories become their positions."""
    cells = np.asarray(given, dtype=object)
    if column.kind == REAL:
        try:
            return cells.astype(np.float64)
        except (TypeError, ValueError) as e:
            raise DataError(f"context {column.name}={shortened(given)}: give numbers") from e
    flat = [column_code(column, cell) for cell in cells.reshape(-1).tolist()]
    return np.array(flat, dtype=np.float64).reshape(cells.shape)


def column_code(column: ContextColumn, cell: Any) -> int:
    """Returns the position of a category, given by name.

    Raises:
        DataError: an unknown category.
    """
    for code, category in enumerate(column.categories):
        if cell == category or (isinstance(category, str) and str(cell) == category):
            return code
        if isinstance(category, float) and isinstance(cell, str) and _number(cell) == category:
            return code
    raise DataError(f"context {column.name}={shortened(cell)}: {_known(column)}")


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _known(column: ContextColumn) -> str:
    shown = [column.text(i) for i in range(min(len(column.categories), MOST_LISTED))]
    more = len(column.categories) - len(shown)
    return f"the categories in training are {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")


def _check(columns: Sequence[ContextColumn], values: Tensor) -> None:
    # under vmap, the values of all lanes are checked
    # the features of larger numbers are infinite in float32
    largest = torch.finfo(torch.float32).max
    if not bool((plain_values(values).abs() <= largest).all()):
        for one, c in zip(columns, values.unbind(1), strict=True):
            plain = plain_values(c).flatten()
            if len(rows := (~(plain.abs() <= largest)).nonzero()):
                row = int(rows[0])
                raise DataError(
                    f"context {one.name} is {float(plain[row])} in row {row} (from 0): give finite numbers of at most "
                    f"{largest:.1e}"
                )
    for one, c in zip(columns, values.unbind(1), strict=True):
        if one.kind == CATEGORICAL:
            plain = plain_values(c)
            bad = plain[(plain < 0) | (plain >= one.size) | (plain != plain.floor())]
            if len(bad):
                raise DataError(
                    f"context {one.name}={float(bad[0]):g}: categories are positions from 0 to {one.size - 1}; "
                    f"{_known(one)}"
                )
