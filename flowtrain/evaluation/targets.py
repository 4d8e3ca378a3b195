"""Evaluates a flow on a target, a density known up to a constant: log Z, its error, and the quality of the weights."""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowtrain.data.targets.base import FunctionTarget, Target
from flowtrain.data.types import ColumnType
from flowtrain.evaluation.checks import check_kl, check_limit, largest_bias, make_checks, map_checks, reference
from flowtrain.evaluation.error_budget import ACCURATE, COVERED, MAX_NFE, SMALL, Subset, mean_error, rows_of_checks
from flowtrain.evaluation.evaluate import UNSOLVED, in_evaluation_mode, roundtrip_error
from flowtrain.evaluation.log_likelihood import estimates_trace, nfe_of_pass, score_rows
from flowtrain.evaluation.log_weights import (
    BalancedWeights,
    WeightedSamples,
    balanced_weights,
    check_log_weights,
    weighted_samples,
)
from flowtrain.evaluation.pareto import weight_tail
from flowtrain.evaluation.result import Check
from flowtrain.evaluation.target_moves import Moved, moved_samples
from flowtrain.evaluation.target_result import LogZBudget, TargetEvaluation, TargetMember
from flowtrain.flow import Density, Flow, rows_at_a_time
from flowtrain.models.ensemble import Ensemble
from flowtrain.ode import Solver, ode_solver, record_solves
from flowtrain.utils.arguments import shortened, whole
from flowtrain.utils.errors import ConfigError, DataError, SolverError
from flowtrain.utils.formatting import counted
from flowtrain.utils.process import one_thread_if_small, own_settings, seeded
from flowtrain.utils.status import phase
from flowtrain.utils.weighting import effective_rows, stderr

log = logging.getLogger("flowtrain")

# largest Pareto k of reliable weights (Vehtari et al. 2024, section 3.2)
MOST_K = 0.7
# largest distance of log Z from the known value, in errors of log Z
SIGMAS = 3.0
# largest share of samples whose weights are NaN or +inf
MOST_LOST = 0.01
# the check `tails` fails only if samples in the tails add more than this to log Z, in nats
LEAST_MISSED = 0.01
# what to train with, for a flow that misses a part of the target that is connected with the rest
ADVICE = (
    "model=maf objective.anneal=0, for more steps, with objective=weighted_forward_kl, or with a wider initial "
    "distribution (target.scale)"
)
# a mode is found if its share of the samples is at least this fraction of its share of the mass
FOUND = 0.25
# largest number of modes, and largest number of distances that are computed at once
MOST_MODES, DISTANCES = 1000, 2**22
# largest number of samples for figures, of exact samples, and of samples of each member of an ensemble
SHOWN, EXACT, OF_MEMBER = 20_000, 10_000, 2000
# with `thorough=False`: samples of the error budget, and largest number of exact samples
FEW, FEW_EXACT = 50, 1000


