"""Convolutional fields v(t, x) over images, whose layers are modulated by time as in FFJORD's code.

Source: ConcatConv2d and ConcatSquashConv2d of github.com/rtqichen/ffjord (Grathwohl et al. 2019).
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.checks import one_of, whole, widths
from flowtrain.errors import ConfigError
from flowtrain.fields.conv_kernels import push
from flowtrain.fields.layered import LayeredField, TimedLayer, TimeEmbedded, image_of


class TimedConv2d(TimedLayer):
    """y = (W * x + b) gate(t) + offset(t), * a convolution that keeps the size.

    Shapes: x is (..., n_in, H, W), t broadcasts against x.shape[:-3], y is (..., n_out, H, W).
    """

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel_size, padding="same")

    @abstractmethod
    def modulation(self, t: Tensor, size: torch.Size) -> tuple[Tensor | None, Tensor]:
        """(gate, shift) for images of `size` (H, W), shift = b gate + offset; a gate of None is 1.

        Shapes: gate is (*t.shape, n_out, 1, 1), shift the same or (*t.shape, n_out, H, W).
        """

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate, shift = self.modulation(t, x.shape[-2:])
        weight, gate = self.fold(gate)
        if shift.numel() == len(weight):
            (y,) = convolve(weight, x, bias=shift.flatten())
            return y
        (y,) = convolve(weight, x)
        return y + shift if gate is None else torch.addcmul(shift, y, gate)

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(y, (dy/dx) e) for each tangent e, from one modulation and one convolution."""
        gate, shift = self.modulation(t, x.shape[-2:])
        weight, gate = self.fold(gate)
        y, pushed = convolve(weight, x, tangents)
        if gate is None:
            return y + shift, pushed
        return torch.addcmul(shift, y, gate), pushed * gate

    def at(self, t: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The plain convolution that this layer is at time t: W (n_out, n_in, ..), shift (n_out, 1 or H, 1 or W)."""
        gate, shift = self.modulation(t, size)
        return channels_last(self.fold(gate)[0]), shift

    def fold(self, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W, gate), or (gate W, None) where all images share one gate: W is small, the images are not."""
        weight = self.conv.weight
        if gate is not None and gate.numel() == len(weight):
            return weight * gate.reshape(-1, 1, 1, 1), None
        return weight, gate


def convolve(weight: Tensor, *parts: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """W * p (+ bias) for every part p (..., n_in, H, W), all in one convolution."""
    flat = [p.reshape(-1, *p.shape[-3:]) for p in parts]
    y = F.conv2d(torch.cat(flat) if len(flat) > 1 else flat[0], channels_last(weight), bias, padding="same")
    # split and not slices: the gradient of a slice is a zero-filled tensor of the whole size
    rows = torch.split(y, [len(p) for p in flat])
    return [r.reshape(*p.shape[:-3], *r.shape[1:]) for r, p in zip(rows, parts, strict=True)]


class ConcatConv2d(TimedConv2d):
    """y = W * [x, t] + b: time as one more input channel, constant inside the image and zero in its padding."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.shift = nn.Conv2d(1, n_out, kernel_size, padding="same", bias=False)

    def modulation(self, t: Tensor, size: torch.Size) -> tuple[None, Tensor]:
        assert self.conv.bias is not None
        # linear in t, so one convolution serves all times; a channel of ones sees the border as one of t does
        (response,) = convolve(self.shift.weight, t.new_ones(1, *size))
        return None, torch.addcmul(image_of(self.conv.bias, 3), image_of(t.unsqueeze(-1), 3), response)


class ConcatSquashConv2d(TimedConv2d):
    """y = (W * x + b) sigmoid(a t + c) + u t, with a, c and u per channel."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        assert self.conv.bias is not None
        column = t.unsqueeze(-1)
        gate = torch.sigmoid(self.gate(column))
        return image_of(gate, 3), image_of(torch.addcmul(self.shift(column), self.conv.bias, gate), 3)


class TimeEmbeddingConv2d(TimedConv2d, TimeEmbedded):
    """y = (W * x + b) gate(t) + offset(t), per channel, see `TimeEmbedded`."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, n_embedding: int = 16) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.embed_time(n_out, n_embedding)

    def modulation(self, t: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        assert self.conv.bias is not None
        gate, offset = self.gate_and_offset(t)
        return image_of(gate, 3), image_of(torch.addcmul(offset, self.conv.bias, gate), 3)


LAYERS: dict[str, type[TimedConv2d]] = {
    "concatsquash": ConcatSquashConv2d,
    "concat": ConcatConv2d,
    "time_embedding": TimeEmbeddingConv2d,
}


class ConvField(LayeredField[TimedConv2d]):
    """v(t, x) for images: timed convolutions of stride 1.

    Shapes: x is (..., C, H, W); t is a scalar or broadcasts against x.shape[:-3]; v has the shape of x.

    Args:
        channels: C.
        hidden: channels of the hidden layers.
        layer: concatsquash | concat | time_embedding.
        activation: tanh | softplus | swish.
        kernel_size: odd, so that an image keeps its size about its centre.
        classes: how many labels there are, which `given` takes; None for none.
        size: (H, W), for a bias of the first layer at each place; None for a field that is the same at all.

    Raises:
        ConfigError: an unknown layer or activation, no hidden layer, an even kernel; x that is not C channels.
    """

    event_dims = 3

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int],
        layer: str,
        activation: str,
        kernel_size: int = 3,
        classes: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        kind = LAYERS[one_of("model.field", layer, LAYERS)]
        sizes = [whole("model.channels", channels), *widths("model.hidden", hidden), channels]
        if whole("model.kernel_size", kernel_size) % 2 == 0:
            raise ConfigError(f"model.kernel_size={kernel_size}: give an odd number, so that images keep their size")
        super().__init__([kind(a, b, kernel_size) for a, b in pairwise(sizes)], activation, sizes[1], classes)
        self.channels = channels
        self.places = None if size is None else nn.Parameter(torch.zeros(sizes[1], *size))

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return super().forward(t, self.checked(x), self.placed(shift)).contiguous()

    def push(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, shift = self.checked(x), self.placed(shift)
        if not self.by_hand(t, x, tangents):
            v, je = self.push_rows(t, x, tangents, shift)
            return v.contiguous(), je.contiguous()
        nodes, batch = x.shape[:-4], x.shape[-4:]
        times = t.expand(*nodes, 1).reshape(-1)
        e = tangents.expand(-1, *nodes, *tangents.shape[-4:]).reshape(len(tangents), len(times), *tangents.shape[-4:])
        each = zip(times, x.reshape(-1, *batch), e.unbind(1), strict=True)
        v, je = (
            torch.stack(parts, i)
            for i, parts in enumerate(zip(*(self.push_node(*one, shift) for one in each), strict=True))
        )
        return v.view(x.shape), je.view(len(tangents), *x.shape)

    def push_node(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """`push` at one time: x (B, C, H, W), tangents (k, 1 or B, C, H, W)."""
        weights, shifts = zip(*(layer.at(t, x.shape[-2:]) for layer in self.layers), strict=True)
        if shift is not None:
            shifts = (shifts[0] + shift, *shifts[1:])
        v, je = push(self.activation, x, tangents, weights, shifts)
        return v.contiguous(), je.contiguous()

    def placed(self, shift: Tensor | None) -> Tensor | None:
        """The shift of the first layer: that of the labels, and that of the places."""
        if shift is None or self.places is None:
            return self.places if shift is None else shift
        return shift + self.places

    def checked(self, x: Tensor) -> Tensor:
        """x (..., C, H, W) as it is.

        Raises:
            ConfigError: it is no image of the field's channels.
        """
        if x.dim() < 3 or x.shape[-3] != self.channels:
            raise ConfigError(
                f"a convolutional field of {self.channels} channels takes images (..., {self.channels}, H, W); "
                f"it was given {tuple(x.shape)}: use an MLP for vectors, or set channels to the images' own"
            )
        return x


def channels_last(weight: Tensor) -> Tensor:
    """W (n_out, n_in, ..) with its channels innermost in memory, where that was measured to be faster.

    The convolution's output has them so too: the weight decides, because an image of one channel has no layout to tell.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    # not contiguous(memory_format=torch.channels_last): it does nothing for one input channel, and vmap refuses it
    return weight.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
