"""Composes the config of a run from the YAML files in configs/, as Hydra does for the commands.

Defaults are defined only in these files. The commands read them with Hydra, and `flowtrain.fit` with `compose`.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowtrain.utils.arguments import choose, hint, shortened
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir
from flowtrain.utils.formatting import flattened

# keys of model=auto
SEARCH_KEYS = {"model.candidates", "model.conditional"}
# the default model and objective of a run on a target
TARGET_CHOICES = {"model": "nsf", "objective": "reverse_kl"}
# prefixes of the keys of column types
TYPES = ("data.types.", "target.types.")
# keys of the whole config that only the commands use
COMMAND_KEYS = ("name", "resume", "from", "trust", "hydra")


# the C parser is ten times faster, but a PyYAML that was built from source may lack it
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads 1e-3 as a number, as Hydra does. PyYAML reads it as text because it has no decimal point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
# YAML 1.1 reads 1:3 as the number 63 of base 60. In data.columns it is a range
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", re.compile(r"[-+]?[0-9]+(:[0-9]+)+$")))


@dataclass(frozen=True)
class ConfigFile:
    """A file of a config group.

    Attributes:
        whole: whether the keys in the file are keys of the whole config. Otherwise, they are keys of the file's group.
        parents: files of the same group that this file extends.
        choices: the choices of other groups in this file.
        content: its own keys.
    """

    whole: bool
    parents: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)


def read_file(group: str, name: str, folders: Sequence[Path]) -> ConfigFile | None:
    """Reads a file of a config group from the first folder that has it; None if no folder has it."""
    paths = (folder / group / f"{name}.yaml" for folder in folders)
    text = next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), None)
    if text is None:
        return None
    content = read_yaml(text) or {}
    entries = content.pop("defaults", [])
    chosen = {str(k).removeprefix("override /"): v for e in entries if isinstance(e, dict) for k, v in e.items()}
    parents = [e.removeprefix(f"/{group}/").partition("@")[0] for e in entries if isinstance(e, str) and e != "_self_"]
    return ConfigFile("# @package _global_" in text.splitlines()[:3], parents, chosen, content)


def values_of(group: str, name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the keys of the whole config that a file sets, including the files that it extends."""
    found: dict[str, Any] = {}
    file = read_file(group, name, folders)
    if file is None:
        return found
    for parent in file.parents:
        found = _merged(found, values_of(group, parent, folders))
    return _merged(found, file.content if file.whole else {group: file.content})


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """Returns the names of the files of a config group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def read_yaml(text: str) -> Any:
    """Parses YAML, with numbers and ranges as Hydra reads them.

    Raises:
        ConfigError: the text is not valid YAML.

    Example:
        >>> read_yaml("[1e-3, null, a]")
        [0.001, None, 'a']
        >>> read_yaml("[1:3, 5]")  # data.columns
        ['1:3', 5]
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{text!r} is not valid YAML ({' '.join(str(e).split())})") from e


# types of columns with bounds, whose commas and parentheses YAML and Hydra would read in another way
_BOUNDED_TYPE = re.compile(r"\b(?:interval|circular|integer)\s*\([^()'\"]*\)")


def with_quoted_types(key: str, text: str) -> str:
    """Quotes the types with bounds in the text of data.types or target.types. Other text is not changed.

    Example:
        >>> with_quoted_types("data.types", "{p: interval(0,1), n: integer}")
        "{p: 'interval(0,1)', n: integer}"
    """
    if not re.match(r"(data|target)\.types($|\.)", key) or re.search(r"['\"]", text):
        return text
    return _BOUNDED_TYPE.sub(r"'\g<0>'", text)


