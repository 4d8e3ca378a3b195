"""Velocity fields v(t, x): the base class, timed layers, and activations with their derivatives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.nn.column_networks import is_hooked
from flowtrain.nn.conditioners import embedded
from flowtrain.utils.arguments import one_of
from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.recorded import Recorded


class Activation(ABC):
    """An elementwise function y = f(x) with its derivatives."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Returns f(x), differentiable by autograd."""

    def gain(self, device: torch.device) -> float:
        """Returns the factor by which x is multiplied before `replace`.

        The matrix product that computes x can include this factor.
        """
        return 1.0

    @abstractmethod
    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(x / gain), and a tensor `kept` for the derivatives, without a graph. x may be overwritten."""

    def overwrite(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(x) and `kept`, see `replace`, for x without the gain. x may be overwritten."""
        gain = self.gain(x.device)
        return self.replace(x if gain == 1 else x.mul_(gain))

    @abstractmethod
    def slope(self, kept: Tensor) -> Tensor:
        """Returns f'(x), as a new tensor."""

    def times_slope_(self, kept: Tensor, y: Tensor) -> Tensor:
        """Returns y f'(x), and overwrites y."""
        return y.mul_(self.slope(kept))

    @abstractmethod
    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        """Returns f''(x)."""

    def vjp(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_slope: Tensor) -> Tensor:
        """Returns at_value f'(x) + at_slope f''(x), and overwrites at_value."""
        return at_value.mul_(slope).addcmul_(at_slope, self.curvature(kept, slope))

    # whether f'' / f' is finite for every x, so that `vjp_of_log_slope` can be used
    has_log_slope = False

    def vjp_of_log_slope(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_log_slope: Tensor) -> Tensor:
        """Returns at_value f'(x) + at_log_slope f''(x) / f'(x), and overwrites at_value.

        `at_log_slope` is the cotangent of log f'(x). For t = f'(x) u, it is the product of t and the cotangent of t.
        """
        raise NotImplementedError

    @abstractmethod
    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(x) and f'(x), differentiable by autograd."""


# up to this number of elements, torch.tanh is as fast as the formula 2 sigmoid(2 x) - 1
FEW = 512


@final
class Tanh(Activation):
    """tanh(x), with f' = 1 - f^2 and f'' = -2 f f'."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def gain(self, device: torch.device) -> float:
        # on a CPU, torch.sigmoid is many times faster than torch.tanh. The formula tanh x = 2 sigmoid(2x) - 1 has an
        # error of 2e-7 in float32
        return 2.0 if device.type == "cpu" else 1.0

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.add(constant(-1.0, x), x.sigmoid_(), alpha=2, out=x) if x.device.type == "cpu" else x.tanh_()
        return y, y

    def overwrite(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.numel() > FEW:
            return super().overwrite(x)
        y = x.tanh_()
        return y, y

    def slope(self, kept: Tensor) -> Tensor:
        return torch.addcmul(constant(1.0, kept), kept, kept, value=-1)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        return (kept * slope).mul_(-2)

    def vjp(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_slope: Tensor) -> Tensor:
        # f'' = -2 f f'
        return at_value.addcmul_(kept, at_slope, value=-2).mul_(slope)

    has_log_slope = True

    def vjp_of_log_slope(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_log_slope: Tensor) -> Tensor:
        return at_value.mul_(slope).addcmul_(kept, at_log_slope, value=-2)

    def times_slope_(self, kept: Tensor, y: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.tanh_backward.grad_input(y, kept, grad_input=y)
        return found

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


ON_CPU = {value: torch.tensor(value, device="cpu") for value in (-1.0, 1.0)}


def constant(value: float, like: Tensor) -> Tensor:
    """Returns a value as a tensor without dimensions, for an operation with `like`."""
    # on the CPU, the dtype of a tensor without dimensions has no effect on the result
    return ON_CPU[value] if like.device.type == "cpu" else like.new_full((), value)


ACTIVATIONS: dict[str, Activation] = {"tanh": Tanh(), "softplus": Softplus(), "swish": Swish()}


class Field(Recorded, nn.Module, ABC):
    """A velocity field v(t, x) with Jacobian-vector products.

    Shapes: x is (..., *event), with `event_dims` dimensions in an event. t is a scalar or broadcasts against the other
    dimensions. v has the shape of x.

    A velocity field need not be a `Field`. It can be any module with `forward(t, x)` for x (B, *event) and t scalar or
    (B,). For such a module `field_jvp` uses forward-mode automatic differentiation, which makes the divergence slower.

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
        """Returns v(t, x)."""

    @abstractmethod
    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns v and J e, J = dv/dx, for each tangent e. tangents (k, ...) broadcast against (k, *x.shape)."""

    def recorder(self) -> Any:
        """Returns a `flowtrain.ode.tape.Recorder` that is faster than autograd, or None."""
        return None

    def prepared(self) -> "Field":
        """Returns a field with the same values, for many evaluations while the parameters are constant."""
        return self


def field_jvp(field: nn.Module, t: Tensor, x: Tensor, tangents: Tensor, event_dims: int = 1) -> tuple[Tensor, Tensor]:
    """Computes (v, J e) with `Field.jvp`, or with `torch.func.jvp` for other modules.

    Args:
        field: a velocity field.
        t: broadcasts against x.shape[:-event_dims].
        x: (..., *event).
        tangents: e, (k, ...), broadcasting against (k, *x.shape).
        event_dims: number of dimensions of an event. It is ignored for a `Field`.

    Returns:
        v with the shape of x, and J e (k, *x.shape).
    """
    if isinstance(field, Field) and has_jvp(field):
        return field.jvp(t, x, tangents)
    return jvp_by_autograd(field, t, x, tangents, event_dims)


def has_jvp(field: Field) -> bool:
    """Whether the method `jvp` of a field differentiates the function that a call of the field computes.

    It does not if the field has a hook, or if a subclass overrides `forward` and not `jvp`.
    """
    definer = {name: next(c for c in type(field).__mro__ if name in vars(c)) for name in ("forward", "jvp")}
    return issubclass(definer["jvp"], definer["forward"]) and not is_hooked(field)


def is_known(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of the class `kind`, without hooks. Its parameters may be parametrized."""
    parametrized = type(module).__bases__ == (kind,) and "parametrizations" in module._modules
    return (type(module) is kind or parametrized) and not is_hooked(module)


