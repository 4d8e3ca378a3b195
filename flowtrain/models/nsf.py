"""Neural spline flows of vectors: couplings with rational-quadratic splines (Durkan et al. 2019).

Example:
    >>> import torch
    >>> flow = nsf(2, layers=2, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal before training
    -1.8379
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowtrain.bases import NormalUniform
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.circular import CircularSpline, WrapAngles, by_kind
from flowtrain.bijections.columns import OnColumns
from flowtrain.bijections.coupling import HalfCoupling, IndexCoupling, coupling_order
from flowtrain.bijections.linear import InvertibleLinear, Permutation
from flowtrain.bijections.scale import ActNorm
from flowtrain.bijections.spline import Spline
from flowtrain.bijections.table_chain import TableChain
from flowtrain.flow import Flow
from flowtrain.models.multiscale import base, conditioned, from_data
from flowtrain.nn.conditioners import ACTIVATIONS
from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP
from flowtrain.utils.arguments import flag, number, one_of, shape_of, share, whole, widths
from flowtrain.utils.circle import circular_indices
from flowtrain.utils.errors import ConfigError

MIXINGS = ("linear", "permutation", "alternate")


def nsf(
    event_shape: int | Sequence[int],
    *,
    layers: int = 10,
    hidden: Sequence[int] = (64,),
    bins: int = 16,
    bound: float = 5.0,
    activation: str = "relu",
    mixing: str = "linear",
    input_bound: float | None = None,
    dropout: float = 0.0,
    df: float | None = None,
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
    circular: Sequence[int] = (),
) -> Flow:
    """Neural spline flow of vectors (d,): a stack of spline couplings.

    From data to base, a layer consists of a mixing of the columns and a coupling, see `Spline` and `Coupling`. There is
    one ActNorm at the data end. For d = 1, the parameters of the splines depend on no column.

    Args:
        event_shape: d or (d,).
        layers: the number of couplings.
        hidden: the width of each residual block of two layers in the conditioners.
        bins: the number of bins of each spline.
        bound: B. Outside of [-B, B] a spline is the identity. ActNorm gives the data zero mean and unit variance.
        activation: relu | tanh | swish, in the conditioners.
        mixing: `linear`: an invertible matrix before each coupling (LU layers), which is initially a permutation.
            `permutation`: a fixed permutation before each coupling, drawn at construction and saved with the weights.
            With both, the halves are random, see `coupling_order`. `alternate`: the two halves swap from layer to
            layer.
        input_bound: a bound on the inputs of the conditioners, see `Coupling`. None: no bound.
        dropout: the dropout probability in the conditioners.
        df: the initial degrees of freedom of a base of independent Student t distributions. Training fits them for
            each column. None: a standard normal base.
        conditional: whether the flow is p(x | label). The label is then an input of the conditioners.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.
        circular: the indices of columns that are angles in radians. Each coupling has circular splines for them, see
            `CircularSpline`, and its conditioner receives their cosines and sines. Their base is uniform on [-pi, pi).
            Every second coupling transforms the columns that the coupling before it keeps. These halves are random
            unless `mixing` is `alternate`. The invertible matrices mix the other columns only.

    Raises:
        ConfigError: samples that are not vectors, `conditional` without `classes` or together with `context`, `df`
            with circular columns, or a setting out of range.
    """
    d = columns("nsf", event_shape)
    angles = circular_indices(circular, d, "model.circular")
    activation = one_of("model.activation", activation, ACTIVATIONS)
    given, kind = conditioned("nsf", flag("model.conditional", conditional), classes, context)
    residual, drop = widths("model.hidden", hidden), share("model.dropout", dropout)
    limit = None if input_bound is None else number("model.input_bound", input_bound)
    one_of("model.mixing", mixing, MIXINGS)
    m = len(angles)
    half = (d + 1) // 2
    mask = torch.ones(d, dtype=torch.bool, device="cpu")
    parts: list[Bijection] = []
    for i in range(whole("model.layers", layers)):
        transform = spline(bins, bound)
        if d == 1:
            alone = by_kind(d - m, m, transform, CircularSpline(bins))
            groups = torch.zeros(1, dtype=torch.int64, device="cpu")
            masked = MaskedMLP(groups.repeat(1 + m), residual, groups.repeat(alone.size), activation, given, drop)
            parts.append(Autoregressive(groups, masked, input_bound=limit, transform=alone, n_circular=m))
        elif m:
            # the complement, so that two couplings transform all columns
            mask = ~mask if i % 2 == 1 else kept_half(d - m, m, mixing)
            kept, changed = int(mask.sum()), int((~mask).sum())
            kept_angles, changed_angles = int(mask[d - m :].sum()), int((~mask)[d - m :].sum())
            f = by_kind(changed - changed_angles, changed_angles, transform, CircularSpline(bins))
            net = ResidualMLP(kept + kept_angles, residual, len(f.owners(changed)), activation, given, drop)
            parts += mixed_real(mixing, d - m)
            parts.append(IndexCoupling(mask, net, input_bound=limit, transform=f, n_circular=m))
        else:
            parts += mixed(mixing, coupling_order(i, d, d - half, shift=d - half))
            swap = mixing == "alternate" and i % 2 == 1
            kept = d - half if swap else half
            net = ResidualMLP(kept, residual, transform.size * (d - kept), activation, given, drop)
            parts.append(HalfCoupling(d, swap, net, input_bound=limit, transform=transform))
    return assembled(d, angles, parts, kind, df)


def mixed(mixing: str, order: Tensor) -> list[Bijection]:
    """Returns a list with the map that mixes or permutes the columns before a layer, or an empty list.

    Args:
        mixing: see `nsf`.
        order: the permutation (d,), or the initial permutation of the matrix.
    """
    if mixing == "alternate" or len(order) == 1:
        return []
    # a rotation would mix columns that are better modelled separately, such as columns of rounded values
    return [InvertibleLinear(len(order), order) if mixing == "linear" else Permutation(order)]


def mixed_real(mixing: str, n: int) -> list[Bijection]:
    """Returns a list with an invertible matrix for the first n columns if `mixing` is `linear`, else an empty list."""
    if mixing != "linear" or n < 2:
        return []
    return [OnColumns(InvertibleLinear(n, "permutation"), list(range(n)))]


def kept_half(n: int, m: int, mixing: str) -> Tensor:
    """Returns the mask, bool (n + m,), of the kept half of n real and m circular columns. Each kind is halved."""
    fixed = mixing == "alternate"
    mask = torch.zeros(n + m, dtype=torch.bool, device="cpu")
    for start, size, kept in ((0, n, (n + 1) // 2), (n, m, m // 2)):
        order = torch.arange(size, device="cpu") if fixed else torch.randperm(size, device="cpu")
        mask[start + order[:kept]] = True
    return mask


def assembled(
    d: int, angles: Sequence[int], layers: Sequence[Bijection], kind: Mapping[str, Any], df: float | None
) -> Flow:
    """Builds the flow from its layers, listed from data to base.

    If there are circular columns, the layers receive the real columns first and the circular columns last.

    Args:
        d: the number of columns.
        angles: the indices of the circular columns.
        layers: the layers.
        kind: the arguments of `Flow` for a conditional flow, see `conditioned`.
        df: see `nsf`.

    Raises:
        ConfigError: df with circular columns.
    """
    if not angles:
        return Flow(base((d,), df), TableChain([*reversed(layers), ActNorm(d)]), **kind)
    if df is not None:
        raise ConfigError(
            f"model.df={df}: a flow with circular columns has a normal base for the other columns; omit model.df"
        )
    real = [i for i in range(d) if i not in angles]
    order = torch.tensor([*real, *angles], device="cpu")
    norm = [OnColumns(ActNorm(len(real)), list(range(len(real))))] if real else []
    inside = [*norm, *layers]
    if order.tolist() != list(range(d)):
        inside = [Permutation(order.argsort()), *inside, Permutation(order)]
    return Flow(NormalUniform(d, angles), from_data([WrapAngles(d, angles), *inside]), **kind)


def columns(name: str, event_shape: int | Sequence[int]) -> int:
    """Returns the length d of vectors.

    Raises:
        ConfigError: samples that are not vectors.
    """
    event_shape = shape_of(event_shape)
    if len(event_shape) != 1:
        raise ConfigError(
            f"model={name} needs vectors, such as the rows of a table, but the samples have shape {event_shape}: "
            "use model=realnvp, model=glow or model=ffjord"
        )
    return event_shape[0]


def spline(bins: int, bound: float) -> Spline:
    """Builds a spline and checks its settings."""
    return Spline(whole("model.bins", bins, least=2), number("model.bound", bound))
