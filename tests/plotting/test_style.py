"""Files of figures in each format, figures without a title, and tick labels."""

import errno
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from flowtrain.plotting import style
from flowtrain.plotting.options import PlotOptions

# the first bytes of each format
STARTS = {"png": b"\x89PNG", "pdf": b"%PDF-", "svg": b"<?xml"}


def small(options: PlotOptions, title: str = "the title") -> Figure:
    figure = style.new_figure(2.0, title, options)
    axes = style.add_axes(figure, 0.6, 0.5, 5.0, 0.8)
    axes.plot([0, 1], [0, 1])
    axes.set_xlabel("words along an axis")
    return figure


@pytest.mark.parametrize("formats", [("png",), ("pdf",), ("png", "pdf", "svg")])
def test_each_format_gives_a_file(tmp_path: Path, formats: tuple[str, ...]) -> None:
    options = PlotOptions(formats)
    with style.styled():
        style.save(small(options), tmp_path / "new/curves.png", options)
    found = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert found.keys() == {f"curves.{name}" for name in formats}
    assert all(content.startswith(STARTS[name.rpartition(".")[2]]) for name, content in found.items())


def test_vector_files_contain_text_and_are_reproducible(tmp_path: Path) -> None:
    options = PlotOptions(("pdf", "svg"))
    for name in ("a", "b"):
        with style.styled():
            style.save(small(options), tmp_path / f"{name}.png", options)
    for kind in options.formats:
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    fonts = re.findall(rb"/Subtype /(Type3|Type0|CIDFontType2)", (tmp_path / "a.pdf").read_bytes())
    assert b"CIDFontType2" in fonts
    assert b"Type3" not in fonts
    assert ">words along an axis</text>" in (tmp_path / "a.svg").read_text()


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")

    def full(self: Figure, content: object, **named: object) -> None:
        content.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Figure, "savefig", full)
    with style.styled(), pytest.raises(OSError, match="no space left"):
        style.save(small(PlotOptions()), tmp_path / "a.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]


def test_figure_without_title_is_lower_with_the_same_axes() -> None:
    with style.styled():
        plain, titled = small(PlotOptions(title=False)), small(PlotOptions())
    assert [text.get_text() for text in plain.texts] == []
    assert [text.get_text() for text in titled.texts] == ["the title"]
    heights = [figure.get_size_inches()[1] for figure in (plain, titled)]
    assert heights == pytest.approx([2.0 - style.TITLE_HEIGHT, 2.0])
    boxes = [figure.axes[0].get_position() for figure in (plain, titled)]
    inches = [(box.y0 * height, box.y1 * height) for box, height in zip(boxes, heights, strict=True)]
    assert inches[0] == pytest.approx(inches[1])


@pytest.mark.parametrize(
    ("limits", "ticks", "labels"),
    [
        ((0, 1), [0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ((-2, 2), [-2, 0, 2], ["\N{MINUS SIGN}2", "0", "2"]),
        ((0, 3000), [0, 1000, 2000], ["0", "1,000", "2,000"]),
        ((0, 1e-5), [0, 5e-6, 1e-5], ["0", "5e-6", "1e-5"]),
        ((0, 4e6), [0, 2e6, 4e6], ["0", "2e6", "4e6"]),
        ((0, 1), [-0.0, 0.1 + 0.2, 0.6], ["0.0", "0.3", "0.6"]),
        ((-123_460, -123_450), [-123_460, -123_455], ["\N{MINUS SIGN}123,460", "\N{MINUS SIGN}123,455"]),
        # ticks out of view do not affect the format
        ((0, 1), [0, 0.5, 1, 1.25], ["0.0", "0.5", "1.0", "1.2"]),
    ],
)
def test_ticks_of_an_axis_have_one_format(limits: tuple[float, float], ticks: list[float], labels: list[str]) -> None:
    axes = Figure().add_subplot()
    style.mark_numbers(axes)
    axes.set_xlim(limits)
    found = axes.xaxis.get_major_formatter().format_ticks(ticks)
    assert found == labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1e-5, 1e-3], {"1e-5", "1e-4", "1e-3"}),
        ([0.02, 30.0], {"0.1", "1", "10"}),
        ([15.0, 40.0], {"20"}),
        ([3.0, 3.0], {"3", "2", "5"}),
    ],
)
def test_narrow_logarithmic_axis_has_labels(values: list[float], labels: set[str]) -> None:
    with style.styled():
        axes = style.add_axes(style.new_figure(2, "t"), 0.5, 0.5, 4, 1)
        style.make_logarithmic(axes.yaxis, values)
        low, high = axes.get_ylim()
        axes.figure.canvas.draw()
        shown = {
            label.get_text()
            for label, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
            if low <= at <= high
        }
    assert low <= min(values) <= max(values) <= high
    assert shown & labels


def test_long_names_are_shortened_in_the_middle() -> None:
    assert style.abbreviated("price", 10) == "price"
    names = [style.abbreviated(f"average delay of the research department {i}", 20) for i in (7, 8)]
    assert len({*names}) == 2
    assert all(len(name) <= 20 for name in names)
