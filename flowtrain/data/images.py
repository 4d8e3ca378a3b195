"""data=mnist and data=fashion_mnist: grayscale images, read from four IDX files and stored as bytes."""

import gzip
import math
import os
import shlex
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import ALPHA, Checksum, record_of, step_generator
from flowtrain.data.in_memory import Extras, Finite, InMemoryStore
from flowtrain.data.tables.table_reader import MOST_RATIO
from flowtrain.utils.arguments import below_half, one_of, whole
from flowtrain.utils.errors import ConfigError, DataError

_UNSIGNED = 0x08
_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_MAX_RANK = 4
_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20


class _DamageError(Exception):
    """A damaged IDX file. The message is a phrase that continues a sentence after the name of the file."""


def read_idx(path: Path, advice: str = "get the file again") -> NDArray[np.uint8]:
    """Reads the array in an IDX file. Its header gives the shape.

    The first bytes show whether the file is gzipped. The name does not, because browsers may unpack a .gz file and keep
    its name.

    Args:
        path: the file.
        advice: how to get the file; the last part of every error message.

    Raises:
        DataError: the file is missing, truncated or damaged, or its values are not unsigned bytes.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path.absolute()}; {advice}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {advice}") from error
    except _DamageError as damage:
        raise DataError(f"{path} {damage}; {advice}") from damage


def _read(file: BufferedReader) -> NDArray[np.uint8]:
    size = os.fstat(file.fileno()).st_size
    if file.peek(2)[:2] != _GZIP:
        return _array(file, size)
    with gzip.GzipFile(fileobj=file) as unpacked:
        return _array(unpacked, MOST_RATIO * size)


def _array(stream: BufferedReader | gzip.GzipFile, most: int) -> NDArray[np.uint8]:
    """Reads the array in a stream that cannot contain more than `most` bytes."""
    sizes = _sizes(stream)
    count = math.prod(sizes)
    promise = f"its header announces {' x '.join(map(str, sizes))} = {count} bytes"
    if not count:
        raise _DamageError(f"is empty: {promise}")
    # a damaged header can announce terabytes, so this check precedes any allocation
    if count > most:
        raise _DamageError(f"is cut short, or its header is damaged: {promise}, but there is room for {most} at most")
    values = _take(stream, count)
    if len(values) < count:
        raise _DamageError(f"is cut short: {promise}, but only {len(values)} follow")
    if _take(stream, 1):
        raise _DamageError(f"is damaged: {promise}, but more follow")
    return np.frombuffer(values, np.uint8).reshape(sizes)


def _sizes(stream: BufferedReader | gzip.GzipFile) -> tuple[int, ...]:
    magic = bytes(_take(stream, 4))
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= _MAX_RANK:
        found = f"begins with {magic!r}" if magic else "is empty"
        raise _DamageError(
            f"is not an IDX file: it must begin with 0, 0, a type code and a rank of 1 to 4, but it {found}"
        )
    if magic[2] != _UNSIGNED:
        raise _DamageError(
            f"contains {_TYPES[magic[2]]} values (type code {magic[2]:#04x}), but {_TYPES[_UNSIGNED]} "
            f"({_UNSIGNED:#04x}) is expected"
        )
    rank = magic[3]
    header = _take(stream, 4 * rank)
    if len(header) < 4 * rank:
        raise _DamageError(
            f"is cut short: its header needs {4 * rank} bytes for {rank} sizes, but only {len(header)} follow"
        )
    return struct.unpack(f">{rank}I", header)


def _take(stream: BufferedReader | gzip.GzipFile, count: int) -> bytearray:
    """Reads up to `count` bytes. Memory grows with the bytes read, not with `count`."""
    taken = bytearray()
    try:
        while len(taken) < count and (block := stream.read(min(_BLOCK, count - len(taken)))):
            taken += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _DamageError(
            f"is a damaged gzip file: {count} more bytes are expected, but reading fails after {len(taken)} ({error})"
        ) from error
    return taken


# The files of both data sets have the same names, so the first training labels identify the data set
_FIRST_LABELS = {"mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "fashion_mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)}
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# Keys of the random streams
_STREAM = 0x696D_6167
_ORDER, _CROP = 1, 2


class IDXImages(Finite):
    """Images x of shape (B, 1, H, W), uint8, with values from 0 (black) to levels - 1.

    The last `n_val` images of the training file are the validation set.

    Args:
        dataset: mnist or fashion_mnist.
        root: the folder that contains the four files (plain or .gz), directly or in a subfolder named after `dataset`.
            None means $FLOWTRAIN_DATA if it is set, else the folder flowtrain in the user's cache.
        n_val: the number of images for validation.
        n_test: the number of images for test, from the start of the test file. None means all.
        crop: shifts training images horizontally at random by up to this many pixels; uncovered pixels are 0.
        alpha: the parameter of the logit that maps pixels to the real line.

    Attributes:
        levels: the number of values of a pixel.
        classes: the number of classes, with labels 0 to classes - 1.
        val_labels, test_labels: (n,), int64.

    Raises:
        ConfigError: an invalid argument, or arguments that leave no images for training.
        DataError: files that are missing, damaged, inconsistent or of another data set.
    """

    integer_valued = True
    levels = 256
    classes = 10

    def __init__(
        self,
        dataset: str,
        root: str | None = None,
        n_val: int = 10_000,
        n_test: int | None = None,
        crop: int = 0,
        alpha: float = ALPHA,
    ) -> None:
        one_of("data.dataset", dataset, _FIRST_LABELS)
        self.alpha = below_half("data.alpha", alpha)
        self._crop = whole("data.crop", crop, least=0)
        base = _root(root)
        script = f"python scripts/download_mnist.py {dataset} --root {shlex.quote(str(base))}"
        advice = f"put the published files into {base / dataset} (in a checkout of flowtrain: `{script}`)"
        files = _find(dataset, base, advice)
        images, labels = _pair(files[0], files[1], advice)
        test, test_labels = _pair(files[2], files[3], advice)
        _check_set(dataset, labels, files[1], advice)
        if test.shape[1:] != images.shape[1:]:
            raise DataError(
                f"{files[0]} contains images of {_sides(images)} pixels and {files[2]} of {_sides(test)}; the sizes "
                f"must be equal: {advice}"
            )
        if self._crop >= images.shape[-1]:
            raise ConfigError(f"data.crop={crop}: give less than the width of the images, {images.shape[-1]} pixels")

        n_train = len(images) - _at_most("data.n_val", n_val, len(images) - 1, files[0])
        n_test = len(test) if n_test is None else _at_most("data.n_test", n_test, len(test), files[2])
        self.event_shape = tuple(images.shape[1:])
        self.keep(InMemoryStore(images[:n_train], Extras(labels[:n_train]), _STREAM, _ORDER))
        self.val, self.val_labels = images[n_train:], labels[n_train:]
        self.class_counts = tuple(torch.bincount(labels[:n_train], minlength=self.classes).tolist())
        checksum = str(Checksum().add(images.numpy(), labels.unsqueeze(1).numpy()))
        # The test set is not recorded: it has a separate file, so a changed data.n_test never adds training images
        held = [("val", np.arange(n_train, len(images)))]
        self.record = record_of((len(images), checksum), held)
        self.test, self.test_labels = test[:n_test], test_labels[:n_test]
        self.n_train = n_train

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Returns the rows `share` of the batch, (k, 1, H, W), uint8, on the device of the training set."""
        images = super().train_share(step, batch_size, seed, share)
        if self._crop:
            # shifts are drawn for the whole batch, so the shift of an image does not depend on the share
            generator = step_generator(seed, _STREAM, _CROP, step)
            left = torch.randint(2 * self._crop + 1, (batch_size, 1, 1, 1), generator=generator)
            images = _shifted(images, self._crop, left[share])
        return images


