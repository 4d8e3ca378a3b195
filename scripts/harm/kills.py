"""Training runs that are repeatedly killed and resumed until they end."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harm.compare import differences
from harm.part import Part, Verdict

RUN = [
    "data=moons", "device=cpu", "threads=1", "trainer.batch_size=32", "trainer.log_every=1", "trainer.val_every=20",
    "trainer.plot_every=null", "trainer.ema=0.9", "data.n_val=64", "data.n_test=100",
]  # fmt: skip
MODELS = {
    "realnvp": ["model=realnvp", "model.layers=4", "model.hidden=[8]", "trainer.steps=300"],
    "ffjord": [
        "model=ffjord", "model.hidden=[8,8]", "solver.rtol=1e-3", "trainer.guard_every=15", "trainer.steps=200",
        "trainer.lr_decay=plateau", "trainer.lr_plateau_patience=2",
    ],
}  # fmt: skip
# seconds between checks of a run while waiting for its moment
PAUSE = 3e-4
# approximate size of a row of metrics.jsonl, in bytes
ROW = 250


class Whole(NamedTuple):
    """An uninterrupted run: its keys, folder, steps, and the seconds until its first row and until its end."""

    keys: list[str]
    folder: Path
    steps: int
    trains: float
    ends: float


class Moment(NamedTuple):
    """The moment of a kill: `seconds` after the start, a row, the first write of a checkpoint, or the last row.

    The row is the row at distance `rows` from the first row. The checkpoint is the next checkpoint after this row.
    """

    after: str
    seconds: float
    rows: int = 0


def whole_run(keys: list[str], folder: Path) -> Whole:
    """Trains a run without interruption.

    Raises:
        SystemExit: the run failed.
    """
    begun, first = time.monotonic(), 0.0
    process = start_run(keys, folder)
    while process.poll() is None:
        if not first and (folder / "metrics.jsonl").exists():
            first = time.monotonic() - begun
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"stopped: flowtrain {' '.join(keys)} failed: {last_output(folder)}")
    steps = json.loads((folder / "result.json").read_text())["steps"]
    return Whole(keys, folder, steps, first, time.monotonic() - begun)


def kills(whole: Whole, part: Part, moments: Iterator[Moment] | None = None) -> None:
    """Kills and resumes runs, counts kills of resumable runs, and compares every completed run with `whole`.

    Args:
        moments: the moments of the kills; None draws random ones.
    """
    moments = moments or random_moments(part.rng, whole)
    runs, early, same = 0, 0, 0
    run = part.out / f"{part.name}_0".replace(" ", "_")
    while part.going or run.exists():
        process = start_run(whole.keys, run)
        phase = kill_at(next(moments), process, run, whole) if part.going else None
        process.wait()
        if phase is not None and resumable(run):
            part.count(Verdict(phase), "")
            continue
        if phase is not None:
            early += 1
        elif process.returncode:
            part.fail(f"{run}: exit code {process.returncode}: {last_output(run)}")
        elif found := differences(run, whole.folder):
            part.fail(f"{run}, compared with {whole.folder}: {'; '.join(found[:5])}")
        else:
            same += 1
            shutil.rmtree(run)
        # the next run starts in a new directory
        runs += 1
        run = part.out / f"{part.name}_{runs}".replace(" ", "_")
    part.notes.append(f"{same} of {runs - early} runs bitwise equal")
    part.notes += [f"{early} more killed before their first checkpoint"] if early else []


def start_run(keys: Sequence[str], run: Path) -> "subprocess.Popen[bytes]":
    """Starts the run in a new process, or resumes it if it has a checkpoint."""
    arguments = [f"resume={run}"] if resumable(run) else [*keys, f"hydra.run.dir={run}"]
    with run.with_suffix(".said").open("wb") as f:
        return subprocess.Popen([sys.executable, "-m", "flowtrain", *arguments], stdout=f, stderr=f)


def resumable(run: Path) -> bool:
    return any((run / "checkpoints" / name).exists() for name in ("last.pt", "last.previous.pt"))


def last_output(run: Path) -> str:
    """Returns the last lines that the run's last process printed."""
    return " / ".join(run.with_suffix(".said").read_text().splitlines()[-3:])


def random_moments(rng: random.Random, whole: Whole) -> Iterator[Moment]:
    """Yields moments at any time of the process, or at critical points."""
    within = {"start": whole.ends, "row": 2e-3, "save": 8e-3, "last row": whole.ends - whole.trains}
    while True:
        after = rng.choice(["start", "start", "start", "row", "save", "save", "save", "last row"])
        yield Moment(after, rng.uniform(0, within[after]), rng.randrange(1, whole.steps // 2))


def kill_at(moment: Moment, process: "subprocess.Popen[bytes]", run: Path, whole: Whole) -> str | None:
    """Kills the process at the moment and returns its phase, or None if it had already ended."""
    watch, begun, due = Watch(run, whole.steps), time.monotonic(), None
    while process.poll() is None:
        watch.look()
        if due is None and watch.reached(moment):
            due = (begun if moment.after == "start" else time.monotonic()) + moment.seconds
        if due is not None and time.monotonic() >= due:
            process.kill()
            process.wait()
            watch.look()
            return watch.phase if process.returncode == -signal.SIGKILL else None
        time.sleep(PAUSE)
    return None


class Watch:
    """The progress of a run's process, read from its files."""

    def __init__(self, run: Path, steps: int) -> None:
        self.metrics, self.checkpoints = run / "metrics.jsonl", run / "checkpoints"
        self.last = f'"step": {steps}, "split": "val"'.encode()
        # files of earlier, killed processes
        self.before, self.left = self._inode(), self._temporary()
        # the size of metrics.jsonl when this process first wrote it, or None before
        self.size: int | None = None
        # modification times of the checkpoints when the row was reached
        self.files: dict[str, int] = {}

    def look(self) -> None:
        if self.size is None and self._inode() != self.before:
            self.size = self.metrics.stat().st_size

    def reached(self, moment: Moment) -> bool:
        if moment.after == "start" or self.size is None:
            return moment.after == "start"
        if moment.after == "last row":
            return self.is_evaluating
        if self.metrics.stat().st_size <= self.size + ROW * (moment.rows - 1):
            return False
        # any change counts, independently of how a checkpoint is written
        self.files = self.files or self._written()
        return moment.after == "row" or self._written() != self.files

    @property
    def phase(self) -> str:
        if self.size is None:
            return "starting"
        return "saving" if self.is_saving else "evaluating" if self.is_evaluating else "training"

    @property
    def is_saving(self) -> bool:
        return bool(self._temporary() - self.left)

    @property
    def is_evaluating(self) -> bool:
        with self.metrics.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - 2 * ROW))
            return self.last in f.read()

    def _written(self) -> dict[str, int]:
        """Returns the modification time of each checkpoint."""
        found = {}
        for path in self.checkpoints.glob("*"):
            # the file may have been deleted in the meantime
            with suppress(FileNotFoundError):
                found[path.name] = path.stat().st_mtime_ns
        return found

    def _inode(self) -> int:
        return self.metrics.stat().st_ino if self.metrics.exists() else 0

    def _temporary(self) -> set[str]:
        return {path.name for path in self.checkpoints.glob(".*.tmp")} if self.checkpoints.is_dir() else set()
