"""Samples of a flow with their log importance weights for a target that is known up to a constant."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.flow import Density, Flow, rows_at_a_time
from flowtrain.utils.errors import NonFiniteError
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status


class WeightedSamples(NamedTuple):
    """The result of `weighted_samples`, on the CPU. Log densities are in nats and float64.

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
        """The log weights log p~(x) - log q(x), (n,). Their mean is the ELBO."""
        return self.log_p - self.log_q


@torch.no_grad()
def weighted_samples(
    flow: Density, target: Target, n: int, seed: int, rows: slice = slice(None), batch_size: int | None = None
) -> WeightedSamples:
    """Draws n samples x ~ q of a flow, and computes log q(x) and log p~(x).

    The base points depend only on the seed, the device and n, so two flows can be compared on the same base points.

    Args:
        flow: a flow, for which x and log q come from one pass from base to data, or an ensemble.
        target: the target, on the device of the flow.
        seed: the seed of the base points.
        rows: the samples that are computed, of n.
        batch_size: the number of samples that are computed at once. None means a number that depends on d.
    """
    size = batch_size or rows_at_a_time(flow.event_shape)
    with seeded(seed, flow.like.device):
        points = flow.base.rsample(n, like=flow.like)[rows] if isinstance(flow, Flow) else flow.sample(n)[rows]
    found = []
    with status("scoring", total=len(points), unit="sample") as progress:
        for part in torch.split(points, size):
            x, log_q = flow.sample_pass(part)[:2] if isinstance(flow, Flow) else (part, flow.log_prob(part))
            found.append((x.cpu(), log_q.double().cpu(), target(x).double().cpu()))
            progress.advance(len(part))
    if not found:
        return WeightedSamples(points.cpu(), *(torch.zeros(0, dtype=torch.float64) for _ in range(2)))
    return WeightedSamples(*map(torch.cat, zip(*found, strict=True)))


def check_log_weights(drawn: WeightedSamples, start: int = 0) -> None:
    """Checks that all log weights are finite.

    Args:
        start: the number of the first sample, for the message.

    Raises:
        NonFiniteError: a log weight is NaN or infinite.
    """
    bad = (~drawn.log_w.isfinite()).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        at = ", ".join(f"{v:.4g}" for v in drawn.x[i].flatten()[:5].tolist())
        raise NonFiniteError(
            f"{len(bad)} of {len(drawn.x)} samples of the flow have no finite weight: sample {start + i}, at ({at}), "
            f"has log p~ = {drawn.log_p[i].item():g} and log q = {drawn.log_q[i].item():g}. If the density is zero "
            "outside of a range, give the range by target.types"
        )
