"""The error budget of an NLL: sampling, trace, solver and precision, measured on a subset of the rows."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.evaluation.log_likelihood import estimates_trace, log_probs
from flowtrain.evaluation.result import Budget
from flowtrain.flow import Flow
from flowtrain.ode import record_solves
from flowtrain.utils.errors import SolverError
from flowtrain.utils.process import seeded

# draws of the trace's noise that its variance is taken from, on each row of the subset
DRAWS = 4
# a solver or rounding error below this many nats is not worth a warning, however small the sampling error
SMALL = 1e-3
COVERED = 1.96


@dataclass(frozen=True)
class Subset:
    """Rows of the set that the costly measurements take.

    Attributes:
        raw: as the data set has them, (rows, *event_shape).
        x: on the flow's device; whole numbers with noise added once, so that it stays out of the differences.
        label: of a conditional flow, (rows,), on that device too, else None.
    """

    raw: Tensor
    x: Tensor
    label: Tensor | None


def subset_of(
    flow: Flow, x: Tensor, label: Tensor | None, left_out: Tensor | None = None, most: int | None = None
) -> Subset:
    """Rows of x (n, *event_shape) and of labels (n,) or None, drawn at random: files may be sorted.

    The number of rows is that of `rows_of_checks`, but at most `most`.

    Args:
        left_out: rows to exclude, (k,), because a single one would dominate the results.
    """
    device = flow.like.device
    with seeded(0, device):
        rows = torch.randperm(len(x))
        if left_out is not None:
            rows = rows[~torch.isin(rows, left_out)]
        rows = rows[: rows_of_checks(flow.event_shape)][:most]
        raw = x[rows]
        x = flow.dequantized(raw) if flow.integer_valued else raw.to(device)
        return Subset(raw, x, None if label is None else label[rows].to(device))


def rows_of_checks(event_shape: tuple[int, ...]) -> int:
    """The number of samples for the costly checks."""
    return max(50, min(500, 20_000 // math.prod(event_shape)))


def budget(flow: Flow, subset: Subset, log_p: Tensor, draws: int) -> Budget:
    """The budget of -mean log_p, log_p (n,) of the whole set, each row with noise of its own.

    Args:
        draws: of the dequantization noise, that log_p averages.
    """
    n, nll = len(log_p), -float(log_p.mean())
    over_rows = stderr(log_p)
    trace = trace_error(flow, subset, n, draws)
    exact = copy.deepcopy(flow).double()
    with record_solves() as solves:
        in_float64 = log_probs(exact, subset.x, subset.label)
    solver, per_row = solver_error(exact, subset, in_float64)
    errors = [s.integral_error for s in solves if s.integral_error is not None]
    # of fixed steps there is none
    estimated = bool(errors) and flow.solver is not None and flow.solver.adaptive
    embedded = float(torch.cat(errors).sum()) / len(subset.x) if estimated else None
    precision = None
    if flow.like.dtype != torch.float64:
        precision = of_mean(log_probs(flow, subset.x, subset.label) - in_float64)
    biases = (solver_bias(solver, embedded), precision)
    known = [part for part in biases if part is not None and math.isfinite(part)]
    total = math.sqrt(over_rows**2 + sum(part**2 for part in known))
    return Budget(
        sampling=math.sqrt(max(0.0, over_rows**2 - trace**2)) if math.isfinite(over_rows) else over_rows,
        trace=trace,
        solver=solver,
        solver_per_row=per_row,
        embedded=embedded,
        precision=precision,
        dequantization_gap=dequantization_gap(flow, subset, draws) if flow.integer_valued else None,
        rows=len(subset.x),
        total=total,
        interval=(nll - COVERED * total, nll + COVERED * total),
    )


def stderr(values: Tensor) -> float:
    """Standard error of the mean of values (n,); NaN of one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def trace_error(flow: Flow, subset: Subset, n: int, draws: int) -> float:
    """The standard error that the noise of an estimated trace leaves in the mean of n rows; 0 of an exact one.

    From the variance over DRAWS draws of each row. Several dequantization draws share their probes, and are the mean of
    two such passes.
    """
    if not estimates_trace(flow):
        return 0.0
    drawn = [log_probs(flow, subset.x, subset.label, seed=1 + k) for k in range(DRAWS)]
    variance = float(torch.stack(drawn).var(0).mean())
    return math.sqrt(variance / (n if draws == 1 else 2 * n))


def of_mean(difference: Tensor) -> float:
    """How large the mean of all rows may be, by that of some, (rows,): root of its square and its squared error."""
    if len(difference) < 2:
        return float(difference.abs().mean())
    return math.hypot(float(difference.mean()), stderr(difference))


def solver_error(flow: Flow, subset: Subset, log_p: Tensor) -> tuple[float, float]:
    """The change of the NLL, and in RMS that of a row, when the tolerance is tightened tenfold, in nats.

    Of a flow in float64, so that rounding stays out of it; NaN of a field that cannot be solved so tightly.

    Args:
        log_p: at the tolerance as it is, (rows,).
    """
    solver = flow.solver
    if solver is None:
        return 0.0, 0.0
    tighter: dict[str, Any] = {"rtol": solver.rtol / 10, "atol": solver.atol / 10, "max_nfe": 10 * solver.max_nfe}
    if solver.step_size is not None:
        tighter["step_size"] = solver.step_size / 10
    try:
        tight = flow.with_solver(solver.replace(**tighter))
        change = log_probs(tight, subset.x, subset.label) - log_p
    except SolverError:
        return math.nan, math.nan
    return of_mean(change), float(change.square().mean().sqrt())


def solver_bias(solver: float, embedded: float | None) -> float:
    """By what the solver may have the NLL off, the larger of two looks; NaN where the first is not to be had."""
    return max(solver, embedded or 0.0)


def dequantization_gap(flow: Flow, subset: Subset, draws: int) -> float:
    """NLL with `draws` draws of the noise inside the log less that with ten times as many, in nats."""
    few, many = (log_probs(flow, subset.raw, subset.label, draws=k).mean() for k in (draws, 10 * draws))
    return float(many - few)
