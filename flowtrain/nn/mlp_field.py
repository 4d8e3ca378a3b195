"""Velocity fields for vectors: multilayer perceptrons that depend on time, with hand-written derivatives."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.nn.column_networks import is_hooked
from flowtrain.nn.velocity_field import (
    Activation,
    Hidden,
    LayeredField,
    TimedLayer,
    TimeEmbedded,
    activate,
    activate_vjp,
    unpack,
)
from flowtrain.utils.arguments import number, one_of, widths
from flowtrain.utils.autograd import first_derivative, needs_autograd, transforms_active
from flowtrain.utils.modules import submodules
from flowtrain.utils.products import product

# on a CPU, the largest number of values and tangents of a layer in one block of nodes. Larger blocks exceed the cache,
# and the allocator requests new pages for them
BLOCK = 2**18


class MLPTape:
    """Evaluations of an MLP, one node at a time; see `flowtrain.ode.tape.Tape`.

    Args:
        times: times of the nodes, (M,).
        weights, biases: for each layer (M, n_out, n_in) and (M, n_out), without an autograd graph.
        activation: the activation between the layers.
        keep: whether `vjp` will be called.
        shift: a bias of the first layer for each row, (B, n), without an autograd graph. None: no such bias.
    """

    def __init__(
        self,
        times: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        activation: Activation,
        keep: bool,
        shift: Tensor | None = None,
    ) -> None:
        self.times, self.activation, self.keep, self.shift = times, activation, keep, shift
        self.weights = [w.unbind() for w in weights]
        self.transposed = [w.mT.unbind() for w in weights]
        self.biases = [b.unbind() for b in biases]
        # for each node: the inputs of all layers, the tensors for the slopes, and after `vjp` the cotangents of the
        # outputs of all layers before their activation
        self.inputs: dict[int, list[Tensor]] = {}
        self.kept: dict[int, list[Tensor]] = {}
        self.cotangents: dict[int, list[Tensor]] = {}

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """Returns v (B, d) of node i at x (B, d)."""
        inputs, kept = [x], []
        last = len(self.weights) - 1
        gain = self.activation.gain(x.device)
        for layer in range(last):
            a = torch.addmm(self.biases[layer][i], x, self.transposed[layer][i], beta=gain, alpha=gain)
            if layer == 0 and self.shift is not None:
                a.add_(self.shift, alpha=gain)
            x, needed = self.activation.replace(a)
            inputs.append(x)
            kept.append(needed)
        if self.keep:
            self.inputs[i], self.kept[i] = inputs, kept
        return torch.addmm(self.biases[last][i], x, self.transposed[last][i])

    def vjp(self, i: int, cotangent: Tensor) -> Tensor:
        """Returns cotangent^T dv/dx of node i, (B, d). Cotangents are kept for `weight_gradients`."""
        at_a = [cotangent]
        for layer in reversed(range(1, len(self.weights))):
            slope = self.activation.slope(self.kept[i][layer - 1])
            at_a.append(torch.mm(at_a[-1], self.weights[layer][i]).mul_(slope))
        self.cotangents[i] = at_a[::-1]
        return torch.mm(at_a[-1], self.weights[0][i])

    def weight_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the gradients of `weights` and `biases`. They are zero for nodes without a vjp."""
        n_nodes = len(self.times)
        at_weights, at_biases = [], []
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            at_w, at_b = w[0].new_zeros(n_nodes, *w[0].shape), b[0].new_zeros(n_nodes, *b[0].shape)
            for i, at_a in self.cotangents.items():
                torch.mm(at_a[layer].t(), self.inputs[i][layer], out=at_w[i])
                torch.sum(at_a[layer], 0, out=at_b[i])
            at_weights.append(at_w)
            at_biases.append(at_b)
        return at_weights, at_biases


