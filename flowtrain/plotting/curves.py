"""Training curves: NLL, NFE, gradient norm and learning rate, from the rows of metrics.jsonl.

Shapes: R is the number of rows of one split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flowtrain.plotting import style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import FARTHEST, Array, Range

Rows = Sequence[Mapping[str, Any]]

# inches: the margins, and the room above panels for their legends
LEFT, BOTTOM, BETWEEN, HEAD = 0.78, 0.5, 0.42, 0.66
# letters of a tick label that fit beside the label of the axis, and the font size of ticks
MOST_LETTERS, TICK_SIZE = 6, 8.0
# inches: the margin at the right, with and without a second y axis
RIGHT, BARE = 0.72, 0.2
TALL, SHORT = 2.6, 1.05

NAMES = {"val": "validation"}
COLOURS = (style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.BLUE, style.INK, style.MUTED)
# the style of lines, which changes once all colours are used
LINES = ("-", "--", ":")
# the largest number of curves whose best values are in the legend
WITH_BEST = 4


@dataclass(frozen=True)
class Series:
    """One quantity by step for one split: two arrays (R,) of finite values."""

    steps: Array
    values: Array

    def __bool__(self) -> bool:
        return len(self.values) > 0

    def positive(self) -> "Series":
        """Returns the positive values, which a logarithmic axis can show."""
        kept = self.values > 1 / FARTHEST
        return Series(self.steps[kept], self.values[kept])

    def median(self) -> "Series":
        """Returns the running median over about a thirtieth of the rows, at no more than 500 steps."""
        count = len(self.values)
        if count < 20:
            return self
        half = max(2, count // 60)
        places = np.unique(np.linspace(0, count - 1, 500).astype(int))
        middles = [np.median(self.values[max(0, place - half) : place + half + 1]) for place in places]
        return Series(self.steps[places], np.array(middles))


def draw_curves(
    path: Path,
    *,
    rows: Rows,
    title: str,
    entropy: float | None = None,
    kept: int | None = None,
    options: PlotOptions = DEFAULT,
    name: str = "NLL",
    lowest: str = "entropy of the data",
) -> None:
    """Draws the training curves in the rows of metrics.jsonl: the NLL of each split, and below it other quantities.

    A quantity that is absent, null or not finite at a step is left out there. The NLL is in bits per dimension if any
    row has them, else in nats. A quantity that is zero at all steps is not drawn.

    Args:
        entropy: the differential entropy of the data in nats, the lowest NLL that a model can reach; drawn if the NLL
            is in nats.
        kept: the step of the checkpoint that is evaluated, which is marked.
        name: the name of the quantity in the column nll, such as "negative ELBO" for a target.
        lowest: the name of `entropy` in the legend.
    """
    train = _split(rows, "train")
    below = [draw for draw, keys in PANELS if any(nonzero_series(train, key) for key in keys)]
    base = BOTTOM + len(below) * (SHORT + BETWEEN)
    width = style.WIDTH - LEFT - (RIGHT if below else BARE)
    others = [name for name in _splits(rows) if name != "val"]
    # the legend of several runs can need more than one row
    more = style.legend_height([*map(_name, others), lowest], width) if len(others) > 1 else 0.0
    with style.styled():
        figure = style.new_figure(base + TALL + HEAD + more, title, options)
        panels = [style.add_axes(figure, LEFT, base, width, TALL)]
        _likelihood(panels[0], rows, entropy, kept, (name, lowest))
        for place, draw in enumerate(reversed(below)):
            panels.insert(1, style.add_axes(figure, LEFT, BOTTOM + place * (SHORT + BETWEEN), width, SHORT))
            draw(panels[1], train)
        _share_steps(panels, rows, kept)
        for axes in figure.axes:
            # the label has the same place in all panels, whatever the width of the tick labels
            across = -0.54 if axes in panels else width + 0.56
            axes.yaxis.set_label_coords(across / width, 0.5)
            places = list(axes.yaxis.get_majorticklocs())
            longest = max(map(len, axes.yaxis.get_major_formatter().format_ticks(places)), default=0)
            if longest > MOST_LETTERS:
                axes.yaxis.set_tick_params(labelsize=TICK_SIZE * MOST_LETTERS / longest)
        style.save(figure, path, options)


def series_of(rows: Rows, key: str, x: str = "step") -> Series:
    """Returns the finite values of `key` by step, or by `x`. If several rows have the same step, the last is used."""
    found = {}
    for row in rows:
        step, value = row.get(x), row.get(key)
        if is_finite(step) and is_finite(value):
            found[float(step)] = min(max(float(value), -FARTHEST), FARTHEST)
    steps = sorted(found)
    return Series(np.array(steps), np.array([found[step] for step in steps]))


def nonzero_series(rows: Rows, key: str) -> Series:
    """Returns the values of `key` by step; empty if all are zero."""
    found = series_of(rows, key)
    return found if found.values.any() else Series(np.array([]), np.array([]))


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value of a row is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _splits(rows: Rows) -> list[str]:
    """Returns the names of the splits other than training."""
    return list(dict.fromkeys(str(row["split"]) for row in rows if row.get("split") not in (None, "train")))


def _name(split: str) -> str:
    return style.abbreviated(NAMES.get(split, split), most=30)


def _split(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row.get("split") == name]


def _likelihood(
    axes: Axes,
    rows: Rows,
    entropy: float | None,
    kept: int | None = None,
    names: tuple[str, str] = ("NLL", "entropy of the data"),
) -> None:
    key, unit = ("bits_per_dim", "bits/dim") if series_of(rows, "bits_per_dim") else ("nll", "nats")
    axes.grid(axis="y")
    axes.set_ylabel(f"{names[0]} ({unit})")
    train = series_of(_split(rows, "train"), key)
    others = {split: curve for split in _splits(rows) if (curve := series_of(_split(rows, split), key))}
    if not train and not others:
        style.annotate(axes, f"no finite {names[0]}")
        axes.yaxis.set_major_locator(NullLocator())
        return
    if train:
        _noisy(axes, train, style.BLUE, "training")
    for place, (split, curve) in enumerate(others.items()):
        colour, line = COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS) % len(LINES)]
        words = f" (best {_number(curve.values.min())})" if len(others) <= WITH_BEST else ""
        best = f"{_name(split)}{words}"
        every = max(1, len(curve.values) // 40)
        axes.plot(curve.steps, curve.values, f"{line}o", color=colour, markersize=3.5, markevery=every, label=best)
    low, high = _frame(train, list(others.values()))
    if unit == "nats" and is_finite(entropy):
        axes.axhline(entropy, color=style.INK, linestyle=style.DASHES, linewidth=1.1, label=names[1])
        low, high = min(low, entropy), max(high, entropy)
    margin = 0.07 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    if kept is not None:
        _mark_kept(axes, kept, others.get("val"))
    style.legend_above(axes)
    _name_hidden(axes, [train, *others.values()])


def _mark_kept(axes: Axes, kept: int, validation: Series | None) -> None:
    """Draws a ring around the validation of the kept checkpoint, or without it a mark at the lower edge."""
    at = np.flatnonzero(np.array([]) if validation is None else validation.steps == kept)
    look: dict[str, Any] = {
        "color": style.INK,
        "linewidth": 0,
        "clip_on": False,
        "label": f"kept checkpoint, step {kept:,}",
    }
    if len(at) and validation is not None:
        axes.plot([kept], validation.values[at], "o", markersize=9, markerfacecolor="none", markeredgewidth=1.4, **look)
    else:
        axes.plot([kept], [0], "^", markersize=6, transform=axes.get_xaxis_transform(), **look)


def _frame(train: Series, others: Sequence[Series]) -> Range:
    """Returns the range of the NLL axis.

    It covers the smooth curves, but is at most 8 times the range of 75% of the rows. Single spikes, a steep start and a
    divergence are outside this range.
    """
    curves = [train, *others] if train else others
    low = min(float(np.quantile(curve.values, 0.005)) for curve in curves)
    bulk = max(float(np.quantile(curve.values, 0.75)) for curve in curves)
    high = max(float(curve.values.max()) for curve in (train.median(), *others) if curve)
    if train:
        high = max(high, float(np.quantile(train.values, 0.97)))
    return low, min(high, low + 8 * (bulk - low)) if bulk > low else high


def _name_hidden(axes: Axes, curves: Sequence[Series]) -> None:
    """Writes how many values are outside the frame, because readers could think that the frame shows all values."""
    values = np.concatenate([curve.values for curve in curves])
    low, high = axes.get_ylim()
    hidden = values[(values < low) | (values > high)]
    if len(hidden):
        farthest = hidden[np.argmax(np.abs(hidden - (low + high) / 2))]
        words = f"outside the frame: {len(hidden):,} of {len(values):,} values, such as {_number(farthest)}"
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        look: dict[str, Any] = {"color": style.MUTED, "size": 8, "ha": "right", "va": "top", "bbox": box}
        axes.text(0.995, 0.975, words, transform=axes.transAxes, **look)


def _solver(axes: Axes, train: Rows) -> None:
    axes.grid(axis="y")
    axes.set_ylabel("NFE per step")
    top = 0.0
    for key, colour, label in (
        ("nfe_forward", style.GREEN, "NFE, forward"),
        ("nfe_backward", style.PURPLE, "NFE, backward"),
    ):
        curve = nonzero_series(train, key)
        if curve:
            _noisy(axes, curve, colour, label)
            # a single batch can need a hundred times the usual NFE
            top = max(top, min(curve.values.max(), 3 * curve.median().values.max()))
    axes.set_ylim(0, 1.08 * top or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    tolerance = series_of(train, "rtol").positive()
    if not tolerance:
        style.legend_above(axes)
        return
    right = _right_scale(axes, "rtol")
    _line(right, tolerance, style.MUTED, "rtol (right)", linestyle=style.DASHES, linewidth=1.2)
    style.make_logarithmic(right.yaxis, [float(value) for value in tolerance.values])
    style.legend_above(axes, right)


def _optimizer(axes: Axes, train: Rows) -> None:
    gradient, rate = series_of(train, "grad_norm").positive(), series_of(train, "lr")
    axes.grid(axis="y")
    axes.set_ylabel("gradient norm")
    if gradient:
        _noisy(axes, gradient, style.BLUE, "gradient norm")
        style.make_logarithmic(axes.yaxis, [float(value) for value in gradient.values])
    else:
        axes.yaxis.set_major_locator(NullLocator())
    if not rate:
        style.legend_above(axes)
        return
    right = _right_scale(axes, "learning rate")
    _line(right, rate, style.ORANGE, "learning rate (right)")
    right.set_ylim(0, 1.12 * rate.values.max() or 1.0)
    right.yaxis.set_major_locator(MaxNLocator(3))
    style.legend_above(axes, right)


def _matching(axes: Axes, train: Rows) -> None:
    curve = series_of(train, "matching")
    axes.grid(axis="y")
    axes.set_ylabel("matching loss")
    _noisy(axes, curve, style.BLUE, "matching loss")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    style.legend_above(axes)


# the panels below the NLL. A panel is drawn if any of its keys has a value other than zero
PANELS: tuple[tuple[Callable[[Axes, Rows], None], tuple[str, ...]], ...] = (
    (_matching, ("matching",)),
    (_solver, ("nfe_forward", "nfe_backward")),
    (_optimizer, ("grad_norm", "lr")),
)


def _line(axes: Axes, curve: Series, colour: str, label: str, **look: Any) -> None:
    # a line with a single point is invisible
    marker = "o" if len(curve.values) == 1 else ""
    axes.plot(curve.steps, curve.values, color=colour, label=label, marker=marker, markersize=3.5, **look)


def _noisy(axes: Axes, curve: Series, colour: str, label: str) -> None:
    """Draws the values as a pale line, and their running median on top."""
    axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.8)
    _line(axes, curve.median(), colour, label)


def _right_scale(axes: Axes, name: str) -> Axes:
    """Returns a second y axis, on the right, over the same steps."""
    right = axes.twinx()
    style.mark_numbers(right)
    right.spines["right"].set_visible(True)
    right.set_ylabel(name)
    return right


def _share_steps(panels: Sequence[Axes], rows: Rows, kept: int | None) -> None:
    """Gives all panels the same steps, with labels below the last panel."""
    steps = [float(step) for row in rows if is_finite(step := row.get("step"))]
    low, high = (min(steps), max(steps)) if steps else (0.0, 1.0)
    margin = 0.01 * (high - low) or 1.0
    for axes in panels:
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _step(value, high)))
        axes.tick_params(labelbottom=axes is panels[-1])
        if kept is not None:
            axes.axvline(kept, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0.5)
    panels[-1].set_xlabel("step")


def _step(value: float, highest: float) -> str:
    """Returns the label of a step: "2,000" in a short run, "250k" or "1.5M" in a long run."""
    if highest < 100_000 or value == 0:
        return f"{value:,.0f}"
    return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"


def _number(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"
