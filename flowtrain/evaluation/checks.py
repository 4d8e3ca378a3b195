"""Checks that a density is valid and its likelihood accurate: each measures one thing and names one cause."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

from flowtrain.bases import Base, GaussianMixture, StandardNormal, StudentT, UniformBox
from flowtrain.evaluation.error_budget import SMALL, Subset, rows_of_checks, solver_bias, stderr
from flowtrain.evaluation.log_likelihood import estimates_trace, marginal
from flowtrain.evaluation.result import Budget, Check
from flowtrain.flow import Density, Flow, rows_at_a_time
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import SolverError, first_line
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status

# what a density may miss 1 by, and the grid's own error below that
MISS, ENOUGH = 1e-3, 7e-4
# points that are evaluated at most, but for the last doubling, and nodes to a side, by the number of columns
MOST_POINTS, SIDE = 70_000, {1: 2**17 + 1, 2: 2**11 + 1}
FIRST_SIDE = {1: 257, 2: 33}
# how much farther than its samples the grid reaches
REACH = 1.5
# of the mass beyond the farthest of the samples, the share that heavy tails may leave beyond the grid
LEFT_OUT = 1 / 20
# mass at a node below which its neighbours are left out of the next grid: all of them together are nothing
NO_MASS = 1e-9


@dataclass(frozen=True)
class Mass:
    """The integral, an estimate of the grid's error, and its points."""

    value: float
    error: float
    points: int


