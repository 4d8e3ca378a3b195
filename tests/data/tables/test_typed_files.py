"""data=array: Parquet, Feather and Excel files are read like text files, and refused with the row and the column."""

import datetime
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xlsxwriter
from helpers import Refused
from helpers.files import normal, save
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.missing import missing_of
from flowtrain.data.tables.roles import Roles, read_roles
from flowtrain.data.tables.table_reader import read_table
from flowtrain.utils.errors import ConfigError, DataError

ENDINGS = (".parquet", ".feather", ".arrow", ".xlsx")


def write(path: Path, frame: pl.DataFrame) -> str:
    """Writes a data frame in the format of the ending."""
    if path.suffix == ".xlsx":
        frame.write_excel(path)
    elif path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_ipc(path)
    return str(path)


def sheet(path: Path, rows: Sequence[Sequence[Any]], name: str = "data", *others: str) -> str:
    """Writes rows of cells to a sheet, followed by empty sheets."""
    with xlsxwriter.Workbook(path) as book:
        page = book.add_worksheet(name)
        for i, row in enumerate(rows):
            for j, cell in enumerate(row):
                if isinstance(cell, datetime.date):
                    page.write_datetime(i, j, cell, book.add_format({"num_format": "yyyy-mm-dd"}))
                elif cell is not None:
                    page.write(i, j, cell)
        for other in others:
            book.add_worksheet(other)
    return str(path)


NUMBERS = pl.DataFrame(
    {
        "f32": pl.Series([0.1, 2.5, -3.25], dtype=pl.Float32),
        "i8": pl.Series([1, -2, 3], dtype=pl.Int8),
        "yes": [True, False, True],
        "big": pl.Series([2**40, 1, 0], dtype=pl.UInt64),
        "text": ["1.5", " 2", "1e3"],
        "dec": pl.Series(["1.25", "2.5", "3.0"]).cast(pl.Decimal(10, 2)),
    }
)
VALUES = np.array(
    [[np.float32(0.1), 1, 1, 2**40, 1.5, 1.25], [2.5, -2, 0, 1, 2, 2.5], [-3.25, 3, 1, 0, 1000, 3]], dtype=np.float64
)


@pytest.mark.parametrize("ending", ENDINGS)
def test_numbers_of_all_types_are_read(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"t{ending}", NUMBERS)
    table = read_table(path)
    assert table.columns == tuple(NUMBERS.columns)
    np.testing.assert_allclose(table.values, VALUES, rtol=1e-15 if ending == ".xlsx" else 0)
    chosen = read_table(path, columns=["big", 0])
    assert (chosen.columns, chosen.indices) == (("big", "f32"), (3, 0))
    np.testing.assert_allclose(chosen.values, VALUES[:, [3, 0]], rtol=1e-15)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(rows=[(0.0, 0.0, 0.0), (None, None, None)], separator="\t")
@given(
    rows=st.lists(
        st.tuples(*[st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32)] * 3),
        min_size=2,
        max_size=12,
    ).filter(lambda rows: any(None not in row for row in rows)),
    separator=st.sampled_from(",;\t|"),
)
def test_every_format_gives_the_rows_that_polars_reads(
    tmp_path: Path, rows: list[tuple[float | None, ...]], separator: str
) -> None:
    """polars is a second reader of text files. Rows with missing values are left out."""
    frame = pl.DataFrame(rows, schema={"a": pl.Float64, "b": pl.Float64, "c": pl.Float64}, orient="row")
    frame.write_csv(tmp_path / "t.csv", separator=separator)
    expected = pl.read_csv(tmp_path / "t.csv", separator=separator, schema_overrides=dict.fromkeys("abc", pl.Float64))
    complete = expected.drop_nulls().to_numpy()
    kept = np.flatnonzero(expected.select(pl.all_horizontal(pl.all().is_not_null())).to_series().to_numpy())
    paths = [str(tmp_path / "t.csv"), *(write(tmp_path / f"t{ending}", frame) for ending in (".parquet", ".feather"))]
    for path in paths:
        table = read_table(path, missing=missing_of("drop", None))
        np.testing.assert_array_equal(table.values, complete)
        found = np.arange(len(expected)) if table.kept is None else table.kept.rows
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("ending", [".csv", *ENDINGS])
def test_columns_without_numbers_are_named_at_once(tmp_path: Path, ending: str, refused: Refused) -> None:
    frame = pl.DataFrame(
        {
            "a": [1.5, 2.5, 3.5],
            "who": ["Ann", "Bob", "Cy"],
            "b": [4, 5, 6],
            "when": [datetime.date(2020, 1, day) for day in (1, 2, 3)],
            "c": [0, 1, 2],
        }
    )
    path = write(tmp_path / f"t{ending}", frame)
    first = {".csv": "line 2", ".xlsx": "row 2"}.get(ending, "row 0 (from 0)")
    message = refused(lambda: read_table(path), DataError, [path, first, "column 'who'", "'Ann'", "'when'"])
    option = re.search(r"data\.columns=\[(\S*)\]", message)
    assert option is not None
    columns: list[str | int] = [int(e) if e.isdigit() else e for e in option[1].split(",")]
    assert read_table(path, columns=columns).columns == ("a", "b", "c")


