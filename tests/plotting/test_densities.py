"""Density figures: any data and samples can be drawn, the panels share a colour scale, and texts do not overlap."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.layout import catch_figures, check_layout
from torch import Tensor

from flowtrain.data.types import ColumnType
from flowtrain.plotting import points
from flowtrain.plotting.densities import BRIGHTEST, draw_flow_1d, draw_flow_2d
from flowtrain.plotting.options import PlotOptions
from flowtrain.plotting.vector_pictures import draw_flow
from flowtrain.utils.errors import FlowtrainError

PIXELS = {1: (1800, 780), 2: (1800, 696), 8: (1800, 1808)}


def normal(x: Tensor) -> Tensor:
    return -0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


def draw(path: Path, d: int = 2, **changed: Any) -> Path:
    given = {"data": torch.randn(500, d), "samples": torch.randn(300, d), "log_density": normal}
    draw_flow(path, **{**given, "columns": (), "title": "a title", **changed})
    return path


@pytest.mark.parametrize("d", PIXELS)
def test_size_of_the_png_depends_on_the_number_of_columns(
    tmp_path: Path, d: int, png_size: Callable[..., tuple[int, int]]
) -> None:
    path = draw(tmp_path / "new" / "plots" / "flow.png", d)
    assert png_size(path) == PIXELS[d]
    assert [each.name for each in path.parent.iterdir()] == ["flow.png"]
    assert plt.get_fignums() == []


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.index_fill(0, torch.arange(0, len(x), 3), math.nan).index_fill(0, torch.tensor([1]), math.inf),
        lambda x: x.index_fill(0, torch.tensor([1, 5]), 1e25),
        lambda x: torch.full_like(x, math.nan),
        lambda x: torch.zeros_like(x),
        lambda x: x[:1].bfloat16().requires_grad_(),
    ],
    ids=["not_finite", "far", "all_nan", "constant", "one_bfloat16_with_a_graph"],
)
def test_unusual_samples_are_drawn(
    tmp_path: Path, coarse: int, d: int, spoil: Callable[[Tensor], Tensor], png_size: Callable[..., tuple[int, int]]
) -> None:
    assert png_size(draw(tmp_path / "flow.png", d, samples=spoil(torch.randn(300, d))))


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.index_fill(0, torch.tensor([1]), math.nan).index_fill(0, torch.tensor([2]), 1e25),
        lambda x: torch.ones_like(x),
        lambda x: x[:1],
        lambda x: x.round(),
        lambda x: x * 1e-12,
        lambda x: x * 1e-3 + 1e8,
        lambda x: x * 10.0 ** (6 * torch.arange(x.shape[1])),
    ],
    ids=["outliers", "constant", "one", "integers", "tiny", "offset", "units"],
)
def test_unusual_data_are_drawn(
    tmp_path: Path, coarse: int, d: int, spoil: Callable[[Tensor], Tensor], png_size: Callable[..., tuple[int, int]]
) -> None:
    assert png_size(draw(tmp_path / "flow.png", d, data=spoil(torch.randn(300, d))))


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("value", [0.0, -math.inf, math.nan, 700.0, 1e4])
def test_constant_density_is_drawn(
    tmp_path: Path, coarse: int, d: int, value: float, png_size: Callable[..., tuple[int, int]]
) -> None:
    assert png_size(draw(tmp_path / "flow.png", d, log_density=lambda x: torch.full((len(x),), value)))


def test_density_is_evaluated_once_on_a_float32_grid(tmp_path: Path) -> None:
    calls = []

    def log_density(x: Tensor) -> Tensor:
        calls.append(x)
        return normal(x)

    draw_flow_2d(
        tmp_path / "flow.png",
        data=torch.randn(100, 2),
        samples=torch.randn(100, 2),
        log_density=log_density,
        title="",
        resolution=30,
    )
    (grid,) = calls
    assert grid.shape == (900, 2)
    assert grid.dtype == torch.float32
    assert torch.equal(grid[0::30, 1], grid[:1, 1].expand(30))
    assert grid[0, 1] < grid[1, 1]


@pytest.mark.usefixtures("coarse")
def test_density_is_not_evaluated_for_three_columns(tmp_path: Path) -> None:
    def log_density(x: Tensor) -> Tensor:
        raise AssertionError("called")

    draw(tmp_path / "flow.png", 3, log_density=log_density)


def test_limits_ignore_outliers_of_the_data() -> None:
    values = torch.randn(2000).numpy()
    spoiled = np.concatenate((values, np.full(5, 1e6)))
    low, high = points.robust_range(spoiled)
    assert -6 < low < -2.5
    assert 2.5 < high < 6


def test_histograms_integrate_to_one() -> None:
    values = torch.rand(50_000, 2).numpy()
    limits = ((-0.5, 1.5), (-0.5, 3.5))
    heights = points.histogram_2d(values, limits, bins=80, blur=1.2)
    inner = points.histogram_2d(values, ((0.2, 0.8), (0.2, 0.8)), bins=30, blur=2.0)
    assert heights.shape == (80, 80)
    assert heights.sum() * (2 / 80) * (4 / 80) == pytest.approx(1, abs=1e-3)
    # x varies along the first index. The unit square covers half of the range of x and a quarter of the range of y
    assert heights[40].sum() * 4 / 80 == pytest.approx(1, abs=0.1)
    assert points.peak(heights) == pytest.approx(1, abs=0.3)
    # points outside the limits are blurred into the picture, so the edges are not darker
    assert inner[:3].mean() == pytest.approx(inner.mean(), rel=0.05)
    half, _ = points.histogram_1d(values[:, 0], (0.0, 0.5), bins=10)
    assert half == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"samples": torch.empty(0, 2)}, "samples of shape"),
        ({"data": torch.empty(0, 2)}, "data of shape"),
        ({"data": torch.randn(5)}, "data of shape"),
        ({"data": torch.randn(5, 3, 4, 4)}, "data of shape"),
        ({"samples": torch.randn(5, 3)}, "3"),
        ({"data": torch.full((5, 2), math.nan)}, "none of its 5 rows is finite"),
        ({"log_density": lambda x: x}, "log_density returned shape"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(FlowtrainError, match=words):
        draw(tmp_path / "flow.png", **changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("coarse")
def test_old_picture_remains_if_the_density_fails(tmp_path: Path) -> None:
    def log_density(x: Tensor) -> Tensor:
        raise RuntimeError("no density")

    path = tmp_path / "flow.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no density"):
        draw(path, log_density=log_density)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["flow.png"]


@pytest.mark.usefixtures("coarse")
def test_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "flow.png").mkdir()
    with pytest.raises(IsADirectoryError):
        draw(tmp_path / "flow.png")
    assert [each.name for each in tmp_path.iterdir()] == ["flow.png"]


@pytest.mark.usefixtures("coarse")
def test_threads_draw_the_same_picture_and_leave_rc_params_unchanged(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    data, samples = torch.randn(200, 2), torch.randn(200, 2)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    threads = [threading.Thread(target=draw, args=(path,), kwargs={"data": data, "samples": samples}) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert dict(matplotlib.rcParams) == before


@pytest.mark.usefixtures("coarse")
def test_picture_does_not_depend_on_rc_params(tmp_path: Path) -> None:
    data, samples = torch.randn(200, 2), torch.randn(200, 2)
    plain = draw(tmp_path / "plain.png", data=data, samples=samples)
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 30, "text.usetex": True}):
        other = draw(tmp_path / "other.png", data=data, samples=samples)
    assert plain.read_bytes() == other.read_bytes()


def test_bin_width_depends_on_the_width_of_the_modes() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=4000)
    two = np.concatenate([one[:2000] * 0.1, 10 + one[2000:] * 0.1])
    counts = [points.count_bins(values, (-20.0, 20.0), 4000, most=10_000) for values in (one, two)]
    assert counts[1] > 3 * counts[0]
    # Freedman and Diaconis: 2 IQR n^(-1/3), with the IQR of a Gaussian
    assert counts[0] == pytest.approx(40 / (2 * 1.349 * 4000 ** (-1 / 3)), rel=0.1)
    assert points.count_bins(one, (-5.0, 5.0), 4000) > 30
    assert points.count_bins(np.zeros(50), (-1.0, 1.0), 50) == points.FEWEST_BINS


def wave(x: Tensor) -> Tensor:
    return normal(x) + x[:, 0].sin()


COLUMNS = [("x1", "x2"), ("longitude of the place (degrees east)", "a name of a column that never ends " * 5)]
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "large": lambda x: x * 3e6,
    "small": lambda x: x * 2e-7 + 1e-6,
    "offset": lambda x: x * 1e-3 + 1e6,
    "heavy": lambda x: x.exp() ** 3,
    "units": lambda x: x * torch.tensor([1.0, 1e5]),
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", DATA)
def test_words_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, columns: tuple[str, str]
) -> None:
    figures = catch_figures(monkeypatch)
    x, samples = DATA[name](torch.randn(400, 2)), DATA[name](torch.randn(300, 2))
    given: dict[str, Any] = {"log_density": normal, "title": "a title " * 9}
    for log_scale, truth in ((False, None), (True, wave)):
        both = {"data": x, "samples": samples, "columns": columns, "true_log_density": truth, "resolution": 20}
        draw_flow_2d(tmp_path / "a.png", **both, log_scale=log_scale, options=PlotOptions(title=log_scale), **given)
        one = {"data": x[:, :1], "samples": samples[:, :1], "column": columns[1]}
        draw_flow_1d(tmp_path / "a.png", **one, log_scale=log_scale, **given)
    assert len(figures) == 4
    for figure in figures:
        check_layout(figure)


def test_known_true_density_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    x = torch.randn(500, 2)
    given: dict[str, Any] = {"data": x, "samples": x, "log_density": normal, "title": "", "resolution": 40}
    draw_flow_2d(tmp_path / "a.png", **given)
    draw_flow_2d(tmp_path / "a.png", **given, true_log_density=wave)
    three, four = ([axes for axes in figure.axes if axes.images] for figure in figures)
    assert (len(three), len(four)) == (3, 4)
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in four}) == 1
    # the last panel is exp(wave), on the scale of the colour bar
    (bar,) = [axes for axes in figures[1].axes if not axes.images]
    top = bar.get_ylim()[1]
    places = np.linspace(*four[3].get_xlim(), 81)[1::2], np.linspace(*four[3].get_ylim(), 81)[1::2]
    grid = torch.cartesian_prod(*map(torch.from_numpy, places)).reshape(40, 40, 2)
    expected = wave(grid.reshape(-1, 2)).exp().reshape(40, 40).T.numpy()
    shown = np.asarray(four[3].images[0].get_array()) * top
    np.testing.assert_allclose(shown, np.minimum(expected, top), rtol=1e-4, atol=1e-6)
    assert top == pytest.approx(points.peak(expected), rel=1e-4)


def test_all_panels_have_the_colour_scale_of_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The colour scale fits the data. A higher model density extends the scale by at most a factor BRIGHTEST."""
    figures = catch_figures(monkeypatch)
    x = torch.randn(2000, 2)
    given: dict[str, Any] = {"data": x, "samples": x, "title": ""}
    heights = (1e-6, 1e-3, 1e6)
    for height in heights:
        constant = torch.full((400,), math.log(height))
        draw_flow_2d(tmp_path / "a.png", log_density=lambda x, given=constant: given, resolution=20, **given)
    bars = [next(axes for axes in figure.axes if not axes.images).get_ylim()[1] for figure in figures]
    assert bars[1] == bars[0]
    assert bars[2] == pytest.approx(BRIGHTEST * bars[0])
    for figure, height, top in zip(figures, heights, bars, strict=True):
        shown = np.asarray(figure.axes[2].images[0].get_array())
        np.testing.assert_allclose(shown, min(height / top, 1.0), rtol=1e-5)


