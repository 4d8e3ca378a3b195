"""Ways in which a density can be found to be none: each measures one thing and names one cause."""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from flowtrain.errors import SolverError
from flowtrain.evaluation.budget import SMALL, Subset, rows_of_checks
from flowtrain.evaluation.mass import ENOUGH, Mass, mass
from flowtrain.evaluation.result import Budget, Check
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.scores import estimates_trace, marginal
from flowtrain.seeding import seeded
from flowtrain.solvers import ode_solver

# of |1 - int p|
MASS = 1e-3
# of the RMS of x - forward(inverse(x)) over the spread of x, solved tightly in float64
ROUND_TRIP = 1e-2
# of mean differences between log-determinants, in nats, as a share of 1 + mean |log det|, by whether ODEs are solved
LOG_DET = {False: 1e-6, True: 2e-4}
# tolerance of the solves that checks compare, so that what differs is not the solver's; and over images, which take
# longer and where a log-determinant is of thousands of nats
TIGHT, TIGHT_IMAGES = 1e-7, 1e-5
# that of a density which needs no more than three digits
LOOSE = 1e-4
# numbers of columns up to which a Jacobian is taken: continuous flows need a solve for each
MOST_COLUMNS = {False: 1024, True: 128}
# samples of the flow that say where its mass lies, and rows that a tight solve takes
SAMPLES, ROWS = 2000, 100


def checks(
    flow: Flow, subset: Subset, budget: Budget, nll_stderr: float, kl: tuple[float, float] | None
) -> list[Check]:
    """All the checks of a flow in evaluation mode.

    Args:
        kl: and its standard error, where the true density is known.
    """
    exact = reference(flow)
    found = [of_solver(flow, budget, nll_stderr), of_precision(flow, budget, nll_stderr)]
    found += [of_mass(flow), of_log_det(exact, subset), of_round_trip(exact, subset), of_samples(exact)]
    return [check for check in [*found, of_kl(kl)] if check is not None]


def reference(flow: Flow) -> Flow:
    """The flow in float64, solved tightly by dopri5 and with an exact trace where that can be had."""
    exact = copy.deepcopy(flow).double()
    few = math.prod(flow.event_shape) <= MOST_COLUMNS[True]
    for part in exact.continuous:
        part.solver = ode_solver("dopri5", rtol=TIGHT if few else TIGHT_IMAGES, max_nfe=1_000_000)
        if few:
            part.trace = replace(part.trace, evaluate="exact")
    return exact


def of_solver(flow: Flow, budget: Budget, nll_stderr: float) -> Check | None:
    """Is the likelihood the solver's doing? A field can learn to please a coarse one."""
    if flow.solver is None:
        return None
    return judged(
        "solver",
        budget.solver,
        hidden(flow, nll_stderr),
        f"the NLL changes by {budget.solver:.2g} nats when the solver's tolerance is tightened tenfold: it is not to "
        "be trusted. Evaluate with a smaller solver.rtol (or solver.step_size), and train with it",
    )


def of_precision(flow: Flow, budget: Budget, nll_stderr: float) -> Check | None:
    """Does rounding reach the digits that are shown?"""
    if budget.precision is None:
        return None
    return judged(
        "precision",
        budget.precision,
        hidden(flow, nll_stderr),
        f"the NLL changes by {budget.precision:.2g} nats in float64: rounding decides it. Evaluate with dtype=float64",
    )


def hidden(flow: Flow, nll_stderr: float) -> float:
    """A bias that the sampling error hides and that would not be seen in a paired difference (a KL) either."""
    most = SMALL * (10 + 0.1 * math.prod(flow.event_shape))
    return max(SMALL, min(nll_stderr / 10, most)) if math.isfinite(nll_stderr) else SMALL


def of_mass(flow: Flow) -> Check | None:
    """Does p integrate to 1? Of one or two columns."""
    if len(flow.event_shape) != 1 or flow.event_shape[0] > 2:
        return None
    try:
        found = measured_mass(flow)
    except SolverError as e:
        return Check("mass", None, MASS, None, f"the solver failed on the grid: {e}")
    miss = abs(1 - found.value)
    if found.error >= ENOUGH and MASS <= miss < 10 * found.error:
        words = (
            f"p integrates to {found.value:.4f} +- {found.error:.1g} on {found.points} points: it is too fine for them"
        )
        return Check("mass", miss, MASS, None, words)
    return judged(
        "mass",
        miss,
        MASS,
        f"p integrates to {found.value:.4f} and not to 1: its log-determinant is wrong, or the map is not one to one",
    )


