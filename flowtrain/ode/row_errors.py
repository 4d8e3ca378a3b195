"""The estimated error of the log-likelihood of each row, from the error estimates of the solver along its path."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.ode.solver import Statistics

# The error is SOLVER (rtol / 1e-5)^POWER times the sum of the embedded errors. The embedded error is that of a method
# of lower order, so the true error decreases faster than it. Both constants were chosen so that the error covers at
# least 95% of the rows of moons, 2spirals and gas for rtol from 1e-3 to 1e-7, see flowtrain/evaluation/README.md
SOLVER, POWER = 3.0, 0.4
# The error of rounding is ROUNDING eps (1 + |log p|), with the machine epsilon eps
ROUNDING = 25


def row_errors(solves: Sequence[Statistics], log_p: Tensor, z: Tensor) -> Tensor:
    """Returns the estimated absolute error of log p of each row, (B,), in nats; NaN if a solver has no estimate.

    For each ODE, let e be the sum of the embedded errors of the log-determinant over the steps of a row, and s the sum
    of the norms of the embedded errors of the state. An error of the state changes log p by the product with the
    gradient of log p, whose size is estimated by the gradient of log N(z; 0, I). The error is

        sum_ODEs C (e + s (1 + |z| / sqrt d)) + 25 eps (1 + |log p|),    C = 3 (rtol / 1e-5)^0.4.

    Only solves with a separate step control for each row have estimates: those of flowtrain's adaptive methods in
    evaluation mode. Without an ODE, the error is the term of rounding. If log p is -inf, the error is infinite.

    Args:
        solves: the statistics of all solves of one pass.
        log_p: log p in nats, (B,).
        z: the latents, (B, *event_shape).

    Example:
        >>> row_errors([], torch.tensor([-1.0], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)) < 1e-13
        tensor([True])
    """
    log_p, z = log_p.detach(), z.detach().flatten(1)
    total = ROUNDING * torch.finfo(z.dtype).eps * (1 + log_p.abs())
    gradient = 1 + z.norm(dim=1) / math.sqrt(z.shape[1])
    for solve in solves:
        if solve.state_error is None or solve.integral_error is None:
            return torch.full_like(total, torch.nan)
        factor = SOLVER * (solve.rtol / 1e-5) ** POWER
        total = total + factor * (solve.integral_error[:, 0] + solve.state_error * gradient)
    return torch.where(log_p.isinf(), torch.inf, total)
