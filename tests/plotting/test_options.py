"""The options of figures: valid and invalid options, file formats, and the choice of columns."""

from pathlib import Path
from typing import Any

import pytest

from flowtrain.plotting.options import DEFAULT, DEFAULTS, PlotOptions
from flowtrain.runs.compose import compose
from flowtrain.utils.errors import ConfigError


def test_defaults_equal_the_config_file() -> None:
    assert compose({"model": "affine"}).config["plots"] == DEFAULTS
    assert PlotOptions.of({}) == PlotOptions.of({"plots": DEFAULTS}) == DEFAULT


@pytest.mark.parametrize(
    ("given", "formats"),
    [("pdf", ("pdf",)), (["svg"], ("svg",)), (["png", "pdf", "png"], ("png", "pdf")), (("svg", "png"), ("svg", "png"))],
)
def test_format_may_be_a_name_or_a_list(given: Any, formats: tuple[str, ...]) -> None:
    options = PlotOptions.of({"plots": {"format": given}})
    assert options.formats == formats
    assert options.files(Path("plots/a.b.png")) == [Path(f"plots/a.b.{name}") for name in formats]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (True, "plots.format"),
        ({"format": "jpg"}, "png, pdf, svg"),
        ({"format": ["png", "jpg"]}, "png, pdf, svg"),
        ({"format": []}, "png, pdf, svg"),
        ({"format": None}, "png, pdf, svg"),
        ({"title": "no"}, "plots.title"),
        ({"columns": []}, "plots.columns"),
        ({"columns": 1.5}, "plots.columns"),
        ({"columns": [True]}, "plots.columns"),
        ({"colums": [0]}, "columns"),
    ],
)
def test_error_message_for_an_invalid_option_names_the_valid_ones(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PlotOptions.of({"plots": given})


def test_columns_are_chosen_by_name_position_and_range() -> None:
    names = ("age", "height", "weight", "wealth")
    chosen = PlotOptions.of({"plots": {"columns": ["weight", "0:2", -1]}})
    assert chosen.positions((4,), names) == [2, 0, 1, 3]
    assert PlotOptions.of({"plots": {"columns": 2}}).positions((4,)) == [2]
    assert PlotOptions.of({"plots": {"columns": "c3"}}).positions((4,)) == [3]
    assert DEFAULT.positions((4,), names) is None


@pytest.mark.parametrize(
    ("columns", "event_shape", "words"),
    [
        (["wight"], (4,), "no column 'wight'"),
        ([4], (4,), "no column 4"),
        ([0, "age"], (4,), "twice"),
        ([0], (2,), "leave plots.columns out"),
        ([0], (1, 8, 8), "leave plots.columns out"),
    ],
)
def test_unknown_or_repeated_columns_are_refused(columns: list[Any], event_shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PlotOptions(columns=tuple(columns)).positions(event_shape, ("age", "height", "weight", "wealth"))
