"""New data for a trained flow: all rows of a file or an array, in order."""

import logging
import math
import zipfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Dataset, Ids, Samples
from flowtrain.data.images import read_idx
from flowtrain.data.in_memory import Extras
from flowtrain.data.tables.array import check_format, format_of
from flowtrain.data.tables.column_types import with_codes
from flowtrain.data.tables.columns import Columns, as_option, default_names, listed, pick
from flowtrain.data.tables.csv_reader import Chosen, TextFormat, is_missing
from flowtrain.data.tables.ids import id_position, read_ids
from flowtrain.data.tables.missing import missing_of
from flowtrain.data.tables.output import LABEL, column_names, sample_names
from flowtrain.data.tables.roles import Roles, RoleTables
from flowtrain.data.tables.sample_spec import SampleSpec, add_set_noise
from flowtrain.data.tables.table_checks import warn_of_unseen
from flowtrain.data.tables.table_reader import ARRAYS, TEXTS, Kept, Table, ending_of, is_images, read_table, takes_key
from flowtrain.data.tables.typed_files import TYPED, sheets_of
from flowtrain.data.types import CATEGORICAL
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import counted

_log = logging.getLogger("flowtrain")

# the values of a column of anomaly labels, as lower-case text
_ANOMALY_LABELS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}


