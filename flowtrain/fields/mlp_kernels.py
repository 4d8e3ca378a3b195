"""Hand-written derivatives of a multilayer perceptron whose weights differ from node to node.

At a fixed time a time-modulated layer is a plain linear one, so at M times an MLP field is M plain MLPs

    h_0 = x,  a_l = W_l h_(l-1) + b_l,  h_l = f(a_l),  v = W_L h_(L-1) + b_L

with W_l (M, n_l, n_(l-1)), b_l (M, n_l), the last layer without activation. `MLPTape` evaluates one node at a time
and pulls cotangents back through it, for the stages of a solver; `push` takes x (M, B, d) and k tangents e through
all nodes together, and its gradient reaches x and the weights. Against autograd on the same field this saves the
graph, most elementwise passes, and the building of the time-dependent weights at every stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowtrain.derivatives import first_derivative
from flowtrain.fields.activations import Activation
from flowtrain.fields.hidden import Hidden, back_through, through, unpack

# numbers that one layer's values and tangents may take in a block of nodes: larger ones leave a CPU's cache, and its
# allocator asks for fresh pages
BLOCK = 2**18


class MLPTape:
    """Evaluations of an MLP, one node at a time; see `flowtrain.solvers.tape.Tape`.

    Args:
        times: of the nodes, (M,).
        weights, biases: of each layer, (M, n_out, n_in) and (M, n_out), without a graph.
        keep: whether nodes will be pulled.
    """

    def __init__(
        self, times: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: Activation, keep: bool
    ) -> None:
        self.times, self.activation, self.keep = times, activation, keep
        self.weights = [w.unbind() for w in weights]
        self.transposed = [w.mT.unbind() for w in weights]
        self.biases = [b.unbind() for b in biases]
        # for each node the input of every layer, what the slopes need, and once pulled the cotangents of every a_l
        self.inputs: dict[int, list[Tensor]] = {}
        self.kept: dict[int, list[Tensor]] = {}
        self.pulled: dict[int, list[Tensor]] = {}

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """v (B, d) of node i at x (B, d)."""
        inputs, kept = [x], []
        last = len(self.weights) - 1
        gain = self.activation.gain(x.device)
        for layer in range(last):
            a = torch.addmm(self.biases[layer][i], x, self.transposed[layer][i], beta=gain, alpha=gain)
            x, needed = self.activation.replace(a)
            inputs.append(x)
            kept.append(needed)
        if self.keep:
            self.inputs[i], self.kept[i] = inputs, kept
        return torch.addmm(self.biases[last][i], x, self.transposed[last][i])

    def pull(self, i: int, cotangent: Tensor) -> Tensor:
        """cotangent^T dv/dx of node i, (B, d); the share of the weights is kept for `weight_gradients`."""
        at_a = [cotangent]
        for layer in reversed(range(1, len(self.weights))):
            slope = self.activation.slope(self.kept[i][layer - 1])
            at_a.append(torch.mm(at_a[-1], self.weights[layer][i]).mul_(slope))
        self.pulled[i] = at_a[::-1]
        return torch.mm(at_a[-1], self.weights[0][i])

    def weight_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of every layer, (M, n_out, n_in) and (M, n_out), zero for nodes that were not pulled."""
        n_nodes = len(self.times)
        at_weights, at_biases = [], []
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            at_w, at_b = w[0].new_zeros(n_nodes, *w[0].shape), b[0].new_zeros(n_nodes, *b[0].shape)
            for i, at_a in self.pulled.items():
                torch.mm(at_a[layer].t(), self.inputs[i][layer], out=at_w[i])
                torch.sum(at_a[layer], 0, out=at_b[i])
            at_weights.append(at_w)
            at_biases.append(at_b)
        return at_weights, at_biases


