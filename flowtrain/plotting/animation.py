"""Figures that move: written whole or not at all, as GIF, or as MP4 where ffmpeg is.

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
from flowtrain.plotting.points import LogDensity
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import replacing
from flowtrain.utils.status import status

# what can be written, and frames a second
KINDS = (".gif", ".mp4")
FPS = 20
# frames that the base, and then the data, stand still
BEFORE, AFTER = 8, 28
RESOLUTION = 100
# inches
HEIGHT, SIDE, LEFT, BOTTOM, GAP = 4.76, 4.1, 0.42, 0.3, 0.28


def can_write_mp4() -> bool:
    """Whether there is an ffmpeg."""
    return shutil.which("ffmpeg") is not None


def animate_flow_2d(
    paths: Sequence[Path],
    *,
    data: Tensor,
    names: Sequence[str],
    log_density: LogDensity,
    states: Tensor,
    title: str,
) -> None:
    """Densities beside particles, moment by moment, to each of `paths`, .gif or .mp4.

    Limits and colours do not move, and those come from the data (N, 2).

    Args:
        names: of the K moments.
        log_density: grid points (G, 2) to (K, G), in nats.
        states: of the particles, (K, P, 2).
    """
    real = points.data_points(data, width=2)
    limits = picture_limits(real.values)
    heights = points.moments_2d(log_density, limits, RESOLUTION, len(names))
    placed = points.to_numpy(states)
    # each its own, and slowly from one to the next: a base is much flatter than the data
    tops = np.maximum.accumulate(np.array([points.peak(height) or 1.0 for height in heights]))
    with style.styled():
        figure = style.new_figure(HEIGHT, title)
        panels = [style.add_axes(figure, LEFT + i * (SIDE + GAP), BOTTOM, SIDE, SIDE) for i in range(2)]
        for axes in panels:
            axes.set(xlim=limits[0], ylim=limits[1])
            style.round_ticks(axes, 5, prune="both")
            axes.spines[:].set_visible(True)
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


def animate_images(paths: Sequence[Path], *, names: Sequence[str], frames: Tensor, levels: float, title: str) -> None:
    """Images (K, N, C, H, W) in one grid, moment by moment, to `paths`, .gif or .mp4; shades as in `draw_panels`."""
    with style.styled():
        figure, sheet, edge = image_grids.moving_panel(frames[0], levels, title)
        shown = figure.figimage(sheet(frames[0]), edge, edge, origin="upper")
        words = figure.text(1 - style.EDGE / style.WIDTH, 0.5, "", ha="right", va="top", color=style.MUTED)
        words.set_y(1 - style.EDGE / figure.get_size_inches()[1])

        def draw(k: int) -> None:
            shown.set_data(sheet(frames[k]))
            words.set_text(style.literal(names[k]))

        for path in paths:
            write(path, figure, draw, len(names))


def write(path: Path, figure: Figure, draw: Callable[[int], None], moments: int) -> None:
    """Writes a frame for each moment, the first and the last for longer.

    A reader finds the old file or the new one, never half of one.

    Raises:
        ConfigError: a kind of file that cannot be written here.
    """
    check_writable(path)
    FigureCanvasAgg(figure)
    # half the resolution of a picture
    figure.set_dpi(style.DPI // 2)
    if path.suffix == ".gif":
        _write_gif(path, figure, draw, moments)
    else:
        _write_mp4(path, figure, draw, moments)


def _write_gif(path: Path, figure: Figure, draw: Callable[[int], None], moments: int) -> None:
    """Draws each moment once: a GIF stores how long each frame is shown."""
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
    """The current figure as an image without transparency."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="rgba", dpi=figure.get_dpi())
    size = figure.canvas.get_width_height()
    return Image.frombytes("RGBA", size, pixels.getvalue()).convert("RGB")


def _write_mp4(path: Path, figure: Figure, draw: Callable[[int], None], moments: int) -> None:
    """Writes frames at a fixed rate: moments that are shown for longer take several frames."""
    order = [*[0] * BEFORE, *range(1, moments - 1), *[moments - 1] * AFTER]
    # a format that every player supports
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
    """Refuses a file that no animation can be written to here.

    Raises:
        ConfigError: another kind than KINDS, or an .mp4 without ffmpeg.
    """
    if path.suffix not in KINDS:
        raise ConfigError(f"{path}: an animation is a {' or '.join(KINDS)} file")
    if path.suffix == ".mp4" and not can_write_mp4():
        raise ConfigError(f"{path}: there is no ffmpeg here to write it with; give a .gif, or install ffmpeg")
