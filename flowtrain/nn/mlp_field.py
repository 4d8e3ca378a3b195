"""Velocity fields for vectors: multilayer perceptrons that depend on time, with hand-written derivatives."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.nn.column_networks import is_hooked
from flowtrain.nn.mlp_kernels import MLPTape, jvp
from flowtrain.nn.velocity_field import (
    LayeredField,
    TimedLayer,
    TimeEmbedded,
    constant,
    is_known,
    jvp_by_autograd,
    rows_of,
)
from flowtrain.utils.arguments import number, one_of, widths
from flowtrain.utils.autograd import needs_autograd, transforms_active
from flowtrain.utils.modules import submodules
from flowtrain.utils.products import product

# on a CPU, the largest number of values and tangents of a layer in one block of rows. Larger blocks exceed the cache
BLOCK = 2**18


# a function of the times () or (B,) that returns (gate, a, b) for each of several layers. The shift of a layer is a b.
# A gate of None means 1. The tensors broadcast against (B, n_out)
Modulations = Callable[[Tensor], Iterable[tuple[Tensor | None, Tensor, Tensor]]]


class TimedLinear(TimedLayer):
    """The layer y = (W x + b) gate(t) + shift(t) for x (..., n_in), with t broadcasting against x.shape[:-1]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    @abstractmethod
    def modulation(self, t: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns gate and shift, each (*t.shape, n_out). A gate of None means 1."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.modulated(x, *self.modulation(t))

    def modulated(self, x: Tensor, gate: Tensor | None, shift: Tensor) -> Tensor:
        """Returns y for the results of `modulation`."""
        y: Tensor = self.linear(x)
        return y + shift if gate is None else torch.addcmul(shift, y, gate)

    def gate_and_bias(self, times: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns gate and bias, (M, n_out) each, of y = (W x) gate + bias at the times (M,). None: the gate is 1."""
        gate, shift = self.modulation(times)
        bias = self.linear.bias
        if bias is None:
            return gate, shift
        return gate, shift + bias if gate is None else torch.addcmul(shift, gate, bias)

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights (M, n_out, n_in) and biases (M, n_out) of this linear layer at the times (M,)."""
        gate, bias = self.gate_and_bias(times)
        weight = self.linear.weight
        return weight.expand(len(times), *weight.shape) if gate is None else gate.unsqueeze(-1) * weight, bias

    @staticmethod
    @abstractmethod
    def modulations(layers: Sequence[Any]) -> Modulations:
        """Returns a function that computes `modulation` of several layers of this class, without gradients.

        The parameters of the layers must not change between the calls of this function.
        """

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and (dy/dx) e for each tangent e. `modulation` is called only once."""
        gate, shift = self.modulation(t)
        y: Tensor = self.linear(x)
        probe_jvps = F.linear(tangents, self.linear.weight)
        if gate is None:
            return y + shift, probe_jvps
        return torch.addcmul(shift, y, gate), probe_jvps * gate


class Concat(TimedLinear):
    """The layer y = W [x, t] + b, with time as one more input (FFJORD's ConcatLinear)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor) -> tuple[None, Tensor]:
        return None, self.shift(t.unsqueeze(-1))

    @staticmethod
    def modulations(layers: Sequence["Concat"]) -> Modulations:
        shifts = [layer.shift.weight.T for layer in layers]

        def found(t: Tensor) -> list[tuple[None, Tensor, Tensor]]:
            column = t.unsqueeze(-1)
            return [(None, column, shift) for shift in shifts]

        return found


class ConcatSquash(TimedLinear):
    """The layer y = (W x + b) sigmoid(a t + c) + u t (FFJORD's ConcatSquashLinear)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        column = t.unsqueeze(-1)
        return torch.sigmoid(self.gate(column)), self.shift(column)

    @staticmethod
    def modulations(layers: Sequence["ConcatSquash"]) -> Modulations:
        sizes = [layer.linear.out_features for layer in layers]
        weight = torch.cat([layer.gate.weight for layer in layers]).T
        bias = torch.cat([layer.gate.bias for layer in layers])
        shifts = [layer.shift.weight.T for layer in layers]

        def found(t: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
            # products with one column are slower than elementwise operations
            column = t.unsqueeze(-1)
            gates = torch.addcmul(bias, column, weight).sigmoid_().split_with_sizes(sizes, -1)
            return [(gate, column, shift) for gate, shift in zip(gates, shifts, strict=True)]

        return found


class TimeEmbedding(TimedLinear, TimeEmbedded):
    """The layer y = (W x + b) gate(t) + offset(t), see `TimeEmbedded`."""

    def __init__(self, n_in: int, n_out: int, n_embedding: int = 16) -> None:
        super().__init__(n_in, n_out)
        self.embed_time(n_out, n_embedding)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_and_offset(t)

    @staticmethod
    def modulations(layers: Sequence["TimeEmbedding"]) -> Modulations:
        def found(t: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
            waves, one = layers[0].waves(t), constant(1.0, t)
            return [(*layer.gate_and_offset(t, waves), one) for layer in layers]

        return found

    def with_waves(self, t: Tensor, x: Tensor, waves: Tensor) -> Tensor:
        """Returns y(t, x) for `waves(t)`, which all layers share."""
        return self.modulated(x, *self.gate_and_offset(t, waves))


LAYERS: dict[str, type[TimedLinear]] = {
    "concatsquash": ConcatSquash,
    "concat": Concat,
    "time_embedding": TimeEmbedding,
}


class MLPField(LayeredField[TimedLinear]):
    """A velocity field v(t, x) for vectors: a multilayer perceptron whose layers depend on time.

    Args:
        d: dimension of x.
        hidden: widths of the hidden layers.
        layer: concatsquash | concat | time_embedding.
        activation: tanh | softplus | swish.
        classes: the size of the context for `given`, see `MLP`. None: no context.
        init_scale: scale of the initial weights of the first layer, see `spread_units`. None: torch's default,
            U(-1, 1) / sqrt(d).
        n_in: the number of inputs of the first layer, for subclasses that compute other inputs from x. None: d.

    Raises:
        ConfigError: an unknown layer or activation, no hidden layer, or a scale that is not positive.
    """

    def __init__(
        self,
        d: int,
        hidden: Sequence[int] = (64, 64, 64),
        layer: str = "concatsquash",
        activation: str = "tanh",
        classes: int | None = None,
        init_scale: float | None = 1.0,
        n_in: int | None = None,
    ) -> None:
        kind = LAYERS[one_of("model.field", layer, LAYERS)]
        sizes = [d if n_in is None else n_in, *widths("model.hidden", hidden), d]
        layers = [kind(a, b) for a, b in pairwise(sizes)]
        super().__init__(layers, activation, sizes[1], classes)
        if init_scale is not None:
            spread_units(layers[0].linear, number("model.init_scale", init_scale))

    # the evaluations of a prepared field, whose parameters are constant
    values: "MLPValues | None" = None

    def prepared(self) -> "MLPField":
        if torch.compiler.is_compiling() or transforms_active():
            return self
        found = copy(self)
        found.values = MLPValues.of(self)
        return found

    def _values_at(self, t: Tensor, x: Tensor) -> "MLPValues | None":
        """Returns the evaluations for t () or (B,) and x (B, d). None for gradients, other shapes or other layers."""
        if torch.is_grad_enabled() or x.dim() != 2 or t.dim() > 1 or not x.numel() or needs_autograd(x):
            return None
        return self.values or MLPValues.of(self)

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        values = self._values_at(t, x)
        if values is not None:
            return values.velocity(t, x, shift)
        first, *layers = self.layers
        if not isinstance(first, TimeEmbedding):
            return super().forward(t, x, shift)
        waves = first.waves(t)
        x = first.with_waves(t, x, waves)
        x = x if shift is None else x + shift
        for layer in layers:
            assert isinstance(layer, TimeEmbedding)
            x = layer.with_waves(t, self.activation(x), waves)
        return x

    def has_known_layers(self) -> bool:
        """Whether no layer has a hook or was replaced by a user. Only a call of the layer evaluates these."""
        if any(is_hooked(module) for layer in self.layers for module in submodules(layer)):
            return False
        # a subclass may compute another function
        own = all(type(layer).forward is TimedLinear.forward for layer in self.layers)
        return own and all(is_known(layer.linear, nn.Linear) for layer in self.layers)

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values = self._values_at(t, x) if tangents.dim() == 3 else None
        if values is not None:
            return values.jvp(t, x, tangents, shift)
        if not self.has_known_layers():
            of_rows = None if shift is None else rows_of(shift, x, 1)
            # a subclass may compute the inputs of the layers
            return jvp_by_autograd(lambda t, x: MLPField.forward(self, t, x, of_rows), t, x, tangents)
        if not self.can_use_kernels(t, x):
            return self.jvp_rows(t, x, tangents, shift)
        nodes, (rows, n_in) = x.shape[:-2], x.shape[-2:]
        times = t.expand(*nodes, 1).reshape(-1)
        gates, biases = zip(*(layer.gate_and_bias(times) for layer in self.layers), strict=True)
        weights = [layer.linear.weight for layer in self.layers]
        shared = tangents.shape[1:-2].numel() == 1
        e = tangents if shared else tangents.expand(-1, *nodes, -1, -1)
        e = e.reshape(len(tangents), -1, *tangents.shape[-2:])
        v, je = jvp(self.activation, x.reshape(-1, rows, n_in), e, weights, gates, biases, shift)
        shape = *nodes, rows, v.shape[-1]
        return v.view(shape), je.view(len(tangents), *shape)

    def at(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the weights and biases of all layers at the times (M,), see `TimedLinear.at`."""
        weights, biases = zip(*(layer.at(times) for layer in self.layers), strict=True)
        return list(weights), list(biases)

    def recorder(self, shift: Tensor | None = None) -> "MLPRecorder | None":
        # a subclass may compute another function
        own = type(self) is MLPField and self.has_known_layers() and not is_hooked(self)
        return MLPRecorder(self, shift) if own else None


class MLPValues:
    """Evaluations of an MLP field without gradients, while its parameters are constant.

    Args:
        field: the field, whose layers have no hooks.
    """

    def __init__(self, field: MLPField) -> None:
        layers = field.layers
        self.activation = field.activation
        self.modulations = type(layers[0]).modulations(layers)
        self.linear = [(layer.linear.weight, layer.linear.bias) for layer in layers]
        self.width = max(len(weight) for weight, _ in self.linear)

    @staticmethod
    @torch.no_grad()
    def of(field: MLPField) -> "MLPValues | None":
        """Returns the evaluations of a field, or None if it has hooks or layers of other classes than `LAYERS`."""
        layers = field.layers
        kind = type(layers[0])
        if kind not in LAYERS.values():
            return None
        for layer in layers:
            module, *parts = submodules(layer)
            # only a call of a module runs its hooks
            if type(module) is not kind or any(type(part) is not nn.Linear for part in parts):
                return None
            if any(is_hooked(part) for part in (module, *parts)):
                return None
        return MLPValues(field)

    def velocity(self, t: Tensor, x: Tensor, shift: Tensor | None) -> Tensor:
        """Returns v (B, d) for times () or (B,) and x (B, d). See `LayeredField.forward` for `shift`."""
        last = len(self.linear) - 1
        for i, modulation in enumerate(self.modulations(t)):
            x = self._layer(i, x, *modulation)
            if i == 0 and shift is not None:
                x.add_(shift)
            if i < last:
                x, _ = self.activation.overwrite(x)
        return x

    def _layer(self, i: int, x: Tensor, gate: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        y = product(x, *self.linear[i])
        return (y if gate is None else y.mul_(gate)).addcmul_(a, b)

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns v (B, d) and J e (k, B, d) for times () or (B,), x (B, d) and tangents (k, 1 or B, d)."""
        # rows in blocks that fit into the cache, see `BLOCK`
        size = len(x)
        if x.device.type == "cpu":
            size = max(1, BLOCK // ((1 + len(tangents)) * self.width))
        if size >= len(x):
            return self._jvp(t, x, tangents, shift)
        t, shared = t.expand(len(x)), tangents.shape[1] == 1
        blocks = [
            self._jvp(t[i], x[i], tangents if shared else tangents[:, i], None if shift is None else shift[i])
            for i in (slice(start, start + size) for start in range(0, len(x), size))
        ]
        v, je = zip(*blocks, strict=True)
        return torch.cat(v), torch.cat(je, 1)

    def _jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes `jvp` for one block of rows.

        The gate of a layer is multiplied with the slope of the activation first, and their product with the tangents,
        because the tangents are the largest tensor.
        """
        last = len(self.linear) - 1
        for i, (gate, a, b) in enumerate(self.modulations(t)):
            x = self._layer(i, x, gate, a, b)
            if i == 0 and shift is not None:
                x.add_(shift)
            tangents = F.linear(tangents, self.linear[i][0])
            factor = gate
            if i < last:
                x, kept = self.activation.overwrite(x)
                factor = self.activation.slope(kept)
                factor = factor if gate is None else factor.mul_(gate)
            if factor is not None:
                tangents = tangents * factor if tangents.shape[1] == 1 else tangents.mul_(factor)
        return x, tangents.expand(-1, *x.shape)


@torch.no_grad()
def spread_units(layer: nn.Linear, scale: float) -> None:
    """Initializes units w x + b with w ~ N(0, 2 scale^2 / d I) and b = -w c, c ~ N(0, 4 I).

    A unit is zero on a hyperplane through c, so the hyperplanes of all units are spread over standardized data. With
    the default initialization of torch, biases are as small as weights, and all hyperplanes pass near 0. Then all units
    behave alike far from 0, for example on a ring around 0. A tanh unit changes over a distance of about 1 / |w|, which
    is 0.7 / scale in any dimension.
    """
    if layer.weight.is_meta:
        # tensors on the meta device have no values, and torch would import its compiler here, which takes seconds
        return
    layer.weight.normal_(std=scale * (2 / layer.in_features) ** 0.5)
    layer.bias.copy_(-(layer.weight * 2 * torch.randn_like(layer.weight)).sum(1))


class MLPRecorder:
    """Makes tapes of an MLP field; see `flowtrain.ode.tape.Recorder`.

    Args:
        field: the field.
        shift: the term of the context, (B, n), see `LayeredField.forward`. It is the last of `parameters`, and autograd
            passes its gradient on to the embedding and the context. None: no context.
    """

    def __init__(self, field: MLPField, shift: Tensor | None = None) -> None:
        self.field, self.shift = field, shift
        # these are the parameters at the time of the solve. The field may have other parameters later
        self.slots = [
            (m._parameters, key, p) for m in field.modules() for key, p in m._parameters.items() if p is not None
        ]
        self.recorded: list[Tensor] = [p for *_, p in self.slots]
        self.trained = [p for p in self.recorded if p.requires_grad]
        self.parameters = [*self.recorded, *([] if shift is None else [shift])]

    parameters: list[Tensor]

    def record(self, times: Tensor, keep: bool) -> MLPTape:
        """Returns a tape for stages at `times` (s,), with the weights at the time of the solve."""
        with torch.set_grad_enabled(keep):
            at = self._at(times)
        shift = None if self.shift is None else self.shift.detach()
        return MLPTape(at, self.field.activation, keep, shift)

    def _at(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        if all(p is of_module.get(key) for of_module, key, p in self.slots):
            return self.field.at(times)
        names = (f"field.{name}" for name, _ in self.field.named_parameters())
        found: tuple[list[Tensor], list[Tensor]] = torch.func.functional_call(
            _At(self.field), dict(zip(names, self.recorded, strict=True)), (times,)
        )
        return found

    def gradients(self, tapes: Sequence[MLPTape]) -> list[Tensor | None]:
        """Returns the gradient of each parameter, or None.

        The tapes give the gradients of the weights and biases at each time. One backward pass through
        `MLPField.at` turns them into gradients of the parameters.
        """
        outputs: list[Tensor] = []
        cotangents: list[Tensor] = []
        at_shifts: list[Tensor] = []
        for tape in tapes:
            at_outputs, at_shift = tape.weight_gradients()
            pairs = [(y, c) for y, c in zip(tape.at, at_outputs, strict=False) if y.requires_grad]
            outputs += [y for y, _ in pairs]
            cotangents += [c for _, c in pairs]
            at_shifts += [] if at_shift is None else [at_shift]
        found: Iterator[Tensor | None] = iter([None] * len(self.trained))
        if outputs:
            # the graph is retained, because a Jacobian needs many vjps through one solve
            found = iter(torch.autograd.grad(outputs, self.trained, cotangents, retain_graph=True, allow_unused=True))
        gradients = [next(found) if p.requires_grad else None for p in self.recorded]
        if self.shift is None:
            return gradients
        return [*gradients, reduce(torch.add, at_shifts) if self.shift.requires_grad else None]


class _At(nn.Module):
    """`MLPField.at` as a module, so that functional_call can call it with other parameters."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.field.at(times)
