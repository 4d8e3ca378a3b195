"""One process at a time works in a run directory."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowtrain.errors import ConfigError

NAME = ".lock"
WRITTEN = ("metrics.jsonl", "flowtrain.log", "result.json", "checkpoints/last.pt", "checkpoints/best.pt")


class InUseError(ConfigError):
    """Another process works there."""


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Holds the run directory, made where it is not there.

    The lock is the kernel's, on an open file: it ends with the process, however that ends, and a file left behind by
    one that was killed holds nobody up.

    Raises:
        InUseError: another process has it; the message says which.
        ConfigError: a file of the run is a link, through which something else would be written over.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    links = [name for name in (NAME, *WRITTEN) if (run_dir / name).is_symlink()]
    if links:
        raise ConfigError(f"{run_dir / links[0]} is a link: a run writes its own files alone; remove it")
    file = _locked(run_dir / NAME)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        # of a process that was killed while it wrote them: no other writes them now
        for torn in [*run_dir.glob("checkpoints/.*.tmp"), *run_dir.glob(".metrics.jsonl.*.tmp")]:
            torn.unlink(missing_ok=True)
        yield
    finally:
        # while it is held: no other process can have locked this file by then
        (run_dir / NAME).unlink(missing_ok=True)
        os.close(file)


def _locked(path: Path) -> int:
    """A descriptor of the file, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise InUseError(
                f"{path.parent} is in use by {holder}: wait for it to end, or stop it, or choose another directory"
            ) from e
        try:
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        # its last holder took the file away between the two calls
        os.close(file)
