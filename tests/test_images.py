"""data=mnist and data=fashion_mnist: reading IDX files, refusing damaged ones by name, splitting and batching."""

import gzip
import inspect
import logging
import shlex
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from omegaconf import OmegaConf
from real_data import REAL

from flowtrain.data import images as module
from flowtrain.data.epochs import Epochs
from flowtrain.data.idx import read_idx
from flowtrain.data.images import IDXImages, default_root
from flowtrain.errors import ConfigError, DataError, FlowtrainError
from flowtrain.paths import config_dir

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
H, W = 4, 6


def idx(values: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape) + values.tobytes()


def bytes_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_set(folder: Path, n: int = 50, n_test: int = 20, gz: bool = True, **changed: np.ndarray | bytes) -> Path:
    """Four files of n + n_test images, whose first pixel is the position and whose label is the position mod 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in (("train", n), ("t10k", n_test)):
        pixels = bytes_of(count, H, W, seed=count)
        pixels[:, 0, 0] = np.arange(count)
        contents = {"images-idx3": pixels, "labels-idx1": np.arange(count, dtype=np.uint8) % 10}
        for what, values in contents.items():
            new = changed.get(f"{kind}_{what[:6]}", values)
            content = new if isinstance(new, bytes) else idx(new)
            name = f"{kind}-{what}-ubyte"
            (folder / f"{name}.gz").write_bytes(gzip.compress(content)) if gz else (folder / name).write_bytes(content)
    return folder


def make(root: Path, **options: Any) -> IDXImages:
    return IDXImages("mnist", str(root), **{"n_val": 10, **options})


def refused(call: Callable[[], object], kind: type[FlowtrainError], fragments: list[str]) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [part for part in fragments if part not in message] == [], message


@pytest.fixture
def data(tmp_path: Path) -> IDXImages:
    return make(write_set(tmp_path))


# Reading


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, max_side=5)), gz=st.booleans())
def test_round_trip(tmp_path: Path, values: np.ndarray, gz: bool) -> None:
    path = tmp_path / "f"
    path.write_bytes(gzip.compress(idx(values)) if gz else idx(values))
    found = read_idx(path)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.uint8
    # torch warns of arrays that may not be written to
    torch.from_numpy(found)


def test_the_content_tells_whether_it_is_gzipped(tmp_path: Path) -> None:
    (tmp_path / "f.gz").write_bytes(idx(bytes_of(3, 2)))
    (tmp_path / "f").write_bytes(gzip.compress(idx(bytes_of(3, 2))))
    np.testing.assert_array_equal(read_idx(tmp_path / "f.gz"), bytes_of(3, 2))
    np.testing.assert_array_equal(read_idx(tmp_path / "f"), bytes_of(3, 2))


GOOD = idx(bytes_of(7, 5, 3))
ZIPPED = gzip.compress(GOOD)
BIG = gzip.compress(idx(bytes_of(500, 10, 10)), compresslevel=1)
DAMAGED = {
    "empty": (b"", ["is no IDX file", "is empty"]),
    "a web page": (b"<!DOCTYPE html>", ["is no IDX file", "b'<!DO'"]),
    "a cut magic number": (b"\0\0\x08", ["is no IDX file", r"b'\x00\x00\x08'"]),
    "no such type": (b"\0\0\x07\x01" + GOOD[4:], ["is no IDX file"]),
    "rank 0": (b"\0\0\x08\0\x01", ["is no IDX file", "rank of 1 to 4"]),
    "rank 5": (idx(bytes_of(1, 1, 1, 1, 1)), ["is no IDX file", "rank of 1 to 4"]),
    "integers": (idx(np.zeros((2, 2), ">i4"), 0x0C), ["holds int32", "0x0c", "uint8", "0x08"]),
    "doubles": (idx(np.zeros(2), 0x0E), ["holds float64"]),
    "a cut header": (GOOD[:13], ["cut short", "12 bytes for 3 sizes", "has 9"]),
    "cut short": (GOOD[:-1], ["cut short", "7 x 5 x 3 = 105 bytes"]),
    "cut short, zipped": (gzip.compress(GOOD[:-1]), ["cut short", "7 x 5 x 3 = 105 bytes", "104 follow"]),
    "header alone": (GOOD[:16], ["cut short", "105 bytes"]),
    "too long": (GOOD + b"\0", ["is damaged", "7 x 5 x 3 = 105 bytes", "more"]),
    "too long, zipped": (gzip.compress(GOOD + b"\0"), ["is damaged", "105 bytes", "more"]),
    "nothing in it": (idx(bytes_of(0, 28, 28)), ["holds nothing", "0 x 28 x 28"]),
    "absurd sizes": (struct.pack(">I4I", 0x804, *[2**32 - 1] * 4) + b"\0" * 9, ["4294967295 x", "room for 29 "]),
    "absurd sizes, zipped": (gzip.compress(struct.pack(">I2I", 0x802, 2**20, 2**20)), ["1099511627776", "room for"]),
    "gzip magic alone": (b"\x1f\x8b", ["damaged gzip file", "4 more bytes are expected"]),
    "cut gzip": (BIG[:-2000], ["damaged gzip file", "50000 more bytes are expected", "ended before"]),
    "gzip without its end": (ZIPPED[:-8], ["damaged gzip file", "ended before"]),
    "gzip sum": (ZIPPED[:-8] + b"1234" + ZIPPED[-4:], ["damaged gzip file", "CRC"]),
    "gzip stream": (ZIPPED[:10] + b"\xff" + ZIPPED[11:], ["damaged gzip file", "invalid block type"]),
    "gzip and more": (ZIPPED + b"more", ["damaged gzip file"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    content, fragments = DAMAGED[case]
    path = tmp_path / "some-file"
    path.write_bytes(content)
    refused(lambda: read_idx(path, "ask for it again"), DataError, [str(path), *fragments, "; ask for it again"])


def test_a_promise_alone_takes_no_memory(tmp_path: Path) -> None:
    # within what gzip could hold, yet far from what is there
    path = tmp_path / "f.gz"
    noise = np.random.default_rng(0).bytes(600_000)
    path.write_bytes(gzip.compress(struct.pack(">I2I", 0x802, 60_000, 10_000) + noise, compresslevel=1))
    tracemalloc.start()
    try:
        refused(lambda: read_idx(path), DataError, ["cut short", "600000000 bytes", "600000 follow"])
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: read_idx(Path("no"), "get it"), DataError, [f"no file {tmp_path / 'no'}", "; get it"])
    refused(lambda: read_idx(tmp_path, "get it"), DataError, [str(tmp_path), "directory", "; get it"])


# Where the files are


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("below", ["mnist", "."])
def test_files_are_in_the_folder_of_their_name_or_in_the_root(tmp_path: Path, below: str, gz: bool) -> None:
    write_set(tmp_path / below, gz=gz)
    assert make(tmp_path).event_shape == (1, H, W)


def test_the_folder_of_the_name_comes_first_and_folders_are_not_mixed(tmp_path: Path) -> None:
    write_set(tmp_path, n=30)
    write_set(tmp_path / "mnist", n=40)
    assert len(make(tmp_path, n_val=35).val) == 35
    (tmp_path / "mnist" / f"{TEST_LABELS}.gz").unlink()
    refused(lambda: make(tmp_path, n_val=35), ConfigError, [str(tmp_path / f"{TRAIN_IMAGES}.gz")])


def test_a_downloaded_file_comes_before_a_plain_one(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(b"damaged")
    assert make(tmp_path).event_shape == (1, H, W)


def test_the_root_is_that_of_the_key_or_the_environment_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FLOWTRAIN_DATA", str(tmp_path / "env"))
    for n, folder in ((30, "key"), (40, "env/mnist"), (50, "cache/flowtrain/mnist"), (60, "home/.cache/flowtrain")):
        write_set(tmp_path / folder, n=n)

    def rows(root: str | None) -> int:
        return len(IDXImages("mnist", root, n_val=10)._store.train) + 10

    assert rows(str(tmp_path / "key")) == 30
    assert rows(None) == 40
    monkeypatch.setenv("FLOWTRAIN_DATA", "~/.cache/flowtrain")
    assert rows(None) == 60
    monkeypatch.setenv("FLOWTRAIN_DATA", "")
    assert rows(None) == 50
    monkeypatch.delenv("FLOWTRAIN_DATA")
    assert rows(None) == 50
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert rows(None) == rows("~/.cache/flowtrain") == 60
    assert default_root() == tmp_path / "home/.cache/flowtrain"
    monkeypatch.chdir(tmp_path)
    assert rows("key") == 30


def test_absent_files_say_where_and_what_to_run(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    run = f"python scripts/download_mnist.py mnist --root {shlex.quote(str(root))}"
    refused(
        lambda: make(root),
        DataError,
        ["mnist", f"{TRAIN_IMAGES}.gz", f"{root / 'mnist'} nor in {root};", run, "data.root"],
    )
    (write_set(root) / f"{TEST_LABELS}.gz").unlink()
    refused(lambda: make(root), DataError, [f"{root} (which lacks {TEST_LABELS})", run])


# Files that do not make a data set

FIRST_FASHION = np.array([9, 0, 0, 3, 0, 2, 7, 2, 5, 5] * 5, dtype=np.uint8)
BAD_SETS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "damaged": ({"t10k_images": b"no"}, TEST_IMAGES, ["is no IDX file"]),
    "too few labels": ({"train_labels": bytes_of(49) % 10}, TRAIN_LABELS, ["50 images", "49 labels"]),
    "too many test labels": ({"t10k_labels": bytes_of(21) % 10}, TEST_LABELS, ["20 images", "21 labels"]),
    "labels for images": ({"train_images": bytes_of(50)}, TRAIN_IMAGES, ["(50,)", "(n, H, W)"]),
    "images for labels": ({"t10k_labels": bytes_of(20, H, W)}, TEST_LABELS, [f"(20, {H}, {W})", "(n,)"]),
    "a label of 10": (
        {"train_labels": np.arange(50, dtype=np.uint8) % 11},
        TRAIN_LABELS,
        ["row 10", "is 10", "0 to 9"],
    ),
    "sizes that differ": ({"t10k_images": bytes_of(20, H, W + 1)}, TEST_IMAGES, ["4 x 6", "4 x 7"]),
    "another set": ({"train_labels": FIRST_FASHION}, TRAIN_LABELS, ["that of fashion_mnist", "data=fashion_mnist"]),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    changed, name, fragments = BAD_SETS[case]
    write_set(tmp_path, **changed)
    run = "download_mnist.py mnist --root"
    refused(lambda: make(tmp_path), DataError, [str(tmp_path / f"{name}.gz"), *fragments, run])


BAD_OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"n_val": 50}, ["data.n_val=50", "at most 49"]),
    ({"n_val": 0}, ["data.n_val=0"]),
    ({"n_val": None}, ["data.n_val=None"]),
    ({"n_test": 21}, ["data.n_test=21", "at most 20"]),
    ({"n_test": 0}, ["data.n_test=0"]),
    ({"crop": W}, [f"data.crop={W}", "width, 6 pixels"]),
    ({"crop": -1}, ["data.crop=-1"]),
    ({"crop": True}, ["data.crop=True"]),
    ({"alpha": 0}, ["data.alpha=0", "greater than 0"]),
    ({"alpha": 0.5}, ["data.alpha=0.5", "below 0.499"]),
    ({"alpha": "x"}, ["data.alpha=x"]),
    ({"root": ""}, ["data.root="]),
    ({"root": 5}, ["data.root=5"]),
    ({"dataset": "cifar"}, ["data.dataset=cifar", "mnist, fashion_mnist"]),
]


@pytest.mark.parametrize(("options", "fragments"), BAD_OPTIONS, ids=str)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], fragments: list[str]) -> None:
    arguments = {"dataset": "mnist", "root": str(write_set(tmp_path)), "n_val": 10, **options}
    refused(lambda: IDXImages(**arguments), ConfigError, fragments)


# The data set


def positions(images: torch.Tensor) -> list[int]:
    """The first pixel, which `write_set` made the position in the file."""
    return images[:, 0, 0, 0].tolist()


def test_what_it_has(data: IDXImages, tmp_path: Path) -> None:
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


def test_splits(data: IDXImages, tmp_path: Path) -> None:
    np.testing.assert_array_equal(data.test[:, 0], read_idx(tmp_path / f"{TEST_IMAGES}.gz"))
    np.testing.assert_array_equal(data.val[:, 0], read_idx(tmp_path / f"{TRAIN_IMAGES}.gz")[40:])
    assert data.val_labels.tolist() == list(range(10))
    assert data.test_labels.tolist() == [*range(10), *range(10)]
    assert positions(make(tmp_path, n_test=3).test) == [0, 1, 2]
    assert make(tmp_path, n_test=3).test_labels.tolist() == [0, 1, 2]
    assert set(positions(make(tmp_path, n_val=49).train_batch(0, 5, 0))) == {0}


def test_its_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make(write_set(tmp_path))
    assert f"{tmp_path}: 40 + 10 + 20 images for train, val and test, 4 x 6 pixels" in caplog.text


@pytest.mark.parametrize("crop", [0, 2])
def test_a_batch_is_a_pure_function_of_step_size_and_seed(tmp_path: Path, crop: int) -> None:
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


def test_batches_are_gathered_on_the_device_it_is_moved_to(tmp_path: Path) -> None:
    data = make(write_set(tmp_path), crop=1)
    data.to("meta")
    assert data.train_batch(0, 4, 0).device.type == data.train_labels(0, 4, 0).device.type == "meta"
    assert data.train_batch(0, 4, 0).shape == (4, 1, H, W)
    assert data.val.device.type == data.test_labels.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    data, moved = make(write_set(tmp_path), crop=2), make(tmp_path, crop=2)
    moved.to(torch.device("cuda"))
    for step in range(5):
        assert torch.equal(data.train_batch(step, 16, 0), moved.train_batch(step, 16, 0).cpu())
        assert torch.equal(data.train_labels(step, 16, 0), moved.train_labels(step, 16, 0).cpu())


# Cropping


def shift(image: torch.Tensor, by: int) -> torch.Tensor:
    """(1, H, W) moved right by `by` pixels, zeros moving in."""
    moved = torch.zeros_like(image)
    if by >= 0:
        moved[..., by:] = image[..., : W - by]
    else:
        moved[..., :by] = image[..., -by:]
    return moved


@pytest.mark.parametrize("most", [1, 2, W - 1])
def test_crop_shifts_each_image_sideways_by_up_to_so_many_pixels(tmp_path: Path, most: int) -> None:
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
    # 320 draws, equally likely: five deviations
    share = 320 / (2 * most + 1)
    assert all(abs(count - share) < 5 * share**0.5 for count in counts.values()), counts


def test_crop_is_off_by_default_and_leaves_labels_and_held_out_sets(tmp_path: Path) -> None:
    data, plain = make(write_set(tmp_path), crop=3), make(tmp_path)
    assert inspect.signature(IDXImages).parameters["crop"].default == 0
    stored = torch.from_numpy(read_idx(tmp_path / f"{TRAIN_IMAGES}.gz"))
    batch = plain.train_batch(0, 40, 0)
    assert torch.equal(batch[:, 0], stored[positions(batch)])
    assert torch.equal(data.val, plain.val)
    assert torch.equal(data.test, plain.test)
    assert torch.equal(data.train_labels(1, 9, 0), plain.train_labels(1, 9, 0))


# Epochs


def test_rows_are_the_callers_own() -> None:
    epochs = Epochs(10, 1, 2)
    rows = epochs.rows(0, 5, 0)
    before = rows.clone()
    rows.zero_()
    assert torch.equal(epochs.rows(0, 5, 0), before)


def test_streams_and_seeds_give_orders_of_their_own() -> None:
    orders = {tuple(Epochs(20, *stream).rows(0, 20, seed).tolist()) for stream in ((1, 2), (1, 3)) for seed in (0, 1)}
    assert len(orders) == 4


# The configuration


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_config_is_the_constructor(name: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [f"data={name}"]).data)
    assert config.pop("name") == config["dataset"] == name
    assert config.pop("_target_") == f"{module.__name__}.{IDXImages.__name__}"
    signature = inspect.signature(IDXImages).parameters
    assert {k: v for k, v in config.items() if k != "dataset"} == {
        k: p.default for k, p in signature.items() if k != "dataset"
    }


# Real data


def real(name: str, **options: Any) -> IDXImages:
    missing = [f for f in NAMES if not any((REAL / name / f"{f}{end}").exists() for end in (".gz", ""))]
    if missing:
        pytest.skip(f"real data not found in {REAL / name}: {', '.join(missing)}; set FLOWTRAIN_DATA")
    return IDXImages(name, str(REAL), **options)


def test_mnist() -> None:
    data = real("mnist")
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


def test_fashion_mnist() -> None:
    data = real("fashion_mnist", n_val=5000, n_test=1000)
    assert data.train_batch(0, 55_000, 0).shape == (55_000, 1, 28, 28)
    assert (len(data.val), len(data.test)) == (5000, 1000)
    assert data.test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    labels = torch.cat([data.train_labels(0, 55_000, 0), data.val_labels])
    assert labels.bincount().tolist() == [6000] * 10


def test_the_files_of_one_set_are_not_taken_for_another() -> None:
    real("fashion_mnist")
    refused(
        lambda: IDXImages("mnist", str(REAL / "fashion_mnist")),
        DataError,
        ["that of fashion_mnist", "data=fashion_mnist"],
    )
