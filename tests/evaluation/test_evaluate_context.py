"""Evaluation of flows with context columns: every part uses the context of its rows."""

import json
import logging
from typing import Any

import pytest
import torch
from helpers.contexts import COLUMNS, WithContext, conditional, contexts, drawn_from
from helpers.flows import TIGHT, flow_of, vectors
from torch import Tensor

from flowtrain.data.base import Samples
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.checks import check_mass, spread_contexts
from flowtrain.evaluation.evaluate import rank_transforms
from flowtrain.evaluation.report import tables_of
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.utils.errors import ConfigError


def test_all_checks_of_a_conditional_flow_pass_on_its_own_samples() -> None:
    flow = conditional("nsf")
    data = drawn_from(flow, 400)
    found = evaluate(flow, data)
    assert not found.failed
    assert {"mass", "log-det", "round trip", "own samples"} <= {c.name for c in found.checks if c.passed}
    with torch.no_grad():
        log_p = flow.log_prob(data.test, data.test_context)
    assert found.nll == pytest.approx(-float(log_p.mean()), rel=1e-9)
    assert found.calibration.p_value > 1e-3
    content = json.loads(json.dumps(found.to_dict()))["calibration"]["by_context"]
    assert [one.get("category") for one in content] == [None] * 4 + ["blue", "green", "red"]
    red = data.test_context[:, 1] == 2
    assert content[-1]["nll"] == pytest.approx(-float(log_p[red].mean()), rel=1e-9)
    assert content[-1]["n"] == int(red.sum())
    assert content[0]["low"] == pytest.approx(float(data.test_context[:, 0].min()))
    assert min(one["p_value"] for one in content) > 1e-3
    assert "by context" in dict(found.rows())
    assert len(tables_of(found)[-1].rows) == len(content)


def test_base_that_depends_on_the_context_is_calibrated() -> None:
    """The test is in float32, because the features of the context have the dtype of the flow."""
    samples = Samples((2,), context=COLUMNS)
    flow = flow_of(["model=mixture", "model.components=2"], samples, TIGHT).float()
    found = evaluate(flow, drawn_from(flow, 400))
    assert not found.failed
    assert found.calibration.p_value > 1e-3
    assert min(one.p_value for one in found.calibration.by_context) > 1e-3


def test_context_with_wrong_rows_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    flow = conditional("maf")
    data = drawn_from(flow, 600)
    high = data.test_context[:, 0] > data.test_context[:, 0].quantile(0.75)
    data.test[high] = data.test[high] + 3 * data.test.std(0)
    with caplog.at_level(logging.WARNING):
        found = evaluate(flow, data, thorough=False)
    worst = max(found.calibration.by_context, key=lambda one: one.ks)
    assert (worst.column, worst.n) == ("mass", 150)
    assert any("calibration by context" in message and "mass" in message for message in caplog.messages)


def test_flow_without_context_has_no_calibration_by_context() -> None:
    assert "by_context" not in evaluate(vectors("maf"), torch.randn(60, 2), thorough=False).to_dict()["calibration"]


class Scaled(Flow):
    """A flow whose density integrates to 1.1 for masses above 2."""

    def _log_prob(self, x: Tensor, context: Any) -> Tensor:
        found = self.context_of(context, x)
        assert found is not None
        return super()._log_prob(x, context) + 0.0953 * (found[:, 0] > 2)


def test_mass_is_checked_at_several_contexts() -> None:
    flow = conditional("maf")
    c = contexts(200)
    chosen = spread_contexts(flow, c)
    assert chosen is not None
    assert chosen.shape == (3, 2)
    assert (chosen[:, 0].diff() > 0).all()
    good = check_mass(flow, chosen)
    assert good is not None
    assert good.passed
    wrong = Scaled((2,), flow.bijection, context=COLUMNS).eval()
    found = check_mass(wrong, chosen)
    assert found is not None
    assert found.passed is False
    assert found.value == pytest.approx(0.1, abs=1e-3)
    assert found.message is not None
    assert "mass = " in found.message


def test_integer_weights_give_the_bins_of_repeated_rows() -> None:
    flow = conditional("maf")
    data, w = drawn_from(flow, 200), torch.randint(1, 4, (200,))
    repeated = WithContext(data.test.repeat_interleave(w, 0), data.test_context.repeat_interleave(w, 0))
    data.test_weights = data.val_weights = w.double()
    bins = [evaluate(flow, rows, thorough=False).calibration.by_context for rows in (data, repeated)]
    assert len(bins[0]) == len(bins[1]) == 7
    for weighted, plain in zip(*bins, strict=True):
        assert (weighted.low, weighted.high, weighted.category) == (plain.low, plain.high, plain.category)
        assert (weighted.nll, weighted.ks) == pytest.approx((plain.nll, plain.ks))
        assert weighted.n < plain.n


def test_ood_detection_uses_the_context_of_the_other_set() -> None:
    flow = conditional("maf")
    data, x, c = drawn_from(flow, 60), torch.randn(40, 2), contexts(40)
    found = evaluate(flow, data, other=("other", x, c), trained_on=data, thorough=False)
    assert found.sets is not None
    with torch.no_grad():
        torch.testing.assert_close(found.sets[0], flow.log_prob(data.test, data.test_context))
        torch.testing.assert_close(found.sets[1], flow.log_prob(x, c))
    assert found.ood is not None
    # the validation set is the test set
    assert found.ood.entropy == pytest.approx(found.nll)
    with pytest.raises(ConfigError, match="mass, colour"):
        evaluate(flow, data, other=("other", x), thorough=False)


def test_ensemble_is_calibrated_by_context() -> None:
    flows = [conditional(name) for name in ("maf", "realnvp")]
    ensemble = Ensemble(flows, (0.5, 0.5), ("a", "b"))
    c = contexts(400)
    data = WithContext(ensemble.sample(400, context=c), c)
    found = evaluate(ensemble, data, thorough=False)
    assert {one.worst for one in found.calibration.by_context} == {"density"}
    assert min(one.p_value for one in found.calibration.by_context) > 1e-3


def test_calibration_by_class_uses_the_labels() -> None:
    flow = conditional("maf")
    labelled = Flow((2,), flow.bijection, classes=4).eval()
    labels = torch.arange(120) % 3
    found = evaluate(labelled, torch.randn(120, 2), label=labels, thorough=False)
    assert [(one.column, one.category, one.n) for one in found.calibration.by_context] == [
        ("class", "0", 40), ("class", "1", 40), ("class", "2", 40),
    ]  # fmt: skip


def test_rows_of_an_ensemble_are_ranked_among_samples_with_their_contexts() -> None:
    level = 10 * torch.arange(400.0)
    found = rank_transforms(level + torch.randn(400), (level + torch.randn(4, 400)).flatten(), 400)
    u, _, size = found(torch.arange(400) >= 200)
    assert (u.shape, size) == ((200, 1), 160)
    assert 0.4 < float(u.mean()) < 0.6
    # if only every second row is ranked, a mask of all rows selects the ranked rows
    assert rank_transforms(torch.randn(200), torch.randn(800), 399)(torch.arange(399) < 10).u.shape == (5, 1)
