"""Tables that commands write: values, types and names come back from .csv and .parquet."""

import csv
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from flowtrain.data.base import Samples
from flowtrain.data.context import ContextColumn
from flowtrain.data.tables import output, typed_files
from flowtrain.data.tables.output import named_columns, write_columns
from flowtrain.data.tables.table_reader import read_table
from flowtrain.data.types import ColumnType
from flowtrain.utils.errors import ConfigError

FLOATS = [0.1, -1 / 3, 1e-300, 123456789.123456789, -0.0, 5e-324, 1.7e308]


@pytest.mark.parametrize("ending", output.NAMED)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_numbers_come_back_with_all_digits(tmp_path: Path, ending: str, dtype: type) -> None:
    with np.errstate(over="ignore"):
        x = np.array(FLOATS).astype(dtype)
    x = x[np.isfinite(x)]
    n = np.array([2**60, -(2**60), *range(len(x) - 2)])
    write_columns(tmp_path / f"t{ending}", {"x, y": x, "n": n})
    table = read_table(tmp_path / f"t{ending}")
    assert table.columns == ("x, y", "n")
    np.testing.assert_array_equal(table.values[:, 0].astype(dtype), x)
    np.testing.assert_array_equal(table.values[:, 1], n.astype(float))


@pytest.mark.parametrize("ending", output.NAMED)
def test_masked_whole_numbers_are_missing_values(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    write_columns(path, {"n": np.ma.masked_array([7, 8, 9], [False, True, False]), "x": np.zeros(3)})
    frame = pl.read_csv(path) if ending == ".csv" else pl.read_parquet(path)
    assert (frame["n"].to_list(), frame["n"].dtype) == ([7, None, 9], pl.Int64)


def test_the_text_of_a_float_is_the_shortest(tmp_path: Path) -> None:
    write_columns(tmp_path / "t.csv", {"a": np.array([0.1], np.float32), "b": np.array([0.1])})
    assert (tmp_path / "t.csv").read_text() == "a,b\n0.1,0.1\n"


def test_missing_values_are_empty_or_null(tmp_path: Path) -> None:
    columns = {"id": np.array(["a", None, 'x"y,z'], object), "p": np.array([1.5, np.nan, -np.inf])}
    for ending in output.NAMED:
        write_columns(tmp_path / f"t{ending}", columns)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["id", "p"], ["a", "1.5"], ["", ""], ['x"y,z', "-inf"]]
    frame = pl.read_parquet(tmp_path / "t.parquet")
    assert frame.rows() == [("a", 1.5), (None, None), ('x"y,z', -math.inf)]
    assert frame.schema == {"id": pl.String, "p": pl.Float64}


def test_a_name_that_looks_like_a_comment_comes_back(tmp_path: Path) -> None:
    write_columns(tmp_path / "t.csv", {"#a": np.arange(3), "b": np.arange(3)})
    assert read_table(tmp_path / "t.csv").columns == ("#a", "b")


def test_samples_have_the_names_and_types_of_the_training_file() -> None:
    x = torch.tensor([[0.5, 3.0], [1.5, 2**30]], dtype=torch.float64)
    found = named_columns(x, Samples((2,), columns=("x", "n"), noisy=(1,)))
    assert {name: column.dtype for name, column in found.items()} == {"x": np.float64, "n": np.int64}
    assert found["n"].tolist() == [3, 2**30]
    label = torch.tensor([1, 0])
    assert list(named_columns(x, Samples((2,), classes=2), label)) == ["c0", "c1", "label"]
    context = (ContextColumn("c0"), ContextColumn("colour", "categorical", categories=("blue", "red")))
    found = named_columns(x, Samples((2,), classes=2, context=context), label, torch.tensor([[0.1, 1.0], [2.0, 0.0]]))
    assert {name: column.tolist() for name, column in found.items() if name[:2] != "c1"} == {
        "c0": pytest.approx([0.1, 2.0]),
        "colour": ["red", "blue"],
        "c2": [3.0, 2.0**30],
        "label": [1, 0],
    }
    found = named_columns(x, Samples((2,), columns=("a", "a"), classes=2, label="kind"), label)
    assert list(found) == ["a", "a_1", "kind"]
    assert found["kind"].tolist() == [1, 0]


def test_images_are_rows_of_pixels() -> None:
    images = torch.arange(2 * 2 * 3 * 2, dtype=torch.uint8).view(2, 2, 3, 2)
    found = named_columns(images, Samples((2, 3, 2), integer_valued=True, levels=256))
    assert list(found) == [f"c{i}" for i in range(12)]
    np.testing.assert_array_equal(np.stack(list(found.values()), 1), images.flatten(1))


def test_csv_needs_no_package_and_parquet_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(typed_files.importlib, "import_module", missing)
    write_columns(tmp_path / "t.csv", {"x": np.zeros(2)})
    output.check_can_write(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match=r"flowtrain\[tables\]"):
        output.check_can_write(tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_categories_that_are_whole_numbers_are_written_without_a_point() -> None:
    one, real = (ColumnType("categorical").with_categories(each) for each in ((0.0, 1.0), (0.5, 1.0)))
    context = (ContextColumn("site", "categorical", categories=(3.0, 7.0)),)
    description = Samples((2,), columns=("a", "b"), noisy=(0, 1), types=(one, real), context=context)
    found = named_columns(torch.tensor([[1.0, 0.0]]), description, context=torch.tensor([[1.0]]))
    assert {name: (column.dtype.kind, column.tolist()) for name, column in found.items()} == {
        "site": ("i", [7]),
        "a": ("i", [1]),
        "b": ("f", [0.5]),
    }
