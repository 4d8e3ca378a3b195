"""Config files: their folders and options, the config that overrides compose, and the comments that explain keys."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from flowtrain.runs import compose as compose_files
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir

CONFIG_DIR = ("--config-dir", "-cd")


def split_config_dir(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
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


def user_config_dir() -> Path | None:
    """The folder of --config-dir on this process's command line, None without one.

    Raises:
        ConfigError: there is no such folder.
    """
    given = split_config_dir(sys.argv[1:])[0]
    if given is None:
        return None
    folder = Path(given).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {given}: there is no such folder")
    return folder


def config_dirs() -> list[Path]:
    """The folders that configs come from, in the order in which Hydra looks through them."""
    own = user_config_dir()
    return [config_dir()] if own is None else [config_dir(), own]


def options(group: str) -> list[str]:
    """The choices of a config group."""
    return compose_files.options(group, config_dirs())


def read(group: str, name: str) -> "CommentedConfig":
    """The file of a choice, where there is one."""
    return CommentedConfig(_text(group, name))


def _text(group: str, name: str) -> str:
    paths = [folder / group / f"{name}.yaml" for folder in config_dirs()]
    return next((path.read_text() for path in paths if path.is_file()), "")


def compose_defaults(overrides: Sequence[str], with_hydra: bool = False) -> dict[str, Any]:
    """The plain config that overrides compose. `with_hydra` adds Hydra's own part, not interpolated."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        if not with_hydra:
            return plain(compose("config", [*own_searchpath(), *overrides]))
        whole = compose("config", [*own_searchpath(), *overrides], return_hydra_config=True)
        return cast(dict[str, Any], OmegaConf.to_container(whole))


def own_searchpath() -> list[str]:
    """The override that has Hydra look for configs in the folder of --config-dir too."""
    own = user_config_dir()
    if own is None:
        return []
    quoted = str(own).replace("\\", r"\\").replace("'", r"\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def plain(config: DictConfig) -> dict[str, Any]:
    """Interpolations resolved, plain containers."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def add_working_directory_to_path() -> None:
    """Python looks for modules in the working directory too, as `python -m` has it, after all that is installed.

    Only where the user names code: no file that happens to lie beside a checkpoint is ever imported.
    """
    if not sys.flags.safe_path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


class CommentedConfig:
    """The text of a config file, read for its comments.

    Attributes:
        whole: whether its keys are those of the whole config, and not of its group alone.
        sentence: the first one of the comment at the head.
        keys: what each key means, by its dotted path, nothing where nothing is said; those of a block too.
        groups: of the `defaults` list, what each group means.
        parents: of the same list, the files of the same group that this one has its other keys from.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.head = next((i for i, line in enumerate(self.lines) if not line.startswith("#")), len(self.lines))
        self.whole = "# @package _global_" in self.lines[: self.head]
        self.sentence = self._first_sentence()
        self.keys: dict[str, str] = {}
        self.groups: dict[str, str] = {}
        self.parents: list[str] = []
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, MappingNode):
            return
        for key, value in root.value:
            if key.value == "defaults" and isinstance(value, SequenceNode):
                self._read_defaults(value)
            else:
                self.keys |= self._below(key, value, "")

    def _first_sentence(self) -> str:
        said: list[str] = []
        for line in self.lines[: self.head]:
            # where the file lies, and in which part of the config
            if re.fullmatch(r"# (@package .*|\S+\.yaml)", line):
                continue
            # a blank or indented line ends the prose, for what follows are commands
            if not re.match(r"# \S", line):
                break
            said.append(line.removeprefix("# ").strip())
        return re.split(r"(?<=\.) (?=[A-Z])", " ".join(said))[0].removesuffix(":")

    def _below(self, key: Node, value: Node, before: str) -> dict[str, str]:
        path = f"{before}{key.value}"
        found = {path: self._comment(key, value)}
        if isinstance(value, MappingNode):
            for k, v in value.value:
                found |= self._below(k, v, f"{path}.")
        return found

    def _comment(self, key: Node, value: Node) -> str:
        flat = isinstance(value, ScalarNode) or (isinstance(value, SequenceNode | MappingNode) and value.flow_style)
        end = value.end_mark if flat else key.end_mark
        after = self.lines[end.line][end.column :].lstrip(": ") if end.line < len(self.lines) else ""
        if after.startswith("#"):
            return after.lstrip("# ")
        return " ".join(reversed([*self._above(key.start_mark.line)]))

    def _above(self, line: int) -> Iterator[str]:
        """The lines of the comment right above a line, from below; what is at the head of the file is of the file."""
        while line > self.head and self.lines[line - 1].lstrip().startswith("#"):
            line -= 1
            yield self.lines[line].lstrip("# ").rstrip()

    def _read_defaults(self, entries: SequenceNode) -> None:
        for entry in entries.value:
            if not isinstance(entry, MappingNode):
                self.parents += [entry.value] if entry.value != "_self_" else []
                continue
            key, value = entry.value[0]
            self.groups.setdefault(key.value.split()[-1].partition("@")[0], self._comment(key, value))
