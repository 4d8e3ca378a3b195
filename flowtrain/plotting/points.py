"""From tensors to the points, ranges and axes that a figure is drawn from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.utils.errors import FlowtrainError

Array = NDArray[np.float64]
# beyond it the products and squares of a figure overflow: as good as infinite
FARTHEST = 1e30
LogDensity = Callable[[Tensor], Tensor]
Range = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """The finite rows of a batch, shape (N, d), and how many rows were left out as not finite."""

    values: Array
    dropped: int

    def lost(self) -> str:
        """How many rows were left out, in words; empty if none were."""
        return f"{self.dropped:,} not finite" if self.dropped else ""


def noted(name: str, *notes: str) -> str:
    """`name`, with the notes that are not empty in brackets."""
    said = ", ".join(note for note in notes if note)
    return f"{name} ({said})" if said else name


def missing(density: Array) -> str:
    """The share of a density that is not finite, in words; empty if there is none."""
    share = float(np.isnan(density).mean())
    return f"{share:.1%} not finite" if share else ""


def to_numpy(values: Tensor | NDArray[np.generic]) -> Array:
    """Values on any device, of any real dtype, with or without a graph, as a float64 array."""
    return np.asarray(torch.as_tensor(values).detach().cpu().to(torch.float64).numpy(), dtype=np.float64)


def as_points(data: Tensor, samples: Tensor) -> tuple[Points, Points]:
    """Data (N, d) and samples (M, d) as points. There must be finite data; samples may all be lost."""
    real, model = data_points(data), finite("samples", samples)
    if real.values.shape[1] != model.values.shape[1]:
        raise FlowtrainError(
            f"cannot plot data with {real.values.shape[1]} columns beside samples with "
            f"{model.values.shape[1]}: give both in the same space"
        )
    return real, model


def data_points(data: Tensor, width: int | None = None) -> Points:
    """Data (N, d) as points, d = `width` where that is given.

    Raises:
        FlowtrainError: none of its rows is finite, or another width.
    """
    real = finite("data", data)
    if len(real.values) == 0:
        raise FlowtrainError(f"cannot plot the data: none of its {real.dropped} rows is finite")
    if width is not None:
        require_width(real, width)
    return real


def finite(name: str, batch: Tensor) -> Points:
    """The finite rows of a batch (N, d).

    Raises:
        FlowtrainError: another shape, or no row at all.
    """
    values = to_numpy(batch)
    if values.ndim != 2 or values.size == 0:
        raise FlowtrainError(
            f"cannot plot {name} of shape {tuple(values.shape)}: give at least one row, as (rows, columns)"
        )
    kept = values[(np.abs(values) < FARTHEST).all(axis=1)]
    return Points(kept, len(values) - len(kept))


def require_width(points: Points, width: int) -> None:
    """Refuse points that do not have `width` columns."""
    if points.values.shape[1] != width:
        raise FlowtrainError(f"this figure is for {width} columns, the data has {points.values.shape[1]}")


def robust_range(values: Array, margin: float = 0.12) -> Range:
    """A range that shows all but the outermost half percent of `values` (N,) on each side, and a margin."""
    low, high = (float(edge) for edge in np.quantile(values, (0.005, 0.995)))
    span = high - low
    size = max(abs(low), abs(high))
    if span <= 1e-9 * size or size < 1 / FARTHEST:
        half = max(0.5, 1e-3 * size)
        return low - half, high + half
    return low - margin * span, high + margin * span


def centres(limits: Range, count: int) -> Array:
    """The centres of `count` equal cells of a range, shape (count,)."""
    low, high = limits
    return np.asarray(low + (np.arange(count) + 0.5) * ((high - low) / count), dtype=np.float64)


def grid_2d(limits: tuple[Range, Range], count: int) -> Array:
    """The centres of count by count equal cells, shape (count**2, 2): y runs fastest."""
    x, y = np.meshgrid(*(centres(edge, count) for edge in limits), indexing="ij")
    return np.stack((x.ravel(), y.ravel()), axis=1)


def evaluate(log_density: LogDensity, grid: Array, moments: int = 1) -> Array:
    """The density at `grid` (G, d), shape (G,), from one call of `log_density`; NaN where it is not finite.

    Of several moments, one after the other, (moments * G,).

    The call gets a float32 tensor on the CPU and runs in the caller's gradient mode: a density that
    differentiates inside would not work under a no_grad set here.
    """
    answer = log_density(torch.from_numpy(grid).to(torch.float32))
    if answer.numel() != moments * len(grid):
        raise FlowtrainError(f"log_density returned shape {tuple(answer.shape)} for {len(grid)} points")
    # torch, because numpy warns where exp overflows
    density = to_numpy(torch.exp(torch.as_tensor(to_numpy(answer)))).reshape(moments * len(grid))
    density[~np.isfinite(density)] = np.nan
    return density


def moments_2d(log_density: LogDensity, limits: tuple[Range, Range], count: int, moments: int) -> Array:
    """Densities at so many moments on a grid, (moments, count, count), from one call: (G, 2) to (moments, G)."""
    grid = grid_2d(limits, count)
    return evaluate(lambda x: log_density(x).flatten(), grid, moments).reshape(moments, count, count)


def common_count(real: Array, model: Array) -> int:
    """The count that sets the fineness of both pictures: a finer one of the larger set would look narrower.

    It is that of the smaller set, but a handful of samples does not make the data coarse.
    """
    return max(min(len(real), len(model)), len(real) // 20, 1)


def bins_1d(count: int) -> int:
    """Bins for a histogram of `count` points, by the Rice rule."""
    return int(np.clip(2 * count ** (1 / 3), 12, 100))


def fine_bins(values: Array, limits: Range, count: int, most: int = 100) -> int:
    """Number of bins of a histogram of `count` points by the rule of Freedman and Diaconis, at least `bins_1d`.

    Bins are 2 IQR count^(-1/3) wide, where IQR is the interquartile range of `values` (N,). Points that lie close
    together on a long axis then get bins that show their shape.
    """
    first, third = np.quantile(values, (0.25, 0.75))
    usual, width = bins_1d(count), 2 * float(third - first) * count ** (-1 / 3)
    return max(usual, min(most, int((limits[1] - limits[0]) / width))) if width > 0 else usual


def outside(points: Points, limits: Sequence[Range]) -> str:
    """The share of points (N, d) outside the limits, in words; empty below 5%."""
    lows, highs = np.array(limits).T
    beyond = ((points.values < lows) | (points.values > highs)).any(axis=1)
    share = float(beyond.mean()) if len(beyond) else 0.0
    return f"{share:.0%} outside" if share >= 0.05 else ""


def blur_2d(count: int) -> float:
    """The blur of a two-dimensional histogram of `count` points, in bins.

    It tames the counting noise and hardly moves an edge.
    """
    return float(np.clip((30_000 / count) ** (1 / 6), 0.6, 3.0))


def histogram_1d(values: Array, limits: Range, bins: int) -> tuple[Array, Array]:
    """Density (K,) of `values` (N,) and the bin edges (K + 1,). Values outside `limits` count as mass."""
    counts, edges = np.histogram(values, bins=bins, range=limits)
    return counts / (max(len(values), 1) * (edges[1] - edges[0])), edges


def histogram_2d(values: Array, limits: tuple[Range, Range], bins: int, blur: float) -> Array:
    """Density (K, K) of `values` (N, 2), first index along x, blurred by a Gaussian `blur` bins wide.

    Values outside `limits` count as mass, and what is blurred past the edge is lost.
    """
    counts, x_edges, y_edges = np.histogram2d(values[:, 0], values[:, 1], bins=bins, range=limits)
    area = (x_edges[1] - x_edges[0]) * (y_edges[1] - y_edges[0])
    place = np.arange(bins)
    kernel = np.exp(-0.5 * ((place[:, None] - place) / blur) ** 2) / (blur * np.sqrt(2 * np.pi))
    return np.asarray(kernel @ (counts / (max(len(values), 1) * area)) @ kernel, dtype=np.float64)


def peak(density: Array, mass: float = 0.99) -> float:
    """The height below which `mass` of the probability lies; 0 where there is none.

    Unlike the maximum it is hardly moved by one lucky bin or a needle in the density.
    """
    heights = np.sort(density[np.isfinite(density) & (density > 0)])
    if len(heights) == 0:
        return 0.0
    # scaled first: the sum of heights near the largest float would overflow
    below = np.cumsum(heights / heights[-1])
    return float(heights[np.searchsorted(below, mass * below[-1])])


# an axis is compressed if the range of the values exceeds this many times half their interquartile range
LONGEST_TAIL = 30.0
# the data have a single tail if one side is this many times longer than the other
ONE_SIDED = 10.0
# smallest distance between two ticks of a compressed axis, as a share of its length
TICKS_APART = 0.13


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

    def mark(self, axis: Axis, apart: float = TICKS_APART) -> None:
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
    if not 0 < LONGEST_TAIL * (third - first) / 2 < high - low:
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


def round_values(limits: Range, scale: Scale, apart: float = TICKS_APART) -> list[float]:
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
