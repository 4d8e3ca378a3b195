"""Log-likelihoods of many samples, computed in batches with seeded noise and averaged over noise draws."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.context import CATEGORICAL, ContextColumn
from flowtrain.flow import Context, Density, Flow, rows_at_a_time
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import AS_CONFIGURED, SolveOptions, Statistics
from flowtrain.utils.errors import DataError, NonFiniteError, SolverError
from flowtrain.utils.process import seeded
from flowtrain.utils.row_noise import rows_from, uniform_rows
from flowtrain.utils.status import status

# the approximate number of rows whose latents `score_rows` returns
LATENTS = 10_000


class Scores(NamedTuple):
    """The result of `score_rows`, on the CPU. log p is in nats and float64.

    Attributes:
        log_p: log p of all rows, (n,).
        z: latents of some rows, (k, *event_shape); empty for an ensemble.
        members: log p of each flow in `Density.flows`, (n, M); (n, 0) for the marginal of a conditional flow.
        error: the estimated error of log p without the noise of the trace, (n,), see `flowtrain.ode.row_errors`. It is
            NaN for the marginal of a conditional flow.
    """

    log_p: Tensor
    z: Tensor
    members: Tensor
    error: Tensor


def latent_rows(n: int, latents: int = LATENTS) -> slice:
    """Returns the rows, of n, whose latents `score_rows` returns."""
    return slice(None, None, math.ceil(n / max(1, latents)))


def held_out(flow: Density, data: Dataset, split: str) -> tuple[Tensor, Tensor | None]:
    """Returns a held-out set of `data`, (n, *event_shape), and its context if the flow is conditional.

    The context is the values (n, k) of context columns, or labels (n,).

    Raises:
        DataError: the flow is conditional, but the data have no context.
    """
    x = data.split(split)
    if not flow.conditional:
        return x, None
    context = data.split_context(split) if flow.context else data.split_labels(split)
    if context is None:
        what, key = ("context", "data.context") if flow.context else ("labels", "data.label")
        raise DataError(f"the flow is conditional, but the data have no {what}: name the column with {key}")
    return x, context


def context_table(flow: Density, context: Tensor, data: Dataset) -> tuple[tuple[ContextColumn, ...], Tensor]:
    """Returns the columns of a context and their values (n, k). Class labels (n,) are one categorical column."""
    if flow.context:
        return flow.context, context
    assert flow.classes is not None
    name = data.samples.label or "class"
    return (ContextColumn(name, CATEGORICAL, categories=tuple(range(flow.classes))),), context.unsqueeze(1).double()


def log_probs(
    flow: Density,
    x: Tensor,
    context: Tensor | None = None,
    batch_size: int | None = None,
    draws: int = 1,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Returns log p(x) in nats for all rows of x, (n,); see `score_rows`.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> [round(p, 4) for p in log_probs(Flow((1,), Affine(1)), torch.tensor([[0.0], [1.0]])).tolist()]
        [-0.9189, -1.4189]
    """
    return score_rows(flow, x, context, batch_size, draws, seed, latents=0, first=first).log_p


