"""Figures and animations of the transport from base to data: any values are drawn, and texts do not overlap."""

import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import Gif, gif_of
from helpers.flows import vectors
from helpers.layout import catch_figures, check_layout
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flowtrain.plotting import animation, style, transport_figures, transport_pictures
from flowtrain.plotting.animation import animate_flow_2d, animate_images
from flowtrain.plotting.options import PlotOptions
from flowtrain.plotting.transport_figures import draw_paths, draw_transport
from flowtrain.plotting.transport_pictures import draw_transport_pictures
from flowtrain.utils.errors import FlowtrainError

K = 3
NAMES = ["t = 0", "t = 0.5", "t = 1 $\\no{ tex"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "DPI", 40)
    monkeypatch.setitem(style._RC, "figure.dpi", 40)
    monkeypatch.setattr(animation, "BEFORE", 2)
    monkeypatch.setattr(animation, "AFTER", 2)


def log_density(x: Tensor) -> Tensor:
    """Returns the log densities of three normal distributions, each narrower than the one before."""
    return torch.stack([-0.5 * (x / s).square().sum(1) - 2 * np.log(s) for s in (1.0, 0.7, 0.5)])


def still(path: Path, **changed: Any) -> Path:
    given: dict[str, Any] = {
        "data": torch.randn(300, 2),
        "names": NAMES,
        "log_density": log_density,
        "velocity": lambda x: torch.stack([-x, -x, 0 * x]),
        "forward": lambda z: torch.stack([z, 0.7 * z, 0.5 * z]),
        "title": "a title +- $\\no{ tex",
    }
    draw_transport(path, **{**given, **changed})
    return path


