"""Converts errors into one message on standard error and an exit code."""

import itertools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain.cli.config_files import (
    CommentedConfig,
    add_working_directory_to_path,
    compose_defaults,
    config_dirs,
    options,
    user_config_dir,
)
from flowtrain.utils import ranks
from flowtrain.utils.arguments import choose, hint
from flowtrain.utils.errors import FlowtrainError, first_line, out_of_memory
from flowtrain.utils.files import config_groups


def run_command(name: str, command: Callable[[], int]) -> None:
    """Runs a command and exits. Errors that a user can correct become one message on standard error."""
    # without this variable, Hydra would print errors in another format and exit
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    code: int | None
    try:
        if user_config_dir() is not None:
            add_working_directory_to_path()
        code = command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 130
    except Exception as e:
        code = report(name, e)
        if code is None:
            raise
    sys.exit(code)


def report(name: str, error: Exception) -> int | None:
    """Prints the message of an error and returns the exit code. For a bug, prints nothing and returns None."""
    if isinstance(error, BrokenPipeError):
        # the reader of the output has ended, as in `floweval ... | head -1`. This is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    found = message_of(error)
    if found is None:
        return None
    message, exit_code = found
    if ranks.first_to_report(message):
        print(f"{name}: {message}", file=sys.stderr)
    return exit_code


def message_of(error: Exception) -> tuple[str, int] | None:
    """Returns the message and the exit code of an error, or None for a bug.

    The exit code is 2 for a mistake of the user, and 1 for a failure during the work.
    """
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error), 2
    if isinstance(error, ValueError) and (in_list := _key_in_list(error)):
        return in_list, 2
    if isinstance(error, yaml.YAMLError):
        # a config file; the message names it
        return " ".join(str(error).split()), 2
    if isinstance(error, FlowtrainError | OSError):
        return str(error), error.exit_code if isinstance(error, FlowtrainError) else 1
    if out_of_memory(error):
        return f"{first_line(error)}: there is not enough memory; use a smaller model, batch or file", 1
    return None


def _key_in_list(error: ValueError) -> str:
    """The message for an override such as plots.format.png=true, whose parent is a list; "" for other errors.

    OmegaConf then raises the ValueError of int("png").
    """
    place = traceback.extract_tb(error.__traceback__)[-1:]
    part = re.fullmatch(r"invalid literal for int\(\) with base 10: '(.*)'", str(error))
    if part is None or not place or f"omegaconf{os.sep}" not in place[0].filename:
        return ""
    for argument in sys.argv[1:]:
        parent, _, last = argument.lstrip("+~").partition("=")[0].rpartition(".")
        if last == part[1]:
            return f"{argument}: {parent} is a list without keys; set the whole list, as in {parent}=[A,B]"
    return ""


def explain(error: Exception) -> str:
    """Returns the message for an error of Hydra, on one line. For an unknown key, the message lists the known keys."""
    parts = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    message = " ".join(" ".join(part.split()) for part in parts)
    plugin = re.search(r"Could not (?:find|load) 'hydra/(?:launcher|sweeper)/(joblib|submitit|optuna)", message)
    if plugin:
        return f"hydra/*={plugin[1]} is an extra: pip install 'flowtrain[{plugin[1]}]'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: {choose(name, error.options)}"
    unloaded = re.search(r"Could not load '([^']+)'", message)
    if unloaded and unloaded[1].partition("/")[0] in config_groups():
        group, _, name = unloaded[1].partition("/")
        return f"{group}={name}: {choose(name, options(group))}"
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown is not None:
        return unknown_key(unknown[1], *_config_without(unknown[1]))
    written = getattr(error, "override", None)
    message = re.sub(r"^In '[^']*': | Config search path:.*$", "", message)
    several = re.match(r"Ambiguous value for argument '(.*?)' 1\.|Sweep parameters '(.*?)' requires", message)
    if several:
        given = several[1] or several[2]
        return f"{given}: several values make a sweep; add -m, or give one value or a list in brackets"
    if written and not re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w/@-]*(\.[\w-]+)*", written.partition("=")[0], re.ASCII):
        return f"{written}: not a key; keys look like trainer.lr"
    if written and written.partition("=")[2].startswith("{"):
        return (
            f"{written}: {_unparsed(message)}; names in braces have no quotes, as in data.types={{age: positive}}. If "
            "the name of a column has special characters, give its position, counted from 0. Values with special "
            "characters need quotes"
        )
    if written:
        return f"{written}: {_unparsed(message)}; values with special characters need quotes: {_in_quotes(written)}"
    return message


