"""How near samples come to the data, by how many steps they are solved with."""

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

METHODS = ("euler", "midpoint")
PROJECTIONS = 256
# the jackknife: groups of rows, and projections. With fewer projections the error over rows is nearly the same
GROUPS, ERROR_PROJECTIONS = 20, 64
# samples that are compared, at most
ROWS = 10_000


@dataclass(frozen=True)
class Row:
    """Samples by one solver.

    Attributes:
        nfe: evaluations of the velocity field for one sample.
        sliced_wasserstein: the distance to the data.
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
    """Samples by `n` rows of each solver beside `n` test samples.

    Attributes:
        data, data_stderr: the distance of two sets of data, validation and test, and its standard error. No samples
            can be expected to come nearer.
        exact: by the checkpoint's own solver.
        rows: by fixed steps.
    """

    n: int
    projections: int
    data: float
    data_stderr: float
    exact: Row
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{'solver':>10} {'steps':>6} {'NFE':>6} {'sliced W2':>10} {'+-':>8} {'seconds':>8}"]
        for row in (*self.rows, self.exact):
            steps = "-" if row.steps is None else row.steps
            lines.append(
                f"{row.method:>10} {steps:>6} {row.nfe:>6.0f} {row.sliced_wasserstein:>10.4f} {row.stderr:>8.1g} "
                f"{row.seconds:>8.2f}"
            )
        lines.append(
            f"{'data':>10} {'':>6} {'':>6} {self.data:>10.4f} {self.data_stderr:>8.1g}   (validation beside test, "
            f"{self.n} rows each)"
        )
        return "\n".join(lines)


def quality(flow: Flow, data: Dataset, steps: Sequence[int], seed: int = 0) -> SampleQuality:
    """Solves the same base points with each number of `steps`, and compares the samples with test data.

    By Euler and midpoint, or by the flow's own method where that takes fixed steps.

    Raises:
        ConfigError: a flow that solves nothing.
        DataError: data that do not fit the flow.
        NonFiniteError: samples that are NaN or infinite.
    """
    own = flow.solver
    if own is None:
        raise ConfigError("quality: this flow takes no steps, its samples are exact; it is for continuous flows")
    check_fits(flow, data)
    flow.eval()
    n = min(len(data.test), len(data.val), ROWS)
    methods = METHODS if own.adaptive else (own.method,)
    with seeded(seed, flow.like.device):
        real, other = (flow.dequantized(x[:n]).cpu() for x in (data.test, data.val))
        # a first solve takes longer than others
        flow.sample(10)
    # samples of the classes that the data are of
    _, label = held_out(flow, data, "test")
    draw = partial(_row, flow, real=real, label=None if label is None else label[:n], seed=seed)
    exact = draw(solver=own, steps=None)
    rows = [draw(solver=ode_solver(m, steps=k, max_nfe=own.max_nfe), steps=k) for m in methods for k in steps]
    distance, error = sliced_wasserstein(other, real), distance_error(other, real)
    return SampleQuality(n, PROJECTIONS, distance, error, exact, tuple(rows))


def _row(flow: Flow, *, solver: Solver, steps: int | None, real: Tensor, label: Tensor | None, seed: int) -> Row:
    begun = time.perf_counter()
    words = f"{solver.method}" + ("" if steps is None else f", {steps} steps")
    with status(words), seeded(seed, flow.like.device), record_solves() as solves:
        samples = flow.with_solver(solver).sample(len(real), label=label).cpu()
    seconds = time.perf_counter() - begun
    if not bool(samples.isfinite().all()):
        how = "" if steps is None else f" with {steps} steps"
        raise NonFiniteError(f"samples by {solver.method}{how} are NaN or infinite: give more steps")
    nfe = nfe_of_pass(flow, solves)
    assert nfe is not None
    return Row(solver.method, steps, nfe, sliced_wasserstein(samples, real), seconds, distance_error(samples, real))


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = PROJECTIONS) -> float:
    """SW_2(x, y) = (E_a int_0^1 |F_a^-1(q) - G_a^-1(q)|^2 dq)^(1/2), a uniform on the unit sphere, F_a and G_a the
    distributions of <a, x> and <a, y> (Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters, section 3).

    Of n points each, in the units of the data; the same `projections` every time. Two samples of one distribution are
    not at 0, but at about n^(-1/2) of its spread.

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
    """Unit vectors, (d, projections), the same every time, for x (n, d)."""
    with seeded(0, x.device):
        a = torch.randn(x.shape[1], projections, dtype=x.dtype, device=x.device)
    return functional.normalize(a, dim=0)


def distance_error(x: Tensor, y: Tensor, projections: int = ERROR_PROJECTIONS) -> float:
    """The standard error of `sliced_wasserstein` over the rows of x and y (n, *event), in the units of the data.

    This is the jackknife that leaves out one of G groups of rows of both sets at a time (Shao and Tu 1995, The
    jackknife and bootstrap, section 2.3): the square root of (G - 1)/G sum_g (SW_g - mean of SW)^2. It is too large by
    about 40% for two samples of one distribution. NaN with fewer than 2 G rows.
    """
    n = len(x)
    if n < 2 * GROUPS:
        return math.nan
    # in random order, because rows may be sorted, and in another order for y, because the sets are independent
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randperm(n, generator=generator) % GROUPS for _ in range(2))
    x, y = x.flatten(1).double(), y.flatten(1).double()
    # sorted once for all groups: (projections, n), in which each projection loses as many values
    (u, i), (v, j) = ((rows @ _directions(rows, projections)).T.contiguous().sort(1) for rows in (x, y))
    squares = []
    for g in range(GROUPS):
        first, second = u[(one != g)[i]].view(len(u), -1), v[(other != g)[j]].view(len(v), -1)
        squares.append(float((first - second).square().mean()))
    distances = torch.tensor(squares, dtype=torch.float64).sqrt()
    return float(((GROUPS - 1) * (distances - distances.mean()).square().mean()).sqrt())
