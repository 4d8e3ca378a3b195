"""Scales and ticks of axes: compressed axes for heavy tails, round ticks, and labels in the same format on an axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from matplotlib.axis import Axis, XAxis
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flowtrain.data.types import ColumnType, category_text
from flowtrain.plotting import points, style
from flowtrain.plotting.points import EVERYWHERE, Array, LogDensity, Points, Range

# an axis is compressed if the range of the values exceeds this many times half their interquartile range
LONGEST_TAIL = 20.0
# the largest share of the values in the outer half of a tail. With a larger share, the outer half is another mode
OUTER_HALF = 0.1
# the data have a single tail if one side is this many times longer than the other
ONE_SIDED = 10.0
# width of a character of a tick label and height of a tick label, in inches per point of the font size
CHARACTER, LINE = 0.0092, 0.0165
# width of a letter of the label of an axis, in inches
LETTER = 0.085
# smallest distance between two tick labels in inches
APART = 0.1
# smallest distance between two round values of a compressed axis, as a share of the axis
TICKS_APART = 0.16
# numbers of letters of the name of a category, of which the first that fits is chosen
LETTERS_OF_CATEGORY = (7, 5)
# largest number of categories that have a bar each in a histogram
MOST_BARS = 60
# tick labels are multiples of a power of ten if the largest is outside these limits
PLAIN_NUMBERS = (1e-2, 1e4)
# tick labels are differences from an offset if the largest exceeds this many times the distance between two ticks
MOST_STEPS = 2e4
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """The scale of an axis. The position of a value x is asinh((x - centre) / reach), or x itself without a reach.

    Attributes:
        support: the range of values, which the axis does not leave.
        names: the categories of a categorical column. Category k has the values from k to k + 1.
    """

    centre: float = 0.0
    reach: float | None = None
    support: Range = EVERYWHERE
    names: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the axis is linear."""
        return self.reach is None

    @property
    def bars(self) -> int:
        """The number of bars of a histogram with a bar for each category; 0 without categories, or with many."""
        return len(self.names) if len(self.names) <= MOST_BARS else 0

    def places(self, values: Array) -> Array:
        """Returns the positions of values along the axis, of any shape."""
        return values if self.reach is None else np.arcsinh((values - self.centre) / self.reach)

    def within(self, limits: Range) -> Range:
        """Returns the limits of an axis, cut to the support. The axis of categories has the whole support."""
        if self.names:
            return self.support
        low, high = (float(place) for place in self.places(np.array(self.support)))
        return max(limits[0], low), min(limits[1], high)

    def values(self, places: Tensor) -> Tensor:
        """Returns the values at positions along the axis, of any shape."""
        return places if self.reach is None else self.centre + self.reach * places.sinh()

    def log_slope(self, places: Tensor) -> Tensor:
        """Returns log dx/dy at positions along the axis, of any shape. log p(y) = log p(x) + log dx/dy."""
        if self.reach is None:
            return torch.zeros_like(places)
        return math.log(self.reach) + places.cosh().log()


LINEAR = Scale()


def scales_of(values: Array, types: Sequence[ColumnType] = ()) -> list[Scale]:
    """Returns the scale of an axis for each column of values (N, d).

    The axes of circular and categorical columns are linear.

    Args:
        types: the types of the columns; () if all are real.
    """
    found = []
    for column, one in zip(values.T, types or [ColumnType()] * values.shape[1], strict=True):
        is_linear = one.is_circular or one.categories
        names = tuple(map(category_text, one.categories))
        found.append(replace(LINEAR if is_linear else choose_scale(column), support=one.support, names=names))
    return found


def choose_scale(values: Array) -> Scale:
    """Returns the scale of an axis that shows the shape of values (N,): compressed for heavy tails, else linear.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> choose_scale(rng.normal(size=1000)).plain, choose_scale(np.exp(2 * rng.normal(size=1000))).plain
        (True, False)
    """
    low, first, middle, third, high = (float(q) for q in np.quantile(values, (0.005, 0.25, 0.5, 0.75, 0.995)))
    if not 0 < LONGEST_TAIL * (third - first) / 2 < high - low:
        return Scale()
    is_upper = high - middle > middle - low
    if (values > (middle + high) / 2 if is_upper else values < (middle + low) / 2).mean() > OUTER_HALF:
        return Scale()
    if high - middle > ONE_SIDED * (middle - low):
        centre, reach = low, float(np.quantile(values, 0.1)) - low
    elif middle - low > ONE_SIDED * (high - middle):
        centre, reach = high, high - float(np.quantile(values, 0.9))
    else:
        centre, reach = middle, (third - first) / 2
    # if most values are equal, no scale can show their shape
    return Scale(centre, reach) if reach > 1e-9 * max(abs(low), abs(high)) else Scale()


def on_axes(scales: Sequence[Scale], points: Points) -> Points:
    """Converts points (N, d) to their positions along axes with these scales."""
    places = [scale.places(column) for scale, column in zip(scales, points.values.T, strict=True)]
    return Points(np.stack(places, axis=1), points.dropped)


