"""Validates overrides, and quotes their paths for Hydra. This module does not import torch."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from flowtrain.cli.config_files import add_working_directory_to_path, options, own_searchpath, split_config_dir
from flowtrain.cli.error_messages import keys_of_choice, unknown_key
from flowtrain.cli.output_files import GROUPS_WITH_PATHS, exists, is_path
from flowtrain.runs.compose import default_choices, with_quoted_types
from flowtrain.training import checkpoint_files
from flowtrain.training.old_checkpoints import RENAMED_KEYS, RENAMED_OVERRIDES, key_of, renamed_override
from flowtrain.utils.arguments import choose, hint
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir, config_groups
from flowtrain.utils.formatting import resume_command

log = logging.getLogger("flowtrain")

# keys whose values are files to read, and files or directories to write. For keys of the data see `is_path`
READ_PATHS = ("resume", "from", "ckpt", "ood")
WRITTEN_PATHS = ("out", "scores", "grid", "anomalies", "hydra.run.dir", "hydra.sweep.dir")
# the directory of runs, in the working directory
OUTPUTS = "outputs"
# the longest name of a directory, in bytes, on common file systems
LONGEST_NAME = 255
# keys whose values are the names of columns or arrays in a file
QUOTED_NAMES = ("data.label", "data.id", "data.key", "data.anomaly_label", "data.context", "data.weights")
# the option of flowsample for the values of context columns
CONTEXT = "context"


def rename_old_keys(arguments: Sequence[str]) -> list[str]:
    """Replaces keys of earlier versions by their present names, with a warning.

    Example:
        >>> rename_old_keys(["trainer.lr=0.1"])
        ['trainer.lr=0.1']
    """
    replaced = []
    for argument in arguments:
        new = RENAMED_OVERRIDES.get(key_of(argument))
        # `has_key` reads config files, so it is called only for arguments with an old key
        if new is not None and has_key(new, arguments):
            warn_of_old_key(key_of(argument), new)
            argument = renamed_override(argument)
        replaced.append(argument)
    return replaced


def has_key(key: str, arguments: Sequence[str]) -> bool:
    """Whether the choices that a command line makes have a key in their config files."""
    group = key.partition(".")[0]
    given = [a.partition("=")[2] for a in arguments if a.lstrip("+").partition("=")[0] == group]
    # among the choices with renamed keys, only ffjord is a default
    names = given[-1].split(",") if given else ["ffjord"]
    return all(key in keys_of_choice(group, name.strip()) for name in names)


def rename_old_config_keys(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a composed config in which keys of earlier versions have their present names, with a warning.

    Only groups that have both names are changed. Such a group has the new name from flowtrain's config files, and the
    old name from a config file of the user.

    Args:
        overrides: the overrides of the command line. Their values have priority over the config files.
    """
    given = keys_of(overrides)
    groups = dict(config)
    for group, names in RENAMED_KEYS.items():
        keys = dict(groups[group])
        for old, new in names.items():
            if old in keys and new in keys:
                warn_of_old_key(f"{group}.{old}", f"{group}.{new}")
                value = keys.pop(old)
                if f"{group}.{new}" not in given:
                    keys[new] = value
        groups[group] = keys
    return groups


@cache
def warn_of_old_key(old: str, new: str) -> None:
    """Warns once per process that a key has a new name."""
    log.warning("%s is now named %s. The old name still works.", old, new)


