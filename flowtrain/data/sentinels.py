"""Detects codes for missing values, such as -999: a number that repeats far outside the rest of its column."""

import logging

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.columns import as_option, counted
from flowtrain.data.read import Table

_log = logging.getLogger("flowtrain")

# usual codes for a missing value: a gap as wide as the range of the rest of the column is enough to detect them
_USUAL = frozenset({-1.0, 0.0} | {s * v for s in (-1.0, 1.0) for v in (9, 99, 999, 9999, 99999, 999999, 32767, 32768)})
# for any other value, the gap must exceed this many times that range
_WIDE = 5.0
# smallest number of distinct values in the rest of a column
_LEAST = 10


def sentinel_of(column: NDArray[np.float64]) -> tuple[float, int] | None:
    """The smallest or largest value of a column (n,) and its count, if it looks like the code of a missing value.

    The value occurs at least twice. Its gap to the next value exceeds the range of the other values, or 5 times that
    range unless the value is a usual code or at least 1e20 in magnitude.

    Example:
        >>> sentinel_of(np.array([-999.0, *np.linspace(1, 2, 20), -999.0]))
        (-999.0, 2)
    """
    for end in (float(column.min()), float(column.max())):
        rest = column[column != end]
        count = len(column) - len(rest)
        if count < 2 or len(rest) < _LEAST:
            continue
        low, high = float(rest.min()), float(rest.max())
        gap = max(low - end, end - high)
        if (
            gap > (high - low) * (1.0 if end in _USUAL or abs(end) >= 1e20 else _WIDE)
            and len(np.unique(rest)) >= _LEAST
        ):
            return end, count
    return None


def warn_of_sentinels(table: Table, values: NDArray[np.float64]) -> dict[int, float]:
    """Warns of columns in which a number seems to stand for missing values.

    Args:
        table: names the columns.
        values: training rows, (n, d).

    Returns:
        The number found in each such column, by column.
    """
    found = {i: code for i in range(values.shape[1]) if (code := sentinel_of(values[:, i])) is not None}
    if not found:
        return {}
    keep = [index for i, index in enumerate(table.indices) if i not in found]
    each = ", ".join(f"{table.columns[i]!r} is {code:g} in {count:,} rows" for i, (code, count) in found.items())
    _log.warning(
        f"{table.path}: of {counted(len(values), 'training row')}, column {each}, far from its other values. If the "
        "number is a code for a missing value, the flow learns a density of the code. Remove these rows from the file"
        + (f", or keep the other columns: {as_option(keep)}" if keep else "")
    )
    return {i: code for i, (code, _) in found.items()}