def _unparsed(message: str) -> str:
    """Returns Hydra's message if a function in an override fails, otherwise "the value cannot be parsed"."""
    said = re.search(r"while evaluating .*?(?= See https://hydra.cc|$)", message)
    return said[0] if said else "the value cannot be parsed"


def _in_quotes(override: str) -> str:
    """Returns the override with its value, or each item of a list, in Hydra's quotes, quoted once more for the shell.

    Example:
        >>> print(_in_quotes("data.columns=[age,t (s)]"))
        'data.columns=[age,"t (s)"]'
    """
    key, _, value = override.partition("=")
    if value[:1] == "[" and value[-1:] == "]":
        items = (item.strip() for item in re.split(_COMMA_OUTSIDE_BRACKETS, value[1:-1]))
        quoted = ",".join(item if re.fullmatch(r"\w*|([\"']).*\1", item, re.ASCII) else _quote(item) for item in items)
        return shlex.quote(f"{key}=[{quoted}]")
    return shlex.quote(f"{key}={_quote(value)}")


# units such as (m, s) may contain commas
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^(\[]*[)\]])")


def _quote(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _config_without(key: str) -> tuple[dict[str, Any], str]:
    """Returns the config with the choices of the command line, or for a sweep the first config that lacks the key.

    Also returns the start of the message. It names the choices of this config in a sweep, and is empty without a sweep.
    """
    chosen = [a.partition("=") for a in sys.argv[1:] if a.partition("=")[0] in config_groups()]
    # a choice in another form, such as choice(a,b), is replaced by the default
    plain_words = [(group, names.split(",")) for group, _, names in chosen if re.fullmatch(r"[\w,]+", names)]
    every = [[f"{group}={name}" for name in names] for group, names in plain_words]
    for overrides in itertools.product(*every):
        config = compose_defaults(overrides, with_hydra=key.startswith("hydra"))
        if OmegaConf.select(OmegaConf.create(config), key, default=_config_without) is _config_without:
            break
    swept = [option for option, names in zip(overrides, every, strict=True) if len(names) > 1]
    return config, f"with {', '.join(swept)} " if swept else ""


def unknown_key(key: str, config: Mapping[str, Any], where: str = "") -> str:
    """Returns the message for an unknown key. It suggests the nearest key.

    The message also lists the keys of the deepest group or mapping of the config that contains the start of the key.
    """
    key = key.lstrip("+~")
    node: Any = config
    found: list[str] = []
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            break
        node = node[part]
        found.append(part)
    at = ".".join(found)
    if not isinstance(node, Mapping):
        return f"{where}there is no key {key}: {at} is a value, {at}={node}"
    have = [str(k) for k in node if k not in ("_target_", "name")]
    names = [k for k in _every_key(config) if k.rpartition(".")[2] not in ("_target_", "name")]
    keys_are = f"the keys{at and f' of {at}'} are {', '.join(have)}" if have else f"there are no keys in {at}"
    return f"{where}there is no key {key}; {_choices_with_key(key) or hint(key, names, keys_are)}"


def _choices_with_key(key: str) -> str:
    """Returns a message that names the choices of the group of a key that have the key; empty if none has it."""
    group, _, name = key.partition(".")
    if not name or group not in config_groups():
        return ""
    have = [choice for choice in options(group) if f"{group}.{name}" in keys_of_choice(group, choice)]
    return f"it is a key of {' and of '.join(f'{group}={choice}' for choice in have)}" if have else ""


def keys_of_choice(group: str, name: str) -> set[str]:
    """Returns the keys, such as model.layers, that the file of a choice and its parents set."""
    found: set[str] = set()
    for folder in config_dirs():
        path = folder / group / f"{name}.yaml"
        parsed = CommentedConfig(path.read_text()) if path.is_file() else CommentedConfig("")
        found |= {key if parsed.whole else f"{group}.{key}" for key in parsed.keys}
        found |= {key for parent in parsed.parents for key in keys_of_choice(group, parent)}
    return found


def _every_key(config: Mapping[str, Any], before: str = "") -> list[str]:
    """Returns all dotted keys of a config: groups and values."""
    found = []
    for key, value in config.items():
        found.append(f"{before}{key}")
        if isinstance(value, Mapping):
            found += _every_key(value, f"{before}{key}.")
    return found
