"""data=array: text files are read exactly, and refused with the line and the column."""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refused
from helpers.files import TABLES, normal, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowtrain.data.tables import csv_reader
from flowtrain.data.tables.csv_reader import TextFormat
from flowtrain.data.tables.missing import missing_of
from flowtrain.data.tables.roles import Roles, read_roles
from flowtrain.data.tables.table_reader import read_table
from flowtrain.runs.compose import read_yaml
from flowtrain.utils.errors import DataError

# Reading


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=TABLES,
    delimiter=st.sampled_from(",;\t "),
    header=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_round_trip(tmp_path: Path, values: np.ndarray, delimiter: str, header: bool, ending: str) -> None:
    names = [f"x{i}" for i in range(values.shape[1])]
    lines = [delimiter.join(map(repr, row)) for row in values.tolist()]
    path = tmp_path / "t.csv"
    path.write_bytes((ending.join([delimiter.join(names)] * header + lines) + ending).encode())
    table = read_table(path)
    np.testing.assert_array_equal(table.values, values)
    assert table.columns == tuple(names if header else (f"c{i}" for i in range(len(names))))
    assert table.named == header


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=TABLES)
def test_fast_and_exact_readers_agree(tmp_path: Path, values: np.ndarray) -> None:
    lines = [",".join(map(repr, row)) for row in values.tolist()]
    fast, exact = tmp_path / "fast.csv", tmp_path / "exact.csv"
    fast.write_text("\n".join(lines))
    # the fast pass does not handle delimiters inside quotes
    names = ",".join(f"x{i}" for i in range(values.shape[1] + 1))
    exact.write_text("\n".join([names, *(f'{line},"a,b"' for line in lines)]))
    columns = [f"0:{values.shape[1]}"]
    np.testing.assert_array_equal(read_table(fast).values, read_table(exact, columns=columns).values)