def evaluate_target(
    flow: Density,
    target: Target | Callable[[Tensor], Tensor],
    n: int = 20_000,
    seed: int = 0,
    step: int | None = None,
    batch_size: int | None = None,
    thorough: bool = True,
    *,
    dtype: torch.dtype | None = None,
) -> TargetEvaluation:
    """Estimates log Z of a target p = p~ / Z by importance sampling from a flow q, with an error and checks.

    A sample x_i ~ q has the weight w_i = p~(x_i) / q(x_i), and log mean_i w_i estimates log Z. If q has almost no mass
    in a part of the target, no sample is in this part. Neither the weights nor their variance then show that the part
    is missing. The estimate of log Z therefore also uses n / 4 samples in the tails of the flow, see
    `flowtrain.evaluation.log_weights.balanced_weights`. ELBO, effective sample size (ESS) and Pareto k are computed
    from the n samples of the flow alone. The check `moves` moves samples of the flow by Hamiltonian Monte Carlo, see
    `flowtrain.evaluation.target_moves.moved_samples`.

    The error of log Z is the root of the sum of the squares of four parts:

    - sampling: the standard error of the mean of the weights, divided by Z (delta method)
    - tail: the share of Z from weights above the largest sampled weight, by a fitted Pareto distribution
      (`flowtrain.evaluation.pareto`). Without this part, the error is too small for weights with a heavy tail
    - solver, for a continuous flow: the change of log Z by a tight solve in float64 from the same base points
    - precision: the change of log Z by float64, from the same base points

    The last two parts are measured on a subset of the base points. The error is not reliable if k of the weights is
    above min(0.7, 1 - 1 / log10(n)). The check `pareto_k` then fails. Neither samples of q nor moves can show that q
    misses a distant mode. The known modes, log Z or exact samples of the target can show it.

    The trace of a continuous flow is computed exactly, because the exponential of an estimate of log q is biased. The
    state of the flow, the settings of torch and its random state do not change. The logger `flowtrain` logs failed
    checks as warnings.

    Args:
        flow: a flow or an ensemble.
        target: the target, which is moved to the device of the flow, or a function log p~(x) in nats, (B, d) -> (B,).
        n: the number of samples.
        seed: the seed of the samples.
        step: the training step in the report. None means the step of `flow.record`, or 0 without a record.
        batch_size: the number of samples that are computed at once. None means a number that depends on d.
        thorough: if False, the checks of the density of the flow are left out, the parts solver and precision are
            measured on 50 samples, and at most 1,000 exact samples are drawn.
        dtype: evaluates a copy of the flow in this dtype. None means the dtype of the flow.

    Raises:
        ConfigError: the flow is conditional, the flow and the target differ in the number of columns, or an argument is
            out of range.
        DataError: the log density of the target does not have the shape (B,).
        NonFiniteError: more than 1% of the weights are NaN or infinite, or all weights are 0.
        SolverError: an ODE solve of a sample fails.

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> from flowtrain.data.targets.base import FunctionTarget
        >>> normal = FunctionTarget(lambda x: -0.5 * x.square().sum(1), 2)
        >>> found = evaluate_target(Flow((2,), Affine(2)), normal, n=100)
        >>> round(found.log_z, 4), round(found.ess, 4)  # log(2 pi), equal weights
        (1.8379, 1.0)
    """
    whole("n", n, least=2)
    # seeds of `TargetData.seed_of` are larger than those that `whole` allows
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed={shortened(seed)}: give a whole number, at least 0 and below 2^63")
    if batch_size is not None:
        whole("batch_size", batch_size)
    if not isinstance(target, Target) and callable(target) and isinstance(flow, Density):
        target = FunctionTarget(target, math.prod(flow.event_shape), flow.types)
    check_fits_target(flow, target)
    assert isinstance(target, Target)
    if supports_of(target) != supports_of(flow):
        target = WithinSupport(target)
    if step is None:
        step = 0 if flow.record is None else flow.record.step
    if dtype is not None and dtype != flow.like.dtype:
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype={dtype}: give torch.float32 or torch.float64")
        flow = copy.deepcopy(flow).to(dtype)
    if estimates_trace(flow):
        flow = copy.deepcopy(flow)
        for block in flow.ode_blocks:
            block.trace = replace(block.trace, evaluate="exact")
    device = flow.like.device
    target.to(device)
    with own_settings(device), one_thread_if_small(flow.event_shape, device), in_evaluation_mode(flow), torch.no_grad():
        return _evaluate(flow, target, n, seed, step, batch_size, thorough)


def check_fits_target(flow: Any, target: Any) -> None:
    """Checks that a flow can be evaluated on a target.

    Raises:
        ConfigError: not a flow and a target, a conditional flow or a flow of whole numbers, different numbers of
            columns, or a column in which the flow has no samples in a part of the support of the target.
    """
    if not isinstance(flow, Density):
        raise ConfigError(f"flow={shortened(flow)}: give a Flow as the first argument, then the target")
    if not isinstance(target, Target):
        raise ConfigError(
            f"target={shortened(target)}: give a function log p~(x), or an object of flowtrain.data.targets, such as "
            "wells.DoubleWell()"
        )
    if flow.conditional:
        raise ConfigError("a target has no context, but the flow is conditional")
    if flow.integer_valued or flow.noisy:
        raise ConfigError("a target is a density of real numbers, but the flow was trained on whole numbers")
    if flow.event_shape != (target.dim,):
        raise ConfigError(f"the flow has samples of shape {flow.event_shape}, but the target has {target.dim} columns")
    target.check()
    for name, (least, most), (low, high) in zip(target.columns, supports_of(flow), supports_of(target), strict=True):
        if low < least or high > most:
            raise ConfigError(
                f"the samples of the flow are between {least:g} and {most:g} in the column {name}, but the target also "
                "has values outside; give the types of the flow to the target (target.types)"
            )


