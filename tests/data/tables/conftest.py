"""Fixtures for the tests of tables."""

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
    """Returns a function that returns the rows of a tensor as tuples."""
    return lambda values: [tuple(row) for row in values.tolist()]


@pytest.fixture(scope="session")
def epoch() -> Callable[..., torch.Tensor]:
    """Returns a function that collects the batches of one epoch of n training rows."""

    def rows(data: ArrayData, n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        return torch.cat([data.train_batch(step, batch, seed) for step in range(n // batch)])

    return rows


# Streamed files


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes streamed files use blocks of 16 rows, windows of 8 blocks, and chunks of 50 rows."""
    monkeypatch.setattr(streaming, "BLOCK", 16 * 3 * 4)
    monkeypatch.setattr(streaming, "WINDOW", 16 * 8 * (3 * 4 + 8))
    monkeypatch.setattr(streaming, "CHUNK", 50 * 3 * 8)
    monkeypatch.setattr(array, "MOST_HELD_OUT", 60)


@pytest.fixture(scope="session")
def table() -> Callable[..., tuple[str, NDArray[Any]]]:
    """Returns a function that writes shuffled rows, identified by their first column, and returns the path and rows."""

    def write(folder: Any, dtype: Any = np.float32, n: int = 1000) -> tuple[str, NDArray[Any]]:
        rng = np.random.default_rng(0)
        values = np.column_stack([rng.permutation(n), 5 + 3 * rng.standard_normal(n), np.arange(n) % 4]).astype(dtype)
        np.save(folder / "x.npy", values)
        return str(folder / "x.npy"), values

    return write


@pytest.fixture(scope="session")
def open_streamed() -> Callable[..., ArrayData]:
    """Returns a function that opens a file for streaming."""
    return lambda path, **options: ArrayData(path, memory_map=True, **options)
