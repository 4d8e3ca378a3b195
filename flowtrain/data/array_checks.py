"""What a table must be before a density in float32 can be fitted to it; what is refused is a DataError."""

import logging
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.columns import as_option, counted, listed
from flowtrain.data.read import Table
from flowtrain.errors import DataError

_log = logging.getLogger("flowtrain")

_FLOAT32, _FLOAT64 = np.finfo(np.float32), np.finfo(np.float64)
_MOST_CLASSES = 10_000
# from here on, float32 has no room for noise between whole numbers
_MOST_WHOLE = 2**23


def check_alike(first: Table, other: Table) -> None:
    """Refuse files whose columns differ in number, or in name where both have names."""
    if len(first.columns) != len(other.columns):
        raise DataError(
            f"{first.path} has {counted(len(first.columns), 'column')} and {other.path} has {len(other.columns)}; "
            "they must have the same"
        )
    if not (first.named and other.named) or first.columns == other.columns:
        return
    i = next(i for i, pair in enumerate(zip(first.columns, other.columns, strict=True)) if pair[0] != pair[1])
    what = "in another order" if sorted(first.columns) == sorted(other.columns) else "under other names"
    raise DataError(
        f"{other.path} has the columns {what}: column {i} is {other.columns[i]!r}, and {first.columns[i]!r} in "
        f"{first.path}"
    )


def check_range(table: Table) -> None:
    """Refuse values that float32 turns into infinity."""
    bad = np.abs(table.values) > float(_FLOAT32.max)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{table.place(row, column)}: {table.values[row, column]:g} is beyond float32 "
            f"({_FLOAT32.max:.1e}); scale the column down"
        )


def check_whole(table: Table) -> None:
    """Refuse values that are not whole numbers, or too large for noise in [0, 1) to be told apart on them."""
    bad = (table.values != np.rint(table.values)) | (np.abs(table.values) > _MOST_WHOLE)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = table.values[row, column]
        what = "too large" if value == np.rint(value) else "not a whole number"
        raise DataError(
            f"{table.place(row, column)}: {value:.17g} is {what}; data.dequantize=true and data.levels are for whole "
            f"numbers up to {_MOST_WHOLE:,}: leave them out, or choose data.columns"
        )


def check_levels(table: Table, levels: int, whole: Iterable[Table] | None = None) -> None:
    """Refuse whole numbers outside 0 .. levels - 1.

    Args:
        whole: all the blocks of the file that the table is one of; None where it is all there is.
    """
    bad = (table.values < 0) | (table.values >= levels)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        ends = [(block.values.min(), block.values.max()) for block in whole or [table]]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        raise DataError(
            f"{table.place(row, column)}: {table.values[row, column]:g} is outside 0 to {levels - 1}, which "
            f"data.levels={levels} promises; the values go from {low:g} to {high:g}"
        )


def check_labels(table: Table) -> None:
    """Refuse labels that are not 0, 1, 2, ..."""
    values = table.values
    bad = (values != np.rint(values)) | (values < 0) | (values >= _MOST_CLASSES)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise DataError(
            f"{table.place(row, 0)}: {values[row, 0]:g} is no label; data.label names a column of whole numbers from 0 "
            f"to the number of classes less one, at most {_MOST_CLASSES - 1}"
        )


def check_spread(
    table: Table, mean: NDArray[np.float64], std: NDArray[np.float64], discrete: bool, centered: bool = False
) -> None:
    """Refuse columns that are constant, and warn of those that float32 makes coarse.

    Args:
        table: names the columns.
        mean, std: of the training rows, shape (d,).
        discrete: whether noise will be added, so that it is no cure to propose.
        centered: whether columns with a large mean are kept in float64, and only its precision limits them.
    """
    precision = _FLOAT64 if centered else _FLOAT32
    # Rounding leaves a deviation of about float64's epsilon in a constant column, hence no test for zero alone
    flat = std <= np.maximum(64 * float(_FLOAT64.eps) * np.abs(mean), float(_FLOAT32.tiny))
    if not centered:
        flat |= std <= 8 * float(_FLOAT32.eps) * np.abs(mean)
    if flat.any():
        names = [name for name, is_flat in zip(table.columns, flat, strict=True) if is_flat]
        keep = [index for index, is_flat in zip(table.indices, flat, strict=True) if not is_flat]
        cure = f"keep the others with {as_option(keep)}" if keep else "there are no others"
        raise DataError(
            f"{table.path}: in the training rows, column{'s' * (len(names) > 1)} {listed(names, most=50)} "
            f"{'is' if len(names) == 1 else 'are'} constant to the precision of {precision.dtype}; {cure}"
            + ("" if discrete else ", or, for counts and pixels, data.dequantize=true keeps every column")
        )
    # an offset is one that float32 holds, and what is left of the mean beside it is float32
    coarse = std < (2**18 * float(_FLOAT64.eps) if centered else 1e-4) * np.abs(mean)
    if coarse.any():
        names = [name for name, is_coarse in zip(table.columns, coarse, strict=True) if is_coarse]
        _log.warning(
            f"{table.path}: {precision.dtype} loses digits of {listed(names)}, whose values differ too little for the "
            "size of their mean; subtract the mean from the file"
        )


def warn_if_discrete(table: Table, values: NDArray[np.float64]) -> None:
    """Warn of whole numbers that repeat: a flow can put ever more density on them."""
    sample = values[:10_000]
    whole = np.flatnonzero((sample == np.rint(sample)).all(0))
    names = [table.columns[i] for i in whole if 2 * len(np.unique(sample[:, i])) <= len(sample)]
    if names:
        _log.warning(
            f"{table.path} looks discrete in {listed(names)}: the density of discrete data is unbounded, and "
            "the likelihood means little; data.dequantize=true adds uniform noise"
        )
