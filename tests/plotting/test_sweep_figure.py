"""The figure of a sweep: the layout for several keys, and the error bar of each run."""

import math

import numpy as np
import pytest
from helpers.layout import check_layout, drawn
from matplotlib.figure import Figure

from flowtrain.plotting.sweep_figure import Swept, draw_sweep


def swept(values: list[str], runs: int = 1, **changed: object) -> Swept:
    """Returns results of a sweep. The NLL decreases with the value, and each value has `runs` runs."""
    numbers = [float(value) for value in values] if all(v.replace(".", "").isdigit() for v in values) else None
    nll = [[3.0 - 0.5 * i + 0.01 * run for run in range(runs)] for i in range(len(values))]
    found = {"val_nll": nll, "nll": [[value + 0.05 for value in row] for row in nll]}
    errors = {name: [[0.02] * runs for _ in values] for name in found}
    return Swept(**{"values": values, "numbers": numbers, "found": found, "errors": errors, **changed})  # type: ignore[arg-type]


WORDS = [f"runs/a long name of a file {i}.csv" for i in range(12)]
SWEEPS = {
    "two": {"trainer.lr": swept(["0.001", "0.01"])},
    "four": {"trainer.lr": swept(["0.001", "0.01"], runs=2), "model.layers": swept(["4", "8"], runs=2)},
    "words": {"data.path": swept(WORDS), "model": swept(["maf", "realnvp"], runs=6)},
    "many": {"seed": swept([str(i) for i in range(40)])},
    "keys": {f"a.rather.long.key.of.the.config.number{i}": swept(["1", "2", "400"]) for i in range(4)},
    "solver": {
        "solver.rtol": Swept(
            ["1e-5", "1e-3"],
            [1e-5, 1e-3],
            {"val_nll": [[2.0], [2.0]], "nfe": [[90.0], [40.0]], "solver_error": [[1e-6], [1e-3]]},
        )
    },
    "outlier": {"seed": swept([str(i) for i in range(5)], found={"nll": [[1.0], [1.1], [1.2], [1.1], [1e9]]})},
    "lost": {"seed": swept(["1", "2"], found={"nll": [[math.nan], [2.0]]}, errors={})},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_any_sweep_has_no_overlapping_texts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_layout(drawn(monkeypatch, draw_sweep, lines=SWEEPS[name], title="a sweep"))


def points_of(figure: Figure) -> list[list[float]]:
    """Returns the points of the first series of the first panel."""
    return [[float(x), float(y)] for x, y in figure.axes[0].lines[0].get_xydata()]


def test_each_run_has_an_error_bar_within_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, draw_sweep, lines={"trainer.lr": swept(["0.001", "0.01"], runs=3)}, title="t")
    (axes,) = figure.axes
    bars = [container[2][0].get_segments() for container in axes.containers]
    assert [len(each) for each in bars] == [6, 6]
    ends = np.concatenate([segment[:, 1] for segment in bars[0]])
    assert (ends.min(), ends.max()) == pytest.approx((2.48, 3.04))
    low, high = axes.get_ylim()
    assert low < ends.min() < ends.max() < high
    # the line of means over runs
    means = next(line for line in axes.lines if line.get_label() == "validation")
    assert means.get_ydata() == pytest.approx([3.01, 2.51])
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01"]


def test_values_that_are_close_have_a_linear_axis_and_outliers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, draw_sweep, lines=SWEEPS["outlier"], title="t")
    (axes,) = figure.axes
    assert axes.get_xscale() == "linear"
    assert axes.get_ylim()[1] < 2
    assert [text.get_text() for text in axes.texts] == ["1 above"]
