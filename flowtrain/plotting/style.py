"""The style of all figures, their ticks and legends, and `save`, which writes them.

Figures are 9 inches wide at 200 dots per inch: 1800 pixels, sharp when a README shows them at 800 to 1000.
"""

import io
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.files import replacing

WIDTH = 9.0
DPI = 200
EDGE = 0.14
TITLE_SIZE = 11.5
# the height of the title in inches, and the letters for which the width of the figure has room
TITLE_HEIGHT, TITLE_LETTERS = 0.3, 86

# the palette of Okabe and Ito (2008), which is distinguishable with every common kind of colour blindness and in grey
BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
INK, MUTED, HAIRLINE = "#222222", "#6B6B6B", "#C8C8C8"

# the same object has the same colour in all figures
DATA, SAMPLES, DENSITY = BLUE, VERMILLION, INK
DATA_SHADES = ("#CDE2F0", "#86B9DB", "#3F8FC4")
DENSITY_MAP = "viridis"
# a pale colour map for densities behind other marks
PALE_MAP = LinearSegmentedColormap.from_list("pale", ("#FFFFFF", "#E8F2F9", "#A9CFE8"))

DASHES = (0, (5, 3))

LEGEND: dict[str, Any] = {"borderaxespad": 0.4, "borderpad": 0.0, "handlelength": 1.5, "columnspacing": 1.6}

_RC: dict[Any, Any] = {
    "figure.dpi": DPI,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.0,
    "axes.titlepad": 6.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#E9E9E9",
    "grid.linewidth": 0.7,
    "xtick.color": HAIRLINE,
    "ytick.color": HAIRLINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    # Agg refuses to draw a path of a million points in one piece
    "agg.path.chunksize": 10_000,
    # PDF files contain TrueType fonts, because journals refuse Type 3 fonts. SVG files contain text elements
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    # identical figures give identical files
    "svg.hashsalt": "flowtrain",
}
# without dates, identical figures give identical files
_METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}

_LOCK = threading.RLock()


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style of all figures inside a context. Figures must be built and saved inside.

    The style starts from matplotlib's defaults, so that a user's matplotlibrc does not change sizes or need LaTeX.
    Only one thread at a time is inside, because all threads share matplotlib's rcParams and its font renderer.
    """
    with _LOCK, matplotlib.style.context(["default", _RC]):
        yield


def new_figure(height: float, title: str, options: PlotOptions = DEFAULT) -> Figure:
    """Returns a figure `WIDTH` by `height` inches with its title at the top left.

    Without titles, the figure is lower by TITLE_HEIGHT. Distances from the lower left corner stay the same.
    """
    if not options.title:
        return Figure(figsize=(WIDTH, height - TITLE_HEIGHT), dpi=DPI)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    words = literal(title, most=120)
    size = TITLE_SIZE * min(1.0, TITLE_LETTERS / max(len(words), 1))
    figure.text(EDGE / WIDTH, 1 - EDGE / height, words, size=size, weight="bold", va="top")
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Adds axes to a figure. Positions are in inches from its lower left corner."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    mark_numbers(axes)
    return axes


# numbers of up to this many characters are written in full
LONGEST = 6


class TickNumbers(Formatter):
    """A formatter that labels all ticks of an axis in one format, without an offset or a factor beside the axis.

    Example:
        >>> TickNumbers().format_ticks([0, 0.25, 0.5]), TickNumbers().format_ticks([0, 2e6, 4e6])
        (['0.00', '0.25', '0.50'], ['0', '2e6', '4e6'])
    """

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Returns the label of a single tick."""
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Returns the labels of all ticks; those outside the axis do not affect the format."""
        shown = [float(value) for value in values]
        if self.axis is not None:
            low, high = sorted(self.axis.get_view_interval())
            slack = 1e-9 * (high - low)
            shown = [value for value in shown if low - slack <= value <= high + slack] or shown
        scale = "linear" if self.axis is None else self.axis.get_scale()  # type: ignore[union-attr]
        label = _number_format(shown, linear=scale == "linear")
        labels = [label(float(value)) for value in values]
        return [f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text for text in labels]


def _number_format(values: Sequence[float], linear: bool) -> Callable[[float], str]:
    """Returns a function that formats numbers. It uses scientific notation for long numbers, if this is shorter."""
    # an axis may have no ticks
    ordered = sorted({*values}) or [0.0]
    apart = min((b - a for a, b in itertools.pairwise(ordered)), default=abs(ordered[0]) or 1.0)
    # a tick that should be zero can have a rounding error
    zero = 1e-6 * apart

    def fixed(value: float) -> str:
        return f"{value + 0.0:,.{decimals}f}"

    def scientific(value: float) -> str:
        if abs(value) <= zero:
            return "0"
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        return f"{mantissa}e{int(exponent)}"

    def exact(value: float, text: str) -> bool:
        return abs(float(text.replace(",", "")) - value) <= 1e-3 * (apart if linear else abs(value))

    decimals = next((k for k in range(9) if all(exact(v, f"{v:.{k}f}") for v in ordered)), 9)
    digits = next((k for k in range(9) if all(exact(v, f"{v:.{k}e}") for v in ordered)), 9)
    if not linear and all(v == 0 or 1e-3 <= abs(v) < 1e5 for v in ordered):
        return lambda value: f"{value:g}"
    longest = [max(len(write(v).lstrip("-")) for v in ordered) for write in (fixed, scientific)]
    return fixed if longest[0] <= max(LONGEST, longest[1]) else scientific


def mark_numbers(axes: Axes) -> None:
    """Sets the formatter `TickNumbers` for both axes. matplotlib removes it when the scale of an axis is changed."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(TickNumbers())


