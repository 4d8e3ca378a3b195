"""Fixtures of the tests of tables."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flowtrain.data.tables import array, streaming
from flowtrain.data.tables.array import ArrayData


@pytest.fixture(scope="session")
def rows_of() -> Callable[[torch.Tensor], list[tuple[float, ...]]]:
    """Returns the rows of a tensor as tuples."""
    return lambda values: [tuple(row) for row in values.tolist()]


@pytest.fixture(scope="session")
def epoch() -> Callable[..., torch.Tensor]:
    """Returns the training rows of one epoch of n rows, batch after batch."""

    def rows(data: ArrayData, n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        return torch.cat([data.train_batch(step, batch, seed) for step in range(n // batch)])

    return rows


# Files that are not read into memory


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that are not read into memory: blocks of 16 rows, windows of 8 of them, looks at 50 rows at a time."""
    monkeypatch.setattr(streaming, "BLOCK", 16 * 3 * 4)
    monkeypatch.setattr(streaming, "WINDOW", 16 * 8 * (3 * 4 + 8))
    monkeypatch.setattr(streaming, "CHUNK", 50 * 3 * 8)
    monkeypatch.setattr(array, "MOST_HELD_OUT", 60)


@pytest.fixture(scope="session")
def table() -> Callable[..., tuple[str, NDArray[Any]]]:
    """Writes shuffled rows that are told apart by their first column: the path, and the rows."""

    def write(folder: Any, dtype: Any = np.float32, n: int = 1000) -> tuple[str, NDArray[Any]]:
        rng = np.random.default_rng(0)
        values = np.column_stack([rng.permutation(n), 5 + 3 * rng.standard_normal(n), np.arange(n) % 4]).astype(dtype)
        np.save(folder / "x.npy", values)
        return str(folder / "x.npy"), values

    return write


@pytest.fixture(scope="session")
def big() -> Callable[..., ArrayData]:
    """Opens a file without reading it into memory."""
    return lambda path, **options: ArrayData(path, memory_map=True, **options)
