"""Multilayer perceptrons v(t, x) whose layers are modulated by time in one of three ways."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.checks import number, one_of, widths
from flowtrain.fields.layered import LayeredField, TimedLayer, TimeEmbedded
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


class TimeEmbedding(TimedLinear, TimeEmbedded):
    """y = (W x + b) gate(t) + offset(t), see `TimeEmbedded`."""

    def __init__(self, n_in: int, n_out: int, n_embedding: int = 16) -> None:
        super().__init__(n_in, n_out)
        self.embed_time(n_out, n_embedding)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_and_offset(t)


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
        classes: how many labels there are, which `given` takes; None for none.
        init_scale: of the first layer's weights, see `spread`; None leaves them to torch, U(-1, 1) / sqrt(d).

    Raises:
        ConfigError: an unknown layer or activation, no hidden layer, or a scale that is not positive.
    """

    def __init__(
        self,
        d: int,
        hidden: Sequence[int],
        layer: str,
        activation: str,
        classes: int | None = None,
        init_scale: float | None = None,
    ) -> None:
        kind = LAYERS[one_of("model.field", layer, LAYERS)]
        sizes = [d, *widths("model.hidden", hidden), d]
        layers = [kind(a, b) for a, b in pairwise(sizes)]
        super().__init__(layers, activation, sizes[1], classes)
        if init_scale is not None:
            spread(layers[0].linear, number("model.init_scale", init_scale))

    def push(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # the kernels know one bias a node and not one a row
        if shift is not None or not self.by_hand(t, x, tangents):
            return self.push_rows(t, x, tangents, shift)
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


@torch.no_grad()
def spread(layer: nn.Linear, scale: float) -> None:
    """Sets units w x + b to w ~ N(0, 2 scale^2 / d I), b = -w c, c ~ N(0, 4 I): ridges all over the data.

    Torch's biases are of the size of its weights, so that every ridge begins near 0, and what lies further out, such as
    a ring about it, is seen by all units alike. A tanh bends over 1 / |w|, which is 0.7 / scale in any dimension.
    """
    if layer.weight.is_meta:
        # a sketch has no values, and torch would import its compiler here, which takes seconds
        return
    layer.weight.normal_(std=scale * (2 / layer.in_features) ** 0.5)
    layer.bias.copy_(-(layer.weight * 2 * torch.randn_like(layer.weight)).sum(1))


class MLPRecorder:
    """Tapes of an MLP field; see `flowtrain.solvers.tape.Recorder`."""

    def __init__(self, field: MLPField) -> None:
        self.field = field
        self.names, self.parameters = map(list, zip(*field.named_parameters(), strict=True))

    names: list[str]
    parameters: list[Tensor]

    def record(self, times: Tensor, keep: bool) -> MLPTape:
        """A tape for stages at `times` (s,), with the weights as they are now."""
        with torch.no_grad():
            weights, biases = self.field.at(times)
        return MLPTape(times, weights, biases, self.field.activation, keep)

    def gradients(self, tapes: Sequence[MLPTape]) -> list[Tensor | None]:
        """The layers' cotangents at all times together, then once through how the layers depend on time."""
        parts = [tape.weight_gradients() for tape in tapes]
        cotangents = [torch.cat(part) for kind in zip(*parts, strict=True) for part in zip(*kind, strict=True)]
        # the weights that were recorded with, which need not be those the field holds by now
        recorded = {f"field.{name}": p for name, p in zip(self.names, self.parameters, strict=True)}
        with torch.enable_grad():
            times = torch.cat([tape.times for tape in tapes])
            weights, biases = torch.func.functional_call(_At(self.field), recorded, (times,))
        pairs = [(y, c) for y, c in zip([*weights, *biases], cotangents, strict=True) if y.requires_grad]
        if not pairs:
            return [None] * len(self.parameters)
        outputs, at_outputs = zip(*pairs, strict=True)
        trained = [p for p in self.parameters if p.requires_grad]
        found = iter(torch.autograd.grad(outputs, trained, at_outputs, allow_unused=True))
        return [next(found) if p.requires_grad else None for p in self.parameters]


class _At(nn.Module):
    """`MLPField.at` as a module, to be called with other weights."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.field.at(times)
