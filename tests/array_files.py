"""Files of numbers for data=array, and the rows that come of them."""

import csv
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from flowtrain.data.tables.array import ArrayData

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TABLES = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FINITE)


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


def rows_of(values: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in values.tolist()]


def epoch(data: ArrayData, n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.cat([data.train_batch(step, batch, seed) for step in range(n // batch)])