def mass(log_prob: Callable[[Tensor], Tensor], samples: Tensor, reach: float = REACH) -> Mass:
    """int exp(log_prob(x)) dx for x (B, d), d 1 or 2, by the trapezoidal rule over x_j = c_j + s_j sinh(t_j).

    On smooth densities the rule converges geometrically (Trefethen and Weideman 2014, The exponentially convergent
    trapezoidal rule); sinh takes a few far samples in at little cost to the middle. A doubled grid holds the old one,
    whose values are not computed again, and has points only where that found mass nearby or a sample lies. An integral
    of 1 ends it as soon as its error is small; another one may be that of a grid which has missed a mode, and is
    believed only after as many points as there may be.

    Args:
        log_prob: (B, d) -> (B,) in nats.
        samples: (n, d) from the density, which say where it lies.
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
        error = left_after(changes)
        # the next doubling has about 2^d times as many
        spent = points + 2 ** here.dim() * int(here.sum()) > MOST_POINTS or 2 * n - 1 > SIDE[here.dim()]
        if (error < ENOUGH and abs(1 - total) < MISS) or spent or not math.isfinite(total):
            return Mass(total, error, points)


@dataclass(frozen=True)
class Grid:
    """Nodes x_j = c_j + s_j sinh(e_j u_j), u an even grid over [-1, 1]^d."""

    centre: Tensor
    scale: Tensor
    end: Tensor

    @staticmethod
    def over(samples: Tensor, reach: float = REACH) -> "Grid":
        """One that reaches `reach` times as far from the median as the samples (n, d)."""
        x = samples.double()
        low, centre, high = torch.quantile(x, torch.tensor([0.16, 0.5, 0.84], dtype=x.dtype, device=x.device), dim=0)
        # twice the spread: the middle, where the mass is, has points at least as dense as an even grid's
        scale = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return Grid(centre, scale, torch.asinh(reach * ((x - centre).abs().amax(0) / scale).clamp_min(1.0)))

    def values(self, log_prob: Callable[[Tensor], Tensor], where: Tensor) -> Tensor:
        """p(x) dx/dt at the nodes that are marked, (n,), on the CPU."""
        t = (2 * where.nonzero().to(self.end) / (len(where) - 1) - 1) * self.end
        jacobian = (self.scale * t.cosh()).log().sum(1)
        log_p = log_prob(self.centre + self.scale * t.sinh()).to(jacobian)
        return (log_p + jacobian).exp().cpu()

    def holding(self, samples: Tensor, n: int) -> Tensor:
        """Of n^d nodes, those that are next to a sample, (n, ...) bool."""
        u = torch.asinh((samples.double() - self.centre) / self.scale) / self.end
        index = ((u + 1) / 2 * (n - 1)).round().long().clamp(0, n - 1).cpu()
        held = torch.zeros((n,) * samples.shape[1], dtype=torch.bool)
        held[tuple(index.T)] = True
        return held

    def integral(self, values: Tensor) -> float:
        """int p dx from values (n, ...) at all nodes, by the trapezoidal rule.

        Nothing is left at the ends, where its weights would be halves.
        """
        return float(values.sum()) * self.cell(len(values))

    def cell(self, n: int) -> float:
        """dt of one of n^d nodes."""
        return float((2 * self.end / (n - 1)).prod())


def left_after(changes: list[float]) -> float:
    """The error of an integral after doublings of the grid that changed it by `changes`, c_1 to c_k.

    c_k q / (1 - q) with q = c_k / c_(k-1): what is left of a series whose terms go on shrinking as the last two did
    (Aitken 1926). It is exact of a rule of any order, and too large where convergence is geometric.
    """
    last = changes[-1]
    if len(changes) < 2 or not last < changes[-2]:
        return last
    return last * last / (changes[-2] - last)


def _near(coarse: Tensor) -> Tensor:
    """Of a grid of n^d nodes, those of the doubled grid that lie next to a marked one, or on it."""
    d = coarse.dim()
    marked = torch.zeros([2 * n - 1 for n in coarse.shape])
    marked[(slice(None, None, 2),) * d] = coarse.float()
    pool = F.max_pool1d if d == 1 else F.max_pool2d
    return pool(marked[None, None], 5, stride=1, padding=2)[0, 0] > 0


# of the RMS of x - forward(inverse(x)) over the spread of x, in the column where it is largest
ROUNAnyDensityTRIP = 1e-2
# of differences between log-determinants, in nats, as a share of 1 + |log det|, by whether ODEs are solved
LOG_DET = {False: 1e-6, True: 2e-4}
# tolerance of the solves that checks compare, so that what differs is not the solver's; and of samples too large for a
# Jacobian, which take longer and have log-determinants of thousands of nats
TIGHT, TIGHT_MANY = 1e-7, 1e-5
# the relative rounding error of an NLL that float32 may cause: its epsilon is 1.2e-7, and couplings amplify it
ROUNDED = 1e-5
# a map that passes these has a density that integrates to 1
IMPLY_MASS = ("log-det", "round trip", "own samples")
GRID = "the grid has not found all of the mass"
# that of an integral which needs no more than three digits
LOOSE = 1e-4
# evaluations of the field that one of them may spend: a check that takes so long is not made
MAX_NFE = 10_000
# numbers of columns up to which a Jacobian is taken: continuous flows need a solve for each
MOST_COLUMNS = {False: 1024, True: 128}
# samples of the flow that say where its mass lies, and rows that a tight solve takes
SAMPLES, ROWS = 2000, 100
# nats of bias that a comparison of two flows can bear, and as many more for each column
PAIRED, PAIRED_PER_COLUMN = 0.01, 1e-4


def checks(
    flow: Density, subset: Subset, budget: Budget, log_p: Tensor, kl: tuple[float | None, float | None]
) -> list[Check]:
    """All the checks of a flow in evaluation mode; one that could not be made says why.

    Of an ensemble, those of a map are made of each member, and the worst is returned with the name of the member.

    Args:
        log_p: log densities of the rows that the subset is drawn from, (n,).
        kl: and its standard error, where the true density is known.
    """
    exact, nll, nll_stderr = reference(flow), -float(log_p.mean()), stderr(log_p)
    drawn = cache(drawn_from)
    # float32 is twice as fast, and does for three digits where rounding is not what is wrong
    rounded = torch.float64 if (budget.precision or 0.0) > SMALL else flow.like.dtype
    made: dict[str, Callable[[], Check | None]] = {
        "solver": lambda: of_solver(flow, budget, nll_stderr),
        "precision": lambda: of_precision(flow, budget, nll, nll_stderr),
        "mass": lambda: of_mass(reference(flow, LOOSE).to(rounded)),
        "log-det": lambda: of_maps(exact, "log-det", lambda one: of_log_det(one, subset)),
        "round trip": lambda: of_maps(exact, "round trip", lambda one: of_round_trip(one, subset, drawn(one))),
        "own samples": lambda: of_maps(exact, "own samples", lambda one: of_samples(one, drawn(one))),
        "KL": lambda: of_kl(kl),
    }
    found = {name: check for name, make in made.items() if (check := _made(name, make)) is not None}
    if "mass" in found and found["mass"].passed is False and all(found[name].passed for name in IMPLY_MASS):
        found["mass"] = replace(found["mass"], passed=None, message=f"{GRID}, for {', '.join(IMPLY_MASS)} are right")
    return list(found.values())


def _made(name: str, make: Callable[[], Check | None]) -> Check | None:
    try:
        with status(name):
            return make()
    except SolverError as e:
        return Check(name, None, None, None, f"the field could not be solved for it: {e}")


def of_maps(density: Density, name: str, make: Callable[[Flow], Check]) -> Check | None:
    """A check of a flow; of an ensemble, the worst of the checks of its members, with the name of the member."""
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
    """Orders checks: failed ones are the worst, then those that were not made, then by the share of the limit."""
    share = check.value / check.limit if check.value is not None and check.limit else 0.0
    return check.passed is False, check.passed is None, share if math.isfinite(share) else math.inf


AnyDensity = TypeVar("AnyDensity", bound=Density)


def reference(flow: AnyDensity, rtol: float | None = None) -> AnyDensity:
    """The flow in float64, solved tightly by dopri5 and with an exact trace where that can be had.

    A coarse solver, the rounding and the trace's noise thus stay out of what is checked by it.
    """
    exact = copy.deepcopy(flow).double()
    few = math.prod(flow.event_shape) <= MOST_COLUMNS[True]
    for part in exact.ode_blocks:
        part.solver = ode_solver("dopri5", rtol=rtol or (TIGHT if few else TIGHT_MANY), max_nfe=MAX_NFE)
        if few:
            part.trace = replace(part.trace, evaluate="exact")
    return exact


def of_solver(flow: Density, budget: Budget, nll_stderr: float) -> Check | None:
    """Is the likelihood the solver's doing? A field can learn to please a coarse one."""
    if flow.solver is None:
        return None
    value = solver_bias(budget.solver, budget.embedded)
    words = f"the NLL is off by about {value:.2g} nats for its tolerance (tightened tenfold, it changes so much)"
    if math.isnan(budget.solver):
        words = "the field cannot be solved with a tolerance ten times as tight"
    return judged(
        "solver",
        value,
        largest_bias(flow, nll_stderr),
        f"{words}: the NLL is not to be trusted. Evaluate with a smaller solver.rtol (or solver.step_size), and train "
        "with it",
    )