def jvp(
    activation: Activation,
    x: Tensor,
    tangents: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (v, J e) of an MLP at M nodes.

    Args:
        activation: the activation between the layers.
        x: (M, B, d).
        tangents: e, (k, 1 or M, 1 or B, d).
        weights, biases: for each layer (M, n_out, n_in) and (M, n_out).
        shift: a bias of the first layer for each row, (B, n). None: no such bias.

    Returns:
        v (M, B, d') and J e (k, M, B, d').
    """
    v, je = _JVP.apply(activation, len(weights), x, tangents, shift, *weights, *biases)  # type: ignore[no-untyped-call]
    return v, je


class _JVP(torch.autograd.Function):
    """The function of `jvp`, evaluated in blocks of m nodes.

    u and t are the tangents of a hidden layer before and after the activation, (m, k, 1 or B, n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        n_layers: int,
        x: Tensor,
        tangents: Tensor,
        shift: Tensor | None,
        *layers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, biases = layers[:n_layers], layers[n_layers:]
        k = len(tangents)
        e = tangents.transpose(0, 1).expand(len(x), k, *tangents.shape[2:])
        v = x.new_empty(*x.shape[:2], weights[-1].shape[1])
        je = x.new_empty(k, *v.shape)
        kept: list[Tensor] = []
        for b in _blocks(x, k, weights):
            saved, v[b], probe_jvps = _jvp_block(
                activation, x[b], e[b], [w[b] for w in weights], [c[b] for c in biases], shift
            )
            je[:, b] = probe_jvps.transpose(0, 1)
            kept += [tensor for layer in saved for tensor in layer.tensors()]
        ctx.activation, ctx.n_layers, ctx.tangent_shape = activation, n_layers, tangents.shape
        # every tensor is kept by save_for_backward, because torch.utils.checkpoint frees only these
        ctx.save_for_backward(x, e, *layers, *kept)
        return v, je

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_v: Tensor, at_je: Tensor) -> tuple[Any, ...]:
        n = ctx.n_layers
        x, e, *rest = ctx.saved_tensors
        weights, biases, hidden = rest[:n], rest[n : 2 * n], unpack(rest[2 * n :], tangent_dim=1)
        at_x = torch.empty_like(x)
        at_weights = [torch.empty_like(w) for w in weights]
        at_biases = [torch.empty_like(c) for c in biases]
        # these are the 4th and the 5th argument of forward
        at_e = torch.empty_like(e) if ctx.needs_input_grad[3] else None
        at_shift = x.new_zeros(x.shape[1], weights[0].shape[1]) if ctx.needs_input_grad[4] else None
        for i, b in enumerate(_blocks(x, e.shape[1], weights)):
            at_x[b] = _vjp_block(
                ctx.activation,
                x[b],
                e[b],
                [w[b] for w in weights],
                hidden[i * (n - 1) : (i + 1) * (n - 1)],
                at_v[b],
                at_je[:, b].transpose(0, 1),
                [w[b] for w in at_weights],
                [c[b] for c in at_biases],
                at_shift,
                None if at_e is None else at_e[b],
            )
        at_tangents = None if at_e is None else at_e.transpose(0, 1).sum_to_size(ctx.tangent_shape)
        return None, None, at_x, at_tangents, at_shift, *at_weights, *at_biases


def _blocks(x: Tensor, k: int, weights: Sequence[Tensor]) -> list[slice]:
    n_nodes, rows = x.shape[:2]
    size = n_nodes
    if x.device.type == "cpu":
        size = max(1, BLOCK // (rows * (1 + k) * max(w.shape[1] for w in weights)))
    return [slice(i, i + size) for i in range(0, n_nodes, size)]


def _jvp_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    shift: Tensor | None,
) -> tuple[list[Hidden], Tensor, Tensor]:
    """Returns the hidden layers, v (m, B, d') and J e (m, k, 1 or B, d') of one block."""
    gain = activation.gain(x.device)
    hidden: list[Hidden] = []
    h, t = x, e
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        a = torch.baddbmm(bias.unsqueeze(1), h, weight.mT, beta=gain, alpha=gain)
        if shift is not None:
            a.add_(shift, alpha=gain)
            shift = None
        hidden.append(activate(activation, a, _product(t, weight.mT), tangent_dim=1))
        h, t = hidden[-1].h, hidden[-1].t
    return hidden, torch.baddbmm(biases[-1].unsqueeze(1), h, weights[-1].mT), _product(t, weights[-1].mT)


def _vjp_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    hidden: list[Hidden],
    at_a: Tensor,
    at_u: Tensor,
    at_weights: Sequence[Tensor],
    at_biases: Sequence[Tensor],
    at_shift: Tensor | None,
    at_e: Tensor | None,
) -> Tensor:
    """Differentiates one block.

    Args:
        at_a: cotangent of v, (m, B, d').
        at_u: cotangent of J e, (m, k, B, d').
        at_weights, at_biases: the cotangents of weights and biases are written into these tensors.
        at_shift: the cotangent of the shift is added to this tensor, (B, n). None: it is not needed.
        at_e: the cotangent of e is written into this tensor. None: it is not needed.

    Returns:
        The cotangent of x.
    """
    for layer in reversed(range(1, len(weights))):
        below = hidden[layer - 1]
        _weight_gradient(at_a, at_u, below.h, below.t, at_weights[layer], at_biases[layer])
        at_h, at_t = torch.bmm(at_a, weights[layer]), _product(at_u, weights[layer])
        at_a, at_u = activate_vjp(activation, below, at_h, at_t)
    if e.shape[2] == 1:
        at_u = at_u.sum(2, keepdim=True)
    _weight_gradient(at_a, at_u, x, e, at_weights[0], at_biases[0])
    if at_shift is not None:
        at_shift += at_a.sum(0)
    if at_e is not None:
        at_e.copy_(_product(at_u, weights[0]))
    return torch.bmm(at_a, weights[0])


