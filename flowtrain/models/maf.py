"""Masked autoregressive flows with residual networks (Papamakarios et al. 2017; Nash and Durkan 2019), over vectors.

Example:
    >>> import torch
    >>> flow = maf(2, layers=2, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal, until it is trained
    -1.8379
"""

from collections.abc import Sequence
from math import ceil

import torch

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.elementwise import ScaleShift
from flowtrain.bijections.scale import ActNorm
from flowtrain.flow import Flow
from flowtrain.models.multiscale import from_data, labelled
from flowtrain.models.nsf import MIXINGS, columns, mixed, spline
from flowtrain.nn.conditioners import ACTIVATIONS
from flowtrain.nn.residual_mlp import MaskedMLP
from flowtrain.utils.arguments import flag, number, one_of, share, whole, widths

TRANSFORMS = ("affine", "spline")


def maf(
    event_shape: int | Sequence[int],
    *,
    layers: int = 5,
    hidden: Sequence[int] = (64,),
    transform: str = "affine",
    bins: int = 8,
    bound: float = 5.0,
    passes: int | None = None,
    activation: str = "relu",
    mixing: str = "alternate",
    cap: float = 2.0,
    input_bound: float | None = None,
    dropout: float = 0.0,
    conditional: bool = False,
    classes: int | None = None,
) -> Flow:
    """Autoregressive maps over vectors of length d >= 1.

    From data to base, a layer consists of an ActNorm, a mixing of the columns and an autoregressive map, see
    `Autoregressive`. log p(x) takes one pass through each conditioner, a sample `passes`.

    Args:
        event_shape: d or (d,).
        layers: how many autoregressive maps.
        hidden: of the conditioners, masked residual networks: the width of each residual block of two layers.
        transform: of each element: affine | spline.
        bins, bound: of splines, see `flowtrain.models.nsf`.
        passes: into how many groups the columns are split, each of which depends on the groups before it; at most d.
            None for d, fully autoregressive; 2 for couplings, in which the first half has parameters that do not depend
            on other columns.
        activation: of the conditioners; relu | tanh | swish.
        mixing: `alternate` reverses the order of the columns from layer to layer; `permutation` and `linear` as in
            `flowtrain.models.nsf`.
        cap: bound on the log-scale of each affine transform.
        input_bound: bound on what the conditioners see, see `Coupling`; None for no bound.
        dropout: the share of the conditioners' hidden units that training drops.
        conditional: p(x | label), the conditioners told of the label.
        classes: how many labels the data have; None for none.

    Raises:
        ConfigError: samples that are not vectors, data without labels, or a setting out of range.
    """
    d = columns("maf", event_shape)
    activation = one_of("model.activation", activation, ACTIVATIONS)
    given = labelled("maf", flag("model.conditional", conditional), classes)
    residual, drop = widths("model.hidden", hidden), share("model.dropout", dropout)
    limit = None if input_bound is None else number("model.input_bound", input_bound)
    largest, _ = number("model.cap", cap), spline(bins, bound)
    one_of("model.transform", transform, TRANSFORMS)
    one_of("model.mixing", mixing, MIXINGS)
    in_group = ceil(d / min(d, whole("model.passes", d if passes is None else passes)))
    groups = torch.arange(d, device="cpu") // in_group
    parts: list[Bijection] = []
    for i in range(whole("model.layers", layers)):
        order = groups.flip(0) if mixing == "alternate" and i % 2 == 1 else groups
        chosen = ScaleShift(largest) if transform == "affine" else spline(bins, bound)
        net = MaskedMLP(order, residual, order.repeat(chosen.size), activation, given, drop)
        parts += [*mixed(mixing, d), Autoregressive(order, net, input_bound=limit, transform=chosen)]
    return Flow((d,), from_data([ActNorm(d), *parts]), given)
