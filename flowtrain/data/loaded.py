"""A table that is in memory as a whole: all of it held out, or divided for training."""

from dataclasses import replace

import numpy as np

from flowtrain.data.array_checks import check_labels, row_hashes, whole_columns
from flowtrain.data.columns import Columns
from flowtrain.data.delimited import DETECTED, TextFormat
from flowtrain.data.kind import Divided, Kind, Part, as_labels
from flowtrain.data.memory import Resident
from flowtrain.data.read import read_labelled
from flowtrain.data.record import Checksum
from flowtrain.data.splits import split


class Loaded:
    """The table of a file, and its labels where there are any; see `read_labelled` for the arguments.

    Attributes:
        table: of the samples.
        n: rows.
    """

    def __init__(
        self,
        path: str,
        key: str | None,
        columns: Columns | None,
        label: str | int | None,
        text_format: TextFormat = DETECTED,
    ) -> None:
        self.table, self.marks = read_labelled(path, key, columns, label, text_format)
        self.n = len(self.table.values)

    def all(self, kind: Kind, most: int, seed: int, *stream: int) -> Part:
        """Every row, once checked: what is in memory may as well be used."""
        rows = np.arange(self._checked(kind))
        return replace(self._part(kind, rows), rows=(self.n, self._checksum()))

    def divided(
        self, kind: Kind, sizes: list[int], seed: int, split_key: tuple[int, ...], order_key: tuple[int, ...]
    ) -> Divided:
        """The rows, once checked, of which so many are held out, drawn by the stream (seed, *split_key)."""
        rows = split(self._checked(kind), sizes, seed, *split_key)
        values = self.table.values[rows[0]]
        train = self._part(kind, rows[0])
        labels = np.empty(0, np.int64) if train.labels is None else train.labels.numpy()
        return Divided(
            store=Resident(train.x, train.labels, *order_key),
            n=len(values),
            held=[self._part(kind, mine) for mine in rows[1:]],
            mean=values.mean(0),
            variance=values.var(0),
            look=values,
            whole=whole_columns(self.table.values),
            hashes=np.empty(0, np.uint64) if kind.discrete else row_hashes(train.x.numpy()),
            hash_step=1,
            class_counts=np.bincount(labels),
            checksum=self._checksum(),
        )

    def _checksum(self) -> str:
        return str(Checksum().add(self.table.values, None if self.marks is None else self.marks.values))

    def _checked(self, kind: Kind) -> int:
        kind.check(self.table)
        if self.marks is not None:
            check_labels(self.marks)
        return self.n

    def _part(self, kind: Kind, rows: np.ndarray) -> Part:
        labels = None if self.marks is None else as_labels(self.marks.values[rows])
        return Part(kind.samples(self.table.values[rows]), labels, rows)
