"""Solves with a separate step control for each row. The solution of a row does not depend on the other rows.

The rows of a batch are stepped together, but each row has a separate time, step size and error ratio. A row that
reaches the end leaves the batch. `RungeKutta` solves a `Problem` with `rows` in this way.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowtrain.ode.solver import Problem, Solution, Solver, Statistics
from flowtrain.ode.step_control import NON_FINITE_RETRIES, first_guesses, first_steps, step_ends, step_factors
from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import Weights, weighted_sum
from flowtrain.utils.errors import ConfigError


@dataclass
class _Rows:
    """The rows that have not reached the end. All tensors have the length n of these rows.

    Attributes:
        index: the positions of the rows in the batch, (n,).
        t, h: the time and the next step size with its sign, (n,), float64.
        x: the state, (n, *event).
        v, q: the velocity and the integrand at (t, x), (n, *event) and (n, Q).
        total, error: the path integrals so far and their estimated error, (n, Q).
        state_error: the sum of the norms of the embedded errors of the state, (n,).
        ratio: the error ratio of the last accepted step, NaN before the first, (n,), float64.
        tries: the number of consecutive attempts with an error that was NaN or infinite, (n,).
    """

    index: Tensor
    t: Tensor
    h: Tensor
    x: Tensor
    v: Tensor
    q: Tensor
    total: Tensor
    error: Tensor
    state_error: Tensor
    ratio: Tensor
    tries: Tensor

    def select(self, rows: Tensor) -> "_Rows":
        """Returns some of the rows."""
        return _Rows(*(getattr(self, f.name)[rows] for f in fields(self)))

    def where(self, condition: Tensor, other: "_Rows") -> "_Rows":
        """Returns these rows if the condition (n,) holds, and else the rows of `other`."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return _Rows(*(a if a is b else torch.where(per_row(condition, a), a, b) for a, b in pairs))


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
        x, total, error, state_error: the results of the rows that have left the batch, see `_Rows`.
        active: the problem of the rows that have not left the batch.
        first_known: whether v and q of these rows are known.
        nfe: the number of evaluations for each of these rows.
        needs_graph: whether the solution needs an autograd graph.
        steps: the accepted steps, if it does.
        counts: the sums over the rows of evaluations, accepted steps and rejected steps.
    """

    def __init__(
        self, solver: Solver, tableau: Tableau, problem: Problem, statistics: Statistics, wants_graph: bool
    ) -> None:
        self.solver, self.tableau, self.problem, self.statistics = solver, tableau, problem, statistics
        self.weights = Weights(tableau, problem.x)
        self.coefficients = [self.weights.a[i, :i] for i in range(len(tableau.b))]
        c = torch.tensor([tableau.c[i] for i in range(len(tableau.b))], dtype=torch.float64)
        self.fractions = c.to(problem.x.device, non_blocking=True).unsqueeze(1)
        self.smallest = 2 * torch.finfo(problem.x.dtype).eps * max(1.0, abs(problem.t0), abs(problem.t1))
        x = problem.x.detach()
        n, n_integrals = len(x), 0 if problem.integrand is None else problem.n_integrals
        self.x, self.state_error = x.clone(), x.new_zeros(n)
        self.total, self.error = x.new_zeros(n, n_integrals), x.new_zeros(n, n_integrals)
        self.active, self.first_known, self.nfe = problem, True, 0
        self.wants_graph, self.needs_graph, self.steps = wants_graph, False, list[_Steps]()
        self.counts = torch.zeros(3, dtype=torch.float64, device=x.device)

    def solve(self) -> None:
        """Takes all steps, without a graph."""
        rows = self.begin()
        rows = self.without_failed(rows, ~torch.isfinite(rows.h))
        while len(rows.index):
            evaluations = len(self.tableau.b) - 1 + (not self.first_known)
            if self.nfe + evaluations > self.solver.max_nfe:
                self.without_failed(rows, torch.ones_like(rows.index, dtype=torch.bool), exhausted=True)
                break
            self.nfe += evaluations
            rows, reached, failed = self.attempt(rows)
            # the only synchronization with the device, unless rows leave the batch
            any_reached, any_failed = torch.stack([reached, failed]).any(1).tolist()
            if any_failed:
                reached = reached[~failed]
                rows = self.without_failed(rows, failed)
            if any_reached:
                self.write(rows.select(reached))
                rows = self.keep(rows, ~reached)
        nfe, accepted, rejected = (self.counts / len(self.x)).tolist()
        self.statistics.nfe_forward += nfe
        self.statistics.accepted += accepted
        self.statistics.rejected += rejected

    def begin(self) -> _Rows:
        """Returns all rows with their first step sizes, which are NaN or infinite for rows that cannot be solved.

        The step sizes are estimated from two slopes (Hairer, Norsett and Wanner, II.4, 'starting step size').
        """
        problem, x, order = self.problem, self.x, self.tableau.order
        span = problem.t1 - problem.t0
        t = torch.full((len(x),), problem.t0, dtype=torch.float64, device=x.device)
        with torch.set_grad_enabled(self.wants_graph):
            v = problem.velocity(t.to(x.dtype), problem.x)
        self.needs_graph = v.requires_grad
        v = checked(v.detach(), x)
        q = self.total if problem.integrand is None else problem.integrand(t.to(x.dtype), x)[1]
        scale = self.solver.atol + self.solver.rtol * x.abs()
        size, speed = row_rms(x / scale), row_rms(v / scale)
        h = first_guesses(size, speed, span)
        ahead = problem.velocity((t + h).to(x.dtype), x + per_row(h, x).to(x.dtype) * v)
        h = first_steps(h, speed, row_rms((ahead - v) / scale), span, order, 10 * self.smallest)
        self.nfe += 2
        index = torch.arange(len(x), device=x.device)
        none = torch.full_like(t, torch.nan)
        return _Rows(index, t, h, x, v, q, self.total, self.error, self.state_error, none, torch.zeros_like(index))

    def attempt(self, rows: _Rows) -> tuple[_Rows, Tensor, Tensor]:
        """Tries a step of each row. Returns the rows, and whether each row has reached the end or has failed."""
        tableau, solver, weights, x = self.tableau, self.solver, self.weights, rows.x
        end = step_ends(rows.t, self.problem.t1, rows.h)
        too_short = (rows.h.abs() < self.smallest) & (end != self.problem.t1)
        h = end - rows.t
        x1, slopes, q = self.stages(self.active, rows, h)
        hx, hq = per_row(h, x).to(x.dtype), per_row(h, rows.total).to(x.dtype)
        error, of_step = hx * weighted_sum(weights.e, slopes), (hq * weighted_sum(weights.e, q)).abs()
        total = rows.total + hq * weighted_sum(weights.b, q)
        ratio = row_rms(error / (solver.atol + solver.rtol * torch.maximum(x.abs(), x1.abs())))
        if solver.control == "all" and total.numel():
            ratio = torch.maximum(ratio, row_rms(of_step / (solver.atol + solver.rtol * total.abs())))
        accepted = ratio <= 1
        steps = accepted.sum()
        self.counts += torch.stack([torch.zeros_like(steps), steps, len(ratio) - steps])
        if self.needs_graph:
            self.steps.append(_Steps(rows.index[accepted], rows.t[accepted], h[accepted]))
        self.first_known = tableau.first_same_as_last
        moved = _Rows(
            rows.index,
            end,
            rows.h,
            x1,
            slopes[-1],
            q[-1],
            total,
            rows.error + of_step,
            rows.state_error + error.flatten(1).norm(dim=1),
            ratio,
            torch.zeros_like(rows.tries),
        )
        found = moved
        # on a GPU, this check would wait for the device
        if x.device.type != "cpu" or not bool(accepted.all()):
            stayed = replace(rows, v=slopes[0], q=q[0], tries=torch.where(torch.isfinite(ratio), 0, rows.tries + 1))
            found = moved.where(accepted, stayed)
        found.h = h * step_factors(ratio, rows.ratio, tableau.order)
        return found, accepted & (end == self.problem.t1), too_short | (found.tries > NON_FINITE_RETRIES)

    def stages(self, problem: Problem, rows: _Rows, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the state after a step (n, *event), the slopes (stages, n, *event) and the integrand (stages, n, Q).

        The integrand is 0 at stages without a weight.
        """
        tableau, x = self.tableau, rows.x
        n_stages, hx = len(tableau.b), per_row(h, x).to(x.dtype)
        times = torch.addcmul(rows.t, self.fractions, h).to(x.dtype).unbind()
        slopes, q = x.new_empty(n_stages, *x.shape), x.new_zeros(n_stages, *rows.q.shape)
        flat, x1 = slopes.flatten(1), x
        for i in range(n_stages):
            if i == 0 and self.first_known:
                slopes[0], q[0] = rows.v, rows.q
                continue
            if i:
                x1 = torch.addcmul(x, hx, (self.coefficients[i] @ flat[:i]).view_as(x))
            if problem.integrand is not None and i in tableau.used:
                slopes[i], q[i] = problem.integrand(times[i], x1)
            else:
                slopes[i] = problem.velocity(times[i], x1)
        if not tableau.first_same_as_last:
            x1 = x + hx * weighted_sum(self.weights.b, slopes)
        return x1, slopes, q

    def with_graph(self, replay: bool) -> tuple[Tensor, Tensor]:
        """Takes the accepted steps again with a graph. Returns the state at t1 and the path integrals."""
        x, total = self.problem.x, self.total.new_zeros(self.total.shape)
        for steps in self.steps:
            if not len(steps.index):
                continue
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

    def keep(self, rows: _Rows, kept: Tensor) -> _Rows:
        """Removes the other rows from the batch."""
        found = rows.select(kept)
        self.counts[0] += self.nfe * (len(rows.index) - len(found.index))
        if len(found.index):
            self.active = self.restricted(found.index)
        return found

    def write(self, rows: _Rows) -> None:
        """Stores the results of rows that have reached the end."""
        for name in ("x", "total", "error", "state_error"):
            getattr(self, name)[rows.index] = getattr(rows, name)

    def without_failed(self, rows: _Rows, failed: Tensor, exhausted: bool = False) -> _Rows:
        """Removes rows that cannot be solved. Their results are NaN.

        Args:
            failed: whether a row has failed, (n,).
            exhausted: whether the rows have used max_nfe evaluations.

        Raises:
            SolverError: `problem.unsolved` is None and a row has failed.
        """
        lost = rows.select(failed)
        if not len(lost.index):
            return rows
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
        for result in (self.x, self.total, self.error, self.state_error):
            result[lost.index] = torch.nan
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
    """Returns sqrt(mean x^2) of each row, (n,), float64."""
    return x.flatten(1).square().mean(1).sqrt().double()
