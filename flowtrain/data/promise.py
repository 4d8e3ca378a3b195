"""What the headers of .npy and .npz files promise, held against what the files have room for."""

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from flowtrain.errors import DataError

# Deflate spends at least one bit on 129 bytes
MOST_RATIO = 1032


def check_promise(stream: IO[bytes], file: Path) -> None:
    """Refuses arrays that are larger than their file, before any memory is asked for; the stream is where it was.

    Raises:
        DataError: a header that promises more bytes than follow. One that cannot be read is left to NumPy.
    """
    begin = stream.tell()
    magic = stream.read(4)
    stream.seek(begin)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if member.file_size > MOST_RATIO * max(1, member.compress_size):
                    raise DataError(_too_large(file, member.file_size, MOST_RATIO * member.compress_size))
                with archive.open(member) as inside:
                    _check(inside, member.file_size, file)
    else:
        _check(stream, file.stat().st_size, file)
    stream.seek(begin)


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and type of the array that begins where the stream is.

    Raises:
        ValueError: there is none.
    """
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its format is of version {version}")
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def _check(stream: IO[bytes], size: int, file: Path) -> None:
    try:
        shape, _, dtype = npy_header(stream)
    except ValueError:
        return
    if dtype.hasobject:
        # pickled, and refused as such
        return
    promised, room = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if promised > room:
        raise DataError(_too_large(file, promised, room))


def _too_large(file: Path, promised: int, room: int) -> str:
    return f"{file} is cut short, or its header damaged: it promises {promised} bytes, and {max(0, room)} follow"
