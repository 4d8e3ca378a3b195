"""Computes `ConvNet` by matrix products on a CPU, with a hand-written gradient.

A convolution of few channels spends most of its time on moving data. Here an activation is a matrix with one row for
each channel and one column for each pixel. A 3x3 convolution of few input channels is a product with nine shifted
images. A 3x3 convolution to few output channels is a product with nine results for each output channel, which are
shifted and added.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from flowtrain.utils.autograd import differentiable_vjp, needs_autograd
from flowtrain.utils.products import has_onednn, product

# the most channels of images for which products are faster than the convolutions of torch
FEW = 16


def is_faster(x: Tensor, n_out: int) -> bool:
    """Whether `ConvColumns` supports images x (B, C, H, W), and is faster than convolutions."""
    few = x.numel() > 0 and max(x.shape[1], n_out) <= FEW
    return few and x.device.type == "cpu" and x.dtype == torch.float32 and has_onednn() and not needs_autograd(x)


class ConvColumns(torch.autograd.Function):
    """A 3x3 convolution, 1x1 convolutions and a 3x3 convolution, with relu between them.

    The arguments are x (B, C, H, W), a bias of the first convolution at each pixel (1, n, H, W) or None, and the weight
    and the bias of one convolution after another.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor | None, *parts: Tensor) -> Tensor:
        b, _, height, width = x.shape
        weights, biases = parts[::2], parts[1::2]
        shifted = _shifted(x.transpose(0, 1))
        h = product(_by_input(weights[0]), shifted.T)
        bias = biases[0].unsqueeze(1)
        if places is None:
            h.add_(bias)
        else:
            h.view(len(h), b, -1).add_((places.flatten(2)[0] + bias).unsqueeze(1))
        hidden = [h.relu_()]
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            hidden.append(product(weight.flatten(1), hidden[-1].T).add_(bias.unsqueeze(1)).relu_())
        n_out = len(weights[-1])
        y = _sum_of_shifts(product(_by_output(weights[-1]), hidden[-1].T).view(9, n_out, b, height, width))
        ctx.save_for_backward(x, places, shifted, *parts, *hidden)
        return torch.add(y.transpose(0, 1), biases[-1].view(-1, 1, 1), out=x.new_empty(b, n_out, height, width))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, places, shifted, *rest = ctx.saved_tensors
        n = 2 * (len(rest) + 1) // 3
        parts, hidden = rest[:n], rest[n:]
        if torch.is_grad_enabled() or needs_autograd(x) or _functorch.is_legacy_batchedtensor(grad):
            return ConvColumns.by_autograd(ctx, x, places, parts, grad)
        weights = parts[::2]
        found: list[Tensor] = []
        # the gradient of part (i, j) of the last product is shifted in the opposite direction, as part (2 - i, 2 - j)
        g = _shifted(grad.transpose(0, 1))
        last = weights[-1]
        g_last = product(g, hidden[-1]).view(9, *last.shape[:2]).flip(0).transpose(0, 1)
        found[:0] = [_channels_last(g_last, last), grad.sum((0, 2, 3))]
        g = product(_by_output(last).view(9, *last.shape[:2]).flip(0).flatten(0, 1).T, g.T)
        for weight, a, before in zip(weights[-2:0:-1], hidden[:0:-1], hidden[-2::-1], strict=True):
            g = _through_relu(g, a)
            found[:0] = [_channels_last(product(g, before), weight), g.sum(1)]
            g = product(weight.flatten(1).T, g.T)
        g = _through_relu(g, hidden[0])
        first, (b, c, height, width) = weights[0], x.shape
        g_places = g.view(len(g), b, -1).sum(1)
        found[:0] = [_channels_last(product(shifted, g).T, first), g_places.sum(1)]
        g_x = None
        if ctx.needs_input_grad[0]:
            flipped = _by_input(first).view(len(g), 9, c).flip(1).flatten(1)
            g_x = _sum_of_shifts(product(flipped.T, g.T).view(9, c, b, height, width)).transpose(0, 1)
        return g_x, None if places is None else g_places.view_as(places), *found

    @staticmethod
    def by_autograd(
        ctx: Any, x: Tensor, places: Tensor | None, parts: Sequence[Tensor], grad: Tensor
    ) -> tuple[Any, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""

        def evaluated(x: Tensor, places: Tensor | None, *parts: Tensor) -> list[Tensor]:
            h = F.conv2d(x, parts[0], parts[1], padding=1)
            if places is not None:
                h = h + places
            for weight, bias in zip(parts[2:-2:2], parts[3:-2:2], strict=True):
                h = F.conv2d(h.relu(), weight, bias)
            return [F.conv2d(h.relu(), parts[-2], parts[-1], padding=1)]

        return tuple(differentiable_vjp(evaluated, [x, places, *parts], ctx.needs_input_grad, [grad]))


def _channels_last(gradient: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient (n, H W k) of a weight (n, k, H, W) in the memory layout of the weights of `ConvNet`."""
    n, k, height, width = weight.shape
    return gradient.contiguous().view(n, height, width, k).permute(0, 3, 1, 2)


def _by_input(weight: Tensor) -> Tensor:
    """Returns the weight (n, C, 3, 3) as a matrix (n, 9 C) for the result of `_shifted`."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _by_output(weight: Tensor) -> Tensor:
    """Returns the weight (n, k, 3, 3) as a matrix (9 n, k) for the argument of `_sum_of_shifts`."""
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def _padded(x: Tensor) -> Tensor:
    """Returns contiguous images (..., H + 2, W + 2) with a border of zeros."""
    padded = x.new_zeros(*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 2)
    padded[..., 1:-1, 1:-1] = x
    return padded


def _shifted(x: Tensor) -> Tensor:
    """Returns x[c, b, y + i - 1, z + j - 1] for images x (C, B, H, W), with zeros outside, (9 C, B H W).

    The rows are ordered by (i, j, c).
    """
    c, b, height, width = x.shape
    padded = _padded(x)
    strides = (padded.stride(2), 1, *padded.stride())
    return padded.as_strided((3, 3, c, b, height, width), strides).reshape(9 * c, -1)


def _sum_of_shifts(parts: Tensor) -> Tensor:
    """Returns the sum over (i, j) of parts[3 i + j, c, b, y + i - 1, z + j - 1], (C, B, H, W), with zeros outside."""
    height, width = parts.shape[-2:]
    padded = _padded(parts)
    # with its border, a shifted image is a contiguous part of memory
    flat, shape = padded.view(9, -1), padded.shape[1:]
    total = flat.new_empty(flat.shape[1])
    n = len(total) - 2 * shape[-1] - 2
    out = total[:n]
    torch.add(flat[0, :n], flat[1, 1 : n + 1], out=out)
    for k in range(2, 9):
        start = k // 3 * shape[-1] + k % 3
        out.add_(flat[k, start : start + n])
    return total.view(shape)[..., :height, :width]


def _through_relu(g: Tensor, a: Tensor) -> Tensor:
    """Returns the gradient of the input of relu, for the gradient g of its output a."""
    found: Tensor = torch.ops.aten.threshold_backward(g, a, 0)
    return found
