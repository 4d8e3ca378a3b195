"""Checks that a density can be fitted to a table in float32. Unusable tables raise DataError."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.tables.columns import as_option, first_of, listed
from flowtrain.data.tables.table_reader import Table, drop_option
from flowtrain.data.types import ColumnType
from flowtrain.utils.errors import DataError
from flowtrain.utils.formatting import as_ranges, counted

_log = logging.getLogger("flowtrain")

# Common codes for missing values. A common code is detected if its gap to the other values exceeds their range
_USUAL_SENTINELS = frozenset(
    {-1.0, 0.0} | {s * v for s in (-1.0, 1.0) for v in (9, 99, 999, 9999, 99999, 999999, 32767, 32768)}
)
# Any other code is detected if the gap exceeds this many times the range of the other values
_WIDE_GAP = 5.0
# Smallest number of other rows, and of distinct values in these rows
_LEAST_OTHERS = 10
# A common code inside the range of a real column is detected if more than this fraction of the rows, and at least
# _LEAST_CODES rows, have it
_CODE_SHARE, _LEAST_CODES = 0.01, 5


def sentinel_of(column: NDArray[np.float64]) -> tuple[float, int] | None:
    """Detects a code for missing values in a column (n,). Returns the code and the number of its rows, or None.

    The code is the smallest or the largest value and occurs at least twice. For common codes and for values of at least
    1e20 in magnitude, the gap to the next value exceeds the range of the other values. For any other value, the gap
    exceeds 5 times that range. Or it is a common code other than 0 inside the range of a column of real numbers, and
    more than 1% of the rows have it.

    Example:
        >>> sentinel_of(np.array([-999.0, *np.linspace(1, 2, 20), -999.0]))
        (-999.0, 2)
    """
    for end in (float(column.min()), float(column.max())):
        rest = column[column != end]
        count = len(column) - len(rest)
        if count < 2 or len(rest) < _LEAST_OTHERS:
            continue
        low, high = float(rest.min()), float(rest.max())
        gap = max(low - end, end - high)
        if (
            gap > (high - low) * (1.0 if end in _USUAL_SENTINELS or abs(end) >= 1e20 else _WIDE_GAP)
            and len(np.unique(rest)) >= _LEAST_OTHERS
        ):
            return end, count
    return _inner_sentinel(column)


def _inner_sentinel(column: NDArray[np.float64]) -> tuple[float, int] | None:
    """Detects a common code inside the range of a column (n,) of real numbers: the most frequent value, not 0.

    The other values must be mostly distinct and not whole numbers, so that the code cannot be one of them by chance. A
    code at the end of the range must be apart from the other values, because values may be clipped there.
    """
    some = column[:_REPEATS_ROWS]
    n = len(some)
    distinct, counts = np.unique(some, return_counts=True)
    code, count = float(distinct[counts.argmax()]), int(counts.max())
    if code == 0 or code not in _USUAL_SENTINELS or count <= max(_CODE_SHARE * n, _LEAST_CODES - 1):
        return None
    rest = distinct[distinct != code]
    if len(rest) < _LEAST_OTHERS or (code < rest[0] and not _apart(rest - code)):
        return None
    if code > rest[-1] and not _apart(code - rest[::-1]):
        return None
    is_real = 2 * len(rest) > n - count and float(np.mean(rest == np.rint(rest))) < _CODE_SHARE
    return (code, int((column == code).sum())) if is_real else None


def _apart(distances: NDArray[np.float64]) -> bool:
    """Whether the first of ascending distances (n,) is large compared with the gaps between the next ones."""
    return float(distances[0]) > 10 * float(np.median(np.diff(distances[:20])))


def warn_of_sentinels(table: Table, values: NDArray[np.float64], in_blocks: bool = False) -> dict[int, float]:
    """Warns of columns in which a number seems to stand for missing values.

    Args:
        table: gives the names of the columns.
        values: training rows, (n, d).
        in_blocks: whether the file is read in blocks.

    Returns:
        The code of each such column, by the position of the column.
    """
    found = {i: code for i in range(values.shape[1]) if (code := sentinel_of(values[:, i])) is not None}
    if not found:
        return {}
    keep = [index for i, index in enumerate(table.indices) if i not in found]
    na = f"[{','.join(sorted({f'{code:.17g}' for code, _ in found.values()}))}]"
    each = ", ".join(f"{table.columns[i]!r} is {code:g} in {count:,} rows" for i, (code, count) in found.items())
    _log.warning(
        f"{table.path}: column {each} (of {counted(len(values), 'training row')}), unlike the other values of the "
        "column. If this is a code for a missing value, the flow learns the density of the code. Leave out these rows "
        f"with {drop_option(na, in_blocks)}" + (f", or keep the other columns: {as_option(keep)}" if keep else "")
    )
    return {i: code for i, (code, _) in found.items()}


_FLOAT32, _FLOAT64 = np.finfo(np.float32), np.finfo(np.float64)
_MOST_CLASSES = 10_000
# categories of a context column have at least this number of training rows on average
_FEW_ROWS = 5
# float64 represents sums of squares of weights up to this one, and of their inverses
_LARGEST_WEIGHT = 1e100
# The other rows have no weight if one row has at least 1 - _ROUNDING of it
_ROUNDING = 1e-12
# Above this value, float32 has no numbers between whole numbers, so noise in [0, 1) is lost
MOST_WHOLE = 2**23
# Largest number of rows that are checked for repeated values
_REPEATS_ROWS = 10_000
# Largest number of rows and of columns that are checked for linear dependence
_DEPENDENCE_ROWS, _DEPENDENCE_COLUMNS = 100_000, 500
# A value is an atom if at least this fraction of the rows, and at least this number of rows, have the value
_ATOM, _LEAST_ATOM = 0.05, 5
# A warning is given if at least this fraction of the rows of a held-out set are copies of training rows
_COPIES = 0.01
# A column depends linearly on others if they explain its variance up to this fraction. Rounding to four digits leaves
# 1e-9
_RESIDUAL = 1e-8
# Largest number of dependent columns, or of single values, that a warning lists
_MOST_NAMED = 5


def check_same_columns(first: Table, other: Table) -> None:
    """Raises DataError if two tables differ in the number of columns, or in the column names if both have names."""
    if len(first.columns) != len(other.columns):
        raise DataError(
            f"{first.path} has {counted(len(first.columns), 'column')}, but {other.path} has {len(other.columns)}; the "
            "files must have the same columns"
        )
    if not (first.named and other.named) or first.columns == other.columns:
        return
    i = next(i for i, pair in enumerate(zip(first.columns, other.columns, strict=True)) if pair[0] != pair[1])
    what = "in another order" if sorted(first.columns) == sorted(other.columns) else "under other names"
    raise DataError(
        f"{other.path} has the columns {what}: column {i} is {other.columns[i]!r}, but in {first.path} it is "
        f"{first.columns[i]!r}; make the columns of both files the same"
    )


def check_range(table: Table) -> None:
    """Raises DataError if a value exceeds the range of float32."""
    bad = np.abs(table.values) > float(_FLOAT32.max)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{table.place(row, column)}: {table.values[row, column]:g} is beyond float32 "
            f"({_FLOAT32.max:.1e}); scale the column down"
        )


def check_whole(table: Table, columns: Sequence[int], blocks: Iterable[Table] | None = None) -> None:
    """Raises DataError if values are not whole numbers, or so large that float32 cannot add noise in [0, 1).

    Args:
        table: a file or a block of a file.
        columns: the columns that must be whole numbers.
        blocks: all blocks of the file. None if `table` is the whole file.
    """
    values = table.values[:, list(columns)]
    bad = (values != np.rint(values)) | (np.abs(values) > MOST_WHOLE)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = values[row, column]
        what = "too large" if value == np.rint(value) else "not a whole number"
        counts = np.flatnonzero(np.all([whole_columns(block.values) for block in blocks or [table]], axis=0))
        some = f", name the columns of whole numbers, as in {_dequantize(table, counts)}" if len(counts) else ""
        raise DataError(
            f"{table.place(row, columns[column])}: {value:.17g} is {what}; data.dequantize and data.levels need "
            f"whole numbers up to {MOST_WHOLE:,}: omit them{some}, or choose other columns with data.columns"
        )


def check_levels(table: Table, levels: int, blocks: Iterable[Table] | None = None) -> None:
    """Raises DataError if whole numbers are outside 0 .. levels - 1.

    Args:
        table: a file or a block of a file.
        levels: the number of allowed values.
        blocks: all blocks of the file. None if `table` is the whole file.
    """
    bad = (table.values < 0) | (table.values >= levels)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        ends = [(block.values.min(), block.values.max()) for block in blocks or [table]]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        raise DataError(
            f"{table.place(row, column)}: {table.values[row, column]:g} is outside 0 to {levels - 1}, the range that "
            f"data.levels={levels} sets; the values of the file go from {low:g} to {high:g}"
        )


def check_labels(table: Table) -> None:
    """Raises DataError if labels are not 0, 1, 2, ..."""
    values = table.values
    bad = (values != np.rint(values)) | (values < 0) | (values >= _MOST_CLASSES)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise DataError(
            f"{table.place(row, 0)}: {values[row, 0]:g} is not a class label; number the classes 0, 1, 2, ..., up to "
            f"{_MOST_CLASSES - 1}"
        )


def check_weight_sizes(weights: NDArray[np.float64], place: Callable[[int], str]) -> None:
    """Checks that float64 represents the squares of weights (n,) and their sums.

    Args:
        place: names the place of a row, for messages.

    Raises:
        DataError: a weight other than 0 that is too small or too large.
    """
    size = np.abs(weights)
    bad = (size > _LARGEST_WEIGHT) | ((size > 0) & (size < 1 / _LARGEST_WEIGHT))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{place(row)}: the weight {weights[row]:g} is not between {1 / _LARGEST_WEIGHT:g} and "
            f"{_LARGEST_WEIGHT:g}. Only the ratios of weights matter: multiply all weights by one factor"
        )


def check_weights(table: Table, signed: bool) -> None:
    """Checks the weights of the rows of a file, or of a block of a file.

    Raises:
        DataError: negative weights without `data.signed_weights`, or weights whose squares float64 cannot represent.
    """
    check_weight_sizes(table.values[:, 0], lambda row: table.place(row, 0))
    bad = table.values < 0
    if bad.any() and not signed:
        row = int(np.argwhere(bad)[0][0])
        raise DataError(
            f"{table.place(row, 0)}: the weight {table.values[row, 0]:g} is negative ({int(bad.sum()):,} of "
            f"{counted(len(bad), 'row')}). If negative weights are meant, give data.signed_weights=true"
        )


def check_mean_weight(path: str, mean: float) -> float:
    """Returns the mean weight of the training rows of a file if it is positive.

    Raises:
        DataError: the mean is not positive.
    """
    if mean <= 0:
        raise DataError(
            f"{path}: the weights of the training rows have the mean {mean:g}, but it must be positive: check the "
            "column that data.weights names"
        )
    return mean


def check_several_weighted(path: str, weights: NDArray[np.float64]) -> None:
    """Checks that not all weight of some training rows (n,) is on one row, if there are several.

    Raises:
        DataError: the other rows have no weight, up to rounding.
    """
    size = np.abs(weights)
    if len(size) > 1 and 0 < (1 - _ROUNDING) * size.sum() <= size.max():
        raise DataError(
            f"{path}: one of the {len(size):,} training rows has all the weight, so there is no density to fit: check "
            "the column that data.weights names"
        )


def check_held_out_weights(path: str, held: Mapping[str, NDArray[np.float64]]) -> None:
    """Checks that the weights of each held-out set, by name, have a positive sum.

    Raises:
        DataError: the sum is not positive.
    """
    for name, weights in held.items():
        if weights.sum() <= 0:
            raise DataError(
                f"{path}: the weights of the {counted(len(weights), 'row')} of the {name} set have the sum "
                f"{weights.sum():g}, but it must be positive: give a larger data.{name}_fraction or other rows"
            )


def warn_of_signed_weights(path: str, weights: Iterable[NDArray[np.float64]]) -> None:
    """Warns once if some weights are negative."""
    every = np.concatenate([np.empty(0), *weights])
    share = float((every < 0).mean()) if len(every) else 0.0
    if share:
        _log.warning(
            f"{path}: {share:.1%} of the weights are negative. The loss has no lower bound in regions where they "
            "outweigh the positive weights, so compare train and validation NLL. Effective numbers of rows and "
            "p-values are approximate"
        )


def check_context(
    table: Table, mean: NDArray[np.float64], std: NDArray[np.float64], types: Sequence[ColumnType]
) -> None:
    """Checks the context columns.

    Args:
        mean, std: mean and standard deviation of the training rows, (k,).
        types: the types of the columns.

    Raises:
        DataError: a column that is constant in training, unless an earlier training had other categories.
    """
    columns = zip(table.columns, mean, std, types, strict=True)
    constant = [name for name, m, s, one in columns if not s > abs(m) * 1e-14 and len(one.categories) < 2]
    if constant:
        raise DataError(
            f"{table.path}: the context {listed(constant)} is constant in the training rows: leave it out of "
            "data.context"
        )


def warn_of_rare_categories(path: str, sizes: Mapping[str, int], n: int) -> None:
    """Warns of context columns with fewer than _FEW_ROWS training rows for each category.

    Args:
        path: the file, for the message.
        sizes: the number of categories of each categorical context column, by name.
        n: the number of training rows.
    """
    for name, size in sizes.items():
        if n < _FEW_ROWS * size:
            _log.warning(
                f"{path}: the context {name!r} has {size:,} categories in {n:,} training rows, {n / size:.1f} rows for "
                "each on average, so p(x | context) is hardly learned. Combine rare categories in the file"
            )


def check_spread(
    table: Table,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    whole: NDArray[np.bool_],
    noisy: Sequence[int],
    centered: bool = False,
) -> None:
    """Raises DataError if columns are constant, and warns of columns that lose significant digits.

    Args:
        table: gives the names of the columns.
        mean, std: mean and standard deviation of the training rows, (d,), including the noise of `data.dequantize`.
        whole: whether noise can be added to each column, (d,).
        noisy: the columns that have noise.
        centered: whether columns with a large mean are kept in float64, so that only float64 limits their precision.
    """
    precision = _FLOAT64 if centered else _FLOAT32
    # rounding gives a constant column a standard deviation of about float64's epsilon times its mean, not zero
    flat = std <= np.maximum(64 * float(_FLOAT64.eps) * np.abs(mean), float(_FLOAT32.tiny))
    if not centered:
        flat |= std <= 8 * float(_FLOAT32.eps) * np.abs(mean)
    if flat.any():
        names = [name for name, is_flat in zip(table.columns, flat, strict=True) if is_flat]
        keep = [index for index, is_flat in zip(table.indices, flat, strict=True) if not is_flat]
        advice = f"keep the other columns with {as_option(keep)}" if keep else "there are no other columns"
        if whole[flat].all() and not set(np.flatnonzero(flat)) & set(noisy):
            columns = range(len(whole)) if whole.all() else (*np.flatnonzero(flat), *noisy)
            advice += f". For counts and pixels, keep all columns and add noise with {_dequantize(table, columns)}"
        raise DataError(
            f"{table.path}: in the training rows, column{'s' * (len(names) > 1)} {listed(names, most=50)} "
            f"{'is' if len(names) == 1 else 'are'} constant to the precision of {precision.dtype}; {advice}"
        )
    # The offset that the flow subtracts is a float32 number, so a mean of up to 2^-24 |mean| remains. The rounding
    # error of this remaining mean in float32, 2^-48 |mean|, must stay below 1e-4 std
    coarse = std < (2**18 * float(_FLOAT64.eps) if centered else 1e-4) * np.abs(mean)
    if coarse.any():
        names = [name for name, is_coarse in zip(table.columns, coarse, strict=True) if is_coarse]
        _log.warning(
            f"{table.path}: {precision.dtype} loses digits of {listed(names)}, because the values differ too little "
            "compared with their mean; subtract a constant from the column in the file"
        )


def check_enough_rows(path: str, n: int, d: int) -> None:
    """Raises DataError if there are fewer training rows than columns.

    Such rows lie in a subspace, where the density can grow without bound.

    Args:
        n: the number of training rows.
        d: the number of columns of a sample.
    """
    if n < d:
        raise DataError(
            f"{path}: {n} training rows are too few for {d} columns. Keep fewer columns than rows with data.columns, "
            "or give more rows (with data.val_path and data.test_path, all rows of the file are for training)"
        )


def whole_columns(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each column of values (n, d) contains only whole numbers to which noise can be added, (d,)."""
    whole = np.ones(values.shape[1], dtype=bool)
    for part in (values[:1000], values[1000:]):
        there = part[:, whole]
        whole[whole] = ((there == np.rint(there)) & (np.abs(there) <= MOST_WHOLE)).all(0)
    return whole