def default_root() -> Path:
    """Returns the default of `data.root`: $FLOWTRAIN_DATA if it is set, else the user's cache."""
    if given := os.environ.get("FLOWTRAIN_DATA"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "flowtrain"


def _root(root: str | None) -> Path:
    if root is None:
        return default_root()
    if not isinstance(root, str) or not root:
        raise ConfigError(f"data.root={root}: give the path of a folder, or null")
    return Path(root).expanduser().absolute()


def _find(dataset: str, root: Path, advice: str) -> list[Path]:
    """Finds the four files. All files come from the same folder, so two data sets are never mixed."""
    places = []
    for folder in (root / dataset, root):
        found = {name: _plain_or_gzipped(folder / name) for name in _FILES}
        lacking = [name for name, path in found.items() if path is None]
        if not lacking:
            return [path for path in found.values() if path is not None]
        places.append(str(folder) + (f" (which lacks {', '.join(lacking)})" if len(lacking) < len(_FILES) else ""))
    raise DataError(
        f"data={dataset}: the four files ({_FILES[0]}.gz and so on) are neither in {' nor in '.join(places)}; "
        f"{advice}, or set data.root to the folder that contains them"
    )


def _plain_or_gzipped(path: Path) -> Path | None:
    # The .gz file has priority because the script downloads it, possibly to replace a damaged plain file
    return next((p for p in (path.with_name(f"{path.name}.gz"), path) if p.is_file()), None)


def _pair(image_file: Path, label_file: Path, advice: str) -> tuple[Tensor, Tensor]:
    """Reads images (n, 1, H, W), uint8, and their labels (n,), int64."""
    images, labels = (torch.from_numpy(read_idx(path, advice)) for path in (image_file, label_file))
    for path, values, rank, expected in ((image_file, images, 3, "(n, H, W)"), (label_file, labels, 1, "(n,)")):
        if values.ndim != rank:
            raise DataError(f"{path} has shape {tuple(values.shape)}, but {expected} is expected; {advice}")
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} contains {len(images)} images, but {label_file} contains {len(labels)} labels; the numbers "
            f"must be equal: {advice}"
        )
    bad = (labels >= IDXImages.classes).nonzero()
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"{label_file}, row {i} (from 0): the label is {int(labels[i])}, but labels must be between 0 and "
            f"{IDXImages.classes - 1}; {advice}"
        )
    return images.unsqueeze(1), labels.long()


def _check_set(dataset: str, labels: Tensor, path: Path, advice: str) -> None:
    """Raises DataError if the labels belong to another data set."""
    for name, first in _FIRST_LABELS.items():
        if name != dataset and tuple(labels[: len(first)].tolist()) == first:
            raise DataError(f"{path} belongs to {name}, not to {dataset}: choose data={name}, or {advice}")


def _sides(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[-2:]))


def _at_most(key: str, value: int, most: int, path: Path) -> int:
    if whole(key, value) > most:
        raise ConfigError(f"{key}={value}: give at most {most}, because {path} has no more images to use")
    return value


def _shifted(images: Tensor, most: int, left: Tensor) -> Tensor:
    """Pads images (B, 1, H, W) with `most` zeros on both sides, and crops each to width W from column `left`.

    Args:
        left: the first column of each crop, (B, 1, 1, 1), from 0 to 2 * most.
    """
    width = images.shape[-1]
    columns = (left + torch.arange(width)).to(images.device)
    return F.pad(images, (most, most)).gather(3, columns.expand(images.shape))
