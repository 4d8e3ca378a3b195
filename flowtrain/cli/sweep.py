"""The jobs of `flowtrain -m`: each has its own directory, one that fails leaves the others alone, none is done twice.

A sweep run again in the directory of an earlier one finds the runs of its jobs by their overrides: those that have
ended are left as they are, those that were stopped go on, and only the missing begin.
"""

import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from flowtrain.cli.common import message_of, plain, trusted
from flowtrain.cli.runs import begin, go_on
from flowtrain.errors import ConfigError, FlowtrainError
from flowtrain.files import write_text
from flowtrain.sweep import ERROR, OVERRIDES, RESULT, overrides_of, write_summary
from flowtrain.training import checkpoint

log = logging.getLogger("flowtrain")


def job(config: DictConfig, run_dir: Path) -> float:
    """The best validation NLL of a job, for a sweeper that looks for the least: infinity where it failed.

    Args:
        run_dir: where Hydra would have it.
    """
    given = list(HydraConfig.get().overrides.task)
    run_dir = place(run_dir, given)
    if (run_dir / RESULT).is_file():
        print(run_dir)
        return _least(json.loads((run_dir / RESULT).read_text()).get("val_nll"))
    (run_dir / ERROR).unlink(missing_ok=True)
    try:
        if checkpoint.any_in(run_dir):
            best, code = go_on(run_dir, trusted(plain(config)["trust"]))
        else:
            (run_dir / OVERRIDES).parent.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(given), run_dir / OVERRIDES)
            best, code = begin(config, run_dir)
    except Exception as e:
        message, _ = message_of(e) or (traceback.format_exc(), 1)
        print(f"flowtrain: {run_dir.name} ({' '.join(given)}): {message}", file=sys.stderr)
        write_text(run_dir / ERROR, message.rstrip() + "\n")
        return math.inf
    print(run_dir)
    if code:
        stopped(code - 128)
        # a signal to stop is one to the whole sweep
        raise SystemExit(code)
    return _least(best)


def stopped(number: int) -> None:
    """Tells a launcher that waits for a signal, now that the run is saved: submitit puts the job back in the queue."""
    handler = signal.getsignal(number)
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)


def _least(nll: float | None) -> float:
    # sweepers refuse what is not a number
    return math.inf if nll is None or math.isnan(nll) else nll


def place(run_dir: Path, given: list[str]) -> Path:
    """The directory of the job with these overrides: one that has them already, else a free one."""
    root = run_dir.parent
    for there in sorted(root.iterdir()):
        if overrides_of(there) == given:
            if there != run_dir and not any(run_dir.iterdir()):
                run_dir.rmdir()
            return there
    free, n = run_dir, 0
    while (free / OVERRIDES).exists():
        n += 1
        free = run_dir.with_name(f"{run_dir.name}_{n}")
    return free


@dataclass
class Sweep:
    """Where the sweep of this process is, None where there is none, and what becomes of it."""

    root: Path | None = None
    failed: int = field(default=0)

    @property
    def code(self) -> int:
        return 1 if self.failed else 0


_SWEEP = Sweep()


class JobError(FlowtrainError):
    """A job that took the others with it."""

    exit_code = 1


class Root(Callback):
    """Hydra's callback that says where a sweep is, which no one else knows before it has begun."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _SWEEP.root = Path(str(config.hydra.sweep.dir)).absolute()
        # bars of jobs side by side would write over one another; those of this process have theirs by now
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def summarized() -> Iterator[Sweep]:
    """Whatever ends a sweep inside, what there is of it is summed up, and its directory printed last."""
    _SWEEP.root, _SWEEP.failed = None, 0
    if os.environ.get("WORLD_SIZE", "1") != "1" and {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError("a sweep runs jobs of one process each: leave out torchrun, or -m")
    try:
        yield _SWEEP
    except RuntimeError as e:
        if type(e).__name__ != "TerminatedWorkerError":
            raise
        raise JobError(
            "the process of a job was killed, for its memory as a rule, and joblib ends all jobs with it. Those that "
            f"ran go on where they were with the same command and hydra.sweep.dir={_SWEEP.root}"
        ) from e
    finally:
        if _SWEEP.root is not None and _SWEEP.root.is_dir():
            sys.stdout.flush()
            table, _SWEEP.failed = write_summary(_SWEEP.root)
            print(f"\n{table}\n\n{_SWEEP.root}")
