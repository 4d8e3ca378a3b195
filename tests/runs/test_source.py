"""`fit` and `train` with context and weights: how the arguments are given, and which are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowtrain
from flowtrain.flow import Flow
from flowtrain.models.realnvp import realnvp
from flowtrain.runs.fit import fit, train
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

pytestmark = pytest.mark.usefixtures("float32", "without_figures")
SMALL = {"trainer.batch_size": 64, "trainer.val_every": 5}
N = 200


class Frame:
    """A data frame with only the attributes that flowtrain needs."""

    def __init__(self, values: Any, columns: list[str]) -> None:
        self.values, self.columns = np.asarray(values), columns

    def to_numpy(self) -> Any:
        return self.values


@pytest.fixture
def context() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.column_stack([rng.normal(50, 20, N), rng.normal(size=N)])


@pytest.fixture
def x(context: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, 3)) + context[:, :1] * [0.1, 0, 0]


def fit_small(x: Any, **named: Any) -> Flow:
    return fit(x, **{"model": "affine", "steps": 5, "progress": False, "overrides": SMALL, **named})


def scores(flow: Flow, x: np.ndarray, context: np.ndarray) -> np.ndarray:
    return flow.log_prob(x, context)


def test_every_way_to_give_a_context_gives_the_same_flow(x: np.ndarray, context: np.ndarray, tmp_path: Path) -> None:
    joined = np.column_stack([x, context])
    np.savetxt(tmp_path / "x.csv", joined, delimiter=",", header="a,b,c,m,k", comments="")
    flows = {
        "array": fit_small(x, context=context),
        "tensor": fit_small(torch.from_numpy(x), context=torch.from_numpy(context)),
        "frame": fit_small(x, context=Frame(context, ["m", "k"])),
        "frames": fit_small(Frame(x, ["a", "b", "c"]), context=Frame(context, ["m", "k"])),
        "names": fit_small(Frame(joined, ["a", "b", "c", "m", "k"]), context=["m", "k"]),
        "positions": fit_small(joined, context=[3, 4]),
        "file": fit_small(tmp_path / "x.csv", context=["m", 4]),
        "run": fit_small(x, context=context, run_dir=tmp_path / "r"),
        "loaded": flowtrain.load(tmp_path / "r"),
    }
    wanted = scores(flows["array"], x, context)
    for name, flow in flows.items():
        np.testing.assert_allclose(scores(flow, x, context), wanted, atol=1e-4, err_msg=name)
    assert [column.name for column in flows["frames"].context] == ["m", "k"]
    assert [column.name for column in flows["array"].context] == ["context_0", "context_1"]
    assert flows["array"].record is not None
    # the columns of the context are not columns of the samples
    assert flows["array"].record.samples.columns == ()
    assert flows["names"].sample(2, context={"m": 50.0, "k": 0.0}).shape == (2, 3)


def test_one_column_of_context_and_weights(x: np.ndarray, context: np.ndarray) -> None:
    weights = np.ones(N)
    flow = fit_small(x, context=context[:, 0], weights=weights)
    np.testing.assert_allclose(
        scores(flow, x, context[:, 0]), scores(fit_small(x, context=context[:, :1]), x, context[:, 0]), atol=1e-3
    )
    joined = Frame(np.column_stack([x, weights]), ["a", "b", "c", "w"])
    by_name = fit_small(joined, context=context[:, 0], weights="w")
    np.testing.assert_allclose(scores(by_name, x, context[:, 0]), scores(flow, x, context[:, 0]), atol=1e-3)


def best_nll(flow: Flow) -> float:
    """Returns the lowest validation NLL of a fit."""
    assert flow.record is not None
    return min(float(row["nll"]) for row in flow.record.metrics if row["split"] == "val")


def test_held_out_sets_have_a_context(x: np.ndarray, context: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    other, theirs = rng.normal(size=(30, 3)), rng.normal(50, 20, size=(30, 2))
    flow = fit_small(x, context=context, val=(other, theirs), test={"x": other, "context": theirs})
    nll = -scores(flow, other, theirs).mean()
    assert best_nll(flow) == pytest.approx(nll, abs=1e-3)
    # columns are found by name
    named = Frame(theirs[:, ::-1], ["k", "m"])
    by_name = fit_small(x, context=Frame(context, ["m", "k"]), val=(other, named), test=(other, named))
    assert best_nll(by_name) == pytest.approx(nll, abs=1e-3)


def test_text_in_a_data_frame_is_a_categorical_context(x: np.ndarray, context: np.ndarray, tmp_path: Path) -> None:
    kinds = np.where(np.arange(N) % 3 == 0, "red", "blue").astype(object)
    x[:, 1] += 5 * (kinds == "red")
    frame = Frame(np.column_stack([context[:, :1].astype(object), kinds]), ["m", "kind"])
    flow = fit_small(x, context=frame, run_dir=tmp_path / "r")
    assert flow.context[1].categories == ("blue", "red")
    means = [flow.sample(400, context={"m": 50.0, "kind": kind})[:, 1].mean() for kind in ("blue", "red")]
    assert float(means[1] - means[0]) == pytest.approx(5, abs=0.5)
    again = flowtrain.load(tmp_path / "r")
    np.testing.assert_allclose(again.log_prob(x[:5], context=[[50.0, 1]] * 5), flow.log_prob(x[:5], [[50.0, 1]] * 5))
    with pytest.raises(DataError, match="green"):
        flow.sample(1, context={"m": 50.0, "kind": "green"})


def test_text_in_arrays_and_lists_is_a_categorical_context(x: np.ndarray) -> None:
    colours = np.random.default_rng(3).choice(["red", "green", "blue"], N)
    frame = Frame(np.column_stack([colours.astype(object)]), ["context_0"])
    expected = fit_small(x, context=frame)
    assert expected.context[0].categories == ("blue", "green", "red")
    for given in (colours, colours.astype(object), colours.tolist(), colours.astype(object)[:, None]):
        flow = fit_small(x, context=given)
        assert flow.context == expected.context
        np.testing.assert_array_equal(scores(flow, x, given), scores(expected, x, colours))
    mixed = np.column_stack([colours.astype(object), np.arange(N) / 7])
    for one in (mixed, mixed.tolist()):
        flow = fit_small(x[50:], context=one[50:], val=(x[:50], one[:50]))
        assert [column.kind for column in flow.context] == ["categorical", "real"]
        assert flow.sample(2, context=["red", 3.0]).shape == (2, 3)
    with pytest.raises(DataError, match="violet"):
        fit_small(x[50:], context=colours[50:], val=(x[:50], ["violet"] * 50))
    for role in ("label", "weights"):
        with pytest.raises(DataError, match="not a number"):
            fit_small(x, **{role: colours.tolist()})


def test_text_in_arrays_is_a_categorical_column(x: np.ndarray) -> None:
    colours = np.random.default_rng(3).choice(["red", "green", "blue"], N)
    rows = np.column_stack([x.astype(object), colours])
    with pytest.raises(DataError, match=r"data\.types"):
        fit_small(rows)
    found = []
    for given, overrides in ((rows, {3: "categorical"}), (Frame(rows, ["a", "b", "c", "k"]), {"k": "categorical"})):
        flow = fit_small(given, overrides={**SMALL, "data.types": overrides})
        assert flow.types[3].categories == ("blue", "green", "red")
        torch.manual_seed(0)
        found.append(flow.log_prob(given))
    np.testing.assert_array_equal(*found)
    with pytest.raises(DataError, match="violet"):
        flow.log_prob(np.array([[0.0, 0.0, 0.0, "violet"]], dtype=object))


@pytest.mark.parametrize(
    ("named", "error", "word"),
    [
        ({"context": np.zeros((5, 2))}, DataError, "context"),
        ({"context": ["mass"]}, ConfigError, "mass"),
        ({"context": [9]}, ConfigError, "9"),
        ({"context": True}, ConfigError, "context"),
        ({"context": {"mass": np.ones(N)}}, DataError, "context"),
        ({"context": np.full(N, np.nan)}, DataError, "context_0"),
        ({"context": np.ones(N)}, DataError, "context_0"),
        ({"context": np.full(N, "red", dtype=object)}, DataError, "constant"),
        ({"context": np.zeros(N), "label": np.zeros(N, int)}, ConfigError, "categorical"),
        ({"context": np.arange(N) * 1.0, "val": np.zeros((5, 3))}, DataError, "context"),
        ({"context": np.arange(N) * 1.0, "val": {"x": np.zeros((5, 3)), "weights": np.ones(5)}}, DataError, "context"),
        ({"val": {"x": np.zeros((5, 3)), "context": np.ones(5)}}, DataError, "val"),
        ({"weights": -np.ones(N)}, DataError, "weight"),
    ],
)
def test_invalid_contexts_are_refused(
    named: dict[str, Any], error: type[FlowtrainError], word: str, x: np.ndarray
) -> None:
    with pytest.raises(error, match=word):
        fit_small(x, **named)


def test_data_sets_and_columns_with_equal_names_are_refused(x: np.ndarray, context: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="context"):
        fit_small("moons", context=context)
    with pytest.raises(DataError, match="'b'"):
        fit_small(Frame(x, ["a", "b", "c"]), context=Frame(context, ["m", "b"]))


def test_a_flow_built_by_hand_is_trained_with_context(x: np.ndarray, context: np.ndarray, tmp_path: Path) -> None:
    flow = realnvp(3, context=2, layers=2, hidden=[8])
    train(flow, x, context=context, steps=20, progress=False, run_dir=tmp_path / "r")
    # the columns have the mean and the standard deviation of the training rows
    assert flow.context[0].mean == pytest.approx(50, abs=5)
    wanted = scores(flow, x, context)
    np.testing.assert_allclose(scores(flowtrain.load(tmp_path / "r"), x, context), wanted, atol=1e-5)
    # further training keeps the description of the context
    before = flow.context
    record = train(flow, x, context=3 * context, steps=5, progress=False)
    assert flow.context == before == record.samples.context
    flow.save(tmp_path / "flow.pt")
    np.testing.assert_allclose(scores(flowtrain.load(tmp_path / "flow.pt"), x, context), scores(flow, x, context))


def test_a_failed_training_does_not_change_the_context(x: np.ndarray, context: np.ndarray) -> None:
    flow = realnvp(3, context=2, layers=2, hidden=[8])
    before = flow.context
    with pytest.raises(FlowtrainError):
        train(flow, x, context=context, steps=5, progress=False, overrides={"trainer.lr": -1})
    with pytest.raises(DataError, match="context"):
        train(flow, x, context=context[:, 0], steps=5, progress=False)
    with pytest.raises(DataError, match="context"):
        train(flow, x, steps=5, progress=False)
    assert flow.context == before
