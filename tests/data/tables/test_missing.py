"""data=array: missing values are refused with their numbers by column, or their rows are left out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from helpers import Refused
from helpers.files import normal, npy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowtrain
from flowtrain.data.tables import csv_reader
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.from_memory import table_of, write_table
from flowtrain.data.tables.missing import missing_of
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.data.tables.table_reader import read_table
from flowtrain.utils.errors import ConfigError, DataError

DROP = missing_of("drop", None)


def holed(n: int = 120, d: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows with missing values, and the numbers of the complete rows."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(n, d))
    values[rng.random((n, d)) < 0.08] = np.nan
    return values, np.flatnonzero(~np.isnan(values).any(1))


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv", "memory"])
def test_dropped_rows_leave_the_data_of_the_complete_rows(tmp_path: Path, ending: str) -> None:
    values, complete = holed()
    path: Any = str(tmp_path / f"t{ending}")
    if ending == ".csv":
        pl.DataFrame(values, schema=["a", "b", "c"]).with_columns(pl.all().fill_nan(None)).write_csv(path)
    elif ending == "memory":
        path = table_of(values)
    else:
        (np.save if ending == ".npy" else np.savez)(path, values)
    data = ArrayData(path, missing="drop")
    other = ArrayData(npy(tmp_path / "complete.npy", values[complete]))
    assert data.record == other.record
    assert torch.equal(data.train_batch(0, 50, 0), other.train_batch(0, 50, 0))
    for name in ("val", "test"):
        # the row numbers are those of the file
        np.testing.assert_array_equal(data.held_rows[name], complete[other.held_rows[name]])
        np.testing.assert_allclose(data.split(name).numpy(), values[data.held_rows[name]].astype(np.float32))


def test_held_out_files_are_treated_like_the_training_file(tmp_path: Path, refused: Refused) -> None:
    values, complete = holed()
    train, test = npy(tmp_path / "t.npy", normal(50, 3)), npy(tmp_path / "test.npy", values)
    refused(lambda: ArrayData(train, test_path=test), DataError, [test, "data.missing=drop"])
    data = ArrayData(train, test_path=test, val_path=test, missing="drop")
    assert len(data.test) == len(data.val) == len(complete)


def test_only_the_used_columns_count(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,c,y\n1,,5,0\n2,4,,1\n3,4,6,\n4,5,6,1\n")
    assert read_table(path, columns=["a", "b"], missing=DROP).values.tolist() == [[2, 4], [3, 4], [4, 5]]
    data = ArrayData(npy(tmp_path / "t.npy", holed()[0]), columns=[0], label=None, missing="drop")
    assert data.n_train is not None
    assert data.n_train + len(data.val) + len(data.test) == np.isfinite(holed()[0][:, 0]).sum()
    table = read_table(path, columns=["a", "y"], missing=DROP)
    assert (table.values.tolist(), table.row_name(2)) == ([[1, 0], [2, 1], [4, 1]], "line 5")


def test_message_counts_by_column_largest_first(tmp_path: Path, refused: Refused) -> None:
    values = normal(40, 13)
    for column in range(12):
        values[20 - column : 20, column] = np.nan
    message = refused(lambda: read_table(npy(tmp_path / "t.npy", values)), DataError, ["data.missing=drop"])
    counted = re.findall(r"'c(\d+)': (\d+), first in row (\d+)", message)
    assert [tuple(map(int, each)) for each in counted] == [(c, c, 20 - c) for c in range(11, 1, -1)]
    assert "'data.columns=[0,12]'" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_can_count_as_missing(tmp_path: Path, dtype: type, refused: Refused) -> None:
    values = normal(60, 2).astype(dtype)
    values[[3, 7], 1], values[9, 0] = -999.9, np.inf
    path = npy(tmp_path / "t.npy", values)
    refused(lambda: read_table(path, missing=missing_of(None, [-999.9])), DataError, ["'c1': 2", "first in row 3"])
    # infinite values are not missing values, unless they are named
    refused(lambda: read_table(path, missing=missing_of("drop", -999.9)), DataError, ["row 9", "inf"])
    table = read_table(path, missing=missing_of("drop", [-999.9, np.inf]))
    np.testing.assert_array_equal(table.values, np.delete(values, [3, 7, 9], axis=0))
    assert table.row_name(3) == "row 4 (from 0)"


@pytest.mark.parametrize("ending", [".csv", ".npy", "streamed", "memory"])
@pytest.mark.parametrize("role", ["context", "label", "weights"])
def test_advice_on_a_missing_value_of_a_role_does_not_choose_columns_of_samples(
    role: str, ending: str, tmp_path: Path
) -> None:
    values = np.column_stack([normal(60, 2), np.arange(60) % 3])
    values[7, 2] = np.nan
    keys: dict[str, Any] = {role: "c2" if role != "context" else ["c2"]}
    if ending == "memory":
        path: Any = table_of(values)
    elif ending == ".csv":
        path = str(tmp_path / "t.csv")
        pl.DataFrame(values, schema=["a", "b", "c2"]).with_columns(pl.all().fill_nan(None)).write_csv(path)
    else:
        path = npy(tmp_path / "t.npy", values)
        keys[role] = 2 if role != "context" else [2]
        keys["memory_map"] = ending == "streamed"
    with pytest.raises(DataError) as error:
        ArrayData(path, **keys)
    assert "data.missing=drop" in str(error.value)
    assert "data.columns" not in str(error.value)
    assert ("out of data.context" in str(error.value)) == (role == "context")
    if ending != "streamed":
        assert ArrayData(path, missing="drop", **keys).n_train == 47


def test_advice_on_missing_values_keeps_columns_of_samples_only(tmp_path: Path) -> None:
    values = np.column_stack([normal(60, 3), np.arange(60) % 3])
    values[7, [1, 3]] = np.nan
    path = npy(tmp_path / "t.npy", values)
    with pytest.raises(DataError) as error:
        ArrayData(path, context=[0, 3])
    assert "'data.columns=[2]' and leave 'c3' out of data.context" in str(error.value)
    assert ArrayData(path, context=[0], columns=[2]).event_shape == (1,)
    with pytest.raises(DataError) as error:
        RowsToScore(path, ArrayData(npy(tmp_path / "whole.npy", normal(60, 4))).samples)
    assert "data.columns" not in str(error.value)


@pytest.mark.parametrize("ending", [".csv", ".npz", ".parquet", "memory"])
def test_advice_on_text_of_a_role_does_not_choose_columns_of_samples(ending: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": normal(60, 1)[:, 0], "b": normal(60, 1)[:, 0], "c": ["x", "y"] * 30})
    path: Any = str(tmp_path / f"t{ending}")
    if ending == ".csv":
        frame.write_csv(path)
    elif ending == ".parquet":
        frame.write_parquet(path)
    elif ending == ".npz":
        write_table(Path(path), table_of(frame))
    else:
        path = table_of(frame)
    for role in ("label", "weights"):
        with pytest.raises(DataError) as error:
            ArrayData(path, **{role: "c"})
        assert f"data.{role}" in str(error.value) or "data.context" in str(error.value)
        assert not {"data.columns", "data.types"} & set(re.findall(r"data\.\w+", str(error.value)))
    assert ArrayData(path, context=["c"]).context[0].categories == ("x", "y")


def test_text_can_count_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\nUnknown ,4\n5,-999\n7,-999.0\n9,8\n")
    table = read_table(path, missing=missing_of("drop", ["unknown", "-999"]))
    assert table.values.tolist() == [[1, 2], [9, 8]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(
        st.lists(
            st.sampled_from(["1", "-2.5", "", " ", "NA", " na ", "-", "?", "gone", "nan", '"NA"', "3e2"]),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=8,
    ),
    delimiter=st.sampled_from(",;\t|"),
)
def test_fast_and_exact_readers_agree_on_missing_cells(tmp_path: Path, cells: list[list[str]], delimiter: str) -> None:
    text = "\n".join([delimiter.join("abcd"), *(delimiter.join([*row, "7"]) for row in cells)])
    (tmp_path / "t.csv").write_text(text + "\n")
    missing = missing_of("drop", ["Gone"])
    usual = {"", "na", "-", "?", "gone", "nan"}
    rows = [[cell.strip().strip('"').lower() for cell in row] for row in cells]
    expected = [[*map(float, row), 7] for row in rows if not usual & set(row)]
    for fast in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not fast:
                patched.setattr(csv_reader, "_read_with_numpy", lambda *_, **named: None)
            if expected:
                assert read_table(tmp_path / "t.csv", missing=missing).values.tolist() == expected
            else:
                with pytest.raises(DataError):
                    read_table(tmp_path / "t.csv", missing=missing)


def test_file_with_empty_cells_uses_the_fast_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(csv_reader, "_read_by_cell")
    (tmp_path / "t.txt").write_text("a b\n1 2\nNA 3\n-4 gone\n-5 6\n")
    table = read_table(tmp_path / "t.txt", missing=missing_of("drop", ["gone"]))
    assert (table.values.tolist(), table.row_name(1)) == ([[1, 2], [-5, 6]], "line 5")


@pytest.mark.parametrize("options", [{"missing": "ignore"}, {"missing": True}, {"na": [True]}, {"na": {"a": 1}}])
def test_invalid_settings_are_refused(tmp_path: Path, options: dict[str, Any], refused: Refused) -> None:
    path = npy(tmp_path / "t.npy", normal(50, 2))
    refused(lambda: ArrayData(path, **options), ConfigError, [f"data.{next(iter(options))}="])


def test_table_without_complete_rows_is_refused(tmp_path: Path, refused: Refused) -> None:
    values = np.where(np.eye(3, dtype=bool), np.nan, 1.0)
    refused(lambda: read_table(npy(tmp_path / "t.npy", values), missing=DROP), DataError, ["no row", "'c0': 1"])


def test_streamed_files_are_refused(tmp_path: Path, refused: Refused) -> None:
    values = normal(400, 3)
    path = npy(tmp_path / "t.npy", values)
    assert ArrayData(path, memory_map=True, missing="drop").n_train == 320
    values[7, 1] = -999
    npy(tmp_path / "t.npy", values)
    options: dict[str, Any] = {"missing": "drop", "na": [-999]}
    refused(lambda: ArrayData(path, memory_map=True, **options), DataError, ["row 7", "'c1'", "data.memory_map=false"])
    assert ArrayData(path, memory_map=False, **options).n_train == 319


def with_advice(options: dict[str, Any], message: str) -> dict[str, Any]:
    """Returns the options of `ArrayData` after those that a message names."""
    advice = re.findall(r"data\.(na|missing|memory_map)=(\[[^\]]*\]|\w+)", message)
    return {**options, **{key: yaml.safe_load(value) for key, value in advice}}


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize("missing", ["refuse", "drop"])
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.nan, -np.inf]], ids=str)
def test_following_the_advice_on_missing_values_once_is_enough(
    bad: list[float], missing: str, memory_map: bool, tmp_path: Path
) -> None:
    values = normal(400, 3)
    values[7 : 7 + len(bad), 1] = bad
    options = {"missing": missing, "memory_map": memory_map}
    path = npy(tmp_path / "t.npy", values)
    if missing == "drop" and np.isnan(bad).all() and not memory_map:
        ArrayData(path, **options)
        return
    with pytest.raises(DataError) as error:
        ArrayData(path, **options)
    assert ArrayData(path, **with_advice(options, str(error.value))).n_train <= 320


@pytest.mark.parametrize("memory_map", [True, False])
def test_following_the_advice_on_codes_once_is_enough(
    memory_map: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = normal(400, 3)
    values[:40, 1] = -999
    options = {"missing": "refuse", "memory_map": memory_map}
    path = npy(tmp_path / "t.npy", values)
    ArrayData(path, **options)
    assert ArrayData(path, **with_advice(options, caplog.text)).n_train < 300


def test_rows_to_score_keep_their_places(tmp_path: Path) -> None:
    values, complete = holed()
    samples = ArrayData(npy(tmp_path / "t.npy", values[complete])).samples
    rows = RowsToScore(npy(tmp_path / "new.npy", values), samples, missing="drop")
    np.testing.assert_array_equal(rows.test.numpy(), values[complete])
    spread = rows.for_each_row(rows.test.numpy())
    np.testing.assert_array_equal(spread[complete], values[complete])
    assert np.isnan(np.delete(spread, complete, axis=0)).all()
    with pytest.raises(DataError):
        RowsToScore(tmp_path / "new.npy", samples)


# Codes for missing values

REAL = normal(1000, 2, seed=4)


def coded(code: float, share: float, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    values = REAL * scale + shift
    values[: round(share * len(values)), 1] = code
    return values[np.random.default_rng(0).permutation(len(values))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (coded(-999, 0.004), True),
        (coded(99, 0.03, scale=40, shift=80), True),
        (coded(-1, 0.03, scale=3), True),
        (coded(-1, 0.03, scale=5, shift=100) ** 1, True),
        (coded(0.5, 0.03), False),
        (coded(-1, 0.003, scale=3), False),
        (np.round(coded(-1, 0.03, scale=3)), False),
        (REAL.clip(-1, None), False),
    ],
    ids=str,
)
def test_codes_are_named_in_a_warning(
    values: np.ndarray, expected: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = npy(tmp_path / "t.npy", values)
    ArrayData(path)
    option = re.search(r"data\.na=\[(\S+)\]", caplog.text)
    assert (option is not None) == expected, caplog.text
    if option is not None:
        caplog.clear()
        ArrayData(path, na=[float(option[1])], missing="drop")
        assert "data.na" not in caplog.text


# Rows in memory


def fitted(x: Any, **named: Any) -> flowtrain.Flow:
    return flowtrain.fit(x, model="affine", steps=3, progress=False, **named)


def equal(a: flowtrain.Flow, b: flowtrain.Flow) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def as_frame(values: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame(values, schema=["a", "b", "c"]).with_columns(pl.all().fill_nan(None))


def as_text(values: np.ndarray) -> pl.DataFrame:
    """A frame in which a column of text has the numbers."""
    return as_frame(values).with_columns(pl.col("b").cast(pl.String).fill_null("gone"))


MEMORY: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda values: values,
    "tensor": torch.from_numpy,
    "masked array": lambda values: np.ma.masked_invalid(values),
    "objects": lambda values: np.where(np.isnan(values), None, values),
    "frame": as_frame,
    "frame with text": as_text,
}


@pytest.mark.parametrize("kind", MEMORY)
def test_fit_leaves_out_rows_with_missing_values(kind: str, tmp_path: Path) -> None:
    values, complete = holed()
    x = MEMORY[kind](values)
    with pytest.raises(DataError):
        fitted(x)
    drop = {"data.missing": "drop", "data.na": ["gone"]}
    flow = fitted(x, overrides=drop)
    assert equal(flow, fitted(values[complete]))
    assert flow.record is not None
    held = np.concatenate(list(flow.record.held_out.values()))
    assert np.isfinite(values[held]).all()
    assert equal(flow, fitted(x, overrides=drop, run_dir=tmp_path / "run"))


def test_fit_reads_typed_files(tmp_path: Path) -> None:
    values, complete = holed()
    as_frame(values).write_parquet(tmp_path / "t.parquet")
    flow = fitted(tmp_path / "t.parquet", overrides={"data.missing": "drop"})
    assert equal(flow, fitted(values[complete]))


def test_frame_names_all_columns_of_text(refused: Refused) -> None:
    frame = pl.DataFrame({"a": [1.0, 2.0], "who": ["x", "y"], "b": [1, 2], "what": ["u", "v"]})
    refused(lambda: fitted(frame), DataError, ["'x'", "'who'", "'what'", "data.columns=[0,2]"])


def test_the_message_on_text_in_memory_is_about_the_cells_that_are_not_numbers() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 2)).astype(object)
    rows[3, 0] = "oops"
    with pytest.raises(DataError, match=r"'oops' is not a number.*in 1 cell") as caught:
        flowtrain.fit(rows, model="affine", steps=2, progress=False)
    assert 'data.na=["oops"]' in str(caught.value)
    overrides = ["data.na=[oops]", "data.missing=drop"]
    flowtrain.fit(rows, model="affine", steps=2, progress=False, overrides=overrides)


def test_the_advice_on_text_in_memory_keeps_the_column_of_weights() -> None:
    rows = np.random.default_rng(0).exponential(size=(60, 4)).astype(object)
    rows[3, 0] = "oops"
    keys: dict[str, Any] = {"model": "affine", "weights": 3, "steps": 2, "progress": False}
    with pytest.raises(DataError) as caught:
        flowtrain.fit(rows, **keys)
    [advice] = re.findall(r"'(data\.columns=[^']*)'", str(caught.value))
    assert flowtrain.fit(rows, overrides=[advice], **keys).event_shape == (2,)
