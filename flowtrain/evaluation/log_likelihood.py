"""log p(x) of many samples: in parts, with noise that is seeded, averaged over draws of it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.flow import Flow, Label, rows_at_a_time
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import Statistics
from flowtrain.utils.errors import DataError, NonFiniteError, SolverError
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status


def held_out(flow: Flow, data: Dataset, split: str) -> tuple[Tensor, Tensor | None]:
    """A held-out set of `data`, (n, *event_shape), with its labels (n,) for a conditional flow.

    Raises:
        DataError: the flow is conditional and the data have no labels.
    """
    x, label = data.split(split), data.split_labels(split)
    if flow.classes is None:
        return x, None
    if label is None:
        raise DataError("the flow is conditional, and this data has no labels: data=array takes them by data.label")
    return x, label


def log_probs(
    flow: Flow,
    x: Tensor,
    label: Tensor | None = None,
    batch_size: int | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Tensor:
    """log p(x) in nats for all rows of x, (n,); see `log_probs_and_latents`.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> [round(p, 4) for p in log_probs(Flow((1,), Affine(1)), torch.tensor([[0.0], [1.0]])).tolist()]
        [-0.9189, -1.4189]
    """
    return log_probs_and_latents(flow, x, label, batch_size, draws, seed, latents=0)[0]


@torch.no_grad()
def log_probs_and_latents(
    flow: Flow,
    x: Tensor,
    label: Tensor | None = None,
    batch_size: int | None = None,
    draws: int = 1,
    seed: int = 0,
    latents: int = 10_000,
    unsolved: int = 0,
) -> tuple[Tensor, Tensor]:
    """log p(x) in nats for all rows of x, (n,), float64, and latents of some of them, both on the CPU.

    Of whole numbers log 1/K sum_k p(x + u_k), u_k uniform, K = `draws`: in expectation it rises with K to
    log P(x) (Burda et al. 2016, Importance weighted autoencoders, theorem 1, for a uniform proposal). Where the trace
    is estimated, twice the solves and `bound_of_estimates` in its place.

    Args:
        label: (n,), for a conditional flow; None for its `marginal`.
        batch_size: rows at a time; None: chosen by the size of a sample. With noise or an adaptive solver, log p
            depends on it: noise is drawn batch by batch, and the rows of a batch share the solver's steps.
        seed: of the noise.
        latents: of about how many rows, evenly spread, those of the first draw; none of a marginal.
        unsolved: the number of rows whose solve may fail. They get NaN. If more fail, the SolverError is raised.
    """
    device = flow.like.device
    size = batch_size or rows_at_a_time(flow.event_shape)
    labels = repeat(None) if label is None else torch.split(label, size)
    log_p, z = [], []
    every, at = math.ceil(len(x) / max(1, latents)), 0
    failed: list[SolverError] = []
    with seeded(seed, device), status("scoring", total=len(x), unit="row") as progress:
        for part, y in zip(torch.split(x, size), labels, strict=False):
            x_k = [flow.dequantized(part.to(device)) for _ in range(draws)]
            averaged, first = _averaged(flow, x_k, y) if unsolved == 0 else _solvable(flow, x_k, y, failed, unsolved)
            log_p.append(averaged.cpu())
            if latents:
                z.append(first[-at % every :: every].cpu())
            at += len(part)
            progress.advance(len(part))
    return torch.cat(log_p), torch.cat(z) if z else torch.empty(0, *flow.event_shape)


def _solvable(
    flow: Flow, x_k: list[Tensor], label: Tensor | None, failed: list[SolverError], most: int
) -> tuple[Tensor, Tensor]:
    """`_averaged`, with NaN for rows whose ODE cannot be solved. Finds these rows by halving the batch.

    Args:
        failed: the errors of such rows are appended to it.
        most: the largest allowed number of such rows.
    """
    try:
        return _averaged(flow, x_k, label)
    except SolverError as e:
        n = len(x_k[0])
        if n == 1:
            failed.append(e)
            if len(failed) > most:
                raise
            return torch.full((1,), torch.nan, dtype=torch.float64), torch.full_like(x_k[0], torch.nan)
    halves = zip(*(x.tensor_split(2) for x in x_k), strict=True)
    labels = (None, None) if label is None else label.tensor_split(2)
    found = [_solvable(flow, list(half), y, failed, most) for half, y in zip(halves, labels, strict=True)]
    log_p, z = zip(*found, strict=True)
    return torch.cat([each.cpu() for each in log_p]), torch.cat(z)


def _averaged(flow: Flow, x_k: list[Tensor], label: Tensor | None) -> tuple[Tensor, Tensor]:
    """log of the mean over the x_k (B, *event) of p(x_k), (B,), float64, and the latents of the first of them."""
    if flow.classes is not None and label is None:
        log_p = torch.stack([marginal(flow, x).double() for x in x_k])
        return log_p.logsumexp(0) - math.log(len(x_k)), x_k[0][:0]
    if estimates_trace(flow) and len(x_k) > 1:
        points = [(x, label) for x in x_k]
        (a, z), (b, _) = (_same_probes(flow, points) for _ in range(2))
        return bound_of_estimates(a, b), z
    log_p, z = _stacked(flow.log_prob_and_latents(x, label) for x in x_k)
    return log_p.logsumexp(0) - math.log(len(x_k)), z


def _stacked(found: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """log p, (K, B), float64, and the latents of the first; those of the others are not kept."""
    log_p: list[Tensor] = []
    first = None
    for one, z in found:
        log_p.append(one.double())
        first = z if first is None else first
    assert first is not None
    return torch.stack(log_p), first


def marginal(flow: Flow, x: Tensor) -> Tensor:
    """log p(x), (B,). For a conditional flow, log sum_y P(y) p(x | y), with P the class frequencies in training.

    If the frequencies are unknown, as in checkpoints of earlier versions, all classes are equally likely.
    """
    if flow.classes is None:
        return flow.log_prob(x)
    log_p, _ = _same_probes(flow, [(x, y) for y in flow.seen])
    counts = torch.tensor([n for n in flow.class_counts if n] or [1] * flow.classes, dtype=log_p.dtype)
    weights = (counts / counts.sum()).log().to(log_p.device)
    return (log_p + weights[:, None]).logsumexp(0)


def bound_of_estimates(a: Tensor, b: Tensor) -> Tensor:
    """A lower bound in expectation on log 1/K sum_k p_k, (B,), from two unbiased estimates (K, B) of each log p_k.

    The log of a mean of estimates is biased upwards by their noise. But log sum_k p_k is the largest value of
    sum_k q_k (log p_k - log q_k) over weights q (Gibbs' inequality), linear in log p: with q = softmax(a) and b for
    log p it is in expectation at most that, whatever a is. The mean of both orders; of exact values it is the log.
    """
    total = torch.zeros_like(a[0])
    for weigh, value in ((a, b), (b, a)):
        log_q = weigh.log_softmax(0)
        total += (log_q.exp() * (value - log_q)).sum(0)
    return total / 2 - math.log(len(a))


def _same_probes(flow: Flow, points: Sequence[tuple[Tensor, Label]]) -> tuple[Tensor, Tensor]:
    """`_stacked` of each (x, label), with fresh trace probes that they share: their noise is much the same."""
    seed = int(torch.randint(2**62, ()))

    def found() -> Iterator[tuple[Tensor, Tensor]]:
        for x, label in points:
            torch.manual_seed(seed)
            yield flow.log_prob_and_latents(x, label)

    return _stacked(found())


def nfe_of_pass(flow: Flow, solves: Sequence[Statistics]) -> float | None:
    """NFE of taking samples through the flow once, which solves each continuous part once; None where nothing solved.

    Args:
        solves: those of any number of whole passes.
    """
    return len(flow.ode_blocks) * sum(s.nfe_forward for s in solves) / len(solves) if solves else None


def trace_rule(flow: Flow) -> TraceRule | None:
    """How a continuous flow takes its traces; None of a flow that solves no ODE."""
    return next((m.trace for m in flow.ode_blocks), None)


def estimates_trace(flow: Flow) -> bool:
    """Whether the flow's log-likelihood is evaluated with an estimated trace."""
    rule = trace_rule(flow)
    return rule is not None and not rule.is_exact(math.prod(flow.event_shape), training=False)


def check_samples(samples: Tensor) -> None:
    """Refuses samples that are NaN or infinite, before anything is written of them.

    Raises:
        NonFiniteError: saying how many values are.
    """
    bad = int((~torch.isfinite(samples)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of the values sampled are NaN or infinite: nothing was written")


def check_finite(log_p: Tensor, split: str, start: int = 0) -> None:
    """Refuses log-likelihoods (n,) that are NaN or infinite, naming the first row, of the set's rows from `start` on.

    Raises:
        NonFiniteError: there are such.
    """
    bad = (~torch.isfinite(log_p)).nonzero().flatten()
    if len(bad):
        raise NonFiniteError(
            f"log p(x) is {log_p[bad[0]].item()} for row {start + int(bad[0])} of the {split} set ({len(bad)} of "
            f"{len(log_p)} rows): the flow does not cover these points, or its weights are damaged"
        )