def warn_of_repeats(
    table: Table,
    values: NDArray[np.float64],
    whole: NDArray[np.bool_],
    noisy: set[int],
    codes: Mapping[int, float],
    typed: bool = False,
) -> set[int]:
    """Warns of columns with repeated values: the density of a flow can grow without bound at these values.

    Each warning gives a remedy: noise for whole numbers, conversion to whole numbers for rounded values, and dropping
    the column in all other cases.

    Args:
        table: gives the names of the columns.
        values: some training rows, (n, d).
        whole: whether `data.dequantize` accepts each column, (d,).
        noisy: the columns that have noise.
        codes: the code for missing values in each column with such a code, by column. A warning about it was given.
        typed: whether `data.types` is given, which excludes `data.dequantize=true`.

    Returns:
        The columns that have few distinct values.
    """
    values = values[:_REPEATS_ROWS]
    found = {i: repeats(values[:, i]) for i in range(values.shape[1]) if i not in noisy}
    few = {i for i, repeated in found.items() if repeated.few}
    unexplained = {i for i in few if not whole[i] and not found[i].step}
    if unexplained:
        # do not warn of values that repeat only because whole rows are repeated
        different = values[np.unique(row_hashes(values), return_index=True)[1]]
        few -= {i for i in unexplained if values.shape[1] == 1 or not repeats(different[:, i]).few}
    counts = sorted(i for i in few if whole[i])
    if counts:
        option = "the type integer in data.types" if typed else _dequantize(table, {*counts, *noisy})
        _log.warning(
            f"{table.path} looks integer-valued in {listed([table.columns[i] for i in counts])}. The density of whole "
            f"numbers is unbounded, and the likelihood is not meaningful. Add uniform noise to these columns with "
            f"{option}"
        )
    for step, origin in sorted({(found[i].step, found[i].origin) for i in few if not whole[i]}):
        here = [i for i in sorted(few) if not whole[i] and (found[i].step, found[i].origin) == (step, origin)]
        names = [table.columns[i] for i in here]
        if step:
            x = f"(x - {origin:.17g})" if origin else "x"
            _log.warning(
                f"{table.path}: the values of {listed(names)} are rounded to multiples of {step:g}. Their density is "
                f"unbounded, and the likelihood is not meaningful. Replace the values x in the file by "
                f"round({x} / {step:g}) and name the {'columns' if len(names) > 1 else 'column'} in data.dequantize"
            )
        else:
            _log.warning(
                f"{table.path}: few distinct values in {listed(names)}. Their density is unbounded, and the likelihood "
                f"is not meaningful. Leave the {'columns' if len(names) > 1 else 'column'} out with data.columns"
            )
    words = [
        f"{share:.0%} of the values of {table.columns[i]!r} are {value:g}"
        for i, repeated in found.items()
        if i not in few
        for value, share in repeated.atoms[:2]
        if codes.get(i) != value
    ]
    if words:
        _log.warning(
            f"{table.path}: {first_of(words[:_MOST_NAMED], len(words))}. The density of a flow at such a value is "
            "unbounded, and the likelihood is not meaningful. Remove the rows with the value, or leave the column out "
            "with data.columns"
        )
    return few


