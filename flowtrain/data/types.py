"""Column types: the values that a column of a table can have, such as positive numbers, angles or categories."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.utils.arguments import choose
from flowtrain.utils.errors import ConfigError

REAL, POSITIVE, INTERVAL, CIRCULAR, INTEGER, CATEGORICAL = KINDS = (
    "real",
    "positive",
    "interval",
    "circular",
    "integer",
    "categorical",
)
# the fraction of an interval over which values at one of its ends are spread
EDGE = 1e-5
# float32 numbers can represent bounds and lengths of ranges of these sizes
SMALLEST, LARGEST = 1e-30, 1e30
# scales of a softplus that are tried, as multiples of the median
SCALES = (0.25, 1.0)
# the noise values at which the moments of bounded whole numbers are computed
NODES = tuple((k + 0.5) / 8 for k in range(8))

_TEXT = re.compile(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True)
class ColumnType:
    """The type of a column, stored in checkpoints.

    Attributes:
        kind: one of KINDS.
        low, high: the smallest and the largest value. They may be infinite. For a circular column, low and high are the
            same point, and high - low is the period. For a categorical column, values are positions in `categories`.
        categories: the categories of a categorical column, text or numbers.
        scale: the scale of the softplus that maps the real line to a support with one end; 0 for the exponential.

    Example:
        >>> ColumnType.parse("interval(0,1)").support, ColumnType.parse("circular(360)").high
        ((0.0, 1.0), 360.0)
    """

    kind: str = REAL
    low: float = -math.inf
    high: float = math.inf
    categories: tuple[str | float, ...] = ()
    scale: float = 0.0

    @staticmethod
    def parse(text: Any, key: str = "data.types") -> "ColumnType":
        """Returns the type for a text such as "positive" or "interval(0,1)", or a list such as ["interval", 0, 1].

        Args:
            key: the setting, for messages.

        Raises:
            ConfigError: an unknown type, or bounds that are missing, not numbers, not in ascending order, too large or
                too close to each other.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if isinstance(text, list | tuple) and text:
            kind, bounds = text[0], list(text[1:])
        elif match:
            kind, bounds = match[1], [] if match[2] is None else match[2].split(",")
        else:
            kind, bounds = text, []
        if kind not in KINDS:
            raise ConfigError(f"{key}={text}: {choose(str(kind), KINDS, 'the types are')}")
        wrong = ConfigError(f"{key}={text}: {_USAGE[kind]}")
        try:
            numbers = [float(bound) for bound in bounds]
        except (TypeError, ValueError):
            raise wrong from None
        if kind == CIRCULAR and len(numbers) == 1:
            numbers = [0.0, *numbers]
        allowed = {INTERVAL: (2,), CIRCULAR: (2,), INTEGER: (0, 2)}.get(kind, (0,))
        if len(numbers) not in allowed or any(map(math.isnan, numbers)):
            raise wrong
        low, high = numbers or ((0.0, math.inf) if kind == POSITIVE else (-math.inf, math.inf))
        ends = all(v == math.floor(v) for v in (low, high) if math.isfinite(v)) or kind != INTEGER
        bounded = {INTERVAL: math.isfinite(low) or math.isfinite(high), CIRCULAR: math.isfinite(high - low)}
        if not low < high or not ends or not bounded.get(kind, True):
            raise wrong
        finite = [abs(v) for v in (low, high) if math.isfinite(v)]
        if any(v > LARGEST for v in finite) or high - low < SMALLEST:
            raise ConfigError(
                f"{key}={text}: bounds are at most {LARGEST:g}, and their distance is at least {SMALLEST:g}; convert "
                "the column to other units"
            )
        return ColumnType(kind, low, high)

    @property
    def is_whole(self) -> bool:
        """Whether values are whole numbers, to which noise in [0, 1) is added."""
        return self.kind in (INTEGER, CATEGORICAL)

    @property
    def is_circular(self) -> bool:
        """Whether values are angles."""
        return self.kind == CIRCULAR

    @property
    def has_edges(self) -> bool:
        """Whether values at the ends of the interval are spread over a small part of the interval."""
        return self.kind == INTERVAL and math.isfinite(self.high - self.low)

    @property
    def support(self) -> tuple[float, float]:
        """The ends of the range of values, including the noise of whole numbers."""
        return self.low, self.high + 1 if self.is_whole else self.high

    @property
    def is_bounded(self) -> bool:
        """Whether a bijection maps the support to the real line."""
        return not self.is_circular and any(map(math.isfinite, self.support))

    def contains(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Returns which values (n,) are in the range. Values at infinite or open ends are not."""
        if self.is_circular:
            return np.ones(len(values), dtype=bool)
        open_ends = self.kind == POSITIVE or (self.kind == INTERVAL and not self.has_edges)
        return (values > self.low) & (values < self.high) if open_ends else (values >= self.low) & (values <= self.high)

    def contains_noisy(self, values: Tensor) -> Tensor:
        """Returns which values, of any shape, have a positive density. Whole numbers may contain noise in [0, 1)."""
        low, high = self.support
        if self.is_circular:
            return values.isfinite()
        if self.is_whole:
            return (values >= low) & (values < high)
        return (values >= low) & (values <= high) if self.has_edges else (values > low) & (values < high)

    def fitted(self, least: float, most: float, some: NDArray[np.float64]) -> "ColumnType":
        """Returns the type for a table whose values go from `least` to `most`.

        Integers without bounds get the bound 0 if no value is negative. Angles without an explicit range are
        in [-period / 2, period / 2) if this contains all values and some are negative, and otherwise in [0, period).
        For a support with one end, the scale of the softplus is chosen, see `_best_scale`.

        Args:
            some: some values, (n,).
        """
        if self.kind == INTEGER and self.low == -math.inf and self.high == math.inf and least >= 0:
            return replace(self, low=0.0).fitted(least, most, some)
        low, high = self.support
        if self.is_bounded and math.isinf(high - low):
            values = some + 0.5 if self.is_whole else some
            distances = values - low if math.isfinite(low) else high - values
            return replace(self, scale=_best_scale(distances[distances > 0]))
        if self.is_circular and self.low == 0 and least < 0 and max(-least, most) <= self.high / 2:
            return replace(self, low=-self.high / 2, high=self.high / 2)
        return self

    def is_fit_of(self, asked: "ColumnType") -> bool:
        """Whether this type can be the result of `fitted` and `with_categories` for the type `asked`.

        Example:
            >>> ColumnType("integer", low=0.0).is_fit_of(ColumnType("integer"))
            True
        """
        if self.kind != asked.kind:
            return False
        if self.is_whole and (asked.low, asked.high) == (-math.inf, math.inf):
            return self.kind == CATEGORICAL or (self.low in (0, -math.inf) and self.high == math.inf)
        if self.is_circular and asked.low == 0 and self.low == -self.high:
            return self.high - self.low == asked.high
        return (self.low, self.high) == (asked.low, asked.high)

    def with_categories(self, categories: Sequence[str | float]) -> "ColumnType":
        """Returns a categorical type with these categories."""
        return replace(self, low=0.0, high=float(len(categories) - 1), categories=tuple(categories))

    def __str__(self) -> str:
        # the text gives the same type
        bounds = [f"{v:.0f}" if abs(v) < 1e15 and v == round(v) else repr(v) for v in map(float, (self.low, self.high))]
        if self.is_circular:
            return f"{self.kind}({bounds[1] if self.low == 0 else ','.join(bounds)})"
        shown = self.kind == INTERVAL or (self.kind == INTEGER and any(map(math.isfinite, (self.low, self.high))))
        return f"{self.kind}({','.join(bounds)})" if shown else self.kind


def _best_scale(distances: NDArray[np.float64]) -> float:
    """Chooses the map from positive numbers (n,) to the real line: 0 for the logarithm, or the scale of a softplus.

    The density of the map's output is modelled by a Gaussian. The map with the highest likelihood of the numbers is
    chosen. The logarithm suits values over several orders of magnitude, and the softplus other values, of which it
    gives a lighter upper tail.
    """
    if len(np.unique(distances)) < 2:
        return 0.0
    nll = {0.0: math.log(np.log(distances).std()) + float(np.log(distances).mean())}
    for share in SCALES:
        scale = share * float(np.median(distances))
        r = distances / scale
        log_share = np.log(-np.expm1(-r))
        nll[scale] = math.log((r + log_share).std()) + float((log_share + math.log(scale)).mean())
    return min(nll, key=lambda scale: nll[scale])


_USAGE = {
    REAL: "give real without bounds",
    POSITIVE: "give positive without bounds; interval(a,inf) has another lower end",
    INTERVAL: "give both ends in ascending order, as in interval(0,1) or interval(5,inf)",
    CIRCULAR: "give the period, as in circular(360), or the range, as in circular(-180,180)",
    INTEGER: "give integer, or whole numbers as bounds, as in integer(1,6) or integer(1,inf)",
    CATEGORICAL: "give categorical without bounds; the categories are those of the training file",
}


def is_column_type(one: ColumnType) -> bool:
    """Whether the attributes of a column type that was read from a file are valid."""
    numbers = all(isinstance(v, float | int) and not math.isnan(v) for v in (one.low, one.high))
    names = all(isinstance(v, str | float | int) for v in one.categories)
    scaled = isinstance(one.scale, float | int) and 0 <= one.scale < math.inf
    if one.kind not in KINDS or not numbers or not names or not scaled:
        return False
    if one.kind == CATEGORICAL:
        return one.low == 0 and one.high == len(one.categories) - 1 >= 0
    return one.low < one.high and (not one.is_circular or math.isfinite(one.high - one.low))


def circular_columns(types: Sequence[ColumnType]) -> tuple[int, ...]:
    """Returns the positions of the circular columns."""
    return tuple(i for i, one in enumerate(types) if one.is_circular)


def differences(types: Sequence[ColumnType], a: Tensor, b: Tensor) -> Tensor:
    """Returns a - b, (B, d), or in circular columns the shortest arc from b to a, in [-period / 2, period / 2].

    Args:
        types: the types of the columns; () if all are real.
    """
    if not circular_columns(types):
        return a - b
    columns = list((a - b).unbind(1))
    for i in circular_columns(types):
        period = types[i].high - types[i].low
        columns[i] = columns[i] - period * (columns[i] / period).round()
    return torch.stack(columns, 1)


def whole_columns_of(types: Sequence[ColumnType]) -> tuple[int, ...]:
    """Returns the positions of the columns of whole numbers."""
    return tuple(i for i, one in enumerate(types) if one.is_whole)


def edge_columns(types: Sequence[ColumnType]) -> tuple[int, ...]:
    """Returns the positions of the columns whose values at the ends of an interval are spread."""
    return tuple(i for i, one in enumerate(types) if one.has_edges)


def category_text(category: str | float) -> str:
    """Returns a category as text, as in a file.

    Example:
        >>> category_text("red"), category_text(3.0)
        ('red', '3')
    """
    return category if isinstance(category, str) else f"{category:.17g}"


def spread_edges(x: Tensor, types: Sequence[ColumnType], u: Tensor) -> Tensor:
    """Moves values at the ends of an interval into the interval, by a distance of EDGE u (high - low).

    With u ~ U[0, 1), a value with the probability q is replaced by the density q / (EDGE (high - low)).

    Args:
        x: samples (B, d).
        u: numbers in [0, 1), (B, d). Only the numbers of columns with `has_edges` are used.
    """
    columns = list(x.unbind(1))
    for i in edge_columns(types):
        low, high = types[i].low, types[i].high
        step = EDGE * (high - low) * u[:, i]
        moved = torch.where(columns[i] <= low, columns[i] + step, columns[i])
        columns[i] = torch.where(columns[i] >= high, columns[i] - step, moved)
    return torch.stack(columns, 1)


def on_line(types: Sequence[ColumnType], values: NDArray[np.float64], u: float = 0.0) -> NDArray[np.float64]:
    """Maps values (n, d) to the real line, as the bijection of a flow does, see `flowtrain.bijections.support`.

    Args:
        values: rows in the units of the file.
        u: the noise of bounded whole numbers.
    """
    found = values.astype(np.float64, copy=True)
    for i, one in enumerate(types):
        low, high = one.support
        if one.is_circular:
            found[:, i] = np.mod((values[:, i] - low) / (high - low), 1.0) * 2 * math.pi - math.pi
        elif one.is_bounded:
            v = values[:, i] + (u if one.is_whole else 0.0)
            above, below = v - low, high - v
            if math.isfinite(high - low):
                above, below = (np.where(v <= 0, EDGE / 2 * (high - low), v) for v in (above, below))
                found[:, i] = np.log(above) - np.log(below)
            else:
                sign, distance = (1, above) if math.isfinite(low) else (-1, below)
                if one.scale:
                    r = distance / one.scale
                    found[:, i] = sign * (r + np.log(-np.expm1(-r)))
                else:
                    found[:, i] = sign * np.log(distance)
    return found


def with_whole_noise(x: Tensor, columns: Sequence[int], u: Tensor) -> Tensor:
    """Adds u (B, d) to elements of `columns` that are whole numbers. Other elements of x (B, d) do not change."""
    found = list(x.unbind(1))
    for i in columns:
        # x + u can be rounded to x + 1, which belongs to the next whole number
        noised = torch.minimum(found[i] + u[:, i], torch.nextafter(found[i] + 1, found[i]))
        found[i] = torch.where(found[i] == found[i].floor(), noised, found[i])
    return torch.stack(found, 1)
