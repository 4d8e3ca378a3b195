"""Bayesian logistic regression on a table."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flowtrain.data.base import Checksum, record_of
from flowtrain.data.tables.columns import Columns, as_option, listed, pick
from flowtrain.data.tables.csv_reader import Chosen
from flowtrain.data.tables.missing import missing_of
from flowtrain.data.tables.table_reader import Table, read_table
from flowtrain.data.targets.base import Target
from flowtrain.utils.arguments import number, path_of
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError
from flowtrain.utils.formatting import counted

INTERCEPT = "intercept"
# Newton's method for the mode: the largest number of steps, and the Newton decrement below which it stops
STEPS, DECREMENT = 100, 1e-20


class LogisticRegression(Target):
    """logistic_regression: the posterior of the weights of a logistic regression on a table.

    log p~(w, b) = sum_i log sigmoid(y_i (w . x_i + b)) - (|w|^2 + b^2) / (2 s^2) - (k + 1)/2 log(2 pi s^2)

    x_i are the k features of row i, standardised to mean 0 and standard deviation 1. y_i is 1 for the second of the two
    labels in sorted order, and -1 for the first. s is `prior_scale`. The columns of the target are the weights w, which
    have the names of the features, and the intercept b. Z is the evidence (marginal likelihood) of the model.

    Args:
        path: the file, in a format of `data.path` (data=array).
        label: the name or the position of the column of labels, which has two distinct values, text or numbers.
        columns: names, positions or slices of the features. None means all columns except the label.
        prior_scale: standard deviation of the Gaussian prior of each weight and of the intercept.
        missing: refuse | drop: rows with a missing value raise an error or are left out, as for `data.missing`.
        na: further values that count as missing, as for `data.na`.
        loc, scale: see `Target`. None means the mode of the posterior, and the standard deviations of the Laplace
            approximation, which is the Gaussian with the mode of the posterior and its curvature at the mode.

    Raises:
        ConfigError: the path or the label is missing, or a column is not in the file.
        DataError: the file cannot be read, the label does not have two values, a value is missing, or a feature is
            constant or contains text.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        label: str | int | None = None,
        columns: Columns | None = None,
        prior_scale: float = 1.0,
        missing: str = "refuse",
        na: Sequence[str | float] | str | float | None = None,
        loc: float | Sequence[float] | None = None,
        scale: float | Sequence[float] | None = None,
    ) -> None:
        if path is None or label is None:
            absent = "path" if path is None else "label"
            raise ConfigError(
                f"target.{absent} is missing: give the table with target.path=FILE.csv and its column of two classes "
                "with target.label=NAME"
            )
        prior_scale = number("target.prior_scale", prior_scale)
        features, signs, names = read_classes(path_of("target.path", path), label, columns, missing, na)
        # the margins y_i (w . x_i + b) are rows @ (w, b)
        rows = torch.from_numpy(signs[:, None] * np.column_stack([features, np.ones(len(features))]))
        mode, covariance = laplace(rows, prior_scale)
        super().__init__(
            rows.shape[1],
            columns=(*names, INTERCEPT),
            loc=mode.tolist() if loc is None else loc,
            scale=covariance.diagonal().sqrt().tolist() if scale is None else scale,
        )
        self.prior_scale = prior_scale
        # rounded, because the last digits can depend on the version of NumPy
        self.record = record_of((len(rows), str(Checksum().add(np.round(features, 6) + 0.0, signs))), [])
        self.register_buffer("rows", rows, persistent=False)

    def log_density(self, x: Tensor) -> Tensor:
        margins = x @ self.get_buffer("rows").to(x).T
        scaled = x / self.prior_scale
        constant = self.dim * float(np.log(2 * np.pi * self.prior_scale**2))
        return functional.logsigmoid(margins).sum(1) - 0.5 * (scaled.square().sum(1) + constant)


