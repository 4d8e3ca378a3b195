"""data=array: integers, rows that are images, and labels."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refused
from helpers.files import normal, npy, save

from flowtrain.bijections.logit import dequantize
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Samples
from flowtrain.data.tables.array import ArrayData
from flowtrain.flow import Flow
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

# Integer data


def counts(n: int = 400, d: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 17, size=(n, d))
    values[:, 1] = 5
    return values


def test_integer_values_are_kept_as_integers(
    tmp_path: Path, epoch: Callable[..., torch.Tensor], rows_of: Callable[..., list[tuple[float, ...]]]
) -> None:
    path = npy(tmp_path / "t.npy", counts() - 8)
    data = ArrayData(path, dequantize=True)
    assert data.samples == Samples((3,), integer_valued=True, standardized=True, gaussian_start=True)
    parts = [epoch(data, 320, 32), data.val, data.test]
    assert {part.dtype for part in parts} == {torch.int64}
    assert sorted(rows_of(torch.cat(parts))) == sorted(map(tuple, (counts() - 8).tolist()))


def test_statistics_include_the_dequantization_noise(tmp_path: Path, epoch: Callable[..., torch.Tensor]) -> None:
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
    """Writes rows of 12 values 0..16, and a label 0..2 that equals the first value."""
    values = np.random.default_rng(0).integers(0, 17, size=(n, 13))
    values[:, 0], values[:, 12] = np.arange(n) % 3, np.arange(n) % 3
    return npy(tmp_path / "t.npy", values)


def test_rows_are_reshaped_to_byte_images_with_labels(
    tmp_path: Path, epoch: Callable[..., torch.Tensor], rows_of: Callable[..., list[tuple[float, ...]]]
) -> None:
    path = pixels(tmp_path)
    data = ArrayData(path, label=12, event_shape=[1, 3, 4], levels=17)
    assert data.samples == Samples((1, 3, 4), integer_valued=True, levels=17, classes=3)
    assert (data.statistics(), data.columns) == (None, ())
    x, label = data.train_batch(1, 7, 5), data.train_labels(1, 7, 5)
    assert label is not None
    assert (x.shape, x.dtype, label.dtype) == ((7, 1, 3, 4), torch.uint8, torch.int64)
    for images, labels in ((x, label), (data.val, data.val_labels), (data.test, data.test_labels)):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    every = torch.cat([epoch(data, 48, 4), data.val, data.test]).flatten(1)
    assert sorted(rows_of(every)) == sorted(map(tuple, np.load(path)[:, :12].tolist()))


def test_labels_are_read_from_separate_files(tmp_path: Path) -> None:
    train = pixels(tmp_path)
    data = ArrayData(train, val_path=train, test_path=train, columns=["0:12"], label=-1, levels=17)
    assert (data.event_shape, data.classes) == ((12,), 3)
    assert torch.equal(data.test_labels, data.test[:, 0].long())  # type: ignore[arg-type]
    assert data.columns == tuple(f"c{i}" for i in range(12))


def test_real_valued_images_are_standardized_per_pixel(tmp_path: Path) -> None:
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
    ({"event_shape": [1, 3, 4]}, ConfigError, ["needs 12 columns, but the file has 13", "data.label"]),
    ({"event_shape": [12], "label": 12}, ConfigError, ["channels, height and width"]),
    ({"event_shape": 12}, ConfigError, ["data.event_shape=12"]),
    ({"label": 13}, ConfigError, ["data.label", "no column 13"]),
    ({"label": "0:2"}, ConfigError, ["data.label=0:2 names 2 columns"]),
    ({"label": 12, "columns": [12]}, ConfigError, ["data.label"]),
    ({"label": "digit"}, ConfigError, ["no column 'digit'"]),
]


@pytest.mark.parametrize(("arguments", "error", "fragments"), BAD_IMAGES, ids=str)
def test_invalid_image_options_are_refused(
    tmp_path: Path, arguments: dict[str, Any], error: type[FlowtrainError], fragments: list[str], refused: Refused
) -> None:
    refused(lambda: ArrayData(pixels(tmp_path), **{"dequantize": True, **arguments}), error, fragments)


def test_label_column_is_found_by_name_at_any_position(tmp_path: Path) -> None:
    for name, head in (("train", "a,digit,b"), ("test", "a,b,digit")):
        rows = [{"a": i, "b": 2 * i, "digit": i % 3} for i in range(40)]
        lines = [",".join(str(row[key]) for key in head.split(",")) for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *lines]))
    train, test = str(tmp_path / "train.csv"), str(tmp_path / "test.csv")
    data = ArrayData(train, test_path=test, label="digit", dequantize=True)
    assert data.columns == ("a", "b")
    assert torch.equal(data.test_labels, data.test[:, 0] % 3)  # type: ignore[arg-type]
    # even if data.columns includes the label, it is not part of a sample
    assert ArrayData(train, columns=["0:3"], label=1, dequantize=True).columns == ("a", "b")


def test_invalid_labels_are_refused(tmp_path: Path, refused: Refused) -> None:
    values = normal(20, 2)
    values[:, 1] = np.arange(20) % 2
    for row, bad in ((4, -1.0), (7, 0.5), (9, 1e6)):
        spoiled = values.copy()
        spoiled[row, 1] = bad
        path = npy(tmp_path / "t.npy", spoiled)
        refused(
            lambda p=path: ArrayData(p, label=1), DataError, [f"row {row}", "'c1'", f"{bad:g} is not a class label"]
        )


def test_dequantizing_non_integers_names_the_cell(tmp_path: Path, refused: Refused) -> None:
    values = counts().astype(float)
    path = save(tmp_path / "t.csv", values, ["a", "b", "c"])
    values[7, 2] += 0.25
    bad = save(tmp_path / "bad.csv", values, ["a", "b", "c"])
    fragments = [f"{bad}, line 9, column 'c'", str(values[7, 2]), "whole", "data.dequantize"]
    refused(lambda: ArrayData(bad, dequantize=True), DataError, fragments)
    refused(lambda: ArrayData(path, test_path=bad, dequantize=True), DataError, fragments)


def test_only_columns_with_repeated_integers_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refused: Refused
) -> None:
    values = normal(400, 3)
    values[:, 1] = counts()[:, 0]
    values[:, 2] = np.arange(400)
    path = npy(tmp_path / "t.npy", values)
    ArrayData(path)
    assert "looks integer-valued in 'c1'" in caplog.text
    # the suggested option works for one column, and is refused for all columns
    assert "'data.dequantize=[1]'" in caplog.text
    assert ArrayData(path, dequantize=[1]).noisy == (1,)
    refused(lambda: ArrayData(path, dequantize=True), DataError, ["'data.dequantize=[1,2]'"])
    caplog.clear()
    ArrayData(path, columns=[0, 2])
    ArrayData(npy(tmp_path / "t.npy", counts()), dequantize=True)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# Real data


def test_optdigits_is_read_as_images(
    real: Callable[..., list[str]], refused: Refused, epoch: Callable[..., torch.Tensor]
) -> None:
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
