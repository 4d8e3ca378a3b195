"""What the course of a training run says about its settings: where its best step was, and what may help."""

from collections.abc import Mapping, Sequence
from typing import Any

# the share of the steps at whose end a run that still improves has had too few of them
LATE = 0.2
# nats that it must have gained in that share of its steps, for samples of up to ten numbers
GAINED = 0.02
# the share of the steps after which a best validation does not count as early
EARLY = 0.5


def best_step(step: int, steps: int) -> str:
    """Where in a run the best validation was, in words.

    Example:
        >>> best_step(200, 1200)
        'best at step 200 of 1,200'
    """
    return f"best at step {step:,} of {steps:,}"


def advice(
    rows: Sequence[Mapping[str, Any]], best: int, steps: int, d: int, finite: bool, config: Mapping[str, Any]
) -> str | None:
    """What may give a better flow, by the validations of a run; None where they say nothing clear.

    Args:
        rows: of metrics.jsonl.
        best: the step of the best validation.
        steps: that the run took.
        d: how many numbers a sample has.
        finite: whether the training data come again and again.
        config: the run's, which says what can be changed.
    """
    nll = {row["step"]: row["nll"] for row in rows if row["split"] == "val"}
    if len(nll) < 2 or best not in nll:
        return None
    if finite and best <= EARLY * steps and max(nll) > best:
        keys = ["more rows", "a smaller model (model.hidden)", "a larger trainer.weight_decay", "a smaller trainer.lr"]
        if "dropout" in config["model"]:
            keys.insert(2, "model.dropout")
        what = "the flow overfits" if best else "no step was better than the flow that the run began with"
        return f"{what}: {', '.join(keys[:-1])} or {keys[-1]} may help"
    before = [nll[step] for step in nll if step <= (1 - LATE) * steps]
    if best == max(nll) and before and min(before) - nll[best] > GAINED * max(1.0, d / 10):
        return "the validation NLL was still falling: a larger trainer.steps may help"
    return None
