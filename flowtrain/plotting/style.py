"""One look for every figure, and the only way a figure reaches the disk.

Figures are 9 inches wide at 200 dots per inch: 1800 pixels, sharp when a README shows them at 800 to 1000.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.files import replacing

WIDTH = 9.0
DPI = 200
EDGE = 0.14
TITLE_SIZE = 11.5
# height in inches that a figure has for its title
TITLE_HEIGHT = 0.3

# Okabe and Ito (2008): told apart with every common kind of colour blindness, and in grey
BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
INK, MUTED, HAIRLINE = "#222222", "#6B6B6B", "#C8C8C8"

# the same thing has the same colour in every figure
DATA, SAMPLES, DENSITY = BLUE, VERMILLION, INK
DATA_SHADES = ("#CDE2F0", "#86B9DB", "#3F8FC4")
DENSITY_MAP = "viridis"
# under what is drawn on top of a density
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
    "axes.formatter.useoffset": True,
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
    # a run of a million rows is one long path, which Agg refuses to draw in one piece
    "agg.path.chunksize": 10_000,
    # text stays text: TrueType fonts in a PDF (journals refuse Type 3), text elements in an SVG
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    # the same figure gives the same file
    "svg.hashsalt": "flowtrain",
}
# dates would make two files of the same figure differ
_METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}

_LOCK = threading.RLock()


@contextmanager
def styled() -> Iterator[None]:
    """The style of every figure; build and save a figure inside it.

    It starts from matplotlib's defaults, so that a user's own matplotlibrc does not change sizes or need LaTeX.
    Only one thread at a time is inside: matplotlib's rcParams and its font renderer belong to the process.
    """
    with _LOCK, matplotlib.style.context(["default", _RC]):
        yield


def new_figure(height: float, title: str, options: PlotOptions = DEFAULT) -> Figure:
    """A figure `WIDTH` by `height` inches with its title at the top left.

    Without titles, the figure is lower by TITLE_HEIGHT. Distances from the lower left corner stay the same.
    """
    if not options.title:
        return Figure(figsize=(WIDTH, height - TITLE_HEIGHT), dpi=DPI)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    words = literal(title, most=100)
    size = TITLE_SIZE * min(1.0, 74 / max(len(words), 1))
    figure.text(EDGE / WIDTH, 1 - EDGE / height, words, size=size, weight="bold", va="top")
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes placed by inches from the figure's lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def round_ticks(axes: Axes, most: int, prune: Literal["both"] | None = None) -> None:
    """At most so many intervals between ticks on both axes, at round numbers; `prune` leaves out those at the ends."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(most, steps=(1, 2, 5, 10), prune=prune))


def legend_above(axes: Axes, *others: Axes) -> None:
    """A one-line legend over the upper left corner of `axes`, naming what `others` hold as well."""
    named = [each.get_legend_handles_labels() for each in (axes, *others)]
    handles = [handle for found, _ in named for handle in found]
    labels = [label for _, found in named for label in found]
    if labels:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(labels), **LEGEND)


def literal(text: str, most: int = 120) -> str:
    """`text` on one line of at most `most` characters, with no part of it read as TeX, and +- as one sign."""
    line = " ".join(text.split())
    if len(line) > most:
        line = line[: most - 1].rstrip() + "…"
    return line.replace("+-", "±").replace("$", r"\$")


def annotate(axes: Axes, text: str, *, x: float = 0.5, y: float = 0.5, align: str = "center") -> None:
    """Muted words inside `axes`, at axes coordinates (x, y)."""
    axes.text(x, y, text, transform=axes.transAxes, color=MUTED, size=8, ha=align, va="center")


def save(figure: Figure, path: Path, options: PlotOptions = DEFAULT) -> None:
    """Writes `figure` in each format, to `path` with the ending of the format.

    Each file is replaced as a whole: a reader finds the old figure or the new one, never a part of it.
    """
    FigureCanvasAgg(figure)
    for file in options.files(path):
        kind = file.suffix.removeprefix(".")
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata=_METADATA.get(kind))
        with replacing(file) as f:
            f.write(content.getvalue())
