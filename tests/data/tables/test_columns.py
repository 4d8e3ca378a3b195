"""data=array: the choice of columns, their statistics, and columns that are refused."""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refused
from helpers.files import normal, npy, save
from omegaconf import OmegaConf

from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.table_reader import read_table
from flowtrain.utils.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]


# Columns

GOOD_COLUMNS: list[tuple[Any, list[int]]] = [
    (["b"], [1]),
    ([3, "a"], [3, 0]),
    ([-1], [3]),
    (["0:2"], [0, 1]),
    (["1:"], [1, 2, 3]),
    ([":-1"], [0, 1, 2]),
    (["::2", "d"], [0, 2, 3]),
    (["2:0:-1"], [2, 1]),
    ("b", [1]),
    ("1:3", [1, 2]),
    (2, [2]),
    (OmegaConf.create(["0:2", -1]), [0, 1, 3]),
]


@pytest.mark.parametrize(("columns", "expected"), GOOD_COLUMNS, ids=str)
def test_columns_are_selected_in_the_requested_order(tmp_path: Path, columns: Any, expected: list[int]) -> None:
    values = normal(5, 4)
    table = read_table(save(tmp_path / "t.csv", values, list("abcd")), columns=columns)
    np.testing.assert_array_equal(table.values, values[:, expected])
    assert table.columns == tuple("abcd"[i] for i in expected)
    assert table.indices == tuple(expected)
    if all(name not in str(columns) for name in "abcd"):
        np.testing.assert_array_equal(
            read_table(npy(tmp_path / "t.npy", values), columns=columns).values, values[:, expected]
        )


def test_column_name_takes_precedence_over_a_slice(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", normal(3, 3), ["x", "0:2", "y"])
    assert read_table(path, columns=["0:2"]).indices == (1,)


BAD_COLUMNS: list[tuple[Any, list[str]]] = [
    (["e"], ["'e'", "'a', 'b', 'c', 'd'"]),
    ([4], ["4", "'d'"]),
    ([-5], ["-5"]),
    (["0:5"], ["'0:5'", "4 columns"]),
    (["0:4:0"], ["'0:4:0'"]),
    ([1.0], ["1.0"]),
    ([True], ["True"]),
    (["2:2"], ["keeps no column"]),
    ([], ["keeps no column"]),
    (["0:2", "b"], ["'b'", "twice"]),
]


@pytest.mark.parametrize(("columns", "fragments"), BAD_COLUMNS, ids=str)
def test_missing_columns_are_refused(tmp_path: Path, columns: Any, fragments: list[str], refused: Refused) -> None:
    path = save(tmp_path / "t.csv", normal(3, 4), list("abcd"))
    refused(lambda: read_table(path, columns=columns), ConfigError, fragments)


def test_unknown_positions_and_duplicate_names_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = npy(tmp_path / "t.npy", normal(3, 4))
    refused(lambda: read_table(path, columns=[9]), ConfigError, [path, "no column 9", "0 to 3"])
    path = save(tmp_path / "t.csv", normal(3, 2), ["a", "a"])
    refused(lambda: read_table(path, columns=["a"]), ConfigError, [path, "2 columns named 'a'"])


# Statistics, and columns that are refused


def test_statistics_come_from_the_training_rows(tmp_path: Path, epoch: Callable[..., torch.Tensor]) -> None:
    values = normal(200, 3) * [1, 10, 0.1] + [0, 5, -3]
    path = npy(tmp_path / "t.npy", values)
    data = ArrayData(path)
    train = {tuple(row) for row in epoch(data, 160).tolist()}
    mine = np.array([row for row in values if tuple(row.astype(np.float32).tolist()) in train])
    assert len(mine) == 160
    stats = data.statistics()
    assert stats is not None
    np.testing.assert_allclose(stats[0], mine.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats[1], mine.std(0), rtol=1e-12)
    assert stats[0].dtype == stats[1].dtype == torch.float64
    assert ArrayData(path, standardize=False).statistics() is None
    # changing the returned statistics in place must not change the data set
    stats[0].zero_()
    assert data.statistics()[0].abs().min() > 0  # type: ignore[index]


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, -1e8, 1e30])
@pytest.mark.parametrize("standardize", [True, False])
def test_constant_column_is_named_in_the_error(
    tmp_path: Path, value: float, standardize: bool, refused: Refused
) -> None:
    values = normal(50, 6)
    values[:, [1, 4]] = value
    path = save(tmp_path / "t.csv", values, list("abcdef"))
    refused(
        lambda: ArrayData(path, standardize=standardize),
        DataError,
        [path, "columns 'b', 'e' are constant", "'data.columns=[0,2:4,5]'"],
    )
    assert ArrayData(path, columns=[0, "2:4", 5]).columns == ("a", "c", "d", "f")


