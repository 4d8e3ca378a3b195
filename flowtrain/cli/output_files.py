"""Which files a command reads and writes, looked at before any work is done."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtrain.utils.errors import ConfigError


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Any]) -> None:
    """Refuses, before any work is done, to write two things to one place, or over what is read.

    Raises:
        ConfigError: such a place, or a directory.
        OSError: a folder that cannot be written.
    """
    taken = {
        Path(os.path.realpath(Path(given).expanduser())) for given in inputs if isinstance(given, str | Path) and given
    }
    for path in outputs:
        real = Path(os.path.realpath(path))
        if real in taken:
            raise ConfigError(f"{path}: this is read here, or written to already; give another name")
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; give the name of a file")
        # a device or a pipe can take more than one
        if not real.exists() or real.is_file():
            taken.add(real)
        folder = next(parent for parent in real.parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a directory: nothing can be written into it")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")


def written_as(key: str, value: Any, *endings: str) -> Path | None:
    """The file that an option names, None where it is not given.

    Raises:
        ConfigError: a name that ends in none of `endings`.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str) or Path(value).suffix not in endings:
        raise ConfigError(f"{key}={value}: this is written as {' or '.join(endings)}; give a name that ends so")
    return Path(value).expanduser()


def run_dir_of(path: Path) -> Path:
    """The run directory of a checkpoint file; for one kept elsewhere, the folder it lies in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Data files by absolute path, so that a checkpoint finds them from any working directory."""
    data = {
        k: str(Path(v).expanduser().absolute()) if isinstance(v, str) and is_path(k) else v
        for k, v in config["data"].items()
    }
    return {**config, "data": data}


def paths_of(data: Mapping[str, Any]) -> list[Any]:
    """The files that a data set is read from."""
    return [value for key, value in data.items() if is_path(key)]


def is_path(key: str) -> bool:
    """Whether a key of the data says where files are."""
    return key in ("path", "root") or key.endswith("_path")


def exists(text: str) -> bool:
    """Whether text from a command line is the path of a file or folder that exists."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # for example, the name is too long
        return False
