"""Decomposition of a bijection into stages that map whole samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.squeeze import Wrapped


def stages(bijection: Bijection) -> list[Bijection]:
    """Returns the stages of a bijection, from base to data. Each stage maps (B, *event) to (B, *event).

    Chains are split, also inside `Wrapped` bijections: Squeeze(b . a) = Squeeze(b) . Squeeze(a).

    Example:
        >>> from flowtrain.bijections.linear import Affine
        >>> from flowtrain.bijections.scale import ActNorm
        >>> [type(s).__name__ for s in stages(Chain([Affine(2), Chain([ActNorm(2)])]))]
        ['Affine', 'ActNorm']
    """
    if isinstance(bijection, Chain):
        return [stage for part in bijection for stage in stages(part)]
    if isinstance(bijection, Wrapped):
        return [type(bijection)(stage) for stage in stages(bijection.inner)]
    return [bijection]


def innermost(stage: Bijection) -> Bijection:
    """Returns the bijection inside a stage, without the `Squeeze` and `FactorOut` around it."""
    return innermost(stage.inner) if isinstance(stage, Wrapped) else stage


def between(stage: Bijection, start: float, end: float) -> Bijection:
    """Returns a stage with a continuous flow on the interval from `start` to `end` instead of 0 to 1.

    Raises:
        TypeError: the innermost bijection of the stage is not `Continuous`.
    """
    if isinstance(stage, Wrapped):
        return type(stage)(between(stage.inner, start, end))
    if not isinstance(stage, Continuous):
        raise TypeError(f"{type(stage).__name__} has no time")
    return stage.between(start, end)


def evaluate_inside(stage: Bijection, function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Evaluates a function of the states of the innermost bijection, such as its velocity, at y (B, *event).

    The result is 0 for elements of y that are factored out.
    """
    if not isinstance(stage, Wrapped):
        return function(y)
    inside, outside = stage.enter(y)
    still = None if outside is None else torch.zeros_like(outside)
    return stage.leave(evaluate_inside(stage.inner, function, inside), still)
