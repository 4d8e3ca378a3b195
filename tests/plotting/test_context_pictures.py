"""Figures of conditional flows: the choice of contexts, rows and densities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.contexts import COLUMNS, WithContext, conditional, contexts, drawn_from
from helpers.layout import catch_figures, check_layout
from torch import Tensor

from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.plotting import context_pictures, pictures, transport_pictures, vector_pictures
from flowtrain.plotting.context_pictures import draw_context_pictures, panel_contexts, rows_near, typical_context
from flowtrain.plotting.transport_pictures import draw_transport_pictures


def test_contexts_of_panels_are_quantiles_or_categories() -> None:
    values = contexts(2000)
    chosen, varied = panel_contexts(COLUMNS, values)
    assert varied == 0
    assert (chosen[:, 1] == 2).all()  # the most frequent category
    share = [(values[:, 0] <= c).double().mean() for c in chosen[:, 0]]
    torch.testing.assert_close(torch.stack(share), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), atol=0.02, rtol=0)
    # each context is the context of a row
    assert all((values == c).all(1).any() for c in chosen)
    chosen, varied = panel_contexts(COLUMNS[1:], values[:, 1:])
    assert (chosen[:, 0].tolist(), varied) == ([0.0, 1.0, 2.0], 0)
    # few different values give few panels
    chosen, _ = panel_contexts(COLUMNS[:1], torch.tensor([[0.0], [0.0], [1.0]]))
    assert chosen.flatten().tolist() == [0.0, 1.0]


def test_rows_near_a_context_have_its_category_and_a_similar_value() -> None:
    flow, c = conditional("maf"), contexts(2000)
    data = WithContext(c.clone(), c)
    near = rows_near(flow, data, torch.tensor([1.5, 1.0]))
    assert near.shape == (100, 2)
    assert (near[:, 1] == 1).all()
    green = c[c[:, 1] == 1, 0]
    assert (near[:, 0] - 1.5).abs().max() == (green - 1.5).abs().sort().values[99]
    labelled = Flow((2,), flow.bijection, classes=4)
    data.classes, data.test_labels = 4, c[:, 1].long()
    assert (rows_near(labelled, data, torch.tensor([2.0]))[:, 1] == 2).all()


def test_typical_context_is_a_row_in_the_middle() -> None:
    flow, c = conditional("maf"), contexts(2000)
    (found,) = typical_context(flow, WithContext(c, c))
    assert (c == found).all(1).any()
    assert 0.3 < float((c[:, 0] < found[0]).double().mean()) < 0.7
    assert found[1] == 2


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the arguments of the last figure."""
    given: dict[str, Any] = {}
    for module, name in (
        (vector_pictures, "draw_flow_1d"),
        (vector_pictures, "draw_flow_2d"),
        (vector_pictures, "draw_corner"),
        (context_pictures, "draw_contexts"),
        (transport_pictures, "draw_paths"),
        (transport_pictures, "draw_transport"),
    ):
        monkeypatch.setattr(module, name, lambda path, name=name, **rest: given.update(rest, figure=name))
    monkeypatch.setattr(vector_pictures, "SAMPLES", 40)
    monkeypatch.setattr(vector_pictures, "SAMPLES_OF_MANY", 40)
    return given


def path_of(name: str) -> Path:
    return Path(f"{name}.png")


@pytest.mark.parametrize("columns", [2, 3])
def test_samples_have_the_contexts_of_the_data(
    drawn: dict[str, Any], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = conditional("maf", columns)
    data, given = drawn_from(flow, 80), []
    sample = flow.sample
    monkeypatch.setattr(Flow, "sample", lambda self, n, context: (given.append(context), sample(n, context=context))[1])
    pictures.draw(flow, data, Path("a.png"), "t")
    assert torch.equal(given[0], data.test_context[::2])
    assert drawn["figure"] == ("draw_flow_2d" if columns == 2 else "draw_corner")
    assert drawn.get("log_density") is None
    torch.testing.assert_close(drawn["data"], data.test)


def test_samples_of_one_context_are_beside_rows_near_it(drawn: dict[str, Any]) -> None:
    flow = conditional("maf", 2)
    data, one = drawn_from(flow, 400), torch.tensor([[1.5, 2.0]])
    x = torch.randn(9, 2)
    pictures.draw(flow, data, Path("a.png"), "t", samples=x, context=one)
    assert torch.equal(drawn["data"], rows_near(flow, data, one[0]))
    with torch.no_grad():
        torch.testing.assert_close(drawn["log_density"](x), flow.log_prob(x, one))
    pictures.draw(flow, data, Path("a.png"), "t", samples=x, context=contexts(9))
    assert (drawn["log_density"], len(drawn["data"])) == (None, 400)


@pytest.mark.parametrize("kind", ["flow", "ensemble", "labels"])
def test_densities_are_drawn_at_each_context(drawn: dict[str, Any], kind: str) -> None:
    flow: Any = conditional("maf", 2)
    data, x = drawn_from(flow, 200), torch.randn(5, 2)
    if kind == "ensemble":
        flow = Ensemble([flow, conditional("realnvp", 2)])
    chosen: Tensor = panel_contexts(COLUMNS, data.test_context)[0]
    if kind == "labels":
        flow = Flow((2,), flow.bijection, classes=4)
        data.classes, data.context, data.test_labels = 4, (), data.test_context[:, 1].long()
        chosen = torch.arange(3)
    draw_context_pictures(flow, data, path_of, "t")
    assert drawn["figure"] == "draw_contexts"
    assert len(drawn["names"]) == len(drawn["data"]) == len(chosen)
    with torch.no_grad():
        for function, c in zip(drawn["log_densities"], chosen, strict=True):
            torch.testing.assert_close(function(x), flow.log_prob(x, c.reshape(1, -1) if kind != "labels" else c))


def test_other_flows_have_no_densities_at_contexts(drawn: dict[str, Any]) -> None:
    flow = conditional("maf", 3)
    assert draw_context_pictures(flow, drawn_from(flow, 60), path_of, "t") == []
    assert not drawn


@pytest.mark.parametrize("name", ["ffjord", "nsf"])
def test_transport_ends_at_the_density_of_one_context(drawn: dict[str, Any], name: str) -> None:
    flow = conditional(name, 2)
    data, x = drawn_from(flow, 60), 0.5 * torch.randn(4, 2)
    assert len(draw_transport_pictures(flow, data, path_of, "t")) == 2
    c = typical_context(flow, data)
    # `drawn` has the arguments of both figures
    with torch.no_grad():
        torch.testing.assert_close(drawn["log_density"](x)[-1], flow.log_prob(x, c), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(
            drawn["log_densities"][-1], flow.log_prob(drawn["states"][-1], c), atol=1e-2, rtol=0.02
        )
    assert "mass = " in drawn["title"]


@pytest.mark.parametrize("columns", [1, 2])
def test_texts_of_densities_at_contexts_do_not_overlap(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    flow = conditional("nsf", columns)
    draw_context_pictures(flow, drawn_from(flow, 200), path_of, "maf on a table, step 1,000, test NLL 1.234 +- 0.005")
    (figure,) = figures
    check_layout(figure)