def jvp_by_autograd(
    field: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, tangents: Tensor, event_dims: int = 1
) -> tuple[Tensor, Tensor]:
    """Computes `field_jvp` of a function with `torch.func.jvp`."""
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
    """A layer y(t, x) that is affine in x (..., *event). t broadcasts against the dimensions of x before the event."""

    def zero(self) -> None:
        """Sets y to zero for every x and t."""
        for name in ("linear", "conv", "shift"):
            for p in getattr(self, name, nn.Module()).parameters():
                nn.init.zeros_(p)

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Returns y(t, x)."""

    @abstractmethod
    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and (dy/dx) e for each tangent e. The dependence on t is computed once."""


class TimeEmbedded(TimedLayer):
    """A layer whose gate and offset are functions of a learned embedding e(t) of time.

        gate = 1 + A e(t),    offset = U e(t),    e(t) = swish(E [sin 2 pi k t, cos 2 pi k t]),    k = 1/4, 1/2, 1, 2.

    Every linear map also has a bias. The gate is initially 1, and the offset is initially 0.
    """

    def embed_time(self, n_out: int, n_embedding: int) -> None:
        """Creates E, A and U. The constructor of a subclass calls this method once."""
        self.register_buffer("frequencies", 2 * math.pi * torch.tensor([0.25, 0.5, 1.0, 2.0]))
        self.embed = nn.Linear(8, n_embedding)
        self.modulate = nn.Linear(n_embedding, 2 * n_out)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    frequencies: Tensor

    def waves(self, t: Tensor) -> Tensor:
        """Returns sin 2 pi k t and cos 2 pi k t, (*t.shape, 8)."""
        angles = t.unsqueeze(-1) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    def gate_and_offset(self, t: Tensor, waves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns gate and offset, each (*t.shape, n_out). `waves` is `waves(t)`, which is computed if it is None."""
        waves = self.waves(t) if waves is None else waves
        gate, offset = self.modulate(F.silu(self.embed(waves))).chunk(2, -1)
        return 1 + gate, offset


Layer = TypeVar("Layer", bound=TimedLayer)


class LayeredField(Field, Generic[Layer]):
    """The field v(t, x) = layer_L(t, f(.. f(layer_1(t, x) + E[context]))), see `embedded` for E[context].

    The last layer is initially zero. So an untrained flow is the identity, and its first solve is cheap.

    Args:
        layers: the layers 1 to L.
        activation: f, tanh | softplus | swish.
        width: width of the first hidden layer.
        classes: the size of the context. None: no context and no E.

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
        """All layers, from x to v."""
        return [*self.body, self.head]

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Returns v(t, x). `shift`, the term of the context, broadcasts against the output of the first layer."""
        first, *body = self.body
        x = first(t, x) if shift is None else first(t, x) + shift
        for layer in body:
            x = layer(t, self.activation(x))
        v: Tensor = self.head(t, self.activation(x))
        return v

    @abstractmethod
    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (v, J e), see `Field.jvp`. `shift` is the same as in `forward`."""

    def recorder(self, shift: Tensor | None = None) -> Any:
        """Returns the recorder of v(t, x) with this `shift`, see `Field.recorder`."""
        return None

    def given(self, context: Tensor) -> "Given":
        """Returns the field v(t, x | context) for labels (B,) or features (B, K).

        Raises:
            ConfigError: a field without classes.
        """
        if self.embedding is None:
            raise ConfigError(f"{type(self).__name__} was built without classes: build it with classes=K for a context")
        return Given(self, as_event(embedded(context, self.embedding), self.event_dims))

    def can_use_kernels(self, t: Tensor, x: Tensor) -> bool:
        """Whether the hand-written kernels can be used. They need the same time for all rows."""
        one_time = x.dim() > self.event_dims and x.numel() > 0 and (t.dim() == 0 or t.shape[-1] == 1)
        transformed = torch.compiler.is_compiling() or transforms_active()
        return one_time and not transformed

    def jvp_rows(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes `jvp` by ordinary operations, which allow a different time for each row."""
        *body, head = self.layers
        for layer in body:
            x, tangents = layer.jvp(t, x, tangents)
            if shift is not None:
                x, shift = x + shift, None
            x, slope = self.activation.value_and_slope(x)
            tangents = tangents * slope
        v, je = head.jvp(t, x, tangents)
        # the first product with a slope expands tangents that broadcast over the rows. A single layer has no such
        # product
        return v, je.expand(len(tangents), *v.shape)


class Given(Field):
    """The field v(t, x | context) for the context of a batch."""

    def __init__(self, field: LayeredField[Any], shift: Tensor) -> None:
        super().__init__()
        self.field, self.shift = field, shift
        self.event_dims = field.event_dims

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        v: Tensor = self.field(t, x, self.shift)
        return v

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        if has_jvp(self.field):
            return self.field.jvp(t, x, tangents, self.shift)
        of_rows = rows_of(self.shift, x, self.event_dims)
        return jvp_by_autograd(lambda t, x: self.field(t, x, of_rows), t, x, tangents, self.event_dims)

    def recorder(self) -> Any:
        return self.field.recorder(self.shift)


def rows_of(shift: Tensor, x: Tensor, event_dims: int) -> Tensor:
    """Expands the term of the context, (B, *event), to the rows of x (..., B, *event), and flattens the row axes."""
    outer = x.shape[: x.dim() - event_dims]
    return shift.expand(*outer, *shift.shape[-event_dims:]).flatten(0, len(outer) - 1)


def as_event(v: Tensor, event_dims: int) -> Tensor:
    """Reshapes v (..., C) so that it broadcasts against events, to (..., C, 1, 1) for images."""
    return v.view(*v.shape, *(1,) * (event_dims - 1))


@dataclass(frozen=True)
class Hidden:
    """The tensors of a hidden layer h = f(a), for its backward pass.

    Attributes:
        h: f(a).
        kept: the tensor for the derivatives, see `Activation.replace`.
        slope: f'(a).
        u, t: the tangents of a and of h.
        tangent_dim: the dimension of u and t that counts the tangents. The other tensors do not have this dimension.
    """

    h: Tensor
    kept: Tensor
    slope: Tensor
    u: Tensor
    t: Tensor
    tangent_dim: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors in the order that `unpack` expects."""
        return self.h, self.kept, self.slope, self.u, self.t


def unpack(tensors: Sequence[Tensor], tangent_dim: int) -> list[Hidden]:
    """Returns the layers from the concatenated `Hidden.tensors` of several layers."""
    layers = zip(*(tensors[i::5] for i in range(5)), strict=True)
    return [Hidden(h, kept, slope, u, t, tangent_dim) for h, kept, slope, u, t in layers]


def activate(activation: Activation, a: Tensor, u: Tensor, tangent_dim: int) -> Hidden:
    """Applies the activation to `a` and its tangents u. `a` already contains the gain, and may be overwritten."""
    h, kept = activation.replace(a)
    slope = activation.slope(kept)
    return Hidden(h, kept, slope, u, u * slope.unsqueeze(tangent_dim), tangent_dim)


def activate_vjp(activation: Activation, layer: Hidden, at_h: Tensor, at_t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cotangents of a and u for the cotangents of h and t, which are overwritten."""
    first, *rest = zip(at_t.unbind(layer.tangent_dim), layer.u.unbind(layer.tangent_dim), strict=True)
    # the products are summed one by one, because all of them together would need as much memory as the tangents
    at_slope = first[0] * first[1]
    for cotangent, u in rest:
        at_slope.addcmul_(cotangent, u)
    at_a = activation.vjp(layer.kept, layer.slope, at_h, at_slope)
    return at_a, at_t.mul_(layer.slope.unsqueeze(layer.tangent_dim))
