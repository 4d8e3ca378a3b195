"""Functions for all figures of a flow: settings during drawing, test samples, latents, and warnings on failure."""

import copy
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
from flowtrain.utils.weighting import cancelled, resample

AnyDensity = TypeVar("AnyDensity", bound=Density)

log = logging.getLogger("flowtrain")

# the solver tolerance: errors of this size are invisible in a figure, and a tighter solve of a whole grid takes long
TOLERANCE = 1e-4
# the number of rows among which negative weights are cancelled. Each negative weight needs a sort of these rows
MOST_CANCELLED = 4_000


@contextmanager
def warn_if_plotting_fails(what: str, also: str = "") -> Iterator[None]:
    """Turns an error in drawing or writing the figure `what` into a warning, so that a run keeps its results.

    Args:
        also: text for the warning that names other missing output.
    """
    try:
        with phase(f"drawing {what}"):
            yield
    except (FlowtrainError, OSError) as e:
        log.warning("no picture of %s%s: %s", what, also, e)
    except Exception as e:  # a programming error must not end the run either
        log.warning("no picture of %s%s: %s: %s", what, also, type(e).__name__, e)
        log.debug("", exc_info=True)


@contextmanager
def drawing(flow: AnyDensity, tolerance: float = TOLERANCE, seed: int = 0) -> Iterator[AnyDensity]:
    """Yields the flow with a tolerance that suits figures. Inside, gradients are off and random numbers are seeded.

    The flow is put into evaluation mode, and remains in this mode afterwards.
    """

    def loosened(solver: Solver) -> Solver:
        rtol = max(solver.rtol, tolerance)
        return solver.replace(rtol=rtol, atol=rtol)

    flow.eval()
    with torch.no_grad(), seeded(seed, flow.like.device):
        yield flow.with_solvers(loosened)


def as_drawn(data: Dataset) -> Dataset:
    """Returns the data with test rows of equal weights, because figures show each row alike.

    Weighted rows are drawn by weight, see `flowtrain.utils.weighting.resample`. If weights are negative, they are first
    cancelled with the weights of near rows, see `cancelled`, and only the first MOST_CANCELLED rows are used.
    """
    weights = data.test_weights
    if weights is None:
        return data
    if bool((weights < 0).any()):
        weights = weights[:MOST_CANCELLED]
        weights = cancelled(data.test[:MOST_CANCELLED].flatten(1).double().cpu(), weights.cpu())
    rows = resample(weights)
    # the rows of a figure are often the first rows
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    shown = copy.copy(data)
    shown.test, shown.test_weights = data.test[rows], None
    for extra in ("test_labels", "test_context"):
        values = getattr(data, extra)
        setattr(shown, extra, None if values is None else values[rows])
    return shown


def first_test_samples(flow: Density, data: Dataset, n: int, label: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns the first n test samples, and their labels for a conditional flow.

    Args:
        label: the class of the samples; None: all classes.
    """
    x, labels = data.test, data.test_labels
    if label is not None and labels is not None:
        x, labels = x[labels == label], labels[labels == label]
    device = flow.like.device
    return x[:n].to(device), None if flow.classes is None or labels is None else labels[:n].to(device)


def draw_latents(flow: Flow, n: int, temperature: float = 1.0) -> Tensor:
    """Draws samples of the base, (n, *event)."""
    return flow.base.sample(n, temperature=temperature, like=flow.like)


def evaluate_inside_range(
    flow: Density, x: Tensor, function: Callable[[Tensor], Tensor], elsewhere: float, *columns: int
) -> Tensor:
    """Returns the values of a function at rows of x (B, d), shape (B, *columns), on the device of the flow.

    A flow with a logit has a limited range, and a grid around the data can extend beyond. The value of rows outside the
    range is `elsewhere`.
    """
    x = x.to(flow.data_like)
    if flow.levels is None:
        return function(x)
    there = ((x >= 0) & (x <= flow.levels)).all(dim=1)
    out = torch.full((len(x), *columns), elsewhere, dtype=x.dtype, device=x.device)
    if there.any():
        out[there] = function(x[there]).to(out)
    return out