def test_column_constant_in_the_training_rows_is_refused(tmp_path: Path, refused: Refused) -> None:
    train, test = normal(20, 2), normal(20, 2)
    train[:, 1] = 3
    paths = [npy(tmp_path / name, values) for name, values in (("a.npy", train), ("b.npy", test))]
    refused(lambda: ArrayData(paths[0], test_path=paths[1]), DataError, [paths[0], "column 'c1' is constant"])
    refused(lambda: ArrayData(paths[0], columns=[1]), DataError, ["no other columns"])


def test_columns_that_lose_precision_in_float32_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refused: Refused
) -> None:
    values = normal(50, 2)
    values[:, 1] += 1e7
    path = npy(tmp_path / "t.npy", values)
    refused(lambda: ArrayData(path, center=False), DataError, ["column 'c1' is constant to the precision of float32"])
    ArrayData(path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    values[:, 1] -= 0.99e7
    ArrayData(npy(tmp_path / "t.npy", values), center=False)
    assert "float32 loses digits of 'c1'" in caplog.text
    assert "c0" not in caplog.text
    values[3, 0] = 1e39
    refused(lambda: ArrayData(npy(tmp_path / "t.npy", values)), DataError, ["row 3", "'c0'", "1e+39", "float32"])


# Codes for missing values


@pytest.mark.parametrize(
    ("rest", "code", "count", "told"),
    [
        (normal(60, 1)[:, 0] * 30 + 2000, -999.0, 6, True),
        (normal(60, 1)[:, 0] * 30 + 2000, 9999.0, 2, True),
        (normal(60, 1)[:, 0] * 3 + 80, -1.0, 3, True),
        (normal(60, 1)[:, 0] * 3 + 80, 0.0, 40, True),
        (normal(60, 1)[:, 0], 1e30, 3, True),
        # not codes: a single outlier, values near the rest, and one of few distinct values
        (normal(60, 1)[:, 0] * 30 + 2000, -999.0, 1, False),
        (normal(60, 1)[:, 0] * 3, -9.0, 4, False),
        (np.abs(normal(60, 1)[:, 0]), 0.0, 40, False),
        (np.arange(60) % 5.0, 99.0, 4, False),
        (normal(60, 1)[:, 0], 12.0, 4, False),
    ],
)
def test_codes_for_missing_values_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rest: np.ndarray, code: float, count: int, told: bool
) -> None:
    column = np.concatenate([rest, np.full(count, code)])
    values = np.column_stack([normal(len(column), 1, seed=1), column])
    # val_path and test_path make the whole file the training set
    ArrayData(npy(tmp_path / "t.npy", values), val_path=(held := npy(tmp_path / "v.npy", normal(5, 2))), test_path=held)
    said = [m for m in caplog.messages if "missing value" in m]
    assert bool(said) == told
    if told:
        assert all(part in said[0] for part in (f"'c1' is {code:g} in {count} rows", "'data.columns=[0]'"))


# The configuration


def test_config_keys_match_the_constructor() -> None:
    config = OmegaConf.load(ROOT / "configs" / "data" / "array.yaml")["data"]
    assert isinstance(config.pop("name"), str)
    assert config.pop("_target_") == f"{ArrayData.__module__}.{ArrayData.__name__}"
    signature = inspect.signature(ArrayData.__init__).parameters
    assert set(config) == set(signature) - {"self", "earlier"}
    for name, value in config.items():
        default = signature[str(name)].default
        assert value == (None if default is inspect.Parameter.empty else default), name


def test_columns_survive_a_config_round_trip(tmp_path: Path) -> None:
    columns = OmegaConf.create(["1:30", "0:1", 31, "c32"])
    assert OmegaConf.create(OmegaConf.to_yaml(columns)) == columns
    path = npy(tmp_path / "t.npy", normal(5, 40))
    assert read_table(path, columns=columns).indices == (*range(1, 30), 0, 31, 32)