def with_default_choices(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments, with the choices of `default_choices` if they choose data=array or a target.

    Example:
        >>> with_default_choices(["data=array", "data.path=a.csv"])
        ['model=auto', 'data=array', 'data.path=a.csv']
        >>> with_default_choices(["data=array", "model=nsf"])
        ['data=array', 'model=nsf']
    """
    given = [a.lstrip("+~").partition("=") for a in separated(arguments)[0]]
    chosen = {key.partition("@")[0]: value.strip("'\"") for key, _, value in given}
    if "target" in chosen and "data" not in chosen and "from" not in chosen:
        chosen["data"], arguments = "target", ["data=target", *arguments]
    data = chosen.get("data")
    if data not in ("array", "target") or {"experiment", "from"} & chosen.keys():
        return list(arguments)
    found = default_choices(set(chosen), chosen.get("model"), data)
    return [*(f"{group}={name}" for group, name in found.items()), *arguments]


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quotes the paths in the values of a command line, if Hydra could not parse them otherwise.

    Quoted values, lists and the values of a sweep are not changed, unless a file of exactly that name exists.

    Example:
        >>> quoted(["data.path=my data (1).npy", "ckpt=runs/1", "trainer.lr=0.1"])
        ["data.path='my data (1).npy'", 'ckpt=runs/1', 'trainer.lr=0.1']
        >>> quoted(["ckpt=[runs/1, my runs/1e-3]"])
        ["ckpt=['runs/1','my runs/1e-3']"]
    """
    return [_with_quoted_types(_quoted(argument)) for argument in arguments]


def _with_quoted_types(argument: str) -> str:
    key, equals, text = argument.partition("=")
    return f"{key}{equals}{with_quoted_types(key.lstrip('+'), text)}"


def _quoted(argument: str) -> str:
    start, equals, text = argument.partition("=")
    key = start.lstrip("+")
    group, _, name = key.partition(".")
    read = key in READ_PATHS or (group in GROUPS_WITH_PATHS and is_path(name))
    if key == CONTEXT and text[:1] not in ("", "'", '"') and (exists(text) or parsed(argument)[0] is None):
        # a file, or names of columns with special characters. `flowsample` parses the text of a mapping as YAML
        return f"{start}={in_quotes(text)}"
    if not equals or not text or text.lower() == "null" or not (read or key in (*WRITTEN_PATHS, *QUOTED_NAMES)):
        return argument
    if key == "ckpt" and text[0] == "[" and text[-1] == "]" and not re.search(r"['\"$]", text) and not exists(text):
        # the runs of an ensemble
        return f"{start}=[{','.join(in_quotes(part.strip()) for part in text[1:-1].split(',') if part.strip())}]"
    value, sweeps = parsed(argument)
    if key in QUOTED_NAMES:
        return f"{start}={in_quotes(text)}" if value is None and text[0] not in "'\"[{" else argument
    if isinstance(value, str) and value == text and not ("${" in text and exists(text)):
        return argument
    if exists(text):
        return f"{start}={in_quotes(text.replace('${', chr(92) + '${'))}"
    if isinstance(value, QuotedString):
        return argument
    if sweeps or isinstance(value, list | dict):
        return argument if read else f"{start}={in_quotes(text)}"
    if read and "," in text and not re.search(r"['\"]", text):
        # with -m, commas separate the values of a sweep
        return f"{start}={','.join(_quoted(f'{key}={part.strip()}').partition('=')[2] for part in text.split(','))}"
    # a value that begins with a quote, but cannot be parsed, is not changed, so that Hydra reports it
    return argument if value is None and text[0] in "'\"" else f"{start}={in_quotes(text)}"


def parsed(argument: str) -> tuple[Any, bool]:
    """Returns the value of an override, parsed by Hydra (None if Hydra rejects it), and whether it is a sweep."""
    try:
        override = OverridesParser.create().parse_override(argument)
        # `value()` would remove the quotes
        raw = override._value
    except HydraException:
        return None, False
    return raw, override.is_sweep_override()


def in_quotes(text: str) -> str:
    r"""Returns the text as a quoted string in Hydra's grammar.

    Example:
        >>> print(in_quotes("it's [1]"))
        'it\'s [1]'
    """
    return QuotedString(text, Quote.single).with_quotes()


# flags of Hydra. The argument after a flag in VALUED is its value, not an override
FLAGS = ("-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun", "-sc",
         "--shell-completion", "-i", "--info")  # fmt: skip
VALUED = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
          )  # fmt: skip
# both spellings of the flag for sweeps
SWEEP = ("-m", "--multirun")
# the values that --cfg and --info take
SHOWN = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# flags that exclude each other, and their usual spellings
MODES = {"-r": "--run", "--run": "--run", "-m": "-m", "--multirun": "-m", "-c": "--cfg", "--cfg": "--cfg",
         "-sc": "--shell-completion", "--shell-completion": "--shell-completion", "-i": "--info",
         "--info": "--info"}  # fmt: skip
# an empty value of these keys would mean the working directory
DIRECTORIES = ("hydra.run.dir", "hydra.sweep.dir")
# flags that may be followed by a topic, which is not an override
TOPICAL = ("--info", "--shell-completion")


