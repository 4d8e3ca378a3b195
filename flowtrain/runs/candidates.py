"""The models that a search fits, and their results; see `flowtrain.runs.search`."""

import math
from dataclasses import dataclass

from flowtrain.utils.formatting import with_error

# below this number of training rows, ffjord is fitted instead of realnvp
SMALL = 1_000
# above this number of columns, realnvp is trained before maf
WIDE = 16
# the models that can have circular columns
CIRCULAR = ("nsf", "maf", "ffjord")


def recommended(rows: int | None, event_shape: tuple[int, ...]) -> list[str]:
    """Returns the flows that a search trains on data of this size, the most promising first.

    A search also fits a Gaussian and a mixture. On the development tables of scripts/bench/tables.py, nsf or maf has
    the lowest validation NLL of the flows after 20 s on eight of ten tables, and realnvp on two. ffjord was measured on
    four tables and is not the best on any. On a table of 213 rows, ffjord has a lower NLL than realnvp by 1 nat. On the
    toys moons and 2spirals, ffjord is the best.

    Args:
        rows: the number of training rows; None for endless data.
    """
    if len(event_shape) > 1:
        return ["realnvp", "glow"]
    if rows is None or rows < SMALL or event_shape[0] == 1:
        return ["nsf", "maf", "ffjord"]
    return ["nsf", "maf", "realnvp"] if event_shape[0] <= WIDE else ["nsf", "realnvp", "maf"]


@dataclass
class Candidate:
    """A model of a search with its results.

    Attributes:
        name: the name of the model. Further seeds of a model have a number, as in nsf-2.
        model: the name of the model.
        seed: the seed of the candidate's run.
        stage: 0: not trained yet. 1: trained for the first part. 2: trained to the end.
        nll: the validation NLL of the candidate's best checkpoint in nats; None before the first checkpoint.
        nll_stderr: the standard error of `nll`.
        trimmed: the same NLL without the 1% of the rows with the lowest log p. Flows are ranked by this NLL, because a
            few outlying rows can dominate an NLL, but have little effect in a stack with a mixture.
        step: the step of the best checkpoint.
        steps: the number of steps so far.
        max_steps: the largest number of steps.
        best: NLL in nats and step of the best validation, for the restart of training.
        seconds: the time for building, training and scoring.
        ended: the reason why training has ended; None if training can continue.
        weight: the weight of the candidate in the stack.
    """

    name: str
    model: str
    seed: int
    stage: int = 0
    nll: float | None = None
    nll_stderr: float | None = None
    trimmed: float | None = None
    step: int = 0
    steps: int = 0
    max_steps: int | None = None
    best: dict[str, float] | None = None
    seconds: float = 0.0
    ended: str | None = None
    weight: float = 0.0

    def check(self) -> None:
        """Checks the types of the attributes, which may have been read from a damaged file.

        Raises:
            TypeError: an attribute has another type.
        """
        numbers: dict[str, tuple[type, ...]] = {"nll": (int, float), "trimmed": (int, float), "seconds": (int, float)}
        kinds = {**numbers, "seed": (int,), "stage": (int,), "step": (int,), "steps": (int,), "max_steps": (int,)}
        kinds |= {"name": (str,), "model": (str,), "ended": (str,), "best": (dict,), "weight": (int, float)}
        optional = ("nll", "trimmed", "max_steps", "ended", "best")
        for key, kind in kinds.items():
            value = getattr(self, key)
            if not isinstance(value, kind) and not (value is None and key in optional):
                raise TypeError(f"{key} of a candidate is {value!r}")

    @property
    def rank(self) -> float:
        """The trimmed validation NLL for the ranking; infinity if it is missing or not finite."""
        return math.inf if self.trimmed is None or not math.isfinite(self.trimmed) else self.trimmed

    @property
    def description(self) -> str:
        """The results as a phrase for messages."""
        error = math.nan if self.nll_stderr is None else self.nll_stderr
        nll = "no NLL" if self.nll is None else f"validation NLL {with_error(self.nll, error)}"
        ended = f"; {self.ended}" if self.ended else ""
        return f"{nll}, best at step {self.step:,} of {self.steps:,}, {self.seconds:.1f} s{ended}"
