"""data=array: reading the user's files, refusing bad ones by name, splitting and batching."""

import csv
import inspect
import io
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from omegaconf import OmegaConf
from real_data import real

from flowtrain.bijections.logit import dequantize
from flowtrain.bijections.scale import Standardize
from flowtrain.data import delimited
from flowtrain.data.array import ArrayData
from flowtrain.data.base import Samples
from flowtrain.data.read import read_table
from flowtrain.errors import ConfigError, DataError, FlowtrainError
from flowtrain.flow import Flow

ROOT = Path(__file__).resolve().parents[1]

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TABLES = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FINITE)


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def save(path: Path, values: np.ndarray, header: list[str] | None = None, delimiter: str = ",") -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC)
        if header:
            writer.writerow(header)
        writer.writerows(values.tolist())
    return str(path)


def npy(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


# Reading


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=TABLES,
    delimiter=st.sampled_from(",;\t "),
    header=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_text_round_trip(tmp_path: Path, values: np.ndarray, delimiter: str, header: bool, ending: str) -> None:
    names = [f"x{i}" for i in range(values.shape[1])]
    lines = [delimiter.join(map(repr, row)) for row in values.tolist()]
    path = tmp_path / "t.csv"
    path.write_bytes((ending.join([delimiter.join(names)] * header + lines) + ending).encode())
    table = read_table(path)
    np.testing.assert_array_equal(table.values, values)
    assert table.columns == tuple(names if header else (f"c{i}" for i in range(len(names))))
    assert table.named == header


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=TABLES)
def test_array_round_trip(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "t.npy", values)
    np.savez(tmp_path / "one.npz", values)
    np.savez_compressed(tmp_path / "two.npz", other=values[:1], mine=values)
    for table in (
        read_table(tmp_path / "t.npy"),
        read_table(tmp_path / "one.npz"),
        read_table(tmp_path / "two.npz", key="mine"),
    ):
        np.testing.assert_array_equal(table.values, values)
        assert table.values.dtype == np.float64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=TABLES)
def test_the_fast_and_the_exact_pass_read_the_same(tmp_path: Path, values: np.ndarray) -> None:
    lines = [",".join(map(repr, row)) for row in values.tolist()]
    fast, exact = tmp_path / "fast.csv", tmp_path / "exact.csv"
    fast.write_text("\n".join(lines))
    # A delimiter inside quotes is what the fast pass does not judge
    names = ",".join(f"x{i}" for i in range(values.shape[1] + 1))
    exact.write_text("\n".join([names, *(f'{line},"a,b"' for line in lines)]))
    columns = [f"0:{values.shape[1]}"]
    np.testing.assert_array_equal(read_table(fast).values, read_table(exact, columns=columns).values)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int16", "int64", "uint64", "float16", "float32", "float64", ">f4", ">i2"],
)
def test_real_dtypes_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    table = read_table(npy(tmp_path / "t.npy", values))
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(table.values, values.astype(np.float64))


def test_one_dimension_is_one_column(tmp_path: Path) -> None:
    assert read_table(npy(tmp_path / "t.npy", np.arange(5.0))).values.shape == (5, 1)
    (tmp_path / "t.csv").write_text("1.5\n2.5\n")
    assert read_table(tmp_path / "t.csv").values.tolist() == [[1.5], [2.5]]


GOOD_TEXT = {
    "quoted names": ('"a b","x.y"\n1,2\n', ("a b", "x.y"), [[1, 2]]),
    "a comma in a name": ('"a,b",c\n1,2\n', ("a,b", "c"), [[1, 2]]),
    "a line break in a name": ('"a\nb",c\n1,2\n3,4\n', ("a\nb", "c"), [[1, 2], [3, 4]]),
    "byte order mark, header": ("\ufeffa,b\n1,2\n", ("a", "b"), [[1, 2]]),
    "byte order mark, no header": ("\ufeff1,2\n3,4\n", ("c0", "c1"), [[1, 2], [3, 4]]),
    "blank lines at the end": ("1,2\n3,4\n\n  \n\n", ("c0", "c1"), [[1, 2], [3, 4]]),
    "no line break at the end": ("a,b\n1,2", ("a", "b"), [[1, 2]]),
    "old line breaks": ("a,b\r1,2\r3,4\r", ("a", "b"), [[1, 2], [3, 4]]),
    "spaces around": (" a , b \n 1 , 2 \n", ("a", "b"), [[1, 2]]),
    "columns in line": ("  1.0   2.0\n 10.0 -20.0  \n", ("c0", "c1"), [[1, 2], [10, -20]]),
    "spaces and quoted names": ('"a b"  "c"\n1  2\n', ("a b", "c"), [[1, 2]]),
    "numpy.savetxt": ("# a b\n1e0 2e0\n", ("a", "b"), [[1, 2]]),
    "numpy.savetxt, commas": ("# a,b\n1e0,2e0\n", ("a", "b"), [[1, 2]]),
    "quoted numbers": ('"1","2"\n"3",4\n', ("c0", "c1"), [[1, 2], [3, 4]]),
    "one column, two words": ("my name\n1\n2\n", ("my name",), [[1], [2]]),
    "signs and exponents": ("+1,-2e-3\n.5,5.\n", ("c0", "c1"), [[1, -0.002], [0.5, 5]]),
    "year for a name": ("id,2019\n7,1\n", ("id", "2019"), [[7, 1]]),
    "one row": ("1,2,3\n", ("c0", "c1", "c2"), [[1, 2, 3]]),
}


