"""Axes for heavy-tailed data: linear near the bulk of the values, logarithmic far from it.

A compressed axis shows x at the position y = asinh((x - centre) / reach), and its tick labels give x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flowtrain.plots.points import Array, LogDensity, Points, Range

# an axis is compressed if the range of the values exceeds this many times half their interquartile range
LONGEST = 30.0
# the data have a single tail if one side is this many times longer than the other
ONE_SIDED = 10.0
# smallest distance between two ticks of a compressed axis, as a share of its length
APART = 0.13


@dataclass(frozen=True)
class Scale:
    """The position of a value along an axis: x itself, or asinh((x - centre) / reach) if there is a reach."""

    centre: float = 0.0
    reach: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the axis is linear."""
        return self.reach is None

    def places(self, values: Array) -> Array:
        """The positions of values along the axis, of any shape."""
        return values if self.reach is None else np.arcsinh((values - self.centre) / self.reach)

    def values(self, places: Tensor) -> Tensor:
        """The values at positions along the axis, of any shape."""
        return places if self.reach is None else self.centre + self.reach * places.sinh()

    def log_slope(self, places: Tensor) -> Tensor:
        """log dx/dy at positions along the axis, of any shape; added to a log density of x it gives that of y."""
        if self.reach is None:
            return torch.zeros_like(places)
        return math.log(self.reach) + places.cosh().log()

    def mark(self, axis: Axis, apart: float = APART) -> None:
        """Sets ticks at round values of x on a compressed axis, whose limits must be set; a linear axis is unchanged.

        Args:
            apart: the smallest distance between two ticks, as a share of the axis.
        """
        if self.reach is None:
            return
        low, high = axis.get_view_interval()
        shown = [self.centre + self.reach * math.sinh(y) for y in (low, high)]
        values = round_values((shown[0], shown[1]), self, apart)
        axis.set_ticks(self.places(np.array(values)).tolist(), labels=[short(value) for value in values])


def suited(values: Array) -> Scale:
    """The scale of an axis that shows the shape of values (N,), heavy tails or not.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> suited(rng.normal(size=1000)).plain, suited(np.exp(2 * rng.normal(size=1000))).plain
        (True, False)
    """
    low, first, middle, third, high = (float(q) for q in np.quantile(values, (0.005, 0.25, 0.5, 0.75, 0.995)))
    if not 0 < LONGEST * (third - first) / 2 < high - low:
        return Scale()
    if high - middle > ONE_SIDED * (middle - low):
        centre, reach = low, float(np.quantile(values, 0.1)) - low
    elif middle - low > ONE_SIDED * (high - middle):
        centre, reach = high, high - float(np.quantile(values, 0.9))
    else:
        centre, reach = middle, (third - first) / 2
    # most values are equal, so no scale can show their shape
    return Scale(centre, reach) if reach > 1e-9 * max(abs(low), abs(high)) else Scale()


def along(scales: Sequence[Scale], points: Points) -> Points:
    """The positions of points (N, d) along axes of these scales."""
    places = [scale.places(column) for scale, column in zip(scales, points.values.T, strict=True)]
    return Points(np.stack(places, axis=1), points.dropped)


def density_along(scales: Sequence[Scale], log_density: LogDensity) -> LogDensity:
    """The log density per unit of axes of these scales, (G, d) to (G,), from that of x."""
    if all(scale.plain for scale in scales):
        return log_density

    def log_density_along(places: Tensor) -> Tensor:
        columns = list(zip(scales, places.unbind(1), strict=True))
        x = torch.stack([scale.values(column) for scale, column in columns], 1)
        return log_density(x).cpu() + torch.stack([scale.log_slope(column) for scale, column in columns]).sum(0)

    return log_density_along


def round_values(limits: Range, scale: Scale, apart: float = APART) -> list[float]:
    """Round numbers within the limits of x in ascending order, at least `apart` of the axis from each other.

    The roundest numbers have priority: zero, then powers of ten.
    """
    assert scale.reach is not None
    (low, high), (begin, end) = limits, scale.places(np.array(limits))
    decades = range(math.floor(math.log10(max(abs(low), abs(high)))), math.floor(math.log10(scale.reach)) - 1, -1)
    wanted = [0.0, *(sign * digit * 10.0**k for digit in (1, 5, 2) for k in decades for sign in (-1, 1))]
    # values far from zero may contain no such number
    wanted += list(MaxNLocator(2).tick_values(scale.centre - scale.reach, scale.centre + scale.reach))
    taken: list[float] = []
    for value in wanted:
        gaps = np.abs(scale.places(np.array(taken)) - scale.places(np.array(value)))
        if low <= value <= high and (gaps > apart * (end - begin)).all():
            taken.append(float(value))
    return sorted(taken)


def short(value: float) -> str:
    """-200, 5e4, 1.25e6."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
