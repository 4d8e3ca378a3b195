"""Masked autoregressive flows of vectors with residual networks (Papamakarios et al. 2017; Nash and Durkan 2019).

Example:
    >>> import torch
    >>> flow = maf(2, layers=2, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal before training
    -1.8379
"""

from collections.abc import Sequence
from math import ceil

import torch

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.circular import CircularSpline, by_kind
from flowtrain.bijections.elementwise import ScaleShift
from flowtrain.bijections.linear import Permutation
from flowtrain.flow import Flow
from flowtrain.models.multiscale import conditioned
from flowtrain.models.nsf import MIXINGS, assembled, columns, mixed, mixed_real, spline
from flowtrain.nn.conditioners import ACTIVATIONS
from flowtrain.nn.residual_mlp import MaskedMLP
from flowtrain.utils.arguments import flag, number, one_of, share, whole, widths
from flowtrain.utils.circle import circular_indices

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
    df: float | None = None,
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
    circular: Sequence[int] = (),
) -> Flow:
    """Masked autoregressive flow of vectors (d,), with affine maps or splines.

    From data to base, a layer consists of a mixing of the columns and an autoregressive map, see `Autoregressive`.
    There is one ActNorm at the data end. log p(x) needs one evaluation of each conditioner. A sample needs `passes`
    evaluations.

    Args:
        event_shape: d or (d,).
        layers: the number of autoregressive maps.
        hidden: the width of each residual block of two layers in the conditioners, which are masked residual networks.
        transform: affine | spline, the elementwise map.
        bins, bound: settings of the splines, see `flowtrain.models.nsf`.
        passes: the number of groups of columns, at most d. Each group depends on the groups before it. None: d groups.
            With 2 groups each map is a coupling that also maps its first half, with parameters that depend on no
            column.
        activation: relu | tanh | swish, in the conditioners.
        mixing: `alternate` reverses the order of the columns from layer to layer. `permutation` and `linear` are the
            same as in `flowtrain.models.nsf`.
        cap: a bound on the log-scale of each affine map.
        input_bound: a bound on the inputs of the conditioners, see `Coupling`. None: no bound.
        dropout: the dropout probability in the conditioners.
        df: the initial degrees of freedom of a base of independent Student t distributions. Training fits them for
            each column. None: a standard normal base.
        conditional: whether the flow is p(x | label). The label is then an input of the conditioners.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.
        circular: the indices of columns that are angles in radians. Their map is a `CircularSpline` with `bins` bins
            for both values of `transform`, and the conditioners receive their cosines and sines. Their base is uniform
            on [-pi, pi). The layers order the real columns before the circular columns, and every second layer
            reverses this order. `permutation` and `linear` permute the circular columns among themselves, and mix the
            real columns among themselves.

    Raises:
        ConfigError: samples that are not vectors, `conditional` without `classes` or together with `context`, `df`
            with circular columns, or a setting out of range.
    """
    d = columns("maf", event_shape)
    angles = circular_indices(circular, d, "model.circular")
    activation = one_of("model.activation", activation, ACTIVATIONS)
    given, kind = conditioned("maf", flag("model.conditional", conditional), classes, context)
    residual, drop = widths("model.hidden", hidden), share("model.dropout", dropout)
    limit = None if input_bound is None else number("model.input_bound", input_bound)
    largest, _ = number("model.cap", cap), spline(bins, bound)
    one_of("model.transform", transform, TRANSFORMS)
    one_of("model.mixing", mixing, MIXINGS)
    in_group = ceil(d / min(d, whole("model.passes", d if passes is None else passes)))
    groups = torch.arange(d, device="cpu") // in_group
    m = len(angles)
    parts: list[Bijection] = []
    for i in range(whole("model.layers", layers)):
        order = groups.flip(0) if (mixing == "alternate" or m) and i % 2 == 1 else groups
        chosen = ScaleShift(largest) if transform == "affine" else spline(bins, bound)
        f = by_kind(d - m, m, chosen, CircularSpline(bins))
        inputs = torch.cat([order, order[d - m :]])
        net = MaskedMLP(inputs, residual, order[f.owners(d)], activation, given, drop)
        parts += [*mixed_real(mixing, d - m), *permuted(mixing, d - m, m)] if m else mixed(mixing, torch.randperm(d))
        parts.append(Autoregressive(order, net, input_bound=limit, transform=f, n_circular=m))
    return assembled(d, angles, parts, kind, df)


def permuted(mixing: str, n: int, m: int) -> list[Bijection]:
    """Returns a list with a random permutation that maps n real columns to real columns, and m angles to angles.

    With the mixing `linear`, only the circular columns are permuted. With `alternate`, the list is empty.
    """
    if mixing == "alternate" or max(m, n if mixing == "permutation" else 0) < 2:
        return []
    of_real = torch.randperm(n) if mixing == "permutation" else torch.arange(n)
    return [Permutation(torch.cat([of_real, n + torch.randperm(m)]))]