def test_cells_of_text_in_a_column_of_numbers_can_be_missing(tmp_path: Path, refused: Refused) -> None:
    """A column of a sheet with numbers and text keeps all digits of its numbers."""
    x = 0.1234567890123
    path = sheet(tmp_path / "t.xlsx", [["a", "b"], [x, 1], ["bad", 2], [1e-30, 3], ["?", 4], ["7.5", 5]])
    message = refused(lambda: read_table(path), DataError, ["row 3", "column 'a'", "'bad'"])
    assert """'data.na=["bad"]'""" in message
    table = read_table(path, missing=missing_of("drop", ["bad"]))
    assert table.values.tolist() == [[x, 1], [1e-30, 3], [7.5, 5]]
    assert table.row_name(1) == "row 4"
    refused(lambda: read_table(path, missing=missing_of(None, ["bad"])), DataError, ["'a': 2", "first in row 3"])


def test_lists_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "t.parquet", pl.DataFrame({"a": [1, 2], "l": [[1], [2]]}))
    refused(lambda: read_table(path), DataError, [path, "'l'", "List", "'data.columns=[0]'"])


def test_pandas_index_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [["", "a", "b"], [0, 1.5, 2], [1, 2.5, 3]]
    named = {name: [row[i] for row in rows[1:]] for i, name in enumerate(("__index_level_0__", "a", "b"))}
    files = [sheet(tmp_path / "t.xlsx", rows), write(tmp_path / "t.parquet", pl.DataFrame(named, strict=False))]
    for path in files:
        caplog.clear()
        assert read_table(path).values.tolist() == [[1.5, 2], [2.5, 3]]
        (option,) = re.findall(r"data\.columns=\[(\S*)\]", caplog.text)
        assert read_table(path, columns=[option]).values.shape == (2, 3)
    repeated = write(tmp_path / "r.parquet", pl.DataFrame({"__index_level_0__": [5, 5], "a": [1, 2]}))
    assert read_table(repeated).values.shape == (2, 2)


def test_comments_blank_rows_and_headers_of_sheets(tmp_path: Path, refused: Refused) -> None:
    rows: list[list[Any]] = [["# made by a tool"], [], ["a", "b"], [1, 2], [3, None], [5, 6], [None, None]]
    path = sheet(tmp_path / "t.xlsx", rows)
    refused(lambda: read_table(path), DataError, [path, "row 5", "column 'b'", "1 of 6"])
    assert read_table(path, missing=missing_of("drop", None)).values.tolist() == [[1, 2], [5, 6]]
    bare = sheet(tmp_path / "bare.xlsx", [[1, 2], [3, 4]])
    assert (read_table(bare).columns, read_table(bare).values.tolist()) == (("c0", "c1"), [[1, 2], [3, 4]])
    given: dict[str, Any] = {"header": True}
    years = sheet(tmp_path / "years.xlsx", [[2019, 2020], *normal(20, 2).tolist()])
    assert len(read_table(years).values) == 21
    assert ArrayData(years, **given).columns == ("2019", "2020")


