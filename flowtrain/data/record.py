"""Record of the data that a flow was trained on: row counts and checksums, kept in checkpoints.

The record shows whether a training file and the sets held out from it are unchanged. A file that has grown is split
anew. The new test set then holds rows that the flow was trained on.
"""

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# (name, rows, checksum) of the training file, named FILE, and of each held-out set
Record = tuple[tuple[str, int, str], ...]
FILE = "file"


class Checksum:
    """CRC-32 of the rows of a table and of their labels, computed in parts.

    It depends only on the values, not on their format in the file or on the size of the parts.
    """

    def __init__(self) -> None:
        self._values = self._labels = 0

    def add(self, values: NDArray[Any], labels: NDArray[Any] | None) -> "Checksum":
        """Adds rows (n, d) and labels (n, 1) or None; returns self."""
        self._values = zlib.crc32(np.ascontiguousarray(values).data, self._values)
        if labels is not None:
            self._labels = zlib.crc32(np.ascontiguousarray(labels).data, self._labels)
        return self

    def __str__(self) -> str:
        return f"{self._values:08x}{self._labels:08x}"


def record_of(file: tuple[int, str], rows: Iterable[tuple[str, NDArray[np.int64] | tuple[int, str]]]) -> Record:
    """The record of a training file and its held-out sets.

    Args:
        file: row count and checksum of the training file.
        rows: (name, rows) of each set: the rows of the training file that it holds, or, for a set with its own file,
            the row count and checksum of that file.
    """
    found = [(FILE, *file)]
    for name, held in rows:
        if isinstance(held, tuple):
            found.append((name, *held))
        else:
            found.append((name, len(held), f"{zlib.crc32(np.ascontiguousarray(held).data):08x}@{file[1]}"))
    return tuple(found)


def changes(before: Record, now: Record, sets: Iterable[str] = (FILE, "val", "test")) -> str | None:
    """Describes how these sets have changed; None if they have not, or if either record lacks them.

    Example:
        >>> before = ("file", 150, "a5"), ("test", 15, "07@a5")
        >>> changes(before, (("file", 153, "b1"), ("test", 15, "1f@b1")), ["test"])
        'the training file had 150 rows and has 153 now'
    """
    old, new = ({name: (n, checksum) for name, n, checksum in record} for record in (before, now))
    changed = [name for name in sets if name in old and name in new and old[name] != new[name]]
    if not changed:
        return None
    file = old.get(FILE), new.get(FILE)
    split_off = [name for name in changed if name == FILE or "@" in new[name][1]]
    if split_off and file[0] is not None and file[1] is not None and file[0] != file[1]:
        return f"the training file {_difference(file[0], file[1])}"
    if split_off:
        why = "another data.seed, fraction, data.n_val or data.memory_map"
        return f"other rows are held out for {' and '.join(split_off)} ({why})"
    return " and ".join(f"the {name} set {_difference(old[name], new[name])}" for name in changed)


def _difference(before: tuple[int, str], now: tuple[int, str]) -> str:
    if before[0] != now[0]:
        return f"had {before[0]:,} rows and has {now[0]:,} now"
    return f"still has {now[0]:,} rows, but the values, their order, or the columns have changed"
