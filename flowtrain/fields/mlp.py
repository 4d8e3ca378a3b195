"""Multilayer perceptrons v(t, x) whose layers are modulated by time in one of three ways."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.checks import one_of, widths
from flowtrain.fields.activations import SLOPES, VALUES
from flowtrain.fields.base import Field


class TimedLinear(nn.Module, ABC):
    """y = (W x + b) * gate(t) + shift(t), with x (..., n_in), t broadcasting against x.shape[:-1]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def zero(self) -> None:
        """Sets y to zero for every x and t."""
        for name in ("linear", "shift"):
            for p in getattr(self, name, nn.Module()).parameters():
                nn.init.zeros_(p)

    @abstractmethod
    def modulation(self, t: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gate, shift), each (*t.shape, n_out); a gate of None is 1."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate, shift = self.modulation(t)
        y: Tensor = self.linear(x)
        return y + shift if gate is None else torch.addcmul(shift, y, gate)

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(y, (dy/dx) e) for each tangent e, from one modulation."""
        gate, shift = self.modulation(t)
        y: Tensor = self.linear(x)
        pushed = F.linear(tangents, self.linear.weight)
        if gate is None:
            return y + shift, pushed
        return torch.addcmul(shift, y, gate), pushed * gate


class Concat(TimedLinear):
    """y = W [x, t] + b: time as one more input (FFJORD's ConcatLinear)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor) -> tuple[None, Tensor]:
        return None, self.shift(t.unsqueeze(-1))


class ConcatSquash(TimedLinear):
    """y = (W x + b) * sigmoid(a t + c) + u t (FFJORD's ConcatSquashLinear)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        column = t.unsqueeze(-1)
        return torch.sigmoid(self.gate(column)), self.shift(column)


class TimeEmbedding(TimedLinear):
    """y = (W x + b) * (1 + A e(t)) + U e(t), e(t) = swish(E [sin 2 pi k t, cos 2 pi k t]) learned, k = 1/4 .. 2."""

    def __init__(self, n_in: int, n_out: int, n_embedding: int = 16) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("frequencies", 2 * math.pi * torch.tensor([0.25, 0.5, 1.0, 2.0]))
        self.embed = nn.Linear(8, n_embedding)
        self.modulate = nn.Linear(n_embedding, 2 * n_out)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    frequencies: Tensor

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angles = t.unsqueeze(-1) * self.frequencies
        gate, shift = self.modulate(F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], -1)))).chunk(2, -1)
        return 1 + gate, shift


LAYERS: dict[str, type[TimedLinear]] = {
    "concatsquash": ConcatSquash,
    "concat": Concat,
    "time_embedding": TimeEmbedding,
}


class MLPField(Field):
    """v(t, x) for vectors: timed layers with a smooth activation between them.

    The last layer starts at zero, so an untrained flow is the identity and its first solve is cheap.

    Args:
        d: dimension of x.
        hidden: widths of the hidden layers.
        layer: concatsquash | concat | time_embedding.
        activation: tanh | softplus | swish.

    Raises:
        ConfigError: an unknown layer or activation, or no hidden layer.
    """

    def __init__(self, d: int, hidden: Sequence[int], layer: str, activation: str) -> None:
        super().__init__()
        kind = LAYERS[one_of("model.field", layer, LAYERS)]
        self.activation = one_of("model.activation", activation, SLOPES, "a field must be smooth")
        *body, head = (kind(a, b) for a, b in pairwise([d, *widths("model.hidden", hidden), d]))
        head.zero()
        self.body = nn.ModuleList(body)
        self.head = head

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        activation = VALUES[self.activation]
        for layer in self.body:
            x = activation(layer(t, x))
        v: Tensor = self.head(t, x)
        return v

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        activation = SLOPES[self.activation]
        for layer in self.body:
            assert isinstance(layer, TimedLinear)
            x, tangents = layer.push(t, x, tangents)
            x, slope = activation(x)
            tangents = tangents * slope
        v, je = self.head.push(t, x, tangents)
        # a tangent that broadcasts over rows stays unexpanded up to the first slope; one linear layer has none
        return v, je.expand(len(tangents), *v.shape)