def test_true_density_of_one_column_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    x = torch.randn(500, 1)
    given: dict[str, Any] = {"data": x, "samples": x, "log_density": normal, "title": "", "column": "height"}
    draw_flow_1d(tmp_path / "a.png", **given)
    draw_flow_1d(tmp_path / "a.png", **given, true_log_density=wave)
    one, two = (figure.axes[0] for figure in figures)
    assert (len(one.lines), len(two.lines)) == (1, 2)
    shown = np.asarray(two.lines[1].get_xydata())
    np.testing.assert_allclose(shown[:, 1], wave(torch.from_numpy(shown[:, :1])).exp(), rtol=1e-4)
    assert "height" in one.get_xlabel()


def test_limits_of_few_rows_reach_over_the_samples() -> None:
    samples = np.linspace(-5.0, 5.0, 1000)
    low, high = points.common_range(np.array([0.0, 0.1, 0.2]), samples)
    assert low < -4.9
    assert high > 4.9
    low, high = points.common_range(np.linspace(0.0, 0.2, 100), samples)
    assert -0.1 < low < high < 0.3


@pytest.mark.parametrize("d", [1, 2])
def test_axes_of_typed_columns_stay_in_the_support_and_show_categories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, d: int
) -> None:
    figures = catch_figures(monkeypatch)
    types = (ColumnType("categorical").with_categories(("red", "green", "blue")), ColumnType.parse("interval(0,1)"))
    x = torch.rand(500, 2) * torch.tensor([3.0, 1.0])
    draw(tmp_path / "a.png", d, data=x[:, :d], samples=x[:, :d], types=types[:d])
    check_layout(figures[0])
    axes = figures[0].axes[0]
    assert axes.get_xlim() == (0, 3)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["red", "green", "blue"]
    assert d == 1 or axes.get_ylim() == (0, 1)