GOOD_TEXT = {
    "quoted names": ('"a b","x.y"\n1,2\n', ("a b", "x.y"), [[1, 2]]),
    "a comma in a name": ('"a,b",c\n1,2\n', ("a,b", "c"), [[1, 2]]),
    "a line break in a name": ('"a\nb",c\n1,2\n3,4\n', ("a\nb", "c"), [[1, 2], [3, 4]]),
    "byte order mark, header": ("\ufeffa,b\n1,2\n", ("a", "b"), [[1, 2]]),
    "byte order mark, no header": ("\ufeff1,2\n3,4\n", ("c0", "c1"), [[1, 2], [3, 4]]),
    "blank lines at the end": ("1,2\n3,4\n\n  \n\n", ("c0", "c1"), [[1, 2], [3, 4]]),
    "no line break at the end": ("a,b\n1,2", ("a", "b"), [[1, 2]]),
    "carriage return line breaks": ("a,b\r1,2\r3,4\r", ("a", "b"), [[1, 2], [3, 4]]),
    "spaces around cells": (" a , b \n 1 , 2 \n", ("a", "b"), [[1, 2]]),
    "aligned columns": ("  1.0   2.0\n 10.0 -20.0  \n", ("c0", "c1"), [[1, 2], [10, -20]]),
    "spaces and quoted names": ('"a b"  "c"\n1  2\n', ("a b", "c"), [[1, 2]]),
    "numpy.savetxt": ("# a b\n1e0 2e0\n", ("a", "b"), [[1, 2]]),
    "numpy.savetxt, commas": ("# a,b\n1e0,2e0\n", ("a", "b"), [[1, 2]]),
    "quoted numbers": ('"1","2"\n"3",4\n', ("c0", "c1"), [[1, 2], [3, 4]]),
    "column name with a space": ("my name\n1\n2\n", ("my name",), [[1], [2]]),
    "signs and exponents": ("+1,-2e-3\n.5,5.\n", ("c0", "c1"), [[1, -0.002], [0.5, 5]]),
    "year as column name": ("id,2019\n7,1\n", ("id", "2019"), [[7, 1]]),
    "one row": ("1,2,3\n", ("c0", "c1", "c2"), [[1, 2, 3]]),
    "vertical bars": ("a|b\n1|2\n3|4\n", ("a", "b"), [[1, 2], [3, 4]]),
    "decimal commas": ("a;b\n1,5;2,25\n-3;4,0\n", ("a", "b"), [[1.5, 2.25], [-3, 4]]),
    "decimal commas, no header": ("1,5;2,5\n3,5;4,5\n", ("c0", "c1"), [[1.5, 2.5], [3.5, 4.5]]),
    "decimal commas and thousands": (
        "a;b\n1.234,5;2,5e1\n1.234.567;.5\n".replace(".5\n", "0,5\n"),
        ("a", "b"),
        [[1234.5, 25], [1234567, 0.5]],
    ),
    "decimal commas and spaces": ("10,38   1993,39\n8,4   -18,5\n", ("c0", "c1"), [[10.38, 1993.39], [8.4, -18.5]]),
    "decimal commas, spaces, header": ("a b\n1,5 2,5\n3 4,5\n", ("a", "b"), [[1.5, 2.5], [3, 4.5]]),
    "decimal commas in quotes": ('a,b\n"1,5",2\n"3,25",4\n', ("a", "b"), [[1.5, 2], [3.25, 4]]),
    "thousands in quotes": ('a,b\n1.5,"1,993.39"\n2,"2,005"\n3,7\n', ("a", "b"), [[1.5, 1993.39], [2, 2005], [3, 7]]),
    "thousands separator beside a decimal point": ('a,b\n0.5,"1,993"\n', ("a", "b"), [[0.5, 1993]]),
    "a comment above a header": (
        "# http://example.org, page 5\nlat,long\n1,2\n3,4\n",
        ("lat", "long"),
        [[1, 2], [3, 4]],
    ),
    "comments that name the columns": (
        "# made by a tool\n# columns: pt, eta\n1,2\n3,4\n",
        ("pt", "eta"),
        [[1, 2], [3, 4]],
    ),
    "comments without column names": ("# made by\n# tool 7, of the lab\n\n1,2\n3,4\n", ("c0", "c1"), [[1, 2], [3, 4]]),
    "pandas index": (",a,b\n0,1.5,2\n1,3,4\n", ("a", "b"), [[1.5, 2], [3, 4]]),
    "pandas index, unnamed columns": (",0,1\n0,1.5,2\n1,3,4\n", ("0", "1"), [[1.5, 2], [3, 4]]),
    "pandas index, shuffled": (",a\n7,1.5\n3,3\n", ("a",), [[1.5], [3]]),
    "pandas index, saved twice": (",Unnamed: 0,a\n0,7,1\n1,8,3\n", ("a",), [[1], [3]]),
    "R row names": ('"","mpg"\n"Mazda RX4",21\n"Datsun",22.8\n', ("mpg",), [[21], [22.8]]),
    "booleans": ("a,b\n1,True\n3,false\n", ("a", "b"), [[1, 1], [3, 0]]),
    "booleans, no header": ("1.5,TRUE\n3,FALSE\n", ("c0", "c1"), [[1.5, 1], [3, 0]]),
    "duplicate column names": ("a,a\n1,2\n3,4\n", ("a", "a"), [[1, 2], [3, 4]]),
}


@pytest.mark.parametrize("case", GOOD_TEXT)
def test_csv_variants_are_read(tmp_path: Path, case: str) -> None:
    text, names, values = GOOD_TEXT[case]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    table = read_table(path)
    assert table.columns == names
    assert table.values.tolist() == values


