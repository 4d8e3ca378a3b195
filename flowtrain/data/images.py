"""data=mnist and data=fashion_mnist: grey images from the four IDX files, kept as bytes."""

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
from flowtrain.data.in_memory import Finite, InMemoryStore
from flowtrain.data.tables.table_reader import MOST_RATIO
from flowtrain.utils.arguments import below_half, one_of, whole
from flowtrain.utils.errors import ConfigError, DataError

_UNSIGNED = 0x08
_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_MAX_RANK = 4
_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20


class _DamageError(Exception):
    """What is wrong with a file, in words that follow its name."""


def read_idx(path: Path, cure: str = "get the file again") -> NDArray[np.uint8]:
    """The array in an IDX file, of the shape that its header gives.

    The first bytes tell whether it is gzipped, not the name: browsers unpack a .gz file and keep its name.

    Args:
        path: the file.
        cure: how to get the file (again), the last words of every message.

    Raises:
        DataError: a file that is missing, cut short or damaged, or that holds anything but unsigned bytes.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path.absolute()}; {cure}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {cure}") from error
    except _DamageError as damage:
        raise DataError(f"{path} {damage}; {cure}") from damage


def _read(file: BufferedReader) -> NDArray[np.uint8]:
    size = os.fstat(file.fileno()).st_size
    if file.peek(2)[:2] != _GZIP:
        return _array(file, size)
    with gzip.GzipFile(fileobj=file) as unpacked:
        return _array(unpacked, MOST_RATIO * size)


def _array(stream: BufferedReader | gzip.GzipFile, most: int) -> NDArray[np.uint8]:
    """The array in a stream that cannot hold more than `most` bytes."""
    sizes = _sizes(stream)
    count = math.prod(sizes)
    promise = f"its header promises {' x '.join(map(str, sizes))} = {count} bytes"
    if not count:
        raise _DamageError(f"holds nothing: {promise}")
    # A damaged header can promise terabytes, so this comes before any memory is asked for
    if count > most:
        raise _DamageError(f"is cut short, or its header damaged: {promise}, and it has room for {most} at most")
    values = _take(stream, count)
    if len(values) < count:
        raise _DamageError(f"is cut short: {promise}, and {len(values)} follow")
    if _take(stream, 1):
        raise _DamageError(f"is damaged: {promise}, and more than these follow")
    return np.frombuffer(values, np.uint8).reshape(sizes)


def _sizes(stream: BufferedReader | gzip.GzipFile) -> tuple[int, ...]:
    magic = bytes(_take(stream, 4))
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= _MAX_RANK:
        found = f"begins with {magic!r}" if magic else "is empty"
        raise _DamageError(f"is no IDX file: it should begin with 0, 0, a type code and a rank of 1 to 4, and {found}")
    if magic[2] != _UNSIGNED:
        raise _DamageError(
            f"holds {_TYPES[magic[2]]} (type code {magic[2]:#04x}) where {_TYPES[_UNSIGNED]} ({_UNSIGNED:#04x}) "
            "is expected"
        )
    rank = magic[3]
    header = _take(stream, 4 * rank)
    if len(header) < 4 * rank:
        raise _DamageError(
            f"is cut short: {4 * rank} bytes for {rank} sizes are expected in its header, and it has {len(header)}"
        )
    return struct.unpack(f">{rank}I", header)


def _take(stream: BufferedReader | gzip.GzipFile, count: int) -> bytearray:
    """The next `count` bytes, fewer where the stream ends; memory grows only with what is really there."""
    taken = bytearray()
    try:
        while len(taken) < count and (block := stream.read(min(_BLOCK, count - len(taken)))):
            taken += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _DamageError(
            f"is a damaged gzip file: {count} more bytes are expected, and after {len(taken)} it fails ({error})"
        ) from error
    return taken


# The files of all sets have the same names; how the training labels begin tells one set from another
_FIRST_LABELS = {"mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "fashion_mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)}
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# Keys of the random streams
_STREAM = 0x696D_6167
_ORDER, _CROP = 1, 2


class IDXImages(Finite):
    """Images x of shape (B, 1, H, W), uint8: whole numbers from 0 (black) to levels - 1.

    The last `n_val` images of the training file are for validation.

    Args:
        dataset: mnist or fashion_mnist.
        root: the folder that has the four files, plain or .gz, in a folder named after `dataset` or in itself;
            None: $FLOWTRAIN_DATA, else flowtrain in the user's cache.
        n_val: images for validation.
        n_test: images of the test file, from its start; None: all.
        crop: training images are padded by this many zeros left and right and cut to their width again at
            random, which shifts them; 0: not at all.
        alpha: of the logit that takes pixels to the real line.

    Attributes:
        levels: of a pixel.
        classes: labels are 0 to classes - 1.
        val_labels, test_labels: (n,), int64.

    Raises:
        ConfigError: an argument that leaves nothing for training, or that makes no sense.
        DataError: files that are missing, damaged or of another data set, or that do not fit together.
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
        cure = f"put the files as published into {base / dataset}: in a checkout of flowtrain `{script}` does"
        files = _find(dataset, base, cure)
        images, labels = _pair(files[0], files[1], cure)
        test, test_labels = _pair(files[2], files[3], cure)
        _check_set(dataset, labels, files[1], cure)
        if test.shape[1:] != images.shape[1:]:
            raise DataError(
                f"{files[0]} holds images of {_sides(images)} pixels and {files[2]} of {_sides(test)}; they must be "
                f"the same: {cure}"
            )
        if self._crop >= images.shape[-1]:
            raise ConfigError(f"data.crop={crop}: give less than the images' width, {images.shape[-1]} pixels")

        n_train = len(images) - _at_most("data.n_val", n_val, len(images) - 1, files[0])
        n_test = len(test) if n_test is None else _at_most("data.n_test", n_test, len(test), files[2])
        self.event_shape = tuple(images.shape[1:])
        self.keep(InMemoryStore(images[:n_train], labels[:n_train], _STREAM, _ORDER))
        self.val, self.val_labels = images[n_train:], labels[n_train:]
        self.class_counts = tuple(torch.bincount(labels[:n_train], minlength=self.classes).tolist())
        checksum = str(Checksum().add(images.numpy(), labels.unsqueeze(1).numpy()))
        # The test set has its own file and is not recorded: another data.n_test cannot leak training images into it
        held = [("val", np.arange(n_train, len(images)))]
        self.record = record_of((len(images), checksum), held)
        self.test, self.test_labels = test[:n_test], test_labels[:n_test]
        self.n_train = n_train

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        """Images (k, 1, H, W), uint8, on the device of the training set; each comes once an epoch."""
        images = super().train_share(step, batch_size, seed, share)
        if self._crop:
            # of the whole batch, so that an image is shifted alike in whichever share it is
            generator = step_generator(seed, _STREAM, _CROP, step)
            left = torch.randint(2 * self._crop + 1, (batch_size, 1, 1, 1), generator=generator)
            images = _shifted(images, self._crop, left[share])
        return images


