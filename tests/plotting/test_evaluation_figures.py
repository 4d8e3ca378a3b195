"""The figures of an evaluation: contents and layout, for good and bad models and for few and many rows."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.layout import check_layout, drawn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

from flowtrain.plotting import evaluation_figures
from flowtrain.plotting.evaluation_figures import Distances, draw_calibration, draw_ood, draw_quality
from flowtrain.utils.errors import FlowtrainError


def uniform(n: int, latents: int) -> dict[str, Tensor]:
    draws = torch.rand(latents + 1, n, generator=torch.Generator().manual_seed(n))
    return dict(zip([*(f"z{j + 1}" for j in range(latents)), "radius"], draws, strict=True))


def normal(count: int, mean: float, deviation: float) -> Tensor:
    """Returns the quantiles of a normal distribution at `count` places, which make a smooth histogram."""
    return mean + deviation * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def separate(path: Path, known: Tensor, other: Tensor, **changed: Any) -> Path:
    given = {"names": ("digits", "letters"), "entropy": -float(known.detach().double().mean()), "auroc": 0.87}
    given |= {"typicality_auroc": 0.99, "unit": "nats", "title": "a title"}
    draw_ood(path, log_p=(known, other), **{**given, **changed})
    return path


def colours(path: Path) -> tuple[float, float]:
    """Returns the shares of a picture that are bluish and reddish."""
    red, _, blue = np.moveaxis(imread(path)[..., :3], -1, 0)
    return float((blue > red + 0.15).mean()), float((red > blue + 0.15).mean())


def test_figures_have_the_expected_size_and_create_the_folder(
    tmp_path: Path, png_size: Callable[..., tuple[int, int]]
) -> None:
    folder = tmp_path / "new" / "plots"
    draw_calibration(folder / "calibration.png", pit=uniform(500, 2), title="a title")
    separate(folder / "ood.png", normal(500, -100, 10), normal(400, -120, 20))
    assert png_size(folder / "calibration.png") == (1800, 710)
    assert png_size(folder / "ood.png") == (1800, 690)
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
def test_calibration_is_drawn_for_any_model(monkeypatch: pytest.MonkeyPatch, pit: dict[str, Tensor]) -> None:
    check_layout(drawn(monkeypatch, draw_calibration, pit=pit, title="$\\no{ tex"))


@pytest.mark.parametrize(
    ("pit", "words"),
    [
        ({}, r"transforms of \[\]"),
        ({"z1": torch.rand(5), "radius": torch.rand(6)}, r"transforms of \[5, 6\]"),
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
def test_band_of_a_bin_is_binomial(n: int, bins: int) -> None:
    expected = stats.binom.ppf([0.025, 0.975], n, 1 / bins) * bins / n
    assert evaluation_figures.bin_band(n, bins) == pytest.approx(tuple(expected))


def test_extremes_of_the_curve_are_kolmogorov_smirnov_distances() -> None:
    u = np.sort(np.random.default_rng(0).beta(1, 1.3, 300))
    x, y = evaluation_figures.deviation(u)
    assert y.max() == pytest.approx(stats.kstest(u, "uniform", alternative="greater").statistic)
    assert -y.min() == pytest.approx(stats.kstest(u, "uniform", alternative="less").statistic)
    assert (np.diff(x) >= 0).all()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 0)


def test_thinned_curve_equals_the_full_curve() -> None:
    u = np.sort(np.random.default_rng(0).beta(2, 2, 200_000))
    x, y = evaluation_figures.deviation(u)
    assert len(x) < 1000
    places = np.linspace(0.01, 0.99, 50)
    assert np.interp(places, x, y) == pytest.approx(stats.beta.cdf(places, 2, 2) - places, abs=0.004)


def test_values_at_the_edges_give_vertical_steps() -> None:
    x, y = evaluation_figures.deviation(np.repeat([0.0, 1.0], [300_000, 700_000]))
    assert np.interp([0.2, 0.8], x, y) == pytest.approx([0.1, -0.5], abs=0.004)
    assert set(x) == {0.0, 1.0}


def test_few_latents_share_panels_and_many_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    few = drawn(monkeypatch, draw_calibration, pit=uniform(400, 3), title="t", labels={"z2": "price"})
    assert len(few.axes) == 2
    assert few.axes[0].get_legend_handles_labels()[1][:4] == ["z1", "price (z2)", "z3", "radius"]
    many = drawn(monkeypatch, draw_calibration, pit=uniform(400, 4), title="t", labels={"z2": "price"}, note="4 of 9")
    assert [axes.get_title(loc="left") for axes in many.axes] == ["z1", "price (z2)", "z3", "z4", "radius"]
    assert any("4 of 9" in text.get_text() for text in many.texts)


def test_panels_of_latents_have_one_scale_and_their_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    pit = {**uniform(400, 4), "z3": torch.rand(400) ** 2, "radius": torch.zeros(400)}
    axes = drawn(monkeypatch, draw_calibration, pit=pit, title="t").axes
    limits = [each.get_ylim() for each in axes]
    assert len({*limits[:4]}) == 1
    assert limits[4][1] > limits[0][1]
    for each, u in zip(axes, pit.values(), strict=True):
        statistic = stats.kstest(u.numpy(), "uniform").statistic
        assert each.get_title(loc="right") == f"KS {statistic:.3f}"


@pytest.mark.parametrize("latents", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [3, 10_000])
def test_layout_of_calibrations_with_long_names(monkeypatch: pytest.MonkeyPatch, latents: int, n: int) -> None:
    labels = {f"z{i + 1}": f"average delay of the research department {i}" for i in range(latents)}
    note = "8 of 1,000 columns, those with the largest deviations"
    figure = drawn(
        monkeypatch, draw_calibration, pit=uniform(n, latents), title="a title " * 20, labels=labels, note=note
    )
    check_layout(figure)


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
def test_ood_is_drawn_for_any_sets(monkeypatch: pytest.MonkeyPatch, known: Tensor, other: Tensor) -> None:
    figure = ood_figure(monkeypatch, known, other, names=("$a{", "a long name " * 9), auroc=math.nan)
    check_layout(figure)


def test_ood_counts_the_rows_and_the_rows_left_out() -> None:
    assert evaluation_figures.set_label("noise", 0, 1) == "noise (1 row)"
    assert evaluation_figures.set_label("noise", 1200, 5) == "noise (1,205 rows, 1,200 not finite)"
    assert evaluation_figures.set_label("noise", 0, 0) == "noise (0 rows, nothing to draw)"


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
def test_ood_shows_both_sets_at_any_distance(tmp_path: Path, coarse: int, other: Tensor) -> None:
    known = normal(4000, -100, 10)
    assert min(colours(separate(tmp_path / "ood.png", known, other))) > 0.004
    axes = histograms(known, other)
    # the histogram of the known set is not a single high bin, and the axis has at least three ticks
    fine = [patch.get_data().values for patch in axes.patches]
    assert (fine[0] > 0).sum() >= 6
    assert 0.1 < fine[0].max() / axes.get_ylim()[1] < 1
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


def histograms(known: Tensor, other: Tensor, **changed: Any) -> Axes:
    axes = Figure().add_subplot()
    sets = (known.numpy(), other.numpy())
    options = {"centre": float(known.median()), **changed}
    evaluation_figures.draw_histograms(axes, sets, evaluation_figures.OOD_COLOURS, **options)
    return axes


def test_ood_axis_is_linear_unless_a_set_is_far() -> None:
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


def test_ood_labels_a_bin_that_exceeds_the_axis() -> None:
    def notes(other: Tensor) -> list[str]:
        return [text.get_text() for text in histograms(normal(4000, -100, 10), other).texts]

    assert notes(normal(4000, -104, 8)) == []
    assert notes(torch.full((100_000,), -95.0)) == ["highest bin at 100%"]


def ood_figure(patch: pytest.MonkeyPatch, known: Tensor, other: Tensor, **changed: Any) -> Figure:
    given = {"names": ("digits", "letters"), "entropy": -float(known.detach().double().mean()), "auroc": 0.87}
    given |= {"typicality_auroc": 0.99, "unit": "nats", "title": "a title"}
    return drawn(patch, draw_ood, log_p=(known, other), **{**given, **changed})


def test_ood_legends_and_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    near = ood_figure(monkeypatch, normal(400, -2, 0.1), normal(300, -3, 0.1), entropy=2.0, unit="bits/dim")
    far = ood_figure(monkeypatch, normal(400, -12_345, 9), normal(400, -1e6, 9), entropy=12_345.0)
    left, middle, right = near.axes
    assert [axes.get_xlabel() for axes in (left, middle)] == ["log p(x) (bits/dim)", "|log p(x) + H| (bits/dim)"]
    assert right.get_legend_handles_labels()[1] == ["\N{MINUS SIGN}log p, area 0.870", "|log p + H|, area 0.990"]
    assert [text.get_text() for text in near.legends[0].get_texts()] == ["digits (400 rows)", "letters (300 rows)"]
    assert [text.get_text() for text in left.texts] == ["\N{MINUS SIGN}H = \N{MINUS SIGN}2 bits/dim"]
    assert [text.get_text() for text in far.axes[0].texts][-1] == "\N{MINUS SIGN}H = \N{MINUS SIGN}12,345 nats"
    assert far.axes[0].get_xlabel() == "log p(x) (nats), logarithmic far out"


@pytest.mark.parametrize("sizes", [(2, 1), (30, 5000), (5000, 30), (400, 400)])
def test_area_below_the_roc_curve_is_the_auroc(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    # scores are rounded, so that many scores are equal
    inside, outside = (np.round(rng.normal(mean, 1, n), 1) for mean, n in zip((0.0, 1.0), sizes, strict=True))
    false, true = evaluation_figures.roc_curve(inside, outside)
    labels = np.repeat([0, 1], sizes)
    expected = roc_auc_score(labels, np.concatenate([inside, outside]))
    assert np.trapezoid(true, false) == pytest.approx(expected, abs=1e-3)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert len(false) < 500


def test_rows_without_likelihood_are_the_most_anomalous(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = torch.cat([torch.full((300,), -math.inf), torch.full((100,), math.nan)])
    *_, right = ood_figure(monkeypatch, normal(400, -2, 0.1), outside).axes
    curve = next(line for line in right.lines if "\N{MINUS SIGN}log p" in str(line.get_label()))
    assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(1)


def quality_figure(patch: pytest.MonkeyPatch, **changed: Any) -> Figure:
    lines = {"euler": Distances([1, 2, 4], [0.3, 0.2, 0.1], [0.05, 0.01, 0.2])}
    given = {"lines": lines, "exact": (26, 0.09, 0.01), "data": (0.04, 0.01), "title": "a title"}
    return drawn(patch, draw_quality, **{**given, **changed})


def test_quality_figure_has_error_bars_and_the_data_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = quality_figure(monkeypatch).axes
    euler, own = axes.containers
    (_, _, (bars,)) = euler
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends[:2] == pytest.approx(np.array([[0.25, 0.35], [0.19, 0.21]]))
    # the lower end is above zero, because the axis is logarithmic
    assert 0 < ends[2, 0] < 0.1
    assert ends[2, 1] == pytest.approx(0.3)
    assert own[0].get_xydata().tolist() == [[26, 0.09]]
    (line,) = [each for each in axes.lines if "two sets of data" in str(each.get_label())]
    assert {*line.get_ydata()} == {0.04}
    low, high = axes.get_ylim()
    assert low <= 0.04 < 0.3 <= high


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"data": (0.04, math.nan), "exact": (26, 0.09, math.nan)},
        {"lines": {"euler": Distances([1], [0.09], [math.nan])}},
        {"lines": {f"a method with a long name {i}": Distances([2**i], [10.0**i], [0.1]) for i in range(6)}},
        {"exact": (1e4, 1e-7, 1e-8)},
    ],
    ids=["usual", "no_errors", "one", "many", "wide"],
)
def test_quality_figure_has_no_overlapping_texts(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    check_layout(quality_figure(monkeypatch, **changed))
