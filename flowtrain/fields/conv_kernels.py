"""Hand-written tangents of a stack of plain convolutions, and their gradient.

At a fixed time the layers of a convolutional field are plain ones, a_l = W_l * h_(l-1) + s_l, h_l = f(a_l), the last
without activation, s_l one number a channel or a map (C, H, W). `push` takes x and k tangents e through them. Against
autograd this saves the joining and splitting of values and tangents, a graph of small operations over whole images and
the gradients they would sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowtrain.derivatives import first_derivative
from flowtrain.fields.activations import Activation
from flowtrain.fields.hidden import Hidden, back_through, through, unpack


def push(
    activation: Activation, x: Tensor, tangents: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(v, J e): x (B, C, H, W), tangents (k, 1 or B, C, H, W), constants -> (B, C', H, W), (k, B, C', H, W)."""
    v, je = _Push.apply(activation, len(weights), x, tangents, *weights, *shifts)  # type: ignore[no-untyped-call]
    return v, je


class _Push(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: Activation, n_layers: int, x: Tensor, tangents: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, shifts = layers[:n_layers], layers[n_layers:]
        gain = activation.gain(x.device)
        hidden: list[Hidden] = []
        h, t = x, tangents
        for weight, shift in zip(weights[:-1], shifts[:-1], strict=True):
            # a convolution is linear: its weights take the gain, not the images
            a = _convolved(h, gain * weight, gain * shift)
            hidden.append(through(activation, a, _pushed(t, weight), tangents=0))
            h, t = hidden[-1].h, hidden[-1].t
        ctx.activation, ctx.n_layers = activation, n_layers
        # nothing kept but this way: only so does torch.utils.checkpoint drop it
        ctx.save_for_backward(x, tangents, *layers, *(tensor for layer in hidden for tensor in layer.tensors()))
        je = _pushed(t, weights[-1])
        return _convolved(h, weights[-1], shifts[-1]), je.expand(len(je), len(x), *je.shape[2:]).contiguous()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_a: Tensor, at_u: Tensor) -> tuple[Any, ...]:
        n = ctx.n_layers
        x, tangents, *rest = ctx.saved_tensors
        weights, shifts, hidden = rest[:n], rest[n : 2 * n], unpack(rest[2 * n :], tangents=0)
        at_weights: list[Tensor] = []
        at_shifts: list[Tensor] = []
        for layer in reversed(range(n)):
            h, t = (hidden[layer - 1].h, hidden[layer - 1].t) if layer else (x, tangents)
            if t.shape[1] == 1:
                at_u = at_u.sum(1, keepdim=True)
            at_shifts.append(at_a.sum_to_size(shifts[layer].shape))
            at_h, at_weight = _pull(at_a, h, weights[layer], layer > 0 or ctx.needs_input_grad[2])
            at_t, more = _pull(at_u.flatten(0, 1), t.flatten(0, 1), weights[layer], layer > 0)
            at_weights.append(at_weight.add_(more))
            if layer == 0:
                return None, None, at_h, None, *at_weights[::-1], *at_shifts[::-1]
            assert at_h is not None
            assert at_t is not None
            at_a, at_u = back_through(ctx.activation, hidden[layer - 1], at_h, at_t.view_as(t))
        raise AssertionError("a field has layers")


def _convolved(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    if shift.numel() == len(weight):
        return F.conv2d(x, weight, shift.flatten(), padding="same")
    return F.conv2d(x, weight, padding="same").add_(shift)


def _pushed(t: Tensor, weight: Tensor) -> Tensor:
    """W * t for t (k, 1 or B, C, H, W)."""
    y = F.conv2d(t.flatten(0, 1), weight, padding="same")
    return y.view(*t.shape[:2], *y.shape[1:])


def _pull(at_y: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor]:
    """Cotangents of x, or None, and of W from that of y = W * x."""
    same = [size // 2 for size in weight.shape[2:]]
    at_x, at_weight, _ = torch.ops.aten.convolution_backward(
        at_y, x, weight, None, [1, 1], same, [1, 1], False, [0, 0], 1, [needs_x, True, False]
    )
    return at_x, at_weight
