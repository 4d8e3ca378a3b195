"""data=array: warnings about data whose likelihood would be meaningless, with advice that works."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Refused
from helpers.files import normal, npy

from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.table_checks import row_hashes
from flowtrain.utils.errors import DataError, FlowtrainError

RNG = np.random.default_rng(7)
N = 500
COUNTS = RNG.integers(0, 6, N).astype(float)
REAL = normal(N, 3)


def table(*columns: np.ndarray) -> np.ndarray:
    return np.column_stack(columns)


@pytest.fixture(params=[False, True], ids=["in memory", "streamed"])
def table_warnings(request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> object:
    """Returns a function that returns the warnings about a table, which is read into memory or streamed."""

    def call(values: np.ndarray, **options: object) -> list[str]:
        caplog.clear()
        ArrayData(npy(tmp_path / "t.npy", values), memory_map=request.param, **options)  # type: ignore[arg-type]
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    return call


# a table, and for each expected warning the fragments that it contains
WARNED: dict[str, tuple[np.ndarray, list[list[str]]]] = {
    "regular columns": (REAL, []),
    "offset": (REAL + np.array([1e3, 0, -5]), []),
    "sum of other columns": (
        table(REAL, REAL[:, 0] - 2 * REAL[:, 2]),
        [["dependent", "'c0', 'c2'", "'data.columns="]],
    ),
    "rounded sum of other columns": (table(REAL, np.round(REAL.sum(1), 4)), [["dependent", "'data.columns="]]),
    "rescaled copy": (table(REAL, 1e6 * REAL[:, 0] + 5), [["dependent", "'c3' on 'c0'", "columns=[0:3]"]]),
    "noisy copy": (table(REAL, REAL[:, 0] + 0.001 * normal(N, 1, seed=3)[:, 0]), []),
    "duplicate rows": (
        np.repeat(REAL[:50], 10, 0),
        [["50 of 50 rows of the val", "50 of 50 rows of the test", "val_path"]],
    ),
    "duplicate rows of one column": (np.repeat(REAL[:50, :1], 10, 0), [["50 of 50 rows of the test"]]),
    "many zeros": (table(REAL, np.where(COUNTS < 3, 0.0, REAL[:, 0] ** 2)), [["'c3' are 0", "data.columns"]]),
    "clipped": (table(REAL, REAL[:, 0].clip(-1, 1)), [["'c3' are -1", "'c3' are 1"]]),
    "counts": (table(REAL, COUNTS), [["'c3'", "'data.dequantize=[3]'"]]),
    "all counts": (table(COUNTS, COUNTS[::-1]), [["'c0', 'c1'", "data.dequantize=true"]]),
    "multiples of 0.1": (table(REAL, np.round(REAL[:, 0], 1)), [["'c3'", "multiples of 0.1.", "round(x / 0.1)"]]),
    "multiples of 0.25": (table(REAL, COUNTS / 4 - 0.5), [["'c3'", "multiples of 0.25."]]),
    "counts with one exception": (
        table(REAL, np.where(np.arange(N) == 499, 48.7, COUNTS)),
        [["'c3'", "multiples of 0.1."]],
    ),
    "minutes since 1970": (
        table(REAL, 1.6e9 + 60 * COUNTS),
        [["'c3'", "multiples of 60.", "round((x - 1600000000) / 60)"]],
    ),
    "missing value code": (table(REAL, np.where(COUNTS < 1, -999, REAL[:, 0])), [["'c3' is -999"]]),
    "few distinct values off a grid": (
        table(REAL, np.sqrt(COUNTS + 2)),
        [["'c3'", "few distinct values", "data.columns"]],
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_suspicious_columns_give_the_expected_warnings(case: str, table_warnings: object) -> None:
    values, expected = WARNED[case]
    found = table_warnings(values)  # type: ignore[operator]
    assert len(found) == len(expected), found
    for message, fragments in zip(found, expected, strict=True):
        assert [part for part in fragments if part not in message] == [], message


@pytest.mark.parametrize("case", ["counts", "all counts", "sum of other columns", "rescaled copy"])
def test_suggested_option_removes_the_warning(case: str, table_warnings: object) -> None:
    """Setting the option that a warning suggests leaves no warning."""
    values = WARNED[case][0]
    option = re.search(r"data\.(\w+)=(\[[^]]*\]|true)", table_warnings(values)[0])  # type: ignore[operator]
    assert option is not None
    entries = option[2] == "true" or [int(e) if e.isdigit() else e for e in option[2].strip("[]").split(",")]
    assert table_warnings(values, **{option[1]: entries}) == []  # type: ignore[operator]


def test_noise_removes_the_linear_dependence_warning(table_warnings: object) -> None:
    """One-hot columns with noise no longer have a constant sum."""
    ones = np.eye(3)[COUNTS.astype(int) % 3]
    assert any("dependent" in message for message in table_warnings(table(REAL, ones)))  # type: ignore[operator]
    assert table_warnings(table(REAL, ones), dequantize=[3, 4, 5]) == []  # type: ignore[operator]


def test_duplicates_in_a_test_file_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = normal(40, 3, seed=5)
    own[:7] = REAL[:7]
    path, test = npy(tmp_path / "t.npy", REAL), npy(tmp_path / "test.npy", own)
    ArrayData(path, test_path=test, val_path=npy(tmp_path / "val.npy", own[7:]))
    assert "7 of 40 rows of the test set" in caplog.text
    assert "val set" not in caplog.text


def test_noise_allows_a_constant_integer_column(tmp_path: Path, refused: Refused) -> None:
    path = npy(tmp_path / "t.npy", table(REAL, np.full(N, 3.0)))
    refused(lambda: ArrayData(path), DataError, ["'c3' is constant", "'data.dequantize=[3]'"])
    assert ArrayData(path, dequantize=[3]).noisy == (3,)
    constant = npy(tmp_path / "c.npy", table(REAL, np.full(N, 3.5)))
    with pytest.raises(DataError) as caught:
        ArrayData(constant)
    assert "dequantize" not in str(caught.value)


def test_fewer_rows_than_columns_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refused: Refused
) -> None:
    path = npy(tmp_path / "t.npy", normal(40, 100))
    refused(lambda: ArrayData(path), DataError, [path, "32 training rows", "100 columns", "data.columns"])
    refused(lambda: ArrayData(path, memory_map=True), DataError, ["32 training rows", "100 columns"])
    assert ArrayData(path, columns=["0:31"]).event_shape == (31,)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    # a table with as many rows as columns also lies in a hyperplane
    ArrayData(path, columns=["0:32"])
    assert "32 rows of 32 columns" in caplog.text
    # an image may have more pixels than there are rows
    assert ArrayData(path, event_shape=[1, 10, 10]).event_shape == (1, 10, 10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_rows_have_equal_hashes(dtype: type) -> None:
    # the bits of such integers are mostly zero
    values = RNG.integers(0, 50, (5000, 3)).astype(dtype)
    distinct = len(np.unique(values, axis=0))
    assert len(np.unique(row_hashes(values))) == distinct
    assert row_hashes(np.array([[0.0, 1.0]])) == row_hashes(np.array([[-0.0, 1.0]]))
    assert row_hashes(np.array([[2.0, 1.0]])) != row_hashes(np.array([[1.0, 2.0]]))
    # the hash of a row does not depend on the other rows
    assert row_hashes(values)[4321] == row_hashes(values[4321:4322])[0]


def test_duplicate_rows_are_estimated_from_sampled_hashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only some hashes are kept. Copies of a row share its hash, so their fraction can be estimated."""
    values = np.repeat(normal(2000, 2), 2, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowtrain.data.tables.streaming.HASHES", 400)
        ArrayData(npy(tmp_path / "t.npy", values), memory_map=True)
    shares = re.findall(r"(\d+) of (\d+) rows", caplog.text)
    assert len(shares) == 2
    for copies, looked in shares:
        assert 10 < int(looked) < 100
        assert int(copies) / int(looked) == pytest.approx(0.8, abs=0.2)


REAL_CASES = {
    "collinear": ["'c2' on 'c0', 'c1'"],
    "dups": ["300 of 300 rows of the test set"],
    "zeroinfl": ["60% of the values of 'c0' are 0"],
    "counts346": ["data.dequantize=true"],
}


@pytest.mark.parametrize("case", REAL_CASES)
def test_warnings_on_real_tables(case: str, caplog: pytest.LogCaptureFixture, real: Callable[..., list[str]]) -> None:
    (path,) = real(f"cases/{case}.npy")
    ArrayData(path)
    assert [part for part in REAL_CASES[case] if part not in caplog.text] == []


def test_wide_real_table_is_refused(real: Callable[..., list[str]], refused: Refused) -> None:
    (path,) = real("cases/wide.npy")
    refused(lambda: ArrayData(path), DataError, ["32 training rows", "100 columns"])


# Noise on selected columns


def mixed_table(tmp_path: Path) -> str:
    values = table(REAL[:, 0], COUNTS, REAL[:, 1], 7 + COUNTS[::-1])
    return npy(tmp_path / "t.npy", values.astype(np.float32))


@pytest.mark.parametrize("memory_map", [False, True])
def test_noise_is_added_only_to_the_named_columns(tmp_path: Path, memory_map: bool) -> None:
    path = mixed_table(tmp_path)
    data = ArrayData(path, dequantize=[1, 3], memory_map=memory_map)
    plain = ArrayData(path, memory_map=memory_map)
    assert (data.integer_valued, data.noisy, data.samples.noisy) == (False, (1, 3), (1, 3))
    pairs = [(data.split(name), plain.split(name)) for name in ("val", "test")]
    pairs += [(data.train_batch(step, 100, 0), plain.train_batch(step, 100, 0)) for step in range(8)]
    for x, raw in pairs:
        assert x.dtype == raw.dtype == torch.float32
        torch.testing.assert_close(x[:, [0, 2]], raw[:, [0, 2]])
        torch.testing.assert_close(x[:, [1, 3]].floor(), raw[:, [1, 3]])
    u = torch.cat([(x - raw)[:, [1, 3]] for x, raw in pairs]).double()
    assert abs(float(u.mean()) - 0.5) < 0.02
    assert abs(float(u.var()) - 1 / 12) < 0.01
    mean, std = data.statistics()  # type: ignore[misc]
    bare = plain.statistics()
    assert bare is not None
    noise = torch.tensor([0.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(mean, bare[0] + noise / 2)
    torch.testing.assert_close(std, (bare[1].square() + noise / 12).sqrt())


def test_noise_is_fresh_in_training_and_fixed_when_held_out(tmp_path: Path) -> None:
    path = mixed_table(tmp_path)
    data, again = (ArrayData(path, dequantize=[1, 3]) for _ in range(2))
    assert torch.equal(data.test, again.test)
    assert not torch.equal(data.test[:, 1] % 1, data.val[:, 1] % 1)
    step = data.train_batch(9, 64, 3)
    assert torch.equal(step, again.train_batch(9, 64, 3))
    # the noise differs between two epochs
    first, second = (data.train_batch(i, 400, 0) for i in (0, 1))
    assert not np.isin(first[:, 1].numpy(), second[:, 1].numpy()).any()
    # the noise does not depend on the rank that has the row
    parts = [data.train_share(9, 64, 3, share) for share in (slice(0, 20), slice(20, 64))]
    assert torch.equal(torch.cat(parts), step)


def test_noise_columns_are_selected_by_name_or_position(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = table(REAL[:, 0], COUNTS, REAL[:, 1], COUNTS[::-1])
    np.savetxt(path, rows, delimiter=",", header="x,n,y,m", comments="")
    named = {("n", 3): (1, 3), ("m",): (3,), "n": (1,), 1: (1,)}
    for asked, expected in named.items():
        asked = list(asked) if isinstance(asked, tuple) else asked
        assert ArrayData(str(path), dequantize=asked).noisy == expected  # type: ignore[arg-type]
    # positions refer to the file
    assert ArrayData(str(path), columns=["m", "x"], dequantize=["m"]).noisy == (0,)
    assert ArrayData(str(path), columns=["m", "x"], dequantize=[3]).noisy == (0,)
    every = ArrayData(str(path), columns=["n", "m"], dequantize=["m", "n"])
    assert (every.integer_valued, every.noisy) == (True, ())


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"dequantize": ["z"]}, ["'z'", "0 (c0)"]),
        ({"dequantize": [1], "columns": [0, 2]}, ["1", "0 (c0), 2 (c2)"]),
        ({"dequantize": []}, ["data.dequantize=[]"]),
        ({"dequantize": [1], "levels": 9}, ["data.levels"]),
        ({"dequantize": [0]}, ["'c0'", "not a whole number", "'data.dequantize=[1,3]'"]),
    ],
)
def test_noise_on_non_integer_columns_is_refused(
    tmp_path: Path, options: dict[str, object], fragments: list[str], refused: Refused
) -> None:
    path = mixed_table(tmp_path)
    refused(lambda: ArrayData(path, **options), FlowtrainError, fragments)  # type: ignore[arg-type]
