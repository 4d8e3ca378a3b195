"""Suggests the valid names nearest to a misspelled one, for messages that list names."""

from collections.abc import Iterable
from difflib import SequenceMatcher

# names below this similarity, as difflib measures it, are not suggested
LEAST = 0.68
# names within TIE of the best similarity are suggested too, at most MOST in all
TIE, MOST = 0.02, 3


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
    near = [name for name, score in scored.items() if score >= max(LEAST, best - TIE)]
    return sorted(near, key=lambda name: -scored[name])[:MOST]


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
