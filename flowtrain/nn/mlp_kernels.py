"""Hand-written derivatives of a multilayer perceptron whose layers depend on time: the tape of a solve, and JVPs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowtrain.nn.velocity_field import Activation
from flowtrain.utils.autograd import first_derivative
from flowtrain.utils.products import product, weight_gradient

# on a CPU, the largest number of values and tangents of a layer in one block of nodes. Larger blocks exceed the cache,
# and smaller blocks need more operations
BLOCK = 2**19


class MLPTape:
    """Evaluations of an MLP, one node at a time; see `flowtrain.ode.tape.Tape`.

    Args:
        at: the weights (M, n_out, n_in) of each layer and the biases (M, n_out) of each layer at M nodes, see
            `MLPField.at`.
        activation: the activation between the layers.
        keep: whether `vjp` will be called.
        shift: a bias of the first layer for each row, (B, n), without an autograd graph. None: no such bias.
    """

    def __init__(
        self,
        at: tuple[Sequence[Tensor], Sequence[Tensor]],
        activation: Activation,
        keep: bool,
        shift: Tensor | None = None,
    ) -> None:
        self.activation, self.keep, self.shift = activation, keep, shift
        weights, biases = ([y.detach() for y in of_layers] for of_layers in at)
        self.at = [*at[0], *at[1]]
        self.gain = activation.gain(weights[0].device)
        self.transposed = [w.mT.unbind() for w in weights]
        # the weights and biases of the hidden layers contain the gain
        if self.gain != 1:
            weights, biases = (
                [*(self.gain * y for y in of_layers[:-1]), of_layers[-1]] for of_layers in (weights, biases)
            )
        self.weights, self.biases = [w.unbind() for w in weights], [b.unbind() for b in biases]
        # for each node: the inputs of all layers, and the tensors for the slopes
        self.inputs: dict[int, list[Tensor]] = {}
        self.kept: dict[int, list[Tensor]] = {}
        # the gradients of `at`, and the gradient of the shift
        self.at_outputs: list[Tensor] = []
        self.at_nodes: list[tuple[Tensor, ...]] = []
        self.at_shift: Tensor | None = None

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """Returns v (B, d) of node i at x (B, d)."""
        inputs, kept = [x], []
        last = len(self.weights) - 1
        for layer in range(last):
            a = product(x, self.weights[layer][i], self.biases[layer][i])
            if layer == 0 and self.shift is not None:
                a.add_(self.shift, alpha=self.gain)
            x, needed = self.activation.replace(a)
            inputs.append(x)
            kept.append(needed)
        if self.keep:
            self.inputs[i], self.kept[i] = inputs, kept
        return product(x, self.weights[last][i], self.biases[last][i])

    def vjp(self, i: int, cotangent: Tensor) -> Tensor:
        """Returns cotangent^T dv/dx of node i, (B, d). The gradients of its weights are kept for `weight_gradients`."""
        if not self.at_outputs:
            self.at_outputs = [cotangent.new_zeros(y.shape) for y in self.at]
            self.at_nodes = [y.unbind() for y in self.at_outputs]
        inputs, kept = self.inputs[i], self.kept[i]
        at_a, n_layers = cotangent, len(self.weights)
        for layer in reversed(range(n_layers)):
            # the weight gradients are computed here, because the cotangents are still in the cache
            weight_gradient(at_a, inputs[layer], self.at_nodes[layer][i])
            torch.sum(at_a, 0, out=self.at_nodes[n_layers + layer][i])
            if layer == 0:
                break
            at_a = self.activation.times_slope_(kept[layer - 1], product(at_a, self.transposed[layer][i]))
        if self.shift is not None:
            self.at_shift = at_a.clone() if self.at_shift is None else self.at_shift.add_(at_a)
        return product(at_a, self.transposed[0][i])

    def weight_gradients(self) -> tuple[list[Tensor], Tensor | None]:
        """Returns the gradients of `at` and of the shift, and resets them.

        The gradients are zero for nodes without a call of `vjp`. Without any call, the list is empty.
        """
        found = self.at_outputs, self.at_shift
        self.at_outputs, self.at_nodes, self.at_shift = [], [], None
        return found


def jvp(
    activation: Activation,
    x: Tensor,
    tangents: Tensor,
    weights: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    biases: Sequence[Tensor],
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (v, J e) of an MLP with layers y = (W x) gate + bias, where gate and bias depend on the node.

    Args:
        activation: the activation between the layers.
        x: (M, B, d).
        tangents: e, (k, 1 or M, 1 or B, d).
        weights, gates, biases: for each layer (n_out, n_in), (M, n_out) and (M, n_out). A gate of None means 1.
        shift: a bias of the first layer for each row, (B, n). None: no such bias.

    Returns:
        v (M, B, d') and J e (k, M, B, d').
    """
    v, je = _JVP.apply(activation, len(weights), x, tangents, shift, *weights, *gates, *biases)  # type: ignore[no-untyped-call]
    return v, je


