"""Rows of a .npy file that are read as they are wanted, and never all at once."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from flowtrain.data.promise import check_promise
from flowtrain.errors import DataError


class NpyRows:
    """The n rows of an array (n, width), or of (n,), which is one column.

    Read, not mapped: pages of a map count as this process's memory, and a map of a file that has become shorter ends
    the process. The file that was opened is the one that is read, whatever takes its name.

    Raises:
        DataError: a file that is missing, damaged or cut short, or an array of another shape, order or type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                check_promise(stream, path)
                shape, fortran, dtype = _header(stream, path)
                self._begin = stream.tell()
                self._file = os.dup(stream.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        weakref.finalize(self, os.close, self._file)
        if fortran and len(shape) == 2 and min(shape) > 1:
            raise DataError(
                f"{path} is in Fortran order, a column after the other, and cannot be read by rows: save it with "
                "numpy.save(path, numpy.ascontiguousarray(array)), or give data.memory_map=false"
            )
        self.shape, self.dtype = shape, dtype
        self.n, self.width = shape[0], shape[1] if len(shape) == 2 else 1

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop, (stop - start, width), in the file's own type.

        Raises:
            DataError: the file has become shorter.
        """
        left, at, pieces = (stop - start) * self.row_bytes, self._begin + start * self.row_bytes, []
        while left:
            piece = os.pread(self._file, left, at)
            if not piece:
                raise DataError(f"{self.path} has become shorter while it was read: it ends before row {stop - 1}")
            pieces.append(piece)
            left, at = left - len(piece), at + len(piece)
        return np.frombuffer(b"".join(pieces), self.dtype).reshape(-1, self.width)


def _header(stream: Any, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged or no NumPy file: {error}") from error
    if dtype.kind not in "biuf":
        raise DataError(f"{path} has dtype {dtype}; real numbers are needed (integers, floats, booleans)")
    if len(shape) not in (1, 2):
        raise DataError(f"{path} has shape {shape}; (rows, columns) is needed, or (rows,) for one column")
    if 0 in shape:
        raise DataError(f"{path} has shape {shape}: there is nothing in it")
    return shape, fortran, dtype
