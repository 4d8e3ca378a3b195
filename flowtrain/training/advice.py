"""Advice from the validations of a training run: where its best step was, and which settings may help."""

from collections.abc import Mapping, Sequence
from typing import Any

# a run that still improves in this last share of its steps had too few of them
LATE = 0.2
# nats that the run must have gained in that share, for samples of up to ten numbers
GAINED = 0.02
# a best validation within this first share of the steps suggests overfitting
EARLY = 0.5


def best_step(step: int, steps: int) -> str:
    """Says at which step of a run the best validation was.

    Example:
        >>> best_step(200, 1200)
        'best at step 200 of 1,200'
    """
    return f"best at step {step:,} of {steps:,}"


def advice(
    rows: Sequence[Mapping[str, Any]], best: int, steps: int, d: int, finite: bool, config: Mapping[str, Any]
) -> str | None:
    """Suggests what may give a better flow, from the validations of a run; None if they show nothing clear.

    Args:
        rows: the rows of metrics.jsonl.
        best: the step of the best validation.
        steps: the number of steps that the run took.
        d: the number of elements of a sample.
        finite: whether the training data are a finite set.
        config: the config of the run, which says which keys the model has.
    """
    nll = {row["step"]: row["nll"] for row in rows if row["split"] == "val"}
    if len(nll) < 2 or best not in nll:
        return None
    clear = GAINED * max(1.0, d / 10)
    if finite and best <= EARLY * steps and nll[max(nll)] - nll[best] > clear:
        names = {"hidden": "a smaller model (model.hidden)", "dropout": "model.dropout"}
        keys = ["more rows", *(words for key, words in names.items() if key in config["model"])]
        keys += ["a larger trainer.weight_decay", "a smaller trainer.lr"]
        what = "the flow overfits" if best else "no step was better than the initial flow"
        return f"{what}: {', '.join(keys[:-1])} or {keys[-1]} may help"
    before = [nll[step] for step in nll if step <= (1 - LATE) * steps]
    if best == max(nll) and before and min(before) - nll[best] > clear:
        return "the validation NLL was still falling: a larger trainer.steps may help"
    return None
