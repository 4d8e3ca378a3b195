"""Animations as GIF files, or as MP4 files if ffmpeg is installed.

Shapes: K moments, one frame each; R by R cells; P particles.
"""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.animation import FFMpegWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flowtrain.plotting import image_grids, points, style
from flowtrain.plotting.densities import paint, picture_limits
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.points import LogDensity
from flowtrain.plotting.scales import axis_label, set_ticks
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import replacing
from flowtrain.utils.status import status

# endings of the files that can be written, and frames per second
KINDS = (".gif", ".mp4")
FPS = 20
# the number of frames for which the first and the last moment are shown
BEFORE, AFTER = 8, 28
RESOLUTION = 100
# inches
HEIGHT, SIDE, LEFT, BOTTOM, GAP = 4.98, 4.02, 0.68, 0.5, 0.18


def can_write_mp4() -> bool:
    """Whether ffmpeg is installed."""
    return shutil.which("ffmpeg") is not None


def animate_flow_2d(
    paths: Sequence[Path],
    *,
    data: Tensor,
    names: Sequence[str],
    log_density: LogDensity,
    states: Tensor,
    title: str,
    columns: Sequence[str] = ("x1", "x2"),
    options: PlotOptions = DEFAULT,
) -> None:
    """Writes an animation of densities beside particles.

    The limits depend on the data (N, 2) and are the same in all frames.

    Args:
        paths: the files to write, .gif or .mp4.
        names: the names of the K moments.
        log_density: maps grid points (G, 2) to (K, G), in nats.
        states: the positions of the particles, (K, P, 2).
        columns: the names of the columns.
    """
    real = points.data_points(data, width=2)
    limits = picture_limits(real.values)
    heights = points.moments_2d(log_density, limits, RESOLUTION, len(names))
    placed = points.to_numpy(states)
    # the top of the colour scale rises from moment to moment, because a base is much flatter than the data
    tops = np.maximum.accumulate(np.array([points.peak(height) or 1.0 for height in heights]))
    with style.styled():
        figure = style.new_figure(HEIGHT, title, options)
        panels = [style.add_axes(figure, LEFT + i * (SIDE + GAP), BOTTOM, SIDE, SIDE) for i in range(2)]
        for axes in panels:
            axes.set(xlim=limits[0], ylim=limits[1])
            notes = [set_ticks(axis, gap=GAP) for axis in (axes.xaxis, axes.yaxis)]
            axes.set_xlabel(axis_label(columns[0], notes[0], SIDE))
            axes.spines[:].set_visible(True)
        panels[0].set_ylabel(axis_label(columns[1], notes[1], SIDE))
        panels[1].tick_params(left=False, labelleft=False)
        image = paint(panels[0], heights[0], limits, tops[0])
        (dots,) = panels[1].plot(*placed[0].T, ".", color=style.SAMPLES, markersize=2.2, alpha=0.7)
        words = panels[0].text(0.03, 0.96, "", transform=panels[0].transAxes, color="white", size=11, va="top")

        def draw(k: int) -> None:
            image.set_data(np.minimum(heights[k].T / tops[k], 1.0))
            dots.set_data(*placed[k].T)
            words.set_text(style.literal(names[k]))

        for path in paths:
            write(path, figure, draw, len(names))


def animate_images(
    paths: Sequence[Path],
    *,
    names: Sequence[str],
    frames: Tensor,
    levels: float,
    title: str,
    options: PlotOptions = DEFAULT,
) -> None:
    """Writes an animation of images (K, N, C, H, W) in one grid.

    Args:
        paths: the files to write, .gif or .mp4.
        names: the names of the K moments.
        levels: the number of grey levels, as in `draw_panels`.
    """
    with style.styled():
        figure, sheet, edge = image_grids.moving_panel(frames[0], levels, title, options)
        shown = figure.figimage(sheet(frames[0]), edge, edge, origin="upper")
        words = figure.text(1 - style.EDGE / style.WIDTH, 0.5, "", ha="right", va="top", color=style.MUTED)
        words.set_y(1 - style.EDGE / figure.get_size_inches()[1])

        def draw(k: int) -> None:
            shown.set_data(sheet(frames[k]))
            words.set_text(style.literal(names[k]))

        for path in paths:
            write(path, figure, draw, len(names))


def write(path: Path, figure: Figure, draw: Callable[[int], None], moments: int) -> None:
    """Writes a frame for each moment. The first and the last moment are shown for longer.

    The file is replaced when the new animation is complete, so it never contains a part of an animation.

    Raises:
        ConfigError: a file of this kind cannot be written.
    """
    check_writable(path)
    FigureCanvasAgg(figure)
    # an animation has half the resolution of a picture
    figure.set_dpi(style.DPI // 2)
    if path.suffix == ".gif":
        _write_gif(path, figure, draw, moments)
    else:
        _write_mp4(path, figure, draw, moments)


def _write_gif(path: Path, figure: Figure, draw: Callable[[int], None], moments: int) -> None:
    """Writes one frame for each moment, because a GIF stores how long each frame is shown."""
    milliseconds = [1000 // FPS] * moments
    milliseconds[0] *= BEFORE
    milliseconds[-1] *= AFTER

    def frames() -> Iterator[Image.Image]:
        with status(f"writing {path.name}", total=moments, unit="frame") as progress:
            for k in range(moments):
                draw(k)
                yield _rendered(figure)
                progress.advance()

    drawn = frames()
    first = next(drawn)
    content = io.BytesIO()
    # Pillow requests the other frames one by one while it writes
    first.save(content, "GIF", save_all=True, append_images=drawn, duration=milliseconds, loop=0)
    with replacing(path) as f:
        f.write(content.getvalue())


def _rendered(figure: Figure) -> Image.Image:
    """Returns the current figure as an image without transparency."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="rgba", dpi=figure.get_dpi())
    size = figure.canvas.get_width_height()
    return Image.frombytes("RGBA", size, pixels.getvalue()).convert("RGB")


def _write_mp4(path: Path, figure: Figure, draw: Callable[[int], None], moments: int) -> None:
    """Writes frames at a fixed rate. The first and the last moment have several frames."""
    order = [*[0] * BEFORE, *range(1, moments - 1), *[moments - 1] * AFTER]
    # every player supports the pixel format yuv420p
    writer = FFMpegWriter(fps=FPS, codec="libx264", extra_args=["-pix_fmt", "yuv420p"])
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / f"animation{path.suffix}"
        with (
            status(f"writing {path.name}", total=len(order), unit="frame") as progress,
            writer.saving(figure, str(aside), int(figure.get_dpi())),
        ):
            for k in order:
                draw(k)
                writer.grab_frame()
                progress.advance()
        with replacing(path) as f:
            f.write(aside.read_bytes())


def check_writable(path: Path) -> None:
    """Checks that an animation can be written to a file.

    Raises:
        ConfigError: the ending is not one of KINDS, or it is .mp4 and ffmpeg is not installed.
    """
    if path.suffix not in KINDS:
        raise ConfigError(f"{path}: an animation is a {' or '.join(KINDS)} file")
    if path.suffix == ".mp4" and not can_write_mp4():
        raise ConfigError(
            f"{path}: ffmpeg is not installed, which writes .mp4 files; give a .gif file, or install ffmpeg"
        )
