"""Scales and ticks of axes: heavy tails are compressed. Tick labels are round, have one format and do not overlap."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layout import catch_figures
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from flowtrain.plotting import points, scales, style
from flowtrain.plotting.densities import draw_flow_1d

RNG = np.random.default_rng(0)
LOGNORMAL = np.exp(2 * RNG.normal(size=3000))
SHAPES = {
    "normal": (RNG.normal(size=3000), True),
    "uniform": (RNG.uniform(5, 6, 3000), True),
    "exponential": (RNG.exponential(size=3000), True),
    "two modes": (RNG.normal(size=3000) * 0.1 + 10 * RNG.integers(0, 2, 3000), True),
    "a rare mode": (RNG.normal(size=3000) * 0.1 + 10 * (RNG.random(3000) < 0.85), True),
    "lognormal": (LOGNORMAL, False),
    "mirrored": (7 - 1e4 * LOGNORMAL, False),
    "cauchy": (RNG.standard_cauchy(3000), False),
    "constant but for one": (np.r_[np.zeros(2999), 5.0], True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_only_heavy_tails_are_compressed(name: str) -> None:
    values, plain = SHAPES[name]
    scale = scales.choose_scale(values)
    assert scale.plain is plain
    places = scale.places(values)
    np.testing.assert_allclose(scale.values(torch.from_numpy(places)), values, rtol=1e-9, atol=1e-9)
    assert (np.argsort(places) == np.argsort(values)).all()


@pytest.mark.parametrize("name", ["lognormal", "mirrored", "cauchy"])
def test_no_bin_contains_most_rows(name: str) -> None:
    values = scales.choose_scale(SHAPES[name][0]).places(SHAPES[name][0])
    limits = points.robust_range(values)
    shares = np.histogram(values, points.count_bins(values, limits, 3000), limits)[0] / 3000
    assert shares.max() < 0.2
    assert (shares > 0.01).sum() > 8


def test_density_along_the_axis_integrates_to_one() -> None:
    scale = scales.choose_scale(LOGNORMAL)
    exact = torch.distributions.LogNormal(0.0, 2.0)

    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x > 0, exact.log_prob(x.clamp_min(1e-30)), -torch.inf).sum(1)

    y = torch.linspace(-1, 15, 20_001).double()
    density = scales.density_on_axes([scale], log_prob)(y[:, None]).exp()
    assert float(torch.trapezoid(density, y)) == pytest.approx(1, abs=0.01)
    both = scales.density_on_axes([scale, scales.LINEAR], lambda x: log_prob(x[:, :1]) - x[:, 1].square())
    torch.testing.assert_close(both(torch.stack([y, torch.zeros_like(y)], 1)).exp(), density)


def number(label: str) -> float:
    """Returns the value of a tick label."""
    plain = label.replace(scales.MINUS, "-")
    mantissa, power, exponent = plain.partition("10") if any(c in plain for c in "⁰¹²³⁴⁵⁶⁷⁸⁹") else (plain, "", "")
    if not power:
        return float(plain)
    digits = exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    front = mantissa.rstrip("·")
    return (float(f"{front}1") if front in ("", "-") else float(front)) * 10.0 ** int(digits)


def test_ticks_of_a_compressed_axis_show_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    data = torch.from_numpy(LOGNORMAL)[:, None]
    draw_flow_1d(tmp_path / "a.png", data=data, samples=-data, log_density=lambda x: -x[:, 0].square(), title="t")
    axes = figures[0].axes[0]
    words = [label.get_text() for label in axes.get_xticklabels()]
    scale = scales.choose_scale(LOGNORMAL)
    assert {"0", "1", "100"} <= set(words)
    np.testing.assert_allclose(axes.get_xticks(), scale.places(np.array([number(w) for w in words])), atol=1e-9)
    # samples on the other side of zero are counted
    assert "outside" in axes.get_legend_handles_labels()[1][1]


LIMITS = [(-3.2, 4.1), (0, 1), (1.1959, 1.2041), (-2e7, 3.1e7), (1e-9, 4e-9), (1e8, 1e8 + 0.004), (-1e-30, 0), (7, 1e5)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("inches", [1.5, 8.0])
def test_tick_labels_are_few_and_apart_in_one_format(limits: tuple[float, float], inches: float) -> None:
    with style.styled():
        figure = Figure(figsize=(9, 9), dpi=style.DPI)
        FigureCanvasAgg(figure)
        axes = style.add_axes(figure, 0.5, 0.5, inches, inches)
        axes.set(xlim=limits, ylim=limits)
        note = scales.set_ticks(axes.xaxis, most=5, gap=0.1)
        scales.set_ticks(axes.yaxis, most=5, gap=0.1)
        figure.canvas.draw()
        labels = [each for each in axes.get_xticklabels() if each.get_text()]
        boxes = [each.get_window_extent() for each in labels]
        edges = axes.get_window_extent()
    assert 1 <= len(labels) <= 5
    assert all(a.x1 + 2 < b.x0 for a, b in pairwise(boxes))
    # the labels do not reach the next panel at a distance of a tenth of an inch
    assert edges.x0 - 0.055 * style.DPI < boxes[0].x0
    assert boxes[-1].x1 < edges.x1 + 0.055 * style.DPI
    assert len({len(each.get_text().partition(".")[2]) for each in labels}) == 1
    values, ticks = [number(each.get_text()) for each in labels], np.asarray(axes.get_xticks())
    if len(values) > 1:
        # the values of the labels are linear in the ticks. The note gives the power of ten and the offset
        slope = (values[-1] - values[0]) / (ticks[-1] - ticks[0])
        np.testing.assert_allclose(np.diff(values), slope * np.diff(ticks), rtol=1e-4)
        assert (np.allclose(values, ticks, rtol=1e-9, atol=0)) == (note == "")


def test_large_numbers_have_a_power_of_ten_or_an_offset() -> None:
    labels, note = scales.numbers(np.array([0.0, 2e6, 4e6]))
    assert labels == ["0", "2", "4"]
    assert note.endswith("10⁶")
    labels, note = scales.numbers(np.array([1e8, 1e8 + 0.002]))
    assert labels == ["0", "2"]
    assert "100,000,000" in note
    assert note.endswith("10⁻³")
    assert scales.numbers(np.array([-0.5, 0.0, 0.5])) == ([f"{scales.MINUS}0.5", "0.0", "0.5"], "")
