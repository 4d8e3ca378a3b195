"""The files of `scores=` and `anomalies=`: a .npy array, or a table with ids, row numbers and log p."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.tables.output import write_columns
from flowtrain.data.tables.rows_to_score import ScoredRows
from flowtrain.evaluation.result import Evaluation
from flowtrain.utils.files import write_npy

# the columns of a table of scores after the ids, and of a table of anomalies
ROW, LOG_PROB, ERROR, SPREAD = "row", "log_prob", "error", "spread"
P_VALUE, ANOMALY, COLUMN, CONTRIBUTION = "p_value", "anomaly", "column", "contribution"


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
    columns = {LOG_PROB: for_each_row(data, log_p)}
    if error is not None:
        columns[ERROR] = for_each_row(data, error)
    if spread is not None:
        columns[SPREAD] = for_each_row(data, spread)
    write_columns(path, with_ids(data, split, columns))


def with_ids(data: Dataset, split: str, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Returns the columns of a table, with the ids and the row numbers of a set first; see `write_scores`."""
    first: dict[str, NDArray[Any]] = {}
    if (ids := data.ids(split)) is not None:
        first["id" if ids.name in (ROW, ERROR, SPREAD, *columns) else ids.name] = ids.values
    return {**first, ROW: data.row_numbers(split), **columns}


def write_anomalies(path: Path, data: Dataset, split: str, result: Evaluation, names: Sequence[str]) -> None:
    """Writes the p-value, the decision and the columns that contribute most, for each row of a set.

    A .csv or .parquet file has the columns: the ids, `row` and `log_prob` as in `write_scores`; `p_value`; `anomaly`, 1
    for flagged rows and 0 for others; and for flagged rows `column_1` with the name of the column that contributes
    most, `contribution_1` with its contribution in nats, `column_2`, ... Cells of rows that were left out because of
    missing values are empty.

    Args:
        result: an evaluation of the set, with anomalies.
        names: the names of the columns of a sample.
    """
    rows = result.anomaly_rows
    assert rows is not None

    def whole(values: Tensor) -> NDArray[np.int64]:
        """Values as integers of all rows of the file; masked for rows that were not scored."""
        found = for_each_row(data, values.double())
        lost = np.isnan(found)
        kept = np.where(lost, -1, found).astype(np.int64)
        return np.ma.masked_array(kept, lost) if lost.any() else kept

    columns: dict[str, NDArray[Any]] = {
        LOG_PROB: for_each_row(data, result.scores),
        P_VALUE: for_each_row(data, rows.p_values),
        ANOMALY: whole(rows.flagged),
    }
    for k in range(rows.columns.shape[1]):
        # position -1 and masked values stand for rows without contributions
        positions = np.ma.filled(whole(rows.columns[:, k]), -1)
        columns[f"{COLUMN}_{k + 1}"] = np.array([*names, None], object)[positions]
        columns[f"{CONTRIBUTION}_{k + 1}"] = for_each_row(data, rows.contributions[:, k])
    write_columns(path, with_ids(data, split, columns))