def density_on_axes(scales: Sequence[Scale], log_density: LogDensity) -> LogDensity:
    """Converts the log density of x to the log density per unit of axes with these scales, from (G, d) to (G,)."""
    if all(scale.plain for scale in scales):
        return log_density

    def log_density_on_axes(places: Tensor) -> Tensor:
        columns = list(zip(scales, places.unbind(1), strict=True))
        x = torch.stack([scale.values(column) for scale, column in columns], 1)
        return log_density(x).cpu() + torch.stack([scale.log_slope(column) for scale, column in columns]).sum(0)

    return log_density_on_axes


def set_ticks(axis: Axis, scale: Scale = LINEAR, *, most: int = 6, size: float = 8.0, gap: float = 0.3) -> str:
    """Sets round ticks on an axis and labels them in one format. The axes must already have their limits and size.

    The labels do not touch. They end at most half of `gap` beyond the axis, so the labels of two panels that are `gap`
    apart do not touch either.

    Args:
        most: the largest number of ticks of a linear axis.
        size: the font size of the labels.
        gap: the distance to the next panel with labels, in inches.

    Returns:
        A note for the label of the axis: the power of ten or the offset that the tick labels leave out, and whether the
        axis has an asinh scale; else "".
    """
    low, high = sorted(axis.get_view_interval())
    box = axis.axes.get_window_extent()
    across = isinstance(axis, XAxis)
    length = (box.width if across else box.height) / style.DPI

    def fitting(places: Array, labels: Sequence[str]) -> list[int]:
        """Returns the indices of the ticks whose labels fit at the ends; empty if the labels of two of them touch."""
        sizes = np.array([_extent(label, size, across) for label in labels])
        at = (places - low) / (high - low) * length
        inside = (at - sizes / 2 >= -gap / 2) & (at + sizes / 2 <= length + gap / 2)
        kept = [i for i in np.argsort(places) if inside[i]]
        touching = any(at[j] - at[i] < (sizes[i] + sizes[j]) / 2 + APART for i, j in pairwise(kept))
        return [] if touching else kept

    if scale.names:
        places, labels, note = _category_ticks((low, high), scale.names, fitting)
    elif scale.plain:
        places, labels, note = _plain_ticks((low, high), most, fitting)
    else:
        places, labels, note = _compressed_ticks((low, high), scale, fitting)
        note = ", ".join(filter(None, (note, "asinh scale")))
    axis.set_ticks(list(places), labels=list(labels))
    axis.set_tick_params(labelsize=size)
    return note


def axis_label(name: str, note: str, room: float) -> str:
    """Returns the label of an axis on one line: its name, with the note that `set_ticks` returns in brackets.

    Args:
        room: the length of the label in inches; a longer name is cut.
    """
    letters = int(room / LETTER) - (len(note) + 3 if note else 0)
    return points.noted(style.literal(name, most=max(letters, 4)), note)


Fitting = Callable[[Array, Sequence[str]], list[int]]
Ticks = tuple[list[float], list[str], str]


def _extent(label: str, size: float, across: bool) -> float:
    return size * (CHARACTER * len(label) if across else LINE)


def _plain_ticks(limits: Range, most: int, fitting: Fitting) -> Ticks:
    """Returns multiples of 1, 2 or 5 times a power of ten within the limits: as many as fit, but at most `most`."""
    found: Ticks = [], [], ""
    for count in range(1, 3 * most):
        locator = MaxNLocator(count, steps=(1, 2, 5, 10), min_n_ticks=1)
        every = np.asarray(locator.tick_values(*limits))
        values = every[(limits[0] <= every) & (every <= limits[1])]
        labels, note = numbers(values, float(np.diff(every).min()) if len(every) > 1 else None)
        kept = fitting(values, labels)
        if len(found[0]) < len(kept) <= most:
            found = [float(values[i]) for i in kept], [labels[i] for i in kept], note
    return found


def _category_ticks(limits: Range, names: Sequence[str], fitting: Fitting) -> Ticks:
    """Returns the names of the categories within the limits: all if short forms of them fit, else every k-th name."""
    shown = [k for k in range(len(names)) if limits[0] <= k + 0.5 <= limits[1]]
    for step in range(1, len(shown) + 1):
        for letters in LETTERS_OF_CATEGORY:
            places = np.array(shown[::step]) + 0.5
            labels = [style.abbreviated(names[k], letters) for k in shown[::step]]
            kept = fitting(places, labels)
            # the first and the last of many labels may be too long for the edges of the axis
            if len(kept) == len(labels) or (step > 1 and kept):
                return [float(places[i]) for i in kept], [labels[i] for i in kept], ""
    return [], [], ""


