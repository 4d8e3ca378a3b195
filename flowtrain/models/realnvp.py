"""RealNVP for vectors: a stack of affine couplings (Dinh et al. 2017)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.coupling import AffineCoupling
from flowtrain.bijections.permutation import Permutation
from flowtrain.bijections.scale import ActNorm
from flowtrain.checks import flag, number, one_of, whole, widths
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "swish": nn.SiLU}
MIXINGS = ("alternate", "permutation")


def realnvp(
    event_shape: tuple[int, ...],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    mixing: str = "alternate",
    actnorm: bool = True,
    cap: float = 2.0,
) -> Flow:
    """A stack of `layers` affine couplings over vectors of length d >= 2.

    Args:
        event_shape: (d,).
        hidden, activation: of the conditioner networks; relu | tanh | swish.
        mixing: `alternate` swaps the halves (even and odd dimensions) from layer to layer; `permutation` puts a
            fixed random permutation before each layer, drawn at construction and saved with the weights.
        actnorm: an ActNorm after each coupling.
        cap: bound on each coupling's log-scale.

    Raises:
        ConfigError: d < 2, images, or a setting out of range.
    """
    actnorm = flag("model.actnorm", actnorm)
    if len(event_shape) != 1 or event_shape[0] < 2:
        raise ConfigError(
            f"model=realnvp needs vectors of at least 2 columns, one half conditioning the other; the data has samples "
            f"of shape {event_shape}. For one column use model=ffjord or model=affine"
        )
    whole("model.layers", layers)
    number("model.cap", cap)
    hidden = widths("model.hidden", hidden, least_layers=0)
    one_of("model.mixing", mixing, MIXINGS)
    one_of("model.activation", activation, ACTIVATIONS)
    d = event_shape[0]
    even = torch.arange(d) % 2 == 0
    bijections: list[Bijection] = []
    for i in range(layers):
        mask = even if i % 2 == 0 else ~even
        if mixing == "permutation":
            mask = even
            bijections.append(Permutation(torch.randperm(d)))
        bijections.append(coupling(mask, hidden, ACTIVATIONS[activation], cap))
        if actnorm:
            bijections.append(ActNorm(d))
    return Flow(event_shape, Chain(bijections))


def coupling(mask: Tensor, hidden: Sequence[int], activation: type[nn.Module], cap: float) -> AffineCoupling:
    """A coupling with an MLP conditioner that starts as the identity."""
    n_kept = int(mask.sum())
    sizes = [n_kept, *hidden]
    body = [layer for n_in, n_out in pairwise(sizes) for layer in (nn.Linear(n_in, n_out), activation())]
    head = nn.Linear(sizes[-1], 2 * (len(mask) - n_kept))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return AffineCoupling(mask, nn.Sequential(*body, head), cap)
