"""Baseline likelihood: a Gaussian with the mean and the shrunk covariance of the training rows."""

import math
import time

import torch
from torch import Tensor

from flowtrain.bijections.linear import gaussian_log_prob, shrunk_covariance
from flowtrain.data.base import Dataset, step_generator
from flowtrain.evaluation.checks import PAIRED, PAIRED_PER_COLUMN
from flowtrain.evaluation.error_budget import stderr
from flowtrain.evaluation.result import Baseline, Check
from flowtrain.utils.formatting import with_error

GAUSSIAN = "gaussian"
# values (rows times columns) of the training set that the covariance is estimated from, and values scored at a time
FITTED, SCORED = 2**24, 2**22
# keys of the random streams of the noise added to whole numbers
_STREAM = 0x6761_7573
_TRAIN, _TEST = 1, 2
# The flow is worse if the paired difference exceeds PAIRED_ERRORS of its standard errors. It is also worse if the
# difference exceeds CLEARLY nats plus CLEARLY_ERRORS standard errors of the baseline's NLL
PAIRED_ERRORS, CLEARLY, CLEARLY_ERRORS = 2.0, 0.5, 3.0


def gaussian_baseline(data: Dataset, x: Tensor, log_p: Tensor) -> Baseline | None:
    """Scores a Gaussian fitted to the training rows of a table; None for images and endless data.

    `shrunk_covariance` gives its mean and covariance, from at most 2^24 values of the training
    rows. Uniform noise in [0, 1) is added to whole numbers, both in the training rows and in the scored rows, as for
    the flow. Labels are not used.

    Args:
        x: the scored rows, (n, d).
        log_p: log densities of the flow at these rows, (n,).
    """
    if len(data.event_shape) != 1:
        return None
    begun = time.perf_counter()
    rows = data.train_rows(max(1, FITTED // data.event_shape[0]))
    if rows is None:
        return None
    mean, covariance = shrunk_covariance(_real(rows.cpu(), _TRAIN))
    parts = torch.split(_real(x.cpu(), _TEST), max(1, SCORED // data.event_shape[0]))
    simple = torch.cat([gaussian_log_prob(part, mean, covariance) for part in parts])
    # a row without a likelihood counts as infinitely worse
    gap = torch.where(log_p.isnan(), torch.inf, simple - log_p)
    return Baseline(
        nll=-float(simple.mean()),
        nll_stderr=stderr(simple),
        seconds=time.perf_counter() - begun,
        worse=float(gap.mean()),
        worse_stderr=stderr(gap),
    )


def of_baseline(nll: float, nll_stderr: float, simple: Baseline | None, d: int) -> Check | None:
    """Is the flow no worse than a Gaussian?

    It is worse if the paired difference exceeds both 2 of its standard errors and 0.01 nats plus 1e-4 nats per column,
    a gap that training may leave. It is also worse if the difference exceeds 0.5 nats plus 3 standard errors of the
    Gaussian's own NLL: a row with a huge -log p makes the difference uncertain, but not small.

    Args:
        d: the number of columns.
    """
    if simple is None:
        return None
    if not math.isfinite(simple.nll_stderr):
        return Check("baseline", None, None, None, "at least two rows are needed")
    small = PAIRED + PAIRED_PER_COLUMN * d
    limit = CLEARLY + CLEARLY_ERRORS * simple.nll_stderr
    if math.isfinite(simple.worse_stderr):
        limit = min(limit, max(small, PAIRED_ERRORS * simple.worse_stderr))
    worse = max(0.0, simple.worse)
    if worse <= limit:
        return Check("baseline", worse, limit, True)
    return Check(
        "baseline",
        worse,
        limit,
        False,
        f"the NLL of the flow is {with_error(nll, nll_stderr)} nats. A Gaussian with the mean and covariance of the "
        f"training rows has {with_error(simple.nll, simple.nll_stderr)} nats. The flow is worse by "
        f"{with_error(simple.worse, simple.worse_stderr)} nats. The model may be too large for the number of rows, the "
        "training too short (trainer.steps), or the learning rate too high (trainer.lr)",
    )


def _real(x: Tensor, which: int) -> Tensor:
    """x + u with seeded uniform noise u if x (n, d) is whole numbers, else x unchanged."""
    if x.is_floating_point():
        return x
    u = torch.rand(x.shape, dtype=torch.float64, generator=step_generator(0, _STREAM, which))
    return x + u
