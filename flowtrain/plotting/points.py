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
