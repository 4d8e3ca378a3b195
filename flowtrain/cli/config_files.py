"""Finds config files, composes configs from overrides, and reads the comments that explain keys."""

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
    """Returns the folder of the last --config-dir, and the other arguments.

    Raises:
        ConfigError: the flag without a value.
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
    """Returns the folder of --config-dir on the command line of this process; None without the flag.

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
    """Returns the folders of config files, in the order in which Hydra searches them."""
    own = user_config_dir()
    return [config_dir()] if own is None else [config_dir(), own]


def options(group: str) -> list[str]:
    """Returns the choices of a config group."""
    return compose_files.options(group, config_dirs())


def read(group: str, name: str) -> "CommentedConfig":
    """Returns the config file of a choice; empty if there is no such file."""
    return CommentedConfig(_text(group, name))


def _text(group: str, name: str) -> str:
    paths = [folder / group / f"{name}.yaml" for folder in config_dirs()]
    return next((path.read_text() for path in paths if path.is_file()), "")


def compose_defaults(overrides: Sequence[str], with_hydra: bool = False) -> dict[str, Any]:
    """Returns the plain config composed from overrides. `with_hydra` adds Hydra's part, without interpolation."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        if not with_hydra:
            return plain(compose("config", [*own_searchpath(), *overrides]))
        whole = compose("config", [*own_searchpath(), *overrides], return_hydra_config=True)
        return cast(dict[str, Any], OmegaConf.to_container(whole))


def own_searchpath() -> list[str]:
    """Returns the override that adds the folder of --config-dir to Hydra's search path."""
    own = user_config_dir()
    if own is None:
        return []
    quoted = str(own).replace("\\", r"\\").replace("'", r"\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def plain(config: DictConfig) -> dict[str, Any]:
    """Converts a config to plain containers with resolved interpolations."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def add_working_directory_to_path() -> None:
    """Appends the working directory to Python's search path for modules, after all installed packages.

    Commands call this only if the user names code to import. Otherwise a file beside a checkpoint could be imported.
    """
    if not sys.flags.safe_path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


class CommentedConfig:
    """The text of a config file with the meanings of its keys, from its comments.

    Attributes:
        whole: whether the keys of the file belong to the whole config; otherwise they belong to the group of the file.
        sentence: the first sentence of the comment at the head of the file.
        keys: the comment of each key and of each block, by dotted path; empty if there is no comment.
        groups: the comment of each group in the `defaults` list.
        parents: the files of the same group in the `defaults` list, whose keys this file inherits.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.head = next((i for i, line in enumerate(self.lines) if not line.startswith("#")), len(self.lines))
        self.whole = "# @package _global_" in self.lines[: self.head]
        self.sentence = self._first_sentence()
        self.keys: dict[str, str] = {}
        self.groups: dict[str, str] = {}
        self.parents: list[str] = []
        try:
            root = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError:
            # Hydra names the mistake when the file is chosen. Until then, help and messages work without its keys
            return
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
            # these lines contain the path of the file, or the place of its keys in the config
            if re.fullmatch(r"# (@package .*|\S+\.yaml)", line):
                continue
            # the sentences end at an empty or indented line, and commands follow
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
        """Yields the comment lines directly above a line, last line first, without the head of the file."""
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
