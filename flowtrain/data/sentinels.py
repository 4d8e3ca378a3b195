"""Numbers that stand for missing values, such as -999: found where they repeat far outside the rest of a column."""

import logging

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.columns import as_option, counted
from flowtrain.data.read import Table

_log = logging.getLogger("flowtrain")

# what programs and people write for a missing value, next to which a gap as wide as the rest of the column is telling
_USUAL = frozenset({-1.0, 0.0} | {s * v for s in (-1.0, 1.0) for v in (9, 99, 999, 9999, 99999, 999999, 32767, 32768)})
# of any other value, the gap has to be so many times as wide
_WIDE = 5.0
# distinct values that the rest of a column needs to have a width
_LEAST = 10


def sentinel_of(column: NDArray[np.float64]) -> tuple[float, int] | None:
    """The smallest or largest value of a column (n,) and its count, if it looks like the code of a missing value.

    It repeats, and the gap to the next value is wider than all the others are apart.

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
        That number by column.
    """
    found = {i: code for i in range(values.shape[1]) if (code := sentinel_of(values[:, i])) is not None}
    if not found:
        return {}
    keep = [index for i, index in enumerate(table.indices) if i not in found]
    each = ", ".join(f"{table.columns[i]!r} is {code:g} in {count:,} rows" for i, (code, count) in found.items())
    _log.warning(
        f"{table.path}: of {counted(len(values), 'training row')}, column {each}, far from its other values: if that "
        "stands for a missing value, the density of a number that means nothing is learned. Take these rows out of the "
        "file" + (f", or keep the other columns: {as_option(keep)}" if keep else "")
    )
    return {i: code for i, (code, _) in found.items()}
