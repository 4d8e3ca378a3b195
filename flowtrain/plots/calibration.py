"""Are latents of data draws from the base? Their probability integral transforms beside those of a perfect model.

Shape: n test points.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flowtrain.errors import FlowtrainError
from flowtrain.plots import points, style
from flowtrain.plots.points import Array

HEIGHT = 3.55
RADIUS = "radius"
COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
BAND = "#E4E4E4"
# the 95% quantile of Kolmogorov's distribution, of sqrt(n) sup |F_n(u) - u|
KOLMOGOROV = 1.358
# a curve of more corners looks no different
CORNERS = 400


def draw_calibration(path: Path, *, pit: Mapping[str, Tensor], title: str) -> None:
    """Draw probability integral transforms u (n,) by name, z1, z2, ... and "radius", to `path`.

    Where the model is the truth each u is uniform on [0, 1]. On the left their histograms, on the right F_n(u) - u,
    F_n the share of the n points that is at most u. The bands hold 95% of the heights of a bin, counts ~ B(n, 1/K) of
    K bins, and 95% of whole curves, +-1.358/sqrt(n).
    """
    transforms = {name: _transforms(name, u) for name, u in pit.items()}
    counts = {len(u) for u in transforms.values()}
    if len(counts) != 1:
        raise FlowtrainError(f"a calibration is drawn of one number of points, not of {sorted(counts)}")
    (n,) = counts
    bins = int(np.clip(n // 10, 5, 20))
    with style.styled():
        figure = style.new_figure(HEIGHT, title)
        left, right = (style.add_axes(figure, edge, 0.52, 3.72, 2.38) for edge in (0.62, 5.14))
        # the radius, which sums the others up, on top of them
        for name in sorted(transforms, key=lambda name: name == RADIUS):
            look = _look(name, list(transforms))
            heights, edges = points.histogram_1d(transforms[name], (0.0, 1.0), bins)
            left.stairs(heights, edges, baseline=None, **look)
            right.plot(*deviation(transforms[name]), **{**look, "label": None})
        _band(left, *bin_band(n, bins), label="95% of perfect models, bin by bin (left), curve by curve (right)")
        _band(right, -KOLMOGOROV / n**0.5, KOLMOGOROV / n**0.5)
        left.axhline(1, color=style.MUTED, linewidth=0.8, zorder=0.5)
        right.axhline(0, color=style.MUTED, linewidth=0.8, zorder=0.5)
        _frame(left, right)
        style.legend_above(left)
        style.save(figure, path)


def _transforms(name: str, u: Tensor) -> Array:
    """u in ascending order, (n,)."""
    values = points.to_numpy(u)
    # not NaN either; a rounding error past the edge is none
    if values.ndim != 1 or values.size == 0 or not (np.abs(values - 0.5) <= 0.5 + 1e-6).all():
        raise FlowtrainError(f"cannot plot the transforms {name!r}: give at least one number from 0 to 1, as (n,)")
    return np.sort(values.clip(0, 1))


def bin_band(n: int, bins: int) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of B(n, 1/bins), over the expected n/bins."""
    k = torch.arange(n + 1, dtype=torch.float64)
    choices = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (choices - k * math.log(bins) + (n - k) * math.log1p(-1 / bins)).exp().cumsum(0)
    low, high = torch.searchsorted(below, below.new_tensor([0.025, 0.975])).tolist()
    return low * bins / n, high * bins / n


def deviation(u: Array) -> tuple[Array, Array]:
    """u and F_n(u) - u at both sides of the steps of F_n, for ascending u (n,), thinned to CORNERS steps."""
    n = len(u)
    # by rank: a crowd of equal u keeps its upright step, and the places are dense where the points are
    rank = np.unique(np.linspace(0, n - 1, CORNERS).astype(int))
    x = np.repeat(u[rank], 2)
    share = np.stack((rank, rank + 1), axis=1).ravel() / n
    return np.concatenate(([0.0], x, [1.0])), np.concatenate(([0.0], share - x, [0.0]))


def _look(name: str, names: list[str]) -> dict[str, Any]:
    """Colour, width and label of a line. Many latents look alike, and the first of them speaks for all."""
    if name == RADIUS:
        return {"color": style.INK, "linewidth": 1.6, "label": "radius"}
    latents = [each for each in names if each != RADIUS]
    if len(latents) <= len(COLOURS):
        return {"color": COLOURS[latents.index(name)], "linewidth": 1.4, "label": style.literal(name, most=12)}
    return {"color": style.BLUE, "linewidth": 0.9, "alpha": 0.5, "label": "latents" if name == latents[0] else None}


def _band(axes: Axes, low: float, high: float, label: str | None = None) -> None:
    axes.fill_between([0, 1], low, high, color=BAND, linewidth=0, zorder=0, label=label)


def _frame(left: Axes, right: Axes) -> None:
    """Limits that show bands and lines, and words."""
    for axes, middle, least in ((left, 1.0, 0.25), (right, 0.0, 0.0)):
        low, high = axes.dataLim.intervaly
        half = max(least, 1.12 * max(middle - low, high - middle))
        axes.set(xlim=(-0.01, 1.01), ylim=(max(middle - half, -0.02 * half) if middle else -half, middle + half))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axes.set_xlabel("u, the quantile of a test point under the model")
    left.set_ylabel("density of u, 1 for a perfect model")
    right.set_ylabel("share of points below u, minus u")
