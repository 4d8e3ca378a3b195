"""The checkpoints of a run: best.pt to be loaded, last.pt to go on from, or back to."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowtrain.data.base import Samples
from flowtrain.flow import Flow
from flowtrain.ode import StepPlan
from flowtrain.training import checkpoint
from flowtrain.training.failure_policy import FailurePolicy
from flowtrain.training.progress import Progress
from flowtrain.training.resume_validation import check_progress
from flowtrain.training.train_state import TrainState
from flowtrain.utils import ranks
from flowtrain.utils.errors import CheckpointError

log = logging.getLogger("flowtrain")


def load_weights(flow: Flow, saved: Mapping[str, Any]) -> None:
    """Those of a checkpoint of this run.

    Raises:
        CheckpointError: they are of another model.
    """
    try:
        flow.load_state_dict(saved["weights"])
    except RuntimeError as e:
        first = " ".join(str(e).split())[:160]
        raise CheckpointError(
            f"the run cannot go on with this config, its weights are of another model ({first} ...): "
            "leave model.* as it was"
        ) from e


class CheckpointManager:
    """Writes the checkpoints of a run into its directory, and reads them from there.

    Args:
        run_dir: the run directory; None: checkpoints are kept in memory.
        config: the run's plain config, kept in every checkpoint.
        samples: what the flow was trained on.

    Attributes:
        saved_step: of last.pt.
    """

    def __init__(
        self,
        run_dir: Path | None,
        config: Mapping[str, Any],
        samples: Samples,
        train_state: TrainState,
        failure_policy: FailurePolicy,
        progress: Progress,
    ) -> None:
        self.run_dir, self.config, self.samples = run_dir, config, samples
        self.flow, self.train_state, self.failure_policy, self.progress = (
            train_state.flow,
            train_state,
            failure_policy,
            progress,
        )
        self.saved_step = progress.step
        self._in_memory: dict[str, dict[str, Any]] = {}

    def best(self) -> bool:
        """Whether best.pt, what a flow is loaded from, has been written."""
        return self.keep("best", self.inference_state())

    def last(self) -> None:
        """last.pt: that, and all that a resumed run needs."""
        rest = {**self.train_state.state(), **self.progress.state(), "trouble": self.failure_policy.state()}
        rest["histories"] = [[*plan.steps] for plan in self.flow.step_plans]
        if self.keep("last", {**self.inference_state(), **rest}):
            self.saved_step = self.progress.step

    def inference_state(self) -> dict[str, Any]:
        """What a flow is loaded from; weights and averages as they are, not copies."""
        return {
            "config": dict(self.config),
            "event_shape": list(self.flow.event_shape),
            "samples": asdict(self.samples),
            "step": self.progress.step,
            "weights": self.flow.state_dict(),
            "ema": None if self.train_state.ema is None else self.train_state.ema.state(),
        }

    def keep(self, name: str, state: dict[str, Any]) -> bool:
        """Whether rank 0 has written the checkpoint.

        A disk that is full does not end a run, which has the one before.
        """
        if self.run_dir is None:
            self._in_memory[name] = checkpoint.on_cpu(deepcopy(state))
            return True
        written = True
        try:
            if ranks.is_first():
                checkpoint.save(self.run_dir / f"checkpoints/{name}.pt", state)
        except OSError as e:
            if self.progress.step == 0:
                raise
            log.warning(
                "step %d: checkpoints/%s.pt could not be written (%s). The one before it stays, and the run goes on.",
                self.progress.step,
                name,
                e,
            )
            written = False
        return ranks.broadcast_object(written)

    def read(self, prefer: str = "best") -> dict[str, Any]:
        """A checkpoint of this run: the best one, or the last one if there is no best one or it is preferred.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        if self.run_dir is not None:
            return checkpoint.load(checkpoint.find(self.run_dir, prefer))
        return deepcopy(self._in_memory[prefer if prefer in self._in_memory else "last"])

    def load(self, saved: Mapping[str, Any]) -> None:
        """All of last.pt but its weights.

        Raises:
            CheckpointError: no run can have saved such a state.
        """
        self.train_state.load_moments(saved)
        check_progress(saved, self.flow)
        self.train_state.load(saved)
        if "trouble" in saved:
            self.failure_policy.load(saved["trouble"])
        if saved["config"]["trainer"].get("lr") != self.train_state.settings.lr:
            # a rate that the user chose in the light of what had happened
            self.failure_policy.halvings = 0
        self.progress.load(saved)
        # a run of an older flowtrain begins its solves anew
        saved_plans = saved.get("histories", ())
        self.flow.set_step_plans([StepPlan(tuple((h, suited) for h, suited in steps)) for steps in saved_plans])
        self.saved_step = self.progress.step

    def back(self) -> None:
        """Everything as last.pt has it."""
        saved = self.read("last")
        load_weights(self.flow, saved)
        self.load(saved)
        if self.config["solver"] != saved["config"]["solver"]:
            # steps were made smaller since: what was best with the larger ones may owe itself to them
            self.progress.forget_best()

    def keep_objective(self, pinned: Mapping[str, Any]) -> None:
        """Stores changed keys of the objective in the config of all later checkpoints."""
        self.config = {**self.config, "objective": {**self.config["objective"], **pinned}}

    def keep_step_size(self) -> None:
        """Takes a step size that was made smaller into every checkpoint's config: it holds in evaluation too."""
        solver = self.flow.solver
        if solver is None or solver.adaptive:
            return
        changed = {"step_size": solver.step_size, "steps": None}
        self.config = {**self.config, "solver": {**self.config["solver"], **changed}}
        # the best NLL so far may owe itself to the coarser steps, and no honest one would ever beat it
        self.progress.forget_best()