def supports_of(described: Target | Density) -> list[tuple[float, float]]:
    """Returns the support of each column of a target or a flow."""
    columns = described.dim if isinstance(described, Target) else math.prod(described.event_shape)
    return [one.support for one in described.types or [ColumnType()] * columns]


class WithinSupport(Target):
    """A target whose density is zero outside of the ranges of its types, for flows with samples there."""

    def __init__(self, target: Target) -> None:
        super().__init__(target.dim, target.types, target.columns, log_z=target.log_z)
        self.target, self.modes = target, target.modes

    def log_density(self, x: Tensor) -> Tensor:
        low, high = torch.tensor(supports_of(self), dtype=x.dtype, device=x.device).T
        inside = ((x >= low) & (x <= high)).all(1)
        # the function can be undefined outside, so it gets points of the support
        found: Tensor = self.target(torch.where(inside[:, None], x, self.inner_point(x)))
        return torch.where(inside, found, -math.inf)

    def inner_point(self, x: Tensor) -> Tensor:
        """Returns a point inside of the support, (d,), for points x (n, d)."""
        middle = [
            (low + high) / 2 if math.isfinite(high - low) else low + 1 if low > -math.inf else min(high - 1, 0.0)
            for low, high in supports_of(self)
        ]
        return torch.tensor(middle, dtype=x.dtype, device=x.device)

    def sample(self, n: int, generator: torch.Generator) -> Tensor | None:
        return self.target.sample(n, generator)


def _evaluate(
    flow: Density, target: Target, n: int, seed: int, step: int, batch_size: int | None, thorough: bool
) -> TargetEvaluation:
    begun = time.perf_counter()
    with phase("drawing samples of the flow"), record_solves() as solves:
        drawn = weighted_samples(flow, target, n, seed, batch_size=batch_size)
    seconds = time.perf_counter() - begun
    log_w, unusable = usable_weights(drawn)
    kept = log_w[~unusable]
    elbo, elbo_stderr = float(kept.mean()), stderr(kept)
    # NaN if a weight is 0
    elbo_stderr = elbo_stderr if math.isfinite(elbo) else math.nan
    w = (log_w - log_w.max()).exp()
    tail = weight_tail(w)
    with phase("drawing samples in the tails of the flow"):
        balanced = flow_only = BalancedWeights(log_w, n)
        if isinstance(flow, Flow):
            balanced = balanced_weights(flow, target, drawn, seed, batch_size)
    log_z, has_tails = balanced.log_z, len(balanced) > n
    with phase("moving samples of the flow"):
        moved = moved_samples(flow, target, drawn, log_w, seed, batch_size)
    with phase("estimating the error of log Z"):
        measured = rows_of_checks((target.dim,)) if thorough else FEW
        parts = log_z_budget(flow, target, balanced, elbo_stderr, seed, measured)
    with phase("scoring exact samples"):
        exact = exact_samples(flow, target, min(n, EXACT if thorough else FEW_EXACT), seed, batch_size)
    divergences = divergences_of(target, elbo, elbo_stderr, parts, exact)
    modes = modes_of(target, drawn.x, w, None if exact is None else exact.x)
    found = [
        check_finite_weights(drawn, unusable),
        check_pareto_k(None if tail is None else tail.k, n),
        check_tails(log_z - flow_only.log_z, math.hypot(flow_only.stderr, parts.sampling)) if has_tails else None,
        check_moves(moved),
        check_log_z_solver(flow, parts),
        check_known_log_z(target, log_z, parts),
        check_kl((divergences["kl_forward"], divergences["kl_forward_stderr"])),
        None if modes is None else modes.check(),
    ]
    rows = drawn.x[unusable.logical_not()][: rows_of_checks((target.dim,))].to(flow.like.device)
    subset = Subset(rows, rows, None)
    if thorough:
        with phase("checking the density"):
            found += make_checks(map_checks(flow, reference(flow), subset, flow.like.dtype))
    with phase("round trip"):
        round_trip = roundtrip_error(flow, subset.x)
    result = TargetEvaluation(
        nll=-elbo,
        nll_stderr=elbo_stderr,
        n=n,
        step=step,
        log_z=log_z,
        log_z_stderr=parts.total,
        ess=effective_rows(w) / n,
        pareto_k=None if tail is None else tail.k,
        elbo_gap=log_z - elbo,
        missed_mass=-math.expm1(flow_only.log_z - log_z) if has_tails else None,
        **divergences,
        log_z_true=target.log_z,
        mode_shares=None if modes is None else tuple(modes.shares.tolist()),
        modes_found=None if modes is None else int(modes.found.sum()),
        solver=None if flow.solver is None else flow.solver.describe(),
        nfe=nfe_of_pass(flow, solves),
        roundtrip_error=round_trip,
        seconds=seconds,
        device=str(flow.like.device),
        dtype=str(flow.like.dtype).removeprefix("torch."),
        budget=parts,
        checks=tuple(check for check in found if check is not None),
        members=members_of(flow, target, min(n, OF_MEMBER), seed, batch_size),
        drawn=WeightedSamples(*(part[:SHOWN] for part in drawn)),
        total_seconds=time.perf_counter() - begun,
    )
    for check in result.failed:
        log.warning("%s: %s", check.label, check.message)
    return result


