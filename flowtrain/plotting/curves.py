"""The course of a run: likelihood, solver work, learning rate and gradient, from the rows of metrics.jsonl.

Shape: R rows of one split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flowtrain.plotting import style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import FARTHEST, Array, Range

Rows = Sequence[Mapping[str, Any]]

# inches
LEFT, BOTTOM, FULL, GAP, BETWEEN, SCALE = 0.72, 0.5, 8.14, 0.75, 0.85, 0.42
TALL, SHORT = 2.75, 1.35

NAMES = {"val": "validation"}
COLOURS = (style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.BLUE, style.INK, style.MUTED)
# the most curves whose best values fit in the legend
WITH_BEST = 4


@dataclass(frozen=True)
class Course:
    """One quantity along the steps of one split: two arrays of shape (R,), finite values only."""

    steps: Array
    values: Array

    def __bool__(self) -> bool:
        return len(self.values) > 0

    def positive(self) -> "Course":
        """What a logarithmic axis can show."""
        kept = self.values > 1 / FARTHEST
        return Course(self.steps[kept], self.values[kept])

    def median(self) -> "Course":
        """The running median over about a thirtieth of the rows, at 500 places at most."""
        count = len(self.values)
        if count < 20:
            return self
        half = max(2, count // 60)
        places = np.unique(np.linspace(0, count - 1, 500).astype(int))
        middles = [np.median(self.values[max(0, place - half) : place + half + 1]) for place in places]
        return Course(self.steps[places], np.array(middles))


def draw_curves(
    path: Path, *, rows: Rows, title: str, entropy: float | None = None, options: PlotOptions = DEFAULT
) -> None:
    """Draw the rows of metrics.jsonl to `path`: the NLL of each split, and under it what else the rows hold.

    A row needs no key: a quantity that is absent, null or not finite is left out at that step. The NLL is in bits per
    dimension where any row has them, else in nats. `entropy` is that of the data in nats, the lowest NLL that any
    model can reach, and is drawn beside nats only.
    """
    train = _split(rows, "train")
    below = [draw for draw, keys in PANELS if any(course(train, key) for key in keys)]
    base = BOTTOM + (SHORT + BETWEEN if below else 0.0)
    with style.styled():
        figure = style.new_figure(base + TALL + 0.72, title, options)
        panels = [style.add_axes(figure, LEFT, base, FULL, TALL)]
        _likelihood(panels[0], rows, entropy)
        width = (FULL - GAP * (len(below) - 1)) / max(len(below), 1)
        for place, draw in enumerate(below):
            panels.append(style.add_axes(figure, LEFT + place * (width + GAP), BOTTOM, width - SCALE, SHORT))
            draw(panels[-1], train)
        _share_steps(panels, rows)
        style.save(figure, path, options)


def course(rows: Rows, key: str) -> Course:
    """The finite values of `key` by step; the last of several for one step, as a resumed run repeats some."""
    found = {}
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if _finite(step) and _finite(value):
            found[float(step)] = min(max(float(value), -FARTHEST), FARTHEST)
    steps = sorted(found)
    return Course(np.array(steps), np.array([found[step] for step in steps]))


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _split(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row.get("split") == name]


def _likelihood(axes: Axes, rows: Rows, entropy: float | None) -> None:
    key, unit = ("bits_per_dim", "bits/dim") if course(rows, "bits_per_dim") else ("nll", "nats")
    axes.grid(axis="y")
    axes.set_ylabel(f"NLL ({unit})")
    train = course(_split(rows, "train"), key)
    names = dict.fromkeys(str(row["split"]) for row in rows if row.get("split") not in (None, "train"))
    others = {name: curve for name in names if (curve := course(_split(rows, name), key))}
    if not train and not others:
        style.annotate(axes, "no finite NLL")
        axes.yaxis.set_major_locator(NullLocator())
        return
    if train:
        _noisy(axes, train, style.BLUE, "training")
    for colour, (name, curve) in zip(cycle(COLOURS), others.items(), strict=False):
        words = f" (best {_number(curve.values.min())})" if len(others) <= WITH_BEST else ""
        best = style.literal(f"{NAMES.get(name, name)}{words}", most=40)
        every = max(1, len(curve.values) // 40)
        axes.plot(curve.steps, curve.values, "-o", color=colour, markersize=3.5, markevery=every, label=best)
    low, high = _frame(train, list(others.values()))
    if unit == "nats" and _finite(entropy):
        axes.axhline(entropy, color=style.INK, linestyle=style.DASHES, linewidth=1.1, label="entropy of the data")
        low, high = min(low, entropy), max(high, entropy)
    margin = 0.07 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    _plain(axes)
    style.legend_above(axes)
    _name_hidden(axes, [train, *others.values()])


def _frame(train: Course, others: Sequence[Course]) -> Range:
    """The range of NLL to show: the smooth curves, if three quarters of the rows then keep an eighth of it.

    Single spikes, a steep start and a blow-up leave the frame.
    """
    curves = [train, *others] if train else others
    low = min(float(np.quantile(curve.values, 0.005)) for curve in curves)
    bulk = max(float(np.quantile(curve.values, 0.75)) for curve in curves)
    high = max(float(curve.values.max()) for curve in (train.median(), *others) if curve)
    if train:
        high = max(high, float(np.quantile(train.values, 0.97)))
    return low, min(high, low + 8 * (bulk - low)) if bulk > low else high


def _name_hidden(axes: Axes, curves: Sequence[Course]) -> None:
    """Say what the frame leaves out: a picture that hides a spike in silence would lie."""
    values = np.concatenate([curve.values for curve in curves])
    low, high = axes.get_ylim()
    hidden = values[(values < low) | (values > high)]
    if len(hidden):
        farthest = hidden[np.argmax(np.abs(hidden - (low + high) / 2))]
        words = f"{len(hidden):,} of {len(values):,} values out of the frame, one at {_number(farthest)}"
        style.annotate(axes, words, x=1.0, y=1.045, align="right")


def _solver(axes: Axes, train: Rows) -> None:
    axes.grid(axis="y")
    axes.set_ylabel("NFE a step")
    top = 0.0
    for key, colour, label in (
        ("nfe_forward", style.GREEN, "forward"),
        ("nfe_backward", style.PURPLE, "backward"),
    ):
        curve = course(train, key)
        if curve:
            _noisy(axes, curve, colour, label)
            # one hard batch may cost a hundred times the usual
            top = max(top, min(curve.values.max(), 3 * curve.median().values.max()))
    axes.set_ylim(0, 1.08 * top or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _plain(axes)
    tolerance = course(train, "rtol").positive()
    if not tolerance:
        style.legend_above(axes)
        return
    right = _right_scale(axes)
    _line(right, tolerance, style.MUTED, "rtol (right)", linestyle=style.DASHES, linewidth=1.2)
    _logarithmic(right, tolerance)
    style.legend_above(axes, right)


def _optimizer(axes: Axes, train: Rows) -> None:
    gradient, rate = course(train, "grad_norm").positive(), course(train, "lr")
    axes.grid(axis="y")
    axes.set_ylabel("gradient norm")
    if gradient:
        _noisy(axes, gradient, style.BLUE, "gradient norm")
        _logarithmic(axes, gradient)
    else:
        axes.yaxis.set_major_locator(NullLocator())
    if not rate:
        style.legend_above(axes)
        return
    right = _right_scale(axes)
    _line(right, rate, style.ORANGE, "learning rate (right)")
    right.set_ylim(0, 1.12 * rate.values.max() or 1.0)
    right.yaxis.set_major_locator(MaxNLocator(3))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    style.legend_above(axes, right)


def _matching(axes: Axes, train: Rows) -> None:
    curve = course(train, "matching")
    axes.grid(axis="y")
    axes.set_ylabel("matching loss")
    _noisy(axes, curve, style.BLUE, "matching loss")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _plain(axes)
    style.legend_above(axes)


# what may stand under the likelihood, and the keys of which any one calls for it
PANELS: tuple[tuple[Callable[[Axes, Rows], None], tuple[str, ...]], ...] = (
    (_matching, ("matching",)),
    (_solver, ("nfe_forward", "nfe_backward")),
    (_optimizer, ("grad_norm", "lr")),
)


def _line(axes: Axes, curve: Course, colour: str, label: str, **look: Any) -> None:
    # a line of one point is invisible
    marker = "o" if len(curve.values) == 1 else ""
    axes.plot(curve.steps, curve.values, color=colour, label=label, marker=marker, markersize=3.5, **look)


def _noisy(axes: Axes, curve: Course, colour: str, label: str) -> None:
    """The raw values faintly, their running median clearly."""
    axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.8)
    _line(axes, curve.median(), colour, label)


def _right_scale(axes: Axes) -> Axes:
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    return right


def _logarithmic(axes: Axes, curve: Course) -> None:
    """A logarithmic y axis with a few labels of the short kind, however narrow its range."""
    low, high = curve.values.min(), curve.values.max()
    wide = high > 30 * low
    axes.set_yscale("log")
    axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _plain(axes: Axes) -> None:
    """No power of ten set apart from the y labels: the legend has its place."""
    if max(abs(edge) for edge in axes.get_ylim()) < 1e6:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _share_steps(panels: Sequence[Axes], rows: Rows) -> None:
    """The same steps under every panel."""
    steps = [float(step) for row in rows if _finite(step := row.get("step"))]
    low, high = (min(steps), max(steps)) if steps else (0.0, 1.0)
    margin = 0.01 * (high - low) or 1.0
    for axes in panels:
        wide = axes.get_position().width > 0.6
        axes.set_xlim(low - margin, high + margin)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 4, integer=True, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _step(value, high)))


def _step(value: float, highest: float) -> str:
    """2,000 in a short run, 250k or 1.5M in a long one."""
    if highest < 100_000 or value == 0:
        return f"{value:,.0f}"
    return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"


def _short(value: float) -> str:
    """0.05, 2.5e-4, 3e6: no wider than a tick label may be."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _number(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"