@pytest.mark.parametrize("case", GOOD_TEXT)
def test_text_is_read(tmp_path: Path, case: str) -> None:
    text, names, values = GOOD_TEXT[case]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    table = read_table(path)
    assert table.columns == names
    assert table.values.tolist() == values


@pytest.mark.parametrize("ending", [".csv", ".CSV", ".txt", ".data", ".tra", ".tes"])
def test_text_endings(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    path.write_text("1,2\n")
    assert read_table(path).values.tolist() == [[1, 2]]


def test_labels_in_a_file_without_header_are_not_a_header(tmp_path: Path) -> None:
    path = tmp_path / "iris.data"
    path.write_text("5.1,3.5,setosa\n4.9,3.0,setosa\n6.3,3.3,virginica\n\n")
    assert read_table(path, columns=["0:2"]).values.tolist() == [[5.1, 3.5], [4.9, 3.0], [6.3, 3.3]]
    with pytest.raises(DataError, match="line 1, column 'c2': 'setosa' is not a number"):
        read_table(path)


def test_a_bad_cell_in_a_column_left_out_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('a,note,b\n1,"x, y\nz",2\n3,,nan\n5,w,6\n')
    assert read_table(path, columns=["a"]).values.tolist() == [[1], [3], [5]]
    # The line break in a cell must not shift the line that a later message names
    with pytest.raises(DataError, match="line 4, column 'b': the value is nan"):
        read_table(path, columns=["b"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
def test_a_plain_file_is_left_to_the_fast_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delimiter: str) -> None:
    monkeypatch.delattr(delimited, "_exact")
    values = normal(100, 3)
    for header in (None, ["a", "b", "c"]):
        path = save(tmp_path / "t.csv", values, header, delimiter)
        np.testing.assert_array_equal(read_table(path).values, values)


# Refusals: the file's ending, what is in it, and what the message must say besides the file's name

BAD_TEXT = {
    "ragged, short": ("a,b,c\n1,2,3\n4,5\n", ["line 3", "2 cells", "line 1 has 3", "'c'"]),
    "ragged, long": ("a,b\n1,2\n4,5,6\n", ["line 3", "3 cells", "line 1 has 2", "'b'"]),
    "ragged, no header": ("1,2\n3,4\n5\n6,7\n", ["line 3", "1 cell where", "'c1'"]),
    "ragged, header": ("a,b\n1,2,3\n4,5,6\n", ["line 2", "3 cells", "line 1 has 2"]),
    "word": ("a,b\n1,2\n3,oops\n", ["line 3", "column 'b'", "'oops' is not a number"]),
    "word, no header": ("1,2\n3,4\nx,6\n", ["line 3", "column 'c0'", "'x' is not a number"]),
    "underscore": ("1,2\n3,1_000\n", ["line 2", "column 'c1'", "'1_000' is not a number"]),
    "decimal comma": ("a;b\n1,5;2,5\n", ["line 2", "column 'a'", "'1,5'", "decimals with a point"]),
    "decimal comma, no header": ("1,5;2,5\n3,5;4,5\n", ["line 2", "'3,5'", "decimals with a point"]),
    "empty cell": ("a,b\n1,2\n,4\n", ["line 3", "column 'a'", "empty"]),
    "empty cell at the end": ("1,2,3\n4,5,\n", ["line 2", "column 'c2'", "empty"]),
    "empty cell in line 1": ("1,,3\n4,5,6\n", ["line 1", "column 'c1'", "empty"]),
    "missing value": ("a,b\n1,2\n3,NA\n", ["line 3", "column 'b'", "'NA' is a missing value"]),
    "missing value in line 1": ("1,NA\n3,4\n", ["line 1", "column 'c1'", "'NA' is a missing value"]),
    "blank line": ("a,b\n1,2\n\n3,4\n", ["line 3 is empty"]),
    "blank first line": ("\na,b\n1,2\n", ["line 1 is empty"]),
    "blank first lines": ("\n\n\na,b\n1,2\n", ["line 1 is empty"]),
    "blank line, one column": ("1\n2\n\n4\n", ["line 3 is empty"]),
    "nan": ("a,b\n1,2\n3,nan\n5,6\nNaN,inf\n", ["line 3", "column 'b'", "nan", "3 of 8", "rows with one: 2"]),
    "infinity": ("1,2\n-inf,4\n", ["line 2", "column 'c0'", "-inf", "1 of 4"]),
    "overflow": ("1,2\n3,1e999\n", ["line 2", "column 'c1'", "inf"]),
    "nothing": ("", ["is empty"]),
    "byte order mark alone": ("\ufeff", ["is empty"]),
    "blanks alone": ("\n\n \n", ["is empty"]),
    "header alone": ("a,b\n", ["no rows below its header"]),
    "two headers": ("a,b\nc,d\n1,2\n", ["line 2", "column 'a'", "'c' is not a number"]),
    "open quote": ('a,b\n1,2\n"3,4\n5,6\n', ["line 3"]),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_is_refused_with_the_place(tmp_path: Path, case: str) -> None:
    text, fragments = BAD_TEXT[case]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    refused(lambda: read_table(path), DataError, [str(path), *fragments])


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 5000 + "3,\N{POUND SIGN}\n".encode("latin-1"))
    refused(lambda: read_table(path), DataError, [str(path), "line 5002", "UTF-8"])
    path.write_bytes("a,b\n1,2\n".encode("utf-16"))
    refused(lambda: read_table(path), DataError, [str(path), "line 1", "UTF-8"])


def archive(**members: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def array_file(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def with_nan() -> np.ndarray:
    values = normal(6, 3)
    values[4, 1], values[4, 2], values[5, 0] = np.nan, np.inf, -np.inf
    return values


ONE = np.ones((2, 2))
BAD_ARRAYS: dict[str, tuple[str, bytes, list[str]]] = {
    "complex": (".npy", array_file(ONE + 1j), ["complex128"]),
    "strings": (".npy", array_file(np.array([["a", "b"]])), ["<U1"]),
    "bytes": (".npy", array_file(np.array([[b"a"]])), ["|S1"]),
    "dates": (".npy", array_file(np.array(["2020-01-01"], dtype="M8[D]")), ["datetime64[D]"]),
    "structured": (
        ".npy",
        array_file(np.zeros(2, dtype=[("a", "f8"), ("b", "i4")])),
        ["dtype", "('a', '<f8')"],
    ),
    "objects": (".npy", array_file(np.array([[1, None]], dtype=object)), ["Python objects", "astype(float)"]),
    "objects in npz": (".npz", archive(a=np.array([[1, None]], dtype=object)), ["Python objects"]),
    "three dimensions": (".npy", array_file(np.zeros((4, 2, 3))), ["(4, 2, 3)", "(rows, columns)"]),
    "no dimension": (".npy", array_file(np.array(3.0)), ["shape ()"]),
    "no rows": (".npy", array_file(np.zeros((0, 3))), ["(0, 3)"]),
    "no columns": (".npy", array_file(np.zeros((3, 0))), ["(3, 0)"]),
    "no values": (".npy", array_file(np.zeros(0)), ["(0,)"]),
    "nan": (
        ".npy",
        array_file(with_nan()),
        ["row 4 (from 0)", "column 'c1'", "nan", "3 of 18", "rows with one: 2"],
    ),
    "text": (".npy", b"a,b\n1,2\n", ["no NumPy file"]),
    "nothing": (".npy", b"", ["no NumPy file"]),
    "cut short": (".npy", array_file(normal(9, 9))[:300], ["damaged"]),
    "cut short npz": (".npz", archive(a=normal(9, 9))[:300], ["no NumPy file"]),
    "nothing in npz": (".npz", archive(), ["holds no array"]),
    "unknown ending": (".parquet", b"", [".npy", ".csv", ".parquet"]),
    "no ending": ("", b"", [".npy", ".csv"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path: Path, case: str) -> None:
    ending, content, fragments = BAD_ARRAYS[case]
    path = tmp_path / f"t{ending}"
    path.write_bytes(content)
    refused(lambda: read_table(path), DataError, [str(path), *fragments])


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez_compressed(path, normal(100, 5))
    content = bytearray(path.read_bytes())
    content[200:260] = zlib.compress(b"?" * 60).ljust(60, b"?")
    path.write_bytes(bytes(content))
    refused(lambda: read_table(path), DataError, [str(path), "damaged"])


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = npy(tmp_path / "t.npy", np.array([Evil()], dtype=object))
    refused(lambda: read_table(path), DataError, [path, "could run code"])
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: read_table("no.csv"), DataError, [f"no file {tmp_path / 'no.csv'}"])
    (tmp_path / "dir.npy").mkdir()
    refused(lambda: read_table("dir.npy"), DataError, ["dir.npy", "directory"])


def test_keys_of_npz(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, mine=ONE, other=2 * ONE)
    assert read_table(path, key="other").values.tolist() == [[2, 2], [2, 2]]
    refused(lambda: read_table(path), ConfigError, [str(path), "2 arrays", "data.key", "mine, other"])
    refused(lambda: read_table(path, key="no"), ConfigError, [str(path), "'no'", "mine, other"])
    text = save(tmp_path / "t.csv", ONE)
    refused(lambda: read_table(text, key="mine"), ConfigError, [text, "data.key=mine", ".npz"])


def refused(call: Callable[[], object], kind: type[FlowtrainError], fragments: list[str]) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [part for part in fragments if part not in message] == [], message


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
def test_columns_are_chosen_in_the_order_asked_for(tmp_path: Path, columns: Any, expected: list[int]) -> None:
    values = normal(5, 4)
    table = read_table(save(tmp_path / "t.csv", values, list("abcd")), columns=columns)
    np.testing.assert_array_equal(table.values, values[:, expected])
    assert table.columns == tuple("abcd"[i] for i in expected)
    assert table.indices == tuple(expected)
    if all(name not in str(columns) for name in "abcd"):
        np.testing.assert_array_equal(
            read_table(npy(tmp_path / "t.npy", values), columns=columns).values, values[:, expected]
        )


def test_a_name_comes_before_a_slice(tmp_path: Path) -> None:
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
def test_columns_that_are_not_there(tmp_path: Path, columns: Any, fragments: list[str]) -> None:
    path = save(tmp_path / "t.csv", normal(3, 4), list("abcd"))
    refused(lambda: read_table(path, columns=columns), ConfigError, fragments)


def test_columns_without_or_with_the_same_names(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", normal(3, 4))
    refused(lambda: read_table(path, columns=[9]), ConfigError, [path, "no column 9", "0 to 3"])
    path = save(tmp_path / "t.csv", normal(3, 2), ["a", "a"])
    refused(lambda: read_table(path, columns=["a"]), ConfigError, [path, "2 columns named 'a'"])


# Splits


def rows_of(values: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in values.tolist()]


def epoch(data: ArrayData, n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.cat([data.train_batch(step, batch, seed) for step in range(n // batch)])


@pytest.mark.parametrize("held", [(), ("val",), ("test",), ("val", "test")], ids=str)
def test_splits_are_disjoint_and_cover_the_file(tmp_path: Path, held: tuple[str, ...]) -> None:
    values = normal(50, 3).astype(np.float32)
    files = {f"{name}_path": npy(tmp_path / f"{name}.npy", normal(4, 3, seed=9)) for name in held}
    data = ArrayData(npy(tmp_path / "t.npy", values), val_fraction=0.2, **files)
    split = {"val": 10, "test": 5}
    n = 50 - sum(count for name, count in split.items() if name not in held)
    parts = [epoch(data, n), *(data.split(name) for name in split if name not in held)]
    assert [len(part) for part in parts[1:]] == [count for name, count in split.items() if name not in held]
    assert sorted(rows_of(torch.cat(parts))) == sorted(map(tuple, values.tolist()))
    for name in held:
        np.testing.assert_array_equal(data.split(name), normal(4, 3, seed=9).astype(np.float32))


def test_the_split_depends_on_the_data_seed_alone(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", normal(100, 2))
    same, again, other = ArrayData(path), ArrayData(path), ArrayData(path, seed=1)
    assert torch.equal(same.val, again.val)
    assert torch.equal(same.test, again.test)
    assert not torch.equal(same.val, other.val)


def test_what_a_data_set_has(tmp_path: Path) -> None:
    data = ArrayData(save(tmp_path / "t.csv", normal(40, 3), ["a", "b", "c"]))
    assert data.event_shape == (3,)
    assert data.columns == ("a", "b", "c")
    assert {data.val.dtype, data.test.dtype, data.train_batch(0, 4, 0).dtype} == {torch.float32}
    assert data.entropy is None
    assert data.log_prob(data.val) is None


@pytest.mark.parametrize("d", [1, 300])
def test_from_one_column_to_hundreds(tmp_path: Path, d: int) -> None:
    values = normal(30, d)
    for path in (npy(tmp_path / "t.npy", values), save(tmp_path / "t.csv", values)):
        data = ArrayData(path)
        assert data.train_batch(0, 7, 0).shape == (7, d)
        assert data.val.shape == data.test.shape == (3, d)


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_rows(tmp_path: Path, n: int) -> None:
    path = npy(tmp_path / "t.npy", normal(n, 2))
    refused(
        lambda: ArrayData(path),
        DataError,
        [path, f"{n} row", f"{max(n - 2, 0)} for training", "1 for val", "at least 2"],
    )


def test_few_rows_are_enough(tmp_path: Path) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", normal(4, 2)))
    assert (len(data.val), len(data.test), data.train_batch(0, 4, 0).unique(dim=0).shape[0]) == (1, 1, 2)
    one = npy(tmp_path / "one.npy", normal(1, 2))
    refused(lambda: ArrayData(one, val_path=one, test_path=one), DataError, ["1 for training", "at least 2"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "x", None, True])
@pytest.mark.parametrize("name", ["val", "test"])
def test_fractions_outside_0_to_1(tmp_path: Path, name: str, fraction: Any) -> None:
    path = npy(tmp_path / "t.npy", normal(9, 2))
    call: dict[str, Any] = {f"{name}_fraction": fraction}
    refused(lambda: ArrayData(path, **call), ConfigError, [f"data.{name}_fraction={fraction}", f"data.{name}_path"])
    # A fraction that nothing is split by is not looked at
    ArrayData(path, **call, **{f"{name}_path": path})


def test_fractions_that_leave_nothing(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", normal(9, 2))
    refused(lambda: ArrayData(path, val_fraction=0.5, test_fraction=0.5), ConfigError, ["below 1"])


def test_no_path() -> None:
    refused(lambda: ArrayData(None), ConfigError, ["data.path=FILE"])


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", normal(9, 3), ["a", "b", "c"])
    narrow = save(tmp_path / "narrow.csv", normal(9, 2), ["a", "b"])
    swapped = save(tmp_path / "swapped.csv", normal(9, 3), ["a", "c", "b"])
    renamed = save(tmp_path / "renamed.csv", normal(9, 3), ["a", "b", "z"])
    for option in ("val_path", "test_path"):
        refused(lambda o=option: ArrayData(path, **{o: narrow}), DataError, [path, "3 columns", narrow, "has 2"])
        refused(
            lambda o=option: ArrayData(path, **{o: swapped}),
            DataError,
            [path, swapped, "order", "'c'", "'b'", "column 1"],
        )
        refused(
            lambda o=option: ArrayData(path, **{o: renamed}),
            DataError,
            [path, renamed, "'z'", "'c'", "column 2"],
        )
        bare = npy(tmp_path / "bare.npy", normal(9, 3))
        assert ArrayData(path, **{option: bare}).columns == ("a", "b", "c")
    by_name = ArrayData(path, test_path=swapped, columns=["a", "b", "c"])
    np.testing.assert_array_equal(by_name.test, read_table(swapped).values[:, [0, 2, 1]].astype(np.float32))


# Batches


def test_a_batch_is_a_pure_function_of_step_size_and_seed(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", normal(50, 2))
    data = ArrayData(path)
    batches = {step: data.train_batch(step, 16, 7) for step in range(12)}
    fresh = ArrayData(path)
    for step in (11, 0, 5, 5, 2):
        assert torch.equal(fresh.train_batch(step, 16, 7), batches[step])
        assert not torch.equal(fresh.train_batch(step, 16, 8), batches[step])
    batches[0].zero_()
    assert fresh.train_batch(0, 16, 7).abs().min() > 0
    assert data.train_batch(0, 16, 7).abs().min() > 0


@pytest.mark.parametrize("batch", [1, 7, 40, 41, 100])
def test_every_epoch_visits_every_row_once(tmp_path: Path, batch: int) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", normal(50, 1)))
    n, epochs = 40, 7
    stream = torch.cat([data.train_batch(step, batch, 3) for step in range(-(-n * epochs // batch))])
    orders = stream[: n * epochs].reshape(epochs, n)
    assert all(torch.equal(order.sort().values, orders[0].sort().values) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == epochs
    # The stream of rows is the same however it is cut
    assert torch.equal(stream[:n], epoch(data, n, 8, seed=3))


def test_an_epoch_is_shuffled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", normal(50, 2)))
    sizes = []

    def counted(n: int, **options: Any) -> torch.Tensor:
        sizes.append(n)
        return permute(n, **options)

    permute = torch.randperm
    monkeypatch.setattr(torch, "randperm", counted)
    for step in range(12):
        data.train_batch(step, 10, 0)
    # 120 rows are three epochs of 40
    assert sizes == [40, 40, 40]


# Statistics and columns that no density fits


def test_statistics_are_those_of_the_training_rows(tmp_path: Path) -> None:
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
    # Whoever changes them in place must not change the data set's
    stats[0].zero_()
    assert data.statistics()[0].abs().min() > 0  # type: ignore[index]


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, -1e8, 1e30])
@pytest.mark.parametrize("standardize", [True, False])
def test_a_constant_column_is_named(tmp_path: Path, value: float, standardize: bool) -> None:
    values = normal(50, 6)
    values[:, [1, 4]] = value
    path = save(tmp_path / "t.csv", values, list("abcdef"))
    refused(
        lambda: ArrayData(path, standardize=standardize),
        DataError,
        [path, "columns 'b', 'e' are constant", "'data.columns=[0,2:4,5]'", "data.dequantize=true"],
    )
    assert ArrayData(path, columns=[0, "2:4", 5]).columns == ("a", "c", "d", "f")


def test_constant_in_training_alone_is_refused(tmp_path: Path) -> None:
    train, test = normal(20, 2), normal(20, 2)
    train[:, 1] = 3
    paths = [npy(tmp_path / name, values) for name, values in (("a.npy", train), ("b.npy", test))]
    refused(lambda: ArrayData(paths[0], test_path=paths[1]), DataError, [paths[0], "column 'c1' is constant"])
    refused(lambda: ArrayData(paths[0], columns=[1]), DataError, ["there are no others"])


def test_what_float32_cannot_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = normal(50, 2)
    values[:, 1] += 1e7
    path = npy(tmp_path / "t.npy", values)
    refused(lambda: ArrayData(path), DataError, ["column 'c1' is constant to the precision of float32"])
    values[:, 1] -= 0.99e7
    ArrayData(npy(tmp_path / "t.npy", values))
    assert "float32 loses digits of 'c1'" in caplog.text
    assert "c0" not in caplog.text
    values[3, 0] = 1e39
    refused(lambda: ArrayData(npy(tmp_path / "t.npy", values)), DataError, ["row 3", "'c0'", "1e+39", "float32"])


# Discrete data


def counts(n: int = 400, d: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 17, size=(n, d))
    values[:, 1] = 5
    return values


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", counts() - 8)
    data = ArrayData(path, dequantize=True)
    assert data.samples == Samples((3,), discrete=True, standardized=True)
    parts = [epoch(data, 320, 32), data.val, data.test]
    assert {part.dtype for part in parts} == {torch.int64}
    assert sorted(rows_of(torch.cat(parts))) == sorted(map(tuple, (counts() - 8).tolist()))


def test_statistics_count_the_noise_in(tmp_path: Path) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", counts()), dequantize=True)
    train = epoch(data, 320).double()
    mean, std = data.statistics()  # type: ignore[misc]
    np.testing.assert_allclose(mean, train.mean(0) + 1 / 2, rtol=1e-12)
    np.testing.assert_allclose(std, (train.var(0, correction=0) + 1 / 12).sqrt(), rtol=1e-12)
    noisy = torch.cat([dequantize(train.long(), train) for _ in range(30)])
    np.testing.assert_allclose(mean, noisy.mean(0), atol=0.02)
    np.testing.assert_allclose(std, noisy.std(0), atol=0.02)


# Images and labels


def pixels(tmp_path: Path, n: int = 60) -> str:
    """Rows of 12 values 0..16, then a label 0..2 that the first of them tells."""
    values = np.random.default_rng(0).integers(0, 17, size=(n, 13))
    values[:, 0], values[:, 12] = np.arange(n) % 3, np.arange(n) % 3
    return npy(tmp_path / "t.npy", values)


def test_rows_become_images_of_bytes_with_their_labels(tmp_path: Path) -> None:
    path = pixels(tmp_path)
    data = ArrayData(path, label=12, event_shape=[1, 3, 4], levels=17)
    assert data.samples == Samples((1, 3, 4), discrete=True, levels=17, classes=3)
    assert (data.statistics(), data.columns) == (None, ())
    x, label = data.train_batch(1, 7, 5), data.train_labels(1, 7, 5)
    assert label is not None
    assert (x.shape, x.dtype, label.dtype) == ((7, 1, 3, 4), torch.uint8, torch.int64)
    for images, labels in ((x, label), (data.val, data.val_labels), (data.test, data.test_labels)):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    every = torch.cat([epoch(data, 48, 4), data.val, data.test]).flatten(1)
    assert sorted(rows_of(every)) == sorted(map(tuple, np.load(path)[:, :12].tolist()))


def test_labels_of_files_of_their_own(tmp_path: Path) -> None:
    train = pixels(tmp_path)
    data = ArrayData(train, val_path=train, test_path=train, columns=["0:12"], label=-1, levels=17)
    assert (data.event_shape, data.classes) == ((12,), 3)
    assert torch.equal(data.test_labels, data.test[:, 0].long())  # type: ignore[arg-type]
    assert data.columns == tuple(f"c{i}" for i in range(12))


def test_images_of_real_numbers_are_standardised_by_pixel(tmp_path: Path) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", normal(50, 12)), event_shape=[3, 2, 2])
    mean, std = data.statistics()  # type: ignore[misc]
    assert mean.shape == std.shape == (3, 2, 2)
    assert data.samples == Samples((3, 2, 2), standardized=True)
    flow = Flow((3, 2, 2), Standardize((3, 2, 2)))
    flow.bijection.fit(mean, std)  # type: ignore[operator]
    z, _ = flow.bijection.inverse(data.val.double())
    torch.testing.assert_close(z, ((data.val.flatten(1) - mean.flatten()) / std.flatten()).view_as(z))


BAD_IMAGES: list[tuple[dict[str, Any], type[FlowtrainError], list[str]]] = [
    ({"levels": 16}, DataError, ["16 is outside 0 to 15", "data.levels=16", "from 0 to 16"]),
    ({"levels": 1}, ConfigError, ["data.levels=1", "at least 2"]),
    ({"levels": 17, "alpha": 0.5}, ConfigError, ["data.alpha=0.5", "below 0.499"]),
    ({"levels": 17, "standardize": True}, ConfigError, ["data.standardize=true and data.levels"]),
    ({"event_shape": [1, 3, 4]}, ConfigError, ["takes 12 columns, and there are 13", "data.label"]),
    ({"event_shape": [12], "label": 12}, ConfigError, ["channels, height and width"]),
    ({"event_shape": 12}, ConfigError, ["data.event_shape=12"]),
    ({"label": 13}, ConfigError, ["data.label", "no column 13"]),
    ({"label": "0:2"}, ConfigError, ["data.label=0:2 names 2 columns"]),
    ({"label": 12, "columns": [12]}, ConfigError, ["data.label=12 is the only column"]),
    ({"label": "digit"}, ConfigError, ["no column 'digit'"]),
]


@pytest.mark.parametrize(("arguments", "error", "fragments"), BAD_IMAGES, ids=str)
def test_images_refused(
    tmp_path: Path, arguments: dict[str, Any], error: type[FlowtrainError], fragments: list[str]
) -> None:
    refused(lambda: ArrayData(pixels(tmp_path), **{"dequantize": True, **arguments}), error, fragments)


def test_labels_by_name_wherever_they_stand(tmp_path: Path) -> None:
    for name, head in (("train", "a,digit,b"), ("test", "a,b,digit")):
        rows = [{"a": i, "b": 2 * i, "digit": i % 3} for i in range(40)]
        lines = [",".join(str(row[key]) for key in head.split(",")) for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *lines]))
    train, test = str(tmp_path / "train.csv"), str(tmp_path / "test.csv")
    data = ArrayData(train, test_path=test, label="digit", dequantize=True)
    assert data.columns == ("a", "b")
    assert torch.equal(data.test_labels, data.test[:, 0] % 3)  # type: ignore[arg-type]
    # kept by data.columns it would still be no part of a sample
    assert ArrayData(train, columns=["0:3"], label=1, dequantize=True).columns == ("a", "b")


def test_labels_refused(tmp_path: Path) -> None:
    values = normal(20, 2)
    values[:, 1] = np.arange(20) % 2
    for row, bad in ((4, -1.0), (7, 0.5), (9, 1e6)):
        spoiled = values.copy()
        spoiled[row, 1] = bad
        path = npy(tmp_path / "t.npy", spoiled)
        refused(lambda p=path: ArrayData(p, label=1), DataError, [f"row {row}", "'c1'", f"{bad:g} is no label"])


def test_dequantizing_fractions_is_refused_with_the_cell(tmp_path: Path) -> None:
    values = counts().astype(float)
    path = save(tmp_path / "t.csv", values, ["a", "b", "c"])
    values[7, 2] += 0.25
    bad = save(tmp_path / "bad.csv", values, ["a", "b", "c"])
    fragments = [f"{bad}, line 9, column 'c'", str(values[7, 2]), "whole", "data.dequantize"]
    refused(lambda: ArrayData(bad, dequantize=True), DataError, fragments)
    refused(lambda: ArrayData(path, test_path=bad, dequantize=True), DataError, fragments)


def test_only_whole_numbers_that_repeat_are_called_discrete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = normal(400, 3)
    values[:, 1] = counts()[:, 0]
    values[:, 2] = np.arange(400)
    path = npy(tmp_path / "t.npy", values)
    ArrayData(path)
    assert "looks discrete in 'c1':" in caplog.text
    assert "data.dequantize=true" in caplog.text
    caplog.clear()
    ArrayData(path, columns=[0, 2])
    ArrayData(npy(tmp_path / "t.npy", counts()), dequantize=True)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# Headers that may not be what they seem

ODD_HEADERS = {
    "pandas index": (",a,b\n0,1,2\n1,3,4\n", None, "first column has no name"),
    "pandas columns without names": ("0,1,2\n3,4,5\n", None, "line 1 is 0, 1, 2"),
    "a bad cell in line 1": ("1.5,2,oops\n3,4,5\n", None, "taken for the header"),
    "index left out": (",a,b\n0,1,2\n1,3,4\n", ["1:"], None),
    "plain": ("a,b,c\n0,1,2\n1,3,4\n", None, None),
    "our own names": ("c0,c1,c2\n0,1,2\n1,3,4\n", None, None),
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_odd_headers_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    text, columns, expected = ODD_HEADERS[case]
    (tmp_path / "t.csv").write_text(text)
    read_table(tmp_path / "t.csv", columns=columns)
    if expected is None:
        assert caplog.text == ""
    else:
        assert expected in caplog.text


# The configuration


def test_the_config_is_the_constructor() -> None:
    config = OmegaConf.load(ROOT / "configs" / "data" / "array.yaml")["data"]
    assert isinstance(config.pop("name"), str)
    assert config.pop("_target_") == f"{ArrayData.__module__}.{ArrayData.__name__}"
    signature = inspect.signature(ArrayData.__init__).parameters
    assert set(config) == set(signature) - {"self"}
    for name, value in config.items():
        default = signature[str(name)].default
        assert value == (None if default is inspect.Parameter.empty else default), name


def test_a_saved_config_gives_the_same_columns(tmp_path: Path) -> None:
    columns = OmegaConf.create(["1:30", "0:1", 31, "c32"])
    assert OmegaConf.create(OmegaConf.to_yaml(columns)) == columns
    path = npy(tmp_path / "t.npy", normal(5, 40))
    assert read_table(path, columns=columns).indices == (*range(1, 30), 0, 31, 32)


# Real data


def test_gas() -> None:
    train, val, test = real("gas/train.csv", "gas/val.csv", "gas/test.csv")
    data = ArrayData(train, val_path=val, test_path=test)
    assert data.columns == ("conc", "X.ppm..", "conc.1", "X.ppm...1", "channels.", "V16", "V17", "V18")
    assert data.val.shape == data.test.shape == (10000, 8)
    expected = np.loadtxt(train, delimiter=",", skiprows=1)
    mean, std = data.statistics()  # type: ignore[misc]
    np.testing.assert_allclose(mean, expected.mean(0), atol=1e-12)
    np.testing.assert_allclose(std, expected.std(0), rtol=1e-12)
    assert sorted(rows_of(epoch(data, 10000, 500))) == sorted(map(tuple, expected.astype(np.float32).tolist()))


def test_optdigits() -> None:
    train, test = real("optdigits/optdigits.tra", "optdigits/optdigits.tes")
    for columns, keep in ((["0:64"], "[1:39,40:64]"), (None, "[1:39,40:65]")):
        refused(
            lambda c=columns: ArrayData(train, test_path=test, columns=c),
            DataError,
            ["columns 'c0', 'c39' are constant", f"data.columns={keep}", "data.dequantize=true"],
        )
    assert ArrayData(train, test_path=test, columns=["1:39", "40:64"]).event_shape == (62,)
    data = ArrayData(train, test_path=test, columns=["0:64"], dequantize=True)
    assert data.event_shape == (64,)
    assert (len(data.val), len(data.test)) == (382, 1797)
    np.testing.assert_array_equal(data.test, np.loadtxt(test, delimiter=",")[:, :64])
    mean, std = data.statistics()  # type: ignore[misc]
    standard = (dequantize(epoch(data, 3400, 100), mean) - mean) / std
    assert standard.mean(0).abs().max() < 0.1
    np.testing.assert_allclose(standard.std(0), 1, atol=0.25)
