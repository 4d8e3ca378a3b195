"""Missing values: the values that count as missing, and what happens to the rows that have one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.utils.arguments import one_of
from flowtrain.utils.errors import ConfigError

REFUSE, DROP = "refuse", "drop"


@dataclass(frozen=True)
class Missing:
    """The settings `data.missing` and `data.na`.

    Attributes:
        drops: whether rows with a missing value are left out. If not, a table with missing values is refused.
        numbers: numbers that count as missing, besides NaN.
        texts: the contents of cells that count as missing, stripped and in lower case, besides the usual words.
    """

    drops: bool = False
    numbers: tuple[float, ...] = ()
    texts: frozenset[str] = frozenset()

    def mark(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the values, with NaN instead of each of `numbers`. The argument does not change.

        Example:
            >>> Missing(numbers=(-999.0,)).mark(np.array([1.0, -999.0]))
            array([ 1., nan])
        """
        if not self.numbers:
            return values
        # a file of float32 contains the nearest float32 of a number such as -999.9
        with np.errstate(over="ignore"):
            codes = np.array(self.numbers)
            codes = np.concatenate([codes, codes.astype(np.float32).astype(np.float64)])
        return np.where(np.isin(values, codes[np.isfinite(codes) | np.isin(codes, self.numbers)]), np.nan, values)


REFUSED = Missing()


def missing_of(policy: str | None, na: Sequence[str | float] | str | float | None) -> Missing:
    """Returns the settings for the values of `data.missing` (policy) and `data.na`.

    None means the default. Missing values are then refused, and only the usual words and NaN count as missing.

    Raises:
        ConfigError: an invalid value.

    Example:
        >>> missing_of("drop", [-999, "?", "1e3"]).numbers
        (-999.0, 1000.0)
    """
    drops = one_of("data.missing", REFUSE if policy is None else policy, (REFUSE, DROP)) == DROP
    numbers, texts = [], set()
    for entry in _entries(na):
        if isinstance(entry, bool) or not isinstance(entry, str | int | float):
            raise ConfigError(f"data.na={na}: give the numbers and the text that count as missing, as in [-999,'?']")
        try:
            numbers.append(float(entry))
        except ValueError:
            pass
        except OverflowError as error:
            raise ConfigError(f"data.na={na}: {entry} is too large for a float") from error
        if isinstance(entry, str):
            texts.add(entry.strip().lower())
    return Missing(drops, tuple(numbers), frozenset(texts))


def _entries(na: Any) -> list[Any]:
    if na is None:
        return []
    return list(na) if isinstance(na, list | tuple) else [na]
