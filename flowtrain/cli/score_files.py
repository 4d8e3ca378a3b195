"""The files of `scores=`: a .npy array, or a table with ids, row numbers and log p."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.tables.output import write_columns
from flowtrain.data.tables.rows_to_score import ScoredRows
from flowtrain.utils.files import write_npy

# the columns of a table of scores after the ids
ROW, LOG_PROB, ERROR, SPREAD = "row", "log_prob", "error", "spread"


def for_each_row(data: Dataset, values: Tensor) -> NDArray[np.float64]:
    """Returns values of all rows of a file for values of the scored rows, (k, ...); see `ScoredRows.for_each_row`."""
    return data.for_each_row(values.numpy()) if isinstance(data, ScoredRows) else values.numpy()


def write_scores(
    path: Path, data: Dataset, split: str, log_p: Tensor, spread: Tensor | None = None, error: Tensor | None = None
) -> None:
    """Writes log p of each row of a set to a .npy, .csv or .parquet file.

    A table has the columns: the ids under their name, if the data have ids; `row`, the row number in the file, from 0;
    `log_prob` in nats, empty if it is NaN; `error` and `spread` if they are given. If the name of the ids equals the
    name of another column, the column of ids is called "id".

    Args:
        split: the name of the set: "val", "test", or "all" for the rows of a file.
        log_p: log p of the scored rows, (n,).
        spread: see `flowtrain.evaluation.evaluate.row_spread`, (n,), for an ensemble. A .npy file does not contain it.
        error: the error of log p, (n,), see `flowtrain.evaluation.result.Evaluation`. A .npy file does not contain it.
    """
    if path.suffix == ".npy":
        write_npy(path, for_each_row(data, log_p))
        return
    columns: dict[str, NDArray[Any]] = {}
    if (ids := data.ids(split)) is not None:
        columns["id" if ids.name in (ROW, LOG_PROB, ERROR, SPREAD) else ids.name] = ids.values
    columns[ROW] = data.row_numbers(split)
    columns[LOG_PROB] = for_each_row(data, log_p)
    if error is not None:
        columns[ERROR] = for_each_row(data, error)
    if spread is not None:
        columns[SPREAD] = for_each_row(data, spread)
    write_columns(path, columns)
