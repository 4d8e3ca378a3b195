"""data=array: splitting one file, reading held-out sets from other files, and batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refused
from helpers.files import normal, npy, save

from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.table_reader import read_table
from flowtrain.utils.errors import ConfigError, DataError

# Splits


@pytest.mark.parametrize("held", [(), ("val",), ("test",), ("val", "test")], ids=str)
def test_splits_are_disjoint_and_cover_the_file(
    tmp_path: Path,
    held: tuple[str, ...],
    epoch: Callable[..., torch.Tensor],
    rows_of: Callable[..., list[tuple[float, ...]]],
) -> None:
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


def test_attributes_of_a_data_set(tmp_path: Path) -> None:
    data = ArrayData(save(tmp_path / "t.csv", normal(40, 3), ["a", "b", "c"]))
    assert data.event_shape == (3,)
    assert data.columns == ("a", "b", "c")
    assert {data.val.dtype, data.test.dtype, data.train_batch(0, 4, 0).dtype} == {torch.float32}
    assert data.entropy is None
    assert data.log_prob(data.val) is None


@pytest.mark.parametrize("d", [1, 300])
def test_any_number_of_columns_is_read(tmp_path: Path, d: int) -> None:
    values = normal(400, d)
    for path in (npy(tmp_path / "t.npy", values), save(tmp_path / "t.csv", values)):
        data = ArrayData(path)
        assert data.train_batch(0, 7, 0).shape == (7, d)
        assert data.val.shape == data.test.shape == (40, d)


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_rows_are_refused(tmp_path: Path, n: int, refused: Refused) -> None:
    path = npy(tmp_path / "t.npy", normal(n, 2))
    refused(
        lambda: ArrayData(path),
        DataError,
        [path, f"{n} row", f"{max(n - 2, 0)} for training", "1 for val", "at least 2"],
    )


def test_few_rows_are_enough(tmp_path: Path, refused: Refused) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", normal(4, 2)))
    assert (len(data.val), len(data.test), data.train_batch(0, 4, 0).unique(dim=0).shape[0]) == (1, 1, 2)
    one = npy(tmp_path / "one.npy", normal(1, 2))
    refused(lambda: ArrayData(one, val_path=one, test_path=one), DataError, ["1 for training", "at least 2"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "x", None, True])
@pytest.mark.parametrize("name", ["val", "test"])
def test_fractions_outside_0_to_1_are_refused(tmp_path: Path, name: str, fraction: Any, refused: Refused) -> None:
    path = npy(tmp_path / "t.npy", normal(9, 2))
    call: dict[str, Any] = {f"{name}_fraction": fraction}
    refused(lambda: ArrayData(path, **call), ConfigError, [f"data.{name}_fraction={fraction}", f"data.{name}_path"])
    # the fraction is not checked if the split does not use it
    ArrayData(path, **call, **{f"{name}_path": path})


def test_fractions_that_leave_no_training_rows_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = npy(tmp_path / "t.npy", normal(9, 2))
    refused(lambda: ArrayData(path, val_fraction=0.5, test_fraction=0.5), ConfigError, ["below 1"])


def test_missing_path_is_refused(refused: Refused) -> None:
    refused(lambda: ArrayData(None), ConfigError, ["data.path=FILE"])


def test_files_with_different_columns_are_refused(tmp_path: Path, refused: Refused) -> None:
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
def test_every_epoch_visits_every_row_once(tmp_path: Path, batch: int, epoch: Callable[..., torch.Tensor]) -> None:
    data = ArrayData(npy(tmp_path / "t.npy", normal(50, 1)))
    n, epochs = 40, 7
    stream = torch.cat([data.train_batch(step, batch, 3) for step in range(-(-n * epochs // batch))])
    orders = stream[: n * epochs].reshape(epochs, n)
    assert all(torch.equal(order.sort().values, orders[0].sort().values) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == epochs
    # the order of the rows does not depend on the batch size
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
    # 120 rows are three epochs of 40 rows
    assert sizes == [40, 40, 40]


# Real data


def test_gas_is_read_as_published(
    real: Callable[..., list[str]], rows_of: Callable[..., list[tuple[float, ...]]], epoch: Callable[..., torch.Tensor]
) -> None:
    train, val, test = real("gas/train.csv", "gas/val.csv", "gas/test.csv")
    data = ArrayData(train, val_path=val, test_path=test)
    assert data.columns == ("conc", "X.ppm..", "conc.1", "X.ppm...1", "channels.", "V16", "V17", "V18")
    assert data.val.shape == data.test.shape == (10000, 8)
    expected = np.loadtxt(train, delimiter=",", skiprows=1)
    mean, std = data.statistics()  # type: ignore[misc]
    np.testing.assert_allclose(mean, expected.mean(0), atol=1e-12)
    np.testing.assert_allclose(std, expected.std(0), rtol=1e-12)
    assert sorted(rows_of(epoch(data, 10000, 500))) == sorted(map(tuple, expected.astype(np.float32).tolist()))
