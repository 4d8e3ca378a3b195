"""Locks run directories, refuses directories that contain a run, and removes the files of refused runs."""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import filelock

from flowtrain.training import checkpoint_files
from flowtrain.utils import ranks
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import resume_command

# the lock file, and a file that names its holder, because other processes cannot read a locked file on Windows
NAME, HOLDER = ".lock", ".holder"
# the directory of a search's candidates inside the run directory, and the state file inside that directory
SEARCH_FOLDER, SEARCH_STATE = "search", "search.json"
WRITTEN = (SEARCH_FOLDER, "metrics.jsonl", "flowtrain.log", "result.json", "checkpoints/last.pt", "checkpoints/best.pt")
# files that a run writes before its training begins
FILES_BEFORE_TRAINING = (
    ".hydra/config.yaml",
    ".hydra/hydra.yaml",
    ".hydra/overrides.yaml",
    "flowtrain.log",
    "metrics.jsonl",
    "checkpoints/teacher.pt",
)
# seconds to retry, because a process that ends may delete the lock file that another process has just opened
PATIENCE = 0.1


class InUseError(ConfigError):
    """Another process is using the run directory."""


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Context manager that locks the run directory, and creates it if needed.

    The operating system releases the lock when the process ends or is killed. Leftover files of a killed process never
    block a new run. On a system without file locks, filelock uses a file with the process ID of the holder, which is
    ignored after that process has ended.

    Raises:
        InUseError: another process holds the lock. The message names this process.
        ConfigError: the directory cannot be created, a file of the run is a link whose target would be overwritten, or
            a file of another program has the name of the lock file.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"the run directory {run_dir} cannot be created ({e}); choose another") from e
    links = [name for name in (NAME, HOLDER, *WRITTEN) if (run_dir / name).is_symlink()]
    if links:
        raise ConfigError(f"{run_dir / links[0]} is a link, and the run would overwrite its target: remove the link")
    lock, holder = filelock.FileLock(run_dir / NAME), run_dir / HOLDER
    # a holder file begins with "process ", and the lock file is empty on systems with file locks
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
        # temporary files of a process that was killed while it wrote; no other process uses the directory now
        for pattern in ("checkpoints/.*.pt.*.*.tmp", ".metrics.jsonl.*.*.tmp"):
            for torn in (*run_dir.glob(pattern), *run_dir.glob(f"{SEARCH_FOLDER}/*/{pattern}")):
                torn.unlink(missing_ok=True)
        yield
    finally:
        holder.unlink(missing_ok=True)
        if isinstance(lock, filelock.UnixFileLock):
            # filelock does not remove the file. The file is removed while still locked, so that no other process can
            # hold the lock
            (run_dir / NAME).unlink(missing_ok=True)
        lock.release()


def _refuse_foreign_lock(file: Path, beginning: str) -> None:
    """Checks that an existing file is a lock file, which is empty or starts with `beginning`. It will be deleted."""
    if not file.exists():
        return
    try:
        foreign = not file.is_file() or (file.stat().st_size and not (beginning and file.read_text()[:8] == beginning))
    except (OSError, UnicodeError):
        # on Windows, a locked file cannot be read
        foreign = not file.is_file()
    if foreign:
        raise ConfigError(f"{file} is not the lock file of a run, but a run would delete it: choose another directory")


def _named(holder: Path) -> str:
    """Returns the description of the process that holds the lock, from its holder file."""
    try:
        return holder.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


def remove_empty(folders: list[Path]) -> None:
    """Removes empty directories, given innermost first. Stops at the first directory that is not empty."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def holds_run(run_dir: Path) -> bool:
    """Returns whether training has begun in a directory."""
    metrics = run_dir / "metrics.jsonl"
    measured = metrics.exists() and metrics.stat().st_size > 0
    searched = (
        any(run_dir.glob(f"{SEARCH_FOLDER}/*/checkpoints/*.pt")) and (run_dir / SEARCH_FOLDER / SEARCH_STATE).exists()
    )
    return measured or searched or (run_dir / "result.json").exists() or checkpoint_files.has_checkpoint(run_dir)


@contextmanager
def cleaned_up_unless_begun(
    run_dir: Path, refused: tuple[type[BaseException], ...], created: bool = True, files: Sequence[str] = ()
) -> Iterator[None]:
    """Context manager that removes the files written so far if an error is raised before training has begun.

    Files that existed before are kept, and configs among them get their old content back. Only the process that holds
    the lock of the directory may use this.

    Args:
        refused: the types of errors.
        created: whether this process has created the directory. If so, TensorBoard's files are removed too.
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
    """Context manager that locks the run directory. Rank 0 acquires the lock, and the other ranks wait for it."""
    with holding(run_dir) if ranks.is_first() else nullcontext():
        ranks.broadcast_object(True)
        yield


def claim_directory(run_dir: Path) -> None:
    """Checks that a directory contains no run. A run that was killed before its first checkpoint does not count.

    Raises:
        ConfigError: the directory contains a run.
    """
    if holds_run(run_dir):
        raise ConfigError(
            f"{run_dir} already contains a run and is not overwritten: resume it with {resume_command(run_dir)}, "
            "or choose another directory (name or hydra.run.dir, or run_dir in Python)"
        )
