"""Sample quality: the distance between samples and data, by the number of solver steps."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowtrain.data.base import Dataset
from flowtrain.evaluation import check_fits
from flowtrain.evaluation.log_likelihood import held_out, nfe_of_pass
from flowtrain.flow import Flow
from flowtrain.ode import Solver, ode_solver, record_solves
from flowtrain.utils.errors import ConfigError, NonFiniteError
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status
from flowtrain.utils.weighting import resample

METHODS = ("euler", "midpoint")
PROJECTIONS = 256
# Number of groups of rows, and of projections, in the jackknife. More projections give nearly the same error
GROUPS, ERROR_PROJECTIONS = 20, 64
# Largest number of samples that are compared
ROWS = 10_000


@dataclass(frozen=True)
class SolverQuality:
    """The quality of samples drawn with one solver.

    Attributes:
        method: the method of the solver.
        steps: the number of fixed steps. None for the solver of the checkpoint.
        nfe: the number of function evaluations for a sample.
        sliced_wasserstein: the sliced Wasserstein distance to the data, in the units of the data.
        seconds: the time for all samples.
        stderr: the standard error of the distance.
    """

    method: str
    steps: int | None
    nfe: float
    sliced_wasserstein: float
    seconds: float
    stderr: float


@dataclass(frozen=True)
class SampleQuality:
    """The quality of samples by solver: `n` samples of each solver are compared with `n` test samples.

    Attributes:
        n: the number of samples.
        projections: the number of projections of the sliced Wasserstein distance.
        data: the distance between validation and test data, which is the expected distance of perfect samples.
        data_stderr: the standard error of this distance.
        exact: the quality with the checkpoint's own solver.
        rows: the quality with each solver with fixed steps.
    """

    n: int
    projections: int
    data: float
    data_stderr: float
    exact: SolverQuality
    rows: tuple[SolverQuality, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Returns the table as text."""
        lines = [f"{'solver':>10} {'steps':>6} {'NFE':>6} {'sliced W2':>10} {'+-':>8} {'seconds':>8}"]
        for row in (*self.rows, self.exact):
            steps = "-" if row.steps is None else row.steps
            lines.append(
                f"{row.method:>10} {steps:>6} {row.nfe:>6.0f} {row.sliced_wasserstein:>10.4f} {row.stderr:>8.1g} "
                f"{row.seconds:>8.2f}"
            )
        lines.append(
            f"{'data':>10} {'':>6} {'':>6} {self.data:>10.4f} {self.data_stderr:>8.1g}   (validation against test, "
            f"{self.n} rows each)"
        )
        return "\n".join(lines)


def quality(flow: Flow, data: Dataset, steps: Sequence[int], seed: int = 0) -> SampleQuality:
    """Draws samples with different numbers of solver steps and compares them with test data.

    All samples start at the same base points. The methods are Euler and midpoint, or the flow's own method if it has
    fixed steps.

    Raises:
        ConfigError: a flow that solves no ODE.
        DataError: data that do not fit the flow.
        NonFiniteError: samples that are NaN or infinite.
    """
    own = flow.solver
    if own is None:
        raise ConfigError("quality: only for continuous flows. This flow takes no steps, so its samples are exact")
    check_fits(flow, data)
    flow.eval()
    n = min(len(data.test), len(data.val), ROWS)
    methods = METHODS if own.adaptive else (own.method,)
    with seeded(seed, flow.like.device):
        of_test, of_val = (rows_by_weight(weights, n) for weights in (data.test_weights, data.val_weights))
        real, other = (flow.dequantized(x).cpu() for x in (data.test[of_test], data.val[of_val]))
        # warm up, because the first solve is slower
        flow.sample(10, context=flow.some_context(10))
    # samples have the context of the test data
    _, context = held_out(flow, data, "test")
    measured = partial(_quality_with, flow, real=real, context=None if context is None else context[of_test], seed=seed)
    exact = measured(solver=own, steps=None)
    rows = [measured(solver=ode_solver(m, steps=k, max_nfe=own.max_nfe), steps=k) for m in methods for k in steps]
    distance, error = sliced_wasserstein(other, real), distance_error(other, real)
    return SampleQuality(n, PROJECTIONS, distance, error, exact, tuple(rows))


