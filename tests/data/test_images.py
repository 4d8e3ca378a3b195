"""data=mnist and data=fashion_mnist: splits, batches, shifted images, and the real files."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refused
from helpers.files import NAMES, TEST_IMAGES, TRAIN_IMAGES, H, W, write_set
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from flowtrain.data import images as module
from flowtrain.data.images import IDXImages, read_idx
from flowtrain.data.in_memory import Epochs
from flowtrain.utils.errors import DataError
from flowtrain.utils.files import config_dir


@pytest.fixture
def data(tmp_path: Path, make: Callable[..., IDXImages]) -> IDXImages:
    return make(write_set(tmp_path))


# The data set


def positions(images: torch.Tensor) -> list[int]:
    """Returns the first pixel of each image, which `write_set` sets to the image's position in the file."""
    return images[:, 0, 0, 0].tolist()


def test_dataset_attributes(data: IDXImages, tmp_path: Path, make: Callable[..., IDXImages]) -> None:
    assert data.event_shape == (1, H, W)
    assert (data.levels, data.classes, data.columns, data.alpha) == (256, 10, (), 1e-5)
    for images, n in ((data.val, 10), (data.test, 20), (data.train_batch(0, 8, 0), 8)):
        assert (images.dtype, images.shape) == (torch.uint8, (n, 1, H, W))
    for labels, n in ((data.val_labels, 10), (data.test_labels, 20), (data.train_labels(0, 8, 0), 8)):
        assert (labels.dtype, labels.shape) == (torch.int64, (n,))
    assert data.statistics() is None
    assert data.log_prob(data.val) is None
    assert data.entropy is None
    assert make(tmp_path, alpha=0.1).alpha == 0.1


def test_splits_preserve_file_order(data: IDXImages, tmp_path: Path, make: Callable[..., IDXImages]) -> None:
    np.testing.assert_array_equal(data.test[:, 0], read_idx(tmp_path / f"{TEST_IMAGES}.gz"))
    np.testing.assert_array_equal(data.val[:, 0], read_idx(tmp_path / f"{TRAIN_IMAGES}.gz")[40:])
    assert data.val_labels.tolist() == list(range(10))
    assert data.test_labels.tolist() == [*range(10), *range(10)]
    assert positions(make(tmp_path, n_test=3).test) == [0, 1, 2]
    assert make(tmp_path, n_test=3).test_labels.tolist() == [0, 1, 2]
    assert set(positions(make(tmp_path, n_val=49).train_batch(0, 5, 0))) == {0}


def test_split_sizes(data: IDXImages) -> None:
    assert (data.n_train, len(data.val), len(data.test)) == (40, 10, 20)


@pytest.mark.parametrize("crop", [0, 2])
def test_batch_depends_only_on_step_size_and_seed(tmp_path: Path, crop: int, make: Callable[..., IDXImages]) -> None:
    data = make(write_set(tmp_path), crop=crop)
    batches = {step: data.train_batch(step, 16, 7) for step in range(9)}
    fresh = make(tmp_path, crop=crop)
    for step in (8, 0, 5, 5, 2):
        torch.manual_seed(step)
        assert torch.equal(fresh.train_batch(step, 16, 7), batches[step])
        assert not torch.equal(fresh.train_batch(step, 16, 8), batches[step])
    batches[0].zero_()
    assert fresh.train_batch(0, 16, 7).any()
    assert data.train_batch(0, 16, 7).any()


