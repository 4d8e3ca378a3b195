"""RealNVP: affine couplings for vectors, and at several scales for images (Dinh et al. 2017).

Example:
    >>> flow = realnvp(2, layers=4, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal before training
    -1.8379
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.coupling import CheckerboardCoupling, HalfCoupling, IndexCoupling, coupling_order
from flowtrain.bijections.linear import Permutation
from flowtrain.bijections.scale import ActNorm, BatchNorm
from flowtrain.bijections.squeeze import FactorOut, Squeeze
from flowtrain.bijections.table_chain import TableChain
from flowtrain.flow import Flow
from flowtrain.models.multiscale import Size, base, conditioned, from_data, halved, of_images, over_images
from flowtrain.nn.conditioners import ACTIVATIONS, MLP, ResidualNet
from flowtrain.utils.arguments import flag, number, one_of, shape_of, share, whole, widths

MIXINGS = ("alternate", "permutation")


def realnvp(
    event_shape: int | Sequence[int],
    *,
    layers: int | None = None,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    mixing: str = "alternate",
    actnorm: bool = True,
    batch_norm: bool = False,
    cap: float = 2.0,
    input_bound: float | None = None,
    dropout: float = 0.0,
    df: float | None = None,
    scales: int | None = None,
    positional_bias: bool = False,
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
) -> Flow:
    """RealNVP (Dinh et al. 2017): affine couplings for vectors of length d >= 2, or for images (C, H, W).

    Args:
        event_shape: d, (d,) or (C, H, W).
        layers: the number of couplings. For images, the number of checkerboard couplings and of channel couplings at
            each scale. None: 8 for vectors, 4 for images.
        hidden: for vectors, the widths of the MLP in each conditioner. For images, the channels of each residual block.
        activation: relu | tanh | swish, in the conditioners.
        mixing: for vectors. `alternate` swaps the halves (even and odd columns) from layer to layer. `permutation` puts
            a fixed permutation before each layer, drawn at construction and saved with the weights. The halves are then
            random, see `coupling_order`.
        actnorm: whether an ActNorm follows each coupling. For images, there is also an ActNorm of each pixel at the
            data end.
        batch_norm: whether a BatchNorm replaces the ActNorm after each coupling. For images, the conditioners then have
            batch normalization too.
        cap: a bound on the log-scale of each coupling.
        input_bound: for vectors, a bound on the inputs of the conditioners, see `flowtrain.bijections.Coupling`.
            None: no bound.
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
        ConfigError: d < 2, `conditional` without `classes` or together with `context`, or a setting out of range.
    """
    event_shape = shape_of(event_shape)
    images = of_images("realnvp", event_shape, least=2)
    size, kind = conditioned("realnvp", flag("model.conditional", conditional), classes, context)
    couplings = Couplings(
        layers=whole("model.layers", layers) if layers is not None else 4 if images else 8,
        hidden=widths("model.hidden", hidden, least_layers=int(images)),
        activation=one_of("model.activation", activation, ACTIVATIONS),
        actnorm=flag("model.actnorm", actnorm),
        batch_norm=flag("model.batch_norm", batch_norm),
        cap=number("model.cap", cap),
        input_bound=None if input_bound is None else number("model.input_bound", input_bound),
        dropout=share("model.dropout", dropout),
        positional_bias=flag("model.positional_bias", positional_bias),
        classes=size,
    )
    one_of("model.mixing", mixing, MIXINGS)
    if images:
        return over_images(event_shape, couplings.scale, scales, couplings.actnorm, kind, df)
    return Flow(base(event_shape, df), couplings.stack(event_shape[0], mixing == "permutation"), **kind)


@dataclass(frozen=True)
class Couplings:
    """The settings of the couplings of a model. The methods build couplings for vectors and for images."""

    layers: int
    hidden: list[int]
    activation: str
    actnorm: bool
    batch_norm: bool
    cap: float
    input_bound: float | None
    dropout: float
    positional_bias: bool
    classes: int | None

    def norm(self, channels: int) -> list[Bijection]:
        """Returns the normalization that follows a coupling from base to data."""
        if self.batch_norm:
            return [BatchNorm(channels)]
        return [ActNorm(channels)] if self.actnorm else []

    def stack(self, d: int, permuted: bool) -> TableChain:
        """Builds the couplings for vectors of length d."""
        # the mask is built on the CPU, because it needs values even if the model is built on the meta device
        even = torch.arange(d, device="cpu") % 2 == 0
        bijections: list[Bijection] = []
        for i in range(self.layers):
            mask = even if i % 2 == 0 or permuted else ~even
            n_kept = int(mask.sum())
            if permuted:
                bijections.append(Permutation(coupling_order(i, d, d - n_kept, shift=1)))
            net = MLP(n_kept, self.hidden, 2 * (d - n_kept), self.activation, self.classes, self.dropout)
            bijections += [IndexCoupling(mask, net, self.cap, self.input_bound), *self.norm(d)]
        return TableChain(bijections)

    def scale(self, channels: int, size: Size, times: int) -> Bijection:
        """Builds one scale of images, as in Dinh et al. 2017, section 3.6.

        A scale consists of couplings with checkerboard masks, a squeeze, couplings of channels, and the next scale for
        half of the channels. The other half is factored out. The last scale has only couplings with checkerboard masks.

        The checkerboard couplings are inside the squeeze, where the two colours are the two halves of the channels. So
        their networks have a quarter of the pixels, four times the channels, and no masked inputs.

        Args:
            channels, size: of the images before the squeeze.
            times: the number of scales that follow.
        """
        if not times:
            return self.last_scale(channels, size)
        c, half = 4 * channels, halved(size)
        upper_left, lower_right, upper_right, lower_left = torch.arange(c).chunk(4)
        by_columns = torch.cat([upper_left, upper_right, lower_left, lower_right])
        rest = FactorOut(self.scale(c // 2, half, times - 1))
        return Squeeze(from_data([*self.halves(c, half), Permutation(by_columns), *self.halves(c, half), rest]))

    def last_scale(self, channels: int, size: Size) -> Bijection:
        """Builds the last scale: couplings with checkerboard masks, inside a squeeze if both sides are even."""
        if size[0] % 2 == 0 and size[1] % 2 == 0:
            return Squeeze(from_data(self.halves(4 * channels, halved(size))))
        parts: list[Bijection] = []
        for i in range(self.layers):
            net = self.net(channels, 2 * channels, size)
            parts += [*self.norm(channels), CheckerboardCoupling(size, i % 2 == 1, net, self.cap)]
        return from_data(parts)

    def halves(self, channels: int, size: Size) -> list[Bijection]:
        """Builds couplings of alternating halves of an even number of channels."""
        parts: list[Bijection] = []
        for i in range(self.layers):
            net = self.net(channels // 2, channels, size)
            parts += [*self.norm(channels), HalfCoupling(channels, i % 2 == 1, net, self.cap)]
        return parts

    def net(self, n_in: int, n_out: int, size: Size) -> nn.Module:
        """Builds a conditioner for images of this size."""
        places = size if self.positional_bias else None
        return ResidualNet(n_in, self.hidden, n_out, self.activation, self.classes, places, self.batch_norm)
