"""What the multi-scale models share: how often an image is halved, and the composition in the order of reading."""

from collections.abc import Iterable

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.checks import whole
from flowtrain.errors import ConfigError

# no side is halved that is shorter than this, unless asked for
SMALLEST = 8


def halvings(size: tuple[int, int], key: str, asked: int | None) -> int:
    """How often both sides are halved: as asked, else as long as both are even and none is shorter than SMALLEST.

    Raises:
        ConfigError: more than the sides allow.
    """
    height, width = size
    possible = 0
    while height % 2 == 0 and width % 2 == 0:
        if asked is None and min(height, width) < SMALLEST:
            break
        height, width, possible = height // 2, width // 2, possible + 1
    if asked is None:
        return possible
    if whole(key, asked, least=0) > possible:
        raise ConfigError(
            f"{key}={asked}: images of {size[0]}x{size[1]} can be halved {possible} times, so give at most {possible}"
        )
    return asked


def from_data(bijections: Iterable[Bijection]) -> Chain:
    """The chain of bijections that are listed as x meets them on its way to the base."""
    return Chain(list(bijections)[::-1])


def labelled(name: str, conditional: bool, classes: int | None) -> int | None:
    """How many classes a model is conditioned on, or None.

    Raises:
        ConfigError: a conditional model of data without labels.
    """
    if conditional and classes is None:
        raise ConfigError(f"model={name} model.conditional=true: this data has no labels to condition on")
    return classes if conditional else None