def shown(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_transport_figure_has_a_row_per_quantity(tmp_path: Path) -> None:
    three = shown(still(tmp_path / "three.png"))
    two = shown(still(tmp_path / "two.png", velocity=None))
    assert three.shape[1] == two.shape[1] == 360
    # a row of three small panels, and a row of three large ones
    assert three.shape[0] > 1.3 * two.shape[0]
    # there are the dark blue of a density, and the blue and red of the two families of lines
    colours = {tuple(c) for c in three.reshape(-1, 3).tolist()}
    assert any(r < 90 and g < 60 and b > 70 for r, g, b in colours)
    assert any(b > r + 60 for r, g, b in colours)
    assert any(r > b + 60 for r, g, b in colours)


@pytest.mark.parametrize(
    "changed",
    [
        {"log_density": lambda x: torch.full((K, len(x)), torch.nan)},
        {"log_density": lambda x: torch.full((K, len(x)), -torch.inf)},
        {"velocity": lambda x: torch.full((K, len(x), 2), torch.nan)},
        {"velocity": lambda x: torch.zeros(K, len(x), 2)},
        {"velocity": lambda x: 1e30 * torch.stack([x] * K)},
        {"forward": lambda z: torch.full((K, len(z), 2), torch.nan)},
        {"forward": lambda z: 1e20 * torch.stack([z] * K)},
        {"data": torch.zeros(5, 2)},
        {"data": 1e-20 * torch.randn(50, 2)},
        {"data": torch.tensor([[0.0, 1e8], [1.0, 2e8]]).repeat(10, 1)},
    ],
)
def test_transport_figure_is_drawn_for_any_numbers(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert shown(still(tmp_path / "p.png", **changed)).shape[1] == 360


COLUMNS = [("x1", "x2"), ("longitude of the place (degrees east)", "a name of a column that never ends " * 5)]
LIMITS = [torch.randn(300, 2), 1e6 + torch.randn(300, 2), torch.randn(300, 2) * torch.tensor([1e-5, 1e4])]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("data", LIMITS, ids=["normal", "offset", "units"])
def test_words_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: tuple[str, str], data: Tensor
) -> None:
    figures = catch_figures(monkeypatch)
    for k, names in (
        (2, ["base", "after the layer"]),
        (5, ["base", *(f"after {i} of 64 couplings" for i in range(4))]),
    ):
        given: dict[str, Any] = {"data": data, "names": names, "columns": columns}
        for velocity in (None, lambda x, k=k: torch.stack([x] * k)):
            still(
                tmp_path / "p.png",
                **given,
                log_density=lambda x, k=k: torch.stack([x.sum(1)] * k),
                forward=lambda z, k=k: torch.stack([z] * k),
                velocity=velocity,
                options=PlotOptions(title=velocity is None),
            )
    states = torch.stack([data[:20]] * 5)
    for at, axis in (([0, 0.25, 0.5, 0.75, 1], "time t"), ([0, 1, 2, 3, 4], "couplings applied")):
        paths = {"states": states, "log_densities": torch.randn(5, 20), "at": at, "axis": axis, "title": "t"}
        draw_paths(tmp_path / "p.png", data=data, columns=columns, **paths)
    assert len(figures) == 6
    for figure in figures:
        check_layout(figure)


def test_panels_of_the_grid_are_larger_and_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    names = [f"t = {i}" for i in range(5)]
    stacked = {"log_density": lambda x: torch.stack([x.sum(1)] * 5), "forward": lambda z: torch.stack([z] * 5)}
    still(tmp_path / "p.png", names=names, velocity=lambda x: torch.stack([x] * 5), **stacked)
    panels = figures[0].axes
    sides = [axes.get_window_extent().width for axes in panels]
    assert len(panels) == 5 + 5 + 3
    assert min(sides[10:]) > 1.5 * max(sides[:10])
    assert [axes.get_title() for axes in panels] == [*names, *[""] * 5, "t = 0", "t = 2", "t = 4"]
    assert panels[0].get_ylabel() == "x2"
    assert panels[10].get_xlabel() == "x1"


def test_paths_have_a_colour_bar_in_nats_and_colours_for_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = catch_figures(monkeypatch)
    states, log_p = torch.randn(5, 20, 2).cumsum(0), torch.linspace(-9, -2, 100).reshape(5, 20)
    given: dict[str, Any] = {"at": [0, 0.25, 0.5, 0.75, 1], "axis": "time t", "title": "t"}
    draw_paths(tmp_path / "p.png", data=torch.randn(100, 2), states=states, log_densities=log_p, **given)
    plane, bar, course = figures[0].axes
    assert "nats" in bar.get_ylabel()
    lines = plane.collections[0]
    assert isinstance(lines, LineCollection)
    assert lines.get_clim() == pytest.approx(bar.get_ylim())
    assert bar.get_ylim()[1] == pytest.approx(-2, abs=0.3)
    data, base, samples = plane.lines[:3]
    assert len({str(line.get_color()) for line in (data, base, samples)}) == 3
    np.testing.assert_allclose(np.asarray(base.get_xydata()), states[0])
    np.testing.assert_allclose(np.asarray(samples.get_xydata()), states[-1])
    assert "time t" in course.get_xlabel()


@pytest.mark.parametrize("steps", [3, 40])
def test_couplings_are_counted_in_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    found: list[Figure] = []
    monkeypatch.setattr(transport_figures.style, "save", lambda figure, path, options: found.append(figure))
    given = {"data": torch.randn(50, 2), "states": torch.randn(steps + 1, 5, 2), "title": "t"}
    densities = torch.randn(steps + 1, 5)
    at = [*range(steps + 1)]
    transport_figures.draw_paths(tmp_path / "a.png", **given, log_densities=densities, at=at, axis="couplings")
    labels = [label.get_text() for label in found[0].axes[-1].get_xticklabels()]
    assert 2 < len(labels) < 11
    assert all(label.isdigit() for label in labels)


@pytest.mark.parametrize(("name", "paths"), [("realnvp", 15), ("ffjord", 110)])
def test_flow_of_couplings_has_few_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, paths: int
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(transport_pictures, "draw_paths", lambda path, **given: drawn.update(given))
    monkeypatch.setattr(transport_pictures, "draw_transport", lambda path, **given: None)
    data = SimpleNamespace(test=torch.randn(50, 2), test_labels=None, columns=("a", "b"))
    flow = vectors(name, solver=["solver.rtol=1e-3"])
    draw_transport_pictures(flow, data, lambda name: tmp_path / name, "t")  # type: ignore[arg-type]
    assert drawn["states"].shape[1] == paths
    assert drawn["columns"] == ("a", "b")


def test_transport_figure_needs_two_columns(tmp_path: Path) -> None:
    with pytest.raises(FlowtrainError, match="for 2 columns"):
        still(tmp_path / "p.png", data=torch.randn(50, 3))
    with pytest.raises(FlowtrainError, match="returned shape"):
        still(tmp_path / "p.png", log_density=lambda x: x.sum(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["none", "some", "all", "one moment"])
def test_non_finite_paths_are_left_out(tmp_path: Path, lost: str) -> None:
    states, log_p = torch.randn(5, 20, 2).cumsum(0), torch.randn(5, 20)
    if lost in ("some", "all"):
        states[2, slice(3) if lost == "some" else slice(None)] = torch.nan
    if lost == "one moment":
        log_p[4, 7] = -torch.inf
    given: dict[str, Any] = {"data": torch.randn(100, 2), "states": states, "log_densities": log_p}
    given |= {"at": [0, 0.25, 0.5, 0.75, 1], "axis": "time", "title": "t"}
    if lost == "all":
        with pytest.raises(FlowtrainError, match="none of the 20 paths is finite"):
            draw_paths(tmp_path / "p.png", **given)
        return
    draw_paths(tmp_path / "p.png", **given)
    assert shown(tmp_path / "p.png").shape[1] == 360


def written(path: Path, **changed: Any) -> None:
    given = {"data": torch.randn(300, 2), "names": NAMES, "log_density": log_density, "states": torch.randn(K, 40, 2)}
    animate_flow_2d([path], **{**given, "title": "t", **changed})


def move(path: Path, **changed: Any) -> Gif:
    written(path, **changed)
    return gif_of(path)


def test_gif_has_a_frame_per_time_and_pauses_at_the_ends(tmp_path: Path) -> None:
    gif = move(tmp_path / "new" / "a.gif")
    assert (gif.n_frames, gif.width) == (K, 180)
    # equal frames are merged into one frame with a longer duration
    assert gif.durations == [100, 50, 100]
    assert gif.loops == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.gif"]


@pytest.mark.parametrize(
    "changed",
    [
        {"log_density": lambda x: torch.full((K, len(x)), torch.nan)},
        {"states": torch.full((K, 5, 2), torch.nan)},
        {"data": torch.zeros(5, 2)},
    ],
)
def test_gif_is_made_for_any_numbers(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert move(tmp_path / "a.gif", **changed).width == 180


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (1, 5, 9), (2, 300, 200), (1, 1, 1)])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_images_form_in_a_grid(tmp_path: Path, shape: tuple[int, ...], n: int) -> None:
    if n == 60 and shape[1] > 100:
        n = 8
    frames = torch.rand(K, n, *shape)
    frames[1, 0] = torch.nan
    animate_images([tmp_path / "a.gif"], names=NAMES, frames=frames, levels=1, title="t")
    gif = gif_of(tmp_path / "a.gif")
    assert (gif.n_frames, gif.width) == (K, 180)


def test_failed_drawing_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_text("before")
    with pytest.raises(FlowtrainError, match="returned shape"):
        move(path, log_density=lambda x: x.sum(1))
    assert path.read_text() == "before"
    with pytest.raises(FlowtrainError, match="a \\.gif or \\.mp4"):
        move(tmp_path / "a.avi")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_mp4_needs_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not animation.can_write_mp4()
    with pytest.raises(FlowtrainError, match=r"ffmpeg .* give a \.gif"):
        move(tmp_path / "a.mp4")
    stub = tmp_path / "ffmpeg"
    # the last argument of ffmpeg is the output file
    stub.write_text(f'#!{shutil.which("bash", path="/bin:/usr/bin")}\nfor last; do :; done; /bin/cat > "$last"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    assert animation.can_write_mp4()
    path = tmp_path / "b.mp4"
    animate_flow_2d(
        [path], data=torch.randn(50, 2), names=NAMES, log_density=log_density, states=torch.randn(K, 4, 2), title="t"
    )
    frames = animation.BEFORE + K - 2 + animation.AFTER
    assert path.stat().st_size % frames == 0
    assert path.stat().st_size >= frames * 180 * 4


def test_arrows_are_scaled_by_the_sample_density(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[np.ndarray] = []
    arrows = transport_figures._arrows

    def seen(panels: Any, at: np.ndarray, v: np.ndarray, inhabited: np.ndarray) -> None:
        drawn.append(inhabited)
        arrows(panels, at, v, inhabited)

    monkeypatch.setattr(transport_figures, "_arrows", seen)
    still(tmp_path / "p.png")
    counts = drawn[0].sum(1)
    # a narrower density has samples in fewer cells, and so fewer arrows
    assert counts[0] > counts[1] > counts[2] > 0
