"""data.id: the column that identifies the rows, from each kind of file."""

from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xlsxwriter

from flowtrain.data.tables.csv_reader import DETECTED, TextFormat
from flowtrain.data.tables.ids import read_ids
from flowtrain.utils.errors import ConfigError, DataError

TEXTS = ["a", "007", "x y", "#1"]


def frame() -> pl.DataFrame:
    return pl.DataFrame({"x": [0.5, 1.5, 2.5, 3.5], "name": TEXTS, "n": [4, -3, 2, 1]})


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".arrow", ".xlsx"])
def test_ids_come_from_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    table = frame()
    {".csv": table.write_csv, ".parquet": table.write_parquet, ".arrow": table.write_ipc, ".xlsx": table.write_excel}[
        ending
    ](path)
    for column in ("name", 1):
        ids = read_ids(path, None, column, DETECTED)
        assert (ids.name, ids.values.tolist()) == ("name", TEXTS)
    ids = read_ids(path, None, "n", DETECTED)
    assert (ids.values.dtype, ids.values.tolist()) == (np.int64, [4, -3, 2, 1])


def test_whole_numbers_become_text_only_if_their_text_would_change(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for cells, expected in (
        (["1", "20"], [1, 20]),
        (["1", "020"], ["1", "020"]),
        (["1", ""], ["1", None]),
        (["1", "-0"], ["1", "-0"]),
        (["9" * 20, "1"], ["9" * 20, "1"]),
        (["1", "2.0"], ["1", "2.0"]),
        (["1", "²"], ["1", "²"]),
    ):
        path.write_text("x,id\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
        assert read_ids(path, None, "id", DETECTED).values.tolist() == expected


def test_ids_are_read_with_the_format_of_the_samples(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("1;k1\n2;k2\n\n")
    assert read_ids(path, None, 1, TextFormat(header=False)).values.tolist() == ["k1", "k2"]
    assert read_ids(path, None, 1, TextFormat(header=True)).name == "k1"


def test_long_numbers_beside_text_keep_their_digits_in_a_sheet(tmp_path: Path) -> None:
    with xlsxwriter.Workbook(tmp_path / "t.xlsx") as book:
        sheet = book.add_worksheet()
        for i, cell in enumerate(["id", "A7", 123456789012345, "007", 0.1234567890123]):
            sheet.write(i, 0, cell)
            sheet.write(i, 1, i if i else "x")
    ids = read_ids(tmp_path / "t.xlsx", None, "id", DETECTED)
    assert ids.values.tolist() == ["A7", "123456789012345", "007", "0.1234567890123"]


def test_ids_in_arrays_and_ids_of_every_type(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[0.5, 7], [1.5, 9]]))
    assert read_ids(tmp_path / "t.npy", None, 1, DETECTED).values.tolist() == [7, 9]
    np.savez(tmp_path / "t.npz", x=np.array([[0.5, 7], [1.5, np.nan]]), columns=np.array(["a", "b"]))
    ids = read_ids(tmp_path / "t.npz", None, "b", DETECTED)
    np.testing.assert_array_equal(ids.values, [7, np.nan])
    table = pl.DataFrame({"d": [date(2020, 1, 2), None], "f": [0.5, None], "i": [1, None], "u": [2**64 - 1, 0]})
    table.write_parquet(tmp_path / "t.parquet")
    expected = {"d": ["2020-01-02", None], "i": ["1", None], "u": [str(2**64 - 1), "0"]}
    for name, values in expected.items():
        assert read_ids(tmp_path / "t.parquet", None, name, DETECTED).values.tolist() == values
    np.testing.assert_array_equal(read_ids(tmp_path / "t.parquet", None, "f", DETECTED).values, [0.5, np.nan])


def test_a_missing_id_column_and_ragged_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame().write_csv(path)
    for column in ("nmae", 3, "0:2"):
        with pytest.raises(ConfigError, match=r"data\.id"):
            read_ids(path, None, column, DETECTED)
    path.write_text("x,id\n1,a\n2\n")
    with pytest.raises(DataError, match="line 3"):
        read_ids(path, None, "id", DETECTED)
