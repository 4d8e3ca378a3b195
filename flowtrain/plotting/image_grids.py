"""Figures of images: grids of images side by side, and labelled rows of images.

Shapes: N images of C channels, H by W pixels. A small image is enlarged by a whole number if that fills its place, so
that all its pixels have the same size. An image that is larger than its place is averaged down.
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
# the smallest width of an image in inches: two screen pixels for each of 32 pixels, and the gap
LEAST = 0.33
# images are enlarged by a whole number, unless they would then fill less than this share of their place
FULL = 0.95
LETTER, WIDEST_LABEL = 0.075, 2.4

# inches: the height of the colour bar of differences with its numbers, and the height and width of the bar
BAR, BAR_HEIGHT, BAR_WIDTH = 0.42, 0.1, 2.4

MOST_PANELS = 6
# blue, white and red can be distinguished with every common kind of colour blindness
SIGNED = matplotlib.colormaps["RdBu_r"]
# magenta, which is used nowhere else in figures and is rare in photographs
NOT_FINITE = (255, 0, 255)


@dataclass(frozen=True)
class Cell:
    """The size of an image and the gap to the next one, in screen pixels."""

    height: int
    width: int
    gap: int

    def down(self, rows: int) -> int:
        """Returns the height of `rows` images."""
        return rows * (self.height + self.gap) - self.gap

    def across(self, columns: int) -> int:
        """Returns the width of `columns` images."""
        return columns * (self.width + self.gap) - self.gap

    def halved(self, size: tuple[int, int]) -> "Cell":
        """Returns the cell at half the resolution, in which images (H, W) are still enlarged by a whole number."""
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
    """Draws named grids of images (N, C, H, W) side by side, each filled row by row.

    0 is black and levels - 1 is white. Values outside are clipped, and pixels that are not finite are magenta. All
    grids have the same shape, which is near a square if `columns` is not given. If there are too many images, the first
    ones are drawn.
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
    heads: Sequence[str] = (),
    signed: Named = (),
    unit: str = "",
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws rows of images (N, C, H, W), each from left to right after its name.

    N may differ by row. If there are too many images or rows, the first ones are drawn. Colours are as in
    `draw_panels`.

    Args:
        rows: names and images. A name may have two lines.
        note: a line below the title.
        heads: the names of the columns.
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
    longest_name = max(len(line) for name in names for line in name.split("\n"))
    label = _pixels(min(LETTER * longest_name + NOTE, WIDEST_LABEL))
    room = _pixels(style.WIDTH) - 2 * edge - label
    count, columns = min(len(rows), int(TALLEST / LEAST)), max(1, min(longest, room // _pixels(LEAST)))
    cell = _cell(size, count, columns, room)
    step = max(cell.height + max(cell.gap, _pixels(ROW_GAP)), _pixels(LINE))
    cut = (_first(columns, longest, " images"), _first(count, len(rows), " rows"))
    words = style.literal(", ".join(filter(None, (note, *cut))), most=140)
    top = edge + bar + (count - 1) * step + cell.height
    above = LINE if heads else 0.0
    with style.styled():
        figure = _figure(top, HEAD + above - (0 if words else LINE), title, options)
        if signed:
            _draw_bar(figure, edge + label, edge, largest, unit)
        _write(figure, edge, top + _pixels(NOTE + above), words, label + room, size=8.5, color=style.MUTED)
        for column, head in enumerate(heads[:columns]):
            middle = edge + label + cell.across(column) + cell.gap + cell.width / 2
            _write(figure, middle, top + _pixels(NAME / 2), head, cell.width, size=8, color=style.MUTED, ha="center")
        for place, (name, (_, images)) in enumerate(zip(names[:count], rows, strict=False)):
            bottom = top - cell.height - place * step
            _write(figure, edge, bottom + cell.height / 2, name, label, size=9, va="center")
            if len(images) > 0:
                shades = partial(_shades, levels=levels) if place < plain else partial(_signed_shades, largest=largest)
                sheet = _sheet(images[:columns], cell, 1, columns, shades)
                figure.figimage(sheet, edge + label, bottom, origin="upper")
        style.save(figure, path, options)


def moving_panel(
    images: Tensor, levels: float, title: str, options: PlotOptions = DEFAULT
) -> tuple[Figure, Callable[[Tensor], Pixels], int]:
    """Prepares an animation of a grid of images (N, C, H, W), at half the resolution of other figures.

    Returns:
        A figure with room for the grid, a function that converts N images to the pixels of the grid, and the margin of
        the grid in pixels.
    """
    size = _common_size([("images", images)], levels)
    edge, room = _pixels(style.EDGE), _pixels(style.WIDTH - 2 * style.EDGE)
    rows, columns = _grid(len(images), None, 2 * min(max(size[0] / size[1], 0.25), 4.0), room // _pixels(LEAST))
    cell = _cell(size, rows, columns, room).halved(size)
    columns = max(1, min((room // 2 + cell.gap) // (cell.width + cell.gap), len(images)))
    rows = math.ceil(len(images) / columns)
    # the number of pixels is even, because the resolution is halved
    figure = style.new_figure((2 * (edge // 2 + cell.down(rows)) + _pixels(HEAD - LINE)) / style.DPI, title, options)
    shades = partial(_shades, levels=levels)
    return figure, lambda shown: _sheet(shown[: rows * columns], cell, rows, columns, shades), edge // 2


def _pixels(inches: float) -> int:
    return max(1, round(inches * style.DPI))


def _common_size(named: Named, levels: float) -> tuple[int, int]:
    """Returns the size (H, W) that all images of a figure have.

    Raises:
        FlowtrainError: there are no images, they differ in size, or `levels` is not a positive number.
    """
    if len(named) == 0:
        raise FlowtrainError("no images to draw: give at least one name with its images")
    if not 0 < levels < math.inf:
        raise FlowtrainError(f"cannot draw images with levels={levels}: give a positive number")
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
    """Returns the numbers of rows and columns of a grid for `count` images, or for the first of these images.

    Args:
        columns: the number of columns; None: at most `most`.
        aspect: the ideal ratio of columns to rows.
    """
    if columns is None:
        count = min(count, most * max(1, round(most / aspect)))
        columns = min(_near(min(max(math.sqrt(count * aspect), 1.0), max(count, 1)), count), most)
    columns = max(1, min(columns, 3 * most))
    return max(1, min(math.ceil(count / columns), max(10, round(columns / aspect)))), columns


def _near(ideal: float, count: int) -> int:
    """Returns the number of columns nearest to `ideal` that leaves no empty places.

    If this number is not within a factor 1.5 of `ideal`, returns `ideal`, rounded up.
    """
    exact = [columns for columns in range(math.ceil(ideal / 1.5), int(1.5 * ideal) + 1) if count % columns == 0]
    # two divisors can be equally near to the square root. The term 0.01 then selects the larger one, for a wider grid
    return min(exact, key=lambda columns: abs(math.log(columns / ideal) - 0.01), default=math.ceil(ideal))


def _cell(size: tuple[int, int], rows: int, columns: int, room: int) -> Cell:
    """Returns the largest cell for rows by columns of images of `size` (H, W) in `room` pixels of width.

    Small images are enlarged by a whole number, or by a fraction if a whole number leaves too much room. The remaining
    room widens the gaps by a little.
    """
    height, width = size
    gap, tall = _pixels(GAP), _pixels(TALLEST)
    scale = min(((tall + gap) / rows - gap) / height, ((room + gap) / columns - gap) / width)
    scale = min(scale, max(1.0, _pixels(LARGEST) / max(size)))
    if scale < 2 or math.floor(scale) >= FULL * scale:
        scale = math.floor(scale) if scale >= 1 else scale
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    left = (room - columns * width) // max(columns - 1, 1)
    return Cell(height, width, min(max(gap, left), max(gap, min(height, width) // 12)))


def _sheet(images: Tensor, cell: Cell, rows: int, columns: int, shades: Callable[[Tensor, Cell], Pixels]) -> Pixels:
    """Arranges images (N, C, H, W) row by row on white, shape (height, width, 3) in screen pixels.

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
    """Converts an image (C, H, W) to RGB of the cell's size, shape (height, width, 3)."""
    values = image.to(torch.float64)
    lost = ~values.isfinite().all(0, keepdim=True)
    # below two, `levels` is the top of a continuous range
    shades = (values / (levels - 1 if levels >= 2 else levels)).nan_to_num().clamp(0, 1)
    if len(shades) not in (1, 3):
        shades = shades.mean(0, keepdim=True)
    size = (cell.height, cell.width)
    shades = (255 * _resized(shades, size) + 0.5).to(torch.uint8).expand(3, *size).permute(1, 2, 0)
    # the largest value is used, because an average would hide a single pixel that is not finite
    lost = F.adaptive_max_pool2d(lost.to(torch.float64), size)[0] > 0
    return np.where(lost.numpy()[..., None], np.array(NOT_FINITE, dtype=np.uint8), shades.numpy())


def _signed_shades(image: Tensor, cell: Cell, largest: float) -> Pixels:
    """Converts an image of differences (C, H, W) to the colours of `SIGNED`, shape (height, width, 3)."""
    values = image.to(torch.float64)
    size = (cell.height, cell.width)
    lost = F.adaptive_max_pool2d((~values.isfinite()).any(0, keepdim=True).to(torch.float64), size)[0] > 0
    values = values.nan_to_num(0.0, 0.0, 0.0)
    # extremes are used, because in averages differences of opposite sign would cancel
    high, low = values.amax(0, keepdim=True), values.amin(0, keepdim=True)
    high, low = (_largest_resized(each, size) for each in (high, -low))
    worst = torch.where(high >= low, high, -low)[0]
    colours = SIGNED((worst.numpy() / (largest or 1.0) + 1) / 2, bytes=True)[..., :3]
    return np.where(lost.numpy()[..., None], np.array(NOT_FINITE, dtype=np.uint8), colours)


def _largest_resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges `image` (1, H, W), or reduces it by taking the largest value of each part."""
    if size[0] < image.shape[1] or size[1] < image.shape[2]:
        return F.adaptive_max_pool2d(image, size)
    return _resized(image, size)


def _largest(images: Tensor) -> float:
    """Returns the largest magnitude of the finite values; 0 without finite values."""
    finite = images.detach()[images.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _draw_bar(figure: Figure, left: int, bottom: int, largest: float, unit: str) -> None:
    """Draws the colour bar of differences from -largest to largest, with numbers at its ends."""
    height, width = _pixels(BAR_HEIGHT), _pixels(BAR_WIDTH)
    bottom += _pixels(LINE)
    shades = SIGNED(np.linspace(0, 1, width), bytes=True)[None, :, :3].repeat(height, axis=0)
    figure.figimage(shades, left, bottom, origin="upper")
    look: dict[str, Any] = {"size": 8, "color": style.MUTED, "va": "top"}
    ends = ((0.0, f"-{largest:.2g}", "left"), (0.5, "0", "center"), (1.0, f"{largest:.2g}", "right"))
    # if all differences are 0, the bar has no ends
    for share, words, align in ends if largest > 0 else ends[1:2]:
        _write(figure, left + share * width, bottom - _pixels(NAME) / 2, words, width, ha=align, **look)
    words = points.noted(f"largest difference {largest:.2g}", unit)
    look = {"size": 8.5, "color": style.MUTED, "va": "center"}
    _write(figure, left + width + _pixels(NOTE), bottom + height / 2, words, _pixels(style.WIDTH), **look)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges `image` (C, H, W) by repeating pixels, or averages it down."""
    height, width = image.shape[1:]
    if size[0] < height or size[1] < width:
        # plain averages of two or three pixels would turn fine patterns into coarse patterns
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    down, across = (torch.arange(new) * old // new for new, old in zip(size, (height, width), strict=True))
    return image[:, down][:, :, across]


def _noted(name: str, images: Tensor, drawn: int, plainly: bool = True) -> str:
    """Returns the name of some images, with notes on how they are drawn.

    Args:
        drawn: the number of images that are drawn.
        plainly: whether they are drawn as images, not as differences.
    """
    lost = int((~images.isfinite()).any(1).sum())
    channels = images.shape[1]
    return points.noted(
        "\n".join(style.literal(line, most=40) for line in name.split("\n")),
        _first(drawn, len(images)),
        "" if len(images) else "no images",
        f"mean of {channels} channels" if plainly and channels not in (1, 3) else "",
        f"{lost:,} not finite" if lost else "",
    )


def _first(drawn: int, count: int, things: str = "") -> str:
    """Returns a note such as "first 5 of 9 rows"; empty if all are drawn."""
    return f"first {drawn:,} of {count:,}{things}" if drawn < count else ""


def _figure(top: int, head: float, title: str, options: PlotOptions) -> Figure:
    """Returns a figure with images up to `top` pixels, and `head` inches above them."""
    # half a pixel is added, because a height that is rounded down loses the last row of pixels
    return style.new_figure((top + _pixels(head) + 0.5) / style.DPI, title, options)


def _write(figure: Figure, x: float, y: float, words: str, room: float, *, size: float, **look: Any) -> None:
    """Writes words at screen pixels (x, y) from the lower left, in smaller letters if `room` is too narrow."""
    size *= min(1.0, room / (_pixels(LETTER) * size / 9 * max(1, *(len(line) for line in words.split("\n")))))
    figure.text(x / style.DPI, y / style.DPI, words, transform=figure.dpi_scale_trans, size=size, **look)
