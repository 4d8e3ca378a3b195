"""Velocity fields v(t, x): the base class, timed layers, and activations with their derivatives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.utils.arguments import one_of
from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.recorded import Recorded


class Activation(ABC):
    """y = f(x), elementwise, for any shape."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """f(x), differentiable by autograd."""

    def gain(self, device: torch.device) -> float:
        """`replace` takes gain x in place of x: a product makes it for nothing."""
        return 1.0

    @abstractmethod
    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x / gain), what the derivatives are computed from), without a graph; x may be overwritten."""

    @abstractmethod
    def slope(self, kept: Tensor) -> Tensor:
        """f'(x)."""

    @abstractmethod
    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        """f''(x)."""

    def vjp(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_slope: Tensor) -> Tensor:
        """at_value f'(x) + at_slope f''(x), overwriting at_value."""
        return at_value.mul_(slope).addcmul_(at_slope, self.curvature(kept, slope))

    @abstractmethod
    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x), f'(x)), differentiable by autograd."""


@final
class Tanh(Activation):
    """tanh(x), with f' = 1 - f^2 and f'' = -2 f f'."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def gain(self, device: torch.device) -> float:
        # on a CPU torch's sigmoid is many times as fast as its tanh; tanh x = 2 sigmoid(2x) - 1 to 2e-7 in float32
        return 2.0 if device.type == "cpu" else 1.0

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.add(x.new_tensor(-1), x.sigmoid_(), alpha=2, out=x) if x.device.type == "cpu" else x.tanh_()
        return y, y

    def slope(self, kept: Tensor) -> Tensor:
        return torch.addcmul(kept.new_ones(()), kept, kept, value=-1)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        return (kept * slope).mul_(-2)

    def vjp(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_slope: Tensor) -> Tensor:
        # f'' = -2 f f'
        return at_value.addcmul_(kept, at_slope, value=-2).mul_(slope)

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x)
        return y, 1 - y * y


@final
class Softplus(Activation):
    """log(1 + exp(x)), with f' = sigmoid(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(x), x

    def slope(self, kept: Tensor) -> Tensor:
        return torch.sigmoid(kept)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        return slope - slope * slope

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(x), torch.sigmoid(x)


@final
class Swish(Activation):
    """x sigmoid(x), also known as SiLU (Ramachandran et al. 2017, Searching for activation functions)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(x), x

    def slope(self, kept: Tensor) -> Tensor:
        gate = torch.sigmoid(kept)
        return gate + kept * gate * (1 - gate)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        gate = torch.sigmoid(kept)
        return gate * (1 - gate) * (2 + kept * (1 - 2 * gate))

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        y = x * gate
        return y, gate + y * (1 - gate)


ACTIVATIONS: dict[str, Activation] = {"tanh": Tanh(), "softplus": Softplus(), "swish": Swish()}


class Field(Recorded, nn.Module, ABC):
    """A velocity field v(t, x) with Jacobian-vector products.

    Shapes: x is (..., *event), with `event_dims` dimensions in an event; t is a scalar or broadcasts against the
    others; v has the shape of x. Any other module with `forward(t, x)` on x (B, *event) and t scalar or (B,) works
    as a field too (`field_jvp` falls back on forward-mode autodiff); this class only makes the divergence fast.

    Attributes:
        event_dims: 1 for vectors (d,), 3 for images (C, H, W).

    Example:
        >>> class Rotation(Field):
        ...     def forward(self, t, x):
        ...         return torch.stack([-x[..., 1], x[..., 0]], -1)
        ...
        ...     def jvp(self, t, x, tangents):
        ...         return self(t, x), self(t, tangents)  # linear in x
        >>> v, je = field_jvp(Rotation(), torch.tensor(0.0), torch.tensor([[1.0, 0.0]]), torch.eye(2).unsqueeze(1))
        >>> v.tolist(), je.squeeze(1).tolist()
        ([[-0.0, 1.0]], [[-0.0, 1.0], [-1.0, 0.0]])
    """

    event_dims: int = 1

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """v(t, x)."""

    @abstractmethod
    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(v, J e) for J = dv/dx and each tangent e; tangents (k, ...) broadcast against (k, *x.shape)."""

    def recorder(self) -> Any:
        """A `flowtrain.ode.tape.Recorder` faster than autograd's; None where the field has none."""
        return None


def field_jvp(field: nn.Module, t: Tensor, x: Tensor, tangents: Tensor, event_dims: int = 1) -> tuple[Tensor, Tensor]:
    """(v, J e): the field's own `jvp` where it has one, else `torch.func.jvp` over rows of `event_dims` dimensions.

    Shapes: x (..., *event), t broadcasting against x.shape[:-event_dims], tangents (k, ...) broadcasting against
    (k, *x.shape); J e comes back as (k, *x.shape). A `Field` knows its own `event_dims`, whatever is given here.
    """
    if isinstance(field, Field):
        return field.jvp(t, x, tangents)
    outer = x.dim() - event_dims
    rows = x.reshape(-1, *x.shape[outer:])
    row_times = t.expand(x.shape[:outer]).reshape(-1)
    directions = tangents.expand(len(tangents), *x.shape).reshape(-1, *rows.shape)

    def jvp(e: Tensor) -> tuple[Tensor, Tensor]:
        v, je = torch.func.jvp(lambda y: field(row_times, y), (rows,), (e,))  # type: ignore[misc]
        return v, je

    v, je = torch.func.vmap(jvp, out_dims=(None, 0))(directions)  # type: ignore[arg-type]
    return v.reshape(x.shape), je.reshape(-1, *x.shape)


