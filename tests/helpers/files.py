"""Builders of input files, which parametrized tests need at import time, and readers of output files."""

import csv
import gzip
import io
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TABLES = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FINITE)

# the file names of MNIST, and the height and width of the small images in test copies
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
H, W = 4, 6


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def save(path: Path, values: np.ndarray, header: list[str] | None = None, delimiter: str = ",") -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC)
        if header:
            writer.writerow(header)
        writer.writerows(values.tolist())
    return str(path)


def npy(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


def written(path: Path, header: str, rows: np.ndarray) -> Path:
    np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.9g")
    return path


def idx(values: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape) + values.tobytes()


def bytes_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_set(folder: Path, n: int = 50, n_test: int = 20, gz: bool = True, **changed: np.ndarray | bytes) -> Path:
    """Writes MNIST's four files with n + n_test images. Image i has first pixel i and label i mod 10."""
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


class Gif(NamedTuple):
    """The number of frames of an animation, its width in pixels, and the duration of each frame in milliseconds."""

    n_frames: int
    width: int
    durations: list[int]
    loops: int


def gif_of(path: Path) -> Gif:
    with Image.open(path) as image:
        durations = []
        n = getattr(image, "n_frames", 1)
        for k in range(n):
            image.seek(k)
            durations.append(image.info["duration"])
        return Gif(n, image.width, durations, image.info.get("loop", -1))


class Terminal(io.StringIO):
    """A stream whose isatty() is true."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """Returns the visible lines, where text after a carriage return overwrites the line."""
        lines = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for text in line.split("\r"):
                seen = text + seen[len(text) :]
            lines.append(seen.rstrip())
        return "\n".join(lines)