def with_name(arguments: Sequence[str]) -> list[str]:
    """Replaces name=NAME by the directories of the run and of a sweep of this name.

    Directories on the command line have priority, because Hydra uses the last value of a key.

    Raises:
        ConfigError: a name that is not one component of a path, a reserved name, several names, or a name of a file.

    Example:
        >>> with_name(["name=first", "seed=1"])[1:]
        ["hydra.run.dir='outputs/first'", "hydra.sweep.dir='outputs/multirun/first'", 'seed=1']
    """
    places = [i for i, a in enumerate(separated(arguments)[0]) if a.lstrip("+").startswith("name=")]
    given = [a for a in separated(arguments)[0] if a.lstrip("+").startswith("name=")]
    if not places or given[-1].partition("=")[2] == "null":
        return list(arguments)
    text = given[-1].partition("=")[2]
    value, several = parsed(given[-1])
    name = value.text if isinstance(value, QuotedString) else text
    is_sweep = bool({*SWEEP} & {*separated(arguments)[1]})
    if is_sweep and several:
        raise ConfigError(f"name={name}: give one name, which is the name of the sweep")
    if name == "multirun":
        raise ConfigError("name=multirun: this is the directory of the sweeps; give another name")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", name):
        raise ConfigError(f"name={name}: the directory of a date contains the runs without a name; give another name")
    if re.search(r"[/\\\x00-\x1f\x7f]|\$\{", name) or name != name.strip() or name[:1] in ("", "."):
        raise ConfigError(
            f"name={name!r}: give one component of a path, as in name=first. It cannot contain slashes, ${{ or "
            "control characters, and cannot begin with a dot or a blank"
        )
    # a name that is not UTF-8 contains surrogates
    if len(name.encode(errors="surrogateescape")) > LONGEST_NAME or re.search(r"[\ud800-\udfff]", name):
        raise ConfigError(f"name={name[:20]!r}...: give a name of at most {LONGEST_NAME} bytes in UTF-8")
    folder = Path(OUTPUTS, "multirun", name) if is_sweep else Path(OUTPUTS, name)
    if blocking := [path for path in (*reversed(folder.parents), folder) if path.exists() and not path.is_dir()]:
        raise ConfigError(f"name={name}: {blocking[0]} exists and is not a directory; give another name")
    ours = [
        f"name={in_quotes(name)}",
        f"hydra.run.dir={in_quotes(f'{OUTPUTS}/{name}')}",
        f"hydra.sweep.dir={in_quotes(f'{OUTPUTS}/multirun/{name}')}",
    ]
    return [*ours, *(a for a in arguments if a not in given)]


def validate_command_line(arguments: Sequence[str]) -> None:
    """Rejects mistakes for which Hydra gives a traceback, pages of text, or no message.

    Rejects unknown or contradictory flags, arguments that are not overrides, and choices that a group does not have.

    Raises:
        ConfigError: such an argument. The message names the argument.
        HydraException: an override that cannot be parsed.
    """
    check_flags(arguments)
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before in VALUED or argument.startswith("-") or (MODES.get(before) in TOPICAL and "=" not in argument):
            continue
        key, equals, _ = argument.partition("=")
        if not key.strip("+~@ "):
            raise ConfigError(f"{argument!r}: arguments look like KEY=VALUE; see --help")
        if not equals and not key.startswith("~"):
            raise ConfigError(f"{argument}: {_no_override(argument)}")
        if key.lstrip("+") in DIRECTORIES and argument.endswith("="):
            raise ConfigError(f"{argument}: give the name of a directory")
        if key in ("~model", "~data", "~objective"):
            # the message of Hydra would be about an interpolation
            raise ConfigError(f"{argument}: a run needs this group; leave {argument} out")
        if key.lstrip("+").partition("@")[0] in config_groups():
            check_option(OverridesParser.create().parse_overrides([argument])[0])


