"""What all pictures have in common: the state a flow is drawn in, and the data beside it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.flow import Density, Flow
from flowtrain.ode import Solver
from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.process import seeded
from flowtrain.utils.status import phase

AnyDensity = TypeVar("AnyDensity", bound=Density)

log = logging.getLogger("flowtrain")

# a picture shows nothing of an error this small, and a tight solve of its whole grid would cost more than it shows
TOLERANCE = 1e-4


@contextmanager
def warn_if_plotting_fails(what: str, also: str = "") -> Iterator[None]:
    """Turns an error in drawing or writing a picture of `what` into a warning, so that earlier results are kept.

    Args:
        also: names other missing output in the warning.
    """
    try:
        with phase(f"drawing {what}"):
            yield
    except (FlowtrainError, OSError) as e:
        log.warning("no picture of %s%s: %s", what, also, e)
    except Exception as e:  # a mistake of ours is no reason to lose a run either
        log.warning("no picture of %s%s: %s: %s", what, also, type(e).__name__, e)
        log.debug("", exc_info=True)


@contextmanager
def drawing(flow: AnyDensity, tolerance: float = TOLERANCE, seed: int = 0) -> Iterator[AnyDensity]:
    """Gives the flow with a tolerance for a picture. Inside, there are no gradients, and random numbers are seeded.

    The flow is put into evaluation mode and stays in it.
    """

    def loosened(solver: Solver) -> Solver:
        rtol = max(solver.rtol, tolerance)
        return solver.replace(rtol=rtol, atol=rtol)

    flow.eval()
    with torch.no_grad(), seeded(seed, flow.like.device):
        yield flow.with_solvers(loosened)


def first(flow: Density, data: Dataset, n: int, label: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The first test samples, of that class where one is given, and for a conditional flow their labels."""
    x, labels = data.test, data.test_labels
    if label is not None and labels is not None:
        x, labels = x[labels == label], labels[labels == label]
    device = flow.like.device
    return x[:n].to(device), None if flow.classes is None or labels is None else labels[:n].to(device)


def latents(flow: Flow, n: int, temperature: float = 1.0) -> Tensor:
    """Draws from the base, (n, *event)."""
    return flow.base.sample(n, temperature=temperature, like=flow.like)


def where_inside(
    flow: Density, x: Tensor, function: Callable[[Tensor], Tensor], elsewhere: float, *columns: int
) -> Tensor:
    """A function of rows of x (B, d), (B, *columns), on the flow's device, and `elsewhere` off the flow's range.

    A logit maps from a range that a grid around the data leads out of; other flows have none.
    """
    x = x.to(flow.data_like)
    if flow.levels is None:
        return function(x)
    there = ((x >= 0) & (x <= flow.levels)).all(dim=1)
    out = torch.full((len(x), *columns), elsewhere, dtype=x.dtype, device=x.device)
    if there.any():
        out[there] = function(x[there]).to(out)
    return out