def rows_by_weight(weights: Tensor | None, n: int) -> Tensor:
    """Returns the positions of n rows: the first n, or rows that are drawn by weight.

    Raises:
        ConfigError: negative weights.
    """
    if weights is None:
        return torch.arange(n)
    if bool((weights < 0).any()):
        raise ConfigError(
            "quality: not possible with negative weights (data.signed_weights), because rows are drawn by weight; "
            "leave out quality"
        )
    return resample(weights, n)


def _quality_with(
    flow: Flow, *, solver: Solver, steps: int | None, real: Tensor, context: Tensor | None, seed: int
) -> SolverQuality:
    """Draws samples with a solver and compares them with the test data `real`."""
    begun = time.perf_counter()
    words = f"{solver.method}" + ("" if steps is None else f", {steps} steps")
    with status(words), seeded(seed, flow.like.device), record_solves() as solves:
        samples = flow.with_solver(solver).sample(len(real), context=context).cpu()
    seconds = time.perf_counter() - begun
    if not bool(samples.isfinite().all()):
        how = "" if steps is None else f" with {steps} steps"
        raise NonFiniteError(f"samples of {solver.method}{how} are NaN or infinite: give more steps")
    nfe = nfe_of_pass(flow, solves)
    assert nfe is not None
    distance, error = sliced_wasserstein(samples, real), distance_error(samples, real)
    return SolverQuality(solver.method, steps, nfe, distance, seconds, error)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = PROJECTIONS) -> float:
    """Computes the sliced Wasserstein distance between two sets of n points, in the units of the data.

    SW_2(x, y) = (E_a int_0^1 |F_a^-1(q) - G_a^-1(q)|^2 dq)^(1/2)

    a is uniform on the unit sphere. F_a and G_a are the distribution functions of <a, x> and <a, y> (Bonneel et al.
    2015, Sliced and Radon Wasserstein barycenters, section 3). Every call uses the same random directions a. The
    distance between two samples of the same distribution is not 0, but about n^(-1/2) times the standard deviation of
    the distribution.

    Shapes: x and y (n, *event).

    Example:
        >>> x = torch.zeros(10, 1)
        >>> sliced_wasserstein(x, x), round(sliced_wasserstein(x, x + 1), 4)
        (0.0, 1.0)
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    a = _directions(x, projections)
    total = 0.0
    for part in torch.split(a, max(1, 10_000_000 // max(1, len(x))), dim=1):
        total += float(((x @ part).sort(0).values - (y @ part).sort(0).values).square().mean(0).sum())
    return math.sqrt(total / projections)


def _directions(x: Tensor, projections: int) -> Tensor:
    """Returns random unit vectors (d, projections) for x (n, d). Every call returns the same vectors."""
    with seeded(0, x.device):
        a = torch.randn(x.shape[1], projections, dtype=x.dtype, device=x.device)
    return functional.normalize(a, dim=0)


def distance_error(x: Tensor, y: Tensor, projections: int = ERROR_PROJECTIONS) -> float:
    """Estimates the standard error of `sliced_wasserstein` over the rows of x and y (n, *event), in units of the data.

    The estimate is the grouped jackknife (Shao and Tu 1995, The jackknife and bootstrap, section 2.3): the square root
    of (G - 1)/G sum_g (SW_g - mean of SW)^2, where SW_g leaves out group g of G groups of rows in both sets. The
    estimate is about 40% too large for two samples of the same distribution. It is NaN for fewer than 2 G rows.
    """
    n = len(x)
    if n < 2 * GROUPS:
        return math.nan
    # The groups are random, because the rows may be sorted. They differ between x and y, because the sets are
    # independent
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randperm(n, generator=generator) % GROUPS for _ in range(2))
    x, y = x.flatten(1).double(), y.flatten(1).double()
    # u and v, (projections, n), are sorted only once: without a group, every projection has the same number of values
    (u, i), (v, j) = ((rows @ _directions(rows, projections)).T.contiguous().sort(1) for rows in (x, y))
    squares = []
    for g in range(GROUPS):
        first, second = u[(one != g)[i]].view(len(u), -1), v[(other != g)[j]].view(len(v), -1)
        squares.append(float((first - second).square().mean()))
    distances = torch.tensor(squares, dtype=torch.float64).sqrt()
    return float(((GROUPS - 1) * (distances - distances.mean()).square().mean()).sqrt())