def of_precision(flow: Density, budget: Budget, nll: float, nll_stderr: float) -> Check | None:
    """Does rounding change the digits shown? `nll` is the NLL of the rows that the budget is measured on."""
    if budget.precision is None:
        return None
    # float32 has about 7 digits, so it cannot keep the decimals of an NLL of 1e6 nats
    limit = max(largest_bias(flow, nll_stderr), ROUNDED * abs(nll))
    words = f"the NLL of {nll:.6g} nats changes by {budget.precision:.2g} nats in float64"
    cause = "" if budget.precision > abs(nll) else ". Rounding does not explain the size of the NLL"
    return judged(
        "precision",
        budget.precision,
        limit,
        f"{words}: float32 rounds these digits away. Evaluate with dtype=float64{cause}",
    )


def largest_bias(flow: Density, nll_stderr: float) -> float:
    """A tenth of the sampling error, which hides it; but no more than PAIRED, because in the difference of two flows
    on the same points (as in a KL) that error cancels.
    """
    most = PAIRED + PAIRED_PER_COLUMN * math.prod(flow.event_shape)
    return max(SMALL, min(nll_stderr / 10, most)) if math.isfinite(nll_stderr) else SMALL


def of_mass(exact: Density) -> Check | None:
    """Does p integrate to 1? Of one or two columns; a logit lets some mass out of the range of its levels."""
    if len(exact.event_shape) != 1 or exact.event_shape[0] > 2 or exact.levels is not None:
        return None
    found = measured_mass(exact)
    miss = abs(1 - found.value)
    where = f"p integrates to {found.value:.4f}"
    if not math.isfinite(miss):
        return Check("mass", None, MISS, None, f"{where}: log p is not finite everywhere on the grid")
    if found.error >= ENOUGH and MISS <= miss < 10 * found.error:
        words = f"{where} +- {found.error:.1g} on {found.points} points, too few for so fine a density"
        return Check("mass", miss, MISS, None, words)
    wrong = f"{where} and not to 1: its log-determinant is wrong, or the map is not one to one"
    return judged("mass", miss, MISS, wrong)


