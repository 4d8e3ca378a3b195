"""Counts of the cases that a part of scripts/torture.py has tried, and their results."""

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Verdict(NamedTuple):
    """The result of a case: a word if it is correct, or a description of the failure."""

    words: str
    wrong: bool = False


class Part:
    """Counts cases within a time limit.

    Args:
        wanted: the number of cases.
        until: the time limit, as time.monotonic.
        out: the folder for files. The files of failing cases are kept.
        rng: the source of all random choices.
    """

    def __init__(self, name: str, wanted: int, until: float, out: Path, rng: random.Random) -> None:
        self.name, self.wanted, self.until, self.out, self.rng = name, wanted, until, out, rng
        self.tried = 0
        self.outcomes: Counter[str] = Counter()
        self.notes: list[str] = []
        self.wrong: list[str] = []

    @property
    def going(self) -> bool:
        return self.tried < self.wanted and time.monotonic() < self.until

    def tries(self) -> Iterator[int]:
        """Yields the number of tried cases while cases and time are left."""
        while self.going:
            yield self.tried

    def count(self, verdict: Verdict, shown_by: str) -> None:
        """Counts a case.

        Args:
            shown_by: the command or file that reproduces the case.
        """
        self.tried += 1
        if verdict.wrong:
            self.fail(f"{shown_by}: {verdict.words}")
        else:
            self.outcomes[verdict.words] += 1
        if self.tried % 20 == 0 or self.tried == self.wanted:
            self.say(f"{self.tried} of {self.wanted}, {len(self.wrong)} failures")

    def fail(self, words: str) -> None:
        self.wrong.append(words)
        self.say(f"FAILURE: {words}")

    def say(self, words: str) -> None:
        print(f"{self.name}: {words}", file=sys.stderr, flush=True)

    def row(self) -> list[str]:
        """Returns the row of this part in the table of results."""
        short = [f"time limit reached before {self.wanted}"] if self.tried < self.wanted else []
        came = [*self.notes, *(f"{n} {outcome}" for outcome, n in self.outcomes.most_common()), *short]
        return [self.name, str(self.tried), ", ".join(came) or "-", str(len(self.wrong))]