@dataclass(frozen=True)
class Repeats:
    """Statistics of the repeated values of a column.

    Attributes:
        few: whether the column has few distinct values, apart from atoms.
        step: the step of the grid on which the few values lie; 0 if there is no grid.
        atoms: (value, fraction of rows) of single values that many rows have, the most frequent first.
        origin: a value to subtract before dividing by the step. The origin is the smallest value if the multiples of
            the step are otherwise too large to add noise to, as for seconds since 1970. Otherwise the origin is 0.
    """

    few: bool
    step: float
    atoms: tuple[tuple[float, float], ...]
    origin: float = 0.0


def repeats(column: NDArray[np.float64]) -> Repeats:
    """Computes the statistics of the repeated values of a column (n,).

    Example:
        >>> repeats(np.array([0.1, 0.2, 0.2, 0.4, 0.1, 0.2])).step
        0.1
    """
    n = len(column)
    distinct, counts = np.unique(column, return_counts=True)
    if 20 * (n - len(distinct)) < n:
        return Repeats(False, 0.0, ())
    common = (counts >= _ATOM * n) & (counts >= _LEAST_ATOM)
    rest, left = distinct[~common], int(counts[~common].sum())
    if 2 * len(rest) <= left or left < _ATOM * n:
        gaps, first = np.diff(distinct), float(distinct[0])
        if len(gaps) and float(np.abs(distinct).max()) > MOST_WHOLE * float(gaps.min()):
            step = grid_step(distinct - first)
            return Repeats(True, step, (), first if step else 0.0)
        return Repeats(True, grid_step(distinct), ())
    atoms = sorted(zip(distinct[common], counts[common] / n, strict=True), key=lambda atom: -atom[1])
    return Repeats(False, 0.0, tuple((float(value), float(share)) for value, share in atoms))


