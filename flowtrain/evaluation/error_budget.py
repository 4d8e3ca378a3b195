"""The error budget of an NLL: errors of sampling, trace, solver and precision, measured on a subset of the rows."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.evaluation.log_likelihood import estimates_trace, log_probs
from flowtrain.evaluation.result import Bias, Budget
from flowtrain.flow import Density
from flowtrain.ode import Solver, ode_solver, record_solves
from flowtrain.utils.errors import SolverError
from flowtrain.utils.process import seeded
from flowtrain.utils.weighting import average, effective_rows, resample, stderr

# Number of draws of the trace noise from which its variance is estimated, for each row of the subset
DRAWS = 4
# A solver or rounding error below this many nats causes no warning, even if the sampling error is smaller
SMALL = 1e-3
# The tolerance, and the largest NFE, of the adaptive solve that fixed steps are compared with
ACCURATE, MAX_NFE = 1e-7, 10_000
# Half the width of a 95% confidence interval, in standard errors
COVERED = 1.96


@dataclass(frozen=True)
class Subset:
    """Rows of the set for expensive measurements.

    Attributes:
        raw: the rows as in the data set, (rows, *event_shape).
        x: the rows on the flow's device. Whole numbers have fixed noise, so that differences do not contain the noise.
        context: the context of the rows, on the flow's device, or None.
    """

    raw: Tensor
    x: Tensor
    context: Tensor | None


def subset_of(
    flow: Density,
    x: Tensor,
    context: Tensor | None,
    left_out: Tensor | None = None,
    most: int | None = None,
    weights: Tensor | None = None,
) -> Subset:
    """Draws a random subset of the rows x (n, *event_shape) with their context or None.

    The subset is random because files may be sorted. The number of rows is `rows_of_checks`, or `most` if that is
    smaller.

    Args:
        left_out: rows to exclude, (k,), because a single outlier would dominate the results.
        weights: the weights of the rows, (n,), or None. The rows are then drawn in proportion to the absolute values of
            their weights, so that means over the subset estimate weighted means. A row may occur several times.
    """
    device = flow.like.device
    with seeded(0, device):
        rows = torch.randperm(len(x))
        if left_out is not None:
            rows = rows[~torch.isin(rows, left_out)]
        size = min(rows_of_checks(flow.event_shape), len(rows) if most is None else most)
        if weights is not None and len(rows):
            drawn = resample(weights[rows].abs(), min(size, len(rows)))
            rows = rows[drawn[torch.randperm(len(drawn))]]
        rows = rows[:size]
        raw = x[rows]
        x = flow.dequantized(raw) if flow.integer_valued else raw.to(device)
        return Subset(raw, x, None if context is None else context[rows].to(device))


def rows_of_checks(event_shape: tuple[int, ...]) -> int:
    """Returns the number of rows for expensive checks."""
    return max(50, min(500, 20_000 // math.prod(event_shape)))


def budget(flow: Density, subset: Subset, log_p: Tensor, draws: int, weights: Tensor | None = None) -> Budget:
    """Measures the error budget of the NLL, which is -mean(log_p), or the weighted mean.

    For an ensemble, the solver and precision errors are measured on log p of the ensemble. To first order, the error of
    log p is the mean of the members' errors d log p_m(x), weighted by the responsibilities r_m(x) = w_m p_m(x) / p(x).
    This mean is at most the largest error of a member.

    Args:
        subset: the rows that solver, trace and precision errors are measured on.
        log_p: log p of all rows, (n,), each row with independent noise.
        draws: the number of draws of the dequantization noise that log_p averages.
        weights: the weights of all rows, (n,), or None.
    """
    n = len(log_p) if weights is None else effective_rows(weights)
    nll, over_rows = -float(average(log_p, weights)), stderr(log_p, weights)
    trace = trace_error(flow, subset, n, draws)
    exact = copy.deepcopy(flow).double()
    in_float64, embedded = with_embedded_error(exact, subset)
    solver, per_row = solver_error(exact, subset, in_float64)
    precision = None
    if flow.like.dtype != torch.float64:
        precision = mean_error(log_p_of(flow, subset) - in_float64)
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
        bias=fixed_step_bias(exact, subset, in_float64),
    )


def log_p_of(flow: Density, subset: Subset) -> Tensor:
    """Returns log p of the rows of a subset, (rows,). The members of an ensemble share the same noise."""
    return flow.combined(torch.stack([log_probs(one, subset.x, subset.context) for one in flow.flows]))


def with_embedded_error(flow: Density, subset: Subset) -> tuple[Tensor, float | None]:
    """Returns `log_p_of`, and the mean error of the log-determinants that the solver estimates; None without estimates.

    For an ensemble, the error is the sum over its members of the mean error times the mean responsibility.
    """
    log_p, errors = [], list[float | None]()
    for one in flow.flows:
        with record_solves() as solves:
            log_p.append(log_probs(one, subset.x, subset.context))
        found = [s.integral_error for s in solves if s.integral_error is not None]
        # solvers with fixed steps do not estimate errors
        estimated = bool(found) and one.solver is not None and one.solver.adaptive
        errors.append(float(torch.cat(found).sum()) / len(subset.x) if estimated else None)
    of_each = torch.stack(log_p)
    shares = flow.responsibilities(of_each).mean(1)
    known = [share * error for share, error in zip(shares.tolist(), errors, strict=True) if error is not None]
    return flow.combined(of_each), sum(known) if known else None


def trace_error(flow: Density, subset: Subset, n: float, draws: int) -> float:
    """Returns the standard error of the mean of n (effective) rows due to the noise of an estimated trace.

    The error is 0 if the trace is exact. Otherwise, it is computed from the variance of each row over DRAWS draws. With
    several dequantization draws, and for ensembles, log p is the mean of two passes with independent probes (see
    `score_rows`), which halves the variance.
    """
    if not estimates_trace(flow):
        return 0.0
    drawn = [log_probs(flow, subset.x, subset.context, seed=1 + k) for k in range(DRAWS)]
    variance = float(torch.stack(drawn).var(0).mean())
    return math.sqrt(variance / (n if draws == 1 or len(flow.flows) > 1 else 2 * n))


def mean_error(difference: Tensor) -> float:
    """Estimates the error of the mean over all rows from differences of some rows, (rows,): sqrt(mean^2 + stderr^2)."""
    if len(difference) < 2:
        return float(difference.abs().mean())
    return math.hypot(float(difference.mean()), stderr(difference))


def solver_error(flow: Density, subset: Subset, log_p: Tensor) -> tuple[float, float]:
    """Returns the changes of the NLL and of a row (RMS) when the tolerance is tightened tenfold, in nats.

    Both are NaN if the tight solve fails.

    Args:
        flow: a flow in float64, so that the change does not contain rounding errors.
        log_p: log p of the rows at the original tolerance, (rows,).
    """
    if flow.solver is None:
        return 0.0, 0.0
    try:
        change = log_p_of(flow.with_solvers(tightened), subset) - log_p
    except SolverError:
        return math.nan, math.nan
    return mean_error(change), float(change.square().mean().sqrt())


def fixed_step_bias(flow: Density, subset: Subset, log_p: Tensor) -> Bias | None:
    """Returns the bias of fixed steps against an adaptive solve at rtol ACCURATE; None for other solvers.

    It is also None if the adaptive solve fails.

    Args:
        flow: a flow in float64.
        log_p: log p of the rows by the fixed steps, (rows,).
    """
    if flow.solver is None or flow.solver.adaptive:
        return None
    try:
        accurate = flow.with_solvers(lambda solver: ode_solver("dopri5", rtol=ACCURATE, max_nfe=MAX_NFE))
        change = log_p_of(accurate, subset) - log_p
    except SolverError:
        return None
    return Bias(float(change.mean()), stderr(change), float(change.square().mean().sqrt()))


def tightened(solver: Solver) -> Solver:
    """Returns the solver with a tenth of its tolerance or of its step size."""
    tighter: dict[str, Any] = {"rtol": solver.rtol / 10, "atol": solver.atol / 10, "max_nfe": 10 * solver.max_nfe}
    if solver.step_size is not None:
        tighter["step_size"] = solver.step_size / 10
    return solver.replace(**tighter)


def solver_bias(solver: float, embedded: float | None) -> float:
    """Returns the solver error of the NLL: the larger of two estimates, or NaN if `solver` is NaN."""
    return max(solver, embedded or 0.0)


def dequantization_gap(flow: Density, subset: Subset, draws: int) -> float:
    """Returns the decrease of the NLL in nats if ten times as many noise draws are averaged inside the log."""
    few, many = (log_probs(flow, subset.raw, subset.context, draws=k).mean() for k in (draws, 10 * draws))
    return float(many - few)