def _product(t: Tensor, matrix: Tensor) -> Tensor:
    """Returns t M for t (m, k, B, n) and M (m, n, n')."""
    m, k, rows, _ = t.shape
    return torch.bmm(t.reshape(m, k * rows, -1), matrix).view(m, k, rows, -1)


def _weight_gradient(at_a: Tensor, at_u: Tensor, h: Tensor, t: Tensor, at_weight: Tensor, at_bias: Tensor) -> None:
    """Writes the cotangents of W and b for a = W h + b and u = W t into `at_weight` and `at_bias`."""
    torch.bmm(at_a.mT, h, out=at_weight)
    at_weight.baddbmm_(at_u.flatten(1, 2).mT, t.flatten(1, 2))
    torch.sum(at_a, 1, out=at_bias)


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

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights (M, n_out, n_in) and biases (M, n_out) of this linear layer at the times (M,)."""
        gate, shift = self.modulation(times)
        weight, bias = self.linear.weight, self.linear.bias
        if gate is None:
            return weight.expand(len(times), *weight.shape), shift + bias
        return gate.unsqueeze(-1) * weight, torch.addcmul(shift, gate, bias)

    def values(self, t: Tensor, x: Tensor) -> Tensor:
        """Returns y (B, n_out) for x (B, n_in) and t () or (B,), without a gradient."""
        gate, shift = self.modulation(t)
        y = product(x, self.linear.weight, self.linear.bias)
        return y.add_(shift) if gate is None else torch.addcmul(shift, y, gate)

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


class ConcatSquash(TimedLinear):
    """The layer y = (W x + b) sigmoid(a t + c) + u t (FFJORD's ConcatSquashLinear)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        column = t.unsqueeze(-1)
        return torch.sigmoid(self.gate(column)), self.shift(column)

    def values(self, t: Tensor, x: Tensor) -> Tensor:
        # products with one column are slower than elementwise operations
        column, gate = t.unsqueeze(-1), self.gate
        factor = torch.addcmul(gate.bias, column, gate.weight.T).sigmoid_()
        y = product(x, self.linear.weight, self.linear.bias)
        return y.mul_(factor).addcmul_(column, self.shift.weight.T)


class TimeEmbedding(TimedLinear, TimeEmbedded):
    """The layer y = (W x + b) gate(t) + offset(t), see `TimeEmbedded`."""

    def __init__(self, n_in: int, n_out: int, n_embedding: int = 16) -> None:
        super().__init__(n_in, n_out)
        self.embed_time(n_out, n_embedding)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_and_offset(t)

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

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        plain = not torch.is_grad_enabled() and x.dim() == 2 and t.dim() < 2 and x.numel() and not needs_autograd(x)
        # only a call of a module runs its hooks
        if plain and not any(is_hooked(module) for layer in self.layers for module in submodules(layer)):
            return self._values(t, x, shift)
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

    def _values(self, t: Tensor, x: Tensor, shift: Tensor | None) -> Tensor:
        """Returns v (B, d) for x (B, d) and times () or (B,), without a gradient."""
        *body, head = self.layers
        gain = self.activation.gain(x.device)
        for layer in body:
            a = layer.values(t, x)
            if shift is not None:
                a, shift = a.add_(shift), None
            x, _ = self.activation.replace(a if gain == 1 else a.mul_(gain))
        return head.values(t, x)

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.can_use_kernels(t, x):
            return self.jvp_rows(t, x, tangents, shift)
        nodes, (rows, n_in) = x.shape[:-2], x.shape[-2:]
        weights, biases = self.at(t.expand(*nodes, 1).reshape(-1))
        shared = tangents.shape[1:-2].numel() == 1
        e = tangents if shared else tangents.expand(-1, *nodes, -1, -1)
        e = e.reshape(len(tangents), -1, *tangents.shape[-2:])
        v, je = jvp(self.activation, x.reshape(-1, rows, n_in), e, weights, biases, shift)
        shape = *nodes, rows, v.shape[-1]
        return v.view(shape), je.view(len(tangents), *shape)

    def jvp_rows(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_rows = t.dim() == 1 and x.dim() == 2 and tangents.dim() == 3 and x.numel() > 0
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active() or not of_rows:
            return super().jvp_rows(t, x, tangents, shift)
        # rows in blocks that fit into the cache, see `BLOCK`
        size = len(x)
        if x.device.type == "cpu":
            size = max(1, BLOCK // ((1 + len(tangents)) * max(layer.linear.out_features for layer in self.layers)))
        rows = [slice(i, i + size) for i in range(0, len(x), size)]
        shared = tangents.shape[1] == 1
        blocks = [
            self._jvp_of_rows(t[i], x[i], tangents if shared else tangents[:, i], None if shift is None else shift[i])
            for i in rows
        ]
        if len(blocks) == 1:
            return blocks[0]
        v, je = zip(*blocks, strict=True)
        return torch.cat(v), torch.cat(je, 1)

    def _jvp_of_rows(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (v, J e) for times (B,) and x (B, d), without gradients.

        The gate of a layer is multiplied with the slope of the activation, and the product with the tangents, because
        the tangents are the largest tensor.
        """
        gain = self.activation.gain(x.device)
        for layer in self.layers[:-1]:
            gate, offset = layer.modulation(t)
            y = layer.linear(x)
            a = y.add_(offset) if gate is None else torch.addcmul(offset, y, gate)
            if shift is not None:
                a, shift = a.add_(shift), None
            x, kept = self.activation.replace(a if gain == 1 else a.mul_(gain))
            factor = self.activation.slope(kept)
            u = F.linear(tangents, layer.linear.weight)
            if gate is not None:
                factor = factor.mul_(gate)
            tangents = u * factor if u.shape[1] == 1 else u.mul_(factor)
        v, je = self.layers[-1].jvp(t, x, tangents)
        return v, je.expand(len(je), *v.shape)

    def at(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the weights and biases of all layers at the times (M,), see `TimedLinear.at`."""
        weights, biases = zip(*(layer.at(times) for layer in self.layers), strict=True)
        return list(weights), list(biases)

    def recorder(self, shift: Tensor | None = None) -> "MLPRecorder | None":
        # a subclass may compute another function
        return MLPRecorder(self, shift) if type(self) is MLPField else None


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
        # these are the parameters at the time of recording. The field may have other parameters later
        self.recorded: dict[str, Tensor] = dict(field.named_parameters())
        self.parameters = [*self.recorded.values(), *([] if shift is None else [shift])]

    parameters: list[Tensor]

    def record(self, times: Tensor, keep: bool) -> MLPTape:
        """Returns a tape for stages at `times` (s,), with the current weights."""
        with torch.no_grad():
            weights, biases = self.field.at(times)
        shift = None if self.shift is None else self.shift.detach()
        return MLPTape(times, weights, biases, self.field.activation, keep, shift)

    def gradients(self, tapes: Sequence[MLPTape]) -> list[Tensor | None]:
        """Returns the gradient of each parameter, or None.

        The tapes give the gradients of the weights and biases at each time. One backward pass through
        `MLPField.at` for all times turns them into gradients of the parameters.
        """
        found = self._field_gradients(tapes)
        if self.shift is None:
            return found
        if not self.shift.requires_grad:
            return [*found, None]
        return [*found, reduce(torch.add, [at_a[0] for tape in tapes for at_a in tape.cotangents.values()])]

    def _field_gradients(self, tapes: Sequence[MLPTape]) -> list[Tensor | None]:
        parts = [tape.weight_gradients() for tape in tapes]
        cotangents = [torch.cat(part) for kind in zip(*parts, strict=True) for part in zip(*kind, strict=True)]
        with torch.enable_grad():
            times = torch.cat([tape.times for tape in tapes])
            parameters = {f"field.{name}": p for name, p in self.recorded.items()}
            weights, biases = torch.func.functional_call(_At(self.field), parameters, (times,))
        pairs = [(y, c) for y, c in zip([*weights, *biases], cotangents, strict=True) if y.requires_grad]
        if not pairs:
            return [None] * len(self.recorded)
        outputs, at_outputs = zip(*pairs, strict=True)
        trained = [p for p in self.recorded.values() if p.requires_grad]
        found = iter(torch.autograd.grad(outputs, trained, at_outputs, allow_unused=True))
        return [next(found) if p.requires_grad else None for p in self.recorded.values()]


class _At(nn.Module):
    """`MLPField.at` as a module, so that functional_call can call it with other parameters."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.field.at(times)