class ScoredRows(Dataset):
    """Rows of a table as samples to score. Real numbers are float64. There are no training batches.

    Args:
        table: the samples, one in each row.
        extras: labels, context and weights of the rows.
        samples: the description of the samples that the flow was trained on.
        seed: the seed of the noise on the columns `samples.noisy`.

    Attributes:
        kept: the rows of the file that are scored, if rows with missing values were left out. None means all.

    Raises:
        DataError: values that do not fit this description.
    """

    def __init__(self, table: Table, extras: Extras, samples: Samples, seed: int = 0) -> None:
        self.kept: Kept | None = table.kept
        self.event_shape = samples.event_shape
        self.integer_valued, self.levels, self.alpha = samples.integer_valued, samples.levels, samples.alpha
        self.classes, self.columns, self.noisy = samples.classes, samples.columns, samples.noisy
        self.class_counts, self.context = samples.class_counts, samples.context
        self.context_rows, self.types = samples.context_rows, samples.types
        spec = SampleSpec(self.event_shape, self.integer_valued, self.levels, self.noisy, types=self.types)
        spec.check(table, ranges=False)
        # float64, because a flow may be evaluated in float64
        x = spec.samples(table.values, real=np.float64)
        self.val = self.test = add_set_noise(x, self.noisy, seed, types=self.types)
        labels = self.val_labels = self.test_labels = extras.label
        self.val_context = self.test_context = extras.context
        self.val_weights = self.test_weights = extras.weights
        if labels is not None:
            counts = np.array(self.class_counts, np.int64)
            if np.isin(labels.numpy(), np.flatnonzero(counts == 0)).any():
                warn_of_unseen(table.path, counts, {"scored": labels.numpy()})

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        raise ConfigError("rows to score have no training batches; train on a data set")

    def for_each_row(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns values of the scored rows, (k, ...), as values of all rows of the file, (n, ...).

        Rows that were left out because of missing values have NaN.
        """
        if self.kept is None:
            return values
        found = np.full((self.kept.of, *values.shape[1:]), np.nan)
        found[self.kept.rows] = values
        return found

    def row_numbers(self, name: str) -> NDArray[np.int64]:
        """Returns 0 to n - 1 for the n rows of the file, also for rows that are left out."""
        return np.arange(len(self.test) if self.kept is None else self.kept.of)

    def split(self, name: str) -> Tensor:
        if name != "all":
            raise ConfigError(f"split={name}: a file of rows to score has no splits; give split=all")
        return self.test


class RowsInMemory(ScoredRows):
    """Rows in memory. For baselines, these may also be the rows that the flow was trained on."""

    def train_rows(self, most: int) -> Tensor:
        return self.test[:most]

    def train_context(self, most: int) -> Tensor | None:
        return None if self.test_context is None else self.test_context[:most]

    def row_weights(self, most: int) -> Tensor | None:
        return None if self.test_weights is None else self.test_weights[:most]


class RowsToScore(ScoredRows):
    """The rows of a file as samples to score. There are no training batches.

    The columns that the flow was trained on are read. If the file has column names, the columns are found by name, in
    any order, and other columns are ignored. Otherwise the positions chosen in training are used. If the file lacks
    these positions but has as many columns as a sample has elements, all columns are read in order. Images are rows of
    numbers, an array (n, C, H, W) or (n, H, W), or an IDX file.

    Args:
        path: a file, see `read_table`, or an IDX file, plain or gzipped.
        samples: the description of the samples that the flow was trained on.
        key, columns, label, header, decimal, missing, na, context, weights, signed_weights, id: the settings that the
            training file was read with, see `ArrayData`. If `missing` is None, no row is left out. If `na` is None, no
            further values count as missing. If `id` is a position, it is the position in the file to score.
        anomaly_label: name or position of the column that says which rows of this file are known anomalies, see
            `anomaly_labels`. It is not part of a sample.
        asked: the names of the settings among these that the user gave for this file. These settings have priority over
            the column names in the file.
        seed: the seed of the noise on columns that `data.dequantize` names.

    Raises:
        ConfigError: columns that the file does not have.
        DataError: values that do not fit the samples that the flow was trained on.
    """

    def __init__(
        self,
        path: str | Path,
        samples: Samples,
        key: str | None = None,
        columns: Columns | None = None,
        label: str | int | None = None,
        header: bool | None = None,
        decimal: str | None = None,
        asked: Collection[str] = (),
        seed: int = 0,
        missing: str | None = None,
        na: Sequence[str | float] | str | float | None = None,
        context: Columns | None = None,
        weights: str | int | None = None,
        signed_weights: bool | None = None,
        id: str | int | None = None,
        anomaly_label: str | int | None = None,
    ) -> None:
        if not isinstance(path, str | Path):
            raise ConfigError(f"data.path={path}: give the path of a file")
        file = Path(path).expanduser()
        self._read_ids: Callable[[], Ids] | None = None
        self._read_anomaly_labels: Callable[[], Ids] | None = None
        if _is_idx(file):
            if anomaly_label is not None:
                raise ConfigError(f"data.anomaly_label={anomaly_label}: {file} contains only images, without labels")
            tables = RoleTables(_of_images(file, samples.event_shape))
        else:
            key = key if "key" in asked else _key_of(file, key)
            # the training file may have another format and another header
            header = header if "header" in asked else None
            check_format(str(file), format_of(header, decimal if "decimal" in asked else None))
            text_format = TextFormat(header, decimal, samples.columns)
            roles = Roles(label, context, weights, bool(signed_weights), id)
            selection = _Selection(file, samples, columns, roles, asked, anomaly_label)
            absent = missing_of(missing, na)
            table = read_table(file, key, selection.choose, "data.columns", samples.event_shape, text_format, absent)
            tables = selection.divided(table)
            n = len(table.values) if table.kept is None else table.kept.of
            if selection.ids is not None:
                self._read_ids = partial(read_ids, file, key, selection.ids, text_format, n)
            if (position := selection.label_of_anomalies) is not None:
                self._read_anomaly_labels = partial(read_ids, file, key, position, text_format, n)
        tables.check()
        super().__init__(tables.samples, tables.extras(), samples, seed)

    def ids(self, name: str) -> Ids | None:
        return None if self._read_ids is None else self._read_ids()

    def anomaly_labels(self) -> Tensor | None:
        """Returns 1 for known anomalies, 0 for ordinary rows and NaN for missing labels, (n,), or None without labels.

        Raises:
            DataError: other labels.
        """
        if self._read_anomaly_labels is None:
            return None
        found = self._read_anomaly_labels()
        cells = [str(cell).strip().lower() for cell in found.values]
        labels = np.array([_ANOMALY_LABELS.get(cell, math.nan if is_missing(cell) else -1.0) for cell in cells])
        if (bad := np.flatnonzero(labels == -1)).size:
            raise DataError(
                f"data.anomaly_label: column {found.name!r} has the value {found.values[bad[0]]!r} in row {bad[0]} "
                "(from 0); give 0 for ordinary rows and 1 for anomalies"
            )
        return torch.from_numpy(labels if self.kept is None else labels[self.kept.rows])


class _Selection:
    """Chooses the columns of the samples and of other roles as in training; see `RowsToScore`."""

    def __init__(
        self,
        file: Path,
        samples: Samples,
        columns: Columns | None,
        roles: Roles,
        asked: Collection[str],
        anomaly_label: str | int | None = None,
    ) -> None:
        self.file, self.samples, self.columns, self.roles, self.asked = file, samples, columns, roles, asked
        self.anomaly_label = anomaly_label
        self.width = math.prod(samples.event_shape)
        self.others: dict[str, list[int]] = {}
        self.ids: int | None = None
        self.label_of_anomalies: int | None = None
        self.sampled = False

    def choose(self, names: Sequence[str], left_out: Sequence[int]) -> Chosen:
        """Returns the positions of the samples' columns, followed by the columns of other roles.

        Columns that were categorical in training may contain text.
        """
        if self.anomaly_label is not None:
            self.label_of_anomalies = id_position(self.anomaly_label, names, self.file, "data.anomaly_label")
        named = tuple(names) != default_names(range(len(names)))
        # flowsample writes names for columns that had no names in the training file
        self.sampled = tuple(names) in (column_names(self.samples, False), column_names(self.samples, True))
        trained = sample_names(self.samples) if self.sampled else self.samples.columns
        by_name = named and bool(trained) and "columns" not in self.asked
        if by_name and len(set(trained)) == len(trained) and all(names.count(name) < 2 for name in trained):
            indices = pick(trained, names, self.file, "the columns that the flow was trained on")
        else:
            indices = self._by_position(names, left_out)
            if by_name and tuple(names[i] for i in indices) != trained:
                raise DataError(
                    f"{self.file} has {listed([names[i] for i in indices])}, but the flow was trained on "
                    f"{listed(trained)}. Some names occur twice, so choose the columns by position with data.columns"
                )
        self.others = {
            "label": self._single("label", self.roles.label if self.samples.classes else None, names, named),
            "context": self._context(names, named),
            "weights": self._single("weights", self.roles.weights, names, named),
        }
        self.ids = self._ids(names, indices)
        taken = [*indices]
        for role, positions in self.others.items():
            if twice := [i for i in positions if i in taken]:
                raise DataError(
                    f"{self.file}: column {names[twice[0]]!r} of data.{role} is also part of the samples or of another "
                    f"role; give another column with data.{role}"
                )
            taken += positions
        if self.label_of_anomalies in taken:
            raise DataError(
                f"{self.file}: column {names[self.label_of_anomalies]!r} of data.anomaly_label is also part of the "
                "samples or of another role; give another column"
            )
        text = [i for i, one in zip(indices, self.samples.types, strict=False) if one.kind == CATEGORICAL]
        text += [
            i
            for i, column in zip(self.others["context"], self.samples.context, strict=True)
            if column.kind == CATEGORICAL
        ]
        return Chosen(taken, text, dict.fromkeys(taken, "") | dict.fromkeys(self.others["weights"], "data.weights"))

    def divided(self, table: Table) -> RoleTables:
        """Divides the table by the roles of its columns. Categories become their positions.

        Raises:
            DataError: a category that does not occur in the training file.
        """
        for i, one in enumerate(self.samples.types):
            if one.kind == CATEGORICAL:
                table = with_codes(table, i, one.categories)
        first = self.width + len(self.others["label"])
        for i, column in enumerate(self.samples.context):
            if column.kind == CATEGORICAL:
                table = with_codes(table, first + i, column.categories)
        found, start = dict[str, Any](), self.width
        for role, positions in self.others.items():
            found[role] = table.only(range(start, start + len(positions))) if positions else None
            start += len(positions)
        return RoleTables(table.only(range(self.width)), signed=self.roles.signed, **found)

    def _by_position(self, names: Sequence[str], left_out: Sequence[int]) -> list[int]:
        """Returns the positions of the samples' columns as chosen in training, or of all columns in order."""
        every = [i for i in range(len(names)) if i not in left_out and i != self.label_of_anomalies]
        if "columns" in self.asked:
            indices = self._without_others(pick(self.columns, names, self.file), names)
        else:
            try:
                indices = self._without_others(pick(self.columns, names, self.file, left_out=left_out), names)
            except ConfigError:
                if len(every) != self.width:
                    raise
                indices = every
            if len(indices) != self.width and len(every) == self.width:
                indices = every
            if indices != every and len(every) == self.width:
                _log.warning(
                    f"{self.file}: the columns are read in the order {', '.join(map(str, indices))}, the data.columns "
                    f"of the training run. If they are already in the order of the samples, as in a file written by "
                    f"flowsample, give {as_option(range(self.width))}"
                )
        if len(indices) != self.width:
            raise DataError(
                f"{self.file} has {counted(len(indices), 'column')}, but the flow was trained on {self.width}: choose "
                "the columns with data.columns"
            )
        return indices

    def _without_others(self, indices: list[int], names: Sequence[str]) -> list[int]:
        """Returns the positions without the columns of other roles."""
        others: list[int] = []
        for role in ("label", "context", "weights", "id"):
            wanted = getattr(self.roles, role)
            try:
                others += [] if wanted is None else pick(wanted, names, self.file, f"data.{role}")
            except ConfigError:
                # files of new rows may lack labels, weights and ids
                continue
        return [i for i in indices if i not in others and i != self.label_of_anomalies]

    def _single(self, role: str, wanted: str | int | None, names: Sequence[str], named: bool) -> list[int]:
        """Returns the position of the column of labels or weights; [] if the file has none or it is not needed."""
        if wanted is None:
            return []
        if role not in self.asked:
            # a position refers to the training file; a file with column names may have another order
            trained = LABEL if self.sampled and role == "label" else None
            trained = getattr(self.samples, role) or trained
            wanted = trained if named and trained else wanted
            here = names.count(wanted) == 1 if isinstance(wanted, str) else len(names) > self.width
            if not here:
                return []
        return pick([wanted], names, self.file, f"data.{role}")

    def _ids(self, names: Sequence[str], samples: Sequence[int]) -> int | None:
        """Returns the position of the column of ids; None if the file has none.

        Args:
            samples: the positions of the samples' columns. The column of ids is one of them only if the user gave
                `data.id` for this file.
        """
        wanted = self.roles.id
        if wanted is None:
            return None
        if "id" in self.asked:
            return id_position(wanted, names, self.file)
        here = names.count(wanted) == 1 if isinstance(wanted, str) else -len(names) <= wanted < len(names)
        position = id_position(wanted, names, self.file) if here else None
        return None if position in samples else position

    def _context(self, names: Sequence[str], named: bool) -> list[int]:
        """Returns the positions of the context columns.

        Raises:
            ConfigError: a column that the file does not have, or `data.context` for a flow without context.
            DataError: another number of columns.
        """
        trained = [column.name for column in self.samples.context]
        if not trained:
            if "context" in self.asked and self.roles.context is not None:
                raise ConfigError("data.context: the flow was trained without context; omit this option")
            return []
        # positions in the training file do not apply to another file with names, whose columns may have another order
        by_name = bool(self.samples.columns) or all(names.count(name) == 1 for name in trained)
        if "context" not in self.asked and named and by_name:
            return pick(trained, names, self.file, "data.context")
        wanted = trained if self.roles.context is None else self.roles.context
        positions = pick(wanted, names, self.file, "data.context")
        if len(positions) != len(trained):
            raise DataError(
                f"{self.file}: data.context names {counted(len(positions), 'column')}, but the flow was trained with "
                f"the context {', '.join(trained)}"
            )
        # the names that the flow knows, in another order
        position_of = {names[i]: i for i in positions}
        return [position_of[name] for name in trained] if set(position_of) == set(trained) else positions


def _key_of(file: Path, key: str | None) -> str | None:
    """Returns the key of the table to read from a file; None if its only table has another name than `key`."""
    if key is None or not takes_key(file):
        return None
    try:
        if ending_of(file) == ".xlsx":
            names = sheets_of(file)
        else:
            with zipfile.ZipFile(file) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile, DataError):
        # the file is read later, which raises the error
        return key
    return None if key not in names and len(names) == 1 else key


def _is_idx(file: Path) -> bool:
    """Whether the name is a name of an IDX file, such as train-images-idx3-ubyte.gz."""
    known = ending_of(file).removesuffix(".gz") in ARRAYS + TEXTS + TYPED
    return file.suffix == ".idx" or ("-idx" in file.name and not known)


def _of_images(file: Path, event_shape: tuple[int, ...]) -> Table:
    images = read_idx(file)
    if not is_images(images.shape, event_shape):
        raise DataError(f"{file} has shape {images.shape}, but the flow was trained on samples of shape {event_shape}")
    values = images.reshape(len(images), -1).astype(np.float64)
    indices = tuple(range(values.shape[1]))
    return Table(values, default_names(indices), indices, str(file))