@dataclass(frozen=True)
class Composed:
    """A composed config.

    Attributes:
        config: the config, with plain values.
        settings: the settings from which it was composed.
        choices: the choices of the config groups.
        recipes: the recipes that were applied, with the keys that each of them set.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    choices: dict[str, str | None]
    recipes: dict[str, list[str]]


def compose(settings: Mapping[str, Any], folders: Sequence[Path] = ()) -> Composed:
    """Composes the config that a command line with the same settings would have.

    Args:
        settings: choices of config groups and values of dotted keys, such as
            {"model": "realnvp", "data": "moons", "trainer.lr": 1e-3}.
        folders: folders of configs; empty: the configs of flowtrain.

    Raises:
        ConfigError: a choice or a key does not exist, or has an invalid value.

    Example:
        >>> compose({"model": "affine", "trainer.steps": 7}).config["trainer"]["steps"]
        7
    """
    folders = folders or [config_dir()]
    groups = [path.name for path in folders[0].iterdir() if path.is_dir()]
    asked = {key: value for key, value in settings.items() if key in groups and not isinstance(value, Mapping)}
    values = flattened({key: value for key, value in settings.items() if key not in asked})
    main = read_yaml((folders[0] / "config.yaml").read_text(encoding="utf-8"))
    entries = [(k, v) for e in main.pop("defaults") if isinstance(e, dict) for k, v in e.items()]
    choices = _choices(entries, asked, folders)
    config = {key: value for key, value in main.items() if key not in COMMAND_KEYS}
    for entry, chosen in choices.items():
        if chosen is not None:
            config = _merged(config, values_of(entry.partition("@")[0], chosen, folders))
    _set_values(config, values)
    return Composed(config, dict(settings), choices, applied_recipes(choices, config, folders))


def default_choices(keys: Set[str], model: str | None = None, data: str = "array") -> dict[str, str]:
    """Returns the default model and objective of a run on a table or a target, without the groups that the user chose.

    Args:
        keys: the choices and the dotted keys that are set.
        model: the model that is chosen; None: not chosen.
        data: the choice of `data`, array or target.

    Example:
        >>> default_choices({"trainer.lr"}), default_choices({"model.hidden"}), default_choices(set(), "ffjord")
        ({'model': 'auto'}, {'model': 'ffjord', 'objective': 'auto'}, {'objective': 'auto'})
        >>> default_choices(set(), "nsf")
        {}
    """
    found = {}
    if data == "target":
        is_free = {"model": model is None and "model" not in keys, "objective": "objective" not in keys}
        return {group: name for group, name in TARGET_CHOICES.items() if is_free[group]}
    if model is None and "model" not in keys:
        # if no model is named, keys of a model, an objective or a regularizer imply ffjord
        other = {key for key in keys if key.startswith("model.")} - SEARCH_KEYS
        model = "ffjord" if other or keys & {"objective", "regularizer"} else "auto"
        found["model"] = model
    if model == "ffjord" and not keys & {"objective", "regularizer", "recipe"} and not _group(keys, "objective"):
        found["objective"] = "auto"
    return found


def _group(keys: Set[str], group: str) -> bool:
    return any(key.startswith(f"{group}.") for key in keys)


def with_choices(
    config: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], groups: Sequence[str]
) -> dict[str, Any]:
    """Composes a config again with other choices, and keeps the values that the user has changed.

    Args:
        config: a config that was composed from `before` and then changed.
        before, after: choices of config groups.
        groups: the groups whose changed values are kept. A group whose `_target_` was changed is kept as a whole.

    Example:
        >>> config = compose({"model": "affine", "trainer.lr": 7.0}).config
        >>> found = with_choices(config, {"model": "affine"}, {"model": "realnvp"}, ["trainer"])
        >>> found["model"]["name"], found["trainer"]["lr"]
        ('realnvp', 7.0)
    """
    base, found = compose(before).config, compose(after).config
    for group in groups:
        if config[group].get("_target_") != base[group].get("_target_"):
            found[group] = config[group]
        else:
            found[group] |= {k: v for k, v in config[group].items() if k not in base[group] or base[group][k] != v}
    return found


def _choices(
    entries: Sequence[tuple[str, str | None]], asked: Mapping[str, Any], folders: Sequence[Path]
) -> dict[str, str | None]:
    """Returns the chosen file of each entry of the main defaults list, in the order of the list."""
    defaults = {key: value for key, value in entries if not key.startswith("override ")}
    given = dict(asked)
    if given.get("experiment") is not None:
        experiment = read_file("experiment", _checked("experiment", given["experiment"], folders), folders)
        assert experiment is not None
        if "hydra" in experiment.content:
            raise ConfigError(f"experiment={given['experiment']} is a sweep: run it with flowtrain -m")
        given = {**experiment.choices, **given}
    found: dict[str, str | None] = {}
    for key, default in defaults.items():
        name = key.removeprefix("optional ")
        value = given.get(name, default)
        if value is None:
            found[name] = None
        elif name in given or "${" not in str(value):
            found[name] = _checked(name, value, folders)
        else:
            for group, chosen in {**defaults, **given}.items():
                value = str(value).replace(f"${{{group}}}", str(chosen))
            found[name] = value if read_file(name.partition("@")[0], value, folders) is not None else None
    return found


def _checked(group: str, name: Any, folders: Sequence[Path]) -> str:
    there = options(group.partition("@")[0], folders)
    if name not in there:
        shown = name if isinstance(name, str) else shortened(name)
        raise ConfigError(f"{group}={shown}: {choose(name, there)}")
    return str(name)


def _set_values(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Sets values by their dotted keys, in place."""
    for key, value in values.items():
        *path, last = key.split(".")
        node: Any = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if key.startswith(TYPES) and "types" in (config.get(path[0]) or {}):
            # the keys below data.types and target.types are columns of the user, whose names may contain dots
            name = key.split(".", 2)[2]
            config[path[0]]["types"] = {**(config[path[0]]["types"] or {}), name: plain_value(key, value)}
            continue
        if not isinstance(node, dict) or last not in node:
            raise ConfigError(f"unknown key {key}; {_suggested(config, key)}")
        node[last] = plain_value(key, value)


