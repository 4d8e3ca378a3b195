"""The IDX format of the MNIST files: unsigned bytes in an array of rank 1 to 4, plain or gzipped."""

import gzip
import math
import os
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.promise import MOST_RATIO
from flowtrain.errors import DataError

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
