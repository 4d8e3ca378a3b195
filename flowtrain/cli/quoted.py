"""Quotes paths on a command line, so that Hydra's grammar reads them unchanged.

Hydra splits a value at commas, and rejects parentheses, umlauts and other characters of file names.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from flowtrain.cli.files import is_path

# keys whose values are files to read, and files or directories to write. For keys of the data see `is_path`
READ = ("resume", "from", "ckpt", "ood")
WRITTEN = ("out", "scores", "hydra.run.dir", "hydra.sweep.dir")
# keys whose values are names in a file
NAMES = ("data.label", "data.key")


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quotes the paths among the values of a command line for Hydra, if they need it.

    Quoted values, lists and the values of a sweep are not changed, unless a file of exactly that name exists.

    Example:
        >>> quoted(["data.path=my data (1).npy", "ckpt=runs/1", "trainer.lr=0.1"])
        ["data.path='my data (1).npy'", 'ckpt=runs/1', 'trainer.lr=0.1']
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    start, equals, text = argument.partition("=")
    key = start.lstrip("+")
    group, _, name = key.partition(".")
    read = key in READ or (group == "data" and is_path(name))
    if not equals or not text or text.lower() == "null" or not (read or key in (*WRITTEN, *NAMES)):
        return argument
    value, sweeps = parsed(argument)
    if key in NAMES:
        return f"{start}={in_quotes(text)}" if value is None and text[0] not in "'\"[{" else argument
    if isinstance(value, str) and value == text and not ("${" in text and _is_there(text)):
        return argument
    if _is_there(text):
        return f"{start}={in_quotes(text.replace('${', chr(92) + '${'))}"
    if isinstance(value, QuotedString):
        return argument
    if sweeps or isinstance(value, list | dict):
        return argument if read else f"{start}={in_quotes(text)}"
    if read and "," in text and not re.search(r"['\"]", text):
        # the values of a sweep, with -m
        return f"{start}={','.join(_quoted(f'{key}={part.strip()}').partition('=')[2] for part in text.split(','))}"
    # a value that begins with a quote but cannot be parsed was meant for Hydra, which reports it
    return argument if value is None and text[0] in "'\"" else f"{start}={in_quotes(text)}"


def parsed(argument: str) -> tuple[Any, bool]:
    """The value of an override, parsed by Hydra (None if Hydra rejects it), and whether it is a sweep."""
    try:
        override = OverridesParser.create().parse_override(argument)
        # `value()` would remove the quotes
        raw = override._value
    except HydraException:
        return None, False
    return raw, override.is_sweep_override()


def in_quotes(text: str) -> str:
    """The text as a quoted string in Hydra's grammar.

    Example:
        >>> print(in_quotes("it's [1]"))
        'it\\'s [1]'
    """
    return QuotedString(text, Quote.single).with_quotes()


def _is_there(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # for example, the name is too long
        return False
