"""Figures of images: position, size and grey levels of each image, and labels of rows and columns."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.contexts import COLUMNS, WithContext, contexts
from helpers.layout import catch_figures, check_layout, words_of
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.logit import Logit
from flowtrain.flow import Flow
from flowtrain.plotting import image_grids, style
from flowtrain.plotting import image_pictures as pictures
from flowtrain.plotting.image_grids import draw_panels, draw_rows
from flowtrain.plotting.options import DEFAULT
from flowtrain.utils.errors import FlowtrainError

# sizes in pixels of the figure: its margin, a digit if each of two panels has ten digits in a row, and the gap between
# digits
EDGE, DIGIT, GAP = 28, 84, 2
MAGENTA = [255, 0, 255]


def digits(count: int = 100) -> Tensor:
    return torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)


def panels(path: Path, *given: Tensor, **changed: Any) -> NDArray[np.int64]:
    """Returns the picture of `given`, without its lower and left margin, as (height, width, 3) from 0 to 255."""
    named = [(f"panel {place}", each) for place, each in enumerate(given)]
    draw_panels(path, **{"panels": named, "levels": 256, "title": "a title", **changed})
    return np.rint(255 * imread(path)[:-EDGE, EDGE:, :3]).astype(int)


def rows(path: Path, *given: Tensor, **changed: Any) -> Path:
    named = [(f"row {place}", each) for place, each in enumerate(given)]
    draw_rows(path, **{"rows": named, "levels": 256, "title": "a title", **changed})
    return path


def test_figures_have_the_expected_size_and_create_the_folder(
    tmp_path: Path, png_size: Callable[..., tuple[int, int]]
) -> None:
    path = tmp_path / "new" / "plots" / "images.png"
    panels(path, digits(), digits())
    assert png_size(path) == (1800, 1012)
    assert png_size(rows(path, digits(10), digits(10), note="a note")) == (1800, 490)
    assert png_size(rows(path, digits(10), digits(10))) == (1800, 454)
    assert [each.name for each in path.parent.iterdir()] == ["images.png"]
    assert plt.get_fignums() == []


def test_each_pixel_is_drawn_as_a_square(tmp_path: Path) -> None:
    data, samples = digits(), digits(97)
    picture = panels(tmp_path / "images.png", data, samples)
    step, width = DIGIT + GAP, 10 * (DIGIT + GAP) - GAP
    for left, shown in ((0, data), (width + EDGE, samples)):
        sheet = picture[-width:, left : left + width]
        for place, image in enumerate(shown.numpy()):
            y, x = step * (place // 10), step * (place % 10)
            expected = np.kron(image[0], np.ones((3, 3)))[..., None]
            assert (sheet[y : y + DIGIT, x : x + DIGIT] == expected).all(), place
        # pixels without an image are white
        assert (sheet[DIGIT:step] == 255).all()
        assert (sheet[:, DIGIT:step] == 255).all()
    assert (picture[-DIGIT:, -EDGE - 3 * step + GAP : -EDGE] == 255).all()


def test_values_are_clipped_between_black_and_white(tmp_path: Path) -> None:
    shades = torch.tensor([-1e300, -1.0, 0.0, 51.0, 254.0, 255.0, 255.9, 1e300]).reshape(8, 1, 1, 1).expand(8, 1, 4, 4)
    picture = panels(tmp_path / "images.png", shades, shades, columns=8)
    assert picture[-50, 50:858:107].tolist() == [[shade] * 3 for shade in (0, 0, 0, 51, 254, 255, 255, 255)]


@pytest.mark.parametrize(("levels", "value", "shade"), [(2, 1, 255), (16, 5, 85), (32, 31, 255), (1.0, 0.2, 51)])
def test_highest_level_is_white(tmp_path: Path, levels: float, value: float, shade: int) -> None:
    x = torch.full((1, 1, 2, 2), value)
    assert panels(tmp_path / "images.png", x, x, levels=levels)[-1, 429].tolist() == [shade] * 3


def test_three_channels_are_rgb_and_other_numbers_are_averaged(tmp_path: Path) -> None:
    colours = torch.tensor([10, 100, 200], dtype=torch.uint8).reshape(1, 3, 1, 1)
    picture = panels(tmp_path / "images.png", colours, colours[:, :2])
    assert picture[-1, 429].tolist() == [10, 100, 200]
    assert picture[-1, 858 + EDGE + 429].tolist() == [55, 55, 55]
    assert image_grids._noted("x", colours[:, :2], 1) == "x (mean of 2 channels)"


def test_non_finite_pixels_are_magenta_and_counted(tmp_path: Path) -> None:
    x = digits().double()
    x[0, 0, 4, 5], x[0, 0, 27, 27], x[99, 0, 0, 0] = math.nan, math.inf, -math.inf
    sheet = panels(tmp_path / "images.png", x, digits())[-858:, :858]
    lost = np.argwhere((sheet == MAGENTA).all(2))
    corners = [(12, 15), (81, 81), (9 * 86, 9 * 86)]
    expected = [[y + i, x + j] for y, x in corners for i in range(3) for j in range(3)]
    assert sorted(lost.tolist()) == sorted(expected)
    assert image_grids._noted("x", x, 100) == "x (3 not finite)"
    # a pixel is magenta if any of its channels is not finite
    colours = torch.ones(1, 3, 1, 1).index_fill(1, torch.tensor([1]), math.nan)
    assert panels(tmp_path / "images.png", colours, colours)[-1, 429].tolist() == MAGENTA
    assert image_grids._noted("x", x.expand(100, 3, 28, 28), 50) == "x (first 50 of 100, 3 not finite)"


def test_averaging_large_images_keeps_non_finite_pixels_visible(tmp_path: Path) -> None:
    x = (torch.arange(300) % 2 * 255.0).expand(100, 1, 300, 300).clone()
    x[0, 0, 150, 150] = math.nan
    sheet = panels(tmp_path / "images.png", x, torch.zeros(1, 1, 300, 300))[-858:, :858]
    assert sheet[42, 42].tolist() == MAGENTA
    image = sheet[86:170, 86:170]
    assert image.mean() == pytest.approx(127.5, abs=1)
    # the stripes are finer than the pixels of the picture. Their mean must be drawn, without coarser stripes
    assert np.ptp(image[:, 2:-2]) < 16


def test_rows_of_different_lengths_are_left_aligned(tmp_path: Path) -> None:
    bright = torch.full((4, 1, 28, 28), 200.0)
    picture = np.rint(255 * imread(rows(tmp_path / "rows.png", bright[:2], bright[:0], bright))[..., :3]).astype(int)
    first, second, last = (
        np.flatnonzero((picture[y, 300:] == 200).all(1)) for y in (-EDGE - 700, -EDGE - 400, -EDGE - 1)
    )
    assert len(first) == 2 * 300
    assert len(second) == 0
    assert len(last) == 4 * 300
    assert first[0] == last[0]
    assert (picture[-EDGE - 700, 300 + first[-1] + 1 :] == 255).all()


def test_differences_have_signed_colours_scaled_to_the_largest(tmp_path: Path) -> None:
    shades = torch.linspace(0, 255, 3).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    differences = torch.zeros(3, 3, 8, 8)
    # the channel with the largest difference is shown. A mean over channels would hide it
    differences[0, 0], differences[0, 1], differences[2, 2] = -2e-5, 1e-5, 1e-5
    differences[1, 0, 0, 0] = math.nan
    cell = image_grids.Cell(8, 8, 2)
    for image, place in ((0, 0.0), (1, 0.5), (2, 0.75)):
        shown = image_grids._signed_shades(differences[image], cell, 2e-5)
        assert (shown[7, 7] == image_grids.SIGNED(place, bytes=True)[:3]).all()
    assert image_grids._signed_shades(differences[1], cell, 2e-5)[0, 0].tolist() == MAGENTA
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_grids, "_write", lambda figure, x, y, words, room, **look: written.append(words))
        path = rows(tmp_path / "rows.png", shades, signed=[("difference", differences)], unit="of a level")
    assert any("2e-05" in words and "of a level" in words for words in written)
    assert {"\N{MINUS SIGN}2e-05", "0", "2e-05", "difference (1 not finite)"} <= set(written)
    picture = np.rint(255 * imread(path)[..., :3]).astype(int)
    # so many pixels of this colour belong to the image, not to the colour bar, which has few
    deepest = (picture == image_grids.SIGNED(0.0, bytes=True)[:3]).all(2)
    assert deepest.sum() > 10_000


@pytest.mark.parametrize("levels", [17, 256])
def test_reconstruction_errors_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    """Errors are not rounded to levels: an error of half a level is shown."""

    class Off(Affine):
        """An affine map with an error of 0.4 in the latent of the first pixel."""

        def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x, log_det = super().forward(z, label)
            return x + 0.4 * torch.eye(16)[0], log_det

    given: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "draw_rows", lambda path, **arguments: given.update(arguments))
    x = torch.randint(0, levels, (30, 1, 4, 4))
    data = SimpleNamespace(test=x, test_labels=None)
    for broken in (False, True):
        part = Off(16) if broken else Affine(16)
        flow = (
            Flow((1, 4, 4), Chain([Flat(part), Logit(levels, 0.05)]), integer_valued=True, levels=levels).float().eval()
        )
        show = pictures.UnitRange(flow, data)  # type: ignore[arg-type]
        pictures._draw_reconstructions(flow, data, show, tmp_path / "r.png", "t", DEFAULT)  # type: ignore[arg-type]
        ((name, difference),) = given["signed"]
        size = difference.abs()
        assert name == "difference"
        assert 0 < size[..., 1:].max() < 1e-2
        assert (size[:, 0, 0, 0] > 0.01).any() == broken
        assert [words for words, _ in given["rows"]] == ["data", "round trip"]


class Flat(Bijection):
    """A bijection of vectors for images."""

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.forward(z.flatten(1), label)
        return x.view_as(z), log_det

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse(x.flatten(1), label)
        return z.view_as(x), log_det


def test_downscaling_keeps_single_pixel_differences_visible() -> None:
    image = torch.zeros(1, 300, 300)
    image[0, 150, 150], image[0, 20, 20] = -1.0, 0.5
    cell = image_grids.Cell(30, 30, 2)
    shown = image_grids._signed_shades(image, cell, 1.0).astype(int)
    white = shown[29, 29]
    assert (np.abs(shown - white).sum(2) > 0).sum() == 2
    assert (shown[15, 15] == 255 * np.array(image_grids.SIGNED(0.0)[:3])).all()
    assert shown[2, 2, 0] > shown[2, 2, 2] + 40


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 8, 8), (3, 32, 32), (4, 7, 28), (3, 200, 10), (1, 1, 900), (1, 900, 1)]
)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_any_shape_and_number_of_images_is_drawn(
    tmp_path: Path, coarse: int, shape: tuple[int, ...], count: int, png_size: Callable[..., tuple[int, int]]
) -> None:
    x, path = torch.randint(0, 256, (count, *shape), dtype=torch.uint8), tmp_path / "images.png"
    for draw in (panels, rows):
        for given in ((x,), (x, x[:1], x[:0])):
            draw(path, *given)
            width, height = png_size(path)
            assert width == 1800 // coarse
            assert height < 1.2 * width


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: torch.full_like(x, math.nan),
        lambda x: x.bfloat16().requires_grad_(),
        lambda x: x > 100,
        lambda x: x.to(torch.uint16),
        lambda x: x.long() * 2**55,
    ],
    ids=["all_nan", "bfloat16_with_a_graph", "bool", "uint16", "huge_integers"],
)
def test_any_values_are_drawn(tmp_path: Path, coarse: int, spoil: Callable[[Tensor], Tensor]) -> None:
    x = spoil(digits(5).double())
    panels(tmp_path / "panels.png", x, digits(5))
    rows(tmp_path / "rows.png", x, digits(5))


def test_first_of_many_images_are_drawn_and_counted(tmp_path: Path, coarse: int) -> None:
    written = []

    def text(figure: Figure, x: float, y: float, words: str, **look: Any) -> None:
        written.append(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "text", text)
        for columns in (None, 10, 1000, -1):
            panels(tmp_path / "panels.png", digits(3000), digits(50), columns=columns)
        rows(tmp_path / "rows.png", *[digits(50)] * 30, note="a note")
    named = [words for words in written if words.startswith("panel 0")]
    assert named == [f"panel 0 (first {count:,} of 3,000)" for count in (169, 100, 1521, 10)]
    assert "a note, first 25 of 50 images, first 21 of 30 rows" in written
    assert written.count("row 20") == 1
    assert "row 21" not in written


@pytest.mark.parametrize(("count", "columns"), [(100, 10), (64, 8), (50, 10), (97, 10), (2, 2), (1, 1)])
def test_grids_are_nearly_square_and_full_if_possible(count: int, columns: int) -> None:
    assert image_grids._grid(count, None, aspect=1.0, most=13) == (math.ceil(count / columns), columns)


def test_titles_may_contain_any_text(tmp_path: Path, coarse: int) -> None:
    words = "$\\no{ $ tex " * 20
    draw_panels(tmp_path / "panels.png", panels=[(words, digits(4)), ("", digits(4))], levels=256, title=words)
    draw_rows(tmp_path / "rows.png", rows=[(words, digits(4)), ("", digits(4))], levels=256, title="", note=words)


@pytest.mark.parametrize(
    ("given", "levels", "words"),
    [
        ([], 256, "no images to draw"),
        ([torch.zeros(5, 28, 28)], 256, r"shape \(5, 28, 28\): give it as \(N, C, H, W\)"),
        ([torch.zeros(5, 0, 28, 28)], 256, "shape"),
        ([torch.zeros(5, 1, 8, 8), torch.zeros(5, 1, 8, 9)], 256, "8 by 9 pixels beside"),
        ([torch.zeros(5, 1, 8, 8)], 0, "levels=0"),
        ([torch.zeros(5, 1, 8, 8)], math.nan, "levels=nan"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, given: list[Tensor], levels: float, words: str) -> None:
    for draw in (panels, rows):
        with pytest.raises(FlowtrainError, match=words):
            draw(tmp_path / "images.png", *given, levels=levels)
    assert list(tmp_path.iterdir()) == []


def test_too_many_panels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlowtrainError, match="7 panels"):
        panels(tmp_path / "images.png", *[digits(1)] * 7)


@pytest.mark.parametrize("size", [8, 28, 32, 300])
@pytest.mark.parametrize("note", ["", "a note"])
def test_words_do_not_overlap_and_rows_fill_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, note: str
) -> None:
    figures = catch_figures(monkeypatch)
    monkeypatch.setattr(style, "DPI", 200)
    x = torch.rand(16, 1, size, size)
    named = [(f"class {i} → {i}\ntest {10 * i} → {10 * i + 1}", x) for i in range(6)]
    heads = [f"class {i}" for i in range(16)]
    for columns in ([], heads):
        draw_rows(
            tmp_path / "a.png", rows=named, levels=1, title="t", note=note, heads=columns, signed=[("difference", x)]
        )
    draw_panels(tmp_path / "a.png", panels=[("data", x), ("samples (same classes)", x)], levels=1, title="a title")
    assert len(figures) == 3
    for figure in figures:
        check_layout(figure)
    for figure in figures[:2]:
        images = figure.images[1:]
        right = max(image.ox + image.get_array().shape[1] for image in images)  # type: ignore[union-attr]
        assert 1800 - 0.06 * 1800 < right + EDGE <= 1800


def test_headings_are_above_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    x = torch.rand(5, 1, 28, 28)
    draw_rows(tmp_path / "a.png", rows=[("row", x)], levels=1, title="t", heads=["h0", "h1", "h2", "h3", "h4"])
    sheet = figures[0].images[0]
    width = sheet.get_array().shape[1]  # type: ignore[union-attr]
    found = {text: (box.x0 + box.x1) / 2 - sheet.ox for text, box in words_of(figures[0])}
    places = [found[f"h{i}"] for i in range(5)]
    assert np.ptp(np.diff(places)) < 2
    assert places[0] == pytest.approx(width - places[-1], abs=2)


class Digits:
    """Images with the classes 0, 0, 1, 2, 1."""

    test = torch.randint(0, 16, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    test_labels: Tensor | None = torch.tensor([0, 0, 1, 2, 1])


@pytest.mark.parametrize(
    ("known", "conditional", "expected"),
    [
        (True, False, ["class 0\ntest 0 → 1", "class 1 → 2\ntest 2 → 3"]),
        (True, True, ["class 0\ntest 0 → 1", "class 1\ntest 2 → 4"]),
        (False, False, ["test 0 → 1", "test 2 → 3"]),
    ],
)
def test_interpolation_labels_name_classes_and_rows_of_both_ends(
    known: bool, conditional: bool, expected: list[str]
) -> None:
    flow = Flow((1, 4, 4), Chain([Flat(Affine(16)), Logit(16, 0.05)]), integer_valued=True, levels=16).eval()
    if conditional:
        flow.classes, flow.class_counts = 3, (2, 2, 1)
    data = Digits()
    if not known:
        data.test_labels = None
    rows = pictures.interpolations(flow, data)  # type: ignore[arg-type]
    assert [name for name, _ in rows] == expected
    for name, images in rows:
        assert len(images) == pictures.WEIGHTS
        i, j = (int(word) for word in name.split("test ")[1].split(" → "))
        # the ends are dequantized, so they differ from the integers by less than 1
        for end, row in ((images[0], i), (images[-1], j)):
            assert ((end - data.test[row]).floor() == 0).all()


def test_images_with_context_are_drawn_at_the_contexts_of_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = []

    class Recording(Flat):
        def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            given.append(context)
            return super().forward(z)

        def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            given.append(context)
            return super().inverse(x)

    flow = Flow((1, 4, 4), Recording(Affine(16)), context=COLUMNS).eval()
    data = WithContext(torch.rand(12, 1, 4, 4), contexts(12))
    pictures.draw(flow, data, tmp_path / "samples.png", "title", None, None)
    files = pictures.draw_other_figures(flow, data, lambda name: tmp_path / f"{name}.png", "title")
    assert {file.stem for file in files} == {"reconstructions", "temperature"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    wanted = flow.features(flow.context_of(data.test_context, torch.zeros(12)))
    assert wanted is not None
    for found in given:
        torch.testing.assert_close(found, wanted[: len(found)])