# a hidden layer: its values h and tangents t as one tensor (m, 1 + k, B, n), the tensor `kept` of its activation, and
# u, or None if the derivatives do not need u
_Hidden = tuple[Tensor, Tensor, Tensor | None]


class _JVP(torch.autograd.Function):
    """The function of `jvp`, evaluated in blocks of m nodes.

    In a hidden layer, u = W t_below are the tangents before the gate, and t = f' gate u are the tangents after the
    activation. The values h and the k tangents t of a layer are one tensor. All nodes have the same W. So one matrix
    product serves the values and the tangents of all nodes of a block.
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
        weights, gates, biases = layers[:n_layers], layers[n_layers : 2 * n_layers], layers[2 * n_layers :]
        k = len(tangents)
        e = tangents.transpose(0, 1).expand(len(x), k, *tangents.shape[2:])
        v = x.new_empty(*x.shape[:2], len(weights[-1]))
        je = x.new_empty(k, *v.shape)
        kept: list[Tensor | None] = []
        for b in _blocks(x, k, weights):
            hidden, y = _jvp_block(activation, x[b], e[b], weights, _of(gates, b), _of(biases, b), shift)
            v[b] = y[:, 0]
            je[:, b] = y[:, 1:].transpose(0, 1)
            kept += [tensor for layer in hidden for tensor in layer]
        ctx.activation, ctx.n_layers, ctx.tangent_shape = activation, n_layers, tangents.shape
        ctx.set_materialize_grads(False)
        # every tensor is kept by save_for_backward, because torch.utils.checkpoint frees only these
        ctx.save_for_backward(x, e, *layers, *kept)
        return v, je

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_v: Tensor | None, at_je: Tensor | None) -> tuple[Any, ...]:
        n = ctx.n_layers
        x, e, *rest = ctx.saved_tensors
        weights, gates, biases, kept = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        hidden: list[_Hidden] = list(zip(kept[::3], kept[1::3], kept[2::3], strict=True))
        k = e.shape[1]
        at_x = torch.empty_like(x)
        at_gated = [x.new_empty(len(x), *w.shape) for w in weights]
        at_biases = [torch.empty_like(c) for c in biases]
        # these are the 4th and the 5th argument of forward
        at_e = torch.empty_like(e) if ctx.needs_input_grad[3] else None
        at_shift = x.new_zeros(x.shape[1], len(weights[0])) if ctx.needs_input_grad[4] else None
        # the last blocks are the most likely ones to be in the cache
        for i, b in reversed(list(enumerate(_blocks(x, k, weights)))):
            at_y = x.new_zeros(len(x[b]), 1 + k, x.shape[1], len(weights[-1]))
            if at_v is not None:
                at_y[:, 0] = at_v[b]
            if at_je is not None:
                at_y[:, 1:] = at_je[:, b].transpose(0, 1)
            at_x[b] = _vjp_block(
                ctx.activation,
                x[b],
                e[b],
                weights,
                _of(gates, b),
                hidden[i * (n - 1) : (i + 1) * (n - 1)],
                at_y,
                [w[b] for w in at_gated],
                [c[b] for c in at_biases],
                at_shift,
                None if at_e is None else at_e[b],
            )
        at_tangents = None if at_e is None else at_e.transpose(0, 1).sum_to_size(ctx.tangent_shape)
        at_gates = [_at_gate(*of_layer) for of_layer in zip(at_gated, weights, gates, strict=True)]
        return None, None, at_x, at_tangents, at_shift, *(w.sum(0) for w in at_gated), *at_gates, *at_biases


def _blocks(x: Tensor, k: int, weights: Sequence[Tensor]) -> list[slice]:
    n_nodes, rows = x.shape[:2]
    size = n_nodes
    if x.device.type == "cpu":
        size = max(1, BLOCK // (rows * (1 + k) * max(len(w) for w in weights)))
    return [slice(i, i + size) for i in range(0, n_nodes, size)]


def _of(per_node: Sequence[Tensor | None], b: slice) -> list[Tensor | None]:
    """Returns the gates or biases (m, 1, n) of the nodes of a block."""
    return [None if y is None else y[b].unsqueeze(1) for y in per_node]


def _at_gate(at_gated: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor | None:
    """Returns the cotangent of a gate (M, n_out) for the cotangents of gate W, multiplied by the gate.

    These are at_gated = gate at_(gate W), (M, n_out, n_in). The cotangent of the gate is <at_(gate W), W>. A gate that
    has underflowed to 0 gets 0.
    """
    if gate is None:
        return None
    return torch.where(gate == 0, 0, torch.einsum("moi,oi->mo", at_gated, weight) / gate)


def _jvp_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    shift: Tensor | None,
) -> tuple[list[_Hidden], Tensor]:
    """Returns the hidden layers of one block, and v and J e as one tensor (m, 1 + k, B, d')."""
    gain = activation.gain(x.device)
    hidden: list[_Hidden] = []
    stack = x.new_empty(len(x), 1 + e.shape[1], x.shape[1], len(weights[0]))
    y, u = _products(x, weights[0]), _products(e, weights[0])
    for layer in range(len(weights) - 1):
        if layer:
            stack = _products(hidden[-1][0], weights[layer])
            y, u = stack[:, 0], stack[:, 1:]
        a = _affine(y, gates[layer], biases[layer], gain, out=stack[:, 0])
        if layer == 0 and shift is not None:
            a.add_(shift, alpha=gain)
        h, kept = activation.replace(a)
        if h is not a:
            # `kept` may be a
            kept = kept.clone()
            a.copy_(h)
        slope = _times(activation.slope(kept), gates[layer])
        needed = u if layer == 0 else None if activation.has_log_slope else u.clone()
        torch.mul(u, slope.unsqueeze(1), out=stack[:, 1:])
        hidden.append((stack, kept, needed))
    out = _products(hidden[-1][0], weights[-1])
    _affine(out[:, 0], gates[-1], biases[-1], 1.0, out=out[:, 0])
    if gates[-1] is not None:
        out[:, 1:].mul_(gates[-1].unsqueeze(1))
    return hidden, out


def _affine(y: Tensor, gate: Tensor | None, bias: Tensor | None, gain: float, out: Tensor) -> Tensor:
    """Writes gain (y gate + bias) into `out`, for y (m, B, n), and returns it."""
    assert bias is not None
    if gate is None:
        return torch.add(gain * bias, y, alpha=gain, out=out)
    return torch.addcmul(gain * bias, y, gate, value=gain, out=out)


def _times(y: Tensor, gate: Tensor | None) -> Tensor:
    """Multiplies y by the gate in place."""
    return y if gate is None else y.mul_(gate)


def _vjp_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    hidden: Sequence[_Hidden],
    at_y: Tensor,
    at_gated: Sequence[Tensor],
    at_biases: Sequence[Tensor],
    at_shift: Tensor | None,
    at_e: Tensor | None,
) -> Tensor:
    """Differentiates one block.

    Args:
        at_y: cotangent of v and J e, (m, 1 + k, B, d').
        at_gated: the cotangents of gate W, multiplied by the gate, are written into these tensors (m, n_out, n_in).
        at_biases: the cotangents of the biases are written into these tensors.
        at_shift: the cotangent of the shift is added to this tensor, (B, n). None: it is not needed.
        at_e: the cotangent of e is written into this tensor. None: it is not needed.

    Returns:
        The cotangent of x.
    """
    torch.sum(at_y[:, 0], 1, out=at_biases[-1])
    at_y = _times(at_y, None if gates[-1] is None else gates[-1].unsqueeze(1))
    for layer in reversed(range(len(hidden))):
        (stack, kept, u), gate = hidden[layer], gates[layer]
        _weight_gradients(at_y.flatten(1, 2), stack.flatten(1, 2), at_gated[layer + 1])
        at_y = _products(at_y, weights[layer + 1].t())
        at_a, at_t = at_y[:, 0], at_y[:, 1:]
        slope = activation.slope(kept)
        if u is None:
            activation.vjp_of_log_slope(kept, slope, at_a, _sum_over_tangents(at_t, stack[:, 1:]))
        else:
            activation.vjp(kept, slope, at_a, _times(_sum_over_tangents(at_t, u), gate))
        torch.sum(at_a, 1, out=at_biases[layer])
        if layer == 0 and at_shift is not None:
            at_shift += at_a.sum(0)
        # now at_y becomes the cotangent of the products with W
        _times(at_a, gate)
        at_t.mul_(_times(slope, gate).unsqueeze(1))
    at_a, at_u = at_y[:, 0], at_y[:, 1:]
    if e.shape[2] == 1:
        at_u = at_u.sum(2, keepdim=True)
    _weight_gradients(at_a, x, at_gated[0])
    at_gated[0].baddbmm_(at_u.flatten(1, 2).mT, e.flatten(1, 2))
    if at_e is not None:
        at_e.copy_(_products(at_u, weights[0].t()))
    return _products(at_a, weights[0].t())


def _sum_over_tangents(at_t: Tensor, t: Tensor) -> Tensor:
    """Returns sum_j at_t_j t_j, (m, B, n), for tensors (m, k, B or 1, n)."""
    first, *rest = zip(at_t.unbind(1), t.unbind(1), strict=True)
    # the products are summed one by one, because all of them together would need as much memory as the tangents
    total = first[0] * first[1]
    for one in rest:
        total.addcmul_(*one)
    return total


def _products(t: Tensor, weight: Tensor) -> Tensor:
    """Returns t W^T for t (..., n) and W (n', n)."""
    found = product(t.reshape(-1, t.shape[-1]), weight)
    return found.view(*t.shape[:-1], len(weight))


def _weight_gradients(at_y: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes the cotangent of W for y = x W^T into `out` (m, n', n), for at_y (m, K, n') and x (m, K, n)."""
    if x.device.type != "cpu":
        torch.bmm(at_y.mT, x, out=out)
        return
    # on a CPU, products one by one are faster than a batched product
    for node in zip(at_y.unbind(), x.unbind(), out.unbind(), strict=True):
        weight_gradient(*node)
