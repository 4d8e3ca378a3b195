"""Mistakes in a command line of `flowtrain` that Hydra would answer with a traceback, with pages or with nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override

from flowtrain.cli.folders import options
from flowtrain.errors import ConfigError
from flowtrain.paths import config_groups
from flowtrain.quoting import resume_command
from flowtrain.suggestions import choose, hint
from flowtrain.training import checkpoint

# Hydra's; what follows those of the second line is no override
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


def check_grammar(arguments: Sequence[str]) -> None:
    """Rejects mistakes that Hydra would answer with a traceback, with pages of text or with nothing.

    Rejects unknown or contradictory flags, arguments that are not overrides, and choices that a group does not have.

    Raises:
        ConfigError: naming the argument.
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
            # Hydra would speak of an interpolation
            raise ConfigError(f"{argument[1:]} was taken out of the config, but a run needs it")
        if key.lstrip("+").partition("@")[0] in config_groups():
            check_option(OverridesParser.create().parse_overrides([argument])[0])


def check_flags(arguments: Sequence[str]) -> None:
    """Rejects unknown flags, flags without their value, and flags that contradict each other.

    Raises:
        ConfigError: naming the flag.
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
            raise ConfigError(f"{flag}: give it a value; see --help")
        if flag in ("-c", "--cfg") and value not in SHOWN:
            raise ConfigError(f"{flag} {value}: {choose(value, SHOWN)}")
        if flag in ("-i", "--info") and value and "=" not in value and value[0] not in "-~" and value not in INFO:
            raise ConfigError(f"{flag} {value}: {choose(value, INFO)}")
        modes += [MODES[flag]] if flag in MODES else []
    if len({*modes}) > 1:
        raise ConfigError(f"{' and '.join(dict.fromkeys(modes))} ask for different things: give one of them")
    alone = [a for a in arguments if a.partition("=")[0] in ("--resolve", "-p", "--package")]
    if alone and "--cfg" not in modes:
        raise ConfigError(f"{alone[0]}: belongs to --cfg; see --help")


def _no_override(word: str) -> str:
    """The message for an argument that is not KEY=VALUE, with what may have been meant."""
    if checkpoint.any_in(Path(word)):
        return f"arguments look like KEY=VALUE; {resume_command(word)} resumes this run"
    groups = [group for group in config_groups() if word in options(group)]
    meant = f"did you mean {' or '.join(f'{group}={word}' for group in groups)}?" if groups else "see --help"
    return f"arguments look like KEY=VALUE; {meant}"


def in_order(arguments: Sequence[str]) -> list[str]:
    """The overrides and after them the flags with their values: Hydra takes no overrides on both sides of a flag."""
    overrides, flags = separated(arguments)
    return [*overrides, *flags]


def separated(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides, and the flags with their values."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        topic = before in ("-i", "--info") and "=" not in argument
        (flags if argument.startswith("-") or before in VALUED or topic else overrides).append(argument)
    return overrides, flags


def check_option(override: Override) -> None:
    """Refuses a value of a config group that names no option of it."""
    group = override.key_or_group
    value = override.value()
    if isinstance(value, Glob):
        return
    values: list[Any] = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    bad = [v for v in values if not isinstance(v, str) and type(v).__name__ != "QuotedString"]
    there = options(group)
    if group == "recipe":
        # Hydra passes over it where there is none, because most models and data have none
        bad += [v for v in values if isinstance(v, str) and v not in there]
    if bad and not override.is_delete():
        raise ConfigError(f"{(override.input_line or group).lstrip('+')}: {choose(bad[0], there)}")
