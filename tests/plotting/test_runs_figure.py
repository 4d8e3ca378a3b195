"""The figure of several runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from flowtrain.plotting import runs_figure, style


def curve(values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"split": "val", "step": 10 * k, "seconds": k / 2, "nll": v, **more} for k, v in enumerate(values)]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    found: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, path: found.append(figure))
    return found


def test_curves_have_the_values_of_the_rows(figure: list[Figure]) -> None:
    # a resumed run repeats a step. The last value of the step is drawn
    rows = [*curve([5.0, 4.0, 3.0]), {"split": "val", "step": 20, "seconds": 1.5, "nll": 2.0}]
    rows += [{"split": "train", "step": 5, "nll": 9.0}, {"split": "val", "step": 40, "seconds": 3, "nll": None}]
    runs_figure.draw_runs(Path("x.png"), runs={"one": rows, "two": curve([4.5, 2.5])}, title="t")
    by_step, by_time = figure[0].axes
    lines = [line.get_xydata() for line in by_step.get_lines()]
    np.testing.assert_allclose(lines[0], [[0, 5], [10, 4], [20, 2]])
    np.testing.assert_allclose(lines[1], [[0, 4.5], [10, 2.5]])
    np.testing.assert_allclose(by_time.get_lines()[1].get_xydata(), [[0, 4.5], [0.5, 2.5]])
    assert [text.get_text() for text in by_step.get_legend().get_texts()] == ["one", "two"]
    assert "nats" in by_step.get_ylabel()
    looks = {(line.get_color(), line.get_linestyle()) for line in by_step.get_lines()}
    assert len(looks) == 2


def test_marks_of_step_0_are_whole(figure: list[Figure]) -> None:
    runs_figure.draw_runs(Path("a.png"), runs={"a": curve([3.0, 2.0])}, title="t")
    assert all(axes.get_xlim()[0] < 0 for axes in figure[0].axes)


def test_images_are_in_bits_per_dim_if_all_are(figure: list[Figure]) -> None:
    images = curve([900.0, 800.0], bits_per_dim=1.2)
    runs_figure.draw_runs(Path("x.png"), runs={"one": images}, title="t")
    runs_figure.draw_runs(Path("x.png"), runs={"one": images, "two": curve([3.0])}, title="t")
    assert "bits/dim" in figure[0].axes[0].get_ylabel()
    assert "nats" in figure[1].axes[0].get_ylabel()


def test_divergence_does_not_extend_the_axis(figure: list[Figure]) -> None:
    runs = {"one": curve([9e6, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5]), "two": curve([2.6, 2.55, 2.5])}
    runs_figure.draw_runs(Path("x.png"), runs=runs, title="t")
    low, high = figure[0].axes[0].get_ylim()
    assert low < 2.5
    assert 3.0 < high < 5


def test_many_runs_and_single_points_are_drawn(tmp_path: Path) -> None:
    runs = {f"a long name of a run $ {i} {'x' * 40}": curve([2.0 + i]) for i in range(runs_figure.MOST_RUNS)}
    runs_figure.draw_runs(tmp_path / "x.png", runs=runs, title="t")
    assert (tmp_path / "x.png").stat().st_size > 10_000
