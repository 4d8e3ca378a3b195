"""Rows of a .npy file that are read as they are wanted, and never all at once."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.promise import check_promise, npy_header
from flowtrain.data.read import check_array, check_file, damage_refused
from flowtrain.errors import DataError


class NpyRows:
    """The n rows of an array (n, width), or of (n,), which is one column.

    Read, not mapped: pages of a map count as this process's memory, and a map of a file that has become shorter ends
    the process. The file that was opened is the one that is read, whatever takes its name.

    Raises:
        DataError: a file that is missing, damaged or cut short, or an array of another shape, order or type.
    """

    def __init__(self, path: str) -> None:
        self.path = file = Path(path).expanduser()
        check_file(file)
        try:
            with damage_refused(file):
                self._file = file.open("rb", buffering=0)
                weakref.finalize(self, self._file.close)
                check_promise(self._file, file)
                self.shape, fortran, self.dtype = npy_header(self._file)
                self._begin = self._file.tell()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        check_array(self.shape, self.dtype, file)
        if fortran:
            raise DataError(
                f"{file} is in Fortran order, a column after the other, and cannot be read by rows: save it with "
                "numpy.save(path, numpy.ascontiguousarray(array)), or give data.memory_map=false"
            )
        self.n, self.width = self.shape[0], self.shape[1] if len(self.shape) == 2 else 1
        self._state = self._stat()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return self.width * self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop, (stop - start, width), in the file's own type.

        Raises:
            DataError: the file cannot be read any more, or is not what it was.
        """
        rows = np.empty((stop - start, self.width), self.dtype)
        room = rows.reshape(-1).view(np.uint8)
        try:
            self._file.seek(self._begin + start * self.row_bytes)
            while len(room) and (got := self._file.readinto(room.data)):
                room = room[got:]
            # after the reading, so that nothing that was written meanwhile goes unnoticed
            same = self._stat() == self._state and not len(room)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read any more: {error.strerror or error}") from error
        if not same:
            raise DataError(
                f"{self.path} has been written to since it was opened: its rows are not those that were checked. Put "
                "it back as it was, and write what is new to another file"
            )
        return rows

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns
