"""data=array: the user's own table from .npy, .npz or text files."""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.checks import flag
from flowtrain.data.array_checks import (
    check_alike,
    check_range,
    check_spread,
    check_whole,
    warn_if_discrete,
)
from flowtrain.data.base import Dataset, step_generator
from flowtrain.data.columns import Columns
from flowtrain.data.read import Table, read_table
from flowtrain.errors import ConfigError, DataError

_log = logging.getLogger("flowtrain")

# Keys of the random streams. None is 0: a generator keyed by (seed, 5) is the one keyed by (seed, 5, 0)
_STREAM = 0x6172_7279
_SPLIT, _ORDER, _TRAIN_NOISE, _VAL_NOISE, _TEST_NOISE = 1, 2, 3, 4, 5


class ArrayData(Dataset):
    """Rows of a table as samples x of shape (B, d), float32, in the units of the file.

    What is not given as a file of its own is split off the training file, at random but the same for every
    run with the same `seed` of the data. The density of values that repeat is unbounded, so a column that is
    constant in training is refused, and counts or pixels want `dequantize`: u ~ U[0, 1) is added to whole
    numbers, anew at every training step and once for val and test. The likelihood is then that of x + u, in
    nats, and its mean is a lower bound on the log probability of the discrete x itself.

    Args:
        path: the training file, .npy .npz .csv .txt .data .tra or .tes; see `read_table`.
        val_path, test_path: held-out files with the same columns.
        key: which array of an .npz file with several.
        columns: names, positions or slices such as "0:64" of the columns to keep.
        val_fraction, test_fraction: the share of the training file to hold out where there is no such file.
        standardize: give the flow the mean and deviation of the training rows.
        dequantize: add uniform noise to whole numbers.
        seed: of the split and of the noise on val and test; batches have the seed of the run.

    Raises:
        ConfigError: no path, a fraction outside (0, 1), columns or a key that the file lacks.
        DataError: files that do not fit together, too few rows, values that no density can be fitted to.
    """

    def __init__(
        self,
        path: str | None,
        val_path: str | None = None,
        test_path: str | None = None,
        key: str | None = None,
        columns: Columns | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        standardize: bool = True,
        seed: int = 0,
        dequantize: bool = False,
    ) -> None:
        if path is None:
            raise ConfigError(
                "data.path is not set: data=array reads your own file, so give data.path=FILE (.npy, .npz or .csv)"
            )
        flag("data.standardize", standardize)
        flag("data.dequantize", dequantize)
        train = read_table(path, key, columns)
        others = [None if p is None else read_table(p, key, columns) for p in (val_path, test_path)]
        tables = [train, *(table for table in others if table is not None)]
        for table in tables:
            check_alike(train, table)
            check_range(table)
            if dequantize:
                check_whole(table)

        rows = _split(train, others, (val_fraction, test_fraction), seed)
        parts = [train.values[rows[0]]]
        parts += [
            train.values[mine] if table is None else table.values for mine, table in zip(rows[1:], others, strict=True)
        ]
        self._mean, self._std = _moments(parts[0], dequantize)
        check_spread(train, self._mean, self._std, dequantize)
        if not dequantize:
            warn_if_discrete(train, parts[0])
        self.columns = train.columns
        self.event_shape = (len(train.columns),)
        self._standardize, self._dequantize = standardize, dequantize
        self._train = _float32(parts[0])
        self.val = self._held_out(parts[1], _VAL_NOISE, seed)
        self.test = self._held_out(parts[2], _TEST_NOISE, seed)
        self._orders: dict[tuple[int, int], Tensor] = {}
        sizes = " + ".join(str(len(part)) for part in parts)
        _log.info(f"{path}: {sizes} rows for train, val and test, {len(train.columns)} columns")

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Rows step * batch_size to (step + 1) * batch_size of the endless epochs, shape (batch_size, d).

        Every row comes once an epoch, in an order drawn anew; a batch may cross from one epoch into the next,
        or hold several.
        """
        batch = self._train[self._rows(step * batch_size, batch_size, seed)]
        if self._dequantize:
            batch = _dequantized(batch, step_generator(seed, _STREAM, _TRAIN_NOISE, step))
        return batch

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (over n) of the training rows, shape (d,), float64, noise included."""
        if not self._standardize:
            return None
        return torch.from_numpy(self._mean.copy()), torch.from_numpy(self._std.copy())

    def _rows(self, first: int, count: int, seed: int) -> Tensor:
        """Positions `first` to `first + count` of the epochs laid end to end."""
        pieces = []
        while count:
            epoch, offset = divmod(first, len(self._train))
            piece = self._order(epoch, seed)[offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _order(self, epoch: int, seed: int) -> Tensor:
        order = self._orders.get((epoch, seed))
        if order is None:
            generator = step_generator(seed, _STREAM, _ORDER, epoch)
            order = torch.randperm(len(self._train), generator=generator)
            # Two epochs are all that one batch crosses as a rule, and an order is as long as the data
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch, seed] = order
        return order

    def _held_out(self, values: NDArray[np.float64], stream: int, seed: int) -> Tensor:
        samples = _float32(values)
        if self._dequantize:
            samples = _dequantized(samples, step_generator(seed, _STREAM, stream))
        return samples


def _float32(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _dequantized(x: Tensor, generator: torch.Generator) -> Tensor:
    """x + u with u ~ U[0, 1), shape of x."""
    noisy = x + torch.rand(x.shape, generator=generator, dtype=x.dtype)
    # Rounding can carry 16 + u up to 17, which belongs to the next number
    return torch.minimum(noisy, torch.nextafter(x + 1, x))


def _moments(values: NDArray[np.float64], dequantize: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and population deviation per column, of x + u with u ~ U[0, 1) where dequantized."""
    mean, variance = values.mean(0), values.var(0)
    if dequantize:
        mean, variance = mean + 1 / 2, variance + 1 / 12
    return mean, np.sqrt(variance)


def _split(
    train: Table, others: list[Table | None], fractions: tuple[float, float], seed: int
) -> list[NDArray[np.int64]]:
    """Which rows of the training file are for training, val and test; none for a set with a file of its own.

    Raises:
        ConfigError: fractions that leave nothing for one of the sets.
        DataError: fewer than two rows for training.
    """
    n = len(train.values)
    shares: dict[str, float] = {}
    for name, fraction, table in zip(("val", "test"), fractions, others, strict=True):
        if table is None:
            shares[name] = _fraction(name, fraction)
    if sum(shares.values()) >= 1:
        asked = " and ".join(f"data.{name}_fraction={share}" for name, share in shares.items())
        raise ConfigError(f"{asked} leave nothing for training; their sum must be below 1")
    held = {name: max(1, round(n * share)) for name, share in shares.items()}
    left = n - sum(held.values())
    if left < 2:
        rest = "".join(f", {count} for {name}" for name, count in held.items())
        raise DataError(
            f"{train.path} has {n} row{'s' * (n != 1)}: {max(left, 0)} for training{rest}; at least 2 are "
            "needed for training and 1 for each held-out set"
        )
    order = torch.randperm(n, generator=step_generator(seed, _STREAM, _SPLIT)).numpy()
    ends = np.cumsum([left, held.get("val", 0)])
    return list(np.split(order, ends))


def _fraction(name: str, fraction: float) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(
            f"data.{name}_fraction={fraction}: a number between 0 and 1 is needed, or give data.{name}_path"
        )
    return float(fraction)