def _suggested(config: Mapping[str, Any], key: str) -> str:
    """Returns a hint for an unknown key: the nearest keys, and all keys of its group if the group exists."""
    names = [name for name in flattened(config) if "_target_" not in name]
    within = [name for name in names if name.startswith(key.partition(".")[0] + ".")]
    return choose(key, within, "the keys are") if within else hint(key, names, "`flowtrain --help` lists the keys")


def plain_value(key: str, value: Any) -> Any:
    """Converts a value for a config and a checkpoint: NumPy numbers, tuples and paths become plain values.

    Raises:
        ConfigError: a value of another type.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, list | tuple):
        return [plain_value(key, item) for item in value]
    if isinstance(value, Mapping):
        return {str(k): plain_value(f"{key}.{k}", v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{key}: a {type(value).__name__} is not a config value: give numbers, text, None or lists")


def applied_recipes(
    choices: Mapping[str, Any], config: Mapping[str, Any], folders: Sequence[Path]
) -> dict[str, list[str]]:
    """Returns the recipes that apply to a run, with the keys that each of them set in its config.

    Keys that the command line or an experiment sets to another value are left out.

    Args:
        choices: the choices of the config groups.
    """
    values = flattened(config)
    names = [choices.get("recipe@_global_"), choices.get("recipe")]
    there = [str(name) for name in names if name not in (None, "none") and name in options("recipe", folders)]

    def is_set(key: str, value: Any) -> bool:
        # an interpolation is resolved in the config
        return key in values and (values[key] == value or (isinstance(value, str) and "${" in value))

    return {
        name: [key for key, value in flattened(values_of("recipe", name, folders)).items() if is_set(key, value)]
        for name in there
    }


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings. Values of `new` replace values of `old`."""
    found = dict(old)
    for key, value in new.items():
        before = found.get(key)
        found[key] = _merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found
