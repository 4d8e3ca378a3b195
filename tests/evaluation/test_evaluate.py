"""`flowtrain.evaluate` on rows in memory: accepted inputs, results, and no side effects."""

import copy
import logging
import math
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flows import images, vectors
from numpy.typing import NDArray
from torch import Tensor

import flowtrain
from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.logit import Logit
from flowtrain.data.base import Dataset, Samples
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.result import Check
from flowtrain.flow import Flow, Record
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

pytestmark = pytest.mark.usefixtures("propagate_logs")


class Frame:
    def __init__(self, **columns: NDArray[Any]) -> None:
        self.columns, self.values = list(columns), np.column_stack(list(columns.values()))

    def to_numpy(self) -> NDArray[Any]:
        return self.values


class Rows(Dataset):
    """A data set with the given test rows."""

    event_shape = (2,)

    def __init__(self, x: Tensor) -> None:
        self.val = self.test = x

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        raise NotImplementedError

    def train_rows(self, most: int) -> Tensor:
        return self.test[:most]


def array(n: int = 40, d: int = 2, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=(n, d))


def gaussian(d: int = 2) -> Flow:
    return Flow((d,), Affine(d)).eval()


def test_gaussian_nll_equals_the_closed_form() -> None:
    x = array()
    log_p = -0.5 * (x**2).sum(1) - math.log(2 * math.pi)
    found = flowtrain.evaluate(gaussian(), x)
    assert isinstance(found, flowtrain.Evaluation)
    assert found.nll == pytest.approx(-log_p.mean(), abs=1e-12)
    assert found.nll_stderr == pytest.approx(log_p.std(ddof=1) / math.sqrt(len(x)))
    np.testing.assert_allclose(found.scores.numpy(), log_p)
    assert (found.n, found.split, found.step, found.baselines) == (40, "all", 0, None)
    assert not found.failed


def test_arrays_and_datasets_give_equal_evaluations() -> None:
    flow, x, rows = vectors("ffjord"), array(), array(60, seed=1)
    of_set = evaluate(flow, Rows(torch.from_numpy(x)), trained_on=Rows(torch.from_numpy(rows)), step=7).to_dict()
    of_rows = evaluate(flow, x, trained_on=rows, step=7).to_dict()
    assert of_set.keys() == of_rows.keys()
    for key in set(of_set) - {"split", "seconds", "total_seconds", "baselines"}:
        # repr also compares NaN
        assert repr(of_set[key]) == repr(of_rows[key]), key
    assert of_set["baselines"]["gaussian"]["nll"] == of_rows["baselines"]["gaussian"]["nll"]


def test_data_frame_columns_are_selected_by_name() -> None:
    flow, x, y = vectors("realnvp", classes=3), array(), np.arange(40) % 3
    expected = evaluate(flow, x, label=y)
    flow.record = Record({}, Samples((2,), columns=("a", "b"), label="kind", classes=3), step=5)
    frame = Frame(b=x[:, 1], kind=y, other=y * math.nan, a=x[:, 0])
    for found in (evaluate(flow, frame), evaluate(flow, frame, label="kind", trained_on=frame)):
        assert torch.equal(found.scores, expected.scores)
        assert found.step == 5
    assert evaluate(flow, frame, step=9, trained_on=x).step == 9
    with pytest.raises(DataError, match="'b'"):
        evaluate(flow, Frame(a=x[:, 0], kind=y))
    with pytest.raises(FlowtrainError, match="label"):
        evaluate(flow, x)


def test_tensors_of_any_dtype_and_layout_are_accepted() -> None:
    flow, x = gaussian(), torch.from_numpy(array())
    expected = evaluate(flow, x).nll
    with torch.inference_mode():
        inference = x.clone()
    for other in (x.clone().requires_grad_(), inference, x.numpy(), x.tolist(), x.T.contiguous().T):
        assert evaluate(flow, other).nll == pytest.approx(expected, abs=1e-12)
    assert evaluate(flow, x.bfloat16()).n == 40


def test_evaluate_leaves_the_flow_and_torch_settings_unchanged() -> None:
    """The flow and torch's settings are unchanged, and the result does not depend on the settings."""
    # float32 can also meet this tolerance
    flow, x = vectors("ffjord", classes=2, solver=["solver.rtol=1e-5"]), array()
    label = [0, 1] * 20
    flow.train()
    flow.bijection.eval()
    before = copy.deepcopy(flow.state_dict()), [m.training for m in flow.modules()], flow.like.dtype
    expected = evaluate(flow, x, label=label)
    torch.rand(3)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float16)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = evaluate(flow, x, label=label)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found.scores, expected.scores)
    assert (found.budget, found.checks) == (expected.budget, expected.checks)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (2, torch.float16)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in flow.modules()] == before[1]
    assert flow.like.dtype == before[2]
    assert all(torch.equal(before[0][key], value) for key, value in flow.state_dict().items())
    assert all(p.grad is None for p in flow.parameters())
    single = evaluate(flow, x, label=label, dtype=torch.float32)
    assert (single.dtype, flow.like.dtype) == ("float32", torch.float64)
    assert single.nll == pytest.approx(found.nll, abs=1e-4)
    with pytest.raises(ConfigError, match="dtype"):
        evaluate(flow, x, label=label, dtype=torch.int64)
    assert flow.training


