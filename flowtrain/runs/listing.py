"""Reads run directories for a list of runs. Reads no checkpoint and runs no code of a run."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from flowtrain.runs.compose import read_yaml
from flowtrain.runs.console import data_name, name_of
from flowtrain.runs.run_directory import NAME as LOCK
from flowtrain.runs.sweep_directory import ERROR, RESULT, read, result_of, varied_keys
from flowtrain.utils.errors import ConfigError, first_line

CONFIG, METRICS = ".hydra/config.yaml", "metrics.jsonl"
# files that Hydra and `flowtrain` write into the directory of a sweep
OF_SWEEP = ("multirun.yaml", "sweep.csv")
# a directory with one of these files is a run
OF_RUN = (METRICS, RESULT, CONFIG)
# the columns of a file with the listed runs, in this order
COLUMNS = (
    "name", "sweep", "overrides", "model", "data", "split", "nll", "nll_stderr", "bits_per_dim", "train_seconds",
    "steps", "state", "problem", "path",
)  # fmt: skip


@dataclass(frozen=True)
class ListedRun:
    """A run in a list.

    Attributes:
        path: the run directory.
        name: the path of the run below the directory that was searched.
        model, data: the names of the model and of the data; None if unknown.
        split: the set of `nll`: test, or val if the run has no result.
        nll, nll_stderr: in nats; None if there is no validation yet.
        bits_per_dim: for images.
        train_seconds: seconds of training.
        steps: the last step that the metrics or the result name.
        state: "finished", "stopped at step K", "failed", "failed at step K" or "running".
        changed: the time at which a file of the run was last written, in seconds since 1970.
        sweep: the path of the sweep that the run belongs to.
        overrides: the overrides of the run that differ between the runs of its sweep.
        problem: describes what cannot be read; empty if everything was read.
    """

    path: Path
    name: str
    model: str | None = None
    data: str | None = None
    split: str | None = None
    nll: float | None = None
    nll_stderr: float | None = None
    bits_per_dim: float | None = None
    train_seconds: float | None = None
    steps: int | None = None
    state: str = ""
    changed: float = 0.0
    sweep: Path | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the values by the names in COLUMNS, for JSON."""
        found = {name: getattr(self, name) for name in COLUMNS}
        sweep = None if self.sweep is None else str(self.sweep)
        return {**found, "path": str(self.path), "sweep": sweep, "overrides": dict(self.overrides)}


def find_runs(root: Path) -> list[ListedRun]:
    """Returns the runs in a directory and below it, in the order of their last changes.

    The runs of a sweep follow each other in the order of their names, at the place of the run that changed last.
    Candidates of a search are left out.

    Args:
        root: a run directory, a sweep directory, or a directory that contains runs.
    """
    paths = [*_run_dirs(root)]
    sweeps = {path: _sweep_of(path, root) for path in paths}
    overrides: dict[Path, dict[str, str]] = {}
    for sweep in {sweep for sweep in sweeps.values() if sweep is not None}:
        overrides |= _swept_overrides(sweep)
    runs = [read_run(path, root, sweeps[path], overrides.get(path, {})) for path in paths]
    newest: dict[Path, float] = {}
    for run in runs:
        place = run.sweep or run.path
        newest[place] = max(newest.get(place, 0.0), run.changed)

    def order(run: ListedRun) -> tuple[Any, ...]:
        place = run.sweep or run.path
        return newest[place], str(place), _natural(run.name)

    return sorted(runs, key=order)


def _run_dirs(root: Path) -> Iterator[Path]:
    """Yields the run directories below a directory. Hidden directories and directories in a run are not searched."""
    # os.walk skips directories that cannot be read, and does not follow links
    for folder, below, files in os.walk(root):
        path = Path(folder)
        is_sweep = any(name in files for name in OF_SWEEP)
        # a named pipe in `files` would block the reader
        if not is_sweep and any(_is_file(path / name) for name in OF_RUN):
            below.clear()
            yield path
        below[:] = sorted(name for name in below if not name.startswith("."))


def _sweep_of(path: Path, root: Path) -> Path | None:
    """Returns the directory of the sweep to which a run belongs; None if there is no such directory in `root`."""
    for folder in path.parents:
        if any(_is_file(folder / name) for name in OF_SWEEP):
            return folder
        if folder == root:
            break
    return None