@pytest.mark.parametrize("ending", [".csv", ".CSV", ".tsv", ".txt", ".data", ".tra", ".tes", ".csv.gz", ".TXT.gz"])
@pytest.mark.parametrize("zipped", [False, True])
def test_line_endings_and_gzip_are_read(tmp_path: Path, ending: str, zipped: bool) -> None:
    """The first bytes of a file show whether it is gzipped, because browsers unpack downloads without renaming them."""
    path = tmp_path / f"t{ending}"
    text = b"a\tb\n1\t2\n"
    path.write_bytes(gzip.compress(text) if zipped else text)
    table = read_table(path)
    assert (table.columns, table.values.tolist()) == (("a", "b"), [[1, 2]])


def test_damaged_gzip_files_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.csv.gz"
    whole = gzip.compress("\n".join(f"{i},{i * i}" for i in range(1000)).encode())
    for content in (whole[:500], whole[:200] + b"????" + whole[204:]):
        path.write_bytes(content)
        refused(lambda: read_table(path), DataError, [str(path), "gzip"])
    array = tmp_path / "t.npy.gz"
    array.write_bytes(whole)
    refused(lambda: read_table(array), DataError, [str(array), "gunzip"])


@pytest.mark.parametrize(
    ("text", "given", "names", "values"),
    [
        ("2019,2020\n1.5,2.5\n3.5,4.5\n", {"header": True}, ("2019", "2020"), [[1.5, 2.5], [3.5, 4.5]]),
        ("2019,2020\n1.5,2.5\n", {"header": False}, ("c0", "c1"), [[2019, 2020], [1.5, 2.5]]),
        ("2019,2020\n1.5,2.5\n", {"known": ("2020",)}, ("2019", "2020"), [[1.5, 2.5]]),
        ("a,2020\n1.5,2.5\n", {"header": False}, None, ["line 1", "'a' is not a number", "data.header"]),
        ('x,y\n"1,234",7\n', {}, None, ["'1,234'", "data.decimal=comma", "data.decimal=point"]),
        ('x,y\n"1,234",7\n', {"decimal": "point"}, ("x", "y"), [[1234, 7]]),
        ("x y\n1,234 7\n", {"decimal": "comma"}, ("x", "y"), [[1.234, 7]]),
        ("x\n1,5\n2,5\n", {}, None, ["line 2", "2 cells", "data.decimal=comma"]),
        ("x\n1,5\n2,5\n", {"decimal": "comma"}, ("x",), [[1.5], [2.5]]),
        ("x;y\n1.234;7\n", {"decimal": "comma"}, None, ["'1.234'", "data.decimal=comma"]),
        ("x;y\n1,5;7\n2.5;7\n", {}, None, ["line 3", "'2.5' is not a number", "data.decimal"]),
    ],
)
def test_header_and_decimal_mark_can_be_set(
    refused: Refused, tmp_path: Path, text: str, given: dict[str, Any], names: tuple[str, ...] | None, values: list[Any]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    if names is None:
        refused(lambda: read_table(path, text_format=TextFormat(**given)), DataError, [str(path), *values])
    else:
        table = read_table(path, text_format=TextFormat(**given))
        assert (table.columns, table.values.tolist()) == (names, values)


def test_requested_index_column_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_text(",a,b\n0,1,2\n1,3,4\n")
    assert read_table(path).indices == (1, 2)
    (option,) = re.findall(r"data\.columns=\[(\S*)\]", caplog.text)
    assert read_table(path, columns=[option]).values.tolist() == [[0, 1, 2], [1, 3, 4]]
    assert read_table(path, columns=["b", 0]).values.tolist() == [[2, 0], [4, 1]]
    # a column with repeated values is no index
    path.write_text(",a\n5,1\n5,3\n")
    assert read_table(path).indices == (0, 1)


def test_one_error_counts_all_missing_values_of_the_file(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,c,d\n1,2,3,4\n1,NA,3,\n1,,3,4\n1,2,3,4\n")
    message = refused(lambda: read_table(path), DataError, [str(path), "line 3", "column 'b'", "'NA'"])
    assert all(
        part in message for part in ("3 of 16 values", "2 of 4 rows", "'b': 2", "'d': 1", "'data.columns=[0,2]'")
    )
    assert read_table(path, columns=[0, 2]).values.shape == (4, 2)
    # missing labels count too
    message = refused(lambda: read_roles(str(path), None, ["a", "d"], Roles("b")), DataError, ["'b': 2", "'d': 1"])
    assert "3 of 12 values" in message


def test_columns_of_text_are_named_at_once(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.csv"
    path.write_text("name,a,day,b\nAnn,1,2020-01-01,2\nBob,,2020-01-02,3\nCy,5,2020-01-03,4\nDee,7,,5\n")
    message = refused(
        lambda: read_table(path), DataError, ["line 2, column 'name': 'Ann' is not a number", "'day' (text in 3 cells)"]
    )
    assert "'data.columns=[1,3]'" in message
    # a few words may stand for missing values
    path.write_text("a,b\n1,2\nunknown,4\n5,n.d.\n")
    message = refused(lambda: read_table(path), DataError, ["line 3", "'unknown'"])
    (option,) = re.findall(r"'data\.(na=\[.*\])'", message)
    given = read_yaml(option.removeprefix("na="))
    assert read_table(path, missing=missing_of("drop", given)).values.tolist() == [[1, 2]]


def test_text_labels_are_not_mistaken_for_a_header(tmp_path: Path) -> None:
    path = tmp_path / "iris.data"
    path.write_text("5.1,3.5,setosa\n4.9,3.0,setosa\n6.3,3.3,virginica\n\n")
    assert read_table(path, columns=["0:2"]).values.tolist() == [[5.1, 3.5], [4.9, 3.0], [6.3, 3.3]]
    with pytest.raises(DataError, match="line 1, column 'c2': 'setosa' is not a number"):
        read_table(path)


def test_bad_cell_in_an_unselected_column_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('a,note,b\n1,"x, y\nz",2\n3,,nan\n5,w,6\n')
    assert read_table(path, columns=["a"]).values.tolist() == [[1], [3], [5]]
    # a line break in a cell must not shift the line numbers of later errors
    with pytest.raises(DataError, match="line 4, column 'b': the value is nan"):
        read_table(path, columns=["b"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
def test_plain_file_uses_the_fast_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delimiter: str) -> None:
    monkeypatch.delattr(csv_reader, "_read_by_cell")
    values = normal(100, 3)
    for header in (None, ["a", "b", "c"]):
        path = save(tmp_path / "t.csv", values, header, delimiter)
        np.testing.assert_array_equal(read_table(path).values, values)


# bad text, and what the message must contain besides the name of the file

BAD_TEXT = {
    "ragged, short": ("a,b,c\n1,2,3\n4,5\n", ["line 3", "2 cells", "the header has 3", "'c'"]),
    "ragged, long": ("a,b\n1,2\n4,5,6\n", ["line 3", "3 cells", "the header has 2", "'b'"]),
    "ragged, no header": ("1,2\n3,4\n5\n6,7\n", ["line 3", "has 1 cell", "'c1'"]),
    "ragged, header": ("a,b\n1,2,3\n4,5,6\n", ["line 2", "3 cells", "the header has 2"]),
    "text cell": ("a,b\n1,2\n3,oops\n", ["line 3", "column 'b'", "'oops' is not a number"]),
    "text cell, no header": ("1,2\n3,4\nx,6\n", ["line 3", "column 'c0'", "'x' is not a number"]),
    "underscore": ("1,2\n3,1_000\n", ["line 2", "column 'c1'", "'1_000' is not a number"]),
    "comment below the rows": ("a,b\n1,2\n# 3\n", ["line 3", "comments"]),
    "comments only": ("# a\n# b\n", ["no rows"]),
    "empty cell": ("a,b\n1,2\n,4\n", ["line 3", "column 'a'", "empty"]),
    "empty cell at the end": ("1,2,3\n4,5,\n", ["line 2", "column 'c2'", "empty"]),
    "empty cell in line 1": ("1,,3\n4,5,6\n", ["line 1", "column 'c1'", "empty"]),
    "missing value": ("a,b\n1,2\n3,NA\n", ["line 3", "column 'b'", "'NA' is a missing value"]),
    "missing value in line 1": ("1,NA\n3,4\n", ["line 1", "column 'c1'", "'NA' is a missing value"]),
    "blank line": ("a,b\n1,2\n\n3,4\n", ["line 3 is empty"]),
    "blank first line": ("\na,b\n1,2\n", ["line 1 is empty"]),
    "blank first lines": ("\n\n\na,b\n1,2\n", ["line 1 is empty"]),
    "blank line, one column": ("1\n2\n\n4\n", ["line 3 is empty"]),
    "nan": ("a,b\n1,2\n3,nan\n5,6\nNaN,inf\n", ["line 3", "column 'b'", "nan", "3 of 8", "2 of 4 rows"]),
    "infinity": ("1,2\n-inf,4\n", ["line 2", "column 'c0'", "-inf", "1 of 4"]),
    "overflow": ("1,2\n3,1e999\n", ["line 2", "column 'c1'", "inf"]),
    "empty file": ("", ["is empty"]),
    "byte order mark only": ("\ufeff", ["is empty"]),
    "blank lines only": ("\n\n \n", ["is empty"]),
    "header only": ("a,b\n", ["no rows below its header"]),
    "two headers": ("a,b\nc,d\n1,2\n", ["line 2", "column 'a'", "'c' is not a number"]),
    "open quote": ('a,b\n1,2\n"3,4\n5,6\n', ["line 3"]),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_malformed_csv_error_names_the_location(tmp_path: Path, case: str, refused: Refused) -> None:
    text, fragments = BAD_TEXT[case]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    refused(lambda: read_table(path), DataError, [str(path), *fragments])


def test_non_utf8_error_names_the_line(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 5000 + "3,\N{POUND SIGN}\n".encode("latin-1"))
    refused(lambda: read_table(path), DataError, [str(path), "line 5002", "UTF-8"])
    path.write_bytes("a,b\n1,2\n".encode("utf-16"))
    refused(lambda: read_table(path), DataError, [str(path), "line 1", "UTF-8"])


# First lines that are probably read wrongly: a header with numbers, or data that look like a header

ODD_HEADERS = {
    "pandas index": (",a,b\n0,1,2\n1,3,4\n", None, "left out"),
    "unnamed first column": (",a,b\n0.5,1,2\n1,3,4\n", None, "first column has no name"),
    "unnamed pandas columns": ("0,1,2\n3,4,5\n", None, "data.header=true"),
    "unnamed pandas columns, decimals": ("0,1\n3.5,4.5\n5.5,1.5\n", None, "data.header=true"),
    "pandas series": ("0\n3.5\n4.5\n", None, "data.header=true"),
    "years": ("2019,2020\n3.5,4.5\n5.5,1.5\n", None, "data.header=true"),
    "integers as names": ("0,1\n3,4.5\n5.5,1.5\n", None, None),
    "counts": ("0\n3\n4\n", None, None),
    "bad cell in line 1": ("1.5,2,oops\n3,4,5\n", None, "read as the header"),
    "index excluded": (",a,b\n0,1,2\n1,3,4\n", ["1:"], None),
    "plain": ("a,b,c\n0,1,2\n1,3,4\n", None, None),
    "default column names": ("c0,c1,c2\n0,1,2\n1,3,4\n", None, None),
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_ambiguous_headers_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    text, columns, expected = ODD_HEADERS[case]
    (tmp_path / "t.csv").write_text(text)
    read_table(tmp_path / "t.csv", columns=columns)
    if expected is None:
        assert caplog.text == ""
    else:
        assert expected in caplog.text
