"""Curves of a run: any rows give a PNG of its size, and the numbers along the axes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from flowtrain.plotting import curves
from flowtrain.plotting.curves import draw_curves


def train_rows(count: int, **changed: Any) -> list[dict[str, Any]]:
    row = {"split": "train", "seconds": 1.0, "nfe_forward": 20, "nfe_backward": 30}
    row |= {"grad_norm": 1.5, "lr": 1e-3, "rtol": 1e-5, "atol": 1e-5}
    return [{**row, "step": step, "nll": 1 + 2 / (step + 1), **changed} for step in range(count)]


def val_rows(count: int) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "split": "val", "nll": 1.2, "seconds": 2.0} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "height"),
    [
        ([], 794),
        (train_rows(1), 1234),
        (val_rows(1), 794),
        (val_rows(7), 794),
        (train_rows(300), 1234),
        (train_rows(300) + val_rows(7) + [{"step": 30, "split": "test", "nll": 1.3}], 1234),
        (train_rows(30, nfe_forward=None, nfe_backward=None, rtol=None), 1234),
        (train_rows(30, rtol=None, atol=None), 1234),
        (train_rows(30, nfe_backward=None, lr=None), 1234),
        (train_rows(30, grad_norm=0.0, lr=0.0, rtol=0.0, nfe_forward=0, nfe_backward=0), 1234),
        (train_rows(30, nll=math.nan, grad_norm=math.inf, lr=None), 1234),
        (train_rows(30, nll=None), 1234),
        (train_rows(30, nll=2.0), 1234),
        (train_rows(30)[:-1] + train_rows(30, nll=1e300, grad_norm=1e300, nfe_forward=10**9)[-1:], 1234),
        ([{"step": i, "split": "train", "nll": 1.0, "seconds": 0.0} for i in range(40)], 794),
        ([{"split": "train"}, {"step": 3}, {"nll": 2.0}, {"step": None, "split": "val", "nll": "x"}], 794),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_curves_are_drawn_for_any_rows(
    tmp_path: Path, coarse: int, rows: list[dict[str, Any]], height: int, png_size: Callable[..., tuple[int, int]]
) -> None:
    draw_curves(tmp_path / "new" / "curves.png", rows=rows, title="a run", entropy=0.9)
    assert png_size(tmp_path / "new" / "curves.png") == (1800 // coarse, height // coarse)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("entropy", [None, math.nan, -1e6])
def test_curves_are_drawn_for_any_entropy(
    tmp_path: Path, coarse: int, entropy: float | None, png_size: Callable[..., tuple[int, int]]
) -> None:
    draw_curves(tmp_path / "curves.png", rows=train_rows(30), title="a run", entropy=entropy)
    assert png_size(tmp_path / "curves.png")


def test_curves_have_their_size(tmp_path: Path, png_size: Callable[..., tuple[int, int]]) -> None:
    draw_curves(tmp_path / "curves.png", rows=train_rows(300), title="a run")
    assert png_size(tmp_path / "curves.png") == (1800, 1234)


def test_an_early_spike_leaves_the_frame_and_the_curves_stay() -> None:
    rows = train_rows(400)
    rows[3]["nll"] = 1e4
    low, high = curves._frame(curves.course(rows, "nll"), [curves.course(val_rows(5), "nll")])
    assert low == pytest.approx(1, abs=0.05)
    assert 1.2 <= high < 3.5


def test_the_last_row_of_a_step_counts() -> None:
    course = curves.course([*train_rows(5), {"step": 2, "split": "train", "nll": 7.0}], "nll")
    assert course.steps.tolist() == [0, 1, 2, 3, 4]
    assert course.values[2] == 7


def test_running_median_drops_spikes() -> None:
    values = np.ones(1000)
    values[::50] = 1e6
    assert curves.Course(np.arange(1000.0), values).median().values == pytest.approx(1)


def test_numbers_fit_a_tick_label() -> None:
    steps = {(2000, 4000): "2,000", (0, 1e6): "0", (250_000, 2e6): "250k", (1_500_000, 2e6): "1.5M"}
    assert {given: curves._step(*given) for given in steps} == steps
    shorts = {0.0: "0", 0.05: "0.05", 2.5e-4: "2.5e-4", 1e-5: "1e-5", 3e6: "3e6", -2e29: "-2e29", 120.0: "120"}
    assert {value: curves._short(value) for value in shorts} == shorts


@pytest.mark.parametrize(
    ("changed", "label", "value"),
    [
        ({}, "NLL (nats)", 7.0),
        ({"bits_per_dim": None}, "NLL (nats)", 7.0),
        ({"bits_per_dim": math.nan}, "NLL (nats)", 7.0),
        ({"bits_per_dim": 1.5}, "NLL (bits/dim)", 1.5),
    ],
)
def test_images_have_their_curve_in_bits(changed: dict[str, Any], label: str, value: float) -> None:
    axes = Figure().add_subplot()
    train = train_rows(30, nll=7.0, **changed)
    curves._likelihood(axes, [*train, *({**row, "split": "val"} for row in train[::10])], entropy=6.5)
    assert axes.get_ylabel() == label
    names = [line.get_label() for line in axes.lines]
    assert names[1:3] == ["training", f"validation (best {value:.3f})"]
    assert {float(each) for line in axes.lines[:3] for each in line.get_ydata()} == {value}
    assert ("entropy of the data" in names) == (label == "NLL (nats)")
