"""Velocity fields for images: convolutions that depend on time, with hand-written derivatives."""

from abc import abstractmethod
from collections.abc import Sequence
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
    as_event,
    is_known,
    jvp_by_autograd,
    rows_of,
    unpack,
)
from flowtrain.utils.arguments import one_of, whole, widths
from flowtrain.utils.autograd import first_derivative
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.modules import submodules


def jvp(
    activation: Activation, x: Tensor, tangents: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes (v, J e) of a convolutional network at one time.

    Args:
        activation: the activation between the layers.
        x: images (B, C, H, W).
        tangents: e, (k, 1 or B, C, H, W). They are treated as constants.
        weights, shifts: of each layer, see `TimedConv2d.at`.

    Returns:
        v (B, C', H, W) and J e (k, B, C', H, W).
    """
    v, je = _JVP.apply(activation, len(weights), x, tangents, *weights, *shifts)  # type: ignore[no-untyped-call]
    return v, je


class _JVP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: Activation, n_layers: int, x: Tensor, tangents: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, shifts = layers[:n_layers], layers[n_layers:]
        gain = activation.gain(x.device)
        hidden: list[Hidden] = []
        h, t = x, tangents
        for weight, shift in zip(weights[:-1], shifts[:-1], strict=True):
            # the gain multiplies the weights, which are smaller than the images
            a = _convolved(h, gain * weight, gain * shift)
            hidden.append(activate(activation, a, _jvp_of(t, weight), tangent_dim=0))
            h, t = hidden[-1].h, hidden[-1].t
        ctx.activation, ctx.n_layers = activation, n_layers
        # every tensor is kept by save_for_backward, because torch.utils.checkpoint frees only these
        ctx.save_for_backward(x, tangents, *layers, *(tensor for layer in hidden for tensor in layer.tensors()))
        je = _jvp_of(t, weights[-1])
        return _convolved(h, weights[-1], shifts[-1]), je.expand(len(je), len(x), *je.shape[2:]).contiguous()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, at_a: Tensor, at_u: Tensor) -> tuple[Any, ...]:
        n = ctx.n_layers
        x, tangents, *rest = ctx.saved_tensors
        weights, shifts, hidden = rest[:n], rest[n : 2 * n], unpack(rest[2 * n :], tangent_dim=0)
        at_weights: list[Tensor] = []
        at_shifts: list[Tensor] = []
        for layer in reversed(range(n)):
            h, t = (hidden[layer - 1].h, hidden[layer - 1].t) if layer else (x, tangents)
            if t.shape[1] == 1:
                at_u = at_u.sum(1, keepdim=True)
            at_shifts.append(at_a.sum_to_size(shifts[layer].shape))
            at_h, at_weight = _vjp(at_a, h, weights[layer], layer > 0 or ctx.needs_input_grad[2])
            at_t, more = _vjp(at_u.flatten(0, 1), t.flatten(0, 1), weights[layer], layer > 0)
            at_weights.append(at_weight.add_(more))
            if layer == 0:
                return None, None, at_h, None, *at_weights[::-1], *at_shifts[::-1]
            assert at_h is not None
            assert at_t is not None
            at_a, at_u = activate_vjp(ctx.activation, hidden[layer - 1], at_h, at_t.view_as(t))
        raise AssertionError("a field has layers")


def _convolved(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    if shift.numel() == len(weight):
        return F.conv2d(x, weight, shift.flatten(), padding="same")
    return F.conv2d(x, weight, padding="same").add_(shift)


def _jvp_of(t: Tensor, weight: Tensor) -> Tensor:
    """Returns W * t for t (k, 1 or B, C, H, W)."""
    y = F.conv2d(t.flatten(0, 1), weight, padding="same")
    return y.view(*t.shape[:2], *y.shape[1:])


def _vjp(at_y: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor]:
    """Returns the cotangents of x (or None) and of W, for the cotangent of y = W * x."""
    same = [size // 2 for size in weight.shape[2:]]
    at_x, at_weight, _ = torch.ops.aten.convolution_backward(
        at_y, x, weight, None, [1, 1], same, [1, 1], False, [0, 0], 1, [needs_x, True, False]
    )
    return at_x, at_weight


def is_plain(conv: nn.Module) -> bool:
    """Whether a module is an ordinary convolution, whose weight and bias can be used without a call of the module."""
    if not is_known(conv, nn.Conv2d):
        return False
    assert isinstance(conv, nn.Conv2d)
    ordinary = conv.groups == 1 and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return ordinary and conv.padding in ("same", tuple(side // 2 for side in conv.kernel_size))


def called(conv: nn.Module, x: Tensor) -> Tensor:
    """Applies a module for images (B, C, H, W) to x (..., C, H, W)."""
    y: Tensor = conv(x.reshape(-1, *x.shape[-3:]))
    return y.view(*x.shape[:-3], *y.shape[1:])


class TimedConv2d(TimedLayer):
    """The layer y = (W * x + b) gate(t) + offset(t). The convolution keeps the size of the images.

    Shapes: x is (..., n_in, H, W), t broadcasts against x.shape[:-3], y is (..., n_out, H, W).
    """

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel_size, padding="same")

    def bias(self, t: Tensor) -> Tensor:
        """Returns b, (n_out,), or zero, (), if the convolution has no bias or adds it itself."""
        bias = self.conv.bias if is_plain(self.conv) else None
        return t.new_zeros(()) if bias is None else bias

    @abstractmethod
    def modulation(self, t: Tensor, size: torch.Size) -> tuple[Tensor | None, Tensor]:
        """Returns gate and shift = b gate + offset for images of `size` (H, W). A gate of None means 1.

        Shapes: gate is (*t.shape, n_out, 1, 1). shift has this shape or (*t.shape, n_out, H, W).
        """

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate, shift = self.modulation(t, x.shape[-2:])
        if not is_plain(self.conv):
            y = called(self.conv, x)
            return y + shift if gate is None else torch.addcmul(shift, y, gate)
        weight, gate = self.fold(gate)
        if shift.numel() == len(weight):
            (y,) = convolve(weight, x, bias=shift.flatten())
            return y
        (y,) = convolve(weight, x)
        return y + shift if gate is None else torch.addcmul(shift, y, gate)

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and (dy/dx) e for each tangent e. `modulation` and the convolution are called only once."""
        gate, shift = self.modulation(t, x.shape[-2:])
        weight, gate = self.fold(gate)
        y, probe_jvps = convolve(weight, x, tangents)
        if gate is None:
            return y + shift, probe_jvps
        return torch.addcmul(shift, y, gate), probe_jvps * gate

    def at(self, t: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Returns W (n_out, n_in, ..) and shift (n_out, 1 or H, 1 or W) of the layer W * x + shift at time t."""
        gate, shift = self.modulation(t, size)
        return channels_last(self.fold(gate)[0]), shift

    def fold(self, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns (gate W, None) if all images share one gate, else (W, gate). W is smaller than the images."""
        weight = self.conv.weight
        if gate is not None and gate.numel() == len(weight):
            return weight * gate.reshape(-1, 1, 1, 1), None
        return weight, gate


def convolve(weight: Tensor, *parts: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Returns W * p (+ bias) for every part p (..., n_in, H, W), from one convolution."""
    flat = [p.reshape(-1, *p.shape[-3:]) for p in parts]
    y = F.conv2d(torch.cat(flat) if len(flat) > 1 else flat[0], channels_last(weight), bias, padding="same")
    # the gradient of a slice would be a tensor of the size of y filled with zeros, so y is split instead
    rows = torch.split(y, [p.shape[0] for p in flat])
    return [r.reshape(*p.shape[:-3], *r.shape[1:]) for r, p in zip(rows, parts, strict=True)]


class ConcatConv2d(TimedConv2d):
    """The layer y = W * [x, t] + b. Time is one more input channel, constant in the image and zero in the padding."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.shift = nn.Conv2d(1, n_out, kernel_size, padding="same", bias=False)

    def modulation(self, t: Tensor, size: torch.Size) -> tuple[None, Tensor]:
        if not is_plain(self.shift):
            channel = t.reshape(*t.shape, 1, 1, 1).expand(*t.shape, 1, *size)
            return None, as_event(self.bias(t), 3) + called(self.shift, channel)
        # the response to the channel t is t times the response to a channel of ones, also at the border
        (response,) = convolve(self.shift.weight, t.new_ones(1, *size))
        return None, torch.addcmul(as_event(self.bias(t), 3), as_event(t.unsqueeze(-1), 3), response)


class ConcatSquashConv2d(TimedConv2d):
    """The layer y = (W * x + b) sigmoid(a t + c) + u t, with a, c and u per channel."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def modulation(self, t: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        column = t.unsqueeze(-1)
        gate = torch.sigmoid(self.gate(column))
        return as_event(gate, 3), as_event(torch.addcmul(self.shift(column), self.bias(t), gate), 3)


class TimeEmbeddingConv2d(TimedConv2d, TimeEmbedded):
    """The layer y = (W * x + b) gate(t) + offset(t), with a gate and an offset per channel, see `TimeEmbedded`."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, n_embedding: int = 16) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.embed_time(n_out, n_embedding)

    def modulation(self, t: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        gate, offset = self.gate_and_offset(t)
        return as_event(gate, 3), as_event(torch.addcmul(offset, self.bias(t), gate), 3)


LAYERS: dict[str, type[TimedConv2d]] = {
    "concatsquash": ConcatSquashConv2d,
    "concat": ConcatConv2d,
    "time_embedding": TimeEmbeddingConv2d,
}


class ConvField(LayeredField[TimedConv2d]):
    """A velocity field v(t, x) for images: convolutions of stride 1 that depend on time.

    Shapes: x is (..., C, H, W); t is a scalar or broadcasts against x.shape[:-3]; v has the shape of x.

    Args:
        channels: C.
        hidden: channels of the hidden layers.
        layer: concatsquash | concat | time_embedding.
        activation: tanh | softplus | swish.
        kernel_size: an odd number, so that images keep their size.
        classes: the size of the context for `given`, see `MLP`. None: no context.
        size: (H, W) of the images, for a bias of the first layer at each pixel. None: no such bias.

    Raises:
        ConfigError: an unknown layer or activation, no hidden layer, an even kernel size, or x without C channels.
    """

    event_dims = 3

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64, 64),
        layer: str = "concatsquash",
        activation: str = "tanh",
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
        return super().forward(t, self.checked(x), self.with_pixel_bias(shift)).contiguous()

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.checked(x)
        if not self.has_known_layers():
            of_rows = None if shift is None else rows_of(shift, x, 3)
            return jvp_by_autograd(lambda t, x: ConvField.forward(self, t, x, of_rows), t, x, tangents, 3)
        shift = self.with_pixel_bias(shift)
        # the kernels treat tangents as constants
        if tangents.requires_grad or not self.can_use_kernels(t, x):
            v, je = self.jvp_rows(t, x, tangents, shift)
            return v.contiguous(), je.contiguous()
        nodes, batch = x.shape[:-4], x.shape[-4:]
        times = t.expand(*nodes, 1).reshape(-1)
        e = tangents.expand(-1, *nodes, *tangents.shape[-4:]).reshape(len(tangents), len(times), *tangents.shape[-4:])
        each = zip(times, x.reshape(-1, *batch), e.unbind(1), strict=True)
        v, je = (
            torch.stack(parts, i)
            for i, parts in enumerate(zip(*(self.jvp_node(*one, shift) for one in each), strict=True))
        )
        return v.view(x.shape), je.view(len(tangents), *x.shape)

    def has_known_layers(self) -> bool:
        """Whether no layer has a hook or was replaced by a user. The kernels skip hooks and replaced layers."""
        if any(is_hooked(module) for layer in self.layers for module in submodules(layer)):
            return False
        # a subclass may compute another function
        own = all(type(layer).forward is TimedConv2d.forward for layer in self.layers)
        return own and all(is_plain(layer.conv) for layer in self.layers)

    def jvp_node(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes `jvp` at one time t, for x (B, C, H, W) and tangents (k, 1 or B, C, H, W)."""
        weights, shifts = zip(*(layer.at(t, x.shape[-2:]) for layer in self.layers), strict=True)
        if shift is not None:
            shifts = (shifts[0] + shift, *shifts[1:])
        v, je = jvp(self.activation, x, tangents, weights, shifts)
        return v.contiguous(), je.contiguous()

    def with_pixel_bias(self, shift: Tensor | None) -> Tensor | None:
        """Adds the bias of each pixel to the shift of the context."""
        if shift is None or self.places is None:
            return self.places if shift is None else shift
        return shift + self.places

    def checked(self, x: Tensor) -> Tensor:
        """Returns x if its shape is (..., C, H, W).

        Raises:
            ConfigError: another shape or number of channels.
        """
        if x.dim() < 3 or x.shape[-3] != self.channels:
            raise ConfigError(
                f"a convolutional field of {self.channels} channels needs images (..., {self.channels}, H, W), not the "
                f"shape {tuple(x.shape)}: use MLPField for vectors, or set channels to the channels of the images"
            )
        return x


def channels_last(weight: Tensor) -> Tensor:
    """Returns W (n_out, n_in, ..), in the memory format channels_last for the cases in which this was faster.

    The output of the convolution then has this format too. The weight sets the format, because an image with one
    channel has the same strides in both formats.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    # contiguous(memory_format=torch.channels_last) has no effect for one input channel, and vmap does not support it
    return weight.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
