"""Parses the command lines of floweval, flowsample, flowexport and `flowtrain resume=`: options, overrides and help."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from flowtrain.cli import help
from flowtrain.cli.config_files import split_config_dir
from flowtrain.cli.output_files import exists
from flowtrain.cli.overrides import quoted, rename_old_keys
from flowtrain.cli.usage import Usage
from flowtrain.utils.arguments import hint
from flowtrain.utils.errors import ConfigError


def versions() -> str:
    """Returns the text of --version: the versions of flowtrain, torch and Python."""
    try:
        ours = version("flowtrain")
    except PackageNotFoundError:
        # flowtrain is not installed
        ours = "(checkout)"
    # the metadata of torch are read in less time than torch is imported
    return f"flowtrain {ours}, torch {version('torch')}, Python {platform.python_version()}"


def split_own(
    arguments: Sequence[str], own: Mapping[str, Any], usage: Usage | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Splits arguments into the options of the command, and overrides of the saved config.

    If the command has the option `ckpt`, `ckpt=` may be left out: `floweval RUN` is short for `floweval ckpt=RUN`.

    Args:
        own: the options of the command with their defaults.
        usage: the help of the command; None if the caller has handled --help already.

    Raises:
        ConfigError: an argument that is not KEY=VALUE.
        SystemExit: after printing the help or the versions.
    """
    if not arguments and usage is not None:
        print(usage.short())
        raise SystemExit(2)
    if "--version" in arguments:
        print(versions())
        raise SystemExit(0)
    arguments = split_config_dir(rename_old_keys(arguments))[1]
    if help.asked(arguments) and usage is not None:
        print(_help(help.topics(arguments), own, usage))
        raise SystemExit(0)
    arguments = quoted(_with_run(arguments, own))
    values, rest = dict(own), []
    for argument, override in zip(arguments, OverridesParser.create().parse_overrides(list(arguments)), strict=True):
        key = override.key_or_group
        if key not in own:
            rest.append(argument)
            continue
        if override.is_sweep_override():
            raise ConfigError(f"{key}: several values make a sweep, and only flowtrain -m runs sweeps; give one value")
        if override.is_delete():
            raise ConfigError(f"{argument}: leave {key} out instead")
        # OmegaConf resolves interpolations such as ${oc.env:HOME}
        value = OmegaConf.create({key: override.value()})
        values[key] = OmegaConf.to_container(value, resolve=True)[key]  # type: ignore[index, call-overload]
    return values, rest


def _with_run(arguments: Sequence[str], own: Mapping[str, Any]) -> list[str]:
    """Puts ckpt= before the argument that names a run.

    Raises:
        ConfigError: an argument that is neither a run nor KEY=VALUE.
    """
    whole, runs = [], 0
    for argument in arguments:
        if argument.startswith("-"):
            raise ConfigError(f"{argument}: unknown flag; see --help")
        key = argument.partition("=")[0]
        is_override = "=" in argument and re.fullmatch(r"[+~]{0,2}[\w.@/-]+", key) is not None
        if (is_override and not (key not in own and "/" in key and exists(argument))) or argument.startswith("~"):
            whole.append(argument)
            continue
        if "ckpt" not in own or not argument.strip():
            raise ConfigError(f"{argument!r}: arguments look like KEY=VALUE; see --help")
        if argument in own:
            raise ConfigError(f"{argument}: give it a value, {argument}=...; see --help")
        if not exists(argument):
            rest = hint(argument, own, "give ckpt=RUN_DIR_OR_FILE and KEY=VALUE")
            raise ConfigError(f"{argument}: no such run; {rest}")
        runs += 1
        whole.append(f"ckpt={argument}")
    if runs and sum(a.startswith("ckpt=") for a in whole) > 1:
        raise ConfigError(
            f"{' '.join(arguments)}: give one run, or an ensemble as ckpt=[RUN1,RUN2]; KEY=VALUE sets an option"
        )
    return whole


def _help(topics: Sequence[str], own: Mapping[str, Any], usage: Usage) -> str:
    """Returns the short help, or the help on topics: `all`, options of the command, or topics of `flowtrain --help`."""
    if not topics:
        return usage.short()
    known = (help.ALL, *own)
    return "\n\n".join(
        usage.full() if topic == help.ALL else usage.option(topic) if topic in own else help.topic_text([topic], known)
        for topic in topics
    )
