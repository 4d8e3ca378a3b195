"""Values and tangents through one activation, forward and back, for the hand-written kernels.

h = f(a), and t = f'(a) u for the tangents u before it; the cotangents are f'(a) at_h + f''(a) sum_j u_j at_t_j of a and
f'(a) at_t of u, the sum over the tangents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowtrain.fields.activations import Activation


@dataclass(frozen=True)
class Hidden:
    """One hidden layer: h = f(a), what its derivatives need, f'(a), the tangents before and after it.

    Attributes:
        tangents: the dimension of u and t along which tangents are counted, absent from the others.
    """

    h: Tensor
    kept: Tensor
    slope: Tensor
    u: Tensor
    t: Tensor
    tangents: int

    def tensors(self) -> tuple[Tensor, ...]:
        """What `unpack` takes, in the order of the fields."""
        return self.h, self.kept, self.slope, self.u, self.t


def unpack(tensors: Sequence[Tensor], tangents: int) -> list[Hidden]:
    """The layers whose `tensors` follow one another."""
    each = zip(*(tensors[i::5] for i in range(5)), strict=True)
    return [Hidden(h, kept, slope, u, t, tangents) for h, kept, slope, u, t in each]


def through(activation: Activation, a: Tensor, u: Tensor, tangents: int) -> Hidden:
    """The layer's h and t; `a` comes times the activation's gain and may be overwritten."""
    h, kept = activation.replace(a)
    slope = activation.slope(kept)
    return Hidden(h, kept, slope, u, u * slope.unsqueeze(tangents), tangents)


def back_through(activation: Activation, layer: Hidden, at_h: Tensor, at_t: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of a and u from those of h and t, overwriting them."""
    first, *rest = zip(at_t.unbind(layer.tangents), layer.u.unbind(layer.tangents), strict=True)
    # summed one by one: all the products at once would be as large as the tangents
    at_slope = first[0] * first[1]
    for cotangent, u in rest:
        at_slope.addcmul_(cotangent, u)
    at_a = activation.pull(layer.kept, layer.slope, at_h, at_slope)
    return at_a, at_t.mul_(layer.slope.unsqueeze(layer.tangents))
