"""Files for the tests of what is not read into memory."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowtrain.data.tables.array import ArrayData

N = 1000


def table(tmp_path: Path, dtype: Any = np.float32, n: int = N) -> tuple[str, NDArray[Any]]:
    """Rows that are told apart by their first column, in an order that is none."""
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.permutation(n), 5 + 3 * rng.standard_normal(n), np.arange(n) % 4]).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    return str(tmp_path / "x.npy"), values


def big(path: str, **options: Any) -> ArrayData:
    return ArrayData(path, memory_map=True, **options)