def measured_mass(flow: Flow) -> Mass:
    """int p(x) dx of a flow over vectors of one or two columns, of a conditional one with all classes equally likely.

    Of the density that is reported, but for two things: traces are exact, since the noise of an estimated log p would
    pass for mass, and tolerances no tighter than three digits need.
    """
    flow = copy.deepcopy(flow)
    for part in flow.continuous:
        part.trace = replace(part.trace, evaluate="exact")
        part.solver.rtol, part.solver.atol = max(part.solver.rtol, LOOSE), max(part.solver.atol, LOOSE)

    @torch.no_grad()
    def log_prob(x: Tensor) -> Tensor:
        return torch.cat([marginal(flow, part) for part in torch.split(x, rows_at_a_time(flow.event_shape))])

    with seeded(0, flow.like.device):
        return mass(log_prob, flow.sample(SAMPLES))


def of_log_det(exact: Flow, subset: Subset) -> Check:
    """Is log|det dz/dx| that of the Jacobian, which autograd takes through `inverse`?"""
    d, most = math.prod(exact.event_shape), MOST_COLUMNS[bool(exact.continuous)]
    if d > most:
        return Check("log-det", None, None, None, f"a Jacobian of {d} columns, which are too many (at most {most})")
    rows, share = max(1, min(ROWS, 1000 // d)), LOG_DET[bool(exact.continuous)]
    x, label = subset.x[:rows].double(), None if subset.label is None else subset.label[:rows]
    with torch.no_grad(), seeded(0, x.device):
        log_p, z = exact.located(x, label)
        log_det = log_p - exact.base_log_prob(z)
    try:
        expected = torch.linalg.slogdet(jacobians(exact, x, label)).logabsdet
    except RuntimeError as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        return Check("log-det", None, None, None, f"there is no derivative of the inverse to compare with: {first}")
    return judged(
        "log-det",
        float((log_det - expected).abs().mean()),
        share * (1 + float(expected.abs().mean())),
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
    for i in range(0, len(copies), size):
        part = copies[i : i + size].requires_grad_(True)
        with torch.enable_grad(), seeded(0, x.device):
            z = flow.inverse(part.view(-1, *x.shape[1:]), None if labels is None else labels[i : i + size])
            (gradient,) = torch.autograd.grad(z.flatten(1), part, cotangents[i : i + size])
        rows.append(gradient)
    return torch.cat(rows).view(n, d, d)


@torch.no_grad()
def of_round_trip(exact: Flow, subset: Subset) -> Check:
    """Is forward the inverse of inverse?"""
    x, label = subset.x[:ROWS].double(), None if subset.label is None else subset.label[:ROWS]
    with seeded(0, x.device):
        back = exact(exact.inverse(x, label), label)
    spread = float(x.std()) if x.numel() > 1 else 0.0
    miss = float((x - back).square().mean().sqrt()) / (spread or 1.0)
    return judged(
        "round trip",
        miss,
        ROUND_TRIP,
        f"forward(inverse(x)) misses x by {miss:.2g} of its spread: the map is not invertible there, or forward and "
        "inverse are not those of one map",
    )


@torch.no_grad()
def of_samples(exact: Flow) -> Check:
    """Does log p of the flow's own samples agree with the entropy that they imply, E[log|det dx/dz| - log N(z)]?"""
    rows, like = min(ROWS, rows_of_checks(exact.event_shape)), exact.like
    label = None if exact.classes is None else exact.in_turn(rows)
    with seeded(0, like.device):
        z = torch.randn(rows, *exact.event_shape, dtype=like.dtype, device=like.device)
    with seeded(1, like.device):
        x, log_det = exact.bijection.forward(z, label)
    with seeded(1, like.device):
        log_p = exact.log_prob(x, label)
    implied = exact.base_log_prob(z) - log_det
    gap = log_p - implied
    noise = 4 * float(gap.std()) / rows**0.5 if estimates_trace(exact) else 0.0
    limit = LOG_DET[bool(exact.continuous)] * (1 + float(log_det.abs().mean())) + noise
    return judged(
        "own samples",
        abs(float(gap.mean())),
        limit,
        f"on its own samples the flow has an entropy of {-float(log_p.mean()):.4f} nats by log p, and of "
        f"{-float(implied.mean()):.4f} by how forward spreads them: one of the two log-determinants is wrong",
    )


def of_kl(kl: tuple[float, float] | None) -> Check | None:
    """Is the KL negative beyond its error?"""
    if kl is None or not math.isfinite(kl[1]):
        return None
    value, error = kl
    return judged(
        "KL",
        max(0.0, -value),
        max(3 * error, SMALL),
        f"the KL is {value:.2g}, negative beyond its error, which no density can be: log p of this flow is wrong",
    )


def judged(name: str, value: float, limit: float, cause: str) -> Check:
    """A value against its limit; NaN is beyond any."""
    passed = value <= limit
    return Check(name, value, limit, passed, None if passed else cause)
