"""Training curves: the drawn series, the layout, and the tick labels."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.layout import check_layout, drawn
from matplotlib.figure import Figure

from flowtrain.plotting import curves
from flowtrain.plotting.curves import draw_curves


def train_rows(count: int, **changed: Any) -> list[dict[str, Any]]:
    row = {"split": "train", "seconds": 1.0, "nfe_forward": 20, "nfe_backward": 30}
    row |= {"grad_norm": 1.5, "lr": 1e-3, "rtol": 1e-5, "atol": 1e-5}
    return [{**row, "step": step, "nll": 1 + 2 / (step + 1), **changed} for step in range(count)]


def val_rows(count: int) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "split": "val", "nll": 1.2, "seconds": 2.0} for i in range(count)]


ROWS = {
    "none": [],
    "one": train_rows(1),
    "one_validation": val_rows(1),
    "validations": val_rows(7),
    "training": train_rows(300),
    "all": [*train_rows(300), *val_rows(7), {"step": 30, "split": "test", "nll": 1.3}],
    "no_solver": train_rows(30, nfe_forward=None, nfe_backward=None, rtol=None),
    "no_tolerance": train_rows(30, rtol=None, atol=None),
    "no_rate": train_rows(30, nfe_backward=None, lr=None),
    "zeros": train_rows(30, grad_norm=0.0, lr=0.0, rtol=0.0, nfe_forward=0, nfe_backward=0),
    "not_finite": train_rows(30, nll=math.nan, grad_norm=math.inf, lr=None),
    "no_nll": train_rows(30, nll=None),
    "constant": train_rows(30, nll=2.0),
    "blow_up": train_rows(30)[:-1] + train_rows(30, nll=1e300, grad_norm=1e300, nfe_forward=10**9)[-1:],
    "nll_alone": [{"step": i, "split": "train", "nll": 1.0, "seconds": 0.0} for i in range(40)],
    "odd": [{"split": "train"}, {"step": 3}, {"nll": 2.0}, {"step": None, "split": "val", "nll": "x"}],
    "large": [*train_rows(300, nll=-123_456.5), *val_rows(7)],
    "narrow": [{**row, "nll": -164.69 - 1e-3 * i} for i, row in enumerate(train_rows(5))],
    "long": [{**row, "step": 5_000 * row["step"]} for row in train_rows(300)],
    "sweep": [{**row, "split": f"run {i} with a long name"} for i in range(9) for row in val_rows(5)],
}


@pytest.mark.parametrize("name", ROWS)
def test_curves_are_drawn_for_any_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figure = drawn(
        monkeypatch, draw_curves, rows=ROWS[name], title="a run", entropy=None if name == "narrow" else 0.9, kept=20
    )
    check_layout(figure)
    assert plt.get_fignums() == []


def test_panels_share_their_steps_and_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, draw_curves, rows=[*ROWS["training"], *val_rows(7)], title="a run")
    edges = {(axes.get_position().x0, axes.get_position().x1, axes.get_xlim()) for axes in figure.axes}
    assert len(figure.axes) == 5
    assert len(edges) == 1
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["NLL (nats)", "gradient norm", "learning rate", "NFE per step", "rtol"]


def named(figure: Figure) -> list[str]:
    return [str(label) for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]


def test_series_that_are_zero_at_all_steps_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**changed: Any) -> list[str]:
        return named(drawn(monkeypatch, draw_curves, rows=train_rows(30, **changed), title="a run"))

    assert {"NFE, forward", "NFE, backward"} <= set(names())
    assert "NFE, backward" not in names(nfe_backward=0)
    assert "NFE, forward" in names(nfe_backward=0)
    assert not any("NFE" in name for name in names(nfe_backward=0, nfe_forward=0))


def test_evaluated_checkpoint_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*train_rows(300), *({**row, "nll": 2 - row["step"] / 100} for row in val_rows(7))]
    axes = drawn(monkeypatch, draw_curves, rows=rows, title="a run", kept=40).axes[0]
    (mark,) = [line for line in axes.lines if "checkpoint" in str(line.get_label())]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (40, pytest.approx(1.6))
    # the checkpoint of a step without a validation, such as an older last.pt
    axes = drawn(monkeypatch, draw_curves, rows=rows, title="a run", kept=45).axes[0]
    (mark,) = [line for line in axes.lines if "checkpoint" in str(line.get_label())]
    assert mark.get_xdata()[0] == 45
    unmarked = drawn(monkeypatch, draw_curves, rows=rows, title="a run")
    assert not any("checkpoint" in name for name in named(unmarked))


@pytest.mark.parametrize("entropy", [None, math.nan, -1e6])
def test_curves_are_drawn_for_any_entropy(
    tmp_path: Path, coarse: int, entropy: float | None, png_size: Callable[..., tuple[int, int]]
) -> None:
    draw_curves(tmp_path / "curves.png", rows=train_rows(30), title="a run", entropy=entropy)
    assert png_size(tmp_path / "curves.png")


def test_early_spike_does_not_extend_the_axis() -> None:
    rows = train_rows(400)
    rows[3]["nll"] = 1e4
    low, high = curves._frame(curves.series_of(rows, "nll"), [curves.series_of(val_rows(5), "nll")])
    assert low == pytest.approx(1, abs=0.05)
    assert 1.2 <= high < 3.5


def test_last_row_of_a_repeated_step_is_drawn() -> None:
    course = curves.series_of([*train_rows(5), {"step": 2, "split": "train", "nll": 7.0}], "nll")
    assert course.steps.tolist() == [0, 1, 2, 3, 4]
    assert course.values[2] == 7


def test_running_median_drops_spikes() -> None:
    values = np.ones(1000)
    values[::50] = 1e6
    assert curves.Series(np.arange(1000.0), values).median().values == pytest.approx(1)


def test_tick_labels_are_short() -> None:
    steps = {(2000, 4000): "2,000", (0, 1e6): "0", (250_000, 2e6): "250k", (1_500_000, 2e6): "1.5M"}
    assert {given: curves._step(*given) for given in steps} == steps


@pytest.mark.parametrize(
    ("changed", "label", "value"),
    [
        ({}, "NLL (nats)", 7.0),
        ({"bits_per_dim": None}, "NLL (nats)", 7.0),
        ({"bits_per_dim": math.nan}, "NLL (nats)", 7.0),
        ({"bits_per_dim": 1.5}, "NLL (bits/dim)", 1.5),
    ],
)
def test_curves_of_images_are_in_bits_per_dim(changed: dict[str, Any], label: str, value: float) -> None:
    axes = Figure().add_subplot()
    train = train_rows(30, nll=7.0, **changed)
    curves._likelihood(axes, [*train, *({**row, "split": "val"} for row in train[::10])], entropy=6.5)
    assert axes.get_ylabel() == label
    names = [line.get_label() for line in axes.lines]
    assert names[1:3] == ["training", f"validation (best {value:.3f})"]
    assert {float(each) for line in axes.lines[:3] for each in line.get_ydata()} == {value}
    assert ("entropy of the data" in names) == (label == "NLL (nats)")