@torch.no_grad()
def score_rows(
    flow: Density,
    x: Tensor,
    context: Tensor | None = None,
    batch_size: int | None = None,
    draws: int = 1,
    seed: int = 0,
    latents: int = LATENTS,
    unsolved: int = 0,
    first: int = 0,
) -> Scores:
    """Computes log p(x) in nats for all rows of x, and latents of some rows.

    For whole numbers this is log 1/K sum_k p(x + u_k) with uniform u_k and K = `draws`. The expectation of this
    estimate increases with K towards log P(x) (Burda et al. 2016, Importance weighted autoencoders, theorem 1, for a
    uniform proposal). The members of an ensemble score the same points x + u_k. If the trace is estimated, the log of a
    sum is replaced by `bound_of_estimates`, which needs twice as many solves.

    Args:
        x: rows (n, *event_shape) in data units.
        context: for a conditional flow, the context of each row. None for the `marginal` over labels.
        batch_size: the number of rows in a batch. None means a number that depends on the size of a sample. log p
            depends on it only for adaptive solvers of torchdiffeq, because the rows of a batch share their steps.
        draws: the number of noise draws for each row of an integer-valued flow.
        seed: the seed of the noise. The noise u_k of a row and the probes of an estimated trace depend on it and on
            the number of the row.
        latents: the approximate number of evenly spaced rows whose latents are returned, for the first noise draw. A
            marginal or an ensemble has no latents.
        unsolved: the number of rows whose solve may fail. They get NaN. If more fail, the SolverError is raised.
        first: the number of the first row of x in the whole set, if x is a part of a set.
    """
    size = batch_size or rows_at_a_time(flow.event_shape)
    contexts = repeat(None) if context is None else torch.split(context, size)
    found: list[Scores] = []
    every, at = latent_rows(len(x), latents).step, 0
    failed: list[SolverError] = []
    with status("scoring", total=len(x), unit="row") as progress:
        for x_k, y in zip(dequantized_parts(flow, x, size, draws, seed, first), contexts, strict=False):
            one = _solvable(flow, x_k, y, first + at, seed, failed, unsolved)
            z = one.z[-at % every :: every] if latents else one.z[:0]
            found.append(Scores(one.log_p.cpu(), z.cpu(), one.members.cpu(), one.error.cpu()))
            at += len(x_k[0])
            progress.advance(len(x_k[0]))
    return Scores(*map(torch.cat, zip(*found, strict=True)))


def dequantized_parts(
    flow: Density, x: Tensor, size: int, draws: int = 1, seed: int = 0, first: int = 0
) -> Iterator[list[Tensor]]:
    """Yields the points that `score_rows` scores: K tensors x + u_k for each `size` rows, on the device of the flow."""
    like, parts = flow.data_like, torch.split(x, size)
    if not flow.takes_noise(x):
        for part in parts:
            yield [flow.dequantized(part.to(like.device))] * draws
        return
    noise = uniform_rows(map(len, parts), x.shape[1:], like.dtype, seed, draws, first)
    for part, u_k in zip(parts, noise, strict=True):
        yield [flow.dequantized(part.to(like.device), u.to(like.device)) for u in u_k]


def _solvable(
    flow: Density,
    x_k: list[Tensor],
    context: Tensor | None,
    first: int,
    seed: int,
    failed: list[SolverError],
    most: int,
) -> Scores:
    """Computes `_averaged`, with NaN for rows whose ODE cannot be solved.

    Solves in which the rows share steps find such rows by halving the batch.

    Args:
        first: the number of the first row.
        seed: the seed of the probes.
        failed: a list to which the errors of such rows are appended.
        most: the largest allowed number of such rows.

    Raises:
        SolverError: there are more such rows.
    """
    lost: dict[int, SolverError] = {}
    try:
        with rows_from(first), seeded(seed, x_k[0].device):
            found = _averaged(flow, x_k, context, SolveOptions(unsolved=lost) if most else AS_CONFIGURED)
    except SolverError as e:
        if not most:
            raise
        if (n := len(x_k[0])) > 1:
            middle = (n + 1) // 2
            halves = ([x[:middle] for x in x_k], [x[middle:] for x in x_k])
            contexts = (None, None) if context is None else (context[:middle], context[middle:])
            parts = [
                _solvable(flow, half, y, first + start, seed, failed, most)
                for half, y, start in zip(halves, contexts, (0, middle), strict=True)
            ]
            return Scores(*map(torch.cat, zip(*parts, strict=True)))
        with rows_from(first), seeded(seed, x_k[0].device):
            lost, found = {0: e}, _unsolved(flow, x_k, context)
    failed += lost.values()
    if len(failed) > most:
        raise failed[-1]
    return found