def make_logarithmic(axis: Axis, values: Sequence[float], base: int = 10) -> None:
    """Makes an axis logarithmic and sets its limits for positive values. A narrow range has tick labels too."""
    low, high = min(values), max(values)
    if isinstance(axis, XAxis):
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    room = max(1.25, (high / low) ** 0.06)
    axis.set_view_interval(low / room, high * room, ignore=True)
    wide = high > 30 * low or base != 10
    axis.set_major_locator(LogLocator(base=base, subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(TickNumbers())


def round_ticks(axes: Axes, most: int, prune: Literal["both"] | None = None) -> None:
    """Sets round ticks on both axes, with at most `most` intervals; `prune` removes the ticks at the ends."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(most, steps=(1, 2, 5, 10), prune=prune))


def legend_above(axes: Axes, *others: Axes, width: float | None = None) -> None:
    """Draws a legend of `axes` and `others` above the upper left corner of `axes`, see `legend_columns`.

    Args:
        width: the largest width in inches; None: the width of the axes.
    """
    named = [each.get_legend_handles_labels() for each in (axes, *others)]
    handles = [handle for found, _ in named for handle in found]
    labels = [str(label) for _, found in named for label in found]
    if labels:
        columns = legend_columns(labels, width or axes.get_position().width * WIDTH)
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **LEGEND)


# inches: the width of a letter in a legend, the width of an entry besides its letters, and the height of a row
LEGEND_LETTER, LEGEND_ENTRY, LEGEND_ROW = 0.072, 0.5, 0.19


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Returns the number of columns of a legend that is at most `width` inches wide; one row if there is room.

    Example:
        >>> legend_columns(["training", "validation"], 8), legend_columns(["a rather long name"] * 9, 8)
        (2, 4)
    """
    if sum(LEGEND_LETTER * len(label) + LEGEND_ENTRY for label in labels) <= width:
        return len(labels)
    widest = LEGEND_LETTER * max(map(len, labels)) + LEGEND_ENTRY
    return max(1, min(len(labels), int(width / widest)))


def legend_height(labels: Sequence[str], width: float) -> float:
    """Returns the height in inches of the rows of a legend after the first one."""
    return (math.ceil(len(labels) / legend_columns(labels, width)) - 1) * LEGEND_ROW if labels else 0.0


def literal(text: str, most: int = 120) -> str:
    """Returns a text on one line of at most `most` characters, with TeX characters escaped and +- as one sign."""
    line = " ".join(text.split())
    if len(line) > most:
        line = line[: most - 1].rstrip() + "…"
    return line.replace("+-", "±").replace("$", r"\$")


def abbreviated(text: str, most: int) -> str:
    """Returns a text like `literal`, but shortens long text in the middle, because similar names differ at the end.

    Example:
        >>> abbreviated("average delay of department 7", 15)
        'average…tment 7'
    """
    line = " ".join(text.split())
    if len(line) > most:
        end = max(1, (most - 1) // 2)
        line = f"{line[: max(1, most - 1 - end)].rstrip()}…{line[-end:].lstrip()}"
    return literal(line, most=most)


def annotate(axes: Axes, text: str, *, x: float = 0.5, y: float = 0.5, align: str = "center") -> None:
    """Writes text in a muted colour inside `axes`, at axes coordinates (x, y)."""
    axes.text(x, y, text, transform=axes.transAxes, color=MUTED, size=8, ha=align, va="center")


def save(figure: Figure, path: Path, options: PlotOptions = DEFAULT) -> None:
    """Writes `figure` in each format, to `path` with the ending of the format.

    A file is replaced when the new figure is complete, so it never contains a part of a figure.
    """
    FigureCanvasAgg(figure)
    for file in options.files(path):
        kind = file.suffix.removeprefix(".")
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata=_METADATA.get(kind))
        with replacing(file) as f:
            f.write(content.getvalue())
