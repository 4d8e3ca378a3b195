"""What a part of the torture has tried, and what came of it."""

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Verdict(NamedTuple):
    """One word for what is as it should be, else what is wrong."""

    words: str
    wrong: bool = False


class Part:
    """Counts, within a time.

    Args:
        wanted: how many tries.
        until: when it must be over, by time.monotonic.
        out: where it has a folder; kept are the cases that went wrong.
        rng: what everything is drawn from.
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
        """Numbers from 0 while there is time."""
        while self.going:
            yield self.tried

    def count(self, verdict: Verdict, shown_by: str) -> None:
        """Counts a try.

        Args:
            shown_by: the command or the file that it was.
        """
        self.tried += 1
        if verdict.wrong:
            self.fail(f"{shown_by}: {verdict.words}")
        else:
            self.outcomes[verdict.words] += 1
        if self.tried % 20 == 0 or self.tried == self.wanted:
            self.say(f"{self.tried} of {self.wanted}, {len(self.wrong)} wrong")

    def fail(self, words: str) -> None:
        self.wrong.append(words)
        self.say(f"WRONG: {words}")

    def say(self, words: str) -> None:
        print(f"{self.name}: {words}", file=sys.stderr, flush=True)

    def row(self) -> list[str]:
        """Of the table."""
        short = [f"time was over before {self.wanted}"] if self.tried < self.wanted else []
        came = [*self.notes, *(f"{n} {outcome}" for outcome, n in self.outcomes.most_common()), *short]
        return [self.name, str(self.tried), ", ".join(came) or "-", str(len(self.wrong))]
