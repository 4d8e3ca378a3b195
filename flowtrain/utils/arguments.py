"""Checks of numbers and names that a user gives, and suggestions of the nearest valid name."""

import math
import os
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from operator import index
from pathlib import Path
from reprlib import Repr
from typing import Any

from flowtrain.utils.errors import ConfigError

# names below this similarity, as difflib measures it, are not suggested
LEAST_SIMILARITY = 0.68
# names within TIED_SIMILARITY of the best are suggested too, at most MOST_SUGGESTED in all
TIED_SIMILARITY, MOST_SUGGESTED = 0.02, 3


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """The names that `word` may be a misspelling of, nearest first; empty if none is near.

    A dotted name is also found by its last part. A word with underscores also matches a last part equal to its
    initials: learning_rate finds lr.

    Example:
        >>> nearest("lr", ["trainer.lr", "trainer.steps"]), nearest("learning_rate", ["trainer.lr"])
        (['trainer.lr'], ['trainer.lr'])
        >>> nearest("ffjrod", ["affine", "ffjord"]), nearest("gas", ["moons"])
        (['ffjord'], [])
    """
    known = [name for name in map(str, names) if name and name != word]
    scored = {name: _similarity(word.lower().lstrip("-"), name.lower().lstrip("-")) for name in known}
    best = max(scored.values(), default=0.0)
    near = [name for name, score in scored.items() if score >= max(LEAST_SIMILARITY, best - TIED_SIMILARITY)]
    return sorted(near, key=lambda name: -scored[name])[:MOST_SUGGESTED]


def _similarity(word: str, name: str) -> float:
    before, _, asked = word.rpartition(".")
    group, _, last = name.rpartition(".")
    if not asked:
        return 0.0
    initials = "".join(part[:1] for part in asked.split("_"))
    if len(initials) > 1 and initials == last:
        return 0.95
    by_last = SequenceMatcher(None, asked, last).ratio()
    if min(len(asked), len(last)) >= 4 and (asked in last or last in asked):
        by_last = max(by_last, 0.8)
    # if both have the same group, only the last parts are compared
    return by_last if before == group else max(SequenceMatcher(None, word, name).ratio(), by_last - 0.05)


def hint(word: object, names: Iterable[str], rest: str) -> str:
    """The suggestion, followed by the rest of the message.

    Example:
        >>> hint("moon", ["moons"], "see --help"), hint("gas", ["moons"], "see --help")
        ('did you mean moons? See --help', 'see --help')
    """
    near = nearest(word, names) if isinstance(word, str) else []
    return f"did you mean {' or '.join(near)}? {rest[0].upper()}{rest[1:]}" if near else rest


def choose(word: object, names: Iterable[str], lead: str = "choose one of") -> str:
    """The suggestion, followed by all the names.

    Example:
        >>> choose("moon", ["moons", "rings"])
        'did you mean moons? Choose one of moons, rings'
    """
    names = list(names)
    return hint(word, names, f"{lead} {', '.join(names)}")


def whole(key: str, value: Any, least: int = 1) -> int:
    """`value` as an int if it is a whole number of at least `least`; a float such as 1e4 is one.

    Example:
        >>> whole("trainer.steps", 1e4)
        10000
        >>> whole("model.layers", 0)
        Traceback (most recent call last):
        flowtrain.utils.errors.ConfigError: model.layers=0: give a whole number, at least 1 and below 2^31
    """
    value = as_whole(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise ConfigError(f"{key}={value}: give a whole number, at least {least} and below 2^31")
    return value


def as_whole(value: Any) -> Any:
    """Converts a float that is a whole number to an int. Returns anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def within_memory(key: str, rows: int, bytes_each: int) -> int:
    """`rows` if so many fit into the memory of this machine. A process that fills it is killed without a message.

    If the size of the memory is unknown, as on Windows, nothing is refused; the allocation fails instead.
    """
    if not hasattr(os, "sysconf"):
        return rows
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * bytes_each > there:
        wanted, had = rows * bytes_each / 2**30, there / 2**30
        raise ConfigError(f"{key}={rows}: these take {wanted:.0f} GiB, and this machine has {had:.0f}; give fewer")
    return rows


def number(key: str, value: Any, least: float = 0.0, inclusive: bool = False) -> float:
    """`value` if it is a finite number above `least` (or equal to it, when inclusive)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (value > least or (inclusive and value == least)):
        raise ConfigError(f"{key}={value}: give a number {'at least' if inclusive else 'greater than'} {least:g}")
    return float(value)


def below_half(key: str, value: Any) -> float:
    """`value` if it can be the alpha of a logit, in (0, 1/2) and so far below that levels can be told apart."""
    if number(key, value) >= 0.499:
        raise ConfigError(f"{key}={value}: give a number below 0.499")
    return float(value)


def share(key: str, value: Any) -> float:
    """`value` if it is a number of at least 0 and below 1."""
    if number(key, value, inclusive=True) >= 1:
        raise ConfigError(f"{key}={value}: give a number of at least 0 and below 1")
    return float(value)


def one_of(key: str, value: Any, choices: Iterable[str], why: str = "") -> str:
    """`value` if it is one of the choices. The error message suggests the nearest choice first."""
    names = list(choices)
    if value not in names:
        raise ConfigError(f"{key}={value}: {choose(value, names)}{why and f' ({why})'}")
    return str(value)


def shape_of(value: int | Sequence[int], key: str = "event_shape") -> tuple[int, ...]:
    """`value` as the shape of a sample; one number d stands for vectors, (d,).

    Example:
        >>> shape_of(2), shape_of([1, 28, 28])
        ((2,), (1, 28, 28))
    """
    try:
        # NumPy's whole numbers too
        sizes = [index(n) for n in (value if isinstance(value, Iterable) else (value,))]
    except TypeError:
        raise ConfigError(f"{key}={value}: give whole numbers, as in 2 or (1, 28, 28)") from None
    return tuple(whole(key, n) for n in sizes)


def flag(key: str, value: Any) -> bool:
    """`value` if it is true or false; "no" and "off" are words, and words are true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: give true or false")
    return value


_BRIEFLY = Repr()
_BRIEFLY.maxstring = _BRIEFLY.maxother = 60


def shortened(value: Any) -> str:
    """The representation of a value on one line of limited length; numbers and texts of NumPy as those of Python.

    Example:
        >>> shortened(list(range(100)))
        '[0, 1, 2, 3, 4, 5, ...]'
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return " ".join(_BRIEFLY.repr(value).split())


def path_of(key: str, value: Any) -> Path:
    """`value` as a path, with ~ expanded.

    Raises:
        ConfigError: not a path, or one that no file can have.
    """
    if not isinstance(value, str | os.PathLike) or not (text := os.fspath(value)) or not isinstance(text, str):
        raise ConfigError(f"{key}={shortened(value)}: give the path as text or as a Path")
    if "\0" in text:
        raise ConfigError(f"{key}={text!r}: a path cannot contain a null character")
    try:
        path = Path(text).expanduser()
        # asks the system: a name can be too long, and the working directory can be gone
        path.absolute().exists()
        return path
    except (OSError, RuntimeError) as e:
        raise ConfigError(f"{key}={shortened(text)}: {e}; give another path") from e


def widths(key: str, value: Any, least_layers: int = 1) -> list[int]:
    """`value` as layer widths, a list of positive whole numbers."""
    if not isinstance(value, list | tuple) or len(value) < least_layers:
        raise ConfigError(f"{key}={value}: give a list of widths, as in [64,64]")
    return [whole(f"{key}[{i}]", width) for i, width in enumerate(value)]
