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

# Names below this similarity (by difflib) are not suggested
LEAST_SIMILARITY = 0.68
# Names within TIED_SIMILARITY of the best are also suggested, at most MOST_SUGGESTED in total
TIED_SIMILARITY, MOST_SUGGESTED = 0.02, 3


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """Returns the names that `word` may be a misspelling of, nearest first.

    A dotted name is also found by its last part. A word with underscores also matches a last part that is equal to its
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
    """Returns a suggestion of the nearest names, followed by the rest of the message.

    Example:
        >>> hint("moon", ["moons"], "see --help"), hint("gas", ["moons"], "see --help")
        ('did you mean moons? See --help', 'see --help')
    """
    near = nearest(word, names) if isinstance(word, str) else []
    return f"did you mean {' or '.join(near)}? {rest[0].upper()}{rest[1:]}" if near else rest


def choose(word: object, names: Iterable[str], lead: str = "choose one of") -> str:
    """Returns a suggestion of the nearest names, followed by all names.

    Example:
        >>> choose("moon", ["moons", "rings"])
        'did you mean moons? Choose one of moons, rings'
    """
    names = list(names)
    return hint(word, names, f"{lead} {', '.join(names)}")


def whole(key: str, value: Any, least: int = 1) -> int:
    """Checks that a value is a whole number, at least `least`, and returns it as an int. A float such as 1e4 is valid.

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
    """Checks that `rows` rows fit in the memory of this machine, because a process that fills it is killed silently.

    If the size of the memory is unknown, as on Windows, there is no check.

    Raises:
        ConfigError: too many rows.
    """
    if not hasattr(os, "sysconf"):
        return rows
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * bytes_each > there:
        wanted, had = rows * bytes_each / 2**30, there / 2**30
        raise ConfigError(
            f"{key}={rows}: these rows need {wanted:.0f} GiB, but this machine has {had:.0f} GiB of memory; give fewer"
        )
    return rows


def number(key: str, value: Any, least: float = 0.0, inclusive: bool = False) -> float:
    """Checks that a value is a finite number above `least` (or equal to it if `inclusive`), and returns it."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (value > least or (inclusive and value == least)):
        raise ConfigError(f"{key}={value}: give a number {'at least' if inclusive else 'greater than'} {least:g}")
    return float(value)


def below_half(key: str, value: Any) -> float:
    """Checks that a value is positive and below 0.499, and returns it. At 1/2, a logit cannot distinguish levels."""
    if number(key, value) >= 0.499:
        raise ConfigError(f"{key}={value}: give a number below 0.499")
    return float(value)


def share(key: str, value: Any) -> float:
    """Checks that a value is a number of at least 0 and below 1, and returns it."""
    if number(key, value, inclusive=True) >= 1:
        raise ConfigError(f"{key}={value}: give a number of at least 0 and below 1")
    return float(value)


def one_of(key: str, value: Any, choices: Iterable[str], why: str = "") -> str:
    """Checks that a value is one of the choices, and returns it. The error message suggests the nearest choice."""
    names = list(choices)
    if value not in names:
        raise ConfigError(f"{key}={value}: {choose(value, names)}{why and f' ({why})'}")
    return str(value)


def shape_of(value: int | Sequence[int], key: str = "event_shape") -> tuple[int, ...]:
    """Converts a value to the shape of a sample. A number d means vectors, (d,).

    Example:
        >>> shape_of(2), shape_of([1, 28, 28])
        ((2,), (1, 28, 28))
    """
    try:
        # index also accepts NumPy's integers
        sizes = [index(n) for n in (value if isinstance(value, Iterable) else (value,))]
    except TypeError:
        raise ConfigError(f"{key}={value}: give whole numbers, as in 2 or (1, 28, 28)") from None
    return tuple(whole(key, n) for n in sizes)


def flag(key: str, value: Any) -> bool:
    """Checks that a value is a bool, and returns it. Strings such as "no" are refused, because they count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: give true or false")
    return value


_BRIEFLY = Repr()
_BRIEFLY.maxstring = _BRIEFLY.maxother = 60


def shortened(value: Any) -> str:
    """Formats a value on one line of limited length. NumPy scalars are formatted like Python values.

    Example:
        >>> shortened(list(range(100)))
        '[0, 1, 2, 3, 4, 5, ...]'
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return " ".join(_BRIEFLY.repr(value).split())


def path_of(key: str, value: Any) -> Path:
    """Converts a value to a path, with ~ expanded.

    Raises:
        ConfigError: not a path, or a path that the system does not allow.
    """
    if not isinstance(value, str | os.PathLike) or not (text := os.fspath(value)) or not isinstance(text, str):
        raise ConfigError(f"{key}={shortened(value)}: give the path as text or as a Path")
    if "\0" in text:
        raise ConfigError(f"{key}={text!r}: a path cannot contain a null character")
    try:
        path = Path(text).expanduser()
        # fails if a name is too long or if the working directory no longer exists
        path.absolute().exists()
        return path
    except (OSError, RuntimeError) as e:
        raise ConfigError(f"{key}={shortened(text)}: {e}; give another path") from e


def widths(key: str, value: Any, least_layers: int = 1) -> list[int]:
    """Checks that a value is a list of layer widths (positive whole numbers), and returns it."""
    if not isinstance(value, list | tuple) or len(value) < least_layers:
        raise ConfigError(f"{key}={value}: give a list of widths, as in [64,64]")
    return [whole(f"{key}[{i}]", width) for i, width in enumerate(value)]
