"""The figures of an evaluation show what they should, whatever the model and however few the points."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats
from torch import Tensor

from flowtrain.plotting import evaluation_figures, points, style
from flowtrain.plotting.evaluation_figures import draw_calibration, draw_ood
from flowtrain.utils.errors import FlowtrainError


def uniform(n: int, latents: int) -> dict[str, Tensor]:
    draws = torch.rand(latents + 1, n, generator=torch.Generator().manual_seed(n))
    return dict(zip([*(f"z{j + 1}" for j in range(latents)), "radius"], draws, strict=True))


def normal(count: int, mean: float, deviation: float) -> Tensor:
    """The quantiles of a normal distribution at `count` places, which make a smooth histogram."""
    return mean + deviation * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def separate(path: Path, known: Tensor, other: Tensor, **changed: Any) -> Path:
    given = {"names": ("digits", "letters"), "entropy": -float(known.detach().double().mean()), "auroc": 0.87}
    given |= {"typicality_auroc": 0.99, "unit": "nats", "title": "a title"}
    draw_ood(path, log_p=(known, other), **{**given, **changed})
    return path


def colours(path: Path) -> tuple[float, float]:
    """The shares of a picture that are bluish and reddish."""
    red, _, blue = np.moveaxis(imread(path)[..., :3], -1, 0)
    return float((blue > red + 0.15).mean()), float((red > blue + 0.15).mean())


def test_figures_are_pngs_of_their_size_in_a_new_folder(
    tmp_path: Path, png_size: Callable[..., tuple[int, int]]
) -> None:
    folder = tmp_path / "new" / "plots"
    draw_calibration(folder / "calibration.png", pit=uniform(500, 2), title="a title")
    separate(folder / "ood.png", normal(500, -100, 10), normal(400, -120, 20))
    assert png_size(folder / "calibration.png") == (1800, 710)
    assert png_size(folder / "ood.png") == (1800, 732)
    assert sorted(each.name for each in folder.iterdir()) == ["calibration.png", "ood.png"]
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "pit",
    [
        uniform(1, 2),
        uniform(20, 2),
        uniform(500, 8),
        {"z1": torch.rand(300)},
        {"radius": torch.rand(300).bfloat16().requires_grad_()},
        {"z1": (torch.rand(300) > 0.5).double(), "radius": torch.ones(300)},
        {"z1": torch.zeros(300), "radius": torch.full((300,), 1 + 1e-9, dtype=torch.float64)},
        {"$z_{": torch.rand(300), "a long name " * 9: torch.rand(300)},
    ],
    ids=["one", "twenty", "nine_lines", "one_latent", "radius_alone", "edges", "rounding", "names"],
)
def test_calibration_of_any_model(
    tmp_path: Path, coarse: int, pit: dict[str, Tensor], png_size: Callable[..., tuple[int, int]]
) -> None:
    draw_calibration(tmp_path / "calibration.png", pit=pit, title="$\\no{ tex")
    assert png_size(tmp_path / "calibration.png") == (1800 // coarse, 710 // coarse)


@pytest.mark.parametrize(
    ("pit", "words"),
    [
        ({}, r"not of \[\]"),
        ({"z1": torch.rand(5), "radius": torch.rand(6)}, r"not of \[5, 6\]"),
        ({"z1": torch.rand(5, 2)}, "'z1'"),
        ({"z1": torch.rand(0)}, "'z1'"),
        ({"z1": torch.tensor([0.5, math.nan])}, "'z1'"),
        ({"z1": torch.tensor([0.5, 1.1])}, "'z1'"),
    ],
)
def test_calibration_refuses_values_outside_0_to_1(tmp_path: Path, pit: dict[str, Tensor], words: str) -> None:
    with pytest.raises(FlowtrainError, match=words):
        draw_calibration(tmp_path / "calibration.png", pit=pit, title="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("n", "bins"), [(1, 5), (20, 5), (1000, 20), (100_000, 20)])
def test_the_band_of_a_bin_is_binomial(n: int, bins: int) -> None:
    expected = stats.binom.ppf([0.025, 0.975], n, 1 / bins) * bins / n
    assert evaluation_figures.bin_band(n, bins) == pytest.approx(tuple(expected))


def test_the_curve_reaches_the_kolmogorov_smirnov_distances() -> None:
    u = np.sort(np.random.default_rng(0).beta(1, 1.3, 300))
    x, y = evaluation_figures.deviation(u)
    assert y.max() == pytest.approx(stats.kstest(u, "uniform", alternative="greater").statistic)
    assert -y.min() == pytest.approx(stats.kstest(u, "uniform", alternative="less").statistic)
    assert (np.diff(x) >= 0).all()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 0)


def test_a_long_curve_is_thinned_and_keeps_its_form() -> None:
    u = np.sort(np.random.default_rng(0).beta(2, 2, 200_000))
    x, y = evaluation_figures.deviation(u)
    assert len(x) < 1000
    places = np.linspace(0.01, 0.99, 50)
    assert np.interp(places, x, y) == pytest.approx(stats.beta.cdf(places, 2, 2) - places, abs=0.004)


def test_points_at_the_edges_are_upright_steps() -> None:
    x, y = evaluation_figures.deviation(np.repeat([0.0, 1.0], [300_000, 700_000]))
    assert np.interp([0.2, 0.8], x, y) == pytest.approx([0.1, -0.5], abs=0.004)
    assert set(x) == {0.0, 1.0}


def test_many_latents_share_a_look_and_a_name_and_few_have_their_own() -> None:
    few = [evaluation_figures._calibration_look(name, list(uniform(1, 4))) for name in uniform(1, 4)]
    assert len({look["color"] for look in few}) == 5
    assert [look["label"] for look in few] == ["z1", "z2", "z3", "z4", "radius"]
    many = [evaluation_figures._calibration_look(name, list(uniform(1, 8))) for name in uniform(1, 8)]
    assert len({look["color"] for look in many}) == 2
    assert [look["label"] for look in many if look["label"]] == ["latents", "radius"]


@pytest.mark.parametrize(
    ("known", "other"),
    [
        (normal(1, -3, 1), normal(1, -6, 2)),
        (normal(1, -3, 1), normal(300, -1e6, 2)),
        (normal(20, -3, 1), normal(20, -6, 2)),
        (normal(300, -3, 1), torch.empty(0)),
        (normal(300, -3, 1), torch.tensor([-math.inf, math.nan, -5.0])),
        (normal(300, -3, 1).bfloat16().requires_grad_(), torch.full((300,), -math.inf)),
        (torch.full((300,), -2.0), torch.full((300,), -2.0)),
        (torch.zeros(300), normal(300, -1e20, 1e19)),
        (normal(300, -1e7, 1e-3), normal(300, -1e7, 1e3)),
        (torch.cat([normal(300, -9, 1), torch.tensor([-1e25])]), normal(300, -9, 2)),
        (normal(300, 1e-9, 1e-12), normal(300, 1e-3, 1e-6)),
    ],
    ids=["one", "one_far", "twenty", "none", "lost", "all_lost", "equal", "zeros", "offset", "far_known", "tiny"],
)
def test_ood_of_any_sets(
    tmp_path: Path, coarse: int, known: Tensor, other: Tensor, png_size: Callable[..., tuple[int, int]]
) -> None:
    path = separate(tmp_path / "ood.png", known, other, names=("$a{", "a long name " * 9), auroc=math.nan)
    assert png_size(path) == (1800 // coarse, 732 // coarse)


def test_ood_states_how_many_rows_are_left_out() -> None:
    assert evaluation_figures._label("noise", 0, 5) == "noise"
    assert evaluation_figures._label("noise", 1200, 5) == "noise (1,200 not finite)"
    assert evaluation_figures._label("noise", 0, 0) == "noise (nothing to draw)"


@pytest.mark.parametrize(
    ("known", "changed"),
    [(torch.empty(0), {"entropy": 1.0}), (torch.full((3,), -math.inf), {}), (torch.zeros(3), {"entropy": math.nan})],
)
def test_ood_refuses_a_known_set_without_likelihood(tmp_path: Path, known: Tensor, changed: dict[str, Any]) -> None:
    with pytest.raises(FlowtrainError, match="cannot plot log p of digits"):
        separate(tmp_path / "ood.png", known, torch.zeros(3), **changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        normal(4000, -110, 12),
        normal(4000, -180, 30),
        normal(4000, -1e6, 1e4),
        normal(4000, -1e15, 1),
        torch.full((4000,), -95.0),
        -torch.logspace(0, 6, 4000),
    ],
    ids=["overlap", "apart", "far", "farther", "constant", "heavy"],
)
def test_ood_shows_both_sets_however_far_apart(tmp_path: Path, coarse: int, other: Tensor) -> None:
    known = normal(4000, -100, 10)
    assert min(colours(separate(tmp_path / "ood.png", known, other))) > 0.004
    axes = histograms(known, other)
    # the known set has a shape and no needle, and there are numbers to read
    fine = [patch.get_data().values for patch in axes.patches]
    assert (fine[0] > 0).sum() >= 6
    assert 0.1 < fine[0].max() / axes.get_ylim()[1] < 1
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


def histograms(known: Tensor, other: Tensor, **changed: Any) -> Axes:
    axes = Figure().add_subplot()
    evaluation_figures._histograms(axes, known.numpy(), other.numpy(), **{"centre": float(known.median()), **changed})
    return axes


def test_ood_axes_are_plain_unless_a_set_is_far_and_hold_the_entropy() -> None:
    known = normal(4000, -100, 10)
    assert histograms(known, normal(4000, -130, 20)).get_xscale() == "linear"
    assert histograms(known, normal(4000, -1e4, 20)).get_xscale() == "function"
    low, high = histograms(known, normal(4000, -130, 20), shown=(-400.0,)).get_xlim()
    assert low < -400 < -70 < high
    low, _ = histograms(known.abs(), known.abs(), centre=0.0, floor=60.0).get_xlim()
    assert low >= 60


def test_ood_heights_are_shares_in_equal_bins() -> None:
    first, _, second, _ = histograms(normal(4000, -100, 10), normal(300, -104, 8)).patches
    for patch in (first, second):
        assert patch.get_data().values.sum() == pytest.approx(1, abs=0.02)
    edges = first.get_data().edges
    assert np.diff(edges) == pytest.approx(edges[1] - edges[0])
    assert (edges == second.get_data().edges).all()


def test_ood_names_a_bin_that_leaves_the_frame() -> None:
    def notes(other: Tensor) -> list[str]:
        return [text.get_text() for text in histograms(normal(4000, -100, 10), other).texts]

    assert notes(normal(4000, -104, 8)) == []
    assert notes(torch.full((100_000,), -95.0)) == ["highest bin at 100%"]


def test_ood_legend_and_title(tmp_path: Path, coarse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, path: saved.append(figure))
    separate(tmp_path / "ood.png", normal(400, -2, 0.1), normal(400, -3, 0.1), entropy=2.0, unit="bits/dim")
    separate(tmp_path / "ood.png", normal(400, -12_345, 9), normal(400, -1e6, 9), entropy=12_345.0)
    (left, right), (far, _) = (figure.axes for figure in saved)
    assert [axes.get_title(loc="left") for axes in (left, right)] == [
        "AUROC of -log p: 0.870",
        "AUROC of |log p + H|: 0.990",
    ]
    assert [axes.get_xlabel() for axes in (left, right)] == ["log p(x) (bits/dim)", "|log p(x) + H| (bits/dim)"]
    assert [text.get_text() for text in left.texts] == ["-H = -2 bits/dim"]
    assert [text.get_text() for text in far.texts][-1] == "-H = -12,345 nats"
    assert far.get_xlabel() == "log p(x) (nats), logarithmic far out"


@pytest.mark.parametrize(("value", "label"), [(0, "0"), (-200, "-200"), (5e4, "5e4"), (-1.25e16, "-1.25e16")])
def test_labels_are_short(value: float, label: str) -> None:
    assert points.short(value) == label
