"""Pictures of the way from base to data, still and moving: whole files, whatever is wrong with the numbers in them."""

import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import Gif, gif_of
from PIL import Image
from torch import Tensor

from flowtrain.plotting import animation, style, transport_figures
from flowtrain.plotting.animation import animate_flow_2d, animate_images
from flowtrain.plotting.transport_figures import draw_paths, draw_transport
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
    """Normals that get narrower."""
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
    assert three.shape[0] > 1.3 * two.shape[0]
    # colours of a density, and of both families of lines
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


def test_transport_figure_needs_two_columns(tmp_path: Path) -> None:
    with pytest.raises(FlowtrainError, match="for 2 columns"):
        still(tmp_path / "p.png", data=torch.randn(50, 3))
    with pytest.raises(FlowtrainError, match="returned shape"):
        still(tmp_path / "p.png", log_density=lambda x: x.sum(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["none", "some", "all", "one moment"])
def test_paths_are_drawn_and_lost_ones_left_out(tmp_path: Path, lost: str) -> None:
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
    # equal frames are one that is shown for longer
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
    with pytest.raises(FlowtrainError, match=r"no ffmpeg here .* give a \.gif"):
        move(tmp_path / "a.mp4")
    stub = tmp_path / "ffmpeg"
    # what it is given last is where it writes
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
    # the narrower the density, the fewer places it has samples at
    assert counts[0] > counts[1] > counts[2] > 0
