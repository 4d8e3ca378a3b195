"""Figures of a flow on a target: the choice of points, limits and normalization, and the files of a run."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layout import catch_figures, check_layout
from torch import Tensor
from torch.distributions import Normal

from flowtrain.bijections.linear import Affine
from flowtrain.data.targets.base import FunctionTarget, TargetData
from flowtrain.evaluation.log_weights import WeightedSamples, weighted_samples
from flowtrain.evaluation.targets import evaluate_target
from flowtrain.flow import Flow
from flowtrain.plotting import pictures, target_figures, target_pictures, transport_figures, transport_pictures
from flowtrain.plotting.options import PlotOptions


class Gaussian(FunctionTarget):
    """N(mean, 1) in d columns, times exp(log_z)."""

    def __init__(self, dim: int, mean: float = 1.0, log_z: float = 2.0, exact: bool = True, known: bool = True) -> None:
        super().__init__(lambda x: Normal(mean, 1.0).log_prob(x).sum(1) + log_z, dim, log_z=log_z if known else None)
        self.mean, self.exact = mean, exact

    def sample(self, n: int, generator: torch.Generator) -> Tensor | None:
        found = self.mean + torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return found if self.exact else None


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the arguments of the last figure of a target."""
    found: dict[str, Any] = {}
    for name in ("draw_target_1d", "draw_target_2d", "draw_corner"):
        monkeypatch.setattr(target_pictures, name, lambda path, name=name, **rest: found.update(rest, figure=name))
    monkeypatch.setattr(target_pictures, "SAMPLES", 4000)
    return found


def flow_of(dim: int) -> Flow:
    return Flow((dim,), Affine(dim))


@pytest.mark.parametrize(("dim", "figure"), [(1, "draw_target_1d"), (2, "draw_target_2d"), (3, "draw_corner")])
def test_data_of_a_target_are_drawn_as_a_target(given: dict[str, Any], dim: int, figure: str) -> None:
    data = TargetData(Gaussian(dim), n_val=10, n_test=10)
    pictures.draw(flow_of(dim), data, Path("a.png"), "t", samples=torch.zeros(5, dim))
    assert given["figure"] == figure
    torch.testing.assert_close(given["samples"], torch.zeros(5, dim))


@pytest.mark.parametrize("known", [True, False])
def test_the_density_of_the_target_is_normalized(given: dict[str, Any], known: bool) -> None:
    flow, target = flow_of(1), Gaussian(1, known=known)
    target_pictures.draw(flow, target, Path("a.png"), "t", log_z=2.0)
    x = torch.linspace(-9, 9, 2001)[:, None]
    for name in ("target_log_density", "log_density"):
        assert float(given[name](x).detach().exp().sum() * 18 / 2000) == pytest.approx(1, abs=1e-4)
    target_pictures.draw(flow, target, Path("a.png"), "t")
    mass = float(given["target_log_density"](x).exp().sum() * 18 / 2000)
    assert mass == pytest.approx(1, abs=1e-4 if known else 0.15)


@pytest.mark.parametrize("exact", [True, False])
def test_points_of_the_target_have_its_distribution(exact: bool) -> None:
    target = Gaussian(2, exact=exact)
    drawn = weighted_samples(flow_of(2), target, 20_000, 0)
    found = target_pictures.reference_of(target, drawn)
    assert found.x.mean(0).tolist() == pytest.approx([1, 1], abs=0.1)
    assert found.name == (target_pictures.EXACT if exact else target_pictures.RESAMPLED)


def test_all_samples_are_shown_if_all_weights_are_zero() -> None:
    x = torch.randn(50, 2)
    none = WeightedSamples(x, torch.zeros(50), torch.full((50,), -math.inf))
    assert len(target_pictures.reference_of(Gaussian(2, exact=False), none).x) == 50


def test_resampled_points_and_samples_are_disjoint(given: dict[str, Any]) -> None:
    target_pictures.draw(flow_of(3), Gaussian(3, exact=False), Path("a.png"), "t")
    shown = {tuple(row) for row in given["samples"].tolist()}
    assert len(shown) == 2000
    assert not shown & {tuple(row) for row in given["data"].tolist()}
    assert given["names"][0] == target_pictures.RESAMPLED


def test_axes_cover_the_modes_and_the_samples_of_the_flow(given: dict[str, Any]) -> None:
    target = Gaussian(2, mean=9.0)
    target.modes = torch.tensor([[-30.0, 2.0], [5.0, 40.0]])
    target_pictures.draw(flow_of(2), target, Path("a.png"), "t")
    low, high = given["cover"].amin(0), given["cover"].amax(0)
    assert low[0] == -30
    assert high[1] == 40
    assert low[1] < -2
    assert high[0] > 11


@pytest.mark.parametrize("chosen", [None, ("x3", "x1")])
def test_corner_plot_contains_both_in_the_chosen_columns(monkeypatch: pytest.MonkeyPatch, chosen: Any) -> None:
    figures = catch_figures(monkeypatch)
    monkeypatch.setattr(target_pictures, "SAMPLES", 4000)
    options = PlotOptions(columns=chosen)
    target_pictures.draw(flow_of(3), Gaussian(3, mean=8.0), Path("a.png"), "t", options=options)
    (figure,) = figures
    check_layout(figure)
    width = 3 if chosen is None else 2
    assert len(figure.axes) == width * (width + 1) // 2
    for axes in figure.axes:
        assert axes.get_xlim()[0] < -2
        assert axes.get_xlim()[1] > 10
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [target_pictures.EXACT, "samples"]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.filterwarnings("error")
def test_all_figures_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, dim: int
) -> None:
    figures = catch_figures(monkeypatch)
    monkeypatch.setattr(target_figures, "RESOLUTION_2D", 20)
    monkeypatch.setattr(transport_figures, "RESOLUTION", 12)
    for name, few in (("PANEL_MOMENTS", 2), ("PATH_MOMENTS", 4), ("PARTICLES", 9)):
        monkeypatch.setattr(transport_pictures, name, few)
    target, flow = Gaussian(dim), flow_of(dim)
    target.modes = torch.tensor([[1.0] * dim, [9.0] * dim])
    result = evaluate_target(flow, target, 2000)
    rows: list[dict[str, Any]] = [{"split": "train", "step": i, "nll": 3.0 - i} for i in range(5)]
    with caplog.at_level(logging.WARNING, logger="flowtrain"):
        found = target_pictures.draw_target_figures(
            flow, target, result, rows, "a title", lambda name: tmp_path / f"{name}.png"
        )
    assert not [r.message for r in caplog.records if "no picture" in r.message]
    names = ["curves", "target", "weights", "modes", *(["transport", "paths"] if dim == 2 else [])]
    assert [path.stem for path in found] == names
    assert len(figures) == len(names)
    for figure in figures:
        check_layout(figure)
    curves = figures[0].axes[0]
    assert curves.get_ylabel() == "negative ELBO (nats)"
    # -log Z is marked
    assert any(np.allclose(line.get_ydata(), -2.0) for line in curves.get_lines())
    assert [bar.get_height() for bar in figures[3].axes[0].containers[1]] == pytest.approx([1, 0], abs=0.02)


def test_an_animation_has_the_limits_of_the_target() -> None:
    data = target_pictures.as_data(flow_of(2), Gaussian(2, mean=5.0))
    assert data.test.mean(0).tolist() == pytest.approx([5, 5], abs=0.1)