def default_root() -> Path:
    """Where data sets are looked for when `data.root` does not say: $FLOWTRAIN_DATA, else the user's cache."""
    if given := os.environ.get("FLOWTRAIN_DATA"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "flowtrain"


def _root(root: str | None) -> Path:
    if root is None:
        return default_root()
    if not isinstance(root, str) or not root:
        raise ConfigError(f"data.root={root}: give the path of a folder, or null")
    return Path(root).expanduser().absolute()


def _find(dataset: str, root: Path, cure: str) -> list[Path]:
    """The four files, all of them from one folder so that two data sets are never mixed."""
    places = []
    for folder in (root / dataset, root):
        found = {name: _plain_or_gzipped(folder / name) for name in _FILES}
        lacking = [name for name, path in found.items() if path is None]
        if not lacking:
            return [path for path in found.values() if path is not None]
        places.append(str(folder) + (f" (which lacks {', '.join(lacking)})" if len(lacking) < len(_FILES) else ""))
    raise DataError(
        f"data={dataset}: its four files ({_FILES[0]}.gz and so on) are neither in {' nor in '.join(places)}; "
        f"{cure}, or set data.root to the folder that has them"
    )


def _plain_or_gzipped(path: Path) -> Path | None:
    # What the script downloads comes first: it is to replace a plain file that is damaged
    return next((p for p in (path.with_name(f"{path.name}.gz"), path) if p.is_file()), None)


def _pair(image_file: Path, label_file: Path, cure: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, H, W), uint8, and their labels (n,), int64."""
    images, labels = (torch.from_numpy(read_idx(path, cure)) for path in (image_file, label_file))
    for path, values, rank, expected in ((image_file, images, 3, "(n, H, W)"), (label_file, labels, 1, "(n,)")):
        if values.ndim != rank:
            raise DataError(f"{path} has shape {tuple(values.shape)} where {expected} is expected; {cure}")
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} holds {len(images)} images and {label_file} {len(labels)} labels; they must be as many: "
            f"{cure}"
        )
    bad = (labels >= IDXImages.classes).nonzero()
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"{label_file}, row {i} (from 0): the label is {int(labels[i])}, and labels go from 0 to "
            f"{IDXImages.classes - 1}; {cure}"
        )
    return images.unsqueeze(1), labels.long()


def _check_set(dataset: str, labels: Tensor, path: Path, cure: str) -> None:
    """Refuse files that are those of another data set."""
    for name, first in _FIRST_LABELS.items():
        if name != dataset and tuple(labels[: len(first)].tolist()) == first:
            raise DataError(f"{path} is that of {name}, and {dataset} was asked for: choose data={name}, or {cure}")


def _sides(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[-2:]))


def _at_most(key: str, value: int, most: int, path: Path) -> int:
    if whole(key, value) > most:
        raise ConfigError(f"{key}={value}: give at most {most}, because of the number of images in {path}")
    return value


def _shifted(images: Tensor, most: int, left: Tensor) -> Tensor:
    """Images (B, 1, H, W), each cut from column `left`, (B, 1, 1, 1), of itself with `most` zeros at either side."""
    width = images.shape[-1]
    columns = (left + torch.arange(width)).to(images.device)
    return F.pad(images, (most, most)).gather(3, columns.expand(images.shape))
