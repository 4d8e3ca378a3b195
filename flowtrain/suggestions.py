"""Did you mean: the valid name nearest to one that was misspelled, for every message that lists names."""

from collections.abc import Iterable
from difflib import SequenceMatcher

# below this similarity, as difflib measures it, a name is no suggestion
LEAST = 0.68
# names this near to the best one are suggested with it, up to so many
TIE, MOST = 0.02, 3


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """The names that `word` may be a misspelling of, nearest first; empty where none is near.

    A dotted name is also found by its last part, and that by its initials.

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
    # with the same group before both, only the rest can be misspelled
    return by_last if before == group else max(SequenceMatcher(None, word, name).ratio(), by_last - 0.05)


def hint(word: object, names: Iterable[str], rest: str) -> str:
    """The suggestion in a message, and the rest of the message after it.

    Example:
        >>> hint("moon", ["moons"], "see --help"), hint("gas", ["moons"], "see --help")
        ('did you mean moons? See --help', 'see --help')
    """
    near = nearest(word, names) if isinstance(word, str) else []
    return f"did you mean {' or '.join(near)}? {rest[0].upper()}{rest[1:]}" if near else rest


def choose(word: object, names: Iterable[str], lead: str = "choose one of") -> str:
    """The suggestion, and after it all the names.

    Example:
        >>> choose("moon", ["moons", "rings"])
        'did you mean moons? Choose one of moons, rings'
    """
    names = list(names)
    return hint(word, names, f"{lead} {', '.join(names)}")
