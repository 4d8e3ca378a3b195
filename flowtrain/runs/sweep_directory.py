"""Reads the directory of a sweep: its jobs with their overrides, results and errors.

This module does not import torch.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowtrain.training.old_checkpoints import renamed_override
from flowtrain.utils.errors import ConfigError, first_line

# files in the directory of a run: the result, the error message, the overrides and the config
RESULT, ERROR = "result.json", "error.txt"
OVERRIDES, CONFIG = ".hydra/overrides.yaml", ".hydra/config.yaml"
# keys of result.json in the CSV file
MEASURED = (
    "val_nll", "val_nll_stderr", "nll", "nll_stderr", "bits_per_dim", "kl", "nfe", "solver_error", "roundtrip_error",
    "steps", "train_seconds",
)  # fmt: skip
# further keys of result.json of a run on a target
OF_TARGET = ("log_z", "log_z_stderr", "ess", "pareto_k", "forward_ess")


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        name: the directory of the run, relative to the directory of the sweep.
        keys: the values of the run's overrides, by key.
        result: the content of the run's result.json; empty if the file is missing or damaged.
        error: the error message if there is no result, else None.
    """

    name: str
    keys: dict[str, str]
    result: dict[str, Any]
    error: str | None

    @property
    def state(self) -> str:
        """The state of the run: done, failed, or stopped. A stopped run has neither a result nor an error."""
        return "done" if self.result else "failed" if self.error else "stopped"

    @property
    def val_nll(self) -> float:
        """The validation NLL in nats; infinity if missing."""
        found = self.result.get("val_nll")
        return math.inf if found is None else float(found)

    @property
    def val_stderr(self) -> float:
        """The standard error of the validation NLL; NaN if missing, as in runs of older versions."""
        found = self.result.get("val_nll_stderr")
        return math.nan if found is None else float(found)


def read(root: Path) -> list[Job]:
    """Reads the jobs of a sweep, sorted by validation NLL. Jobs without a result are last."""
    jobs = []
    for folder, given in jobs_in(root).items():
        error = folder / ERROR
        try:
            result, said = result_of(folder), error.read_text(errors="replace").strip() if error.is_file() else None
        except ConfigError as e:
            result, said = {}, str(e)
        keys = dict(_pair(override) for override in given)
        jobs.append(Job(str(folder.relative_to(root)), keys, result, None if result else said))
    return sorted(jobs, key=lambda job: (job.val_nll, job.state, len(job.name), job.name))


def jobs_in(root: Path) -> dict[Path, list[str]]:
    """Returns the directories of a sweep's jobs, each with the overrides of its run."""
    found = sorted(path.parent.parent for path in root.glob(f"**/{OVERRIDES}"))
    return {folder: given for folder in found if folder != root and (given := overrides_of(folder)) is not None}


def overrides_of(folder: Path) -> list[str] | None:
    """Returns the overrides of the run in a directory; None if the directory contains no run."""
    try:
        given = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8"))
    except Exception:  # the file may be missing, or may belong to another program
        return None
    # old names of keys become the present names, so that a sweep of an earlier version can be continued
    return [renamed_override(str(item)) for item in given] if isinstance(given, list) else None


def result_of(folder: Path) -> dict[str, Any]:
    """Reads the result.json of a run; empty if it does not exist.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / RESULT
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, OSError, RecursionError) as e:
        raise ConfigError(f"{path} is damaged ({first_line(e)}): remove it to evaluate the run again") from e
    numbers = [found.get(name) for name in (*MEASURED, *OF_TARGET)] if isinstance(found, dict) else ["no object"]
    if not all(number is None or isinstance(number, int | float) for number in numbers):
        raise ConfigError(f"{path} is damaged: remove it to evaluate the run again")
    return found


def _pair(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+").partition("=")
    quoted = re.fullmatch(r"(['\"])(.*)\1", value, re.S)
    return key, re.sub(r"\\(['\"])", r"\1", quoted[2]) if quoted else value


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """Returns the keys whose values differ between jobs, in the order of the command line."""
    keys = dict.fromkeys(key for job in jobs for key in job.keys)
    return [key for key in keys if len({job.keys.get(key) for job in jobs}) > 1]