@pytest.mark.parametrize("batch", [1, 7, 40, 100])
def test_every_epoch_visits_every_image_once_with_its_label(data: IDXImages, batch: int) -> None:
    n, epochs = 40, 5
    steps = range(-(-n * epochs // batch))
    images = torch.cat([data.train_batch(step, batch, 3) for step in steps])[: n * epochs]
    labels = torch.cat([data.train_labels(step, batch, 3) for step in steps])[: n * epochs]
    orders = torch.tensor(positions(images)).view(epochs, n)
    assert orders.sort(dim=1).values.tolist() == [list(range(n))] * epochs
    assert len({tuple(order) for order in orders.tolist()}) == epochs
    assert labels.tolist() == [i % 10 for i in positions(images)]


def test_batches_are_created_on_the_dataset_device(tmp_path: Path, make: Callable[..., IDXImages]) -> None:
    data = make(write_set(tmp_path), crop=1)
    data.to("meta")
    assert data.train_batch(0, 4, 0).device.type == data.train_labels(0, 4, 0).device.type == "meta"
    assert data.train_batch(0, 4, 0).shape == (4, 1, H, W)
    assert data.val.device.type == data.test_labels.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_batches_equal_cpu_batches(tmp_path: Path, make: Callable[..., IDXImages]) -> None:
    data, moved = make(write_set(tmp_path), crop=2), make(tmp_path, crop=2)
    moved.to(torch.device("cuda"))
    for step in range(5):
        assert torch.equal(data.train_batch(step, 16, 0), moved.train_batch(step, 16, 0).cpu())
        assert torch.equal(data.train_labels(step, 16, 0), moved.train_labels(step, 16, 0).cpu())


# Cropping


def shift(image: torch.Tensor, by: int) -> torch.Tensor:
    """Shifts the image (1, H, W) right by `by` pixels, filling with zeros."""
    moved = torch.zeros_like(image)
    if by >= 0:
        moved[..., by:] = image[..., : W - by]
    else:
        moved[..., :by] = image[..., -by:]
    return moved


@pytest.mark.parametrize("most", [1, 2, W - 1])
def test_crop_shifts_each_image_horizontally_up_to_the_limit(
    tmp_path: Path, most: int, make: Callable[..., IDXImages]
) -> None:
    data, plain = make(write_set(tmp_path), crop=most), make(tmp_path)
    seen: list[int] = []
    for step in range(8):
        for image, original in zip(data.train_batch(step, 40, 0), plain.train_batch(step, 40, 0), strict=True):
            shifts = [by for by in range(-W + 1, W) if torch.equal(image, shift(original, by))]
            assert len(shifts) == 1
            seen += shifts
    assert len({tuple(seen[i : i + 40]) for i in range(0, 320, 40)}) == 8
    counts = {by: seen.count(by) for by in range(-most, most + 1)}
    assert sum(counts.values()) == len(seen) == 320
    # 320 draws with equal probabilities, within five standard deviations
    share = 320 / (2 * most + 1)
    assert all(abs(count - share) < 5 * share**0.5 for count in counts.values()), counts


def test_crop_changes_only_training_images(tmp_path: Path, make: Callable[..., IDXImages]) -> None:
    data, plain = make(write_set(tmp_path), crop=3), make(tmp_path)
    assert inspect.signature(IDXImages).parameters["crop"].default == 0
    stored = torch.from_numpy(read_idx(tmp_path / f"{TRAIN_IMAGES}.gz"))
    batch = plain.train_batch(0, 40, 0)
    assert torch.equal(batch[:, 0], stored[positions(batch)])
    assert torch.equal(data.val, plain.val)
    assert torch.equal(data.test, plain.test)
    assert torch.equal(data.train_labels(1, 9, 0), plain.train_labels(1, 9, 0))


# Epochs


def test_returned_positions_are_copies() -> None:
    epochs = Epochs(10, 1, 2)
    rows = epochs.rows(0, 5, 0)
    before = rows.clone()
    rows.zero_()
    assert torch.equal(epochs.rows(0, 5, 0), before)


def test_streams_and_seeds_give_different_orders() -> None:
    orders = {tuple(Epochs(20, *stream).rows(0, 20, seed).tolist()) for stream in ((1, 2), (1, 3)) for seed in (0, 1)}
    assert len(orders) == 4


# The configuration


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_config_keys_match_the_constructor(name: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [f"data={name}"]).data)
    assert config.pop("name") == config["dataset"] == name
    assert config.pop("_target_") == f"{module.__name__}.{IDXImages.__name__}"
    signature = inspect.signature(IDXImages).parameters
    assert {k: v for k, v in config.items() if k != "dataset"} == {
        k: p.default for k, p in signature.items() if k != "dataset"
    }


# Real data


def real(real_data: Path, name: str, **options: Any) -> IDXImages:
    missing = [f for f in NAMES if not any((real_data / name / f"{f}{end}").exists() for end in (".gz", ""))]
    if missing:
        pytest.skip(f"real data not found in {real_data / name}: {', '.join(missing)}; set FLOWTRAIN_DATA")
    return IDXImages(name, str(real_data), **options)


def test_mnist_matches_the_published_files(real_data: Path) -> None:
    data = real(real_data, "mnist")
    assert data.event_shape == (1, 28, 28)
    assert data.val.shape == data.test.shape == (10_000, 1, 28, 28)
    images, labels = data.train_batch(0, 50_000, 0), data.train_labels(0, 50_000, 0)
    rows = data._store._epochs.rows(0, 50_000, 0)
    assert labels[rows.argsort()][:5].tolist() == [5, 0, 4, 1, 9]
    assert data.val_labels[-3:].tolist() == [5, 6, 8]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.cat([labels, data.val_labels]).bincount().tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    ]
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    total = int(images.sum(dtype=torch.int64)) + int(data.val.sum(dtype=torch.int64))
    assert total / (60_000 * 784) == pytest.approx(33.318421, abs=1e-6)


def test_fashion_mnist_matches_the_published_files(real_data: Path) -> None:
    data = real(real_data, "fashion_mnist", n_val=5000, n_test=1000)
    assert data.train_batch(0, 55_000, 0).shape == (55_000, 1, 28, 28)
    assert (len(data.val), len(data.test)) == (5000, 1000)
    assert data.test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    labels = torch.cat([data.train_labels(0, 55_000, 0), data.val_labels])
    assert labels.bincount().tolist() == [6000] * 10


def test_fashion_mnist_files_are_refused_as_mnist(refused: Refused, real_data: Path) -> None:
    real(real_data, "fashion_mnist")
    refused(
        lambda: IDXImages("mnist", str(real_data / "fashion_mnist")),
        DataError,
        ["fashion_mnist", "data=fashion_mnist"],
    )
