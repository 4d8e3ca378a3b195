"""Solves with a separate step control for each row. The solution of a row does not depend on the other rows.

The rows of a batch are stepped together, but each row has a separate time, step size and error ratio. A row that
reaches the end leaves the batch. `RungeKutta` solves a `Problem` with `rows` in this way.

States and slopes are tensors on the device of x. Times, step sizes and ratios are arrays on the host, because small
operations on arrays take less time than on tensors. Each step waits for the device once, for the ratios.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowtrain.ode.solver import Problem, Solution, Solver, Statistics
from flowtrain.ode.step_control import NON_FINITE_RETRIES, Array, first_guesses, first_steps, step_ends, step_factors
from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import Weights, weighted_sum
from flowtrain.utils.errors import ConfigError


@dataclass
class _Rows:
    """The n rows that have not reached the end.

    Attributes:
        index: the positions of the rows in the batch, (n,).
        t, h: the time and the next step size with its sign, (n,).
        ratio: the error ratio of the last accepted step, NaN before the first, (n,).
        tries: the number of consecutive attempts with an error that was NaN or infinite, (n,).
        x: the state, (n, *event).
        v: the velocity at (t, x), (n, *event).
        paths: the path integrals and their errors, or None if there is no integrand.
    """

    index: NDArray[np.int64]
    t: Array
    h: Array
    ratio: Array
    tries: NDArray[np.int64]
    x: Tensor
    v: Tensor
    paths: "_Paths | None"

    def select(self, rows: NDArray[np.bool_]) -> "_Rows":
        """Returns some of the rows."""
        if rows.all():
            return self
        kept = from_host(np.flatnonzero(rows), self.x)
        return _Rows(
            self.index[rows],
            self.t[rows],
            self.h[rows],
            self.ratio[rows],
            self.tries[rows],
            self.x[kept],
            self.v[kept],
            None if self.paths is None else self.paths.map(lambda y: y[kept]),
        )


@dataclass
class _Paths:
    """The path integrals of some rows, which are computed beside the state.

    Attributes:
        q: the integrand at the time and state of each row, (n, Q).
        total, error: the path integrals so far and their estimated error, (n, Q).
        state_error: the sum of the norms of the embedded errors of the state, (n,).
    """

    q: Tensor
    total: Tensor
    error: Tensor
    state_error: Tensor

    def map(self, function: Callable[..., Tensor], *others: "_Paths") -> "_Paths":
        """Applies a function to each tensor of these paths and of the others."""
        return _Paths(*(function(*(getattr(p, f.name) for p in (self, *others))) for f in fields(self)))


@dataclass(frozen=True)
class _Steps:
    """Accepted steps of some rows: their positions in the batch, times and step sizes, each (m,)."""

    index: Tensor
    t: Tensor
    h: Tensor


def solve_rows(solver: Solver, tableau: Tableau, problem: Problem, statistics: Statistics, replay: bool) -> Solution:
    """Solves an adaptive problem with a separate step control for each row.

    A row accepts a step if its ratio is at most 1. The ratio is the RMS of error / (atol + rtol max(|x0|, |x1|)) over
    the elements of the row. With solver.control=all it is at least the RMS of error / (atol + rtol |integral|) over the
    path integrals. The functions for (n,) rows in step_control.py choose the step sizes. The integrals are sums over
    the stages. The integrand also returns the velocity, so a stage needs one evaluation.

    If a gradient is needed, the steps are found without a graph. Then the accepted steps are taken again, and autograd
    records them. The value is that of a solve without a gradient. The gradient is exact for these steps.

    Args:
        replay: whether the backward pass recomputes the steps one by one, which needs less memory.

    Raises:
        SolverError: a row cannot be solved, and `problem.unsolved` is None.
        ConfigError: the velocity does not have the shape of x.
    """
    run = _RowRun(solver, tableau, problem, statistics, torch.is_grad_enabled())
    with torch.no_grad():
        run.solve()
    x, total = run.with_graph(replay) if run.needs_graph else (run.x, run.total)
    if problem.integrand is None:
        return Solution(x, None, None, statistics)
    statistics.state_error = run.state_error
    return Solution(x, total, run.error, statistics)


class _RowRun:
    """The state of one solve.

    Attributes:
        x, total, error, state_error: the results of the rows that have left the batch, see `_Rows` and `_Paths`.
        active: the problem of the rows that have not left the batch.
        first_known: whether v and q of these rows are known.
        nfe: the number of evaluations for each of these rows.
        needs_graph: whether the solution needs an autograd graph.
        steps: the accepted steps, if it does.
        evaluations, accepted, rejected: sums over the rows.
    """

    def __init__(
        self, solver: Solver, tableau: Tableau, problem: Problem, statistics: Statistics, wants_graph: bool
    ) -> None:
        self.solver, self.tableau, self.problem, self.statistics = solver, tableau, problem, statistics
        self.weights = Weights(tableau, problem.x)
        self.coefficients = [self.weights.a[i, :i] for i in range(len(tableau.b))]
        self.fractions = np.array(tableau.c).reshape(-1, 1)
        self.same, self.used = tableau.first_same_as_last, frozenset(tableau.used)
        self.smallest = 2 * torch.finfo(problem.x.dtype).eps * max(1.0, abs(problem.t0), abs(problem.t1))
        x = problem.x.detach()
        n, n_integrals = len(x), 0 if problem.integrand is None else problem.n_integrals
        self.x, self.state_error = x.clone(), x.new_zeros(n)
        self.total, self.error = x.new_zeros(n, n_integrals), x.new_zeros(n, n_integrals)
        self.active, self.first_known, self.nfe = problem, True, 0
        self.wants_graph, self.needs_graph, self.steps = wants_graph, False, list[_Steps]()
        self.evaluations = self.accepted = self.rejected = 0

    def solve(self) -> None:
        """Takes all steps, without a graph."""
        rows = self.begin()
        rows = self.without_failed(rows, ~np.isfinite(rows.h))
        while len(rows.index):
            evaluations = len(self.tableau.b) - 1 + (not self.first_known)
            if self.nfe + evaluations > self.solver.max_nfe:
                self.without_failed(rows, np.ones(len(rows.index), dtype=bool), exhausted=True)
                break
            self.nfe += evaluations
            rows, reached, failed = self.attempt(rows)
            if failed.any():
                reached = reached[~failed]
                rows = self.without_failed(rows, failed)
            if reached.any():
                self.write(rows.select(reached))
                rows = self.keep(rows, ~reached)
        n = len(self.x)
        self.statistics.nfe_forward += self.evaluations / n
        self.statistics.accepted += self.accepted / n
        self.statistics.rejected += self.rejected / n

    def begin(self) -> _Rows:
        """Returns all rows with their first step sizes, which are NaN or infinite for rows that cannot be solved.

        The step sizes are estimated from two slopes (Hairer, Norsett and Wanner, II.4, 'starting step size').
        """
        problem, x, order, n = self.problem, self.x, self.tableau.order, len(self.x)
        span = problem.t1 - problem.t0
        start = x.new_full((n,), problem.t0)
        with torch.set_grad_enabled(self.wants_graph):
            v = problem.velocity(start, problem.x)
        self.needs_graph = v.requires_grad
        v = checked(v.detach(), x)
        paths = None
        if problem.integrand is not None:
            paths = _Paths(problem.integrand(start, x)[1], self.total, self.error, self.state_error)
        scale = self.solver.atol + self.solver.rtol * x.abs()
        size, speed = on_host(torch.stack([row_rms(x / scale), row_rms(v / scale)]))
        h = first_guesses(size, speed, span)
        times, hx = from_host(np.stack([problem.t0 + h, h]), x).to(x.dtype).unbind()
        ahead = problem.velocity(times, x + per_row(hx, x) * v)
        h = first_steps(h, speed, on_host(row_rms((ahead - v) / scale)), span, order, 10 * self.smallest)
        self.nfe += 2
        none = np.zeros(n, dtype=np.int64)
        return _Rows(np.arange(n), np.full(n, problem.t0), h, np.full(n, np.nan), none, x, v, paths)

    def attempt(self, rows: _Rows) -> tuple[_Rows, NDArray[np.bool_], NDArray[np.bool_]]:
        """Tries a step of each row. Returns the rows, and whether each row has reached the end or has failed."""
        solver, x, paths = self.solver, rows.x, rows.paths
        end = step_ends(rows.t, self.problem.t1, rows.h)
        too_short = (np.abs(rows.h) < self.smallest) & (end != self.problem.t1)
        h = end - rows.t
        *times, of_rows = from_host(np.concatenate([rows.t + self.fractions * h, h[None]]), x).to(x.dtype).unbind()
        hx = per_row(of_rows, x)
        x1, slopes, q = self.stages(rows, times, hx)
        error = weighted_sum(self.weights.e, slopes).mul_(hx)
        scale = torch.maximum(x.abs(), x1.abs()).mul_(solver.rtol).add_(solver.atol)
        ratios = row_rms(error / scale)
        moved = paths
        if paths is not None and q is not None:
            hq = of_rows.unsqueeze(1)
            of_step = weighted_sum(self.weights.e, q).mul_(hq).abs_()
            total = torch.addcmul(paths.total, hq, weighted_sum(self.weights.b, q))
            state_error = paths.state_error + torch.linalg.vector_norm(error.flatten(1), dim=1)
            moved = _Paths(q[-1], total, paths.error + of_step, state_error)
            if solver.control == "all":
                ratios = torch.maximum(ratios, row_rms(of_step / (solver.atol + solver.rtol * total.abs())))
        ratio = on_host(ratios)
        accepted = ratio <= 1
        n = int(accepted.sum())
        self.accepted += n
        self.rejected += len(accepted) - n
        if self.needs_graph:
            self.keep_steps(rows.index[accepted], rows.t[accepted], h[accepted])
        self.first_known = self.same
        next_h = h * step_factors(ratio, rows.ratio, self.tableau.order)
        found = _Rows(rows.index, end, next_h, ratio, np.zeros_like(rows.tries), x1, slopes[-1], moved)
        if n < len(accepted):
            found = self.with_rejected(found, rows, accepted, slopes[0], None if q is None else q[0])
        return found, accepted & (end == self.problem.t1), too_short | (found.tries > NON_FINITE_RETRIES)

    def with_rejected(
        self, moved: _Rows, before: _Rows, accepted: NDArray[np.bool_], v: Tensor, q: Tensor | None
    ) -> _Rows:
        """Returns the rows after a step that is accepted for some of them only. The next step sizes do not change.

        Args:
            moved: the rows after the step, as if it were accepted for all rows.
            before: the rows before the step.
            accepted: whether the step of a row is accepted, (n,).
            v, q: the velocity and the integrand before the step.
        """
        mask = from_host(accepted, v)

        def where(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(per_row(mask, a), a, b)

        paths = moved.paths
        if paths is not None and before.paths is not None and q is not None:
            paths = paths.map(where, replace(before.paths, q=q))
        return _Rows(
            before.index,
            np.where(accepted, moved.t, before.t),
            moved.h,
            np.where(accepted, moved.ratio, before.ratio),
            np.where(np.isfinite(moved.ratio), 0, before.tries + 1),
            where(moved.x, before.x),
            where(moved.v, v),
            paths,
        )

    def stages(self, rows: _Rows, times: list[Tensor], hx: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the state after a step (n, *event), the slopes (stages, n, *event) and the integrand (stages, n, Q).

        The integrand is 0 at stages without a weight.

        Args:
            rows: the rows.
            times: the time of each stage, (n,).
            hx: the step sizes, (n, 1, ...) with the number of dimensions of x.
        """
        x, paths, integrand, velocity = rows.x, rows.paths, self.active.integrand, self.active.velocity
        slopes = x.new_empty(len(times), *x.shape)
        q = None if paths is None else x.new_zeros(len(times), *paths.q.shape)
        flat, x1 = slopes.flatten(1), x
        for i, t in enumerate(times):
            if i == 0 and self.first_known:
                slopes[0] = rows.v
                if paths is not None and q is not None:
                    q[0] = paths.q
                continue
            if i:
                x1 = torch.addcmul(x, hx, (self.coefficients[i] @ flat[:i]).view_as(x))
            if integrand is not None and q is not None and i in self.used:
                slopes[i], q[i] = integrand(t, x1)
            else:
                slopes[i] = velocity(t, x1)
        if not self.same:
            x1 = torch.addcmul(x, hx, weighted_sum(self.weights.b, slopes))
        return x1, slopes, q

    def keep_steps(self, index: NDArray[np.int64], t: Array, h: Array) -> None:
        """Keeps accepted steps for `with_graph`."""
        if len(index):
            self.steps.append(_Steps(*(from_host(a, self.problem.x) for a in (index, t, h))))

    def with_graph(self, replay: bool) -> tuple[Tensor, Tensor]:
        """Takes the accepted steps again with a graph. Returns the state at t1 and the path integrals."""
        x, total = self.problem.x, self.total.new_zeros(self.total.shape)
        for steps in self.steps:
            problem = self.restricted(steps.index)
            h = steps.h.to(x.dtype)

            def step(
                x: Tensor, problem: Problem = problem, t: Tensor = steps.t, h: Tensor = h
            ) -> tuple[Tensor, Tensor]:
                return self.differentiable_step(problem, t, h, x)

            part = x[steps.index]
            x1, integral = checkpoint(step, part, use_reentrant=False) if replay else step(part)
            x, total = x.index_copy(0, steps.index, x1), total.index_add(0, steps.index, integral)
        # rows that were not solved are NaN
        lost = self.x.flatten(1).isnan().any(1)
        return torch.where(per_row(lost, x), torch.nan, x), torch.where(per_row(lost, total), torch.nan, total)

    def differentiable_step(self, problem: Problem, t: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state after a step and the path integrals over the step, by operations that autograd records."""
        tableau, weights, hx = self.tableau, self.weights, per_row(h, x)
        slopes, q = list[Tensor](), list[Tensor]()
        for i in range(len(tableau.b)):
            y = x + hx * weighted_sum(weights.a[i, :i], torch.stack(slopes)) if i else x
            times = (t + tableau.c[i] * h).to(x.dtype)
            if problem.integrand is not None and tableau.b[i]:
                v, q_i = problem.integrand(times, y)
                q.append(tableau.b[i] * h.unsqueeze(1) * q_i)
            elif tableau.b[i] or i < len(tableau.b) - 1:
                v = problem.velocity(times, y)
            slopes.append(v)
        x1 = x + hx * weighted_sum(weights.b, torch.stack(slopes))
        return x1, sum(q, self.total.new_zeros(len(x), self.total.shape[1]))

    def restricted(self, index: Tensor) -> Problem:
        """Returns the problem of the rows with these positions in the batch."""
        assert self.problem.rows is not None
        return self.problem if len(index) == len(self.x) else self.problem.rows(index)

    def keep(self, rows: _Rows, kept: NDArray[np.bool_]) -> _Rows:
        """Removes the other rows from the batch."""
        found = rows.select(kept)
        self.evaluations += self.nfe * (len(rows.index) - len(found.index))
        if len(found.index):
            self.active = self.restricted(from_host(found.index, self.x))
        return found

    def write(self, rows: _Rows) -> None:
        """Stores the results of rows that have reached the end."""
        index = from_host(rows.index, self.x)
        self.x[index] = rows.x
        if rows.paths is not None:
            for name in ("total", "error", "state_error"):
                getattr(self, name)[index] = getattr(rows.paths, name)

    def without_failed(self, rows: _Rows, failed: NDArray[np.bool_], exhausted: bool = False) -> _Rows:
        """Removes rows that cannot be solved. Their results are NaN.

        Args:
            failed: whether a row has failed, (n,).
            exhausted: whether the rows have used max_nfe evaluations.

        Raises:
            SolverError: `problem.unsolved` is None and a row has failed.
        """
        if not failed.any():
            return rows
        lost = rows.select(failed)
        for k, t, h, tries in zip(*(v.tolist() for v in (lost.index, lost.t, lost.h, lost.tries)), strict=True):
            if exhausted:
                error = self.solver.exhausted(t, h)
            elif tries or not math.isfinite(h):
                error = self.solver.non_finite(t, h)
            else:
                error = self.solver.underflow(t, h)
            if self.problem.unsolved is None:
                raise error
            self.problem.unsolved.setdefault(k, error)
        index = from_host(lost.index, self.x)
        for result in (self.x, self.total, self.error, self.state_error):
            result[index] = torch.nan
        return self.keep(rows, ~failed)


def checked(v: Tensor, x: Tensor) -> Tensor:
    """Returns the velocity v at x.

    Raises:
        ConfigError: the shapes of v and x differ.
    """
    if v.shape != x.shape:
        raise ConfigError(
            f"the velocity field returned the shape {tuple(v.shape)} for x of shape {tuple(x.shape)} and t of shape "
            f"({len(x)},): it must return the shape of x"
        )
    return v


def per_row(v: Tensor, like: Tensor) -> Tensor:
    """Reshapes v (n,) so that it broadcasts against `like` (n, ...)."""
    return v.view(-1, *(1,) * (like.dim() - 1))


def row_rms(x: Tensor) -> Tensor:
    """Returns sqrt(mean x^2) of each row, (n,)."""
    flat = x.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms / math.sqrt(flat.shape[1])


def on_host(x: Tensor) -> Array:
    """Copies x to the host, as float64."""
    found: Array = x.double().cpu().numpy()
    return found


def from_host(a: NDArray[Any], like: Tensor) -> Tensor:
    """Copies an array to the device of `like`, without waiting for the device."""
    return torch.from_numpy(a).to(like.device, non_blocking=True)
