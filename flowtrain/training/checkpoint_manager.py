"""The checkpoints of a run: best.pt for inference, last.pt to resume from or to rewind to."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowtrain.data.base import Samples
from flowtrain.flow import Flow
from flowtrain.ode import StepPlan
from flowtrain.training import checkpoint, checkpoint_files
from flowtrain.training.failure_policy import FailurePolicy
from flowtrain.training.progress import Progress
from flowtrain.training.resume_validation import check_progress
from flowtrain.training.train_state import TrainState
from flowtrain.utils import ranks
from flowtrain.utils.errors import CheckpointError

log = logging.getLogger("flowtrain")


def load_weights(flow: Flow, saved: Mapping[str, Any]) -> None:
    """Loads the weights of a checkpoint into a flow.

    Raises:
        CheckpointError: the weights belong to another model.
    """
    try:
        flow.load_state_dict(saved["weights"])
    except RuntimeError as e:
        first = " ".join(str(e).split())[:160]
        raise CheckpointError(
            f"the run cannot be resumed with this config, because its weights belong to another model ({first} ...): "
            "leave model.* unchanged"
        ) from e


class CheckpointManager:
    """Writes and reads the checkpoints of a run.

    Args:
        run_dir: the run directory; None: checkpoints are kept in memory.
        config: the run's plain config, stored in every checkpoint.
        samples: the description of the training data, stored in every checkpoint.

    Attributes:
        saved_step: the step of last.pt.
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

    def write_best(self) -> bool:
        """Writes best.pt, from which a flow is loaded. Returns whether the file was written."""
        return self._write("best", self.inference_state())

    def write_last(self) -> None:
        """Writes last.pt: the contents of best.pt and the state that a resumed run needs."""
        rest = {**self.train_state.state(), **self.progress.state(), "trouble": self.failure_policy.state()}
        rest["histories"] = [[*plan.steps] for plan in self.flow.step_plans]
        if self._write("last", {**self.inference_state(), **rest}):
            self.saved_step = self.progress.step

    def inference_state(self) -> dict[str, Any]:
        """Returns the contents of a checkpoint that are needed for inference. Weights and averages are not copied."""
        return {
            "config": dict(self.config),
            "event_shape": list(self.flow.event_shape),
            "samples": asdict(self.samples),
            "step": self.progress.step,
            "weights": self.flow.state_dict(),
            "ema": None if self.train_state.ema is None else self.train_state.ema.state(),
        }

    def _write(self, name: str, state: dict[str, Any]) -> bool:
        """Writes a checkpoint on rank 0. Returns whether the file was written; all ranks return the same.

        If the disk is full, the previous checkpoint is kept and the run continues. At step 0, the error is raised,
        because there is no previous checkpoint.
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
                "step %d: checkpoints/%s.pt could not be written (%s). The old file is kept and the run continues.",
                self.progress.step,
                name,
                e,
            )
            written = False
        return ranks.broadcast_object(written)

    def read(self, prefer: str = "best") -> dict[str, Any]:
        """Returns the best checkpoint of this run. Returns the last if there is no best, or if `prefer` is "last".

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        if self.run_dir is not None:
            return checkpoint.load(checkpoint_files.find(self.run_dir, prefer))
        return deepcopy(self._in_memory[prefer if prefer in self._in_memory else "last"])

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores everything in last.pt except the weights.

        Raises:
            CheckpointError: the state is not valid.
        """
        self.train_state.load_moments(saved)
        check_progress(saved, self.flow)
        self.train_state.load(saved)
        if "trouble" in saved:
            self.failure_policy.load(saved["trouble"])
        if saved["config"]["trainer"].get("lr") != self.train_state.settings.lr:
            # the user has chosen another rate, which is not halved again for the earlier rewinds
            self.failure_policy.halvings = 0
        self.progress.load(saved)
        # checkpoints of older versions have no step plans
        saved_plans = saved.get("histories", ())
        self.flow.set_step_plans([StepPlan(tuple((h, ideal) for h, ideal in steps)) for steps in saved_plans])
        self.saved_step = self.progress.step

    def rewind(self) -> None:
        """Restores weights and training state from last.pt."""
        saved = self.read("last")
        load_weights(self.flow, saved)
        self.load(saved)
        if self.config["solver"] != saved["config"]["solver"]:
            # the step size was reduced since, and the error of larger steps may have lowered the best NLL
            self.progress.forget_best()

    def keep_objective(self, pinned: Mapping[str, Any]) -> None:
        """Stores changed keys of the objective in the config of all later checkpoints."""
        self.config = {**self.config, "objective": {**self.config["objective"], **pinned}}

    def keep_step_size(self) -> None:
        """Stores a reduced step size in the config of all later checkpoints, because evaluation must use it too."""
        solver = self.flow.solver
        if solver is None or solver.adaptive:
            return
        changed = {"step_size": solver.step_size, "steps": None}
        self.config = {**self.config, "solver": {**self.config["solver"], **changed}}
        # the error of the coarser steps may have lowered the best NLL so far, and a correct NLL may never reach it
        self.progress.forget_best()