def test_sheets_are_chosen_by_key(tmp_path: Path, refused: Refused) -> None:
    assert read_table(sheet(tmp_path / "t.xlsx", [[1], [2]], "one", "two")).values.tolist() == [[1], [2]]
    path = tmp_path / "both.xlsx"
    with xlsxwriter.Workbook(path) as book:
        for k, name in enumerate(("one", "two")):
            book.add_worksheet(name).write_column(0, 0, [k, k + 1])
    assert read_table(path, key="two").values.tolist() == [[1], [2]]
    refused(lambda: read_table(path), ConfigError, [str(path), "data.key", "one, two"])
    refused(lambda: read_table(path, key="three"), ConfigError, ["'three'", "one, two"])


def test_options_of_text_files_are_refused_for_typed_files(tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "t.parquet", pl.DataFrame(normal(50, 2), schema=["a", "b"]))
    refused(lambda: ArrayData(path, decimal="comma"), ConfigError, ["data.decimal", path])
    refused(lambda: ArrayData(path, header=True), ConfigError, ["data.header", path])
    # they may be meant for the training file
    text = save(tmp_path / "t.csv", normal(50, 2), ["a", "b"])
    assert len(ArrayData(text, val_path=path, header=True, decimal="point").val) == 50


def test_labels_are_found_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", pl.DataFrame({"a": [1.5, 2.5], "kind": [True, False], "b": [3, 4]}))
    tables = read_roles(path, None, None, Roles("kind"))
    table, labels = tables.samples, tables.label
    assert labels is not None
    assert (table.columns, labels.values.tolist()) == (("a", "b"), [[1], [0]])


def test_the_first_missing_value_is_described(tmp_path: Path, refused: Refused) -> None:
    for cells, words in ((["1", None], "the cell is empty"), (["1", "?"], "'?' is a missing value")):
        path = write(tmp_path / "t.parquet", pl.DataFrame({"a": cells, "b": [1.0, 2.0]}))
        refused(lambda path=path: read_table(path), DataError, ["row 1 (from 0)", "'a'", words])
    path = write(tmp_path / "t.parquet", pl.DataFrame({"a": [1.0, float("nan")]}))
    refused(lambda: read_table(path), DataError, ["the value is nan"])
    book = sheet(tmp_path / "t.xlsx", [["a", "b"], [1, 2], [None, 3]])
    refused(lambda: read_table(book), DataError, ["row 3", "'a'", "the cell is empty"])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header only"])
def test_damaged_files_are_refused(tmp_path: Path, ending: str, damage: str, refused: Refused) -> None:
    path = tmp_path / f"t{ending}"
    if damage == "header only":
        write(path, NUMBERS.head(0))
    else:
        whole = Path(write(tmp_path / f"whole{ending}", NUMBERS)).read_bytes()
        path.write_bytes({"empty": b"", "text": b"a,b\n1,2\n", "cut": whole[: len(whole) // 2]}[damage])
    refused(lambda: read_table(path), DataError, [str(path)])


@pytest.mark.parametrize(("ending", "package"), [(".parquet", "polars"), (".xlsx", "fastexcel"), (".arrow", "polars")])
def test_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, package: str, refused: Refused
) -> None:
    path = write(tmp_path / f"t{ending}", NUMBERS)
    monkeypatch.setitem(sys.modules, package, None)
    refused(lambda: read_table(path), ConfigError, [path, package, "pip install 'flowtrain[tables]'"])


def test_file_names_are_not_patterns(tmp_path: Path) -> None:
    for name in ("a*.parquet", "ab.parquet"):
        write(tmp_path / name, pl.DataFrame({"a": [float(len(name))]}))
    assert read_table(tmp_path / "a*.parquet").values.tolist() == [[10.0]]


def test_record_does_not_depend_on_the_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same rows in another format are the same data, so the run can be resumed."""
    caplog.set_level(logging.ERROR)
    frame = pl.DataFrame(np.round(normal(60, 2), 6), schema=["a", "b"])
    records = {ArrayData(write(tmp_path / f"t{ending}", frame)).record for ending in (".csv", *ENDINGS)}
    assert len(records) == 1


Named = Callable[..., Any]
