"""Neural spline flows of vectors: couplings with rational-quadratic splines (Durkan et al. 2019).

Example:
    >>> import torch
    >>> flow = nsf(2, layers=2, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal before training
    -1.8379
"""

from collections.abc import Sequence

import torch

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.coupling import HalfCoupling
from flowtrain.bijections.linear import InvertibleLinear, Permutation
from flowtrain.bijections.scale import ActNorm
from flowtrain.bijections.spline import Spline
from flowtrain.flow import Flow
from flowtrain.models.multiscale import conditioned, from_data
from flowtrain.nn.conditioners import ACTIVATIONS
from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP
from flowtrain.utils.arguments import flag, number, one_of, shape_of, share, whole, widths
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
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
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
        mixing: `linear`: an invertible matrix before each coupling (LU layers). `permutation`: a fixed random
            permutation before each coupling, drawn at construction and saved with the weights. `alternate`: the two
            halves swap from layer to layer.
        input_bound: a bound on the inputs of the conditioners, see `Coupling`. None: no bound.
        dropout: the dropout probability in the conditioners.
        conditional: whether the flow is p(x | label). The label is then an input of the conditioners.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.

    Raises:
        ConfigError: samples that are not vectors, `conditional` without `classes` or together with `context`, or a
            setting out of range.
    """
    d = columns("nsf", event_shape)
    activation = one_of("model.activation", activation, ACTIVATIONS)
    given, kind = conditioned("nsf", flag("model.conditional", conditional), classes, context)
    residual, drop = widths("model.hidden", hidden), share("model.dropout", dropout)
    limit = None if input_bound is None else number("model.input_bound", input_bound)
    one_of("model.mixing", mixing, MIXINGS)
    half = (d + 1) // 2
    parts: list[Bijection] = []
    for i in range(whole("model.layers", layers)):
        transform = spline(bins, bound)
        parts += mixed(mixing, d)
        if d == 1:
            groups = torch.zeros(1, dtype=torch.int64, device="cpu")
            alone = MaskedMLP(groups, residual, groups.repeat(transform.size), activation, given, drop)
            parts.append(Autoregressive(groups, alone, input_bound=limit, transform=transform))
            continue
        swap = mixing == "alternate" and i % 2 == 1
        kept = d - half if swap else half
        net = ResidualMLP(kept, residual, transform.size * (d - kept), activation, given, drop)
        parts.append(HalfCoupling(d, swap, net, input_bound=limit, transform=transform))
    return Flow((d,), from_data([ActNorm(d), *parts]), **kind)


def mixed(mixing: str, d: int) -> list[Bijection]:
    """Returns the map that mixes or permutes d columns before a layer, if there is one."""
    if mixing == "alternate" or d == 1:
        return []
    # a rotation would mix columns that are better modelled separately, such as columns of rounded values
    return [InvertibleLinear(d, "permutation") if mixing == "linear" else Permutation(torch.randperm(d))]


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
