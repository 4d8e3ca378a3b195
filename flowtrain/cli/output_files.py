"""Checks the files that a command reads and writes before any work is done."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtrain.utils.errors import ConfigError

# the groups whose keys can be paths of data files
GROUPS_WITH_PATHS = ("data", "target")


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Any]) -> None:
    """Refuses outputs that are written twice or that are also inputs.

    Raises:
        ConfigError: an output that is written twice or is also an input, or that is a directory.
        OSError: a folder that cannot be written to.
    """
    taken = {
        Path(os.path.realpath(Path(given).expanduser())) for given in inputs if isinstance(given, str | Path) and given
    }
    for path in outputs:
        real = Path(os.path.realpath(path))
        if real in taken:
            raise ConfigError(f"{path}: this command already reads or writes this file; give another name")
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; give the name of a file")
        # a device or a pipe can receive several outputs
        if not real.exists() or real.is_file():
            taken.add(real)
        folder = next(parent for parent in real.parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a directory, so no file can be written into it")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: no permission to write into this directory")


def written_as(key: str, value: Any, *endings: str) -> Path | None:
    """Returns the file that an option names; None if the option is not given.

    Raises:
        ConfigError: the name ends in none of `endings`.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str) or Path(value).suffix not in endings:
        raise ConfigError(f"{key}={value}: give a file name that ends in {' or '.join(endings)}")
    return Path(value).expanduser()


def run_dir_of(path: Path) -> Path:
    """Returns the run directory of a file in its folder `checkpoints`, or else the folder of the file."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Makes the paths of data files absolute, so that a checkpoint finds them from any working directory."""
    groups = {
        group: {
            k: str(Path(v).expanduser().absolute()) if isinstance(v, str) and is_path(k) else v
            for k, v in config[group].items()
        }
        for group in GROUPS_WITH_PATHS
        if isinstance(config.get(group), Mapping)
    }
    return {**config, **groups}


def paths_of(data: Mapping[str, Any]) -> list[Any]:
    """Returns the files that a data set is read from."""
    return [value for key, value in data.items() if is_path(key)]


def is_path(key: str) -> bool:
    """Whether a key of data or target is the path of a file or a folder."""
    return key in ("path", "root") or key.endswith("_path")


def exists(text: str) -> bool:
    """Whether text from a command line is the path of a file or folder that exists."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # for example, the name is too long
        return False
