"""Fields made of layers that time modulates, with a smooth activation between them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.checks import one_of
from flowtrain.derivatives import transforms_active
from flowtrain.errors import ConfigError
from flowtrain.fields.activations import ACTIVATIONS
from flowtrain.fields.base import Field


class TimedLayer(nn.Module, ABC):
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
    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(y, (dy/dx) e) for each tangent e, from one modulation."""


class TimeEmbedded(TimedLayer):
    """A layer whose gate and offset are 1 + A e(t) and U e(t), e(t) = swish(E [sin 2 pi k t, cos 2 pi k t]) learned,
    k = 1/4 .. 2; they begin at 1 and 0."""

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
    def push(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
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

    def push_rows(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`push` by autograd's means, for a time of its own for each row."""
        *body, head = self.layers
        for layer in body:
            x, tangents = layer.push(t, x, tangents)
            if shift is not None:
                x, shift = x + shift, None
            x, slope = self.activation.value_and_slope(x)
            tangents = tangents * slope
        v, je = head.push(t, x, tangents)
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

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        return self.field.push(t, x, tangents, self.shift)


def image_of(v: Tensor, event_dims: int) -> Tensor:
    """v (..., C) in the shape that broadcasts against events of that many dimensions: (..., C, 1, 1) for images."""
    return v.view(*v.shape, *(1,) * (event_dims - 1))