def _unsolved(flow: Density, x_k: list[Tensor], context: Tensor | None) -> Scores:
    """Scores one row whose ODE cannot be solved: NaN for a flow. Only the members of an ensemble that fail get NaN."""
    if isinstance(flow, Flow):
        lost = x_k[0].new_full((1, 1), torch.nan, dtype=torch.float64)
        return Scores(lost[0], torch.full_like(x_k[0], torch.nan), lost, lost[0])
    log_p, errors = [], []
    for member in flow.flows:
        try:
            one = _averaged(member, x_k, context)
        except SolverError:
            one = _unsolved(member, x_k, context)
        log_p.append(one.log_p)
        errors.append(one.error)
    members = torch.stack(log_p)
    return Scores(flow.combined(members), x_k[0][:0], members.T, flow.combined_error(members, torch.stack(errors)))


def _averaged(
    flow: Density, x_k: list[Tensor], context: Tensor | None, options: SolveOptions = AS_CONFIGURED
) -> Scores:
    """Computes log 1/K sum_k p(x_k), (B,), float64, for K tensors x_k (B, *event), and the latents of x_0."""
    draws, flows = len(x_k), flow.flows
    if flow.classes is not None and context is None:
        log_p = torch.stack([marginal(flow, x, options).double() for x in x_k])
        n = log_p.shape[1]
        return Scores(
            log_p.logsumexp(0) - math.log(draws), x_k[0][:0], log_p.new_empty(n, 0), log_p.new_full((n,), torch.nan)
        )
    points = [(member, x, context) for member in flows for x in x_k]

    def of_each(log_p: Tensor) -> Tensor:
        """(M, K, B)."""
        return log_p.view(len(flows), draws, -1)

    if estimates_trace(flow) and len(points) > 1:
        first, second = (_same_probes(points, options) for _ in range(2))
        z, errors = first.z, (first.error + second.error) / 2
        a, b = (of_each(found.log_p) - math.log(draws) for found in (first, second))
        members = torch.stack([bound_of_estimates(*pair) for pair in zip(a, b, strict=True)])
        log_w = a.new_tensor(flow.log_weights).view(-1, 1, 1)
        log_p = bound_of_estimates((a + log_w).flatten(0, 1), (b + log_w).flatten(0, 1))
        each = a
    else:
        each, z, errors = _stacked(_passed(*point, options) for point in points)
        each = of_each(each)
        members = each.logsumexp(1) - math.log(draws)
        log_p = flow.combined(members)
    # to first order, the error of the log of a mean is the mean of the errors, weighted by the terms
    of_members = (each.softmax(1) * of_each(errors)).sum(1)
    error = flow.combined_error(members, of_members)
    return Scores(log_p, z if isinstance(flow, Flow) else z[:0], members.T, error)


class _Passes(NamedTuple):
    """Results of K passes: log p and errors, (K, B), float64, and the latents of the first pass."""

    log_p: Tensor
    z: Tensor
    error: Tensor


def _stacked(found: Iterable[tuple[Tensor, Tensor, Tensor]]) -> _Passes:
    """Stacks the results (log p, latents, error) of K passes."""
    log_p, errors = list[Tensor](), list[Tensor]()
    first = None
    for one, z, error in found:
        log_p.append(one.double())
        errors.append(error.double())
        first = z if first is None else first
    assert first is not None
    return _Passes(torch.stack(log_p), first, torch.stack(errors))


def marginal(flow: Density, x: Tensor, options: SolveOptions = AS_CONFIGURED) -> Tensor:
    """Computes log p(x), (B,). For a conditional flow, this is log sum_y P(y) p(x | y).

    P(y) is the frequency of class y in training. If it is unknown, as in checkpoints of earlier versions, all classes
    are equally likely.
    """
    if flow.classes is None:
        return _passed(flow, x, None, options)[0]
    log_p = _same_probes([(flow, x, y) for y in flow.classes_with_rows], options).log_p
    counts = torch.tensor([n for n in flow.class_counts if n] or [1] * flow.classes, dtype=log_p.dtype)
    weights = (counts / counts.sum()).log().to(log_p.device)
    return (log_p + weights[:, None]).logsumexp(0)


