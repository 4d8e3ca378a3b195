"""Glow: steps of ActNorm, an invertible 1x1 convolution and a coupling (Kingma and Dhariwal 2018).

The couplings are affine, as in the paper, or rational-quadratic splines (Durkan et al. 2019, section 5.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.coupling import HalfCoupling
from flowtrain.bijections.elementwise import ScaleShift
from flowtrain.bijections.linear import InvertibleLinear
from flowtrain.bijections.scale import ActNorm
from flowtrain.bijections.squeeze import FactorOut, Squeeze
from flowtrain.bijections.table_chain import TableChain
from flowtrain.flow import Flow
from flowtrain.models.multiscale import Size, base, conditioned, from_data, halved, of_images, over_images
from flowtrain.models.nsf import spline
from flowtrain.nn.conditioners import ACTIVATIONS, MLP, ConvNet, InformedConv, zero
from flowtrain.utils.arguments import flag, number, one_of, shape_of, share, whole, widths
from flowtrain.utils.errors import ConfigError

COUPLINGS = ("affine", "spline")


def glow(
    event_shape: int | Sequence[int],
    *,
    steps: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    cap: float = 2.0,
    input_bound: float | None = None,
    coupling: str = "affine",
    bins: int = 8,
    bound: float = 5.0,
    dropout: float = 0.0,
    df: float | None = None,
    scales: int | None = None,
    positional_bias: bool = False,
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
) -> Flow:
    """Glow (Kingma and Dhariwal 2018) for images (C, H, W), or for vectors of length d >= 2 as images of one pixel.

    Each step consists of an ActNorm, an invertible 1x1 convolution and a coupling. For images, there is also an ActNorm
    of each pixel at the data end, which is not in the paper.

    Args:
        event_shape: d, (d,) or (C, H, W).
        steps: the number of steps. For images, this number at each scale.
        hidden: for vectors, the widths of the MLP in each conditioner. For images, the channels of a 3x3 convolution
            and of the 1x1 convolutions after it.
        activation: relu | tanh | swish, in the conditioners.
        cap: a bound on the log-scale of each affine coupling.
        input_bound: for vectors, a bound on the inputs of the conditioners, see `flowtrain.bijections.Coupling`.
            None: no bound.
        coupling: affine | spline, the elementwise map in the couplings. The channels that are factored out after each
            scale of images always have an affine coupling.
        bins, bound: settings of the splines, see `flowtrain.models.nsf`.
        dropout: for vectors, the dropout probability in the conditioners.
        df: the initial degrees of freedom of a base of independent Student t distributions. Training fits them for
            each element. None: a standard normal base.
        scales: the number of times that images are halved. None: images are halved while both sides are
            even and at least 8.
        positional_bias: for images, whether the conditioners have a bias for each pixel.
        conditional: whether the flow is p(x | label). The label is then an input of the conditioners.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.

    Returns:
        An untrained flow in training mode. `flowtrain.train` trains it.

    Raises:
        ConfigError: d < 2, one channel at the last scale, `conditional` without `classes` or together with `context`,
            or a setting out of range.
    """
    event_shape = shape_of(event_shape)
    # this checks the settings of the splines, even if the couplings are affine
    spline(bins, bound)
    size, kind = conditioned("glow", flag("model.conditional", conditional), classes, context)
    made = Steps(
        steps=whole("model.steps", steps),
        hidden=widths("model.hidden", hidden),
        activation=one_of("model.activation", activation, ACTIVATIONS),
        cap=number("model.cap", cap),
        input_bound=None if input_bound is None else number("model.input_bound", input_bound),
        coupling=one_of("model.coupling", coupling, COUPLINGS),
        bins=bins,
        bound=bound,
        dropout=share("model.dropout", dropout),
        positional_bias=flag("model.positional_bias", positional_bias),
        classes=size,
    )
    if of_images("glow", event_shape, least=2):
        return over_images(event_shape, made.scale, scales, pixels=True, kind=kind, df=df)
    d = event_shape[0]
    return Flow(base(event_shape, df), TableChain(reversed([*made.at(d), ActNorm(d)])), **kind)


@dataclass(frozen=True)
class Steps:
    """The settings of the steps of a model. The methods build steps for vectors and for images."""

    steps: int
    hidden: list[int]
    activation: str
    cap: float
    input_bound: float | None
    coupling: str
    bins: int
    bound: float
    dropout: float
    positional_bias: bool
    classes: int | None

    def at(self, channels: int, size: Size | None = None) -> list[Bijection]:
        """Builds the steps for images of this size, or for vectors, listed from data to base (Glow, figure 2a)."""
        first = (channels + 1) // 2
        parts: list[Bijection] = []
        for _ in range(self.steps):
            transform = ScaleShift(self.cap) if self.coupling == "affine" else spline(self.bins, self.bound)
            net = self.net(first, transform.size * (channels - first), size)
            input_bound = self.input_bound if size is None else None
            coupling = HalfCoupling(channels, False, net, input_bound=input_bound, transform=transform)
            parts += [ActNorm(channels), InvertibleLinear(channels), coupling]
        return parts

    def scale(self, channels: int, size: Size, times: int) -> Bijection:
        """Builds one scale of images: a squeeze, steps, and the next scale for half of the channels (figure 2b).

        The other half of the channels is factored out, with a density that depends on the first half.

        Args:
            channels, size: of the images before the squeeze.
            times: the number of squeezes, including this one.

        Raises:
            ConfigError: one channel at the last scale, which cannot be split.
        """
        if not times:
            if channels == 1:
                raise ConfigError(
                    f"model=glow needs at least two channels, and these images of {size[0]}x{size[1]} have one: use "
                    "images with even sides and model.scales of at least 1, or model=realnvp"
                )
            return from_data([*self.at(channels, size), ActNorm(channels)])
        size = halved(size)
        inside = self.at(4 * channels, size)
        if times == 1:
            return Squeeze(from_data([*inside, ActNorm(4 * channels)]))
        half = 2 * channels
        # the density of the channels that are factored out: a convolution of the other channels gives mean and scale
        prior = zero(InformedConv(half, 2 * half, self.classes, self.places(size)))
        parts = [*inside, HalfCoupling(2 * half, False, prior, self.cap)]
        return Squeeze(from_data([*parts, FactorOut(self.scale(half, size, times - 1))]))

    def net(self, n_in: int, n_out: int, size: Size | None) -> nn.Module:
        """Builds a conditioner for images of this size, or for vectors."""
        if size is None:
            return MLP(n_in, self.hidden, n_out, self.activation, self.classes, self.dropout)
        return ConvNet(n_in, self.hidden, n_out, self.activation, self.classes, self.places(size))

    def places(self, size: Size) -> Size | None:
        """Returns the size for the positional bias of a network, or None."""
        return size if self.positional_bias else None