def numbers(values: Array, step: float | None = None) -> tuple[list[str], str]:
    """Formats evenly spaced numbers with the same decimals.

    Args:
        step: the distance between two numbers. None: the smallest distance that occurs.

    Returns:
        The labels, and a note with the power of ten or the offset that they leave out.

    Example:
        >>> numbers(np.array([0.0, 0.5, 1.0])), numbers(np.array([0.0, 2e6, 4e6]))[0]
        ((['0.0', '0.5', '1.0'], ''), ['0', '2', '4'])
    """
    if len(values) == 0:
        return [], ""
    largest = float(np.abs(values).max())
    if step is None:
        step = float(np.diff(values).min()) if len(values) > 1 else largest or 1.0
    notes = []
    if largest > MOST_STEPS * step:
        unit = 10.0 ** math.ceil(math.log10(max(float(np.ptp(values)), step)))
        offset = round(float(values[0]) / unit) * unit
        values = values - offset
        largest = float(np.abs(values).max())
        notes.append(f"{'+' if offset < 0 else MINUS} {abs(offset):,.12g}")
    exponent = 0
    if largest > 0 and not PLAIN_NUMBERS[0] <= largest < PLAIN_NUMBERS[1]:
        exponent = 3 * math.floor(math.log10(largest) / 3 + 1e-9)
        notes.append(f"{TIMES}10{str(exponent).translate(SUPERSCRIPTS)}")
    decimals = max(0, _decimals(step / 10.0**exponent))
    labels = [f"{v / 10.0**exponent + 0.0:.{decimals}f}".replace("-", MINUS) for v in values]
    zero = f"{0:.{decimals}f}"
    return [zero if label == f"{MINUS}{zero}" else label for label in labels], ", ".join(notes)


def _decimals(step: float) -> int:
    """Returns the decimals of a step between ticks, 1, 2 or 5 times a power of ten."""
    return -math.floor(math.log10(step) + 1e-6)


def _compressed_ticks(limits: Range, scale: Scale, fitting: Fitting) -> Ticks:
    """Returns round values of x whose labels fit on a compressed axis."""
    assert scale.reach is not None
    low, high = (scale.centre + scale.reach * math.sinh(y) for y in limits)

    def fit(values: list[float]) -> bool:
        return len(fitting(scale.places(np.array(values)), powers(values))) == len(values)

    taken = round_values((low, high), scale, fit)
    return scale.places(np.array(taken)).tolist(), powers(taken), ""


def round_values(limits: Range, scale: Scale, fit: Callable[[list[float]], bool] | None = None) -> list[float]:
    """Returns round numbers within the limits of x in ascending order, for a compressed axis.

    The roundest numbers have priority: zero, then powers of ten from the largest.

    Args:
        fit: returns whether numbers fit together on the axis. None: their distances must exceed the share
            TICKS_APART of the axis.
    """
    assert scale.reach is not None
    (low, high), (begin, end) = limits, scale.places(np.array(limits))
    decades = range(math.floor(math.log10(max(abs(low), abs(high)))), math.floor(math.log10(scale.reach)) - 1, -1)
    wanted = [0.0, *(sign * digit * 10.0**k for digit in (1, 5, 2) for k in decades for sign in (-1, 1))]
    # limits far from zero may contain no such number
    wanted += list(MaxNLocator(3, steps=(1, 2, 5, 10)).tick_values(low, high))
    taken: list[float] = []
    for value in wanted:
        tried = sorted({*taken, float(value)})
        gaps = np.diff(scale.places(np.array(tried)))
        if low <= value <= high and (fit(tried) if fit else (gaps > TICKS_APART * (end - begin)).all()):
            taken = tried
    return taken


def short(value: float) -> str:
    """Formats a number with at most four significant digits, such as -200, 5e4 and 1.25e6."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def decades(values: Sequence[float]) -> list[str]:
    """Formats numbers of any size with powers of ten.

    Example:
        >>> decades([0.01, 1, 200])
        ['10⁻²', '10⁰', '2·10²']
    """
    return [_power(v) for v in values]


def powers(values: Sequence[float]) -> list[str]:
    """Returns the labels of round numbers of any size in one format: all plain, or all with powers of ten.

    Example:
        >>> powers([0, 5, 100]), powers([0, 1e6, 5e7])
        (['0', '5', '100'], ['0', '10⁶', '5·10⁷'])
    """
    sizes = [abs(v) for v in values if v != 0]
    if not sizes or (min(sizes) >= PLAIN_NUMBERS[0] and max(sizes) < PLAIN_NUMBERS[1]):
        return [f"{v:.10g}".replace("-", MINUS) for v in values]
    return decades(values)


def _power(value: float) -> str:
    if value == 0:
        return "0"
    digits, exponent = f"{abs(value):.3e}".split("e")
    mantissa = f"{float(digits):g}"
    sign = MINUS if value < 0 else ""
    front = "" if mantissa == "1" else f"{mantissa}·"
    return f"{sign}{front}10{str(int(exponent)).translate(SUPERSCRIPTS)}"