def bound_of_estimates(a: Tensor, b: Tensor) -> Tensor:
    """Computes a lower bound, in expectation, of log sum_k p_k, (B,), from two unbiased estimates (K, B) of log p_k.

    The noise of estimates biases the log of their sum upwards. By Gibbs' inequality, log sum_k p_k is the maximum of
    sum_k q_k (log p_k - log q_k) over weights q. This expression is linear in log p. With q = softmax(a) and the
    independent estimate b for log p, its expectation is therefore at most log sum_k p_k, for any a. The result is the
    mean over both roles of a and b. For exact values a = b = log p, it is equal to log sum_k p_k.
    """
    total = torch.zeros_like(a[0])
    for weigh, value in ((a, b), (b, a)):
        log_q = weigh.log_softmax(0)
        total += (log_q.exp() * (value - log_q)).sum(0)
    return total / 2


def _passed(flow: Density, x: Tensor, context: Context, options: SolveOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log p(x), (B,), the latents, which are empty for an ensemble, and the error of log p, (B,)."""
    if isinstance(flow, Flow):
        (log_p, z, _), error = flow.density_pass_with_error(x, context, options)
        return log_p, z, error
    # the members share the options only in `_averaged`
    log_p = flow.log_prob(x, context)
    return log_p, x[:0], torch.full_like(log_p, torch.nan)


def _same_probes(points: Sequence[tuple[Density, Tensor, Context]], options: SolveOptions) -> _Passes:
    """Scores each (flow, x, context) with the same random trace probes, so that the noise of the results is similar.

    Each call uses new probes.
    """
    seed = int(torch.randint(2**62, ()))

    def found() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for point in points:
            torch.manual_seed(seed)
            yield _passed(*point, options)

    return _stacked(found())


def nfe_of_pass(flow: Density, solves: Sequence[Statistics]) -> float | None:
    """Returns the NFE of one pass through the flow, which solves each ODE block once; None if there are no solves.

    It is the number of all evaluations divided by the number of rows. For an ensemble, the NFE is the sum over its
    members.

    Args:
        solves: the statistics of all solves of one or more complete passes.
    """
    rows = sum(s.rows for s in solves)
    return len(flow.ode_blocks) * sum(s.nfe_forward * s.rows for s in solves) / rows if rows else None


def trace_rule(flow: Density) -> TraceRule | None:
    """Returns the trace rule of a flow; None if no ODE is solved. In an ensemble, an estimated trace has priority."""
    d = math.prod(flow.event_shape)
    rules = [m.trace for m in flow.ode_blocks]
    return min(rules, key=lambda rule: rule.is_exact(d, training=False), default=None)


def estimates_trace(flow: Density) -> bool:
    """Whether the flow's log-likelihood is evaluated with an estimated trace."""
    rule = trace_rule(flow)
    return rule is not None and not rule.is_exact(math.prod(flow.event_shape), training=False)


def check_samples(samples: Tensor) -> None:
    """Raises NonFiniteError if samples are NaN or infinite, before they are written to a file."""
    bad = int((~torch.isfinite(samples)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {samples.numel()} sampled values are NaN or infinite: nothing was written")


def check_finite(log_p: Tensor, split: str, start: int = 0) -> None:
    """Raises NonFiniteError if log-likelihoods (n,) are NaN or infinite.

    Args:
        split: the name of the set, for the message.
        start: the position in the set of the first log-likelihood.
    """
    bad = (~torch.isfinite(log_p)).nonzero().flatten()
    if len(bad):
        raise NonFiniteError(
            f"log p(x) is {log_p[bad[0]].item()} for row {start + int(bad[0])} of the {split} set ({len(bad)} of "
            f"{len(log_p)} rows): the flow does not cover these points, or its weights are damaged"
        )
