"""A streamed training file passes the same checks, with the same error messages, as a file read into memory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.table_reader import drop_option
from flowtrain.utils.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.mark.parametrize(
    ("row", "column", "value", "options", "says"),
    [
        (777, 1, np.nan, {}, "row 777 (from 0), column 'c1': the value is nan"),
        (777, 1, 1e39, {}, "row 777 (from 0), column 'c1': 1e+39 is beyond float32"),
        (900, 2, 7.5, {"dequantize": True, "columns": [2]}, "row 900 (from 0), column 'c2': 7.5 is not a whole"),
        (900, 2, 9, {"levels": 4, "columns": [2]}, "row 900 (from 0), column 'c2': 9 is outside 0 to 3"),
        (3, 2, -1, {"label": 2}, "row 3 (from 0), column 'c2': -1 is not a class label"),
        (999, 2, np.inf, {"label": 2}, "row 999 (from 0), column 'c2': the value is inf"),
    ],
)
def test_bad_value_error_names_the_row(
    row: int,
    column: int,
    value: float,
    options: dict[str, Any],
    says: str,
    tmp_path: Path,
    table: Callable[..., tuple[str, np.ndarray]],
    open_streamed: Callable[..., ArrayData],
) -> None:
    path, values = table(tmp_path, np.float64)
    values[row, column] = value
    np.save(path, values)
    with pytest.raises(DataError) as caught:
        open_streamed(path, **options)
    assert says in str(caught.value)


def test_constant_column_is_refused(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, values = table(tmp_path)
    values[:, 1] = 3
    np.save(path, values)
    with pytest.raises(DataError, match="column 'c1' is constant"):
        open_streamed(path)


def test_files_that_cannot_be_streamed_are_refused(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, values = table(tmp_path)
    for name, content, says in (
        ("fortran.npy", np.asfortranarray(values), "Fortran order"),
        ("cube.npy", np.zeros((2, 2, 2)), "has shape"),
        ("words.npy", np.array(["a"]), "dtype"),
        ("nothing.npy", np.zeros((0, 3)), "is empty"),
    ):
        np.save(tmp_path / name, content)
        with pytest.raises(DataError, match=says):
            open_streamed(str(tmp_path / name))
    whole = Path(path).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-40])
    with pytest.raises(DataError, match="cut short"):
        open_streamed(str(tmp_path / "cut.npy"))
    with pytest.raises(DataError, match="there is no file"):
        open_streamed(str(tmp_path / "none.npy"))
    np.savetxt(tmp_path / "x.csv", values)
    with pytest.raises(ConfigError, match=r"for \.npy files"):
        open_streamed(str(tmp_path / "x.csv"))


def test_truncated_or_replaced_file_is_an_error(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, values = table(tmp_path)
    data = open_streamed(path)
    first = data.train_batch(0, 880, 0)
    Path(path).rename(tmp_path / "old.npy")
    np.save(path, values + 1)
    assert torch.equal(data.train_batch(0, 880, 0), first)
    os.truncate(tmp_path / "old.npy", 4000)
    with pytest.raises(DataError, match="written to"):
        data.train_batch(1, 880, 0)


def message(call: Callable[[], object]) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        call()
    return str(caught.value)


BAD: dict[str, tuple[list[tuple[int, int, float]], dict[str, Any]]] = {
    "several bad values": ([(5, 1, np.nan), (700, 1, np.nan), (700, 2, np.inf)], {}),
    "bad value in the first row": ([(0, 1, np.nan)], {"dequantize": True}),
    "values outside the levels": ([(700, 2, 20), (900, 2, -4)], {"columns": [2], "levels": 4}),
    "label": ([(800, 2, 0.5)], {"label": 2}),
}


@pytest.mark.parametrize("case", BAD)
def test_streamed_and_in_memory_errors_agree(
    case: str, tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, values = table(tmp_path, np.float64)
    cells, options = BAD[case]
    for row, column, value in cells:
        values[row, column] = value
    np.save(path, values)
    streamed = message(lambda: open_streamed(path, **options))
    # rows can be left out only in memory
    streamed = streamed.replace(drop_option(None, in_blocks=True), drop_option(None, in_blocks=False))
    assert streamed == message(lambda: ArrayData(path, memory_map=False, **options))


def test_modified_file_is_an_error(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    """If a file is saved again in place, its length is the same, but the new rows have not been checked."""
    path, values = table(tmp_path)
    data = open_streamed(path)
    state = Path(path).stat()
    np.save(path, np.full_like(values, np.nan))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(DataError, match="written to"):
        data.train_batch(0, 8, 0)


@pytest.mark.parametrize("given", [(), ("val_path",), ("val_path", "test_path")])
def test_integer_columns_give_a_warning(
    table: Callable[..., tuple[str, np.ndarray]],
    open_streamed: Callable[..., ArrayData],
    given: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, values = table(tmp_path)
    np.save(tmp_path / "own.npy", values[:50])
    open_streamed(path, **{name: str(tmp_path / "own.npy") for name in given})
    assert "looks integer-valued in 'c2'" in caplog.text


def test_archives_are_not_streamed_and_other_files_have_no_key(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros((9, 2)))
    for asked in (True, "off"):
        with pytest.raises(ConfigError, match=r"data\.memory_map"):
            ArrayData(str(tmp_path / "x.npz"), key="a", memory_map=asked)  # type: ignore[arg-type]
    path, _ = table(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.key"):
        open_streamed(path, key="a")


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4',"]
)
def test_files_that_are_not_arrays_are_refused(
    content: bytes, tmp_path: Path, open_streamed: Callable[..., ArrayData]
) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match="not a NumPy file"):
        open_streamed(str(tmp_path / "x.npy"))
