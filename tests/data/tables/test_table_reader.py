"""data=array: .npy and .npz files, including damaged, foreign and malicious files."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refused
from helpers.files import TABLES, normal, npy, save
from hypothesis import HealthCheck, given, settings

from flowtrain.data.tables.table_reader import read_table
from flowtrain.utils.errors import ConfigError, DataError


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


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int16", "int64", "uint64", "float16", "float32", "float64", ">f4", ">i2"],
)
def test_real_dtypes_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    table = read_table(npy(tmp_path / "t.npy", values))
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(table.values, values.astype(np.float64))


def test_one_dimensional_array_is_one_column(tmp_path: Path) -> None:
    assert read_table(npy(tmp_path / "t.npy", np.arange(5.0))).values.shape == (5, 1)
    (tmp_path / "t.csv").write_text("1.5\n2.5\n")
    assert read_table(tmp_path / "t.csv").values.tolist() == [[1.5], [2.5]]


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
    "zero dimensions": (".npy", array_file(np.array(3.0)), ["shape ()"]),
    "no rows": (".npy", array_file(np.zeros((0, 3))), ["(0, 3)"]),
    "no columns": (".npy", array_file(np.zeros((3, 0))), ["(3, 0)"]),
    "no values": (".npy", array_file(np.zeros(0)), ["(0,)"]),
    "nan": (
        ".npy",
        array_file(with_nan()),
        ["row 4 (from 0)", "column 'c1'", "nan", "3 of 18", "2 of 6 rows"],
    ),
    "text": (".npy", b"a,b\n1,2\n", ["not a NumPy file"]),
    "empty file": (".npy", b"", ["not a NumPy file"]),
    "truncated": (".npy", array_file(normal(9, 9))[:300], ["damaged"]),
    "truncated npz": (".npz", archive(a=normal(9, 9))[:300], ["not a NumPy file"]),
    "empty npz": (".npz", archive(), ["contains no array"]),
    "unknown suffix": (".pkl", b"", [".npy", ".csv", ".parquet", ".pkl"]),
    "no suffix": ("", b"", [".npy", ".csv"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path: Path, case: str, refused: Refused) -> None:
    ending, content, fragments = BAD_ARRAYS[case]
    path = tmp_path / f"t{ending}"
    path.write_bytes(content)
    refused(lambda: read_table(path), DataError, [str(path), *fragments])


def test_damaged_compression_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.npz"
    np.savez_compressed(path, normal(100, 5))
    content = bytearray(path.read_bytes())
    content[200:260] = zlib.compress(b"?" * 60).ljust(60, b"?")
    path.write_bytes(bytes(content))
    refused(lambda: read_table(path), DataError, [str(path), "damaged"])


def test_pickled_arrays_are_never_loaded(tmp_path: Path, refused: Refused) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = npy(tmp_path / "t.npy", np.array([Evil()], dtype=object))
    refused(lambda: read_table(path), DataError, [path, "could run code"])
    assert not (tmp_path / "ran").exists()


def test_missing_file_and_directory_errors_name_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: read_table("no.csv"), DataError, [f"no file {tmp_path / 'no.csv'}"])
    (tmp_path / "dir.npy").mkdir()
    refused(lambda: read_table("dir.npy"), DataError, ["dir.npy", "directory"])


def test_npz_arrays_are_chosen_by_key(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, mine=ONE, other=2 * ONE)
    assert read_table(path, key="other").values.tolist() == [[2, 2], [2, 2]]
    refused(lambda: read_table(path), ConfigError, [str(path), "2 arrays", "data.key", "mine, other"])
    refused(lambda: read_table(path, key="no"), ConfigError, [str(path), "'no'", "mine, other"])
    text = save(tmp_path / "t.csv", ONE)
    refused(lambda: read_table(text, key="mine"), ConfigError, [text, "data.key=mine", ".npz"])