def _swept_overrides(sweep: Path) -> dict[Path, dict[str, str]]:
    """Returns the overrides that differ between the runs of a sweep, by run directory."""
    try:
        jobs = read(sweep)
    except OSError:
        # the sweep of another user
        return {}
    keys = varied_keys(jobs)
    return {sweep / job.name: {key: job.keys[key] for key in keys if key in job.keys} for job in jobs}


def read_run(
    path: Path, root: Path | None = None, sweep: Path | None = None, overrides: Mapping[str, str] | None = None
) -> ListedRun:
    """Reads a run directory. Damaged files are named in `problem`."""
    problems: list[str] = []
    model, data = _names(path, problems)
    result = _result(path, problems)
    has_result = _number(result.get("nll")) is not None
    if result and not has_result:
        problems.append(f"{RESULT} has no finite NLL")
    rows = [] if has_result else read_rows(path, problems)
    last_step = max((row["step"] for row in rows), default=0)
    if has_result:
        last_step = max(_whole(result.get("steps")), _whole(_last_row(path).get("step")))
        best: Mapping[str, Any] = result
    else:
        validations = [row for row in rows if row.get("split") == "val" and _number(row.get("nll")) is not None]
        best = min(validations, key=lambda row: row["nll"], default={})
    seconds = [s for row in rows if (s := _number(row.get("seconds"))) is not None]
    return ListedRun(
        path=path,
        name=str(path.relative_to(root)) if root is not None and path != root else path.name or str(path),
        model=model,
        data=data,
        split="test" if has_result else "val" if best else None,
        nll=_number(best.get("nll")),
        nll_stderr=_number(best.get("nll_stderr")),
        bits_per_dim=_number(best.get("bits_per_dim")),
        train_seconds=_number(result.get("train_seconds")) if has_result else seconds[-1] if seconds else None,
        steps=last_step,
        state=_state(path, result, last_step),
        changed=max((_changed(path / name) for name in (*OF_RUN, "flowtrain.log")), default=0.0),
        sweep=sweep,
        overrides=overrides or {},
        problem="; ".join(problems),
    )


def _names(path: Path, problems: list[str]) -> tuple[str | None, str | None]:
    """Returns the names of the model and of the data."""
    try:
        config = read_yaml((path / CONFIG).read_text(encoding="utf-8"))
        return name_of(config["model"]), data_name(config)
    except FileNotFoundError:
        return None, None
    except Exception as e:  # a file of this name may contain anything
        problems.append(f"{CONFIG} cannot be read ({_brief(e)})")
        return None, None


def _result(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return result_of(path)
    except (ConfigError, RecursionError):
        problems.append(f"{RESULT} is damaged")
        return {}


def read_rows(path: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl that have a step. Other lines are left out."""
    rows = []
    try:
        with (path / METRICS).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    rows.append({**row, "step": int(row["step"])})
                except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
                    continue
    except FileNotFoundError:
        pass
    except OSError as e:
        if problems is not None:
            problems.append(f"{METRICS} cannot be read ({_brief(e)})")
    return rows


def _last_row(path: Path) -> dict[str, Any]:
    """Returns the last complete row of metrics.jsonl. Reads only the end of the file."""
    try:
        with (path / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return row
    return {}


def _state(path: Path, result: Mapping[str, Any], last_step: int) -> str:
    """Returns the state of a run; see `ListedRun`."""
    if is_in_use(path):
        return "running"
    if result and last_step <= _whole(result.get("steps"), last_step):
        return "finished"
    if _is_file(path / ERROR):
        return "failed"
    # training with on_nonfinite=stop keeps the batch of the step at which it failed
    kept = [int(found[1]) for file in path.glob("failed/*.npz") if (found := re.match(r"step_(\d+)", file.name))]
    return f"failed at step {max(kept)}" if kept and max(kept) > last_step else f"stopped at step {last_step}"


def is_in_use(path: Path) -> bool:
    """Whether a live process holds the lock of a run directory."""
    file = path / LOCK
    # if the system has file locks, the lock file is empty
    if not _is_file(file) or (file.stat().st_size and filelock.FileLock is not filelock.SoftFileLock):
        return False
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:
        # the directory of another user
        return False
    lock.release()
    return False


def _is_file(path: Path) -> bool:
    """Whether a path is a file that can be seen; False without permission."""
    try:
        return path.is_file()
    except OSError:
        return False


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: Any) -> float | None:
    """Returns a finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number and math.isfinite(value) else None


def _whole(value: Any, default: int = 0) -> int:
    number = _number(value)
    return default if number is None else int(number)


def _brief(error: Exception) -> str:
    return first_line(error)[:80]


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that puts 9 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
