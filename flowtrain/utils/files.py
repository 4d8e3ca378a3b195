"""Atomic writing of files, conversion to JSON, and the location of the configs."""

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

# numpy is imported inside functions, because this module is imported by every command before it is checked
if TYPE_CHECKING:
    import numpy as np


@contextmanager
def replacing(
    path: Path, durable: bool = False, check: Callable[[Path], None] | None = None, keep: Path | None = None
) -> Iterator[IO[bytes]]:
    """Opens a temporary file that replaces `path` on exit. If an error is raised, the old file does not change.

    Args:
        path: the file to replace.
        durable: whether the file is synchronized to the disk on exit, so that it survives a crash of the machine.
        check: a function that is called with the path of the new file before it replaces the old file. If the function
            raises an error, the old file stays.
        keep: a path to which the old file is moved.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        # do not replace a pipe or a device
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
    """Gives a file the second name `kept`, which may replace another file. `path` exists at all times."""
    link = kept.with_name(f".{kept.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        try:
            os.link(path, link)
        except (OSError, AttributeError):
            # the file system or the platform has no hard links
            shutil.copy2(path, link)
        link.replace(kept)
    finally:
        link.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows cannot open folders. It synchronizes names without this call
        return
    try:
        os.fsync(folder)
    except OSError as e:
        # some file systems, such as network file systems, synchronize only files
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON; see `to_json` and `replacing`."""
    write_text(path, to_json(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8; see `replacing`."""
    with replacing(path) as f:
        f.write(text.encode())


def write_npy(path: Path, array: "np.ndarray") -> None:
    """Writes an array as .npy; see `replacing`."""
    import numpy as np

    with replacing(path) as f:
        np.save(f, array)


def write_npz(path: Path, arrays: "Mapping[str, np.ndarray]", durable: bool = False) -> None:
    """Writes named arrays as .npz; see `replacing`."""
    import numpy as np

    with replacing(path, durable) as f:
        # the stub of savez takes the second positional argument for one of the arrays
        np.savez(f, **cast(Any, dict(arrays)))


def to_json(content: dict[str, Any], indent: int | None = None) -> str:
    """Converts to JSON. NaN and infinity become null, because JSON cannot represent them."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_dir() -> Path:
    """Returns the absolute path of the config folder, in a checkout, an editable install, a wheel or an sdist."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_groups() -> tuple[str, ...]:
    """Returns the names of the config groups, sorted."""
    return tuple(sorted(p.name for p in config_dir().iterdir() if p.is_dir()))