def test_seed_determines_the_dequantization_noise() -> None:
    flow = images("glow")
    x = np.random.default_rng(0).integers(0, 16, (5, 1, 4, 4), dtype=np.uint8)
    one, same, other = (evaluate(flow, x, seed=seed, thorough=False).scores for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    found = evaluate(flow, x.astype(float), seed=1, dequantization_samples=3, batch_size=2, thorough=False)
    assert (found.dequantization_samples, found.bits_per_dim is None) == (3, False)


def test_standard_error_of_one_row_is_nan() -> None:
    found = evaluate(gaussian(), array(1))
    assert found.n == 1
    assert math.isnan(found.nll_stderr)
    assert found.nll == pytest.approx(-float(gaussian().log_prob(array(1))[0]))
    assert "1 row" in found.table()
    assert found._repr_html_()


def counts() -> Flow:
    return Flow((2,), Chain([Affine(2), Logit(4, 0.05)]), integer_valued=True, levels=4).eval()


@pytest.mark.parametrize(
    ("flow", "x", "said"),
    [
        (gaussian, array(0), "no rows"),
        (gaussian, array()[0], r"x\[None\]"),
        (gaussian, array(4, 3), r"\(4, 3\)"),
        (gaussian, np.array([[0.0, math.nan]]), "row 0"),
        (gaussian, np.array([["a", "b"]]), "'a'"),
        (gaussian, np.array([[1e39, 0.0]]), "float32"),
        (gaussian, torch.zeros(2, 2, dtype=torch.complex64), "complex"),
        (gaussian, None, "x"),
        (counts, array(), "whole number"),
        (counts, np.array([[0, 4]]), "0 to 3"),
        (lambda: images("glow"), np.zeros((2, 3, 4, 4), np.uint8), "shape"),
    ],
)
def test_invalid_rows_are_refused_with_a_one_line_message(flow: Any, x: Any, said: str) -> None:
    with pytest.raises(FlowtrainError, match=said) as caught:
        evaluate(flow(), x)
    assert "\n" not in str(caught.value)


def test_invalid_training_rows_are_refused() -> None:
    for rows, said in ((array(4, 3), "trained_on"), (array(0), "trained_on has no rows")):
        with pytest.raises(FlowtrainError, match=said):
            evaluate(gaussian(), array(), trained_on=rows)
    with pytest.raises(ConfigError, match="label"):
        evaluate(gaussian(), Rows(torch.zeros(3, 2)), label=[0, 1, 2])


def test_integer_and_float_arrays_of_integers_give_equal_nll() -> None:
    whole = np.array([[0, 1], [2, 3], [1, 1]])
    assert evaluate(gaussian(), whole).nll == pytest.approx(evaluate(gaussian(), whole.astype(float)).nll)
    assert evaluate(counts(), whole).nll == evaluate(counts(), whole.astype(float)).nll


def test_failed_checks_are_logged_and_shown_in_repr(caplog: pytest.LogCaptureFixture) -> None:
    flow = gaussian()
    with torch.no_grad():
        flow.bijection.mean.fill_(5.0)  # type: ignore[operator, union-attr]
    with caplog.at_level(logging.WARNING, "flowtrain"):
        found = evaluate(flow, array(), trained_on=array(seed=1))
    assert [check.name for check in found.failed] == ["baseline"]
    assert [record.name for record in caplog.records] == ["flowtrain"]
    assert "FAILED" in repr(found)
    assert found._repr_html_().count('class="FAILED"') == 1


class Cells(HTMLParser):
    """Collects the text and the open tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_evaluation_has_text_and_escaped_html_representations(caplog: pytest.LogCaptureFixture) -> None:
    found = evaluate(gaussian(), array(), trained_on=array(seed=1))
    assert str(found) == found.table()
    assert "\n" not in repr(found)
    assert found.headline in repr(found)
    # messages may contain text from users or libraries, which must be escaped
    object.__setattr__(found, "checks", (*found.checks, Check("<b>", 1.0, 0.5, False, "a < b & <script>")))
    html = Cells()
    html.feed(found._repr_html_())
    assert html.open == []
    assert {found.headline, "a < b & <script>", "<b>", "FAILED", "passed"} <= {*html.text}
    assert any("gaussian" in text for text in html.text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": "all"},
        {"dequantization_samples": 0},
        {"seed": -1},
        {"seed": "a"},
        {"dtype": "float64"},
        {"dtype": np.float64},
        {"other": 5},
        {"other": ("name", None)},
    ],
)
def test_invalid_argument_error_names_the_argument(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        evaluate(Flow((2,), Affine(2)), torch.zeros(5, 2), **wrong)


@pytest.mark.parametrize("flow", [None, torch.nn.Linear(2, 2), np.zeros((5, 2))])
def test_first_argument_must_be_a_flow(flow: Any) -> None:
    with pytest.raises(ConfigError, match="flow"):
        evaluate(flow, torch.zeros(5, 2))
