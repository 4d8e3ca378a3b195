"""Samples of a flow with log importance weights for a target, and the estimate of log Z from these weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bases import StandardNormal
from flowtrain.data.targets.base import Target
from flowtrain.flow import Density, Flow, rows_at_a_time
from flowtrain.utils.errors import NonFiniteError, SolverError
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status


class WeightedSamples(NamedTuple):
    """Samples of a flow with log densities of flow and target in nats and float64, on the CPU.

    Attributes:
        x: the samples, (n, d), in the dtype of the flow.
        log_q: log q(x) of the flow, (n,).
        log_p: log p~(x) of the target, (n,).
    """

    x: Tensor
    log_q: Tensor
    log_p: Tensor

    @property
    def log_w(self) -> Tensor:
        """The log weights log p~(x) - log q(x), (n,), in nats. Their mean is the ELBO."""
        return self.log_p - self.log_q


@torch.no_grad()
def weighted_samples(
    flow: Density, target: Target, n: int, seed: int, rows: slice = slice(None), batch_size: int | None = None
) -> WeightedSamples:
    """Draws n samples x ~ q of a flow, and computes log q(x) and log p~(x).

    The base points depend only on the seed, the device and n. Two flows with the same seed have the same base points.

    Args:
        flow: a flow or an ensemble. For a flow, one pass from the base to the data computes x and log q.
        target: the target, on the device of the flow.
        seed: the seed of the base points.
        rows: which of the n samples are computed.
        batch_size: the number of samples that are computed at once. None means a number that depends on d.
    """
    with seeded(seed, flow.like.device):
        points = flow.base.rsample(n, like=flow.like)[rows] if isinstance(flow, Flow) else flow.sample(n)[rows]
    return weights_of(flow, target, points, batch_size)


@torch.no_grad()
def weights_of(flow: Density, target: Target, points: Tensor, batch_size: int | None = None) -> WeightedSamples:
    """Returns samples with log q and log p~.

    Args:
        points: base points (n, d) of a flow, which are mapped to samples; for an ensemble, the samples.
    """
    size = batch_size or rows_at_a_time(flow.event_shape)
    found = []
    with status("scoring", total=len(points), unit="sample") as progress:
        for part in torch.split(points, size):
            x, log_q = flow.sample_pass(part)[:2] if isinstance(flow, Flow) else (part, flow.log_prob(part))
            found.append((x.cpu(), log_q.double().cpu(), target(x).double().cpu()))
            progress.advance(len(part))
    if not found:
        return WeightedSamples(points.cpu(), *(torch.zeros(0, dtype=torch.float64) for _ in range(2)))
    return WeightedSamples(*map(torch.cat, zip(*found, strict=True)))


# the number of samples in the tails, as a share of the number of samples of the flow
WIDE = 0.25
# the bound of a Student t element, and P(|t| < WIDEST) of the Student t distribution with 2 degrees of freedom
WIDEST = 10.0
WIDE_MASS = WIDEST / math.sqrt(2 + WIDEST**2)


class BalancedWeights:
    """An estimate of log Z from samples of a flow and samples in its tails; see `balanced_weights`.

    The estimate of Z is the mean of w_i - b c_i over all samples, with the weights w, a control variate c and its
    regression coefficient b.

    Args:
        log_w: log weights (n + m,), in nats: first of the n samples of the flow, then of m samples in its tails. A
            weight that is NaN or infinite counts as 0.
        n: the number of samples of the flow.
        control: c, (n + m,), with expectation 0 over all samples. None means 0.

    Attributes:
        terms: (w_i - b c_i) / Z with the estimate of Z, (n + m,). Their mean is 1.
        log_z: the estimate of log Z in nats.
        stderr: the standard error of `log_z` in nats, from the variances of both sets of samples.
    """

    def __init__(self, log_w: Tensor, n: int, control: Tensor | None = None) -> None:
        log_w = torch.where(log_w < math.inf, log_w, -math.inf)
        largest = log_w.max()
        terms = (log_w - largest).exp()
        if control is not None:
            centered = control - control.mean()
            variance = float(centered.square().mean())
            slope = float((terms * centered).mean()) / variance if variance else 0.0
            controlled = terms - slope * control
            # a few dominant weights can make the estimate of Z negative
            terms = controlled if float(controlled.mean()) > 0 else terms
        mean = float(terms.mean())
        self.terms = terms / mean
        self.log_z = float(largest) + math.log(mean)
        parts = [part for part in (self.terms[:n], self.terms[n:]) if len(part) > 1]
        self.stderr = math.sqrt(sum(len(part) * float(part.var()) for part in parts)) / len(terms)

    def __len__(self) -> int:
        return len(self.terms)


@torch.no_grad()
def balanced_weights(
    flow: Flow, target: Target, drawn: WeightedSamples, seed: int, batch_size: int | None = None
) -> BalancedWeights:
    """Draws samples in the tails of a flow, and estimates log Z from them together with samples of the flow.

    A sample in the tails has a base point z in which one random element z_j has a Student t distribution with 2 degrees
    of freedom, truncated to [-10, 10], instead of a normal distribution. The density of these samples is q rho with

        rho(z) = 1/d sum_j t(z_j) / N(z_j).

    n samples of q and m samples of q rho are samples of the mixture q (n + m rho) / (n + m). They have the weights
    w = (p~ / q) (n + m) / (n + m rho), the balance heuristic of multiple importance sampling (Veach and Guibas 1995,
    section 3.3). A weight is at most p~ / (q rho) times (n + m) / m. q rho has heavier tails than q, so heavy tails of
    p~ increase the variance less. The control variate is q divided by the mixture, minus 1, which is
    (n + m) / (n + m rho) - 1. With the control variate, the error is about the error of the better set of samples (Owen
    and Zhou 2000, Safe and effective importance sampling, section 3). The error is 0 if q = p.

    m is n / 4. It is 0 if the base of the flow is not a standard normal distribution, or if an ODE solve in the tails
    fails.

    Args:
        drawn: samples of the flow, the result of `weighted_samples`.
        seed: the seed of `drawn`.
    """
    n, d = len(drawn.x), flow.event_shape[0]
    m = round(WIDE * n) if type(flow.base) is StandardNormal else 0
    if m == 0:
        return BalancedWeights(drawn.log_w, n)
    device = flow.like.device
    with seeded(seed, device):
        # the base points of `drawn` are drawn again, because rho depends on them
        z = flow.base.rsample(n, like=flow.like)
        wide = flow.base.rsample(m, like=flow.like)
        # inverse of the cumulative distribution function 1/2 + s / 2 with s = t / sqrt(2 + t^2)
        s = WIDE_MASS * (2 * torch.rand(m, dtype=torch.float64, device=device) - 1)
        chosen = torch.randint(d, (m, 1), device=device)
    t = (s * (2 / (1 - s.square())).sqrt()).to(wide.dtype)
    wide = wide.scatter(1, chosen, t.unsqueeze(1))
    try:
        beyond = weights_of(flow, target, wide, batch_size)
    except SolverError:
        return BalancedWeights(drawn.log_w, n)
    log_rho = torch.cat([_log_wideness(part).cpu() for part in (z, wide)])
    both = torch.cat([drawn.log_w, beyond.log_w])
    shared = torch.logaddexp(torch.full_like(log_rho, math.log(n)), math.log(m) + log_rho) - math.log(n + m)
    return BalancedWeights(both - shared, n, (-shared).expm1())


def _log_wideness(z: Tensor) -> Tensor:
    """Returns log rho(z), (n,), float64, for base points z (n, d); see `balanced_weights`."""
    z = z.double()
    log_t = torch.where(z.abs() <= WIDEST, -1.5 * (2 + z.square()).log() - math.log(WIDE_MASS), -math.inf)
    log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
    return (log_t - log_normal).logsumexp(1) - math.log(z.shape[1])


def check_log_weights(drawn: WeightedSamples, start: int = 0) -> None:
    """Checks that all log weights are finite.

    Args:
        start: the index of the first sample, for the message.

    Raises:
        NonFiniteError: a log weight is NaN or infinite.
    """
    bad = (~drawn.log_w.isfinite()).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        at = ", ".join(f"{v:.4g}" for v in drawn.x[i].flatten()[:5].tolist())
        raise NonFiniteError(
            f"the weights of {len(bad)} of {len(drawn.x)} samples of the flow are 0, NaN or infinite: sample "
            f"{start + i}, at ({at}), has log p~ = {drawn.log_p[i].item():g} and log q = "
            f"{drawn.log_q[i].item():g}. If the density is 0 outside of a range, give the range with target.types"
        )
