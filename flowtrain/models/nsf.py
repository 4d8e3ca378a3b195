"""Neural spline flows: couplings by rational-quadratic splines, over vectors (Durkan et al. 2019).

Example:
    >>> import torch
    >>> flow = nsf(2, layers=2, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal, until it is trained
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
from flowtrain.models.multiscale import from_data, labelled
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
) -> Flow:
    """Spline couplings over vectors of length d >= 1. A single column has splines without other columns to depend on.

    From data to base, a layer consists of an ActNorm, a mixing of the columns and a coupling, see `Spline` and
    `Coupling`.

    Args:
        event_shape: d or (d,).
        layers: the number of couplings.
        hidden: the width of each residual block of two layers in the conditioners.
        bins: the number of bins of each spline.
        bound: B; outside of [-B, B] a spline is the identity. ActNorm brings the data to zero mean and unit variance.
        activation: relu | tanh | swish, in the conditioners.
        mixing: `linear`, an invertible matrix before each coupling (LU layers); `permutation`, a fixed random one,
            drawn at construction and saved with the weights; `alternate`, the halves swap from layer to layer.
        input_bound: a bound on the inputs of the conditioners, see `Coupling`. None: no bound.
        dropout: the dropout probability of the conditioners' hidden units.
        conditional: whether the flow is p(x | label); the conditioners then take the label as an input.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.

    Raises:
        ConfigError: samples that are not vectors, data without labels, or a setting out of range.
    """
    d = columns("nsf", event_shape)
    activation = one_of("model.activation", activation, ACTIVATIONS)
    given = labelled("nsf", flag("model.conditional", conditional), classes)
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
    return Flow((d,), from_data([ActNorm(d), *parts]), given)


def mixed(mixing: str, d: int) -> list[Bijection]:
    """The map before a layer that mixes or permutes d columns."""
    if mixing == "alternate" or d == 1:
        return []
    # a rotation hides what is aligned with the columns, such as rounded values and atoms
    return [InvertibleLinear(d, "permutation") if mixing == "linear" else Permutation(torch.randperm(d))]


def columns(name: str, event_shape: int | Sequence[int]) -> int:
    """d of vectors.

    Raises:
        ConfigError: samples of another shape.
    """
    event_shape = shape_of(event_shape)
    if len(event_shape) != 1:
        raise ConfigError(
            f"model={name} needs vectors, such as the rows of a table; the data has samples of shape {event_shape}: "
            "use model=realnvp, model=glow or model=ffjord"
        )
    return event_shape[0]


def spline(bins: int, bound: float) -> Spline:
    """A spline by the settings of a model."""
    return Spline(whole("model.bins", bins, least=2), number("model.bound", bound))
