"""data.types: reading of categories, ranges of types, moments, noise, hints and refusals."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers import Refused
from numpy.typing import NDArray

from flowtrain.bijections.support import ToSupport
from flowtrain.data.context import ContextColumn
from flowtrain.data.tables import streaming
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.column_types import guessed_type
from flowtrain.data.tables.from_memory import table_of, write_table
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.data.types import ColumnType, circular_columns, whole_columns_of
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.evaluation.result import OutlierCheck
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.runs.fit import fit, train
from flowtrain.runs.load import load
from flowtrain.utils.errors import CheckpointError, ConfigError, DataError, FlowtrainError

N = 200
TYPES = {"age": "positive", "p": "interval(0,1)", "phase": "circular(360)", "n": "integer", "colour": "categorical"}


def columns() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=N),
        "age": rng.gamma(2, 10, N),
        "p": np.round(rng.beta(1, 1, N), 2),
        "phase": rng.uniform(-500, 500, N),
        "n": rng.poisson(2, N),
        "colour": rng.choice(["red", "blue", "dark green"], N),
    }


def csv(path: Path, table: dict[str, Any]) -> str:
    pl.DataFrame(table).write_csv(path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ArrayData:
    return ArrayData(csv(tmp_path_factory.mktemp("types") / "t.csv", columns()), types=TYPES)


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".xlsx"])
def test_every_format_gives_the_same_samples(tmp_path: Path, data: ArrayData, ending: str) -> None:
    frame, path = pl.DataFrame(columns()), tmp_path / f"t{ending}"
    if ending == ".csv":
        frame.write_csv(path)
    elif ending == ".parquet":
        frame.with_columns(pl.col("colour").cast(pl.Categorical)).write_parquet(path)
    else:
        pytest.importorskip("xlsxwriter")
        frame.write_excel(path, float_precision=16)
    other = ArrayData(str(path), types=TYPES)
    assert other.types == data.types
    torch.testing.assert_close(other.val, data.val)


def test_categories_are_sorted_codes_with_noise(data: ArrayData) -> None:
    assert data.types[5].categories == ("blue", "dark green", "red")
    assert data.noisy == (4, 5)
    expected = np.unique(columns()["colour"], return_inverse=True)[1]
    codes = np.concatenate([data.train_batch(0, data.n_train or 0, 0)[:, 5], data.val[:, 5], data.test[:, 5]])
    assert np.bincount(np.floor(codes).astype(int)).tolist() == np.bincount(expected).tolist()
    assert (codes % 1 > 0).mean() > 0.99


def test_moments_are_those_of_the_noisy_rows_on_the_line(data: ArrayData) -> None:
    batches = torch.cat([data.train_batch(step, data.n_train or 0, 0) for step in range(200)]).double()
    low, high = zip(*(one.support for one in data.types), strict=True)
    scale = [one.scale for one in data.types]
    support = ToSupport(low, high, circular_columns(data.types), whole_columns_of(data.types), scale)
    z = support.map_inverse(batches)
    statistics = data.statistics()
    assert statistics is not None
    mean, std = statistics
    real = [0, 1, 2, 4, 5]
    torch.testing.assert_close(mean[real], z.mean(0)[real], atol=0.1, rtol=0)
    torch.testing.assert_close(std[real], z.std(0)[real], atol=0.1, rtol=0.1)
    assert (mean[3], std[3]) == (0, 1)


def test_values_at_the_ends_of_an_interval_get_new_noise_in_each_step(tmp_path: Path) -> None:
    table = {"p": np.repeat([0.0, 1.0, 0.25, 0.5, 0.75, 0.6, 0.3, 0.2, 0.1, 0.9], 5)}
    data = ArrayData(csv(tmp_path / "t.csv", table), types={"p": "interval(0,1)"})
    first, second = (data.train_batch(step, 40, 0) for step in (0, 1))
    assert ((first > 0) & (first < 1)).all()
    assert len({*first[first < 1e-4].tolist()} & {*second[second < 1e-4].tolist()}) == 0
    assert torch.equal(ArrayData(csv(tmp_path / "t.csv", table), types={"p": "interval(0,1)"}).val, data.val)


def test_angles_are_wrapped_before_they_are_rounded(tmp_path: Path) -> None:
    seconds = 1.6e9 + 3600.0 * np.arange(100)
    data = ArrayData(csv(tmp_path / "t.csv", {"t": seconds}), types={"t": "circular(86400)"})
    assert set(data.val.flatten().tolist()) <= set(np.mod(seconds, 86400).tolist())


def test_streamed_and_in_memory_tables_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK", 50 * 4 * 8)
    table = columns()
    np.save(tmp_path / "t.npy", np.column_stack([table[name] for name in ("age", "p", "phase", "n")]))
    types = {0: "positive", 1: "interval(0,1)", 2: "circular(360)", 3: "integer"}
    path = str(tmp_path / "t.npy")
    one, other = (ArrayData(path, types=types, memory_map=given) for given in (True, False))
    assert one.types == other.types
    a, b = one.statistics(), other.statistics()
    assert a is not None
    assert b is not None
    # the held-out rows differ
    torch.testing.assert_close(a[0], b[0], atol=0.3, rtol=0)
    torch.testing.assert_close(a[1], b[1], atol=0.3, rtol=0)
    with pytest.raises(ConfigError, match="memory_map"):
        ArrayData(path, types={3: "categorical"}, memory_map=True)


def test_moments_of_repeated_rows_equal_those_of_weights(tmp_path: Path) -> None:
    table = {"n": np.array([0, 1, 2, 5] * 10), "a": np.linspace(1, 9, 40), "w": np.array([1, 2, 3, 1] * 10)}
    repeated = {name: np.repeat(values, table["w"]) for name, values in table.items()}
    types, own = {"n": "integer(0,9)", "a": "positive"}, csv(tmp_path / "v.csv", table)
    held = {"val_path": own, "test_path": own, "weights": "w"}
    weighted = ArrayData(csv(tmp_path / "t.csv", table), types=types, **held).statistics()
    repeated["w"] = np.ones_like(repeated["w"])
    equal = ArrayData(csv(tmp_path / "r.csv", repeated), types=types, **held).statistics()
    assert weighted is not None
    assert equal is not None
    torch.testing.assert_close(weighted[0][0], equal[0][0])
    torch.testing.assert_close(weighted[1][0], equal[1][0])


def test_categories_in_numbers_and_text_of_a_frame(tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": np.arange(40.0), "k": [7, 3] * 20, "s": ["b", "a"] * 20})
    table = table_of(frame)
    data = ArrayData(table, types={"k": "categorical", "s": "categorical"})
    assert [one.categories for one in data.types] == [(), (3.0, 7.0), ("a", "b")]
    write_table(tmp_path / "t.npz", table)
    again = ArrayData(str(tmp_path / "t.npz"), types={"k": "categorical", "s": "categorical"})
    assert again.types == data.types
    assert torch.equal(again.val, data.val)


def test_context_columns_may_contain_text(tmp_path: Path) -> None:
    path = csv(tmp_path / "t.csv", columns())
    data = ArrayData(path, columns=["x", "age"], context=["colour", "n"])
    assert data.context[0] == ContextColumn("colour", "categorical", categories=("blue", "dark green", "red"))
    assert data.context[1].kind == "real"
    given = ArrayData(path, columns=["x"], context=["n"], types={"n": "categorical"})
    assert given.context[0].categories == tuple(map(float, sorted(set(columns()["n"].tolist()))))
    assert data.val_context is not None
    assert set(data.val_context[:, 0].tolist()) <= {0.0, 1.0, 2.0}


def test_new_rows_use_the_categories_of_training(tmp_path: Path, data: ArrayData) -> None:
    new = {name: values[:3] for name, values in columns().items()} | {"colour": ["red", "red", "blue"]}
    rows = RowsToScore(csv(tmp_path / "new.csv", new), data.samples)
    assert rows.test[:, 5].floor().tolist() == [2, 2, 0]
    # values outside of a range are scored
    RowsToScore(csv(tmp_path / "out.csv", new | {"age": [-1.0, 2, 3]}), data.samples)


def test_new_categories_are_refused_with_their_line(tmp_path: Path, data: ArrayData, refused: Refused) -> None:
    new = {name: values[:2] for name, values in columns().items()} | {"colour": ["red", "pink"]}
    path = csv(tmp_path / "new.csv", new)
    refused(lambda: RowsToScore(path, data.samples), DataError, ["line 3", "'colour'", "'pink'"])
    train = csv(tmp_path / "t.csv", columns())
    refused(lambda: ArrayData(train, test_path=path, types=TYPES), DataError, ["new.csv", "line 3", "'pink'"])


@pytest.mark.parametrize(
    ("types", "fragments"),
    [
        ({"nothing": "positive"}, ["data.types", "nothing"]),
        ({"age": "postive"}, ["data.types.age", "positive"]),
        ({"x": "positive"}, ["'x'", "line"]),
        ({"age": "interval(0,1)"}, ["'age'", "line", "interval(0,1)"]),
        ({"n": "integer(1,9)"}, ["'n'", "integer(1,9)"]),
        ({"x": "integer"}, ["'x'", "whole"]),
        ({"age": "positive", 1: "positive"}, ["'age'", "two types"]),
    ],
    ids=str,
)
def test_types_that_do_not_fit_are_refused(
    tmp_path: Path, refused: Refused, types: dict[str | int, str], fragments: list[str]
) -> None:
    path = csv(tmp_path / "t.csv", columns())
    refused(lambda: ArrayData(path, types={"colour": "categorical", **types}), (DataError, ConfigError), fragments)


def test_text_without_a_type_names_the_ways_out(tmp_path: Path, refused: Refused) -> None:
    path = csv(tmp_path / "t.csv", columns())
    refused(lambda: ArrayData(path), DataError, ["'colour'", "data.columns=[0:5]", "{colour: categorical}"])


@pytest.mark.parametrize(
    "options",
    [
        {"levels": 9},
        {"dequantize": True},
        {"event_shape": [1, 1, 2]},
        {"context": ["age"]},
        {"weights": "age"},
        {"columns": ["x", "n"]},
    ],
    ids=str,
)
def test_settings_that_exclude_types_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    table = {name: values for name, values in columns().items() if name != "colour"}
    with pytest.raises(ConfigError, match=r"data\.types"):
        ArrayData(csv(tmp_path / "t.csv", table), types={"age": "positive"}, **options)


def test_rows_with_missing_categories_are_left_out(tmp_path: Path) -> None:
    table = columns()
    table["colour"][:5] = ["", "NA", "?", "unknown", "red"]
    data = ArrayData(csv(tmp_path / "t.csv", table), types=TYPES, missing="drop", na=["unknown", 1e9])
    assert data.types[5].categories == ("blue", "dark green", "red")
    assert (data.n_train or 0) + len(data.val) + len(data.test) == N - 4


def test_numbers_that_count_as_missing_are_not_codes_of_text(tmp_path: Path) -> None:
    table = {"x": np.arange(40.0) + 0.5, "k": ["a", "b", "7", "c"] * 10}
    data = ArrayData(csv(tmp_path / "t.csv", table), types={"k": "categorical"}, missing="drop", na=[0, 7])
    assert data.types[1].categories == ("a", "b", "c")
    assert (data.n_train or 0) + len(data.val) + len(data.test) == 30


# Hints

RNG = np.random.default_rng(0)


def scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.min()) / np.ptp(values)


@pytest.mark.parametrize(
    ("values", "guess"),
    [
        (RNG.normal(size=500), None),
        (RNG.normal(100, 1, 500), None),
        (np.exp(RNG.normal(size=500)), "positive"),
        (RNG.uniform(size=500), "interval(0,1)"),
        (RNG.beta(0.5, 0.5, 500), "interval(0,1)"),
        (np.clip(RNG.normal(0.5, 0.4, 500), 0, 1), "interval(0,1)"),
        # columns that were scaled to [0, 1], which are not bounded there
        *((scaled(draw), None) for draw in (RNG.normal(size=500), RNG.exponential(size=500), RNG.standard_t(3, 500))),
        (0.5 + 0.01 * RNG.normal(size=500), None),
        (RNG.uniform(0, 360, 500), "circular(360)"),
        (np.degrees(RNG.vonmises(0, 1, 500)), "circular(360)"),
        (RNG.vonmises(0, 1, 500) % (2 * np.pi), f"circular({2 * np.pi:.16g})"),
        (RNG.gamma(20, 10, 500), None),
        (RNG.poisson(3, 500).astype(float), "integer"),
        (RNG.permutation(500).astype(float), None),
    ],
)
def test_types_are_guessed(values: NDArray[np.float64], guess: str | None) -> None:
    assert guessed_type(values) == guess


def test_hint_has_the_option_for_columns_without_a_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flowtrain")
    rng = np.random.default_rng(0)
    table = {"x": rng.normal(size=400), "age": np.exp(rng.normal(size=400)), "a b": rng.permutation(400) / 399}
    ArrayData(csv(tmp_path / "t.csv", table))
    assert "'age' looks positive, 'a b' looks bounded" in caplog.text
    assert "'data.types={age: positive, 2: interval(0,1)}'" in caplog.text
    caplog.clear()
    ArrayData(csv(tmp_path / "t.csv", table), types={"age": "positive", "a b": "interval(0,1)"})
    assert "data.types" not in caplog.text


# In Python


def test_frames_with_text_are_fitted_scored_saved_and_loaded(tmp_path: Path, refused: Refused) -> None:
    frame = pl.DataFrame(columns())
    small = {"model.layers": 2, "model.hidden": [4], "model.bins": 4}
    flow = fit(frame, model="nsf", steps=5, progress=False, overrides={"data.types": TYPES, **small})
    flow.save(tmp_path / "f.pt")
    again = load(tmp_path / "f.pt")
    assert again.types == flow.types
    scores = []
    for one in (flow, again):
        torch.manual_seed(0)
        scores.append(one.log_prob(frame))
    np.testing.assert_array_equal(*scores)
    assert np.isfinite(scores[0]).all()
    assert evaluate(flow, frame).nll == pytest.approx(-scores[0].mean(), abs=1)
    refused(lambda: flow.log_prob(frame.with_columns(colour=pl.lit("pink"))), DataError, ["'pink'", "'colour'"])
    ensemble = Ensemble([flow, again])
    assert ensemble.types == flow.types
    assert set(ensemble.quantized(ensemble.sample(50))[:, 5].tolist()) <= {0.0, 1.0, 2.0}


def test_damaged_types_in_a_file_are_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame(columns()).select("x", "age")
    flow = fit(frame, model="affine", steps=2, progress=False, overrides={"data.types": {"age": "positive"}})
    flow.save(tmp_path / "f.pt")
    saved = torch.load(tmp_path / "f.pt", weights_only=True)
    saved["samples"]["types"][1]["low"] = float("nan")
    torch.save(saved, tmp_path / "f.pt")
    with pytest.raises(CheckpointError):
        load(tmp_path / "f.pt")


def test_search_uses_models_that_can_have_circular_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame(columns()).select("x", "phase")
    flow = fit(frame, steps=2, minutes=0.5, progress=False, overrides={"data.types": {"phase": "circular(360)"}})
    assert all(one.base.circular == (1,) for one in flow.flows)


@pytest.mark.parametrize("model", ["realnvp", "affine", "mixture", "glow"])
def test_other_models_refuse_circular_columns_by_name(model: str, refused: Refused) -> None:
    frame = pl.DataFrame(columns()).select("x", "phase")
    keys = {"data.types": {"phase": "circular(360)"}}
    refused(lambda: fit(frame, model=model, steps=2, overrides=keys), ConfigError, [model, "phase"])


def test_held_out_frames_may_have_another_order_of_columns() -> None:
    frame = pl.DataFrame(columns()).select("x", "colour", "age")
    held = frame[:20].select("age", "colour", "x")
    types = {"age": "positive", "colour": "categorical"}
    flow = fit(frame, model="affine", val=held, test=held, steps=2, progress=False, overrides={"data.types": types})
    assert flow.types[1].categories == ("blue", "dark green", "red")


def test_flows_with_types_are_trained_further() -> None:
    frame = pl.DataFrame(columns()).select("x", "colour", "age")
    types = {"age": "positive", "colour": "categorical"}
    flow = fit(frame, model="affine", steps=2, progress=False, overrides={"data.types": types})
    train(flow, frame, steps=3, progress=False)
    assert flow.log_prob(frame).shape == (N,)
    types_before = flow.types
    train(flow, frame.filter(pl.col("colour") != "red"), steps=3, progress=False)
    assert flow.types == types_before
    with pytest.raises(DataError, match="'pink'"):
        train(flow, frame.with_columns(colour=pl.lit("pink")), steps=3, progress=False)


def test_dequantize_of_all_columns_applies_to_columns_without_a_type(tmp_path: Path) -> None:
    table = {name: np.random.default_rng(i).poisson(3, N) for i, name in enumerate("ab")}
    data = ArrayData(csv(tmp_path / "t.csv", table), types={"a": "integer"}, dequantize=["a", "b"])
    assert data.noisy == (0, 1)


def test_advice_on_counts_does_not_conflict_with_types(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {name: np.random.default_rng(i).poisson(3, N) for i, name in enumerate("ab")}
    with caplog.at_level(logging.WARNING):
        ArrayData(csv(tmp_path / "t.csv", table), types={"a": "integer"})
    assert "data.types" in caplog.text
    assert "data.dequantize" not in caplog.text


def test_hint_of_many_columns_is_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.INFO):
        ArrayData(csv(tmp_path / "t.csv", {f"column{i}": rng.random(N) for i in range(60)}))
    assert 5 < caplog.text.count("interval(0,1)") < 20


def test_evaluation_names_columns_with_values_outside_of_their_range() -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"x": rng.normal(size=N), "age": rng.gamma(2, 1, N), "p": rng.random(N)})
    settings = {"data.types": {"age": "positive", "p": "interval(0,1)"}, "model": "realnvp", "trainer.steps": 2}
    flow = fit(frame, overrides=settings)
    frame[3, "age"] = -1.0
    found = evaluate(flow, frame)
    check = next(each for each in found.checks if each.name == "concentration")
    assert found.nll == math.inf
    assert isinstance(check, OutlierCheck)
    assert check.rows == (3,)
    assert check.message is not None
    assert "'age'" in check.message
    assert "'p'" not in check.message


def test_members_of_an_ensemble_may_have_other_scales_but_not_other_ranges() -> None:
    flows = []
    for age in (ColumnType.parse("positive"), replace(ColumnType.parse("positive"), scale=0.5), ColumnType()):
        low, high = age.support
        flows.append(Flow((1,), ToSupport([low], [high], scale=[age.scale]), types=(age,)))
    assert Ensemble(flows[:2]).log_prob(torch.ones(2, 1)).isfinite().all()
    with pytest.raises(FlowtrainError, match="types"):
        Ensemble(flows[::2])
