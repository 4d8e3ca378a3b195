"""Functions shared by models: the base distribution, the context, and images at several scales."""

from collections.abc import Callable, Iterable
from typing import Any

from flowtrain.bases import Base, StandardNormal, StudentT
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.scale import ActNorm
from flowtrain.flow import Flow
from flowtrain.utils.arguments import number, whole
from flowtrain.utils.errors import ConfigError

Size = tuple[int, int]

# by default, images are halved while both sides are at least this long
SMALLEST = 8


def of_images(name: str, event_shape: tuple[int, ...], least: int) -> bool:
    """Returns True for images (C, H, W), and False for vectors of at least `least` elements.

    Raises:
        ConfigError: another shape.
    """
    if len(event_shape) == 3:
        return True
    if len(event_shape) != 1 or event_shape[0] < least:
        images = ", ".join(map(str, (1, *event_shape)))
        others = "use model=nsf, model=maf, model=ffjord or model=affine"
        advice = f"give images as ({images})" if len(event_shape) == 2 else others
        raise ConfigError(
            f"model={name} needs images (C, H, W) or vectors of at least {least} column{'s' * (least > 1)}, but the "
            f"samples have shape {event_shape}: {advice}"
        )
    return False


def over_images(
    event_shape: tuple[int, ...],
    scale: Callable[[int, Size, int], Bijection],
    scales: int | None,
    pixels: bool,
    kind: dict[str, Any],
    df: float | None = None,
) -> Flow:
    """Builds a flow of images (C, H, W).

    Args:
        event_shape: (C, H, W).
        scale: builds the bijection from (channels, (H, W), number of halvings).
        scales: the number of halvings, or None, see `halvings`.
        pixels: whether there is an ActNorm of each pixel at the data end.
        kind: the arguments of `Flow` for a conditional flow, see `conditioned`.
        df: see `base`.

    Raises:
        ConfigError: more halvings than the sides allow.
    """
    channels, height, width = event_shape
    inside = scale(channels, (height, width), halvings((height, width), scales))
    # at the data end, the pixels have different means and scales, for example at a border that is always black
    return Flow(base(event_shape, df), from_data([*([ActNorm(event_shape)] if pixels else []), inside]), **kind)


def halved(size: Size) -> Size:
    """Returns the size (H, W) of a squeezed image."""
    return size[0] // 2, size[1] // 2


def halvings(size: Size, asked: int | None) -> int:
    """Returns `asked`, the number of halvings.

    If it is None, images are halved while both sides are even and at least SMALLEST.

    Raises:
        ConfigError: `asked` is larger than the sides allow.
    """
    possible, (height, width) = 0, size
    while height % 2 == 0 and width % 2 == 0 and (asked is not None or min(height, width) >= SMALLEST):
        (height, width), possible = halved((height, width)), possible + 1
    if asked is None:
        return possible
    if whole("model.scales", asked, least=0) > possible:
        raise ConfigError(
            f"model.scales={asked}: images of {size[0]}x{size[1]} can be halved {possible} times, so give at most "
            f"{possible}"
        )
    return asked


def from_data(bijections: Iterable[Bijection]) -> Chain:
    """Builds a chain from bijections that are listed from data to base."""
    return Chain(list(bijections)[::-1])


def base(event_shape: tuple[int, ...], df: float | None) -> Base:
    """Returns independent Student t distributions, or a standard normal distribution if df is None.

    Args:
        event_shape: the shape of one sample.
        df: the initial degrees of freedom of each element. They are parameters of the flow.

    Raises:
        ConfigError: df that is not a positive number.
    """
    return StandardNormal(event_shape) if df is None else StudentT(event_shape, number("model.df", df), trainable=True)


def conditioned(
    name: str, conditional: bool, classes: int | None, context: int | None
) -> tuple[int | None, dict[str, Any]]:
    """Returns the size of the context for the networks of a model, and the arguments of `Flow` for this context.

    Args:
        conditional: whether the model is p(x | label).
        classes: the number K of labels.
        context: the number F of real features of p(x | c).

    Returns:
        (K, {"classes": K}) for labels, (F, {"context": F}) for features, and (None, {}) for an unconditional model.

    Raises:
        ConfigError: labels without their number, or both labels and features.
    """
    if context is not None:
        if conditional:
            raise ConfigError(
                f"model={name} is conditional on labels (model.conditional=true) or on a context, not on both: omit "
                "model.conditional and data.label, and give all columns in data.context, the label as a categorical "
                "column"
            )
        return whole("context", context), {"context": context}
    if conditional and classes is None:
        raise ConfigError(
            f"model={name} with conditional=true needs the labels of the data: give data.label with data=array, label "
            f"in flowtrain.fit, or classes in flowtrain.models.{name}"
        )
    return (classes, {"classes": classes}) if conditional else (None, {})
