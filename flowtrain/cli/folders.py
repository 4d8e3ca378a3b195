"""One's own configs and the code they name: the folder of --config-dir beside ours, and where Python looks for it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flowtrain.errors import ConfigError
from flowtrain.paths import config_dir

CONFIG_DIR = ("--config-dir", "-cd")


def split_folder(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """What --config-dir names, of several the last, and the other arguments.

    Raises:
        ConfigError: the flag, and nothing after it.
    """
    folder, rest, left = None, [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag not in CONFIG_DIR:
            rest.append(argument)
            continue
        folder = value if equals else next(left, "")
        if not folder:
            raise ConfigError(f"{flag}: give a folder of configs, as in {flag} conf")
    return folder, rest


def own_configs() -> Path | None:
    """The folder of --config-dir on this process's command line, None without one.

    Raises:
        ConfigError: there is no such folder.
    """
    given = split_folder(sys.argv[1:])[0]
    if given is None:
        return None
    folder = Path(given).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {given}: there is no such folder")
    return folder


def config_dirs() -> list[Path]:
    """The folders that configs come from, in the order in which Hydra looks through them."""
    own = own_configs()
    return [config_dir()] if own is None else [config_dir(), own]


def options(group: str) -> list[str]:
    """What there is to choose from in a config group."""
    return sorted({path.stem for folder in config_dirs() for path in (folder / group).glob("*.yaml")})


def look_here() -> None:
    """Python looks for modules in the working directory too, as `python -m` has it, after all that is installed.

    Only where the user names code: no file that happens to lie beside a checkpoint is ever imported.
    """
    if not sys.flags.safe_path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
