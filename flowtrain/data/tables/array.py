"""data=array: a table from the user's files."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import ALPHA, Checksum, Ids, Samples, record_of
from flowtrain.data.context import ContextColumn
from flowtrain.data.in_memory import Finite, InMemoryStore, held_out, split
from flowtrain.data.tables.column_types import asked_types, categories_of, encoded, hint_of_types
from flowtrain.data.tables.columns import Columns, listed
from flowtrain.data.tables.csv_reader import DETECTED, TextFormat
from flowtrain.data.tables.ids import read_ids
from flowtrain.data.tables.missing import REFUSE, REFUSED, Missing, missing_of
from flowtrain.data.tables.roles import Roles, RoleTables, read_roles
from flowtrain.data.tables.sample_spec import (
    Part,
    SampleSpec,
    TrainingSplit,
    add_batch_noise,
    add_set_noise,
    noisy_columns,
)
from flowtrain.data.tables.streaming import Moments, StreamedStore, StreamedTable, is_streamed
from flowtrain.data.tables.table_checks import (
    check_context,
    check_enough_rows,
    check_held_out_weights,
    check_mean_weight,
    check_same_columns,
    check_several_weighted,
    check_spread,
    row_hashes,
    warn_of_copies,
    warn_of_dependence,
    warn_of_rare_categories,
    warn_of_repeats,
    warn_of_sentinels,
    warn_of_signed_weights,
    warn_of_unseen,
    whole_columns,
)
from flowtrain.data.tables.table_reader import Table, ending_of, takes_key
from flowtrain.data.tables.typed_files import TYPED
from flowtrain.data.types import CATEGORICAL, INTEGER, REAL, ColumnType, whole_columns_of
from flowtrain.utils.arguments import below_half, flag, one_of, whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import counted

_log = logging.getLogger("flowtrain")


class InMemoryTable:
    """A table that is in memory; see `read_roles` for the arguments.

    Attributes:
        tables: the table, divided by the roles of its columns.
        table: the samples.
        read_ids: a function that reads the ids of all rows of the file; None without ids.
        n: the number of rows.
    """

    def __init__(
        self,
        path: str | Table,
        key: str | None,
        columns: Columns | None,
        roles: Roles,
        text_format: TextFormat = DETECTED,
        missing: Missing = REFUSED,
    ) -> None:
        self.tables = read_roles(path, key, columns, roles, text_format, missing)
        self.table = self.tables.samples
        self.n = len(self.table.values)
        self.read_ids: Callable[[], Ids] | None = None
        if roles.id is not None and isinstance(path, str):
            in_file = self.n if self.table.kept is None else self.table.kept.of
            self.read_ids = partial(read_ids, path, key, roles.id, text_format, in_file)

    def values_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the smallest and the largest value of each column of the samples, (d,)."""
        return self.table.values.min(0), self.table.values.max(0)

    def some_values(self, most: int) -> NDArray[np.float64]:
        """Returns at most `most` rows of the samples at equal distances, (n, d)."""
        return self.table.values[:: -(-self.n // most)]

    def encode(self, types: Sequence[ColumnType], context: Sequence[ColumnType]) -> None:
        """Replaces the values of categorical columns by positions in the categories.

        Args:
            types, context: the types of the columns of the samples and of the context.

        Raises:
            DataError: a value that is not one of the categories.
        """
        tables = replace(self.tables, samples=encoded(self.table, types))
        if tables.context is not None:
            tables = replace(tables, context=encoded(tables.context, context))
        self.tables, self.table = tables, tables.samples

    def all(self, spec: SampleSpec, most: int, seed: int, *stream: int) -> Part:
        """Checks all rows and returns them as a held-out set. `most` is ignored because the rows are in memory."""
        rows = np.arange(self._checked(spec))
        return replace(self._part(spec, rows), rows=(self.n, self._checksum()), numbers=self.in_file(rows))

    def split_rows(
        self, spec: SampleSpec, sizes: list[int], seed: int, split_key: tuple[int, ...], order_key: tuple[int, ...]
    ) -> TrainingSplit:
        """Checks all rows and splits them into training rows and held-out sets of these sizes.

        Args:
            sizes: the number of rows of each held-out set.
            seed: the seed of the split.
            split_key: the key of the random stream of the split.
            order_key: the key of the random stream of the order of training rows.
        """
        rows = split(self._checked(spec), sizes, seed, *split_key)
        values = self.table.values[rows[0]]
        train = self._part(spec, rows[0])
        extras, weights = train.extras, None if train.extras.weights is None else train.extras.weights.numpy()
        labels = np.empty(0, np.int64) if extras.label is None else extras.label.numpy()
        moments, of_context = Moments(values.shape[1]), None
        moments.add(values, weights)
        on_line = Moments(values.shape[1])
        for each in spec.on_line(values):
            on_line.add(each, weights)
        if extras.context is not None:
            of_context = Moments(extras.context.shape[1])
            of_context.add(extras.context.numpy(), weights)
        mean_weight = 1.0 if weights is None else check_mean_weight(self.table.path, float(weights.mean()))
        return TrainingSplit(
            store=InMemoryStore(train.x, extras.normalized(mean_weight), *order_key),
            n=len(values),
            held=[self._part(spec, mine) for mine in rows[1:]],
            mean=moments.mean,
            variance=moments.variance,
            subset=values,
            whole=whole_columns(self.table.values),
            hashes=np.empty(0, np.uint64) if spec.integer_valued else row_hashes(train.x.numpy()),
            hash_step=1,
            class_counts=np.bincount(labels),
            checksum=self._checksum(),
            context=None if of_context is None else np.stack([of_context.mean, of_context.variance]),
            subset_extras=extras,
            mean_weight=mean_weight,
            on_line=np.stack([on_line.mean, on_line.variance]) if spec.types else None,
        )

    def in_file(self, rows: np.ndarray) -> np.ndarray:
        """Returns the row numbers in the file of rows of the table, (k,)."""
        return rows if self.table.kept is None else self.table.kept.rows[rows]

    def _checksum(self) -> str:
        return str(Checksum().add(self.table.values, self.tables.other_values))

    def _checked(self, spec: SampleSpec) -> int:
        spec.check(self.table)
        self.tables.check()
        return self.n

    def _part(self, spec: SampleSpec, rows: np.ndarray) -> Part:
        return Part(spec.samples(self.table.values[rows]), self.tables.extras(rows), rows)


# keys of the random streams
_STREAM = 0x6172_7279
_SPLIT, _ORDER, _OWN = 1, 2, 3
# Largest number of rows, and of their bytes, in each held-out set of a file that is not read into memory
MOST_HELD_OUT, HELD_OUT_BYTES = 100_000, 2**28
# Number of training rows whose context is stored in checkpoints
CONTEXT_ROWS = 100
# Number of rows from which the maps of column types are chosen
SOME_VALUES = 10_000
# A column is centred if the rounding error of float32 exceeds this fraction of its standard deviation
COARSE = 1e-4


class ArrayData(Finite):
    """Rows of a table as samples x of shape (B, d), or (B, *event_shape), in the units of the file.

    A held-out set without a separate file is split off the training file at random. The split is the same for all runs
    with the same `seed` of the data.

    The density of repeated values is unbounded. A column that is constant in training is therefore refused, and counts
    and pixels need `dequantize` or `levels`. Samples are then integers, to which the flow adds noise u ~ U[0, 1). If
    only some columns are counts, the data set adds the noise to these columns. Each training batch has new noise;
    held-out rows have fixed noise.

    Args:
        path: the training file, see `read_table`; or a table in memory.
        val_path, test_path: held-out files or tables with the same columns.
        key: the array to read from an .npz file with several arrays, or the sheet to read from an .xlsx file with
            several sheets. Held-out files of other formats ignore this key.
        columns: names, positions or slices such as "0:64" of the columns to keep.
        header: whether the first line of a text file or an .xlsx file names the columns. None means detected. Held-out
            files of other formats ignore it.
        decimal: the decimal mark of text files, point or comma. None means detected. Held-out files of other formats
            ignore it.
        missing: "refuse" refuses a table with missing values. "drop" leaves out rows that have a missing value in the
            used columns. A file that is read in blocks is refused in both cases.
        na: numbers and text that count as missing values, besides NaN, empty cells and words such as NA.
        label: name or position of a column of class labels 0, 1, ..., which is not part of a sample. None means that
            there are no labels.
        context: names, positions or slices of the columns c of p(x | c), which are not part of a sample. None means
            that there is no context.
        weights: name or position of a column of weights, which is not part of a sample. Only the ratios of the weights
            matter. None means equal weights.
        signed_weights: whether weights may be negative, as in simulations of particle physics.
        types: the types of columns, by name or position, see `flowtrain.data.types.ColumnType.parse`. Columns without a
            type are real. None means that all columns are real.
        id: name or position of a column that identifies the rows, and is not part of a sample. It may contain anything.
        earlier: the samples of an earlier training of the flow, or None for a new flow. Columns keep the categories and
            the maps of their types. There are at least as many classes as before. It is not a config key.
        event_shape: the shape (C, H, W) of images. A row of the table is a flattened image. None means vectors.
        val_fraction, test_fraction: the fraction of the training file to hold out if there is no separate file.
        standardize: whether the flow standardizes samples by the mean and standard deviation of the training rows. None
            means true unless `levels` is given.
        dequantize: whether samples are whole numbers, or the names or positions of the columns of whole numbers.
        levels: samples are whole numbers from 0 to levels - 1, which a logit maps to the real line.
        alpha: the parameter of the logit.
        memory_map: whether training rows are read from a .npy file when they are needed. Memory then does not grow with
            the file, batches are shuffled by blocks, and at most 100,000 rows are held out for each set. None means
            true for files of 256 MiB or more. A held-out file of 256 MiB or more is read in the same way unless this is
            False, and at most 100,000 of its rows are drawn at random.
        seed: the seed of the split. Batches use the seed of the run.
        center: whether samples may be kept in float64. Samples are kept in float64 if the mean of a column is so large
            compared with its standard deviation that float32 would lose significant digits. The flow then subtracts an
            offset.
        gaussian_start: whether the flow starts at the Gaussian of the training rows, with a shrunk covariance. A fixed
            linear layer next to the base maps to this Gaussian. None means true for vectors.

    Raises:
        ConfigError: a missing path, a fraction outside (0, 1), both a label and a context, or columns, a key or a shape
            that do not fit the file.
        DataError: files with different columns, too few rows (for vectors, fewer training rows than columns), or values
            that no density can be fitted to.
    """

    def __init__(
        self,
        path: str | Table | None,
        val_path: str | Table | None = None,
        test_path: str | Table | None = None,
        key: str | None = None,
        columns: Columns | None = None,
        label: str | int | None = None,
        event_shape: Sequence[int] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        standardize: bool | None = None,
        seed: int = 0,
        dequantize: bool | Sequence[str | int] | str | int = False,
        levels: int | None = None,
        alpha: float = ALPHA,
        memory_map: bool | None = None,
        header: bool | None = None,
        decimal: str | None = None,
        center: bool = True,
        gaussian_start: bool | None = None,
        missing: str = REFUSE,
        na: Sequence[str | float] | str | float | None = None,
        context: Columns | None = None,
        weights: str | int | None = None,
        signed_weights: bool = False,
        types: Mapping[str | int, Any] | None = None,
        id: str | int | None = None,
        earlier: Samples | None = None,
    ) -> None:
        path = _checked_paths(path, val_path, test_path)
        _check_types_alone(types, levels, event_shape, dequantize)
        self.levels = None if levels is None else whole("data.levels", levels, least=2)
        self.alpha = below_half("data.alpha", alpha)
        self._standardize = _standardizes(standardize, levels)
        self._centers = flag("data.center", center) and levels is None
        text_format, absent = format_of(header, decimal), missing_of(missing, na)
        if not isinstance(path, Table):
            check_format(path, text_format)
        roles = Roles(label, context, weights, flag("data.signed_weights", signed_weights), id, asked_types(types))
        first = _source(path, memory_map, key, columns, roles, text_format, absent)
        # memory_map=true is for the training file only: held-out files are streamed if they are large
        rest = None if memory_map else memory_map
        others = [
            None if p is None else _source(p, rest, key if _takes_key(p) else None, columns, roles, text_format, absent)
            for p in (val_path, test_path)
        ]
        for other in others:
            if other is not None:
                check_same_columns(first.table, other.table)
                for role, table in first.tables.others.items():
                    check_same_columns(table, other.tables.others[role])
        self.types, context_types = _fitted_types(
            [first, *(other for other in others if other is not None)], dequantize, earlier
        )
        width = len(first.table.columns)
        self.event_shape = _event_shape(event_shape, width)
        self.columns = first.table.columns if event_shape is None else ()
        self._names = first.table.columns if first.table.named else ()
        self._label, self._weights = (_name_of(first.tables.others.get(role)) for role in ("label", "weights"))
        self.integer_valued, self.noisy = (
            (False, whole_columns_of(self.types)) if self.types else _noise(dequantize, self.levels, first.table)
        )
        spec = SampleSpec(self.event_shape, self.integer_valued, self.levels, self.noisy, types=self.types)

        most = max(1, min(MOST_HELD_OUT, HELD_OUT_BYTES // (8 * width)))
        cap = most if isinstance(first, StreamedTable) else None
        sizes = held_out(first.n, first.table.path, [o is not None for o in others], (val_fraction, test_fraction), cap)
        training, spec = self._divide(first, spec, sizes, seed)
        own = [None if o is None else o.all(spec, most, seed, _STREAM, _OWN, i) for i, o in enumerate(others)]
        self.gaussian_start = _starts(gaussian_start, self.event_shape)
        val, test = (held if part is None else part for held, part in zip(training.held, own, strict=True))
        self.val, self.test = (
            add_set_noise(part.x, self.noisy, seed, i, self.types) for i, part in enumerate((val, test))
        )
        self.val_labels, self.val_context, self.val_weights = val.extras
        self.test_labels, self.test_context, self.test_weights = test.extras
        self._describe_context(first.tables.context, training, context_types)
        sets = {"val": val, "test": test}
        self._own_numbers = {name: part.numbers for name, part in sets.items() if isinstance(part.rows, tuple)}
        self._read_ids = {name: (other or first).read_ids for name, other in zip(sets, others, strict=True)}
        self.record = record_of((first.n, training.checksum), ((name, part.rows) for name, part in sets.items()))
        self.held_rows = {n: first.in_file(part.rows) for n, part in sets.items() if not isinstance(part.rows, tuple)}
        self._check_held_out(first.table, training, spec, sets, earlier)
        if training.subset_extras.weights is not None:
            held_weights = {n: p.extras.weights.numpy() for n, p in sets.items() if p.extras.weights is not None}
            check_held_out_weights(first.table.path, held_weights)
            warn_of_signed_weights(first.table.path, [training.subset_extras.weights.numpy(), *held_weights.values()])
        self.n_train = training.n
        if cap in sizes:
            _log.info(
                f"{first.table.path}: the file is large, so at most {most:,} rows are held out for each of validation "
                "and test"
            )

    def _divide(
        self, first: InMemoryTable | StreamedTable, spec: SampleSpec, sizes: list[int], seed: int
    ) -> tuple[TrainingSplit, SampleSpec]:
        """Splits the training file, stores its training rows, and refuses columns that no density can be fitted to."""
        keys = (_STREAM, _SPLIT), (_STREAM, _ORDER)
        if isinstance(first, StreamedTable):
            _log.info(
                f"{first.table.path}: all {first.n:,} rows are checked now; training reads them in blocks "
                "(data.memory_map)"
            )
        training = first.split_rows(spec, sizes, seed, *keys)
        self._mean, self._std = spec.moments(training.mean, training.variance)
        if len(self.event_shape) == 1:
            check_enough_rows(first.table.path, training.n, len(self._mean))
        noisy = range(len(self._mean)) if self.integer_valued else self.noisy
        weights = training.subset_extras.weights
        if weights is not None:
            check_several_weighted(first.table.path, weights.numpy())
        check_spread(first.table, self._mean, self._std, training.whole, noisy, self._centers)
        if training.on_line is not None:
            self._mean, self._std = spec.line_moments(*training.on_line)
        coarse = COARSE * self._std < np.finfo(np.float32).eps * np.abs(self._mean)
        if self._centers and coarse.any():
            names = [name for name, is_coarse in zip(first.table.columns, coarse, strict=True) if is_coarse]
            _log.info(f"{first.table.path}: samples are float64 because float32 would lose digits of {listed(names)}")
            # the offset has values that float32 represents exactly
            offset = np.where(coarse, self._mean, 0.0).astype(np.float32).astype(np.float64)
            self.offset = torch.from_numpy(offset).view(self.event_shape)
            spec = replace(spec, wide=True)
            training = first.split_rows(spec, sizes, seed, *keys)
        self.keep(training.store)
        return training, spec

    def _check_held_out(
        self,
        table: Table,
        training: TrainingSplit,
        spec: SampleSpec,
        held: Mapping[str, Part],
        earlier: Samples | None = None,
    ) -> None:
        """Counts the classes and warns of data whose likelihood is not meaningful."""
        labels = {name: part.extras.label.numpy() for name, part in held.items() if part.extras.label is not None}
        if len(labels) == len(held):
            before = 0 if earlier is None else earlier.classes or 0
            self.classes = max(before, len(training.class_counts), *(1 + int(own.max()) for own in labels.values()))
            counts = np.zeros(self.classes, np.int64)
            counts[: len(training.class_counts)] = training.class_counts
            self.class_counts = tuple(counts.tolist())
            warn_of_unseen(table.path, counts, labels)
        in_blocks = isinstance(training.store, StreamedStore)
        codes = warn_of_sentinels(table, training.subset, in_blocks) if self.levels is None else {}
        if self.integer_valued:
            return
        if len(self.event_shape) == 1:
            hint_of_types(table, training.subset, self.types, {*self.noisy, *codes})
        few = warn_of_repeats(table, training.subset, training.whole, set(self.noisy), codes, bool(self.types))
        if len(self.event_shape) == 1:
            warn_of_dependence(table, training.subset, spec.noise(len(table.columns)))
        if len(few | set(self.noisy)) < len(table.columns):
            hashes = {name: row_hashes(part.x.numpy(), training.hash_step) for name, part in held.items()}
            warn_of_copies(table.path, training.hashes, hashes)

    def _describe_context(self, table: Table | None, training: TrainingSplit, types: Sequence[ColumnType]) -> None:
        """Sets the description of the context columns from the training rows and their types.

        Raises:
            DataError: a context column that is constant in training.
        """
        if table is None or training.context is None:
            return
        mean, std = training.context[0], np.sqrt(training.context[1])
        check_context(table, mean, std, types)
        self.context = tuple(
            ContextColumn(name, CATEGORICAL, categories=one.categories)
            if one.kind == CATEGORICAL
            else ContextColumn(name, mean=float(m), std=float(s))
            for name, m, s, one in zip(table.columns, mean, std, types, strict=True)
        )
        sizes = {one.name: one.size for one in self.context if one.kind == CATEGORICAL}
        warn_of_rare_categories(table.path, sizes, training.n)
        rows = training.subset_extras.context
        assert rows is not None
        self.context_rows = tuple(
            tuple(row) for row in rows[:: max(1, len(rows) // CONTEXT_ROWS)][:CONTEXT_ROWS].tolist()
        )

    def train_share(self, step: int, batch_size: int, seed: int, share: slice) -> Tensor:
        x = super().train_share(step, batch_size, seed, share)
        return add_batch_noise(x, self.noisy, seed, step, batch_size, share, self.types)

    @property
    def samples(self) -> Samples:
        return replace(super().samples, columns=self._names, label=self._label, weights=self._weights)

    def row_numbers(self, name: str) -> NDArray[np.int64]:
        return self._own_numbers[name] if name in self._own_numbers else super().row_numbers(name)

    def ids(self, name: str) -> Ids | None:
        read = self._read_ids[name]
        return None if read is None else read().of(self.row_numbers(name))

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and standard deviation (dividing by n) of the training rows, including noise; None without them.

        Both have shape (*event_shape) and are float64.
        """
        if not self._standardize:
            return None
        mean, std = (torch.from_numpy(v.copy()).view(self.event_shape) for v in (self._mean, self._std))
        return mean, std


def _fitted_types(
    sources: Sequence[InMemoryTable | StreamedTable],
    dequantize: bool | Sequence[str | int] | str | int,
    earlier: Samples | None = None,
) -> tuple[tuple[ColumnType, ...], tuple[ColumnType, ...]]:
    """Returns the types of the columns of the samples, () if all are real, and the types of the context columns.

    Ranges and categories come from the training file, or from an earlier training. Columns that `data.dequantize` names
    are integers. In all tables, categories are replaced by their positions.

    Args:
        sources: the tables. The first is the training file.
        earlier: the samples of the earlier training, or None.

    Raises:
        DataError: a category that the training file does not contain.
    """
    first = sources[0]
    tables, types = first.tables, first.tables.types_of(first.table)
    context: tuple[ColumnType, ...] = ()
    if tables.context is not None:
        context = _with_known_categories(tables, tables.types_of(tables.context), earlier)
        context = _with_categories(tables.context, context)
    if all(one.kind == REAL for one in types):
        types = ()
    else:
        everything, counts = _noise(dequantize, None, first.table)
        counts = tuple(range(len(types))) if everything else counts
        (low, high), some = first.values_range(), first.some_values(SOME_VALUES)
        types = tuple(ColumnType(INTEGER) if i in counts and not one.is_whole else one for i, one in enumerate(types))
        known = earlier.types if earlier is not None and len(earlier.types) == len(types) else types
        types = tuple(
            before
            if before is not one and before.is_fit_of(one)
            else one.fitted(float(low[i]), float(high[i]), some[:, i])
            for i, (one, before) in enumerate(zip(types, known, strict=True))
        )
        types = _with_categories(first.table, types)
    for source in sources:
        source.encode(types, context)
    return types, context


def _with_categories(table: Table, types: Sequence[ColumnType]) -> tuple[ColumnType, ...]:
    """Returns the types, in which categorical types without categories get the categories of the columns of a table.

    A table that is read in blocks has no rows here, and its types do not change.
    """
    return tuple(
        one.with_categories(categories_of(table, i))
        if one.kind == CATEGORICAL and not one.categories and len(table.values)
        else one
        for i, one in enumerate(types)
    )


def _with_known_categories(
    tables: RoleTables, types: Sequence[ColumnType], earlier: Samples | None
) -> tuple[ColumnType, ...]:
    """Returns the types of the context columns with the categories of an earlier training."""
    before = () if earlier is None else earlier.context
    if tables.context is None or len(before) != len(types):
        return tuple(types)
    # in another file, a column of categories may contain only numbers
    return tuple(
        ColumnType(CATEGORICAL).with_categories(column.categories)
        if column.kind == CATEGORICAL and (one.kind == CATEGORICAL or index not in tables.types)
        else one
        for index, one, column in zip(tables.context.indices, types, before, strict=True)
    )


def _checked_paths(path: Any, val_path: Any, test_path: Any) -> str | Table:
    """Returns the training file, after a check of all paths.

    Raises:
        ConfigError: no training file, or a path that is neither text nor a table.
    """
    for name, given in (("path", path), ("val_path", val_path), ("test_path", test_path)):
        if given is not None and not isinstance(given, str | Table):
            raise ConfigError(f"data.{name}={given}: give the path of a file")
    if path is None:
        raise ConfigError("data.path is not set: data=array reads your own file; give data.path=FILE, such as mine.csv")
    return cast(str | Table, path)


def _check_types_alone(types: object, levels: object, event_shape: object, dequantize: object) -> None:
    """Checks that `data.types` is not combined with settings that apply to all columns.

    Raises:
        ConfigError: there is such a setting.
    """
    if types and (levels is not None or event_shape is not None or dequantize is True):
        raise ConfigError(
            "data.types cannot be combined with data.levels, data.event_shape or data.dequantize=true: omit one of "
            "them; the type integer adds noise to a column"
        )


def _name_of(table: Table | None) -> str | None:
    """Returns the name of the only column of a table; None if the file has no names, or without a table."""
    return table.columns[0] if table is not None and table.named else None


def _noise(
    asked: bool | Sequence[str | int] | str | int, levels: int | None, table: Table
) -> tuple[bool, tuple[int, ...]]:
    """Returns whether samples are whole numbers and, if they are not, the columns of whole numbers.

    Raises:
        ConfigError: a column that the table does not have, or both columns and `levels`.
    """
    if isinstance(asked, bool):
        return asked or levels is not None, ()
    entries = [asked] if isinstance(asked, str | int) else asked
    if not isinstance(entries, list | tuple) or not entries:
        raise ConfigError(
            f"data.dequantize={asked}: give true, false, or the names or positions of the columns of whole numbers, as "
            "in [age,3]"
        )
    if levels is not None:
        raise ConfigError("data.dequantize names columns, but data.levels applies to all columns; omit one of the two")
    columns = noisy_columns(entries, table)
    everything = len(columns) == len(table.columns)
    return everything, () if everything else columns


def _source(
    path: str | Table,
    memory_map: bool | None,
    key: str | None,
    columns: Columns | None,
    roles: Roles,
    text_format: TextFormat,
    missing: Missing,
) -> InMemoryTable | StreamedTable:
    """Opens a table: streamed if it is a large .npy file or the user asks for it, otherwise in memory."""
    if not isinstance(path, Table) and is_streamed(path, key, memory_map):
        return StreamedTable(path, columns, roles, missing)
    return InMemoryTable(path, key, columns, roles, text_format, missing)


def format_of(header: bool | None, decimal: str | None) -> TextFormat:
    """Returns the format of text files that `data.header` and `data.decimal` set.

    Raises:
        ConfigError: an invalid value.
    """
    return TextFormat(
        None if header is None else flag("data.header", header),
        None if decimal is None else one_of("data.decimal", decimal, ("point", "comma")),
    )


def check_format(path: str, text_format: TextFormat) -> None:
    """Refuses `data.header` and `data.decimal` for files whose format stores column names and numbers.

    Raises:
        ConfigError: `data.decimal` for a typed file, or `data.header` for a file whose format has column names.
    """
    ending = ending_of(Path(path))
    useless = {"decimal": text_format.decimal, "header": None if ending == ".xlsx" else text_format.header}
    for key, value in useless.items():
        if ending in TYPED and value is not None:
            what = "numbers" if key == "decimal" else "names of columns"
            raise ConfigError(f"data.{key} is for text files, but {path} stores {what}; omit it")


def _takes_key(path: str | Table) -> bool:
    return not isinstance(path, Table) and takes_key(Path(path))


def _standardizes(asked: bool | None, levels: int | None) -> bool:
    """Whether the flow standardizes samples. The default is true unless a logit maps samples to the real line.

    Raises:
        ConfigError: true together with `levels`.
    """
    if asked is None:
        return levels is None
    if flag("data.standardize", asked) and levels is not None:
        raise ConfigError(
            "data.standardize=true and data.levels exclude each other, because data.levels uses a logit: omit one"
        )
    return asked


def _starts(asked: bool | None, event_shape: tuple[int, ...]) -> bool:
    """Whether the flow starts at the Gaussian of the training rows. The default is true for vectors.

    Raises:
        ConfigError: true for images.
    """
    if asked is None:
        return len(event_shape) == 1
    if flag("data.gaussian_start", asked) and len(event_shape) > 1:
        raise ConfigError("data.gaussian_start=true is only for vectors; omit this setting or data.event_shape")
    return asked


def _event_shape(asked: Sequence[int] | None, width: int) -> tuple[int, ...]:
    if asked is None:
        return (width,)
    if not isinstance(asked, list | tuple) or len(asked) != 3:
        raise ConfigError(f"data.event_shape={asked}: give channels, height and width of the images, as in [1,8,8]")
    shape = [whole(f"data.event_shape[{i}]", side) for i, side in enumerate(asked)]
    if math.prod(shape) != width:
        raise ConfigError(
            f"data.event_shape={shape} needs {counted(math.prod(shape), 'column')}, but the file has {width}: choose "
            "columns with data.columns, and name a column of labels with data.label"
        )
    return tuple(shape)
