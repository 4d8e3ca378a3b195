"""Locks a run directory, refuses one that holds a run, and removes what a refused run has written."""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import filelock

from flowtrain.training import checkpoint
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import resume_command

# the lock file, and a file that names its holder, because other processes cannot read a locked file on Windows
NAME, HOLDER = ".lock", ".holder"
# of a search, the directory of its candidates, and its state inside of that
SEARCH_FOLDER, SEARCH_STATE = "search", "search.json"
WRITTEN = (SEARCH_FOLDER, "metrics.jsonl", "flowtrain.log", "result.json", "checkpoints/last.pt", "checkpoints/best.pt")
# what a run writes before its training begins
FILES_BEFORE_TRAINING = (
    ".hydra/config.yaml",
    ".hydra/hydra.yaml",
    ".hydra/overrides.yaml",
    "flowtrain.log",
    "metrics.jsonl",
    "checkpoints/teacher.pt",
)
# seconds to retry: a holder that ends may delete the lock file that another process has just opened
PATIENCE = 0.1


class InUseError(ConfigError):
    """Another process is using the run directory."""


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Locks the run directory, and creates it if needed.

    The operating system releases the lock when the process ends, however it ends. Files left behind by a killed
    process never block a new run. Where the system has no file locks, filelock uses a file with the holder's process
    ID, and ignores it once that process has ended.

    Raises:
        InUseError: another process holds the lock; the message says which.
        ConfigError: the directory cannot be created; or a file of the run is a link, so that writing it would overwrite
            something else; or a file of someone else has the name of the lock.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"the run directory {run_dir} cannot be created ({e}); choose another") from e
    links = [name for name in (NAME, HOLDER, *WRITTEN) if (run_dir / name).is_symlink()]
    if links:
        raise ConfigError(f"{run_dir / links[0]} is a link: a run writes its own files alone; remove it")
    lock, holder = filelock.FileLock(run_dir / NAME), run_dir / HOLDER
    # the lock file is empty where the system has file locks, and a holder begins with its process
    _refuse_foreign_lock(holder, "process ")
    if not isinstance(lock, filelock.SoftFileLock):
        _refuse_foreign_lock(run_dir / NAME, "")
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=PATIENCE / 5)
    except filelock.Timeout as e:
        raise InUseError(
            f"{run_dir} is in use by {_named(holder)}: wait for it to end, or stop it, or choose another directory"
        ) from e
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        # left behind by a process that was killed while writing: this process holds the lock
        for pattern in ("checkpoints/.*.pt.*.*.tmp", ".metrics.jsonl.*.*.tmp"):
            for torn in (*run_dir.glob(pattern), *run_dir.glob(f"{SEARCH_FOLDER}/*/{pattern}")):
                torn.unlink(missing_ok=True)
        yield
    finally:
        holder.unlink(missing_ok=True)
        if isinstance(lock, filelock.UnixFileLock):
            # filelock does not remove the file. It is removed while still locked, so that no other process can hold it
            (run_dir / NAME).unlink(missing_ok=True)
        lock.release()


def _refuse_foreign_lock(file: Path, beginning: str) -> None:
    """Refuses a file that is not a lock file of a run: one would be deleted. Lock files are empty or begin so."""
    if not file.exists():
        return
    try:
        foreign = not file.is_file() or (file.stat().st_size and not (beginning and file.read_text()[:8] == beginning))
    except (OSError, UnicodeError):
        # on Windows, a locked file cannot be read
        foreign = not file.is_file()
    if foreign:
        raise ConfigError(f"{file} is not a lock of a run, and a run would delete it: choose another directory")


def _named(holder: Path) -> str:
    """The process that holds the lock, in words from its holder file."""
    try:
        return holder.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


def remove_empty(folders: list[Path]) -> None:
    """Removes empty directories, innermost first. Stops at the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def holds_run(run_dir: Path) -> bool:
    """Whether training has begun in a directory."""
    metrics = run_dir / "metrics.jsonl"
    measured = metrics.exists() and metrics.stat().st_size > 0
    searched = (
        any(run_dir.glob(f"{SEARCH_FOLDER}/*/checkpoints/*.pt")) and (run_dir / SEARCH_FOLDER / SEARCH_STATE).exists()
    )
    return measured or searched or (run_dir / "result.json").exists() or checkpoint.any_in(run_dir)


@contextmanager
def cleaned_up_unless_begun(
    run_dir: Path, refused: tuple[type[BaseException], ...], created: bool = True, files: Sequence[str] = ()
) -> Iterator[None]:
    """If one of the `refused` errors is raised inside before training has begun, removes the files written so far.

    Files that existed before are kept, and configs among them get their old content back. Only the process that holds
    the lock of the directory may call this.

    Args:
        created: whether this process has created the directory; then TensorBoard's files are removed too.
        files: further files that the run writes before training begins.
    """
    paths = [run_dir / name for name in (*FILES_BEFORE_TRAINING, *files)]
    searched = (run_dir / SEARCH_FOLDER).exists()
    before = {path: path.read_bytes() if path.suffix == ".yaml" else None for path in paths if path.exists()}
    try:
        yield
    except refused:
        if not holds_run(run_dir):
            if not searched:
                shutil.rmtree(run_dir / SEARCH_FOLDER, ignore_errors=True)
            boards = [*run_dir.glob("tensorboard/events.out.tfevents.*")] if created else []
            for path in (*paths, *boards):
                content = before.get(path)
                if content is not None:
                    path.write_bytes(content)
                elif path not in before:
                    path.unlink(missing_ok=True)
                    remove_empty([path.parent] if path.parent != run_dir else [])
        raise


@contextmanager
def locked_directory(run_dir: Path) -> Iterator[None]:
    """Locks the run directory inside the context. Rank 0 takes the lock, and the other ranks wait for it."""
    with holding(run_dir) if ranks.is_first() else nullcontext():
        ranks.broadcast_object(True)
        yield


def claim_directory(run_dir: Path) -> None:
    """Refuses a directory that already holds a run. A run killed before its first checkpoint does not count."""
    if holds_run(run_dir):
        raise ConfigError(
            f"{run_dir} already holds a run and is not overwritten: resume it with {resume_command(run_dir)}, "
            "or choose another directory (name or hydra.run.dir, or run_dir in Python)"
        )