def grid_step(distinct: NDArray[np.float64]) -> float:
    """Finds the largest step such that all values are multiples of the step, up to rounding in float32; 0 if none.

    Args:
        distinct: distinct values in ascending order.

    Example:
        >>> grid_step(np.array([-0.5, 0.25, 1.0])), grid_step(np.array([0.1, 0.3])), grid_step(np.array([1, 2**0.5]))
        (0.25, 0.1, 0.0)
    """
    if len(distinct) < 2:
        return 0.0
    gap, span, largest = float(np.diff(distinct).min()), float(np.ptp(distinct)), float(np.abs(distinct).max())
    if largest / gap > MOST_WHOLE:
        return 0.0
    step = span / round(span / gap)
    power = math.floor(math.log10(step))
    # the gap may be a multiple of the step, as in 0.1, 0.3
    finer = [step / k for k in range(1, 11)] + [10.0**e for e in range(power, power - 4, -1)]
    for each in finer:
        for candidate in (float(f"{each:.6g}"), each):
            multiples = distinct / candidate
            if np.all(np.abs(multiples - np.rint(multiples)) <= 1e-6 + _FLOAT32.eps * np.abs(multiples)):
                return candidate if largest / candidate <= MOST_WHOLE else 0.0
    return 0.0


def row_hashes(values: NDArray[Any], step: int = 1) -> NDArray[np.uint64]:
    """Returns a 64-bit hash of each row of samples (n, *event_shape), (n,). Equal rows have equal hashes.

    Args:
        values: the samples.
        step: only about one in `step` rows is hashed. The choice depends on the values of the row, so equal rows are
            either all hashed or all skipped.
    """
    # adding 0 turns -0.0 into 0.0
    flat = np.ascontiguousarray(values.reshape(len(values), math.prod(values.shape[1:]))) + values.dtype.type(0)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    if step > 1:
        chosen = bits[:, 0].astype(np.uint64)
        for column in bits.T[1:]:
            chosen += column
        bits = bits[_mixed(chosen) % step == 0]
    # multiplication by random odd numbers spreads the bits, because most bits of whole numbers are zero
    odd = np.random.default_rng(0).integers(0, 2**63, flat.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    found = np.empty(len(bits), np.uint64)
    # chunks small enough for the CPU cache
    size = max(1, 2**15 // flat.shape[1])
    for start in range(0, len(bits), size):
        # each column has its own factor, so the order of the columns matters
        found[start : start + size] = _mixed(bits[start : start + size].astype(np.uint64) * odd).sum(1, dtype=np.uint64)
    return found


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of 64-bit words in place, as in SplitMix64. Each new bit depends on many old bits."""
    words ^= words >> np.uint64(32)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(29)
    return words


def warn_of_copies(path: str, train: NDArray[np.uint64], held: Mapping[str, NDArray[np.uint64]]) -> None:
    """Warns of held-out rows that are copies of training rows. A flow that memorizes them gets too low a test NLL.

    Args:
        path: the file, for the message.
        train: hashes of training rows.
        held: hashes of the rows of each held-out set, by name.
    """
    found = []
    for name, hashes in held.items():
        copies = int(np.isin(hashes, train).sum())
        if copies and copies >= _COPIES * len(hashes):
            found.append(f"{copies:,} of {len(hashes):,} rows of the {name} set")
    if found:
        _log.warning(
            f"{path}: {' and '.join(found)} are copies of training rows, so the NLL of the set is lower than for new "
            "data. Remove repeated rows from the file, or give data.val_path and data.test_path without copies"
        )


def warn_of_dependence(table: Table, values: NDArray[np.float64], noise: NDArray[np.float64]) -> None:
    """Warns of columns that depend linearly on others: the rows lie in a subspace, where the density is unbounded.

    Args:
        table: gives the names of the columns.
        values: some training rows, (n, d).
        noise: 1 for columns with added uniform noise, else 0, (d,).
    """
    d = values.shape[1]
    if not 1 < d <= _DEPENDENCE_COLUMNS:
        return
    values = values[: max(5 * d, min(_DEPENDENCE_ROWS, 2 * 10**9 // d**2))]
    n = len(values)
    if n <= d:
        _log.warning(
            f"{table.path}: {n} rows of {d} columns lie in a subspace, where the density is unbounded. Give more rows, "
            "or keep fewer columns with data.columns"
        )
        return
    centred = values - values.mean(0)
    covariance = centred.T @ centred / n
    covariance[np.diag_indices(d)] += noise / 12
    scale = np.sqrt(np.diag(covariance))
    if not scale.all():
        return
    dependent, free = dependent_columns(covariance / np.outer(scale, scale))
    if not dependent:
        return
    words = []
    for column in dependent[:_MOST_NAMED]:
        weights = np.linalg.lstsq(covariance[np.ix_(free, free)], covariance[free, column], rcond=None)[0]
        others = np.array(free)[np.abs(weights) * scale[free] > 1e-3 * scale[column]]
        words.append(f"{table.columns[column]!r} on {listed([table.columns[i] for i in sorted(others)])}")
    _log.warning(
        f"{table.path}: columns are linearly dependent ({first_of(words, len(dependent), '; ')}). The density is "
        f"unbounded, and the likelihood is not meaningful. Keep the other columns with "
        f"{as_option([table.indices[i] for i in free])}"
    )


def dependent_columns(correlation: NDArray[np.float64]) -> tuple[list[int], list[int]]:
    """Returns the positions of the linearly dependent columns and of the linearly independent columns.

    A dependent column is a linear combination of independent columns, up to a fraction _RESIDUAL of its variance. The
    method is a Cholesky decomposition with pivoting: each step picks the column with the largest residual variance.

    Args:
        correlation: the correlation matrix, (d, d).

    Example:
        >>> a, b = np.random.default_rng(0).normal(size=(2, 100))
        >>> dependent_columns(np.corrcoef([a, b, a + b, -b]))
        ([2, 3], [0, 1])
    """
    d = len(correlation)
    factor, residual, free = np.zeros((d, d)), np.ones(d), np.zeros(d, dtype=bool)
    for k in range(d):
        waiting = np.where(free, -1.0, residual)
        # ties go to the first column, so the first of two copies is kept
        pivot = int(np.flatnonzero(waiting >= waiting.max() - 1e-9)[0])
        if waiting[pivot] < _RESIDUAL:
            break
        factor[:, k] = (correlation[pivot] - factor[:, :k] @ factor[pivot, :k]) / np.sqrt(residual[pivot])
        residual -= factor[:, k] ** 2
        free[pivot] = True
    return np.flatnonzero(~free).tolist(), np.flatnonzero(free).tolist()


def warn_of_unseen(path: str, class_counts: NDArray[np.int64], held: Mapping[str, NDArray[np.int64]]) -> None:
    """Warns of labels that no training row has. The warning counts the held-out rows with these labels.

    Args:
        path: the file, for the message.
        class_counts: the number of training rows of each label, (classes,).
        held: the labels of each held-out set, by name.
    """
    unseen = np.flatnonzero(class_counts == 0)
    if not len(unseen):
        return
    rows = {name: int(np.isin(labels, unseen).sum()) for name, labels in held.items()}
    scored = [f"{n} rows of the {name} set" for name, n in rows.items() if n]
    also = f". The likelihood of {' and '.join(scored)} with such a label is not meaningful" if scored else ""
    gaps = f"{as_ranges(unseen.tolist())} of 0 to {len(class_counts) - 1}"
    _log.warning(f"{path}: no training row has label {gaps}, so samples are drawn only from the other classes{also}")


def _dequantize(table: Table, columns: Iterable[int]) -> str:
    """Returns the `data.dequantize=` setting that adds noise to these columns of a table, quoted for a shell."""
    chosen = sorted(columns)
    if len(chosen) == len(table.columns):
        return "data.dequantize=true"
    return f"'data.dequantize=[{','.join(str(table.indices[i]) for i in chosen)}]'"