def usable_weights(drawn: WeightedSamples) -> tuple[Tensor, Tensor]:
    """Returns the log weights (n,) and a mask (n,) of the weights that are NaN or infinite, which are set to 0.

    Raises:
        NonFiniteError: more than 1% of the weights are NaN or infinite, or all weights are 0.
    """
    unusable = ~(drawn.log_w < math.inf)
    log_w = torch.where(unusable, -math.inf, drawn.log_w)
    if int(unusable.sum()) > MOST_LOST * len(unusable) or not bool(log_w.isfinite().any()):
        check_log_weights(drawn)
    return log_w, unusable


def log_z_budget(
    flow: Density,
    target: Target,
    balanced: BalancedWeights,
    elbo_stderr: float,
    seed: int,
    rows: int,
) -> LogZBudget:
    """Measures the parts of the error of log Z; see `evaluate_target`.

    Args:
        balanced: the weights whose mean estimates Z.
        elbo_stderr: the standard error of the ELBO in nats.
        rows: the number of base points on which the parts solver and precision are measured.
    """
    log_z, sampling = balanced.log_z, balanced.stderr
    tail = weight_tail(balanced.terms.clamp_min(0))
    beyond = 0.0 if tail is None else tail.missed(1.0)
    exact, in_float64 = copy.deepcopy(flow).double(), target_in_float64(target, flow)
    fine = weighted_samples(exact, in_float64, rows, seed)
    solver, precision = (0.0, 0.0), None
    if flow.solver is not None:
        try:
            tight = weighted_samples(exact.with_solvers(tight_solver), in_float64, rows, seed)
            solver = errors_between(fine.log_w, tight.log_w)
        except SolverError:
            solver = (math.nan, math.nan)
    if flow.like.dtype != torch.float64:
        precision = errors_between(*log_weights_in_two_dtypes(flow, target, exact, in_float64, rows, seed))
    errors = [part for part in (solver, precision) if part is not None]

    def total(*of_samples: float, which: int) -> float:
        each = [*of_samples, *(part[which] for part in errors)]
        return math.sqrt(sum(part**2 for part in each if math.isfinite(part)))

    of_log_z = total(sampling, beyond, which=0)
    return LogZBudget(
        sampling=sampling,
        tail=beyond,
        solver=solver[0],
        precision=None if precision is None else precision[0],
        rows=rows,
        total=of_log_z,
        interval=(log_z - COVERED * of_log_z, log_z + COVERED * of_log_z),
        elbo_total=total(elbo_stderr, which=1),
    )


def tight_solver(solver: Solver) -> Solver:
    """Returns dopri5 with rtol 1e-7, or with a tenth of the rtol of an adaptive solver if this is smaller."""
    rtol = min(ACCURATE, solver.rtol / 10) if solver.adaptive else ACCURATE
    return ode_solver("dopri5", rtol=rtol, max_nfe=max(MAX_NFE, 10 * solver.max_nfe))


