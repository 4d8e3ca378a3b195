"""Checks that a density is valid and that its likelihoods are accurate. Each check measures one possible defect."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

from flowtrain.bases import (
    Base,
    GaussianMixture,
    MixtureOfRows,
    NormalUniform,
    StandardNormal,
    StudentT,
    UniformBox,
)
from flowtrain.bijections.support import ToSupport
from flowtrain.data.context import context_text
from flowtrain.data.types import differences
from flowtrain.evaluation.error_budget import SMALL, Subset, rows_of_checks, solver_bias
from flowtrain.evaluation.log_likelihood import estimates_trace, marginal
from flowtrain.evaluation.result import Budget, Check
from flowtrain.flow import Density, Flow, rows_at_a_time
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import SolverError, first_line
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status
from flowtrain.utils.weighting import average, stderr

# Largest deviation of the mass from 1, and error at which the grid is fine enough
MISS, ENOUGH = 1e-3, 7e-4
# Largest number of points before the last doubling, and of nodes per side by number of columns
MOST_POINTS, SIDE = 70_000, {1: 2**17 + 1, 2: 2**11 + 1}
FIRST_SIDE = {1: 257, 2: 33}
# Extent of the grid divided by the extent of the samples, both measured from the median
REACH = 1.5
# For heavy tails: largest fraction of the mass beyond the farthest sample that may lie outside the grid
LEFT_OUT = 1 / 20
# The next grid leaves out the neighbours of nodes with less mass than this. The mass of all these nodes is negligible
NO_MASS = 1e-9


@dataclass(frozen=True)
class Mass:
    """The integral of a density.

    Attributes:
        value: the integral.
        error: the estimated error of the grid.
        points: the number of points at which the density was evaluated.
    """

    value: float
    error: float
    points: int


def mass(log_prob: Callable[[Tensor], Tensor], samples: Tensor, reach: float = REACH) -> Mass:
    """Computes int exp(log_prob(x)) dx over one or two dimensions by the trapezoidal rule.

    The rule is applied in t with x_j = c_j + s_j sinh(t_j). For smooth densities it converges geometrically (Trefethen
    and Weideman 2014, The exponentially convergent trapezoidal rule). The sinh extends the grid to far samples at
    little cost to the resolution in the middle.

    The number of nodes is doubled repeatedly. The old nodes are part of the new grid, so their values are reused. New
    nodes are evaluated only near samples and near nodes with mass. If the integral is 1, the refinement stops when the
    error is small. Any other integral may be due to a mode that the grid has missed, so the refinement then continues
    until the largest number of points is reached.

    Args:
        log_prob: maps points (B, d) to log p in nats, (B,), d = 1 or 2.
        samples: samples (n, d) of the density, which show where its mass is.
        reach: see `Grid.over`.
    """
    grid = Grid.over(samples, reach)
    n = FIRST_SIDE[samples.shape[1]]
    everywhere = torch.ones((n,) * samples.shape[1], dtype=torch.bool)
    known = torch.zeros(everywhere.shape, dtype=torch.float64)
    known[everywhere] = grid.values(log_prob, everywhere)
    total, points, changes = grid.integral(known), known.numel(), list[float]()
    while True:
        here = _near((known * grid.cell(n) > NO_MASS) | grid.holding(samples, n))
        n = 2 * n - 1
        every_other = (slice(None, None, 2),) * here.dim()
        here[every_other] = False
        finer = torch.zeros(here.shape, dtype=torch.float64)
        finer[every_other] = known
        finer[here] = grid.values(log_prob, here)
        before, total, known = total, grid.integral(finer), finer
        points += int(here.sum())
        changes.append(abs(total - before))
        error = remaining_error(changes)
        # the next doubling evaluates about 2^d times as many points
        spent = points + 2 ** here.dim() * int(here.sum()) > MOST_POINTS or 2 * n - 1 > SIDE[here.dim()]
        if (error < ENOUGH and abs(1 - total) < MISS) or spent or not math.isfinite(total):
            return Mass(total, error, points)


@dataclass(frozen=True)
class Grid:
    """A grid with nodes x_j = c_j + s_j sinh(e_j u_j), where u is an even grid over [-1, 1]^d.

    Attributes:
        centre, scale, end: c, s and e, (d,).
    """

    centre: Tensor
    scale: Tensor
    end: Tensor

    @staticmethod
    def over(samples: Tensor, reach: float = REACH) -> "Grid":
        """Makes a grid that extends `reach` times as far from the median as the samples (n, d)."""
        x = samples.double()
        low, centre, high = torch.quantile(x, torch.tensor([0.16, 0.5, 0.84], dtype=x.dtype, device=x.device), dim=0)
        # with this scale, nodes in the middle, where most of the mass is, are at least as dense as in an even grid
        scale = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return Grid(centre, scale, torch.asinh(reach * ((x - centre).abs().amax(0) / scale).clamp_min(1.0)))

    def values(self, log_prob: Callable[[Tensor], Tensor], where: Tensor) -> Tensor:
        """Returns p(x) dx/dt at the nodes marked in `where`, (n,), on the CPU."""
        t = (2 * where.nonzero().to(self.end) / (len(where) - 1) - 1) * self.end
        jacobian = (self.scale * t.cosh()).log().sum(1)
        log_p = log_prob(self.centre + self.scale * t.sinh()).to(jacobian)
        return (log_p + jacobian).exp().cpu()

    def holding(self, samples: Tensor, n: int) -> Tensor:
        """Marks the nodes nearest to samples in a grid of n^d nodes, (n, ...) bool."""
        u = torch.asinh((samples.double() - self.centre) / self.scale) / self.end
        index = ((u + 1) / 2 * (n - 1)).round().long().clamp(0, n - 1).cpu()
        held = torch.zeros((n,) * samples.shape[1], dtype=torch.bool)
        held[tuple(index.T)] = True
        return held

    def integral(self, values: Tensor) -> float:
        """Computes int p dx from values (n, ...) at all nodes by the trapezoidal rule.

        The weight 1/2 at the ends is ignored, because p is negligible there.
        """
        return float(values.sum()) * self.cell(len(values))

    def cell(self, n: int) -> float:
        """Returns the cell volume dt in a grid of n^d nodes."""
        return float((2 * self.end / (n - 1)).prod())


def remaining_error(changes: list[float]) -> float:
    """Estimates the error of an integral after doublings of the grid that changed it by c_1, ..., c_k (`changes`).

    The estimate is c_k q / (1 - q) with q = c_k / c_(k-1): the remainder of a geometric series with the ratio of the
    last two changes (Aitken 1926). The estimate is exact for a rule of any order, and too large if the rule converges
    geometrically.
    """
    last = changes[-1]
    if len(changes) < 2 or not last < changes[-2]:
        return last
    return last * last / (changes[-2] - last)


def _near(coarse: Tensor) -> Tensor:
    """Marks the nodes of the doubled grid that are marked in the grid of n^d nodes or lie next to such a node."""
    d = coarse.dim()
    marked = torch.zeros([2 * n - 1 for n in coarse.shape])
    marked[(slice(None, None, 2),) * d] = coarse.float()
    pool = F.max_pool1d if d == 1 else F.max_pool2d
    return pool(marked[None, None], 5, stride=1, padding=2)[0, 0] > 0


# Limit of the RMS of x - forward(inverse(x)) divided by the standard deviation of x, in the worst column
ROUND_TRIP = 1e-2
# Limit of differences between log-determinants, as a fraction of 1 + |log det|, by whether ODEs are solved
LOG_DET = {False: 1e-6, True: 2e-4}
# Tolerances at which checks solve ODEs. With TIGHT, solver errors are negligible. TIGHT_MANY is for samples too large
# for a Jacobian. Their solves are slower, and their log-determinants are thousands of nats
TIGHT, TIGHT_MANY = 1e-7, 1e-5
# Relative rounding error of an NLL that is accepted in float32. Its epsilon is 1.2e-7, and couplings amplify the error
ROUNDED = 1e-5
# If a map passes these checks, its density integrates to 1
IMPLY_MASS = ("log-det", "round trip", "own samples")
# Tolerance of the solves for the mass, which needs only three digits
LOOSE = 1e-4
# Largest number of field evaluations in a solve of a check. A check that needs more is left out
MAX_NFE = 10_000
# Largest number of columns for which Jacobians are computed, by whether ODEs are solved. ODEs need a solve per column
MOST_COLUMNS = {False: 1024, True: 128}
# Number of contexts at which the mass of a flow with context columns is computed
MASS_CONTEXTS = 3
# Number of samples that show where the mass is, and largest number of rows in a tight solve
SAMPLES, ROWS = 2000, 100
# Largest tolerated bias in nats of a comparison of two flows: a constant, plus a part for each column
PAIRED, PAIRED_PER_COLUMN = 0.01, 1e-4


def checks(
    flow: Density,
    subset: Subset,
    budget: Budget,
    log_p: Tensor,
    kl: tuple[float | None, float | None],
    weights: Tensor | None = None,
) -> list[Check]:
    """Makes all checks of a flow in evaluation mode. The message of a check that was not made gives the reason.

    For an ensemble, checks of a map are made for each member. The worst of these checks is returned with the name of
    the member.

    Args:
        subset: rows for the checks that need data.
        budget: the error budget of the NLL.
        log_p: log densities of the rows that the subset is drawn from, (n,).
        kl: the KL and its standard error in nats, or (None, None).
        weights: the weights of the rows of `log_p`, (n,), or None.
    """
    nll, nll_stderr = -float(average(log_p, weights)), stderr(log_p, weights)
    # The mass needs three digits: float32 is enough, and twice as fast, unless the flow has large rounding errors
    rounded = torch.float64 if (budget.precision or 0.0) > SMALL else flow.like.dtype
    return make_checks(
        {
            "solver": lambda: check_solver(flow, budget, nll_stderr),
            "precision": lambda: check_precision(flow, budget, nll, nll_stderr),
            **map_checks(flow, reference(flow), subset, rounded),
            "KL": lambda: check_kl(kl),
        }
    )


def map_checks(
    flow: Density, exact: Density, subset: Subset, dtype: torch.dtype
) -> dict[str, Callable[[], Check | None]]:
    """Returns checks of the map and the density of a flow by name, as functions without arguments.

    Args:
        exact: the result of `reference`.
        dtype: the dtype in which the mass is computed.
    """
    drawn = cache(base_round_trip)
    return {
        "mass": lambda: check_mass(reference(flow, LOOSE).to(dtype), spread_contexts(flow, subset.context)),
        "log-det": lambda: check_each_map(exact, "log-det", lambda one: check_log_det(one, subset)),
        "round trip": lambda: check_each_map(
            exact, "round trip", lambda one: check_round_trip(one, subset, drawn(one))
        ),
        "own samples": lambda: check_each_map(exact, "own samples", lambda one: check_own_samples(one, drawn(one))),
    }


def make_checks(made: Mapping[str, Callable[[], Check | None]]) -> list[Check]:
    """Makes checks, and leaves out checks that do not apply. A failed mass is ignored if the checks of the map pass."""
    found = {name: check for name, make in made.items() if (check := _made(name, make)) is not None}
    if "mass" in found and found["mass"].passed is False and all(found[name].passed for name in IMPLY_MASS):
        why = f"the grid missed mass: the checks {', '.join(IMPLY_MASS)} passed, so the density integrates to 1"
        found["mass"] = replace(found["mass"], passed=None, message=why)
    return list(found.values())


def _made(name: str, make: Callable[[], Check | None]) -> Check | None:
    try:
        with status(name):
            return make()
    except SolverError as e:
        return Check(name, None, None, None, f"an ODE could not be solved for this check: {e}")


def check_each_map(density: Density, name: str, make: Callable[[Flow], Check]) -> Check | None:
    """Makes a check of a flow. For an ensemble, returns the worst check of a member, with the name of the member."""
    if not isinstance(density, Ensemble):
        return make(density.flows[0])
    worst: Check | None = None
    for member, flow in zip(density.active_names, density.flows, strict=True):
        check = _made(name, partial(make, flow))
        if check is not None and (worst is None or _badness(check) > _badness(worst)):
            words = "the worst of the members" if check.passed else check.message
            worst = replace(check, message=f"{member}: {words}")
    return worst


def _badness(check: Check) -> tuple[bool, bool, float]:
    """Returns a sort key: failed checks are the worst, then checks that were not made, then by value / limit."""
    share = check.value / check.limit if check.value is not None and check.limit else 0.0
    return check.passed is False, check.passed is None, share if math.isfinite(share) else math.inf


AnyDensity = TypeVar("AnyDensity", bound=Density)


def reference(flow: AnyDensity, rtol: float | None = None) -> AnyDensity:
    """Returns a copy of the flow in float64, with a tight dopri5 solver and, for few columns, an exact trace.

    Checks with this copy do not depend on errors of a coarse solver, of rounding, or of trace noise.
    """
    exact = copy.deepcopy(flow).double()
    few = math.prod(flow.event_shape) <= MOST_COLUMNS[True]
    for part in exact.ode_blocks:
        part.solver = ode_solver("dopri5", rtol=rtol or (TIGHT if few else TIGHT_MANY), max_nfe=MAX_NFE)
        if few:
            part.trace = replace(part.trace, evaluate="exact")
    return exact


def check_solver(flow: Density, budget: Budget, nll_stderr: float) -> Check | None:
    """Checks the solver error of the NLL: training can exploit errors of a coarse solver."""
    if flow.solver is None:
        return None
    value = solver_bias(budget.solver, budget.embedded)
    words = f"the NLL changes by about {value:.2g} nats if the tolerance of the solver is tightened tenfold"
    if math.isnan(budget.solver):
        words = "the ODE cannot be solved with a tolerance ten times as tight"
    return check_limit(
        "solver",
        value,
        largest_bias(flow, nll_stderr),
        f"{words}, so the NLL is not reliable. Evaluate and train with a smaller solver.rtol (or solver.step_size)",
    )


def check_precision(flow: Density, budget: Budget, nll: float, nll_stderr: float) -> Check | None:
    """Checks that rounding does not change the displayed digits of the NLL.

    Args:
        nll: the NLL of the rows that the budget is measured on.
    """
    if budget.precision is None:
        return None
    # float32 has about 7 digits, so it cannot keep the decimals of an NLL of 1e6 nats
    limit = max(largest_bias(flow, nll_stderr), ROUNDED * abs(nll))
    words = f"the NLL of {nll:.6g} nats changes by {budget.precision:.2g} nats in float64"
    cause = "" if budget.precision > abs(nll) else ". Rounding does not explain the size of the NLL"
    return check_limit(
        "precision",
        budget.precision,
        limit,
        f"{words}, because float32 loses these digits. Evaluate with dtype=float64{cause}",
    )


def largest_bias(flow: Density, nll_stderr: float) -> float:
    """Returns the largest tolerated bias of the NLL in nats: a tenth of the sampling error, which hides a smaller bias.

    The bias is at most PAIRED plus PAIRED_PER_COLUMN for each column, because the sampling error cancels in the
    difference of two flows on the same rows (as in a KL).
    """
    most = PAIRED + PAIRED_PER_COLUMN * math.prod(flow.event_shape)
    return max(SMALL, min(nll_stderr / 10, most)) if math.isfinite(nll_stderr) else SMALL


def spread_contexts(flow: Density, context: Tensor | None) -> Tensor | None:
    """Returns contexts (MASS_CONTEXTS, k) from the rows of `context` (n, k), spread over the range of its first column.

    Returns None for a flow without context columns.
    """
    if not flow.context or context is None:
        return None
    order = context[context[:, 0].argsort(stable=True)]
    shares = torch.linspace(0.1, 0.9, MASS_CONTEXTS, dtype=context.dtype, device=context.device)
    return order[(shares * (len(order) - 1)).round().long()]


def check_mass(exact: Density, contexts: Tensor | None = None) -> Check | None:
    """Checks that p integrates to 1, for one or two columns.

    A flow with `levels` is not checked, because some mass is outside of them. A flow with circular columns without
    types is not checked, because its circles are unknown. For a flow with context columns, p(x | c) is integrated over
    x for each of the contexts c (m, k), and the mass that is farthest from 1 is returned.
    """
    if len(exact.event_shape) != 1 or exact.event_shape[0] > 2 or exact.levels is not None:
        return None
    if any(flow.base.circular for flow in exact.flows) and not exact.types:
        return None
    each = [measured_mass(exact)] if contexts is None else [measured_mass(exact, c) for c in contexts.unsqueeze(1)]
    misses = [abs(1 - one.value) if math.isfinite(one.value) else math.inf for one in each]
    worst = misses.index(max(misses))
    found, miss = each[worst], misses[worst]
    at = "" if contexts is None else f" at {context_text(exact.context, contexts[worst].tolist())}"
    where = f"p{at} integrates to {found.value:.4f}"
    if not math.isfinite(miss):
        return Check("mass", None, MISS, None, f"{where}: log p is not finite everywhere on the grid")
    if found.error >= ENOUGH and MISS <= miss < 10 * found.error:
        words = f"{where} +- {found.error:.1g} on {found.points:,} points, which are too few for this density"
        return Check("mass", miss, MISS, None, words)
    wrong = f"{where} instead of 1: the log-determinant is wrong, or the map is not one-to-one"
    return check_limit("mass", miss, MISS, wrong)


def measured_mass(flow: Density, context: Tensor | None = None) -> Mass:
    """Computes int p(x) dx of a flow over one or two columns.

    For a flow with labels, p is the `marginal`. A flow with context columns needs one context (1, k). If columns have
    types, the integral is over their supports: int p(x(y)) |dx/dy| dy with y on the real line. A circle is integrated
    as an interval.
    """
    of = marginal if context is None else partial(_conditional, context=context)
    low, high = zip(*(one.support for one in flow.types), strict=True) if flow.types else ([], [])
    support = ToSupport(low, high).to(flow.like.device) if flow.types else None

    @torch.no_grad()
    def log_prob(y: Tensor) -> Tensor:
        x, log_slope = (y, torch.zeros_like(y[:, 0])) if support is None else support(y)
        parts = torch.split(x, rows_at_a_time(flow.event_shape))
        return torch.cat([of(flow, part) for part in parts]) + log_slope

    with seeded(0, flow.like.device):
        samples = flow.sample(SAMPLES, context=context)
        samples = samples if support is None else support.map_inverse(samples.double())
        return mass(log_prob, samples, max(reach_of(one.base) for one in flow.flows))


def _conditional(flow: Density, x: Tensor, context: Tensor) -> Tensor:
    return flow.log_prob(x, context)


def reach_of(base: Base) -> float:
    """Returns the extent of the grid as a multiple of the extent of the samples.

    For a Student t base, P(|z| > r) decreases as r^-nu, and a Lipschitz map preserves nu.
    """
    return max(REACH, LEFT_OUT ** (-1 / float(base.df.detach().min()))) if isinstance(base, StudentT) else REACH


def check_log_det(exact: Flow, subset: Subset) -> Check:
    """Checks log|det dz/dx| against the Jacobian of `inverse` by autograd."""
    d, most = math.prod(exact.event_shape), MOST_COLUMNS[bool(exact.ode_blocks)]
    if d > most:
        return Check("log-det", None, None, None, f"{d} columns are too many for a Jacobian (at most {most})")
    rows, share = max(1, min(ROWS, 1000 // d)), LOG_DET[bool(exact.ode_blocks)]
    x, context = subset.x[:rows].double(), None if subset.context is None else subset.context[:rows]
    with torch.no_grad(), seeded(0, x.device):
        log_p, z = exact.log_prob_and_latents(x, context)
        log_det = log_p - exact.base_log_prob(z, exact.features(context))
    try:
        # one matrix at a time, because torch 2.13 with oneMKL on several threads factorizes batches of large matrices
        # wrongly
        expected = torch.stack([torch.linalg.slogdet(one).logabsdet for one in jacobians(exact, x, context)])
    except RuntimeError as e:
        why = f"the derivative of the inverse could not be computed: {first_line(e)}"
        return Check("log-det", None, None, None, why)
    return check_limit(
        "log-det",
        upper_quartile((log_det - expected).abs() / (1 + expected.abs())),
        share,
        f"the mean of log|det dz/dx| over {rows} rows is {float(log_det.mean()):.4f} nats, but the Jacobian of the "
        f"inverse gives {float(expected.mean()):.4f}: the log-determinant is wrong",
    )


def jacobians(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """Computes dz/dx of z = inverse(x), (B, d, d), by reverse-mode autograd with d copies of each row of x."""
    flat = x.flatten(1)
    n, d = flat.shape
    copies = flat.repeat_interleave(d, 0)
    contexts = None if context is None else context.repeat_interleave(d, 0)
    cotangents = torch.eye(d, dtype=x.dtype, device=x.device).repeat(n, 1)
    size = max(1, rows_at_a_time(flow.event_shape) // 4)
    rows = []
    with status("Jacobians", total=len(copies), unit="row") as progress:
        for i in range(0, len(copies), size):
            part = copies[i : i + size].requires_grad_(True)
            with torch.enable_grad(), seeded(0, x.device):
                z = flow.inverse(part.view(-1, *x.shape[1:]), None if contexts is None else contexts[i : i + size])
                (gradient,) = torch.autograd.grad(z.flatten(1), part, cotangents[i : i + size])
            rows.append(gradient)
            progress.advance(len(part))
    return torch.cat(rows).view(n, d, d)


@dataclass(frozen=True)
class BaseRoundTrip:
    """The round trip of base samples z: mapped to samples x by `forward`, and back by `inverse`.

    Attributes:
        base: the base for the context of the rows.
        z: draws from the base, (B, *event_shape).
        again: inverse(forward(z)), (B, *event_shape).
        log_det: log|det dx/dz| from `forward`, (B,).
        log_p: log p(x) of the samples, from `inverse`, (B,).
    """

    base: Base
    z: Tensor
    again: Tensor
    log_det: Tensor
    log_p: Tensor


@torch.no_grad()
def base_round_trip(exact: Flow) -> BaseRoundTrip:
    """Maps draws of the base to samples and back, with the same trace probes, for `Density.some_context`."""
    rows, like = min(ROWS, rows_of_checks(exact.event_shape)), exact.like
    context = exact.some_context(rows)
    base = exact.base.given(exact.features(context))
    with seeded(0, like.device):
        z = base.sample(rows, like=like)
    with seeded(1, like.device):
        x, log_det = exact.bijection.forward(z, exact.features(context))
    with seeded(1, like.device):
        log_p, again = exact.log_prob_and_latents(x, context)
    return BaseRoundTrip(base, z, again, log_det, log_p)


@torch.no_grad()
def check_round_trip(exact: Flow, subset: Subset, drawn: BaseRoundTrip) -> Check:
    """Checks forward(inverse(x)) = x on the data, and inverse(forward(z)) = z on most draws from the base."""
    x, context = subset.x[:ROWS].double(), None if subset.context is None else subset.context[:ROWS]
    with seeded(0, x.device):
        back = exact(exact.inverse(x, context), context)
    flat, off = x.flatten(1), differences(exact.types, x, back).flatten(1)
    spread = flat.std(0, correction=0)
    # the error of a column that is constant in these rows is not divided by its standard deviation
    miss = float((off.square().mean(0).sqrt() / torch.where(spread > 0, spread, 1.0)).max())
    miss = max(miss, upper_quartile((drawn.again - drawn.z).flatten(1).abs().amax(1)))
    return check_limit(
        "round trip",
        miss,
        ROUND_TRIP,
        f"forward and inverse miss a point by {miss:.2g} standard deviations of a column: the map is not invertible, "
        "or forward and inverse do not belong to the same map",
    )


def check_own_samples(exact: Flow, drawn: BaseRoundTrip) -> Check:
    """Checks log p(x) of the flow's own samples x = forward(z) against log p0(z) - log|det dx/dz|."""
    # The log density of the base is computed by a second formula, because this check also tests the base
    of_base = log_prob_by_formula(drawn.base, drawn.z)
    if of_base is None:
        why = f"there is no second formula for the density of the base {type(exact.base).__name__} to compare with"
        return Check("own samples", None, None, None, why)
    implied = of_base - drawn.log_det
    gap = drawn.log_p - implied
    limit = LOG_DET[bool(exact.ode_blocks)] * (1 + float(drawn.log_det.abs().mean()))
    if estimates_trace(exact):
        value, limit = float(gap.mean().abs()), limit + 4 * stderr(gap)
    else:
        # The quantile ignores the few samples without a valid log p, which float64 rounds to the edge of the range of
        # the data
        value = upper_quartile(gap.abs())
    return check_limit(
        "own samples",
        value,
        limit,
        f"the entropy of the flow's own samples is {-float(drawn.log_p.mean()):.4f} nats by log p (inverse), but "
        f"{-float(implied.mean()):.4f} by the log-determinant of forward: one of the two log-determinants, or the "
        "density of the base, is wrong",
    )


