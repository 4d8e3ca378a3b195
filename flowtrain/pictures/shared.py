"""What all pictures have in common: the state a flow is drawn in, and the data beside it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.seeding import seeded

log = logging.getLogger("flowtrain")

# a picture shows nothing of an error this small, and a tight solve of its whole grid would cost more than it shows
TOLERANCE = 1e-4


@contextmanager
def spared(what: str) -> Iterator[None]:
    """What came before it is not lost for a picture: one that cannot be drawn or written gives a warning."""
    try:
        yield
    except (FlowtrainError, OSError) as e:
        log.warning("no picture %s: %s", what, e)


@contextmanager
def drawing(flow: Flow, tolerance: float = TOLERANCE, seed: int = 0) -> Iterator[None]:
    """The flow in evaluation mode, no gradients, randomness of its own, and a tolerance that suits a picture."""
    flow.eval()
    with torch.no_grad(), seeded(seed, flow.like.device):
        if flow.solver is None:
            yield
            return
        rtol = max(flow.solver.rtol, tolerance)
        with flow.solver.using(rtol=rtol, atol=rtol):
            yield


def first(flow: Flow, data: Dataset, n: int, label: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The first test samples, of that class where one is given, and for a conditional flow their labels."""
    x, labels = data.test, data.test_labels
    if label is not None and labels is not None:
        x, labels = x[labels == label], labels[labels == label]
    device = flow.like.device
    return x[:n].to(device), None if flow.classes is None or labels is None else labels[:n].to(device)


def latents(flow: Flow, n: int) -> Tensor:
    """Draws from the base, (n, *event)."""
    like = flow.like
    return torch.randn(n, *flow.event_shape, dtype=like.dtype, device=like.device)


def inside(flow: Flow, x: Tensor) -> Tensor:
    """Which rows of x (B, d) are not off the range that a logit maps from, into which a grid around the data leads."""
    if flow.levels is None:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return ((x >= 0) & (x <= flow.levels)).all(dim=1)
