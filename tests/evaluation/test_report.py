"""The report of an evaluation: its figures in any format, and how the flow was made."""

import base64
import html.parser
import re
from pathlib import Path

import pytest
import torch

from flowtrain.bijections.linear import Affine
from flowtrain.evaluation import Evaluation, evaluate
from flowtrain.evaluation.report import write_report
from flowtrain.flow import Flow

SVG = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'


@pytest.fixture
def result() -> Evaluation:
    return evaluate(Flow((2,), Affine(2)), torch.randn(20, 2))


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and collects sources of images, targets of links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(folder: Path, result: Evaluation, figures: list[Path], rows: list[tuple[str, str]]) -> tuple[str, Page]:
    markdown, path = write_report(result, "a <title>", "best.pt", folder / "report.json", figures, rows)
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    return markdown.read_text(), page


def test_the_report_says_how_the_flow_was_made(tmp_path: Path, result: Evaluation) -> None:
    rows = [("training", "flowtrain model=realnvp 'data.path=a|b <c>.csv'"), ("device", "cpu, 1 thread")]
    text, page = pages(tmp_path, result, [], rows)
    for name, value in rows:
        assert name in page.text
        assert value in page.text
        assert value.replace("|", r"\|") in text
    without, _ = pages(tmp_path, result, [], [])
    assert "training" not in without


def test_figures_are_inside_of_the_page_and_other_formats_are_links(tmp_path: Path, result: Evaluation) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    contents = {"a.pdf": b"%PDF", "a.png": b"\x89PNG", "b.svg": SVG.encode(), "b.pdf": b"%PDF", "c&d.pdf": b"%PDF"}
    for name, content in contents.items():
        (plots / name).write_bytes(content)
    text, page = pages(tmp_path, result, [plots / name for name in contents], [])
    # one file of each figure
    assert re.findall(r"(!?)\[.*?\]\(<(.*?)>\)", text) == [
        ("!", "plots/a.png"),
        ("!", "plots/b.svg"),
        ("", "plots/c&d.pdf"),
    ]
    kinds, data = zip(*(source.split(",", 1) for source in page.sources), strict=True)
    assert kinds == ("data:image/png;base64", "data:image/svg+xml;base64")
    assert [base64.b64decode(each) for each in data] == [contents["a.png"], contents["b.svg"]]
    assert page.links == ["plots/c&d.pdf"]