def push(
    activation: Activation, x: Tensor, tangents: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(v, J e) at M nodes: x (M, B, d), tangents (k, 1 or M, 1 or B, d), constants -> (M, B, d'), (k, M, B, d')."""
    v, je = _Push.apply(activation, len(weights), x, tangents, *weights, *biases)  # type: ignore[no-untyped-call]
    return v, je


class _Push(torch.autograd.Function):
    """Nodes go through in blocks; u are the tangents before a slope, t after it, each (m, k, 1 or B, n)."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation, n_layers: int, x: Tensor, tangents: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, biases = layers[:n_layers], layers[n_layers:]
        k = len(tangents)
        e = tangents.transpose(0, 1).expand(len(x), k, *tangents.shape[2:])
        v = x.new_empty(*x.shape[:2], weights[-1].shape[1])
        je = x.new_empty(k, *v.shape)
        kept: list[Tensor] = []
        for b in _blocks(x, k, weights):
            saved, v[b], pushed = _push_block(activation, x[b], e[b], [w[b] for w in weights], [c[b] for c in biases])
            je[:, b] = pushed.transpose(0, 1)
            kept += [tensor for layer in saved for tensor in layer.tensors()]
        ctx.activation, ctx.n_layers = activation, n_layers
        # nothing kept but this way: only so does torch.utils.checkpoint drop it
        ctx.save_for_backward(x, e, *layers, *kept)
        return v, je

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_v: Tensor, at_je: Tensor) -> tuple[Any, ...]:
        n = ctx.n_layers
        x, e, *rest = ctx.saved_tensors
        weights, biases, hidden = rest[:n], rest[n : 2 * n], unpack(rest[2 * n :], tangents=1)
        at_x = torch.empty_like(x)
        at_weights = [torch.empty_like(w) for w in weights]
        at_biases = [torch.empty_like(c) for c in biases]
        for i, b in enumerate(_blocks(x, e.shape[1], weights)):
            at_x[b] = _pull_block(
                ctx.activation,
                x[b],
                e[b],
                [w[b] for w in weights],
                hidden[i * (n - 1) : (i + 1) * (n - 1)],
                at_v[b],
                at_je[:, b].transpose(0, 1),
                [w[b] for w in at_weights],
                [c[b] for c in at_biases],
            )
        return None, None, at_x, None, *at_weights, *at_biases


def _blocks(x: Tensor, k: int, weights: Sequence[Tensor]) -> list[slice]:
    n_nodes, rows = x.shape[:2]
    size = n_nodes
    if x.device.type == "cpu":
        size = max(1, BLOCK // (rows * (1 + k) * max(w.shape[1] for w in weights)))
    return [slice(i, i + size) for i in range(0, n_nodes, size)]


def _push_block(
    activation: Activation, x: Tensor, e: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[list[Hidden], Tensor, Tensor]:
    """The hidden layers, v (m, B, d') and J e (m, k, 1 or B, d')."""
    gain = activation.gain(x.device)
    hidden: list[Hidden] = []
    h, t = x, e
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        a = torch.baddbmm(bias.unsqueeze(1), h, weight.mT, beta=gain, alpha=gain)
        hidden.append(through(activation, a, _product(t, weight.mT), tangents=1))
        h, t = hidden[-1].h, hidden[-1].t
    return hidden, torch.baddbmm(biases[-1].unsqueeze(1), h, weights[-1].mT), _product(t, weights[-1].mT)


def _pull_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    hidden: list[Hidden],
    at_a: Tensor,
    at_u: Tensor,
    at_weights: Sequence[Tensor],
    at_biases: Sequence[Tensor],
) -> Tensor:
    """The cotangent of x from those of v (m, B, d') and J e (m, k, B, d'); writes those of weights and biases."""
    for layer in reversed(range(1, len(weights))):
        below = hidden[layer - 1]
        _weight_gradient(at_a, at_u, below.h, below.t, at_weights[layer], at_biases[layer])
        at_h, at_t = torch.bmm(at_a, weights[layer]), _product(at_u, weights[layer])
        at_a, at_u = back_through(activation, below, at_h, at_t)
    if e.shape[2] == 1:
        at_u = at_u.sum(2, keepdim=True)
    _weight_gradient(at_a, at_u, x, e, at_weights[0], at_biases[0])
    return torch.bmm(at_a, weights[0])


def _product(t: Tensor, matrix: Tensor) -> Tensor:
    """t M for t (m, k, B, n), M (m, n, n')."""
    m, k, rows, _ = t.shape
    return torch.bmm(t.reshape(m, k * rows, -1), matrix).view(m, k, rows, -1)


def _weight_gradient(at_a: Tensor, at_u: Tensor, h: Tensor, t: Tensor, at_weight: Tensor, at_bias: Tensor) -> None:
    """Of a = W h + b and u = W t."""
    torch.bmm(at_a.mT, h, out=at_weight)
    at_weight.baddbmm_(at_u.flatten(1, 2).mT, t.flatten(1, 2))
    torch.sum(at_a, 1, out=at_bias)
