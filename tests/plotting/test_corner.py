"""Corner plots: the choice of columns and classes, the ranges of the axes, and texts that do not overlap."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layout import catch_figures, check_layout, words_of
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from flowtrain.data.types import ColumnType
from flowtrain.plotting.corner import CLASS_COLOURS, MOST_CLASSES, SHOWN, Classes, draw_corner, folded
from flowtrain.plotting.options import PlotOptions
from flowtrain.utils.errors import FlowtrainError

LONG = tuple(f"mean concentration of component number {i} in micrograms per litre" for i in range(30))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return catch_figures(monkeypatch)


def corner(d: int, rows: int = 400, **changed: Any) -> None:
    given: dict[str, Any] = {"data": torch.randn(rows, d), "samples": torch.randn(300, d), "columns": (), "title": "t"}
    draw_corner(Path("never written.png"), **{**given, **changed})


HEAVY = torch.distributions.StudentT(1.5).sample((400, 8))
DATA: dict[str, tuple[Tensor, tuple[str, ...]]] = {
    "three": (torch.randn(400, 3), ("a", "b", "c")),
    "eight": (torch.randn(400, 8) * 10.0 ** torch.arange(-4, 4), ()),
    "heavy": (HEAVY * 1000, LONG[:8]),
    "lognormal": ((3 * torch.randn(400, 4)).exp(), LONG[:4]),
    "offset": (torch.randn(400, 5) * 1e-3 + torch.tensor([0.0, 1.2, 50, 7e3, 1e6]), LONG[:5]),
    "integers": (torch.randint(0, 5, (400, 4)).double(), ()),
    "constant": (torch.zeros(400, 3), ()),
    "few": (torch.randn(9, 3), ()),
    "thirty": (torch.randn(400, 30), LONG),
}


@pytest.mark.parametrize("name", DATA)
def test_words_do_not_overlap(figures: list[Figure], name: str) -> None:
    data, columns = DATA[name]
    labels = torch.randint(0, 12, (len(data),))
    for classes in (None, Classes(labels, None), Classes(labels, labels, "a long name of the label")):
        given = {"data": data, "samples": data + 0.1, "columns": columns, "classes": classes}
        corner(data.shape[1], **given, options=PlotOptions(title=classes is None))
    assert len(figures) == 3
    for figure in figures:
        check_layout(figure)


@pytest.mark.parametrize("chosen", [(2,), (2, 0), ("2:9",), (29, "1:3", 7)])
def test_chosen_columns_are_shown_in_their_order(figures: list[Figure], chosen: tuple[str | int, ...]) -> None:
    options = PlotOptions(columns=chosen)
    data = torch.randn(400, 30) + 1000 * torch.arange(30)
    corner(30, data=data, samples=data, options=options)
    positions = options.positions((30,), ())
    assert positions is not None
    count = len(positions)
    bottom = figures[0].axes[-count:]
    assert len(figures[0].axes) == count * (count + 1) // 2
    for axes, position in zip(bottom, positions, strict=True):
        assert f"c{position}" in axes.get_xlabel()
        assert round(np.mean(axes.get_xlim()) / 1000) == position
    assert f"{count} of 30 columns" in words_of(figures[0])[0][0] + figures[0].texts[0].get_text()
    check_layout(figures[0])


def test_default_columns_are_the_first_and_the_title_counts_them(figures: list[Figure]) -> None:
    corner(30, columns=LONG)
    corner(3)
    assert len(figures[0].axes) == SHOWN * (SHOWN + 1) // 2
    assert f"{SHOWN} of 30 columns" in figures[0].texts[0].get_text()
    assert "columns" not in figures[1].texts[0].get_text()


def test_axes_range_over_the_quantiles_of_the_data(figures: list[Figure]) -> None:
    data = torch.rand(2000, 3).cumsum(1)
    data[7] = 1e6
    corner(3, data=data, samples=100 * data)
    expected = np.quantile(data.numpy(), (0.005, 0.995), axis=0)
    for axes, (low, high) in zip(figures[0].axes[-3:], expected.T, strict=True):
        np.testing.assert_allclose(axes.get_xlim(), (low, high))
    np.testing.assert_allclose(figures[0].axes[1].get_ylim(), expected[:, 1])


def test_axes_of_constant_data_reach_over_the_samples(figures: list[Figure]) -> None:
    samples = torch.randn(2000, 3)
    corner(3, data=torch.full((20, 3), 5.0), samples=samples)
    for axes, low in zip(figures[0].axes[-3:], np.quantile(samples.numpy(), 0.005, axis=0), strict=True):
        np.testing.assert_allclose(axes.get_xlim(), (low, 5), atol=0.1)


def dots(figure: Figure) -> PathCollection:
    (found,) = [each for each in figure.axes[1].collections if isinstance(each, PathCollection)]
    return found


def test_each_class_has_a_colour_and_an_outline(figures: list[Figure]) -> None:
    labels = torch.arange(600) % 3
    data = torch.randn(600, 3) + 20 * labels[:, None]
    corner(3, data=data, samples=data, classes=Classes(labels + 4, labels + 4, "species"))
    corner(3, data=data, samples=data, classes=Classes(labels + 4, None, "species"))
    known, unknown = figures
    for figure in figures:
        colours = [to_hex(each) for each in dots(figure).get_facecolors()]  # type: ignore[attr-defined]
        assert colours == [CLASS_COLOURS[y] for y in labels.tolist()]
        assert {"species", "4", "5", "6"} <= {text for text, _ in words_of(figure)}
    outlines = [each for each in known.axes[1].collections if not isinstance(each, PathCollection)]
    # the outline of each class surrounds the samples of the class
    assert len(outlines) == 3
    for y, outline in enumerate(outlines):
        box = outline.get_datalim(known.axes[1].transData)
        assert abs((box.x0 + box.x1) / 2 - 20 * y) < 2
    assert len(unknown.axes[1].collections) == 2


def test_rows_that_are_not_finite_are_left_out_with_their_labels(figures: list[Figure]) -> None:
    labels = torch.arange(400) % 2
    data = torch.randn(400, 3) + 20 * labels[:, None]
    data[:100, 1] = torch.nan
    corner(3, data=data, samples=data[::2], classes=Classes(labels, labels[::2]))
    colours = [to_hex(each) for each in dots(figures[0]).get_facecolors()]  # type: ignore[attr-defined]
    assert colours == [CLASS_COLOURS[y] for y in labels[100:].tolist()]


def test_most_frequent_of_many_classes_have_colours(figures: list[Figure]) -> None:
    labels = torch.cat([torch.arange(26).repeat(10), torch.full((200,), 25), torch.full((100,), 3)])
    corner(3, data=torch.randn(len(labels), 3), classes=Classes(labels, None, "letter"))
    words = {text for text, _ in words_of(figures[0])}
    assert {"3", "25", f"letter, {MOST_CLASSES} of 26"} <= words
    check_layout(figures[0])


def test_labels_must_fit_the_rows() -> None:
    with pytest.raises(FlowtrainError, match="400 rows by 399 labels"):
        corner(3, classes=Classes(torch.zeros(399), None))


def test_shortened_names_remain_distinct() -> None:
    start = len("mean concentration of component number ")
    short = [folded(name, 1.4, start) for name in LONG]
    assert len(set(short)) == 30
    assert all(name.count("\n") < 3 and max(map(len, name.split("\n"))) <= 1.4 / 0.08 for name in short)
    assert folded("a name", 1.4) == "a name"


@pytest.mark.parametrize("columns", [("$a", "b$\\x$", "c"), ("a very long name of a column " * 3, "_b", "")])
def test_names_and_titles_may_contain_any_text(tmp_path: Path, coarse: int, columns: tuple[str, ...]) -> None:
    x = torch.randn(300, 3)
    path = tmp_path / "corner.png"
    draw_corner(path, data=x, samples=x + 1, columns=columns, title="$\\no{ $ tex" * 20)
    assert path.is_file()


def test_samples_may_lie_outside_the_range(
    tmp_path: Path, coarse: int, png_size: Callable[[Path], tuple[int, int]]
) -> None:
    x = torch.randn(300, 3)
    draw_corner(
        tmp_path / "a.png", data=x, samples=x + 1e6, columns=(), title="", classes=Classes(x[:, 0] > 0, x[:, 0] > 0)
    )
    assert png_size(tmp_path / "a.png")[0] == 1800 // coarse


def test_axes_of_typed_columns_stay_in_the_support_and_show_categories(figures: list[Figure]) -> None:
    names = ("red", "a very long name", "x$y", "blue")
    types = [ColumnType.parse("circular(360)"), ColumnType.parse("positive"), ColumnType("real")]
    types.append(ColumnType("categorical").with_categories(names))
    u = torch.rand(400, 4)
    x = torch.stack([360 * u[:, 0], 5 + u[:, 1], u[:, 2], 4 * u[:, 3]], 1)
    corner(4, data=x, samples=x[:300], types=types)
    check_layout(figures[0])
    axes = figures[0].axes
    last_row = axes[-4:]
    limits = [each.get_xlim() for each in last_row]
    assert limits[0] == (0, 360)
    assert limits[3] == (0, 4)
    # the end of the support is far from the values
    assert limits[1][0] > 4
    assert limits[2] != (0, 1)
    labels = [text.get_text() for text in last_row[0].get_yticklabels()]
    assert last_row[0].get_yticks().tolist() == [0.5, 1.5, 2.5, 3.5]
    assert labels[::3] == ["red", "blue"]
    assert "very long name" not in labels[1]


def test_categories_that_do_not_fit_are_left_out(figures: list[Figure]) -> None:
    x = torch.rand(400, 3) * 1000
    many = ColumnType("categorical").with_categories([f"category {i}" for i in range(1000)])
    corner(3, data=x, samples=x, types=[many] * 3)
    check_layout(figures[0])
    assert 2 <= len(figures[0].axes[-1].get_xticks()) < 20
