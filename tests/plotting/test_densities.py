"""Every figure is a PNG of its size, whatever is wrong with the numbers in it."""

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
from torch import Tensor

from flowtrain.plotting import points
from flowtrain.plotting.densities import draw_flow, draw_flow_2d, draw_pairs
from flowtrain.utils.errors import FlowtrainError

PIXELS = {1: (1800, 720), 2: (1800, 736), 8: (1800, 1840)}


def normal(x: Tensor) -> Tensor:
    return -0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


def draw(path: Path, d: int = 2, **changed: Any) -> Path:
    given = {"data": torch.randn(500, d), "samples": torch.randn(300, d), "log_density": normal}
    draw_flow(path, **{**given, "columns": (), "title": "a title", **changed})
    return path


@pytest.mark.parametrize("d", PIXELS)
def test_draws_a_png_of_its_size_by_width_and_makes_the_folder(
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
def test_survives_any_samples(
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
def test_survives_any_data(
    tmp_path: Path, coarse: int, d: int, spoil: Callable[[Tensor], Tensor], png_size: Callable[..., tuple[int, int]]
) -> None:
    assert png_size(draw(tmp_path / "flow.png", d, data=spoil(torch.randn(300, d))))


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("value", [0.0, -math.inf, math.nan, 700.0, 1e4])
def test_survives_a_constant_density(
    tmp_path: Path, coarse: int, d: int, value: float, png_size: Callable[..., tuple[int, int]]
) -> None:
    assert png_size(draw(tmp_path / "flow.png", d, log_density=lambda x: torch.full((len(x),), value)))


def test_density_is_evaluated_once_in_float32_and_laid_out_along_x_and_y(tmp_path: Path) -> None:
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
def test_wide_data_do_not_need_the_density(tmp_path: Path) -> None:
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
    assert heights.shape == (80, 80)
    assert heights.sum() * (2 / 80) * (4 / 80) == pytest.approx(1, abs=1e-3)
    # x varies along the first index: the square fills half of x and a quarter of y
    assert heights[40].sum() * 4 / 80 == pytest.approx(1, abs=0.1)
    assert points.peak(heights) == pytest.approx(1, abs=0.3)
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
def test_refuses_what_cannot_be_drawn(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(FlowtrainError, match=words):
        draw(tmp_path / "flow.png", **changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("coarse")
def test_a_failing_density_leaves_the_old_picture(tmp_path: Path) -> None:
    def log_density(x: Tensor) -> Tensor:
        raise RuntimeError("no density")

    path = tmp_path / "flow.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no density"):
        draw(path, log_density=log_density)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["flow.png"]


@pytest.mark.usefixtures("coarse")
def test_a_failing_write_leaves_no_part_behind(tmp_path: Path) -> None:
    (tmp_path / "flow.png").mkdir()
    with pytest.raises(IsADirectoryError):
        draw(tmp_path / "flow.png")
    assert [each.name for each in tmp_path.iterdir()] == ["flow.png"]


def test_pairs_take_any_names_and_count(tmp_path: Path, coarse: int, png_size: Callable[..., tuple[int, int]]) -> None:
    x = torch.randn(300, 6)
    for most, columns in ((1, ()), (2, ("$a", "b$\\x$")), (6, ("a very long name of a column " * 3, "_b"))):
        path = tmp_path / "pairs.png"
        draw_pairs(path, data=x, samples=x + 1, columns=columns, title="$\\no{ $ tex" * 20, most=most)
        assert png_size(path) == (1800 // coarse, 1840 // coarse)


@pytest.mark.usefixtures("coarse")
def test_threads_draw_alike_and_the_global_style_stays(tmp_path: Path) -> None:
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
def test_a_users_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    data, samples = torch.randn(200, 2), torch.randn(200, 2)
    plain = draw(tmp_path / "plain.png", data=data, samples=samples)
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 30, "text.usetex": True}):
        other = draw(tmp_path / "other.png", data=data, samples=samples)
    assert plain.read_bytes() == other.read_bytes()
