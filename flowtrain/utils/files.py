"""Writes files whole or not at all, and finds the configs."""

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np


@contextmanager
def replacing(
    path: Path, durable: bool = False, check: Callable[[Path], None] | None = None, keep: Path | None = None
) -> Iterator[IO[bytes]]:
    """A file to write in the place of `path`: a failure inside leaves the old one.

    Args:
        durable: whether it is on the disk when this ends, whatever becomes of the machine.
        check: called with the new file before it takes the place of the old one; what it raises, leaves that.
        keep: where the old file stays.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        # a pipe or a device, whose place no file should take
        with path.open("wb") as f:
            yield f
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as f:
            yield f
            if durable:
                f.flush()
                os.fsync(f.fileno())
        if check is not None:
            check(temporary)
        if keep is not None and path.exists():
            _keep(path, keep)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def _keep(path: Path, kept: Path) -> None:
    """A second name for a file, in the place of what has that name: there is no moment without `path`."""
    link = kept.with_name(f".{kept.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        try:
            os.link(path, link)
        except (OSError, AttributeError):
            # a file system or a platform without links
            shutil.copy2(path, link)
        link.replace(kept)
    finally:
        link.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folders, and writes names to the disk by itself
        return
    try:
        os.fsync(folder)
    except OSError as e:
        # a file system that does this for files alone, as some network ones
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON, see `to_json`."""
    write_text(path, to_json(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8, in the place of what was there."""
    with replacing(path) as f:
        f.write(text.encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    """An array as .npy, in the place of what was there."""
    with replacing(path) as f:
        np.save(f, array)


def to_json(content: dict[str, Any], indent: int | None = None) -> str:
    """JSON with null for what is not a finite number, which JSON has no word for."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_dir() -> Path:
    """Absolute path of the config folder, for a checkout, an editable install, a wheel and an sdist alike."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_groups() -> tuple[str, ...]:
    """The names of the config groups, sorted."""
    return tuple(sorted(p.name for p in config_dir().iterdir() if p.is_dir()))
