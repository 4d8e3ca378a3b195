"""How near samples come to the data, against the evaluations of the field that they cost."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib.ticker import FuncFormatter, NullFormatter

from flowtrain.plots import style

COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE)
Line = tuple[list[float], list[float]]


def draw_quality(path: Path, *, lines: Mapping[str, Line], exact: tuple[float, float], data: float, title: str) -> None:
    """Draw distance against NFE to `path`, both axes logarithmic.

    Args:
        lines: of each method, NFE and distances.
        exact: NFE and distance by the adaptive solver.
        data: the distance of two sets of data.
    """
    with style.styled():
        figure = style.new_figure(4.2, title)
        axes = style.add_axes(figure, 0.8, 0.55, 8.0, 2.9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for colour, (name, (nfe, distance)) in zip(cycle(COLOURS), lines.items(), strict=False):
            axes.plot(nfe, distance, "-o", color=colour, markersize=4, label=style.literal(name, most=40))
        axes.plot([exact[0]], [exact[1]], "D", color=style.INK, markersize=5, label="own solver")
        axes.axhline(data, color=style.MUTED, linestyle=style.DASHES, linewidth=1.1, label="data beside data")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y")
        axes.set_xlabel("evaluations of the field for a sample")
        axes.set_ylabel("sliced Wasserstein distance to data")
        style.legend_above(axes)
        style.save(figure, path)
