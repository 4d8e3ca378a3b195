"""Columns with other roles than the samples: labels, context and weights, in memory and streamed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain.data.in_memory import Extras
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

Refused = Callable[..., str]


def values_of(n: int = 600) -> np.ndarray:
    """Rows of two samples, two context columns and a weight. The second sample and the context determine each other."""
    rng = np.random.default_rng(0)
    context = rng.normal(5, 2, size=(n, 2))
    return np.column_stack([rng.normal(size=n), context[:, 0] + 10, context, rng.integers(0, 4, n)])


def table(path: Path, values: np.ndarray, names: str = "a,b,c,d,w") -> str:
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        np.savetxt(path, values, delimiter=",", header=names, comments="", fmt="%.17g")
    return str(path)


@pytest.mark.parametrize("memory_map", [True, False])
def test_context_and_weights_belong_to_their_rows(memory_map: bool, tmp_path: Path) -> None:
    values = values_of()
    path = table(tmp_path / "t.npy", values)
    data = ArrayData(path, context=[2, 3], weights=4, memory_map=memory_map)
    assert data.event_shape == (2,)
    drawn = [data.train_share(2, 50, 0, slice(10, 40)), data.context_share(2, 50, 0, slice(10, 40))]
    weights = data.weights_share(2, 50, 0, slice(10, 40))
    held = [(data.val, data.val_context, data.val_weights), (data.test, data.test_context, data.test_weights)]
    for x, c, w in [(*drawn, weights), *held]:
        assert c is not None
        assert w is not None
        assert (c.dtype, w.dtype) == (torch.float64, torch.float64)
        np.testing.assert_allclose(x[:, 1].numpy(), c[:, 0].numpy() + 10, rtol=1e-6)
        for row, weight in zip(c.numpy(), w.numpy(), strict=True):
            (at,) = np.flatnonzero(values[:, 2] == row[0])
            assert values[at, 3] == row[1]
            assert w is not weights or weight * values[held_free(data, values), 4].mean() == pytest.approx(
                values[at, 4]
            )


def held_free(data: ArrayData, values: np.ndarray) -> np.ndarray:
    """Returns the training rows."""
    return np.setdiff1d(np.arange(len(values)), np.concatenate(list(data.held_rows.values())))


@pytest.mark.parametrize("memory_map", [True, False])
def test_moments_are_weighted(memory_map: bool, tmp_path: Path, small_windows: None) -> None:
    values = values_of()
    data = ArrayData(table(tmp_path / "t.npy", values), context=[2, 3], weights=4, memory_map=memory_map)
    rows = values[held_free(data, values)]
    repeated = np.repeat(rows, rows[:, 4].astype(int), axis=0)
    moments = data.statistics()
    assert moments is not None
    np.testing.assert_allclose(moments[0], repeated[:, :2].mean(0), rtol=1e-10)
    np.testing.assert_allclose(moments[1], repeated[:, :2].std(0), rtol=1e-10)
    for i, column in enumerate(data.context):
        assert (column.mean, column.std) == pytest.approx((repeated[:, 2 + i].mean(), repeated[:, 2 + i].std()))
    weights = data.weights_share(0, data.n_train, 0, slice(None))
    assert weights is not None
    assert float(weights.mean()) == pytest.approx(1.0)


def test_signed_weights_may_cancel_within_a_block(tmp_path: Path, small_windows: None) -> None:
    values = values_of()
    values[:, 4] = np.where(np.arange(len(values)) % 3, 1.0, -0.5)
    path = table(tmp_path / "t.npy", values)
    options: dict[str, Any] = {"context": [2, 3], "weights": 4, "signed_weights": True}
    for memory_map in (True, False):
        data = ArrayData(path, memory_map=memory_map, **options)
        rows = values[held_free(data, values)]
        moments = data.statistics()
        assert moments is not None
        mean = np.average(rows[:, :2], axis=0, weights=rows[:, 4])
        variance = np.average((rows[:, :2] - mean) ** 2, axis=0, weights=rows[:, 4])
        np.testing.assert_allclose(moments[0], mean, rtol=1e-9)
        np.testing.assert_allclose(moments[1], np.sqrt(variance), rtol=1e-9)


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    data = ArrayData(table(tmp_path / "t.csv", values_of()), context=["d", "c"], weights="w")
    assert data.columns == ("a", "b")
    assert [column.name for column in data.context] == ["d", "c"]
    assert data.samples.weights == "w"
    assert 1 < len(data.samples.context_rows) <= 100


def test_context_is_part_of_the_checksum(tmp_path: Path) -> None:
    values = values_of()
    before = ArrayData(table(tmp_path / "a.npy", values), context=[2, 3], weights=4)
    values[7, 3] += 1
    after = ArrayData(table(tmp_path / "b.npy", values), context=[2, 3], weights=4)
    assert before.record != after.record


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"context": ["e"]}, ConfigError, ["data.context", "'e'"]),
        ({"context": ["a", "b", "c", "d"], "weights": "w"}, ConfigError, ["data.context", "data.weights"]),
        ({"context": ["c"], "weights": "c"}, ConfigError, ["'c'", "data.context", "data.weights"]),
        ({"context": ["c"], "label": "c"}, ConfigError, ["'c'", "data.label", "data.context"]),
        ({"weights": "0:2"}, ConfigError, ["data.weights=0:2"]),
        ({"weights": "a"}, DataError, ["column 'a'", "negative", "data.signed_weights"]),
        ({"context": ["c"], "label": "d"}, ConfigError, ["data.label", "data.context"]),
        ({"context": {"c": 1}}, ConfigError, ["data.context"]),
        ({"context": 2.5}, ConfigError, ["data.context", "2.5"]),
        ({"weights": "a", "signed_weights": 3}, ConfigError, ["data.signed_weights=3"]),
    ],
)
def test_invalid_roles_are_refused(
    options: dict[str, Any], error: type[FlowtrainError], words: list[str], tmp_path: Path, refused: Refused
) -> None:
    path = table(tmp_path / "t.csv", values_of())
    refused(lambda: ArrayData(path, **options), error, words)


def test_constant_context_and_weights_without_a_positive_mean_are_refused(tmp_path: Path, refused: Refused) -> None:
    values = values_of()
    values[:, 3] = 4.5
    refused(lambda: ArrayData(table(tmp_path / "t.csv", values), context=["d"]), DataError, ["'d'", "data.context"])
    values[:, 4] = 0
    refused(lambda: ArrayData(table(tmp_path / "u.csv", values), weights="w"), DataError, ["data.weights"])


@pytest.mark.parametrize("factor", [1e200, 1e-200])
@pytest.mark.parametrize("ending", ["csv", "npy"])
def test_weights_without_squares_in_float64_are_refused(
    factor: float, ending: str, tmp_path: Path, refused: Refused
) -> None:
    values = values_of()
    values[:, 4] *= factor
    path = table(tmp_path / f"t.{ending}", values)
    refused(lambda: ArrayData(path, weights=4, memory_map=ending == "npy"), DataError, [path])


def test_one_row_with_all_the_weight_is_refused(tmp_path: Path, refused: Refused) -> None:
    values = values_of()
    values[:, 4] = 1
    path = table(tmp_path / "t.csv", values)
    row = held_free(ArrayData(path, weights="w"), values)[0]
    values[row, 4] = 1e90
    refused(lambda: ArrayData(table(tmp_path / "t.csv", values), weights="w"), DataError, ["data.weights"])


def test_new_data_are_read_by_name_and_by_position(tmp_path: Path, refused: Refused) -> None:
    values = values_of()
    options: dict[str, Any] = {"context": ["c", "d"], "weights": "w"}
    samples = ArrayData(table(tmp_path / "t.csv", values), **options).samples
    order = [4, 3, 1, 2, 0]
    moved = RowsToScore(table(tmp_path / "moved.csv", values[:, order], "w,d,b,c,a"), samples, **options)
    assert moved.test_context is not None
    assert moved.test_weights is not None
    np.testing.assert_array_equal(moved.test.numpy(), values[:, :2])
    np.testing.assert_array_equal(moved.test_context.numpy(), values[:, 2:4])
    np.testing.assert_array_equal(moved.test_weights.numpy(), values[:, 4])
    # weights are optional, and the context is not
    bare = RowsToScore(table(tmp_path / "bare.csv", values[:, :4], "a,b,c,d"), samples, **options)
    assert bare.test_weights is None
    path = table(tmp_path / "less.csv", values[:, :3], "a,b,c")
    refused(lambda: RowsToScore(path, samples, **options), FlowtrainError, ["less.csv", "'d'"])

    by_position: dict[str, Any] = {"context": [2, 3], "weights": 4}
    samples = ArrayData(table(tmp_path / "t.npy", values), **by_position).samples
    again = RowsToScore(table(tmp_path / "new.npy", values), samples, **by_position)
    assert again.test_context is not None
    np.testing.assert_array_equal(again.test.numpy(), values[:, :2])
    np.testing.assert_array_equal(again.test_context.numpy(), values[:, 2:4])


def test_context_of_new_data_in_another_order_is_found_by_name(tmp_path: Path, refused: Refused) -> None:
    values = values_of()
    path = table(tmp_path / "t.csv", values)
    samples = ArrayData(path, context=["c", "d"], weights="w").samples
    options: dict[str, Any] = {"context": ["d", "c"], "weights": "w", "asked": ["context"]}
    context = RowsToScore(path, samples, **options).test_context
    assert context is not None
    np.testing.assert_array_equal(context.numpy(), values[:, 2:4])
    renamed = RowsToScore(table(tmp_path / "u.csv", values, "a,b,x,y,w"), samples, **options | {"context": ["y", "x"]})
    assert renamed.test_context is not None
    np.testing.assert_array_equal(renamed.test_context.numpy(), values[:, [3, 2]])
    without = ArrayData(path, columns=["a", "b"]).samples
    refused(lambda: RowsToScore(path, without, context=["c"], asked=["context"]), ConfigError, ["data.context"])


def test_extras_are_split_and_normalized() -> None:
    extras = Extras(torch.arange(5), None, torch.arange(5.0))
    first, second = extras.split([2, 3])
    assert second.label is not None
    assert second.label.tolist() == [2, 3, 4]
    assert first.context is None
    halved = extras.normalized(2.0).weights
    assert halved is not None
    assert halved.tolist() == [0, 0.5, 1, 1.5, 2]


@pytest.mark.parametrize(("categories", "warned"), [(200, True), (20, False)])
def test_rare_categories_of_a_context_cause_a_warning(
    categories: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        f"{float(x)!r},{-float(x * x)!r},id{i % categories}"
        for i, x in enumerate(np.random.default_rng(0).normal(size=600))
    ]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a,b,c", *rows]))
    ArrayData(path=str(path), context=["c"])
    assert ("'c'" in caplog.text) == warned
