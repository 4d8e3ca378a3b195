"""Paths on a command line, as the shell hands them over, quoted so that Hydra's grammar reads them as they are.

Hydra splits a value at commas, and refuses parentheses, umlauts and other characters that file names have.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from flowtrain.cli.files import is_path

# keys whose values are files to read, and files or directories to write; those of the data besides, see `is_path`
READ = ("resume", "from", "ckpt", "ood")
WRITTEN = ("out", "scores", "hydra.run.dir", "hydra.sweep.dir")
# keys whose values are names out of a file
NAMES = ("data.label", "data.key")


def quoted(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, with the paths among their values quoted for Hydra where they need it.

    What is quoted already is left as it is, and so are lists and the values of a sweep, unless there is a file of
    that very name.

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
        # with -m, the values of a sweep
        return f"{start}={','.join(_quoted(f'{key}={part.strip()}').partition('=')[2] for part in text.split(','))}"
    # with quotes in it and not to be parsed, it was meant for Hydra
    return argument if value is None and text[0] in "'\"" else f"{start}={in_quotes(text)}"


def parsed(argument: str) -> tuple[Any, bool]:
    """The value of an override as Hydra's grammar has it, None where that refuses it; and whether it is a sweep."""
    try:
        override = OverridesParser.create().parse_override(argument)
        # as it was written: `value()` takes the quotes away
        raw = override._value
    except HydraException:
        return None, False
    return raw, override.is_sweep_override()


def in_quotes(text: str) -> str:
    """The text as a quoted string of Hydra's grammar.

    Example:
        >>> print(in_quotes("it's [1]"))
        'it\\'s [1]'
    """
    return QuotedString(text, Quote.single).with_quotes()


def _is_there(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # too long a name for a file
        return False
