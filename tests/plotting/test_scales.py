"""Axes of pictures over heavy-tailed data: they show the shape, and densities along them integrate to one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor

from flowtrain.plotting import points
from flowtrain.plotting.densities import draw_flow_1d

RNG = np.random.default_rng(0)
LOGNORMAL = np.exp(2 * RNG.normal(size=3000))
SHAPES = {
    "normal": (RNG.normal(size=3000), True),
    "uniform": (RNG.uniform(5, 6, 3000), True),
    "exponential": (RNG.exponential(size=3000), True),
    "two modes": (RNG.normal(size=3000) * 0.1 + 10 * RNG.integers(0, 2, 3000), True),
    "lognormal": (LOGNORMAL, False),
    "mirrored": (7 - 1e4 * LOGNORMAL, False),
    "cauchy": (RNG.standard_cauchy(3000), False),
    "constant but for one": (np.r_[np.zeros(2999), 5.0], True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_heavy_tails_alone_are_compressed(name: str) -> None:
    values, plain = SHAPES[name]
    scale = points.suited(values)
    assert scale.plain is plain
    places = scale.places(values)
    np.testing.assert_allclose(scale.values(torch.from_numpy(places)), values, rtol=1e-9, atol=1e-9)
    assert (np.argsort(places) == np.argsort(values)).all()


@pytest.mark.parametrize("name", ["lognormal", "mirrored", "cauchy"])
def test_no_bin_holds_most_rows(name: str) -> None:
    values = points.suited(SHAPES[name][0]).places(SHAPES[name][0])
    limits = points.robust_range(values)
    shares = np.histogram(values, points.fine_bins(values, limits, 3000), limits)[0] / 3000
    assert shares.max() < 0.2
    assert (shares > 0.01).sum() > 8


def test_a_long_plain_axis_has_finer_bins() -> None:
    values = np.r_[RNG.normal(size=3000), RNG.uniform(-12, 12, 40)]
    limits = points.robust_range(values)
    assert points.fine_bins(values, (-12, 12), 300) > points.bins_1d(300)
    assert points.bins_1d(3000) <= points.fine_bins(values, limits, 3000) <= 100


def test_density_along_the_axis_integrates_to_one() -> None:
    scale = points.suited(LOGNORMAL)
    exact = torch.distributions.LogNormal(0.0, 2.0)

    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x > 0, exact.log_prob(x.clamp_min(1e-30)), -torch.inf).sum(1)

    y = torch.linspace(-1, 15, 20_001).double()
    density = points.density_along([scale], log_prob)(y[:, None]).exp()
    assert float(torch.trapezoid(density, y)) == pytest.approx(1, abs=0.01)
    both = points.density_along([scale, points.Scale()], lambda x: log_prob(x[:, :1]) - x[:, 1].square())
    torch.testing.assert_close(both(torch.stack([y, torch.zeros_like(y)], 1)).exp(), density)


def test_ticks_tell_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Axes] = []
    monkeypatch.setattr("flowtrain.plotting.style.save", lambda figure, path: seen.extend(figure.axes))
    data = torch.from_numpy(LOGNORMAL)[:, None]
    draw_flow_1d(tmp_path / "a.png", data=data, samples=-data, log_density=lambda x: -x[:, 0].square(), title="t")
    (axes,) = seen
    words = [label.get_text() for label in axes.get_xticklabels()]
    scale = points.suited(LOGNORMAL)
    assert {"0", "1", "100"} <= set(words)
    np.testing.assert_allclose(axes.get_xticks(), scale.places(np.array([float(w) for w in words])), atol=1e-9)
    # samples on the other side of zero are counted
    assert "outside" in axes.get_legend_handles_labels()[1][1]