def measured_mass(flow: Density) -> Mass:
    """int p(x) dx of a flow over one or two columns, of a conditional one its `marginal`."""

    @torch.no_grad()
    def log_prob(x: Tensor) -> Tensor:
        return torch.cat([marginal(flow, part) for part in torch.split(x, rows_at_a_time(flow.event_shape))])

    with seeded(0, flow.like.device):
        return mass(log_prob, flow.sample(SAMPLES), max(reach_of(one.base) for one in flow.flows))


def reach_of(base: Base) -> float:
    """How much farther than the samples of a flow the grid reaches.

    Of a Student t base P(|z| > r) falls as r^-nu, and a Lipschitz map keeps nu.
    """
    return max(REACH, LEFT_OUT ** (-1 / float(base.df.min()))) if isinstance(base, StudentT) else REACH


def of_log_det(exact: Flow, subset: Subset) -> Check:
    """Is log|det dz/dx| that of the Jacobian, which autograd takes through `inverse`?"""
    d, most = math.prod(exact.event_shape), MOST_COLUMNS[bool(exact.ode_blocks)]
    if d > most:
        return Check("log-det", None, None, None, f"a Jacobian of {d} columns, which are too many (at most {most})")
    rows, share = max(1, min(ROWS, 1000 // d)), LOG_DET[bool(exact.ode_blocks)]
    x, label = subset.x[:rows].double(), None if subset.label is None else subset.label[:rows]
    with torch.no_grad(), seeded(0, x.device):
        log_p, z = exact.log_prob_and_latents(x, label)
        log_det = log_p - exact.base_log_prob(z)
    try:
        # one by one: on several threads torch 2.13 with oneMKL factorizes batches of large matrices wrongly
        expected = torch.stack([torch.linalg.slogdet(one).logabsdet for one in jacobians(exact, x, label)])
    except RuntimeError as e:
        why = f"there is no derivative of the inverse to compare with: {first_line(e)}"
        return Check("log-det", None, None, None, why)
    return judged(
        "log-det",
        most_rows((log_det - expected).abs() / (1 + expected.abs())),
        share,
        f"over {rows} rows log|det dz/dx| is {float(log_det.mean()):.4f} nats in the mean, and by the Jacobian of the "
        f"inverse {float(expected.mean()):.4f}: the log-determinant is wrong",
    )


def jacobians(flow: Flow, x: Tensor, label: Tensor | None) -> Tensor:
    """dz/dx of z = inverse(x), (B, d, d), by reverse-mode autograd: each row of x d times, with one cotangent each."""
    flat = x.flatten(1)
    n, d = flat.shape
    copies = flat.repeat_interleave(d, 0)
    labels = None if label is None else label.repeat_interleave(d)
    cotangents = torch.eye(d, dtype=x.dtype, device=x.device).repeat(n, 1)
    size = max(1, rows_at_a_time(flow.event_shape) // 4)
    rows = []
    with status("Jacobians", total=len(copies), unit="row") as progress:
        for i in range(0, len(copies), size):
            part = copies[i : i + size].requires_grad_(True)
            with torch.enable_grad(), seeded(0, x.device):
                z = flow.inverse(part.view(-1, *x.shape[1:]), None if labels is None else labels[i : i + size])
                (gradient,) = torch.autograd.grad(z.flatten(1), part, cotangents[i : i + size])
            rows.append(gradient)
            progress.advance(len(part))
    return torch.cat(rows).view(n, d, d)


@dataclass(frozen=True)
class Drawn:
    """Draws z from the base through the flow and back.

    Attributes:
        z, again: (B, *event_shape), and what comes back.
        log_det: log|det dx/dz| by forward, (B,).
        log_p: log p(x) of the samples x by inverse, (B,).
    """

    z: Tensor
    again: Tensor
    log_det: Tensor
    log_p: Tensor


@torch.no_grad()
def drawn_from(exact: Flow) -> Drawn:
    """There and back with the same trace probes, of a conditional flow all classes in turn."""
    rows, like = min(ROWS, rows_of_checks(exact.event_shape)), exact.like
    label = None if exact.classes is None else exact.in_turn(rows)
    with seeded(0, like.device):
        z = exact.base.sample(rows, like=like)
    with seeded(1, like.device):
        x, log_det = exact.bijection.forward(z, label)
    with seeded(1, like.device):
        log_p, again = exact.log_prob_and_latents(x, label)
    return Drawn(z, again, log_det, log_p)


@torch.no_grad()
def of_round_trip(exact: Flow, subset: Subset, drawn: Drawn) -> Check:
    """Is forward the inverse of inverse, on the data, and inverse that of forward, on most draws from the base?"""
    x, label = subset.x[:ROWS].double(), None if subset.label is None else subset.label[:ROWS]
    with seeded(0, x.device):
        back = exact(exact.inverse(x, label), label)
    flat, off = x.flatten(1), (x - back).flatten(1)
    spread = flat.std(0, correction=0)
    # a column that is constant here is taken as it is
    miss = float((off.square().mean(0).sqrt() / torch.where(spread > 0, spread, 1.0)).max())
    miss = max(miss, most_rows((drawn.again - drawn.z).flatten(1).abs().amax(1)))
    return judged(
        "round trip",
        miss,
        ROUNAnyDensityTRIP,
        f"there and back misses a point by {miss:.2g} of a column's spread: the map is not invertible, or forward and "
        "inverse are not those of one map",
    )


def of_samples(exact: Flow, drawn: Drawn) -> Check:
    """Does log p of the flow's own samples agree with the entropy that they imply, E[log|det dx/dz| - log p0(z)]?"""
    # not by the flow's own base, which is looked at too
    of_base = log_prob_by_formula(exact.base, drawn.z)
    if of_base is None:
        why = f"there is no second formula for the density of the base, {type(exact.base).__name__}, to compare with"
        return Check("own samples", None, None, None, why)
    implied = of_base - drawn.log_det
    gap = drawn.log_p - implied
    limit = LOG_DET[bool(exact.ode_blocks)] * (1 + float(drawn.log_det.abs().mean()))
    if estimates_trace(exact):
        value, limit = float(gap.mean().abs()), limit + 4 * stderr(gap)
    else:
        # few samples that float64 rounds to the edge of what the data can be have no density left to compare
        value = most_rows(gap.abs())
    return judged(
        "own samples",
        value,
        limit,
        f"on its own samples the flow has an entropy of {-float(drawn.log_p.mean()):.4f} nats by log p, and of "
        f"{-float(implied.mean()):.4f} by how forward spreads the base: one of the two log-determinants, or the base "
        "density, is wrong",
    )


@torch.no_grad()
def log_prob_by_formula(base: Base, z: Tensor) -> Tensor | None:
    """log p0(z), (B,), of z (B, *event_shape) without `base.log_prob`; None of a base of another module."""
    if isinstance(base, StandardNormal):
        return (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1)
    formula: Any
    if isinstance(base, GaussianMixture):
        parts = D.MultivariateNormal(base.means, scale_tril=base.scale_tril)
        formula = D.MixtureSameFamily(D.Categorical(logits=base.logits), parts)
    elif isinstance(base, StudentT):
        formula = D.Independent(D.StudentT(base.df.flatten()), 1)
    elif isinstance(base, UniformBox):
        # the corners belong to the box
        formula = D.Independent(D.Uniform(base.low.flatten(), base.high.flatten(), validate_args=False), 1)
    else:
        return None
    log_p: Tensor = formula.log_prob(z.flatten(1))
    return log_p


def most_rows(error: Tensor) -> float:
    """What three in four rows (B,) are below: a few far out may be lost to rounding, a wrong map is wrong for most."""
    return float(torch.quantile(error, 0.75))


def of_kl(kl: tuple[float | None, float | None]) -> Check | None:
    """Is the KL negative beyond its error?"""
    value, error = kl
    if value is None or error is None or not math.isfinite(error):
        return None
    return judged(
        "KL",
        max(0.0, -value),
        max(3 * error, SMALL),
        f"the KL is {value:.2g}, negative beyond its error, which no density can be: log p of this flow is wrong",
    )


def judged(name: str, value: float, limit: float, cause: str) -> Check:
    """A value against its limit; what is not finite is beyond any."""
    passed = math.isfinite(value) and value <= limit
    return Check(name, value, limit, passed, None if passed else cause)
