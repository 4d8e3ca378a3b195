"""The figure of anomaly detection: histograms, threshold and layout."""

import pytest
import torch
from helpers.layout import check_layout, drawn
from matplotlib.figure import Figure

from flowtrain.evaluation.result import AnomalyDetection, AnomalyRows
from flowtrain.plotting.anomaly_figure import draw_anomalies
from flowtrain.utils.errors import FlowtrainError


def figure_of(
    monkeypatch: pytest.MonkeyPatch, known: torch.Tensor, log_p: torch.Tensor, labels: torch.Tensor | None = None
) -> Figure:
    empty = torch.zeros(len(log_p), 0)
    threshold = float(known.quantile(0.05))
    found = AnomalyDetection(len(log_p), len(known), 3, 0.05, None, threshold, 3)
    rows = AnomalyRows(known, log_p, empty, log_p < threshold, empty, empty, labels)
    return drawn(monkeypatch, draw_anomalies, found=found, rows=rows, unit=("nats", 1.0), title="$\\no{ tex " * 9)


@pytest.mark.parametrize("far", [3.0, 1e5])
@pytest.mark.parametrize("labelled", [False, True])
def test_layout_and_sets(monkeypatch: pytest.MonkeyPatch, far: float, labelled: bool) -> None:
    known, log_p = torch.randn(200) - 5, torch.randn(50) - 5
    log_p[:8] -= far
    log_p[8] = -torch.inf
    labels = (torch.arange(50) < 9).double() if labelled else None
    figure = figure_of(monkeypatch, known, log_p, labels)
    check_layout(figure)
    (axes,) = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 2 + labelled
    assert "1 not finite" in names[-1]
    line = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert line.get_xdata()[0] == pytest.approx(float(known.quantile(0.05)))


def test_one_new_row(monkeypatch: pytest.MonkeyPatch) -> None:
    check_layout(figure_of(monkeypatch, torch.randn(19) - 5, torch.tensor([-9.0]), torch.tensor([1.0])))


def test_no_finite_validation_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlowtrainError):
        figure_of(monkeypatch, torch.full((9,), -torch.inf), torch.zeros(3))