def check_flags(arguments: Sequence[str]) -> None:
    """Rejects unknown flags, flags without their value, and flags that contradict each other.

    Raises:
        ConfigError: such a flag. The message names the flag.
    """
    modes = []
    for before, argument, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        if before in VALUED or not argument.startswith("-"):
            continue
        flag, equals, value = argument.partition("=")
        if flag not in FLAGS + VALUED:
            long = [known for known in FLAGS + VALUED if known.startswith("--")]
            rest = hint(flag, long, "see --help, and -m for a sweep")
            raise ConfigError(f"{argument}: unknown flag; {rest}")
        value = value if equals else after
        if flag in VALUED and (not value or value.startswith("-")):
            raise ConfigError(f"{flag}: this flag needs a value; see --help")
        if flag in ("-c", "--cfg") and value not in SHOWN:
            raise ConfigError(f"{flag} {value}: {choose(value, SHOWN)}")
        if flag in ("-i", "--info") and value and "=" not in value and value[0] not in "-~" and value not in INFO:
            raise ConfigError(f"{flag} {value}: {choose(value, INFO)}")
        modes += [MODES[flag]] if flag in MODES else []
    if len({*modes}) > 1:
        raise ConfigError(f"{' and '.join(dict.fromkeys(modes))} exclude each other; give one of them")
    alone = [a for a in arguments if a.partition("=")[0] in ("--resolve", "-p", "--package")]
    if alone and "--cfg" not in modes:
        raise ConfigError(f"{alone[0]}: only valid with --cfg; see --help")


def _no_override(word: str) -> str:
    """Returns the message for an argument that is not KEY=VALUE, with what may have been meant."""
    if checkpoint_files.has_checkpoint(Path(word)):
        return f"arguments look like KEY=VALUE; {resume_command(word)} resumes this run"
    groups = [group for group in config_groups() if word in options(group)]
    meant = f"did you mean {' or '.join(f'{group}={word}' for group in groups)}?" if groups else "see --help"
    return f"arguments look like KEY=VALUE; {meant}"


def in_order(arguments: Sequence[str]) -> list[str]:
    """Returns the overrides, then the flags with their values. Hydra allows no overrides on both sides of a flag."""
    overrides, flags = separated(arguments)
    return [*overrides, *flags]


def separated(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides, and the flags with their values."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        topic = before in ("-i", "--info") and "=" not in argument
        (flags if argument.startswith("-") or before in VALUED or topic else overrides).append(argument)
    return overrides, flags


def check_option(override: Override) -> None:
    """Refuses a value of a config group that is not one of its choices."""
    group = override.key_or_group
    value = override.value()
    if isinstance(value, Glob):
        return
    values: list[Any] = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    bad = [v for v in values if not isinstance(v, str) and type(v).__name__ != "QuotedString"]
    there = options(group)
    if group == "recipe":
        # recipes are optional in the defaults list, so Hydra ignores an unknown name
        bad += [v for v in values if isinstance(v, str) and v not in there]
    if bad and not override.is_delete():
        raise ConfigError(f"{(override.input_line or group).lstrip('+')}: {choose(bad[0], there)}")


def trusted(value: Any) -> list[str]:
    """Returns the packages that `trust` names. The working directory is then searched for modules too.

    Raises:
        ConfigError: a value that is not a name or a list of names, or a name without a package.
    """
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"trust={value}: give names of packages, as in trust=[mypkg]")
    if names:
        add_working_directory_to_path()
    for name in names:
        if not _is_package(name):
            raise ConfigError(f"trust={name}: no package or module of that name was found")
    return names


def _is_package(name: str) -> bool:
    """Whether Python would find the package. The package is not imported."""
    try:
        return find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def keys_of(overrides: Sequence[str]) -> set[str]:
    """Returns the keys that KEY=VALUE overrides set."""
    return {a.lstrip("+").partition("=")[0] for a in overrides}


def check_composition(arguments: Sequence[str]) -> None:
    """Composes the config of a single run, so that a mistake is refused before the imports, which take seconds.

    A sweep and a command with a flag that only prints are left to Hydra.

    Raises:
        ConfigError: an unknown key at the top level of the config.
        HydraException, OmegaConfBaseException: the config cannot be composed.
    """
    overrides, flags = separated(split_config_dir(arguments)[1])
    if flags:
        return
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", [*own_searchpath(), *overrides])
    check_known_keys({str(key): value for key, value in cast(dict[Any, Any], OmegaConf.to_container(config)).items()})


def check_known_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config. Refuses unknown and missing keys at its top level."""
    keys = ("seed", "device", "threads", "time_budget", "logger", "plots", "name", "resume", "from", "trust")
    names = [*config_groups(), *keys]
    missing = [key for key in names if key not in config and key not in ("experiment", "recipe", "target")]
    if missing:
        raise ConfigError(f"{missing[0]}: the config lacks this key, which a run needs; do not remove it")
    extra = [key for key in config if key not in names]
    if extra:
        raise ConfigError(unknown_key(extra[0], {key: value for key, value in config.items() if key in names}))
    return config