@torch.no_grad()
def log_prob_by_formula(base: Base, z: Tensor) -> Tensor | None:
    """Computes log p0(z), (B,), of z (B, *event_shape) without `base.log_prob`; None for a base of the user."""
    if isinstance(base, StandardNormal):
        return (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1)
    if isinstance(base, NormalUniform):
        terms = torch.where(base.is_circular, 0.0, -0.5 * z.square()) - 0.5 * math.log(2 * math.pi)
        return terms.sum(1) - 0.5 * len(base.circular) * math.log(2 * math.pi)
    formula: Any
    if isinstance(base, GaussianMixture | MixtureOfRows):
        parts = D.MultivariateNormal(base.means, scale_tril=base.scale_tril)
        formula = D.MixtureSameFamily(D.Categorical(logits=base.logits), parts)
    elif isinstance(base, StudentT):
        formula = D.Independent(D.StudentT(base.df.flatten()), 1)
    elif isinstance(base, UniformBox):
        # without validation, a point outside the box gives -inf instead of an error
        formula = D.Independent(D.Uniform(base.low.flatten(), base.high.flatten(), validate_args=False), 1)
    else:
        return None
    log_p: Tensor = formula.log_prob(z.flatten(1))
    return log_p


def upper_quartile(error: Tensor) -> float:
    """Returns the 75% quantile of errors (B,): rounding may affect a few rows, but a wrong map affects most rows."""
    return float(torch.quantile(error, 0.75))


def check_kl(kl: tuple[float | None, float | None]) -> Check | None:
    """Checks that the KL is not negative beyond its error."""
    value, error = kl
    if value is None or error is None or not math.isfinite(error):
        return None
    return check_limit(
        "KL",
        max(0.0, -value),
        max(3 * error, SMALL),
        f"the KL is {value:.2g}, negative beyond its error, which is impossible for a density: log p of this flow is "
        "wrong",
    )


def check_limit(name: str, value: float, limit: float, cause: str) -> Check:
    """Compares a value with its limit. A value that is not finite fails."""
    passed = math.isfinite(value) and value <= limit
    return Check(name, value, limit, passed, None if passed else cause)
