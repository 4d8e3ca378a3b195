"""Figures that compare tables with samples: the choice of rows, classes and densities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flows import vectors
from torch import Tensor

from flowtrain.bijections.linear import Affine
from flowtrain.data.base import Dataset
from flowtrain.data.toys.shapes import Moons
from flowtrain.flow import Flow
from flowtrain.plotting import pictures, vector_pictures


class Rows(Dataset):
    """A data set whose labels are the first column."""

    def __init__(self, columns: int, labelled: bool = True) -> None:
        self.event_shape = (columns,)
        labels = torch.arange(60) % 3
        self.val = self.test = torch.randn(60, columns)
        self.test[:, 0] = labels.float()
        if labelled:
            self.classes, self.val_labels, self.test_labels = 3, labels, labels

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self.test[:batch_size]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the arguments of the last figure."""
    given: dict[str, Any] = {}
    for name in ("draw_flow_1d", "draw_flow_2d", "draw_corner"):
        monkeypatch.setattr(vector_pictures, name, lambda path, name=name, **rest: given.update(rest, figure=name))
    monkeypatch.setattr(vector_pictures, "SAMPLES", 30)
    monkeypatch.setattr(vector_pictures, "SAMPLES_OF_MANY", 30)
    return given


def test_toys_are_drawn_with_their_true_density(drawn: dict[str, Any]) -> None:
    moons = Moons(n_val=5, n_test=50)
    pictures.draw(vectors("affine").float(), moons, Path("a.png"), "t")
    assert drawn["figure"] == "draw_flow_2d"
    assert list(drawn["columns"]) == ["x1", "x2"]
    torch.testing.assert_close(drawn["true_log_density"](moons.test), moons.log_prob(moons.test))


@pytest.mark.parametrize(("columns", "figure"), [(1, "draw_flow_1d"), (2, "draw_flow_2d"), (3, "draw_corner")])
def test_figures_are_chosen_by_the_number_of_columns(drawn: dict[str, Any], columns: int, figure: str) -> None:
    pictures.draw(Flow((columns,), Affine(columns)), Rows(columns, labelled=False), Path("a.png"), "t")
    assert drawn["figure"] == figure
    assert drawn.get("true_log_density") is None
    assert drawn.get("classes") is None


def conditional(columns: int) -> Flow:
    flow = Flow((columns,), Affine(columns))
    flow.classes, flow.class_counts = 3, (1, 0, 1)
    return flow


def test_rows_with_labels_and_conditional_samples_have_classes(drawn: dict[str, Any]) -> None:
    data = Rows(3)
    pictures.draw(Flow((3,), Affine(3)), data, Path("a.png"), "t")
    assert torch.equal(drawn["classes"].data, drawn["data"][:, 0].long())
    assert drawn["classes"].samples is None
    pictures.draw(conditional(3), data, Path("a.png"), "t")
    assert len(drawn["classes"].samples) == len(drawn["samples"])
    # the class without training rows is not sampled
    assert set(drawn["classes"].samples.tolist()) <= {0, 2}


def test_samples_of_one_class_are_beside_data_of_that_class(drawn: dict[str, Any]) -> None:
    flow, data = conditional(2), Rows(2)
    pictures.draw(flow, data, Path("a.png"), "t", samples=torch.randn(9, 2), label=2)
    assert (drawn["data"][:, 0] == 2).all()
    x = torch.randn(4, 2)
    with torch.no_grad():
        torch.testing.assert_close(drawn["log_density"](x), flow.log_prob(x, 2))


@pytest.mark.parametrize("signed", [False, True])
def test_weighted_rows_are_drawn_by_weight(signed: bool, drawn: dict[str, Any], tmp_path: Path) -> None:
    data = Rows(3)
    weights = torch.where(data.test[:, 0] == 1, 1.0, 0.0)
    if signed:
        # the weights of each of the other classes cancel
        others = (data.test[:, 0] != 1).nonzero().flatten()
        weights[others] = torch.where(torch.arange(len(others)) // 2 % 2 == 0, 1.0, -1.0)
        data.test[:, 1:] = 0
    data.test_weights = weights
    pictures.draw(Flow((3,), Affine(3)), data, tmp_path / "p.png", "")
    share = float((drawn["data"][:, 0] == 1).double().mean())
    assert share == 1.0
    assert len(drawn["data"]) == len(drawn["classes"].data) == 60
    assert bool((drawn["classes"].data == drawn["data"][:, 0]).all())
    # the data set itself is unchanged
    assert data.test_weights is weights
