"""A bijection taken apart into stages, each of which acts on whole samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.squeeze import Wrapped


def stages(bijection: Bijection) -> list[Bijection]:
    """The bijections that one is made of, from the base to the data, each from (B, *event) to (B, *event).

    Chains are taken apart, also within squeezes and halves: Squeeze(b . a) = Squeeze(b) . Squeeze(a).

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
    """What a stage does, without the squeezes and halves around it."""
    return innermost(stage.inner) if isinstance(stage, Wrapped) else stage


def between(stage: Bijection, start: float, end: float) -> Bijection:
    """A stage whose innermost is a continuous flow, from time `start` to `end` in place of 0 to 1.

    Raises:
        TypeError: another stage, which has no time.
    """
    if isinstance(stage, Wrapped):
        return type(stage)(between(stage.inner, start, end))
    if not isinstance(stage, Continuous):
        raise TypeError(f"{type(stage).__name__} has no time")
    return stage.between(start, end)


def through(stage: Bijection, function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """What a function of the innermost's states, as its velocity, is of y (B, *event): 0 where y passes it by."""
    if not isinstance(stage, Wrapped):
        return function(y)
    inside, outside = stage.enter(y)
    still = None if outside is None else torch.zeros_like(outside)
    return stage.leave(through(stage.inner, function, inside), still)
