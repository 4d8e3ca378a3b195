"""Baseline likelihood: a Gaussian with the mean and the shrunk covariance of the training rows."""

import math
import time

import torch
from torch import Tensor

from flowtrain.covariance import gaussian_log_prob, shrunk_covariance
from flowtrain.data.base import Dataset, step_generator
from flowtrain.evaluation.budget import stderr
from flowtrain.evaluation.checks import PAIRED, PAIRED_PER_COLUMN
from flowtrain.evaluation.digits import with_error
from flowtrain.evaluation.result import Baseline, Check

GAUSSIAN = "gaussian"
# numbers of the training rows that a covariance is taken from, and of test rows that are scored at a time
FITTED, SCORED = 2**24, 2**22
# of the noise that is added to whole numbers
_STREAM = 0x6761_7573
_TRAIN, _TEST = 1, 2
# standard errors of the paired difference that count as worse; nats, and standard errors of the baseline's own NLL,
# that count as worse however uncertain the NLL of the flow is
PAIRED_ERRORS, CLEARLY, CLEARLY_ERRORS = 2.0, 0.5, 3.0


def gaussian_baseline(data: Dataset, x: Tensor, log_p: Tensor) -> Baseline | None:
    """The Gaussian of the training rows of a table on the rows that a flow has scored; None of images and endless data.

    Its mean and covariance are those of `flowtrain.covariance.shrunk_covariance`, from at most 2^24 numbers of the
    training rows. Whole numbers get uniform noise in [0, 1), here and there, as they do for the flow; labels are not
    used.

    Args:
        x: the scored rows, (n, d).
        log_p: of the flow on these rows, (n,).
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
    # a row without a likelihood is worse than any
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

    It is worse where the paired difference is above 2 of its standard errors, and above 0.01 nats and 1e-4 for each
    column, which training may leave. It is also worse above 0.5 nats and 3 standard errors of the Gaussian's own NLL:
    one row with a huge -log p makes the difference uncertain, but not small.

    Args:
        d: columns.
    """
    if simple is None:
        return None
    if not math.isfinite(simple.nll_stderr):
        return Check("baseline", None, None, None, "one row says little")
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
        f"the NLL of the flow is {with_error(nll, nll_stderr)} nats, and that of a Gaussian with the mean and "
        f"covariance of the training rows is {with_error(simple.nll, simple.nll_stderr)} nats: the flow is worse by "
        f"{with_error(simple.worse, simple.worse_stderr)}. The model may be too large for so few rows, or trained too "
        "little (trainer.steps) or too fast (trainer.lr)",
    )


def _real(x: Tensor, which: int) -> Tensor:
    """x + u for whole numbers x (n, d), with seeded noise; other rows as they are."""
    if x.is_floating_point():
        return x
    u = torch.rand(x.shape, dtype=torch.float64, generator=step_generator(0, _STREAM, which))
    return x + u