def read_classes(
    path: Path,
    label: str | int,
    columns: Columns | None = None,
    missing: str = "refuse",
    na: Sequence[str | float] | str | float | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """Reads a table of features with a column of two classes.

    Returns:
        The standardised features (n, k), the classes as -1 and 1 (n,), and the names of the features.

    Raises:
        ConfigError, DataError: see `LogisticRegression`.
    """

    def choose(names: Sequence[str], left_out: Sequence[int]) -> Chosen:
        found = pick([label], names, path, "target.label")
        if len(found) > 1:
            raise ConfigError(f"target.label={label} names {counted(len(found), 'column')} of {path}: name one")
        kept = pick(columns, names, path, "target.columns", left_out)
        if columns is not None and found[0] in kept:
            raise ConfigError(f"target.columns: {names[found[0]]!r} is the label, and cannot also be a feature")
        kept = [i for i in kept if i != found[0]]
        if not kept:
            raise DataError(f"{path} has no column besides the label {names[found[0]]!r}; a regression needs features")
        # text in a feature is refused below, because the reader would suggest categories
        return Chosen([*kept, *found], [*kept, *found])

    with _keys_of_target():
        table = read_table(path, columns=choose, missing=missing_of(missing, na))
    signs, names = _signs(table), table.columns[:-1]
    if INTERCEPT in names:
        raise DataError(f"{path}: rename the column {INTERCEPT!r}, which is the name of the constant of the regression")
    text = [i for i in range(len(names)) if table.labels.get(table.indices[i])]
    if text:
        numeric = [table.indices[i] for i in range(len(names)) if i not in text]
        option = as_option(numeric).replace("data.", "target.") if numeric else "target.columns"
        raise DataError(
            f"{path}: {listed([names[i] for i in text])} contains text, but a regression needs numbers. Replace the "
            f"text by numbers, or choose other features with {option}"
        )
    values = table.values[:, :-1]
    constant = [name for name, column in zip(names, values.T, strict=True) if column.min() == column.max()]
    if constant:
        raise DataError(f"{path}: {listed(constant)} has a single value, so its weight has no effect; leave it out")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = (values - values.mean(0)) / values.std(0)
    if not np.isfinite(found).all():
        wide = names[int(np.argmin(np.isfinite(found).all(0)))]
        raise DataError(
            f"{path}: the numbers of {wide!r} are too large or too small to be standardised; convert it to other units"
        )
    return found, signs, names


@contextmanager
def _keys_of_target() -> Iterator[None]:
    """Replaces data.KEY by target.KEY in error messages of the table reader."""
    try:
        yield
    except FlowtrainError as e:
        raise type(e)(re.sub(r"\bdata\.(?=(columns|missing|na)\b)", "target.", str(e))) from e


def _signs(table: Table) -> NDArray[np.float64]:
    """Returns the classes in the last column of a table, (n,): -1 for the first label in sorted order, else 1."""
    codes = table.values[:, -1]
    texts = table.labels.get(table.indices[-1])
    found = np.unique(codes)
    shown = sorted(texts[int(code)] for code in found) if texts else [f"{v:g}" for v in found]
    if len(found) != 2:
        raise DataError(
            f"{table.path}: the label {table.columns[-1]!r} has {counted(len(found), 'distinct value')} "
            f"({listed(shown, 5)}); a logistic regression needs two"
        )
    first = texts.index(shown[0]) if texts else found[0]
    return np.where(codes == first, -1.0, 1.0)


def laplace(rows: Tensor, prior_scale: float) -> tuple[Tensor, Tensor]:
    """Returns the mode (d,) of the posterior, and the inverse of its negative Hessian at the mode, (d, d).

    The log posterior is strictly concave. Newton's method with a line search converges to the only maximum.

    Args:
        rows: y_i (x_i, 1), (n, d), float64.
        prior_scale: the standard deviation of the prior.
    """
    precision = torch.eye(rows.shape[1], dtype=rows.dtype) / prior_scale**2

    def loss(w: Tensor) -> Tensor:
        return 0.5 * w @ precision @ w - functional.logsigmoid(rows @ w).sum()

    w = rows.new_zeros(rows.shape[1])
    for _ in range(STEPS):
        wrong = torch.sigmoid(-rows @ w)
        gradient = precision @ w - rows.T @ wrong
        hessian = precision + rows.T @ ((wrong * (1 - wrong))[:, None] * rows)
        step = torch.linalg.solve(hessian, gradient)
        decrement = gradient @ step
        if decrement < DECREMENT:
            break
        # a full step can overshoot if the classes are nearly separable
        size = 1.0
        while size > 1e-10 and loss(w - size * step) > loss(w) - 0.25 * size * decrement:
            size /= 2
        w = w - size * step
    return w, torch.linalg.inv(hessian)
