"""Converts tensors to the points, ranges and histograms that a figure is drawn from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.utils.errors import FlowtrainError

Array = NDArray[np.float64]
# larger values count as infinite, because their products and squares overflow
FARTHEST = 1e30
LogDensity = Callable[[Tensor], Tensor]
Range = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """The finite rows of a batch, shape (N, d), and the number of rows that are not finite."""

    values: Array
    dropped: int

    def dropped_note(self) -> str:
        """Returns a note such as "3 not finite"; empty if all rows are finite."""
        return f"{self.dropped:,} not finite" if self.dropped else ""


def noted(name: str, *notes: str) -> str:
    """Returns a name with its notes in brackets. Empty notes are left out."""
    said = ", ".join(note for note in notes if note)
    return f"{name} ({said})" if said else name


def missing_note(density: Array) -> str:
    """Returns a note with the share of density values that are not finite; empty if all are finite."""
    share = float(np.isnan(density).mean())
    return f"{share:.1%} not finite" if share else ""


def to_numpy(values: Tensor | NDArray[np.generic]) -> Array:
    """Converts values of any device and real dtype to a float64 array."""
    return np.asarray(torch.as_tensor(values).detach().cpu().to(torch.float64).numpy(), dtype=np.float64)


def as_points(data: Tensor, samples: Tensor) -> tuple[Points, Points]:
    """Converts data (N, d) and samples (M, d) to points. Some data must be finite; samples need not be."""
    real, model = data_points(data), finite("samples", samples)
    if real.values.shape[1] != model.values.shape[1]:
        raise FlowtrainError(
            f"cannot plot data with {real.values.shape[1]} columns beside samples with "
            f"{model.values.shape[1]}: give both in the same space"
        )
    return real, model


def data_points(data: Tensor, width: int | None = None) -> Points:
    """Converts data (N, d) to points.

    Args:
        width: the required d; None: any.

    Raises:
        FlowtrainError: no row is finite, or d is not `width`.
    """
    real = finite("data", data)
    if len(real.values) == 0:
        raise FlowtrainError(f"cannot plot the data: none of its {real.dropped} rows is finite")
    if width is not None:
        require_width(real, width)
    return real


def finite(name: str, batch: Tensor) -> Points:
    """Returns the finite rows of a batch (N, d).

    Raises:
        FlowtrainError: the batch has another shape or no rows.
    """
    values = to_numpy(batch)
    if values.ndim != 2 or values.size == 0:
        raise FlowtrainError(
            f"cannot plot {name} of shape {tuple(values.shape)}: give at least one row, as (rows, columns)"
        )
    kept = values[is_finite(values)]
    return Points(kept, len(values) - len(kept))


def is_finite(values: Array) -> NDArray[np.bool_]:
    """Whether each row of values (N, d) is finite, shape (N,)."""
    return np.asarray((np.abs(values) < FARTHEST).all(axis=1))


def require_width(points: Points, width: int) -> None:
    """Raises FlowtrainError if the points do not have `width` columns."""
    if points.values.shape[1] != width:
        raise FlowtrainError(f"this figure is for {width} columns, but the data have {points.values.shape[1]}")


def robust_range(values: Array, margin: float = 0.12) -> Range:
    """Returns the range between the 0.5% and 99.5% quantiles of `values` (N,), widened on both sides.

    Each side is widened by `margin` times the length of the range. A range of length 0 is widened to a positive length,
    so that its ends can be the limits of an axis.
    """
    low, high = (float(edge) for edge in np.quantile(values, (0.005, 0.995)))
    span = high - low
    size = max(abs(low), abs(high))
    if span <= 1e-9 * size or size < 1 / FARTHEST:
        half = max(0.5, 1e-3 * size)
        return low - half, high + half
    return low - margin * span, high + margin * span


# the range of an axis without limits
EVERYWHERE = (-math.inf, math.inf)


def common_range(values: Array, samples: Array, margin: float = 0.12) -> Range:
    """The robust range of data `values` (N,). If all values are equal, it reaches over samples (M,), too."""
    if len(samples) == 0 or np.ptp(values) > 0:
        return robust_range(values, margin)
    return robust_range(np.array([values[0], *np.quantile(samples, (0.005, 0.995))]), margin)


def centres(limits: Range, count: int) -> Array:
    """Returns the centres of `count` equal cells of a range, shape (count,)."""
    low, high = limits
    return np.asarray(low + (np.arange(count) + 0.5) * ((high - low) / count), dtype=np.float64)


def grid_2d(limits: tuple[Range, Range], count: int) -> Array:
    """Returns the centres of count x count equal cells, shape (count**2, 2). The second coordinate varies fastest."""
    x, y = np.meshgrid(*(centres(edge, count) for edge in limits), indexing="ij")
    return np.stack((x.ravel(), y.ravel()), axis=1)


def evaluate(log_density: LogDensity, grid: Array, moments: int = 1) -> Array:
    """Evaluates exp(log_density) at `grid` (G, d), shape (moments * G,). Values that are not finite become NaN.

    `log_density` is called once, with a float32 tensor on the CPU. The gradient mode does not change, because a density
    may differentiate internally.
    """
    answer = log_density(torch.from_numpy(grid).to(torch.float32))
    if answer.numel() != moments * len(grid):
        raise FlowtrainError(f"log_density returned shape {tuple(answer.shape)} for {len(grid)} points")
    # torch computes exp, because NumPy would warn of overflows
    density = to_numpy(torch.exp(torch.as_tensor(to_numpy(answer)))).reshape(moments * len(grid))
    density[~np.isfinite(density)] = np.nan
    return density


def moments_2d(log_density: LogDensity, limits: tuple[Range, Range], count: int, moments: int) -> Array:
    """Evaluates densities at several moments on a grid, shape (moments, count, count).

    `log_density` is called once and maps (G, 2) to (moments, G).
    """
    grid = grid_2d(limits, count)
    return evaluate(lambda x: log_density(x).flatten(), grid, moments).reshape(moments, count, count)


def common_count(real: Array, model: Array) -> int:
    """Returns the number of points from which the width of bins is computed, for both data and samples.

    It is the smaller of the two numbers, but at least a twentieth of the number of data, so that a small number of
    samples does not make the bins of the data coarse.
    """
    return max(min(len(real), len(model)), len(real) // 20, 1)


def bins_1d(count: int) -> int:
    """Returns the number of bins for a histogram of `count` points by the Rice rule, between 12 and 100."""
    return int(np.clip(2 * count ** (1 / 3), 12, 100))


# the smallest number of bins that `count_bins` returns
FEWEST_BINS = 20
# for a Gaussian, the interquartile range divided by the length of the shortest interval with a quarter of the mass
QUARTER = 2.117


def count_bins(values: Array, limits: Range, count: int, most: int = 200) -> int:
    """Returns the number of bins of a histogram over `limits`, between 20 and `most`.

    The rule by Freedman and Diaconis makes bins 2 IQR count^(-1/3) wide. The interquartile range (IQR) of
    `values` (N,) is replaced by 2.117 times the length of the shortest interval that contains a quarter of the values.
    Both are equal for a Gaussian, but the IQR of two separate modes contains the gap between them.

    Args:
        count: the number of points in the histogram.

    Source: Freedman and Diaconis 1981, On the histogram as a density estimator.
    """
    ordered = np.sort(values)
    quarter = max(1, len(ordered) // 4)
    shortest = float((ordered[quarter:] - ordered[:-quarter]).min()) if len(ordered) > quarter else 0.0
    width = 2 * QUARTER * shortest * count ** (-1 / 3)
    # if a quarter of the values are equal, the shortest interval has length 0. Then the Rice rule sets the number
    wanted = (limits[1] - limits[0]) / width if width > 0 else 2 * count ** (1 / 3)
    return int(np.clip(wanted, FEWEST_BINS, most))


def outside_note(points: Points, limits: Sequence[Range]) -> str:
    """Returns a note with the share of points (N, d) outside the limits; empty below 5%."""
    lows, highs = np.array(limits).T
    beyond = ((points.values < lows) | (points.values > highs)).any(axis=1)
    share = float(beyond.mean()) if len(beyond) else 0.0
    return f"{share:.0%} outside" if share >= 0.05 else ""


def blur_2d(count: int) -> float:
    """Returns the standard deviation, in bins, of the blur of a two-dimensional histogram of `count` points.

    The blur reduces the counting noise and hardly moves an edge.
    """
    return float(np.clip((30_000 / count) ** (1 / 6), 0.6, 3.0))


def histogram_1d(values: Array, limits: Range, bins: int) -> tuple[Array, Array]:
    """Returns the density (K,) of `values` (N,) and the bin edges (K + 1,).

    Values outside the limits count in N, so the density integrates to their share within the limits.
    """
    counts, edges = np.histogram(values, bins=bins, range=limits)
    return counts / (max(len(values), 1) * (edges[1] - edges[0])), edges


def histogram_2d(values: Array, limits: tuple[Range, Range], bins: int, blur: float | tuple[float, float]) -> Array:
    """Returns the density (K, K) of `values` (N, 2), first index along x, blurred by a Gaussian.

    Values outside the limits count in N, and their blur reaches into the limits.

    Args:
        blur: the standard deviation of the Gaussian in bins; a pair is for x and y.
    """
    blurs = blur if isinstance(blur, tuple) else (blur, blur)
    cells = [(high - low) / bins for low, high in limits]
    beyond = [math.ceil(4 * each) for each in blurs]
    wide = [
        (low - extra * cell, high + extra * cell)
        for (low, high), extra, cell in zip(limits, beyond, cells, strict=True)
    ]
    counts, *_ = np.histogram2d(values[:, 0], values[:, 1], bins=[bins + 2 * extra for extra in beyond], range=wide)
    across, up = (_blur_weights(bins, extra, each) for extra, each in zip(beyond, blurs, strict=True))
    return np.asarray(across @ (counts / (max(len(values), 1) * cells[0] * cells[1])) @ up.T, dtype=np.float64)


def _blur_weights(bins: int, beyond: int, blur: float) -> Array:
    """Returns the weights (bins, bins + 2 beyond) that blur a histogram with `beyond` more bins at each end."""
    place = np.arange(-beyond, bins + beyond)
    return np.asarray(np.exp(-0.5 * ((np.arange(bins)[:, None] - place) / blur) ** 2) / (blur * np.sqrt(2 * np.pi)))


def peak(density: Array, mass: float = 0.99) -> float:
    """Returns the height below which `mass` of the probability lies; 0 if the density is 0 everywhere.

    Unlike the maximum, this height hardly depends on a single bin or on a narrow peak.
    """
    heights = np.sort(density[np.isfinite(density) & (density > 0)])
    if len(heights) == 0:
        return 0.0
    # the heights are divided by the largest one, because their sum could overflow
    below = np.cumsum(heights / heights[-1])
    return float(heights[np.searchsorted(below, mass * below[-1])])
