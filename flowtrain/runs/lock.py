"""One process at a time works in a run directory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from flowtrain.utils.errors import ConfigError

# the lock file, and a file that names its holder, because other processes cannot read a locked file on Windows
NAME, HOLDER = ".lock", ".holder"
WRITTEN = ("metrics.jsonl", "flowtrain.log", "result.json", "checkpoints/last.pt", "checkpoints/best.pt")
# seconds to retry: a holder that ends may delete the lock file that another process has just opened
PATIENCE = 0.1


class InUseError(ConfigError):
    """Another process works there."""


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Locks the run directory, and creates it if needed.

    The operating system releases the lock when the process ends, however it ends. Files left behind by a killed
    process never block a new run. Where the system has no file locks, filelock uses a file with the holder's process
    ID, and ignores it once that process has ended.

    Raises:
        InUseError: another process holds the lock; the message says which.
        ConfigError: a file of the run is a link, so that writing it would overwrite something else.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    links = [name for name in (NAME, HOLDER, *WRITTEN) if (run_dir / name).is_symlink()]
    if links:
        raise ConfigError(f"{run_dir / links[0]} is a link: a run writes its own files alone; remove it")
    lock, holder = filelock.FileLock(run_dir / NAME), run_dir / HOLDER
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=PATIENCE / 5)
    except filelock.Timeout as e:
        raise InUseError(
            f"{run_dir} is in use by {_named(holder)}: wait for it to end, or stop it, or choose another directory"
        ) from e
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        # of a process that was killed while it wrote them: no other writes them now
        for torn in [*run_dir.glob("checkpoints/.*.tmp"), *run_dir.glob(".metrics.jsonl.*.tmp")]:
            torn.unlink(missing_ok=True)
        yield
    finally:
        holder.unlink(missing_ok=True)
        if isinstance(lock, filelock.UnixFileLock):
            # filelock does not remove the file. It is removed while still locked, so that no other process can hold it
            (run_dir / NAME).unlink(missing_ok=True)
        lock.release()


def _named(holder: Path) -> str:
    """The holder of the lock, as it wrote itself."""
    try:
        return holder.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"