class TimedLayer(Recorded, nn.Module, ABC):
    """A map of x (..., *event) that is affine at any one time t, which broadcasts against the other dimensions of x."""

    def zero(self) -> None:
        """Sets y to zero for every x and t."""
        for name in ("linear", "conv", "shift"):
            for p in getattr(self, name, nn.Module()).parameters():
                nn.init.zeros_(p)

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """y(t, x)."""

    @abstractmethod
    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(y, (dy/dx) e) for each tangent e, from one modulation."""


class TimeEmbedded(TimedLayer):
    """A layer whose gate and offset are 1 + A e(t) and U e(t), e(t) = swish(E [sin 2 pi k t, cos 2 pi k t]) learned,
    k = 1/4 .. 2; they begin at 1 and 0.
    """

    def embed_time(self, n_out: int, n_embedding: int) -> None:
        """Makes E, A and U; once, in the constructor."""
        self.register_buffer("frequencies", 2 * math.pi * torch.tensor([0.25, 0.5, 1.0, 2.0]))
        self.embed = nn.Linear(8, n_embedding)
        self.modulate = nn.Linear(n_embedding, 2 * n_out)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    frequencies: Tensor

    def gate_and_offset(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, offset), each (*t.shape, n_out)."""
        angles = t.unsqueeze(-1) * self.frequencies
        gate, offset = self.modulate(F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], -1)))).chunk(2, -1)
        return 1 + gate, offset


Layer = TypeVar("Layer", bound=TimedLayer)


class LayeredField(Field, Generic[Layer]):
    """v(t, x) = layer_L(t, f(.. f(layer_1(t, x) + E[label]))), E one vector for each class where there are any.

    The last layer starts at zero, so an untrained flow is the identity and its first solve is cheap.

    Args:
        width: of the first hidden layer.
        classes: how many labels there are; None for a field that takes none.

    Raises:
        ConfigError: an unknown activation.
    """

    def __init__(self, layers: Sequence[Layer], activation: str, width: int, classes: int | None) -> None:
        super().__init__()
        self.embedding = None if classes is None else nn.Parameter(torch.zeros(classes, width))
        self.activation = ACTIVATIONS[one_of("model.activation", activation, ACTIVATIONS, "a field must be smooth")]
        *body, head = layers
        head.zero()
        self.body = nn.ModuleList(body)
        self.head = head

    @property
    def layers(self) -> list[Layer]:
        """All of them, from x to v."""
        return [*self.body, self.head]

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """v; `shift`, of labels, broadcasts against what the first layer gives."""
        first, *body = self.body
        x = first(t, x) if shift is None else first(t, x) + shift
        for layer in body:
            x = layer(t, self.activation(x))
        v: Tensor = self.head(t, self.activation(x))
        return v

    @abstractmethod
    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(v, J e) as of any field, `shift` as in `forward`."""

    def given(self, label: Tensor) -> "Given":
        """The field of labels (B,).

        Raises:
            ConfigError: a field without classes.
        """
        if self.embedding is None:
            raise ConfigError(f"{type(self).__name__} was built without classes: give it classes=K for p(x | label)")
        return Given(self, image_of(F.embedding(label, self.embedding), self.event_dims))

    def by_hand(self, t: Tensor, x: Tensor, tangents: Tensor) -> bool:
        """Whether the kernels serve: one time for all rows of a node, where the layers are plain ones."""
        one_time = x.dim() > self.event_dims and x.numel() > 0 and (t.dim() == 0 or t.shape[-1] == 1)
        transformed = torch.compiler.is_compiling() or transforms_active()
        return one_time and not tangents.requires_grad and not transformed

    def jvp_rows(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`jvp` by autograd's means, for a time of its own for each row."""
        *body, head = self.layers
        for layer in body:
            x, tangents = layer.jvp(t, x, tangents)
            if shift is not None:
                x, shift = x + shift, None
            x, slope = self.activation.value_and_slope(x)
            tangents = tangents * slope
        v, je = head.jvp(t, x, tangents)
        # a tangent that broadcasts over rows stays unexpanded up to the first slope; one linear layer has none
        return v, je.expand(len(tangents), *v.shape)


class Given(Field):
    """A layered field at the labels of a batch: v(t, x | label)."""

    def __init__(self, field: LayeredField[Any], shift: Tensor) -> None:
        super().__init__()
        self.field, self.shift = field, shift
        self.event_dims = field.event_dims

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v: Tensor = self.field(t, x, self.shift)
        return v

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        return self.field.jvp(t, x, tangents, self.shift)


def image_of(v: Tensor, event_dims: int) -> Tensor:
    """v (..., C) in the shape that broadcasts against events of that many dimensions: (..., C, 1, 1) for images."""
    return v.view(*v.shape, *(1,) * (event_dims - 1))


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
    at_a = activation.vjp(layer.kept, layer.slope, at_h, at_slope)
    return at_a, at_t.mul_(layer.slope.unsqueeze(layer.tangents))
