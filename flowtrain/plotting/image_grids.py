"""Flows over images: grids of images side by side, and labelled rows of them.

Shapes: N images of C channels, H by W pixels. An image pixel becomes a whole number of screen pixels wherever there
is room, so that all of them look alike; an image too large for its place is averaged down.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from flowtrain.plotting import points, style
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.errors import FlowtrainError

Pixels = NDArray[np.uint8]
Named = Sequence[tuple[str, Tensor]]

# inches
HEAD, LINE, NAME, NOTE, GAP, ROW_GAP = 0.63, 0.18, 0.08, 0.12, 0.01, 0.05
TALLEST, LARGEST = 7.0, 1.5
# two screen pixels for each of 32, and the gap
LEAST = 0.33
LETTER, WIDEST_LABEL = 0.075, 2.4

# height of the colour bar of differences with its numbers; height and width of the bar itself
BAR, BAR_HEIGHT, BAR_WIDTH = 0.42, 0.1, 2.4

MOST_PANELS = 6
# blue, white and red can be distinguished with every common kind of colour blindness
SIGNED = matplotlib.colormaps["RdBu_r"]
# magenta: no colour of the house, and hardly ever one of a photograph
NOT_FINITE = (255, 0, 255)


@dataclass(frozen=True)
class Cell:
    """The place of one image: its height and width and the gap to the next one, in screen pixels."""

    height: int
    width: int
    gap: int

    def down(self, rows: int) -> int:
        """The height of `rows` images."""
        return rows * (self.height + self.gap) - self.gap

    def across(self, columns: int) -> int:
        """The width of `columns` images."""
        return columns * (self.width + self.gap) - self.gap

    def halved(self, size: tuple[int, int]) -> "Cell":
        """At half the dots, of images (H, W) that stay enlarged by a whole number."""
        times = self.height // size[0]
        height, width = (
            times // 2 * n if times > 1 else max(1, m // 2)
            for n, m in zip(size, (self.height, self.width), strict=True)
        )
        return Cell(height, width, max(1, self.gap // 2))


def draw_panels(
    path: Path,
    *,
    panels: Named,
    levels: float,
    title: str,
    columns: int | None = None,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw named grids of images (N, C, H, W) side by side to `path`, each filled row by row.

    0 is black and levels - 1 is white; values outside are clipped, and pixels that are not finite are magenta. The
    grids have one shape, near a square if `columns` is not given, and hold the first images where there are many.
    """
    size = _common_size(panels, levels)
    if len(panels) > MOST_PANELS:
        raise FlowtrainError(f"cannot draw {len(panels)} panels side by side: give at most {MOST_PANELS}")
    edge = _pixels(style.EDGE)
    room = (_pixels(style.WIDTH) - edge) // len(panels) - edge
    # a square alone would be as tall as the page is wide
    aspect = (2 if len(panels) == 1 else 1) * min(max(size[0] / size[1], 0.25), 4.0)
    rows, columns = _grid(max(len(images) for _, images in panels), columns, aspect, room // _pixels(LEAST))
    cell = _cell(size, rows, columns, room)
    top = edge + cell.down(rows)
    with style.styled():
        figure = _figure(top, HEAD, title, options)
        for place, (name, images) in enumerate(panels):
            middle = edge + place * (room + edge) + room // 2
            sheet = _sheet(images[: rows * columns], cell, rows, columns, partial(_shades, levels=levels))
            figure.figimage(sheet, middle - cell.across(columns) // 2, edge, origin="upper")
            words = _noted(name, images, rows * columns)
            _write(figure, middle, top + _pixels(NAME), words, room, size=10, ha="center")
        style.save(figure, path, options)


def draw_rows(
    path: Path,
    *,
    rows: Named,
    levels: float,
    title: str,
    note: str = "",
    signed: Named = (),
    unit: str = "",
    options: PlotOptions = DEFAULT,
) -> None:
    """Draw rows of images (N, C, H, W), each from left to right behind its name, to `path`.

    N may differ by row; the first images and the first rows are drawn where there are many. Colours are those of
    `draw_panels`. `note` stands under the title.

    Args:
        signed: rows of differences, drawn below the others from blue (negative) through white (0) to red (positive).
            The colours end at the largest magnitude, which the colour bar shows. Each pixel shows the channel with the
            largest magnitude.
        unit: the unit of these differences.
    """
    plain, rows = len(rows), [*rows, *signed]
    size = _common_size(rows, levels)
    edge, longest = _pixels(style.EDGE), max(len(images) for _, images in rows)
    names = [_noted(name, images, len(images), plainly=i < plain) for i, (name, images) in enumerate(rows)]
    largest = max((_largest(images) for _, images in signed), default=0.0)
    bar = _pixels(BAR) if signed else 0
    label = _pixels(min(LETTER * max(map(len, names)) + NOTE, WIDEST_LABEL))
    room = _pixels(style.WIDTH) - 2 * edge - label
    count, columns = min(len(rows), int(TALLEST / LEAST)), max(1, min(longest, room // _pixels(LEAST)))
    cell = _cell(size, count, columns, room)
    step = max(cell.height + max(cell.gap, _pixels(ROW_GAP)), _pixels(LINE))
    cut = (_first(columns, longest, " images"), _first(count, len(rows), " rows"))
    words = style.literal(", ".join(filter(None, (note, *cut))), most=140)
    top = edge + bar + (count - 1) * step + cell.height
    with style.styled():
        figure = _figure(top, HEAD if words else HEAD - LINE, title, options)
        if signed:
            _draw_bar(figure, edge + label, edge, largest, unit)
        _write(figure, edge, top + _pixels(NOTE), words, label + room, size=8.5, color=style.MUTED)
        for place, (name, (_, images)) in enumerate(zip(names[:count], rows, strict=False)):
            bottom = top - cell.height - place * step
            _write(figure, edge, bottom + cell.height / 2, name, label, size=9, va="center")
            if len(images) > 0:
                shades = partial(_shades, levels=levels) if place < plain else partial(_signed_shades, largest=largest)
                sheet = _sheet(images[:columns], cell, 1, columns, shades)
                figure.figimage(sheet, edge + label, bottom, origin="upper")
        style.save(figure, path, options)


def moving_panel(images: Tensor, levels: float, title: str) -> tuple[Figure, Callable[[Tensor], Pixels], int]:
    """For animations, of half the dots: a figure with room for a grid of such images (N, C, H, W) at the lower left,
    what makes a sheet of N images, and the edge in pixels around that.
    """
    size = _common_size([("images", images)], levels)
    edge, room = _pixels(style.EDGE), _pixels(style.WIDTH - 2 * style.EDGE)
    rows, columns = _grid(len(images), None, 2 * min(max(size[0] / size[1], 0.25), 4.0), room // _pixels(LEAST))
    cell = _cell(size, rows, columns, room).halved(size)
    columns = max(1, min((room // 2 + cell.gap) // (cell.width + cell.gap), len(images)))
    rows = math.ceil(len(images) / columns)
    # the height of a whole number of pixels, twice over
    figure = style.new_figure((2 * (edge // 2 + cell.down(rows)) + _pixels(HEAD - LINE)) / style.DPI, title)
    shades = partial(_shades, levels=levels)
    return figure, lambda shown: _sheet(shown[: rows * columns], cell, rows, columns, shades), edge // 2


def _pixels(inches: float) -> int:
    return max(1, round(inches * style.DPI))


def _common_size(named: Named, levels: float) -> tuple[int, int]:
    """(H, W), the same for all images of a figure."""
    if len(named) == 0:
        raise FlowtrainError("no images to draw: give at least one name with its images")
    if not 0 < levels < math.inf:
        raise FlowtrainError(f"cannot draw images of {levels} levels: give a positive number")
    for name, images in named:
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise FlowtrainError(f"cannot draw {name!r} of shape {tuple(images.shape)}: give it as (N, C, H, W)")
        if images.shape[2:] != named[0][1].shape[2:]:
            raise FlowtrainError(
                f"cannot draw {name!r} of {images.shape[2]} by {images.shape[3]} pixels beside {named[0][0]!r} of "
                f"{named[0][1].shape[2]} by {named[0][1].shape[3]}: give images of one size"
            )
    height, width = named[0][1].shape[2:]
    return height, width


def _grid(count: int, columns: int | None, aspect: float, most: int) -> tuple[int, int]:
    """Rows and columns for `count` images, or for the first of them; `most` columns unless asked for more.

    `aspect` is the number of columns for each row that looks best.
    """
    if columns is None:
        count = min(count, most * max(1, round(most / aspect)))
        columns = min(_near(min(max(math.sqrt(count * aspect), 1.0), max(count, 1)), count), most)
    columns = max(1, min(columns, 3 * most))
    return max(1, min(math.ceil(count / columns), max(10, round(columns / aspect)))), columns


def _near(ideal: float, count: int) -> int:
    """The columns nearest to `ideal` that leave no place empty, if they are near enough."""
    exact = [columns for columns in range(math.ceil(ideal / 1.5), int(1.5 * ideal) + 1) if count % columns == 0]
    # divisors come in pairs around a square: the hundredth prefers the wider grid
    return min(exact, key=lambda columns: abs(math.log(columns / ideal) - 0.01), default=math.ceil(ideal))


def _cell(size: tuple[int, int], rows: int, columns: int, room: int) -> Cell:
    """The largest place for images of `size` (H, W) of which rows by columns fit into `room` pixels across.

    Small images are enlarged by a whole number. What is left over widens the gaps, but not so much that they show.
    """
    height, width = size
    gap, tall = _pixels(GAP), _pixels(TALLEST)
    scale = min(((tall + gap) / rows - gap) / height, ((room + gap) / columns - gap) / width)
    scale = min(scale, max(1.0, _pixels(LARGEST) / max(size)))
    scale = math.floor(scale) if scale >= 1 else scale
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    left = (room - columns * width) // max(columns - 1, 1)
    return Cell(height, width, min(max(gap, left), max(gap, min(height, width) // 12)))


def _sheet(images: Tensor, cell: Cell, rows: int, columns: int, shades: Callable[[Tensor, Cell], Pixels]) -> Pixels:
    """Images (N, C, H, W) row by row on white, shape (height, width, 3) in screen pixels.

    Args:
        shades: converts an image (C, H, W) to RGB of the cell's size.
    """
    sheet = np.full((cell.down(rows), cell.across(columns), 3), 255, dtype=np.uint8)
    for place, image in enumerate(images.detach().cpu()):
        row, column = divmod(place, columns)
        y, x = cell.down(row) + cell.gap, cell.across(column) + cell.gap
        sheet[y : y + cell.height, x : x + cell.width] = shades(image, cell)
    return sheet


def _shades(image: Tensor, cell: Cell, levels: float) -> Pixels:
    """One image (C, H, W) as RGB of the cell's height and width, shape (height, width, 3)."""
    values = image.to(torch.float64)
    lost = ~values.isfinite().all(0, keepdim=True)
    # fewer than two levels are no levels but the top of a continuous range
    shades = (values / (levels - 1 if levels >= 2 else levels)).nan_to_num().clamp(0, 1)
    if len(shades) not in (1, 3):
        shades = shades.mean(0, keepdim=True)
    size = (cell.height, cell.width)
    shades = (255 * _resized(shades, size) + 0.5).to(torch.uint8).expand(3, *size).permute(1, 2, 0)
    # the largest, because one lost pixel of many must not be averaged away
    lost = F.adaptive_max_pool2d(lost.to(torch.float64), size)[0] > 0
    return np.where(lost.numpy()[..., None], np.array(NOT_FINITE, dtype=np.uint8), shades.numpy())


def _signed_shades(image: Tensor, cell: Cell, largest: float) -> Pixels:
    """One image of differences (C, H, W) in the colours of `SIGNED`, shape (height, width, 3)."""
    values = image.to(torch.float64)
    size = (cell.height, cell.width)
    lost = F.adaptive_max_pool2d((~values.isfinite()).any(0, keepdim=True).to(torch.float64), size)[0] > 0
    values = values.nan_to_num(0.0, 0.0, 0.0)
    # extremes instead of averages, because differences of opposite sign would cancel
    high, low = values.amax(0, keepdim=True), values.amin(0, keepdim=True)
    high, low = (_largest_resized(each, size) for each in (high, -low))
    worst = torch.where(high >= low, high, -low)[0]
    colours = SIGNED((worst.numpy() / (largest or 1.0) + 1) / 2, bytes=True)[..., :3]
    return np.where(lost.numpy()[..., None], np.array(NOT_FINITE, dtype=np.uint8), colours)


def _largest_resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (1, H, W) enlarged by a whole factor, or reduced by taking the largest value of each part."""
    if size[0] < image.shape[1] or size[1] < image.shape[2]:
        return F.adaptive_max_pool2d(image, size)
    return _resized(image, size)


def _largest(images: Tensor) -> float:
    """The largest magnitude of finite values; 0 if there are none."""
    finite = images.detach()[images.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _draw_bar(figure: Figure, left: int, bottom: int, largest: float, unit: str) -> None:
    """Draws the colour bar of differences from -largest to largest, with these numbers."""
    height, width = _pixels(BAR_HEIGHT), _pixels(BAR_WIDTH)
    bottom += _pixels(LINE)
    shades = SIGNED(np.linspace(0, 1, width), bytes=True)[None, :, :3].repeat(height, axis=0)
    figure.figimage(shades, left, bottom, origin="upper")
    look: dict[str, Any] = {"size": 8, "color": style.MUTED, "va": "top"}
    ends = ((0.0, f"-{largest:.2g}", "left"), (0.5, "0", "center"), (1.0, f"{largest:.2g}", "right"))
    # no ends without any difference
    for share, words, align in ends if largest > 0 else ends[1:2]:
        _write(figure, left + share * width, bottom - _pixels(NAME) / 2, words, width, ha=align, **look)
    words = f"largest difference {largest:.2g} {unit}".rstrip()
    look = {"size": 8.5, "color": style.MUTED, "va": "center"}
    _write(figure, left + width + _pixels(NOTE), bottom + height / 2, words, _pixels(style.WIDTH), **look)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (C, H, W) at a whole multiple of its size, or averaged down to a smaller one."""
    height, width = image.shape[1:]
    if size[0] < height or size[1] < width:
        # plain averages of two or three pixels would turn fine patterns into coarse ones
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return image.repeat_interleave(size[0] // height, 1).repeat_interleave(size[1] // width, 2)


def _noted(name: str, images: Tensor, drawn: int, plainly: bool = True) -> str:
    """The name of some images, with what a reader must know of how the first `drawn` are shown.

    Args:
        plainly: whether they are shown as images, not as differences.
    """
    lost = int((~images.isfinite()).any(1).sum())
    channels = images.shape[1]
    return points.noted(
        style.literal(name, most=40),
        _first(drawn, len(images)),
        "" if len(images) else "no images",
        f"mean of {channels} channels" if plainly and channels not in (1, 3) else "",
        f"{lost:,} not finite" if lost else "",
    )


def _first(drawn: int, count: int, things: str = "") -> str:
    return f"first {drawn:,} of {count:,}{things}" if drawn < count else ""


def _figure(top: int, head: float, title: str, options: PlotOptions) -> Figure:
    """A figure with images up to `top` pixels, and `head` inches over them."""
    # the half, because a height that rounds down loses its last row of pixels
    return style.new_figure((top + _pixels(head) + 0.5) / style.DPI, title, options)


def _write(figure: Figure, x: float, y: float, words: str, room: float, *, size: float, **look: Any) -> None:
    """Words at screen pixels (x, y) from the lower left, made smaller where they would be wider than `room`."""
    size *= min(1.0, room / (_pixels(LETTER) * max(len(words), 1)))
    figure.text(x / style.DPI, y / style.DPI, words, transform=figure.dpi_scale_trans, size=size, **look)
