"""Files like those of MNIST, small, and the data set that they make."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from flowtrain.data.images import IDXImages

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
