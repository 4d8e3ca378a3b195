"""Multilayer perceptrons v(t, x) whose layers are modulated by time in one of three ways."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.checks import one_of, widths
from flowtrain.fields.layered import LayeredField, TimedLayer
from flowtrain.fields.mlp_kernels import MLPTape, push


class TimedLinear(TimedLayer):
    """y = (W x + b) * gate(t) + shift(t), with x (..., n_in), t broadcasting against x.shape[:-1]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    @abstractmethod
    def modulation(self, t: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gate, shift), each (*t.shape, n_out); a gate of None is 1."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate, shift = self.modulation(t)
        y: Tensor = self.linear(x)
        return y + shift if gate is None else torch.addcmul(shift, y, gate)

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """The plain linear layer that this one is at each of times (M,): weight (M, n_out, n_in), bias (M, n_out)."""
        gate, shift = self.modulation(times)
        weight, bias = self.linear.weight, self.linear.bias
        if gate is None:
            return weight.expand(len(times), *weight.shape), shift + bias
        return gate.unsqueeze(-1) * weight, torch.addcmul(shift, gate, bias)

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


class MLPField(LayeredField[TimedLinear]):
    """v(t, x) for vectors: a multilayer perceptron of timed layers.

    Args:
        d: dimension of x.
        hidden: widths of the hidden layers.
        layer: concatsquash | concat | time_embedding.
        activation: tanh | softplus | swish.

    Raises:
        ConfigError: an unknown layer or activation, or no hidden layer.
    """

    def __init__(self, d: int, hidden: Sequence[int], layer: str, activation: str) -> None:
        kind = LAYERS[one_of("model.field", layer, LAYERS)]
        super().__init__([kind(a, b) for a, b in pairwise([d, *widths("model.hidden", hidden), d])], activation)

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        if not self.by_hand(t, x, tangents):
            return self.push_rows(t, x, tangents)
        nodes, (rows, d) = x.shape[:-2], x.shape[-2:]
        weights, biases = self.at(t.expand(*nodes, 1).reshape(-1))
        shared = tangents.shape[1:-2].numel() == 1
        e = tangents if shared else tangents.expand(-1, *nodes, -1, -1)
        e = e.reshape(len(tangents), -1, *tangents.shape[-2:])
        v, je = push(self.activation, x.reshape(-1, rows, d), e, weights, biases)
        return v.view(x.shape), je.view(len(tangents), *x.shape)

    def at(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of the plain MLP that the field is at each of times (M,)."""
        weights, biases = zip(*(layer.at(times) for layer in self.layers), strict=True)
        return list(weights), list(biases)

    def recorder(self) -> "MLPRecorder | None":
        # a subclass may compute something else
        return MLPRecorder(self) if type(self) is MLPField else None


class MLPRecorder:
    """Tapes of an MLP field; see `flowtrain.solvers.tape.Recorder`."""

    def __init__(self, field: MLPField) -> None:
        self.field = field
        self.parameters: list[Tensor] = list(field.parameters())

    def record(self, times: Tensor, keep: bool) -> MLPTape:
        with torch.set_grad_enabled(keep):
            weights, biases = self.field.at(times)
        return MLPTape(weights, biases, self.field.activation, keep)

    def gradients(self, tapes: Sequence[MLPTape]) -> list[Tensor | None]:
        """The layers' cotangents at all times together, then once through how the layers depend on time."""
        pairs = [pair for tape in tapes for pair in tape.cotangents() if pair[0].requires_grad]
        trained = [p for p in self.parameters if p.requires_grad]
        if not pairs:
            return [None] * len(self.parameters)
        outputs, cotangents = zip(*pairs, strict=True)
        # retained, because a Jacobian is computed by pulling back through one solve many times
        shares = torch.autograd.grad(outputs, trained, cotangents, retain_graph=True, allow_unused=True)
        found = iter(shares)
        return [next(found) if p.requires_grad else None for p in self.parameters]