def errors_between(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Returns the errors of log Z and of the ELBO from two computations of the same log weights (rows,).

    Each error is sqrt(m^2 + s^2), with the difference m of the two estimates and the standard error s of m. To first
    order, the difference of log Z is the mean of w_i / mean(w) - v_i / mean(v) over the rows, with the weights w of
    `one` and v of `other`. s is the standard error of this mean.
    """
    w, v = ((part - part.logsumexp(0)).exp() * len(part) for part in (one, other))
    m = float(one.logsumexp(0) - other.logsumexp(0))
    both = one.isfinite() & other.isfinite()
    of_elbo = mean_error(one[both] - other[both]) if both.any() else math.nan
    return math.hypot(m, stderr(w - v)), of_elbo


def log_weights_in_two_dtypes(
    flow: Density, target: Target, exact: Density, in_float64: Callable[[Tensor], Tensor], rows: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns the log weights (rows,) in the dtype of the flow and in float64, each in nats and float64.

    A flow maps the same base points in both dtypes. An ensemble scores the same samples in both dtypes.

    Args:
        exact, in_float64: the flow and the target in float64.
    """
    with seeded(seed, flow.like.device):
        single = isinstance(flow, Flow)
        points = flow.base.rsample(rows, like=flow.like) if isinstance(flow, Flow) else flow.sample(rows)
    found: list[Tensor] = []
    cases: tuple[Any, ...] = ((flow, target, points), (exact, in_float64, points.double()))
    for density, of, start in cases:
        parts = []
        for part in torch.split(start, rows_at_a_time(flow.event_shape)):
            x, log_q = density.sample_pass(part)[:2] if single else (part, density.log_prob(part))
            parts.append((of(x).double() - log_q.double()).cpu())
        found.append(torch.cat(parts))
    return found[0], found[1]


class InFloat64(Target):
    """A target for points in float64. With `rounded`, it rounds them to float32 before it calls the wrapped target."""

    def __init__(self, target: Target, rounded: bool) -> None:
        super().__init__(target.dim, target.types, target.columns)
        self.target, self.rounded = target, rounded

    def log_density(self, x: Tensor) -> Tensor:
        found: Tensor = self.target(x.float() if self.rounded else x)
        return found


def target_in_float64(target: Target, flow: Density) -> Target:
    """Returns a copy of a target with buffers in float64. Tensors inside of a user's function keep their dtype."""
    found = copy.deepcopy(target).double()
    x = flow.sample(2).double()
    try:
        found(x)
    except DataError:
        # such as a function that multiplies x by a matrix in float32
        return InFloat64(target, rounded=True)
    return InFloat64(found, rounded=False)


@dataclass(frozen=True)
class ExactSamples:
    """Exact samples of a target, (m, d), with log p~ and log q, (m,), on the CPU. log q is -inf if its solve failed."""

    x: Tensor
    log_p: Tensor
    log_q: Tensor


def exact_samples(flow: Density, target: Target, m: int, seed: int, batch_size: int | None) -> ExactSamples | None:
    """Draws m exact samples of a target and scores them. Returns None if the target has no exact samples.

    Raises:
        DataError: the samples have another shape.
    """
    x = target.sample(m, torch.Generator().manual_seed(seed))
    if x is None:
        return None
    if x.shape != (m, target.dim):
        raise DataError(
            f"sample of the target returned shape {tuple(x.shape)} for {m} samples; it must return ({m}, {target.dim})"
        )
    # rounded first, so that both densities are computed at the same points
    x = x.to(flow.like.dtype)
    log_q = score_rows(flow, x, None, latents=0, unsolved=UNSOLVED, batch_size=batch_size, draws=1, seed=0).log_p
    log_p = torch.cat([target(part.to(flow.like.device)).double().cpu() for part in torch.split(x, batch_size or 4096)])
    return ExactSamples(x, log_p, torch.where(log_q.isfinite(), log_q, -math.inf))


def divergences_of(
    target: Target, elbo: float, elbo_stderr: float, parts: LogZBudget, exact: ExactSamples | None
) -> dict[str, Any]:
    """Returns the attributes of a `TargetEvaluation` that depend on the known log Z or on exact samples.

    The forward ESS is 1 / (E_p[w] E_p[1/w]) with w = p~ / q. Both expectations are means over exact samples.

    Source: Nicoli et al. 2023, Detecting and mitigating mode-collapse for flow-based sampling of lattice field
    theories, section III.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("forward_ess", "kl_reverse", "kl_reverse_stderr", "kl_forward", "kl_forward_stderr")
    )
    if target.log_z is not None:
        found |= {"kl_reverse": target.log_z - elbo, "kl_reverse_stderr": parts.elbo_total}
    if exact is not None:
        log_w = exact.log_p - exact.log_q
        found["forward_ess"] = float((2 * math.log(len(log_w)) - log_w.logsumexp(0) - (-log_w).logsumexp(0)).exp())
        if target.log_z is not None:
            # the errors of solver and dtype are measured for the ELBO
            of_flow = max(0.0, parts.elbo_total**2 - elbo_stderr**2) if math.isfinite(elbo_stderr) else 0.0
            error = math.sqrt(stderr(log_w) ** 2 + of_flow)
            found |= {"kl_forward": float(log_w.mean()) - target.log_z, "kl_forward_stderr": error}
    return found


@dataclass(frozen=True)
class Modes:
    """The shares of the k modes of a target, as tensors (k,).

    A point belongs to the nearest mode.

    Attributes:
        shares: the share of the samples of the flow at each mode.
        expected: the share of the mass of the target at each mode.
        found: whether `shares` is positive and at least a quarter of `expected`.
    """

    shares: Tensor
    expected: Tensor

    @property
    def found(self) -> Tensor:
        return (self.shares > 0) & (self.shares >= FOUND * self.expected)

    def check(self) -> Check:
        """Checks that all modes are found."""
        missed = (~self.found).nonzero().flatten().tolist()
        which = ", ".join(map(str, missed[:5])) + (" and others" if len(missed) > 5 else "")
        mass = float(self.expected[missed].sum())
        part = f", which have {mass:.2g} of the mass" if mass else ""
        return check_limit(
            "modes",
            float(len(missed)),
            0.0,
            f"the flow has too few samples at {len(missed)} of {counted(len(self.shares), 'mode')} (indices {which})"
            f"{part}. log Z can be too small by more than its error, and ESS and k do not show it. Train with "
            "objective=weighted_forward_kl, or with a wider initial distribution (target.scale)",
        )


def modes_of(target: Target, x: Tensor, w: Tensor, exact: Tensor | None) -> Modes | None:
    """Returns the shares of samples and of mass at each mode. None for unknown modes, or for more than 1,000 modes.

    The share of the mass is the share of exact samples. Without exact samples, it is estimated by the weights w of
    samples x of the flow, and is 0 for a mode without samples.

    Args:
        x: samples of the flow, (n, d).
        w: their weights up to a factor, (n,).
        exact: exact samples, (m, d), or None.
    """
    if target.modes is None or len(target.modes) > MOST_MODES:
        return None
    modes = target.modes.detach().cpu().double()
    nearest = nearest_modes(x, modes)
    shares = torch.bincount(nearest, minlength=len(modes)) / len(x)
    if exact is None:
        expected = torch.zeros(len(modes), dtype=w.dtype).index_add_(0, nearest, w) / w.sum()
    else:
        expected = torch.bincount(nearest_modes(exact, modes), minlength=len(modes)) / len(exact)
    return Modes(shares, expected)


def nearest_modes(x: Tensor, modes: Tensor) -> Tensor:
    """Returns the index (n,) of the nearest of k modes (k, d) for points x (n, d)."""
    parts = torch.split(x.double(), max(1, DISTANCES // len(modes)))
    return torch.cat([torch.cdist(part, modes).argmin(1) for part in parts])


def members_of(
    flow: Density, target: Target, n: int, seed: int, batch_size: int | None
) -> tuple[TargetMember, ...] | None:
    """Returns the members of an ensemble, each with the negative ELBO of n samples. Returns None for a flow."""
    if not isinstance(flow, Ensemble):
        return None
    found = []
    for member, weight, name in zip(flow.members, flow.weights, flow.names, strict=True):
        try:
            assert isinstance(member, Flow)
            log_w = weighted_samples(member, target, n, seed, batch_size=batch_size).log_w
            found.append(TargetMember(name, weight, -float(log_w.mean()), stderr(log_w)))
        except SolverError:
            found.append(TargetMember(name, weight, math.nan, math.nan))
    return tuple(found)


def check_finite_weights(drawn: WeightedSamples, unusable: Tensor) -> Check:
    """Checks that all weights are positive and finite. A weight of 0 makes the ELBO -inf, but log Z stays valid."""
    zero = drawn.log_w == -math.inf
    count, wrong = int(zero.sum()), int(unusable.sum())
    words = []
    if count:
        words.append(
            f"the density is 0 at {counted(count, 'sample')} of the flow, so the ELBO is -inf, but log Z is valid. "
            "Give the range of each column with target.types"
        )
    if wrong:
        first = int(unusable.nonzero()[0])
        words.append(
            f"the weights of {counted(wrong, 'sample')} are NaN or infinite, and count as 0; the first is sample "
            f"{first}, with log p~ = {drawn.log_p[first].item():g} and log q = {drawn.log_q[first].item():g}"
        )
    return check_limit("finite weights", float(count + wrong), 0.0, ". ".join(words))


def check_pareto_k(k: float | None, n: int) -> Check:
    """Checks that Pareto k is at most min(0.7, 1 - 1 / log10(n)).

    Source: Vehtari et al. 2024, Pareto smoothed importance sampling, section 3.2.
    """
    limit = min(MOST_K, 1 - 1 / math.log10(n)) if n > 10 else MOST_K
    if k is None:
        return Check("pareto_k", None, limit, None, f"{n} samples are too few to estimate k; draw at least 25")
    return check_limit(
        "pareto_k",
        k,
        limit,
        f"Pareto k = {k:.2f} is above {limit:.2g}. A few weights dominate, so log Z, its error and the effective "
        "sample size are not reliable. Train for more steps, or with a larger model, or with "
        "objective=weighted_forward_kl",
    )


def check_tails(missed: float, error: float) -> Check:
    """Checks that the flow does not miss a part of the target in its tails.

    Args:
        missed: log Z with samples in the tails of the flow, minus log Z without them, in nats.
        error: the standard error of `missed`.
    """
    return check_limit(
        "tails",
        missed,
        max(SIGMAS * error, LEAST_MISSED),
        f"samples in the tails of the flow add {missed:.2g} nats to log Z, so the flow misses "
        f"{-math.expm1(-missed):.1%} of the mass of the target. ESS and k do not show it. Train for more steps, with "
        "objective=weighted_forward_kl, or with a wider initial distribution (target.scale)",
    )


def check_moves(moved: Moved | None) -> Check:
    """Checks that moved samples do not reach a part of the target that the flow misses."""
    if moved is None:
        words = "there are too few effective samples to move, or log q of the moved samples cannot be computed"
        return Check("moves", None, LEAST_MISSED, None, words)
    return check_limit(
        "moves",
        moved.missed,
        max(SIGMAS * moved.stderr, LEAST_MISSED),
        "samples of the flow, moved by Hamiltonian Monte Carlo, reach a part of the target in which the flow has too "
        f"few samples. This part has at least {-math.expm1(-moved.missed):.1%} of the mass, so log Z is too small by "
        f"at least {moved.missed:.2g} nats. ESS and k do not show it. Train with {ADVICE}",
    )


def check_log_z_solver(flow: Density, parts: LogZBudget) -> Check | None:
    """Checks that the error of log Z by the solver is small. Training can exploit the errors of a coarse solver."""
    if flow.solver is None:
        return None
    words = f"with a tight solver, log Z changes by about {parts.solver:.2g} nats"
    if math.isnan(parts.solver):
        words = "the ODE cannot be solved with a tight tolerance, so the error of log Z lacks the part of the solver"
    cause = f"{words}. Evaluate and train with a smaller solver.rtol (or solver.step_size)"
    return check_limit("solver", parts.solver, largest_bias(flow, parts.sampling), cause)


def check_known_log_z(target: Target, log_z: float, parts: LogZBudget) -> Check | None:
    """Checks that log Z is within 3 errors, or within 0.001 nats, of the known value."""
    if target.log_z is None:
        return None
    apart = abs(log_z - target.log_z)
    return check_limit(
        "log_z",
        apart,
        max(SIGMAS * parts.total, SMALL),
        f"target.log_z is {target.log_z:.6g}, but the estimate of log Z is {log_z:.6g} +- {parts.total:.2g}. Either "
        "target.log_z is wrong, or the flow misses a part of the target",
    )
