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
from torch.autograd.function import once_differentiable

from flowtrain.fields.activations import Activation

# numbers that one layer's values and tangents may take in a block of nodes, so that they stay in a CPU's cache
BLOCK = 2**19


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
        self.biases = [b.unbind() for b in biases]
        # for each node the input of every layer, what the slopes need, and once pulled the cotangents of every a_l
        self.inputs: dict[int, list[Tensor]] = {}
        self.kept: dict[int, list[Tensor]] = {}
        self.pulled: dict[int, list[Tensor]] = {}

    def velocity(self, i: int, x: Tensor) -> Tensor:
        inputs, kept = [x], []
        last = len(self.weights) - 1
        for layer in range(last):
            a = torch.addmm(self.biases[layer][i], x, self.weights[layer][i].t())
            x, needed = self.activation.replace(a)
            inputs.append(x)
            kept.append(needed)
        if self.keep:
            self.inputs[i], self.kept[i] = inputs, kept
        return torch.addmm(self.biases[last][i], x, self.weights[last][i].t())

    def pull(self, i: int, cotangent: Tensor) -> Tensor:
        at_a = [cotangent]
        for layer in reversed(range(1, len(self.weights))):
            slope = self.activation.slope(self.kept[i][layer - 1])
            at_a.append(torch.mm(at_a[-1], self.weights[layer][i]).mul_(slope))
        self.pulled[i] = at_a[::-1]
        return torch.mm(at_a[-1], self.weights[0][i])

    def weight_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of every layer, (M, n_out, n_in) and (M, n_out), zero for nodes that were not pulled."""
        n_nodes = len(self.biases[0])
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
    """Layers hold [values, tangents] side by side, (M, 1 + k, B, n), so that each is one batched product."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation, n_layers: int, x: Tensor, tangents: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, biases = layers[:n_layers], layers[n_layers:]
        k = len(tangents)
        e = tangents.transpose(0, 1).expand(len(x), k, *tangents.shape[2:])
        keep = any(ctx.needs_input_grad)
        v = x.new_empty(*x.shape[:2], weights[-1].shape[1])
        je = x.new_empty(k, *v.shape)
        ctx.blocks = []
        for block in _blocks(x, k, weights):
            saved = _push_block(
                activation,
                x[block],
                e[block],
                [w[block] for w in weights],
                [b[block] for b in biases],
                v[block],
                je[:, block],
            )
            if keep:
                ctx.blocks.append((block, saved))
        ctx.activation, ctx.n_layers = activation, n_layers
        ctx.save_for_backward(x, e, *layers)
        return v, je

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_v: Tensor, at_je: Tensor) -> tuple[Any, ...]:
        x, e, *layers = ctx.saved_tensors
        weights, biases = layers[: ctx.n_layers], layers[ctx.n_layers :]
        at_x = torch.empty_like(x)
        at_weights = [torch.empty_like(w) for w in weights]
        at_biases = [torch.empty_like(b) for b in biases]
        for block, saved in ctx.blocks:
            at_out = torch.cat([at_v[block].unsqueeze(1), at_je[:, block].transpose(0, 1)], 1)
            _pull_block(
                ctx.activation,
                x[block],
                e[block],
                [w[block] for w in weights],
                saved,
                at_out,
                at_x[block],
                [w[block] for w in at_weights],
                [b[block] for b in at_biases],
            )
        return None, None, at_x, None, *at_weights, *at_biases


Saved = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def _blocks(x: Tensor, k: int, weights: Sequence[Tensor]) -> list[slice]:
    n_nodes, rows = x.shape[:2]
    size = n_nodes
    if x.device.type == "cpu":
        size = max(1, BLOCK // (rows * (1 + k) * max(w.shape[1] for w in weights)))
    return [slice(i, i + size) for i in range(0, n_nodes, size)]


def _push_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    v: Tensor,
    je: Tensor,
) -> Saved:
    """Writes v (m, B, d') and je (k, m, B, d'); returns for each hidden layer what `_pull_block` needs of it."""
    m, rows = x.shape[:2]
    k = e.shape[1]
    saved: Saved = []
    a = torch.baddbmm(biases[0].unsqueeze(1), x, weights[0].transpose(1, 2))
    pushed = _tangents(e, weights[0])
    joint = a
    for layer in range(1, len(weights)):
        h, kept = activation.replace(a)
        slope = activation.slope(kept)
        width = h.shape[-1]
        joint = h.new_empty(m, 1 + k, rows, width)
        joint[:, 0] = h
        torch.mul(pushed, slope.unsqueeze(1), out=joint[:, 1:])
        saved.append((joint, pushed, slope, kept))
        out = torch.bmm(joint.view(m, -1, width), weights[layer].transpose(1, 2)).view(m, 1 + k, rows, -1)
        a, pushed = out[:, 0].add_(biases[layer].unsqueeze(1)), out[:, 1:]
    v.copy_(a)
    je.copy_(pushed.transpose(0, 1).expand_as(je))
    return saved


def _tangents(e: Tensor, weight: Tensor) -> Tensor:
    """W e: (m, k, 1 or B, n) for e (m, k, 1 or B, d)."""
    m, k, rows, d = e.shape
    return torch.bmm(e.reshape(m, k * rows, d), weight.transpose(1, 2)).view(m, k, rows, -1)


def _pull_block(
    activation: Activation,
    x: Tensor,
    e: Tensor,
    weights: Sequence[Tensor],
    saved: Saved,
    at_out: Tensor,
    at_x: Tensor,
    at_weights: Sequence[Tensor],
    at_biases: Sequence[Tensor],
) -> None:
    """Writes the cotangents of x, weights and biases from those of [v, J e], (m, 1 + k, B, d')."""
    m = len(x)
    for layer in reversed(range(1, len(weights))):
        joint, pushed, slope, kept = saved[layer - 1]
        flat = at_out.reshape(m, -1, at_out.shape[-1])
        torch.bmm(flat.transpose(1, 2), joint.view(m, -1, joint.shape[-1]), out=at_weights[layer])
        torch.sum(at_out[:, 0], 1, out=at_biases[layer])
        at_joint = torch.bmm(flat, weights[layer]).view_as(joint)
        at_h, at_t = at_joint[:, 0], at_joint[:, 1:]
        # t = f'(a) u, so that a is reached through the slope as well
        at_slope = (at_t * pushed).sum(1)
        at_t.mul_(slope.unsqueeze(1))
        at_h.mul_(slope).add_(at_slope.mul_(activation.curvature(kept, slope)))
        at_out = at_joint
    at_a, at_u = at_out[:, 0], at_out[:, 1:]
    torch.bmm(at_a.transpose(1, 2), x, out=at_weights[0])
    if e.shape[2] == 1:
        at_u = at_u.sum(2, keepdim=True)
    k_rows = e.shape[1] * e.shape[2]
    at_weights[0].baddbmm_(at_u.reshape(m, k_rows, -1).transpose(1, 2), e.reshape(m, k_rows, -1))
    torch.sum(at_a, 1, out=at_biases[0])
    torch.bmm(at_a, weights[0], out=at_x)
