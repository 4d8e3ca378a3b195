"""Detects velocity fields that exploit the error of a coarse solver, and tightens its tolerance."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowtrain.flow import Flow
from flowtrain.ode import SolveOptions, Solver, record_solves
from flowtrain.utils import ranks
from flowtrain.utils.errors import NonFiniteError, SolverError
from flowtrain.utils.process import seeded

log = logging.getLogger("flowtrain")

# the mean difference must exceed this many standard errors
SIGMAS = 3.0
# Nats per dimension. Every discretisation has a small bias of either sign that the field does not exploit. Without this
# limit, the guard would tighten the tolerance of every run and only cost time.
FLOOR = 1e-3
# the steps of the tight solve are shorter by this factor. The error of Euler's method, which has order 1, is smaller by
# the same factor
FINER = 8


def exploited(loose: Tensor, tight: Tensor, d: int) -> bool:
    """Returns whether the loose solve lowers the loss: gap > 3 noise and gap > 1e-3 d nats.

    gap = mean(loose - tight) and noise = std(loose - tight) / sqrt(B) over the rows.

    Args:
        loose, tight: log p in nats, (B,), or -log p if the loss increases with log p. Rows, weights of the flow and
            trace probes are the same in both, so sampling errors cancel.
        d: the number of elements of a sample.
    """
    # the standard deviation of one row is undefined
    if len(loose) < 2:
        return False
    difference = (loose - tight).double()
    gap, noise = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
    return gap > SIGMAS * noise and gap > FLOOR * d


class SolverGuard:
    """Compares log p of a training batch as solved in training with a tight solve. Tightens the solver if they differ.

    The training tolerance of an adaptive method is divided by ten, down to the final tolerance. A fixed step size is
    halved in the flow's solver, because an evaluation with the coarse steps would report the same wrong likelihood.

    Args:
        flow: a flow that solves an ODE.
        every: steps between checks; None: never.
        warmup: returns the number of warm-up steps of the tolerance. None: the solver's own number.
        warmed: maps a training step to the number of completed warm-up steps. None: the identity.
        end_time: see `SolveOptions`.
        raises_log_prob: see `Objective`.
    """

    def __init__(
        self,
        flow: Flow,
        every: int | None,
        warmup: Callable[[], int | None] | None = None,
        warmed: Callable[[int], float] | None = None,
        end_time: float = 0.0,
        raises_log_prob: bool = True,
    ) -> None:
        self.flow, self.every, self.end_time = flow, every, end_time
        self.sign = 1 if raises_log_prob else -1
        self.warmup = warmup or (lambda: None)
        self.warmed = warmed or float
        self.tightenings = 0
        # the limits that stopped further tightening; no more checks are made until a resumed run changes them
        self.warned: dict[str, Any] | None = None

    @property
    def solver(self) -> Solver:
        """The solver of the flow. The guard may reduce its step size."""
        solver = self.flow.solver
        assert solver is not None
        return solver

    def tolerance_at(self, step: int) -> tuple[float, float]:
        """Returns (rtol, atol) of training at a step, after the tightenings so far."""
        return self.solver.tolerance_at(self.warmed(step), self.tightenings, self.warmup())

    def is_due(self, step: int) -> bool:
        """Returns whether `check` compares solves after `step` updates. Otherwise, it does nothing."""
        return self.every is not None and step % self.every == 0 and self.warned != self._limits()

    def check(self, step: int, x: Tensor, seed: int, context: Tensor | None = None) -> bool:
        """Checks the solver on a batch after `step` updates, and tightens its tolerances if needed.

        Returns whether the tolerances were tightened. The random state and the statistics of other solves are not
        changed. A failed solve does not raise.

        Args:
            x: the batch (B, *event_shape).
            seed: the seed of trace probes and dequantization, the same for both solves.
            context: (B,) or None.
        """
        if not self.is_due(step):
            return False
        before = self.tightenings
        # The check is repeated until it passes. With a single tightening, the field would exploit the new tolerance
        # before the next check
        while self._tighten_once(step, x, context, seed):
            pass
        return self.tightenings > before

    def _tighten_once(self, step: int, x: Tensor, context: Tensor | None, seed: int) -> bool:
        """Makes one comparison and tightens if needed. Returns whether to compare again."""
        coarse, fine = self._options(step)
        if coarse == fine:
            return False
        loose, nfe, failure = self._log_prob(x, context, seed, coarse)
        wrong, failed, finding = False, False, "the check failed on another rank"
        # if the coarse solve fails, there is no comparison. The next training step reports such a failure itself
        if not failure:
            tight, _, failure = self._log_prob(x, context, seed, fine)
            failed = bool(failure)
            wrong = failed or exploited(self.sign * loose, self.sign * tight, math.prod(self.flow.event_shape))
            finding = f"the batch has an NLL of {-loose.mean():.4f} with the solver settings of training, "
            finding += f"but a tight solve failed ({failure})" if failed else f"{-tight.mean():.4f} with a tight solve"
        # if the check fails on any rank, all ranks tighten, because they train the same field with the same tolerance
        any_wrong, any_failed, most = ranks.largest([wrong, failed, nfe])
        # after a failed tight solve, tighten only once, because there is no comparison to repeat
        return bool(any_wrong) and self._tighten(step, int(most), f"step {step}: {finding}") and not any_failed

    def _options(self, step: int) -> tuple[SolveOptions, SolveOptions]:
        """Returns the options of a solve as in training and of a tight solve."""
        solver, shared = self.solver, SolveOptions(end_time=self.end_time)
        if solver.adaptive:
            rtol, atol = self.tolerance_at(step)
            coarse = replace(shared, rtol=rtol, atol=atol, control=solver.control)
            return coarse, replace(shared, rtol=solver.rtol, atol=solver.atol, control="all")
        coarse = replace(shared, step_size=self._step_size(), max_nfe=solver.max_nfe)
        return coarse, replace(shared, step_size=self._step_size() / FINER, max_nfe=FINER * solver.max_nfe)

    def _limits(self) -> dict[str, Any]:
        solver = self.solver
        return {**solver.describe(), "max_nfe": solver.max_nfe, "control": solver.control}

    def _step_size(self) -> float:
        assert self.solver.step_size is not None
        # the interval of t has length 1, so a longer step acts as a step of 1, and halving it would change nothing
        return min(self.solver.step_size, 1.0)

    @torch.no_grad()
    def _log_prob(
        self, x: Tensor, context: Tensor | None, seed: int, options: SolveOptions
    ) -> tuple[Tensor, float, str]:
        """Returns log p(x) (B,), the NFE of the longest solve, and the reason of a failure (empty if none)."""
        with seeded(seed, x.device), record_solves() as solves:
            try:
                log_p = self.flow.density_pass(x, context, options).log_p
            except (SolverError, NonFiniteError) as e:
                return torch.full((len(x),), math.nan), 0, str(e).rstrip(".")
        failure = "" if bool(torch.isfinite(log_p).all()) else "the log-likelihood is NaN or infinite"
        return log_p, max((s.nfe_forward for s in solves), default=0), failure

    def _tighten(self, step: int, nfe: float, finding: str) -> bool:
        """Tightens the tolerances, or warns that a limit is reached. Returns whether they were tightened.

        Args:
            nfe: the NFE of the coarse solve.
            finding: the result of the comparison, for messages.
        """
        solver = self.solver
        rtol, _ = before = self.tolerance_at(step)
        if solver.adaptive and before == (solver.rtol, solver.atol):
            return self._warn(
                f"{finding}. Training already uses the final tolerance, solver.rtol={solver.rtol:g}, which is too "
                "large: resume with a smaller tolerance, with solver.control=all, or with a smaller trainer.lr."
            )
        if not solver.adaptive and 2 * nfe > solver.max_nfe:
            return self._warn(
                f"{finding}. Half of solver.step_size={solver.step_size:g} would exceed "
                f"solver.max_nfe={solver.max_nfe}: resume with a larger solver.max_nfe, or with a smaller trainer.lr."
            )
        self.tightenings += 1
        if solver.adaptive:
            log.warning("%s; rtol of training is reduced from %.3g to %.3g", finding, rtol, self.tolerance_at(step)[0])
        else:
            half = self._step_size() / 2
            message = "%s; solver.step_size is reduced from %.3g to %.3g, also for evaluation"
            log.warning(message, finding, solver.step_size, half)
            self.flow.use_solver(solver.replace(step_size=half))
        return True

    def _warn(self, message: str) -> bool:
        self.warned = self._limits()
        log.warning(message)
        return False

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs. A reduced step size is stored in the run's config instead."""
        return {"tightenings": self.tightenings, "warned": self.warned}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""
        self.tightenings, self.warned = state["tightenings"], state["warned"]
