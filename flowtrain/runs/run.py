"""Trains and evaluates one run, from its config to result.json."""

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowtrain.plotting.options import PlotOptions
from flowtrain.runs import build
from flowtrain.runs.banner import banner
from flowtrain.runs.prepare import NOTHING_GIVEN, Parts, prepare
from flowtrain.runs.search import Search, is_search
from flowtrain.training import tensorboard
from flowtrain.training.trainer import Trainer
from flowtrain.utils import ranks
from flowtrain.utils.errors import UnfinishedError
from flowtrain.utils.formatting import resume_command
from flowtrain.utils.process import SignalReceived, ended_by_signals, own_settings

log = logging.getLogger("flowtrain")


class Ended(NamedTuple):
    """The trainer or search of a run that has ended, and the exit code: 128 + n if signal n has ended it, else 0."""

    trainer: Trainer | Search
    code: int

    @property
    def best(self) -> float:
        """The best validation NLL in nats; NaN before the first validation."""
        return math.nan if self.trainer.best is None else self.trainer.best["nll"]


def train(
    config: Mapping[str, Any],
    run_dir: Path | None,
    saved: Mapping[str, Any] | None = None,
    trust: Sequence[str] = (),
    begun: float | None = None,
    recipes: Mapping[str, Sequence[str]] | None = None,
    given: Parts = NOTHING_GIVEN,
) -> Ended:
    """Trains a run. If the run has a directory, its best checkpoint is then evaluated.

    Args:
        config: the config, with plain values and without interpolations.
        run_dir: the run directory; None: nothing is written.
        saved: the checkpoint to resume from; None: a new run.
        trust: packages besides flowtrain whose classes the checkpoint of `from` may name.
        begun: the time.perf_counter at which the command began, for `time_budget`; None: now.
        recipes: for the banner, the recipes that were applied, with the keys that each of them set; None if unknown.
        given: objects that replace objects of the config.
    """
    begun = time.perf_counter() if begun is None else begun
    with own_settings(ranks.device(build.resolve_device(config["device"]))):
        return _train(config, run_dir, saved, trust, begun, recipes, given)


def _train(
    config: Mapping[str, Any],
    run_dir: Path | None,
    saved: Mapping[str, Any] | None,
    trust: Sequence[str],
    begun: float,
    recipes: Mapping[str, Sequence[str]] | None,
    given: Parts,
) -> Ended:
    """Implements `train`. Changes settings of the process, such as the number of threads."""
    options = PlotOptions.of(config)
    board = None if run_dir is None else tensorboard.board(config["logger"], run_dir / "tensorboard")
    if board is not None and "png" not in options.formats:
        log.warning(
            "plots.format=[%s]: TensorBoard shows only PNG, so it gets no figures. To see them, add png",
            ",".join(options.formats),
        )
    trainer: Trainer | Search
    if is_search(config):
        trainer = Search(config, run_dir, begun, given, board)
    else:
        trainer = prepare(config, run_dir, saved, trust, board, begun, given)
        log.info("%s", banner(trainer, run_dir, recipes))
    trainer.fit()
    resume = "" if run_dir is None else f"; resume with: {resume_command(run_dir)}"
    if trainer.signal is not None:
        log.warning("%s at step %d%s", trainer.stopped_by, trainer.saved_step, resume)
        return Ended(trainer, 128 + trainer.signal)
    if trainer.stopped_by:
        log.info("stopped at step %d: %s", trainer.step, trainer.stopped_by)
    if run_dir is None or not ranks.is_first():
        return Ended(trainer, 0)
    # imported here because it imports matplotlib
    from flowtrain.runs.finish import finish

    try:
        with ended_by_signals():
            finish(trainer, run_dir, board, given.flow)
    except SignalReceived as e:
        name = signal.Signals(e.number).name
        log.warning("%s during the evaluation%s", name, resume)
        return Ended(trainer, 128 + e.number)
    except OSError as e:
        raise UnfinishedError(
            f"the run has ended at step {trainer.saved_step} and is saved, but its result could not be written ({e}). "
            f"When this is fixed, {resume_command(run_dir)} evaluates the run"
        ) from e
    return Ended(trainer, 0)
