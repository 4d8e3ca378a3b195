"""The error budget of an NLL: sampling, trace, solver and precision, measured on a subset of the rows."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.evaluation.log_likelihood import estimates_trace, log_probs
from flowtrain.evaluation.result import Budget
from flowtrain.flow import Density
from flowtrain.ode import Solver, record_solves
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
    flow: Density, x: Tensor, label: Tensor | None, left_out: Tensor | None = None, most: int | None = None
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


def budget(flow: Density, subset: Subset, log_p: Tensor, draws: int) -> Budget:
    """The budget of -mean log_p, log_p (n,) of the whole set, each row with noise of its own.

    Solver and precision errors of an ensemble are those of its own log p. To first order d log p(x) is the mean of its
    members' d log p_m(x), weighted by their responsibilities r_m(x) = w_m p_m(x) / p(x), and so at most the largest.

    Args:
        draws: of the dequantization noise, that log_p averages.
    """
    n, nll = len(log_p), -float(log_p.mean())
    over_rows = stderr(log_p)
    trace = trace_error(flow, subset, n, draws)
    exact = copy.deepcopy(flow).double()
    in_float64, embedded = with_embedded_error(exact, subset)
    solver, per_row = solver_error(exact, subset, in_float64)
    precision = None
    if flow.like.dtype != torch.float64:
        precision = of_mean(log_p_of(flow, subset) - in_float64)
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


def log_p_of(flow: Density, subset: Subset) -> Tensor:
    """log p of the rows of a subset, (rows,). The members of an ensemble have the same noise."""
    return flow.combined(torch.stack([log_probs(one, subset.x, subset.label) for one in flow.flows]))


def with_embedded_error(flow: Density, subset: Subset) -> tuple[Tensor, float | None]:
    """`log_p_of`, and the mean error of the log-determinants by the solver's own estimate; None if it gives none.

    Of an ensemble, the sum over its members of the mean error times the mean responsibility.
    """
    log_p, errors = [], list[float | None]()
    for one in flow.flows:
        with record_solves() as solves:
            log_p.append(log_probs(one, subset.x, subset.label))
        found = [s.integral_error for s in solves if s.integral_error is not None]
        # of fixed steps there is none
        estimated = bool(found) and one.solver is not None and one.solver.adaptive
        errors.append(float(torch.cat(found).sum()) / len(subset.x) if estimated else None)
    of_each = torch.stack(log_p)
    shares = flow.responsibilities(of_each).mean(1)
    known = [share * error for share, error in zip(shares.tolist(), errors, strict=True) if error is not None]
    return flow.combined(of_each), sum(known) if known else None


def stderr(values: Tensor) -> float:
    """Standard error of the mean of values (n,); NaN of one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def trace_error(flow: Density, subset: Subset, n: int, draws: int) -> float:
    """The standard error that the noise of an estimated trace leaves in the mean of n rows; 0 of an exact one.

    From the variance over DRAWS draws of each row. Several dequantization draws share their probes, and are the mean of
    two such passes. So are those of an ensemble, also of one draw.
    """
    if not estimates_trace(flow):
        return 0.0
    drawn = [log_probs(flow, subset.x, subset.label, seed=1 + k) for k in range(DRAWS)]
    variance = float(torch.stack(drawn).var(0).mean())
    return math.sqrt(variance / (n if draws == 1 or len(flow.flows) > 1 else 2 * n))


def of_mean(difference: Tensor) -> float:
    """How large the mean of all rows may be, by that of some, (rows,): root of its square and its squared error."""
    if len(difference) < 2:
        return float(difference.abs().mean())
    return math.hypot(float(difference.mean()), stderr(difference))


def solver_error(flow: Density, subset: Subset, log_p: Tensor) -> tuple[float, float]:
    """The change of the NLL, and in RMS that of a row, when the tolerance is tightened tenfold, in nats.

    Of a flow in float64, so that rounding stays out of it; NaN of a field that cannot be solved so tightly.

    Args:
        log_p: at the tolerance as it is, (rows,).
    """
    if flow.solver is None:
        return 0.0, 0.0
    try:
        change = log_p_of(flow.with_solvers(tightened), subset) - log_p
    except SolverError:
        return math.nan, math.nan
    return of_mean(change), float(change.square().mean().sqrt())


def tightened(solver: Solver) -> Solver:
    """The solver with a tenth of its tolerance, or of its step size."""
    tighter: dict[str, Any] = {"rtol": solver.rtol / 10, "atol": solver.atol / 10, "max_nfe": 10 * solver.max_nfe}
    if solver.step_size is not None:
        tighter["step_size"] = solver.step_size / 10
    return solver.replace(**tighter)


def solver_bias(solver: float, embedded: float | None) -> float:
    """By what the solver may have the NLL off, the larger of two looks; NaN where the first is not to be had."""
    return max(solver, embedded or 0.0)


def dequantization_gap(flow: Density, subset: Subset, draws: int) -> float:
    """NLL with `draws` draws of the noise inside the log less that with ten times as many, in nats."""
    few, many = (log_probs(flow, subset.raw, subset.label, draws=k).mean() for k in (draws, 10 * draws))
    return float(many - few)
