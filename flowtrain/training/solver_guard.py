"""Detects fields that exploit the error of a coarse solver, and tightens its tolerance."""

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

SIGMAS = 3.0
# Nats per dimension. Any discretisation leaves a small bias, of either sign, that the field did not seek and that
# costs nothing: to chase it would tighten every run until nothing is gained by it but time.
FLOOR = 1e-3
# how much shorter the steps of the tight solve are: even Euler's error is then an eighth
FINER = 8


def exploited(loose: Tensor, tight: Tensor, d: int) -> bool:
    """Whether log p reads better than it is: gap > 3 noise and gap > 1e-3 d nats.

    gap = mean(loose - tight), noise = std(loose - tight) / sqrt(B), over the rows; log p in nats, (B,), of the same
    rows, weights and trace probes, so that the sampling error of neither is in it.
    """
    # the noise of one row is unknown
    if len(loose) < 2:
        return False
    difference = (loose - tight).double()
    gap, noise = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
    return gap > SIGMAS * noise and gap > FLOOR * d


class SolverGuard:
    """Compares log p of a training batch as training solves it with log p solved tightly, and tightens where exploited.

    An adaptive method's training tolerance is divided by ten, down to the final one; a fixed step size is halved, in
    the flow's solver, because an evaluation with the coarse steps would report the exploited likelihood.

    Args:
        flow: a flow that solves an ODE.
        every: steps between checks; None: never.
        warmup: the number of warm-up steps; None: that of the solver.
        warmed: from a training step to those of the warm-up; None: they are the same.
        end_time: see `SolveOptions`.
    """

    def __init__(
        self,
        flow: Flow,
        every: int | None,
        warmup: Callable[[], int | None] | None = None,
        warmed: Callable[[int], float] | None = None,
        end_time: float = 0.0,
    ) -> None:
        self.flow, self.every, self.end_time = flow, every, end_time
        self.warmup = warmup or (lambda: None)
        self.warmed = warmed or float
        self.tightenings = 0
        # the limits that were met and warned of: past them there is nothing left to do, until a resume moves them
        self.warned: dict[str, Any] | None = None

    @property
    def solver(self) -> Solver:
        """The solver of the flow, whose step size the guard may make smaller."""
        solver = self.flow.solver
        assert solver is not None
        return solver

    def tolerance_at(self, step: int) -> tuple[float, float]:
        """(rtol, atol) of training at a step, tightened."""
        return self.solver.tolerance_at(self.warmed(step), self.tightenings, self.warmup())

    def check(self, step: int, x: Tensor, seed: int, label: Tensor | None = None) -> bool:
        """Whether the solver was tightened, after `step` updates, on the batch x (B, *event_shape), label (B,) or None.

        Leaves the random state as it was and the statistics of other solves alone. Never raises for a failed solve.

        Args:
            seed: of the trace probes and of dequantization, the same for both solves.
        """
        if self.every is None or step % self.every or self.warned == self._limits():
            return False
        before = self.tightenings
        # until it passes: tightened once a check, a field far gone learns to exploit each tolerance before the next
        while self._tighten_once(step, x, label, seed):
            pass
        return self.tightenings > before

    def _tighten_once(self, step: int, x: Tensor, label: Tensor | None, seed: int) -> bool:
        """Solves, compares, tightens where exploited; whether to compare again."""
        coarse, fine = self._options(step)
        if coarse == fine:
            return False
        loose, nfe, failure = self._log_prob(x, label, seed, coarse)
        wrong, failed, read = False, False, "another rank's rows"
        # where it failed, training will fail as this did and say what to do, or not fail at all
        if not failure:
            tight, _, failure = self._log_prob(x, label, seed, fine)
            failed = bool(failure)
            wrong = failed or exploited(loose, tight, math.prod(self.flow.event_shape))
            read = f"the batch has an NLL of {-loose.mean():.4f} as solved in training, "
            read += f"but a tight solve failed ({failure})" if failed else f"{-tight.mean():.4f} when solved tightly"
        # one rank's doubt is all ranks': they train one field, at one tolerance
        any_wrong, any_failed, most = ranks.largest([wrong, failed, nfe])
        # once for a failure: how much tighter it would have to be, no comparison says
        return bool(any_wrong) and self._tighten(step, int(most), f"step {step}: {read}") and not any_failed

    def _options(self, step: int) -> tuple[SolveOptions, SolveOptions]:
        """Options of a solve as in training, and of a tight one."""
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
        # t runs over an interval of 1: half of a longer step would still be the same single step
        return min(self.solver.step_size, 1.0)

    @torch.no_grad()
    def _log_prob(self, x: Tensor, label: Tensor | None, seed: int, options: SolveOptions) -> tuple[Tensor, int, str]:
        """log p(x) (B,), the NFE of the longest solve, and what failed, or nothing."""
        with seeded(seed, x.device), record_solves() as solves:
            try:
                log_p = self.flow.density_pass(x, label, options).log_p
            except (SolverError, NonFiniteError) as e:
                return torch.full((len(x),), math.nan), 0, str(e).rstrip(".")
        failure = "" if bool(torch.isfinite(log_p).all()) else "the log-likelihood is NaN or infinite"
        return log_p, max((s.nfe_forward for s in solves), default=0), failure

    def _tighten(self, step: int, nfe: int, read: str) -> bool:
        """Tightens, or warns that there is no room to; `read` is what was seen, `nfe` what a coarse solve took."""
        solver = self.solver
        rtol, _ = before = self.tolerance_at(step)
        if solver.adaptive and before == (solver.rtol, solver.atol):
            return self._warn(
                f"{read}. Training has the final tolerance already, solver.rtol={solver.rtol:g}, and even that is not "
                "to be trusted: go on with a smaller one, with solver.control=all, or with a smaller trainer.lr."
            )
        if not solver.adaptive and 2 * nfe > solver.max_nfe:
            return self._warn(
                f"{read}. Steps half as long as solver.step_size={solver.step_size:g} would overrun "
                f"solver.max_nfe={solver.max_nfe}: go on with a larger one, or with a smaller trainer.lr."
            )
        self.tightenings += 1
        if solver.adaptive:
            log.warning("%s; training's rtol goes from %.3g to %.3g", read, rtol, self.tolerance_at(step)[0])
        else:
            half = self._step_size() / 2
            log.warning("%s; solver.step_size goes from %.3g to %.3g, in evaluation too", read, solver.step_size, half)
            self.flow.use_solver(solver.replace(step_size=half))
        return True

    def _warn(self, message: str) -> bool:
        self.warned = self._limits()
        log.warning(message)
        return False

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; a smaller step size is in the run's config."""
        return {"tightenings": self.tightenings, "warned": self.warned}

    def load(self, state: dict[str, Any]) -> None:
        """Takes such a state."""
        self.tightenings, self.warned = state["tightenings"], state["warned"]
