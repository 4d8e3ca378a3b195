"""Runs the jobs of `flowtrain -m`, each one in a separate directory.

Finished jobs are skipped, interrupted jobs are resumed, failed and new jobs are run. A job that fails does not stop the
others.
"""

import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from flowtrain.cli.config_files import plain
from flowtrain.cli.error_messages import message_of, report
from flowtrain.cli.overrides import trusted
from flowtrain.cli.start_run import is_created_here, resume_run, start_run
from flowtrain.runs.run_directory import InUseError
from flowtrain.runs.sweep_directory import ERROR, OVERRIDES, RESULT, jobs_in, overrides_of, result_of
from flowtrain.runs.sweep_summary import write_summary
from flowtrain.training import checkpoint_files
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError, FlowtrainError
from flowtrain.utils.files import write_text
from flowtrain.utils.formatting import option
from flowtrain.utils.process import may_set_handlers
from flowtrain.utils.status import status


def job(config: DictConfig, run_dir: Path) -> float:
    """Runs a job, and returns its best validation NLL for a sweeper that minimizes it; infinity if the job failed.

    Args:
        run_dir: the directory that Hydra has chosen.
    """
    given, root = list(HydraConfig.get().overrides.task), Path(HydraConfig.get().sweep.dir).absolute()
    if run_dir == root:
        # SystemExit ends the sweep. Hydra would treat an exception as the error of a single job
        error = ConfigError("hydra.sweep.subdir: every job needs another directory; use ${hydra.job.num}")
        raise SystemExit(report("flowtrain", error))
    try:
        run_dir = job_directory(root, run_dir, given)
        if (run_dir / RESULT).is_file():
            print(run_dir)
            return _least(result_of(run_dir).get("val_nll"))
        if checkpoint_files.has_checkpoint(run_dir):
            best, code = resume_run(run_dir, trusted(plain(config)["trust"]))
        else:
            (run_dir / OVERRIDES).parent.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(given), run_dir / OVERRIDES)
            best, code = start_run(config, run_dir)
    except Exception as e:
        message, _ = message_of(e) or (traceback.format_exc(), 1)
        print(f"flowtrain: {run_dir.name} ({' '.join(given)}): {message}", file=sys.stderr)
        # a directory in use belongs to another process, which writes its own error
        if not isinstance(e, InUseError):
            with suppress(OSError):
                write_text(run_dir / ERROR, message.rstrip() + "\n")
        return math.inf
    (run_dir / ERROR).unlink(missing_ok=True)
    print(run_dir)
    if code:
        forward_signal(code - 128)
        # a signal stops the whole sweep
        raise SystemExit(code)
    return _least(best)


def _least(nll: float | None) -> float:
    # sweepers do not accept NaN
    return math.inf if nll is None or math.isnan(nll) else nll


def forward_signal(number: int) -> None:
    """Calls the launcher's handler of a signal after the run is saved. submitit then requeues the job."""
    handler = signal.getsignal(number)
    if callable(handler) and handler not in (signal.default_int_handler, _terminated):
        handler(number, None)


def job_directory(root: Path, run_dir: Path, given: list[str]) -> Path:
    """Returns the directory of the job with these overrides. It is a new directory if none has the same overrides."""
    if sorted(overrides_of(run_dir) or []) == sorted(given):
        # in this usual case, the other directories need not be read
        return run_dir
    there = next((folder for folder, its in jobs_in(root).items() if sorted(its) == sorted(given)), None)
    if there is None:
        return unused_directory(run_dir)
    if not any(run_dir.iterdir()):
        run_dir.rmdir()
    return there


def unused_directory(run_dir: Path) -> Path:
    """Returns the directory if no job uses it, otherwise the first unused of NAME_1, NAME_2 ...."""
    found, n = run_dir, 0
    while (found / OVERRIDES).exists():
        n += 1
        found = run_dir.with_name(f"{run_dir.name}_{n}")
    return found


class JobError(FlowtrainError):
    """The process of a job was killed. This ended the other jobs of the sweep, too."""

    exit_code = 1


@dataclass
class Sweep:
    """The outcome of a sweep.

    Attributes:
        undone: the number of jobs without a result.
        refused: whether no job has begun to train.
    """

    undone: int = 0
    refused: bool = False

    @property
    def code(self) -> int:
        """The exit code: 2 if every job was refused, 1 if a job has no result, else 0."""
        return 2 if self.refused else 1 if self.undone else 0


# the directory of this process's sweep, and the status shown while jobs run in other processes
_ROOT: list[Path] = []
_WAITING = ExitStack()


class SweepDirectoryRecorder(Callback):
    """A callback of Hydra that records the directory of a sweep when the sweep begins."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not ranks.launched():
            _ROOT[:] = [Path(str(config.hydra.sweep.dir)).absolute()]
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            # progress bars of parallel jobs would overwrite each other
            os.environ.setdefault("TQDM_DISABLE", "1")
            if _ROOT:
                _WAITING.enter_context(status(JobCounter(_ROOT[0])))


class JobCounter:
    """The status line of a sweep: how many jobs have a result, counted at most once every SECONDS."""

    SECONDS = 5.0

    def __init__(self, root: Path) -> None:
        self.root, self.looked, self.words = root, -math.inf, ""

    def __call__(self) -> str:
        if time.monotonic() - self.looked >= self.SECONDS:
            count = sum(1 for _ in self.root.rglob(RESULT))
            self.looked, self.words = time.monotonic(), f"sweep: {count} job{'s' * (count != 1)} done"
        return self.words


@contextmanager
def summarized() -> Iterator[Sweep]:
    """Summarizes the sweep that runs inside, on exit or after an error. Prints the directory of the sweep last."""
    _ROOT.clear()
    sweep, ended = Sweep(), False
    before = signal.signal(signal.SIGTERM, _terminated) if may_set_handlers() else None
    try:
        yield sweep
        ended = True
    except RuntimeError as e:
        if type(e).__name__ != "TerminatedWorkerError":
            raise
        raise JobError(
            "the process of a job was killed, usually for lack of memory, and joblib has ended all jobs. The same "
            f"command with {option('hydra.sweep.dir', _ROOT[0])} continues them"
        ) from e
    finally:
        _WAITING.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if _ROOT and is_created_here(_ROOT[0]) and _remove_if_unused(_ROOT[0]):
            sweep.refused = True
        elif _ROOT and _ROOT[0].is_dir():
            table, sweep.undone = write_summary(_ROOT[0])
            rest = "" if ended else "\n\nstopped; the same command with the same hydra.sweep.dir runs the missing jobs"
            sys.stdout.flush()
            print(f"\n{table}{rest}\n\n{_ROOT[0]}")


# files that launchers and sweepers write into the directory of a sweep
LAUNCHER_FILES = ("multirun.yaml", "optimization_results.yaml", ".submitit")


def _remove_if_unused(root: Path) -> bool:
    """Removes the directory of a sweep if no job has begun to train. Returns whether it was removed.

    A refused job leaves only its overrides and its error in its directory, an interrupted job only its overrides.
    """
    jobs = {folder / name for folder in jobs_in(root) for name in (OVERRIDES, ERROR)}
    files = {path for path in root.rglob("*") if path.is_file()}
    if any(path.relative_to(root).parts[0] not in LAUNCHER_FILES for path in files - jobs):
        return False
    shutil.rmtree(root)
    return True


def _terminated(number: int, frame: object) -> None:
    """Ends a sweep between two jobs, or while it waits for jobs in other processes. These jobs end as well."""
    if _ROOT:
        raise SystemExit(128 + number)
    # no sweep has begun, so the signal has its default effect
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
