"""Mistakes in a command line of `flowtrain` that Hydra would answer with a traceback, with pages or with nothing."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override

from flowtrain.cli.folders import options
from flowtrain.errors import ConfigError
from flowtrain.paths import config_groups

# Hydra's; what follows those of the second line is no override
FLAGS = ("-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun", "-sc",
         "--shell-completion", "-i", "--info")  # fmt: skip
VALUED = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
          "--experimental-rerun")  # fmt: skip


def check_grammar(arguments: Sequence[str]) -> None:
    """Refuses flags that there are not, overrides of nothing, and options of groups that are none.

    Raises:
        ConfigError: naming the argument.
        HydraException: an override that cannot be parsed.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before in VALUED:
            continue
        if argument.startswith("-"):
            if argument.partition("=")[0] not in FLAGS + VALUED:
                raise ConfigError(f"{argument}: there is no such flag; see --help, and -m for a sweep")
        elif argument.lstrip("+~").startswith("=") or not argument.strip():
            raise ConfigError(f"{argument!r}: arguments look like KEY=VALUE; see --help")
        elif (
            argument.startswith(("~model", "~data", "~objective")) and argument.partition("=")[0][1:] in config_groups()
        ):
            # Hydra would speak of an interpolation
            raise ConfigError(f"{argument[1:]} was taken out of the config, but a run needs it")
        elif argument.partition("=")[0].lstrip("+").partition("@")[0] in config_groups():
            check_option(OverridesParser.create().parse_override(argument))


def in_order(arguments: Sequence[str]) -> list[str]:
    """The overrides and after them the flags with their values: Hydra takes no overrides on both sides of a flag."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        topic = before in ("-i", "--info") and "=" not in argument
        (flags if argument.startswith("-") or before in VALUED or topic else overrides).append(argument)
    return [*overrides, *flags]


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
        raise ConfigError(f"{(override.input_line or group).lstrip('+')}: choose one of {', '.join(there)}")
