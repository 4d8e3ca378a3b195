"""Conditioners: the networks that compute the parameters of a coupling or of an autoregressive map."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.nn.column_networks import ColumnFunction, Layer, Plain, in_turn, is_hooked, weights_of
from flowtrain.nn.conv_columns import ConvColumns, is_faster
from flowtrain.nn.dropout import dropout_factors
from flowtrain.utils.autograd import needs_autograd, transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.recorded import Recorded

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "swish": nn.SiLU}


def zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Sets the weight and bias of a layer to zero and returns the layer. A coupling is then the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(Recorded, nn.Sequential):
    """A multilayer perceptron (B, n_in) -> (B, n_out). Its output is initially zero, so a coupling is the identity.

    Args:
        n_in: number of inputs.
        hidden: widths of the hidden layers.
        n_out: number of outputs.
        activation: relu | tanh | swish.
        classes: the size K of the context: the number of classes of labels (B,), which are one-hot inputs, or the
            number of features (B, K), which are inputs. None: no context.
        dropout: probability of dropping a hidden unit in training.
    """

    network = Plain

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        activation: str = "relu",
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        sizes = [n_in + (classes or 0), *hidden]
        body: list[nn.Module] = []
        for a, b in pairwise(sizes):
            # dropout and activation are one module, so that the names of the weights are the same without dropout
            activate = ACTIVATIONS[activation]()
            body += [nn.Linear(a, b), nn.Sequential(activate, nn.Dropout(dropout)) if dropout else activate]
        super().__init__(*body, zero(nn.Linear(sizes[-1], n_out)))
        self.classes = classes

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns (B, n_out) for x (B, n_in) and, with classes, a context (B,) or (B, K)."""
        x = with_context(x, context, self.classes)
        layers = None if needs_autograd(x) else self.layers()
        if layers is None:
            y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return y
        return ColumnFunction.apply(x, Plain, self.drops(x), *in_turn(layers))  # type: ignore[no-untyped-call,no-any-return]

    def layers(self) -> list[Layer] | None:
        """Returns the linear layers, or None if an activation is not relu or a layer must be called."""
        found: list[Layer] = []
        # iterating over the module takes longer
        for i, one in enumerate(self._modules.values()):
            if i % 2:
                if type(one) is not nn.ReLU and not _is_relu_with_dropout(one):
                    return None
                if is_hooked(one):
                    return None
                continue
            layer = weights_of(one)
            if layer is None:
                return None
            found.append(layer)
        # the last layer is linear
        return found if len(self._modules) % 2 else None

    @property
    def n_drops(self) -> int:
        """The number of hidden layers."""
        return len(self._modules) // 2

    def drops(self, x: Tensor) -> list[Tensor | None]:
        """Draws the factors of dropout of each hidden layer, (width, B), for inputs (B, n). None without dropout."""
        modules: list[Any] = list(self._modules.values())
        pairs = zip(modules[:-1:2], modules[1::2], strict=True)
        return [dropout_factors(_rate(activation), linear.out_features, x) for linear, activation in pairs]

    def plain_layers(self, dropout: bool = False) -> list[Layer] | None:
        """Returns `layers`, or None if there is a context or a hook.

        If hidden units are dropped, the result is None unless `dropout` is true.
        """
        if self.classes is not None or is_hooked(self):
            return None
        is_dropped = not dropout and any(map(_rate, self._modules.values()))
        return None if is_dropped else self.layers()


def _is_relu_with_dropout(module: Any) -> bool:
    """Whether a module is a sequence of relu and dropout, which have no hooks."""
    if type(module) is not nn.Sequential or [type(one) for one in module] != [nn.ReLU, nn.Dropout]:
        return False
    return not any(is_hooked(one) for one in module)


def _rate(module: Any) -> float:
    """Returns the probability of dropping a hidden unit. It is 0 in evaluation mode and without dropout."""
    dropout = module[-1] if type(module) is nn.Sequential else None
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def one_width(hidden: Sequence[int]) -> int:
    """Returns the width of residual blocks, which must be the same for all blocks.

    Raises:
        ConfigError: different widths, or no width.
    """
    if len(set(hidden)) != 1:
        raise ConfigError(
            f"model.hidden={list(hidden)}: all blocks of a residual network need the same width, for example [32,32]"
        )
    return hidden[0]


def with_context(x: Tensor, context: Tensor | None, classes: int | None) -> Tensor:
    """Returns x (B, n) with a context appended, (B, n + classes): one-hot labels (B,), or features (B, classes).

    Without classes, returns x.
    """
    if classes is None:
        return x
    assert context is not None
    if not context.is_floating_point():
        # vmap does not support F.one_hot
        context = F.embedding(context, torch.eye(classes, dtype=x.dtype, device=x.device))
    return torch.cat([x, context.to(x.dtype)], 1)


def embedded(context: Tensor, embedding: Tensor) -> Tensor:
    """Returns E[context], (B, n), for labels (B,), or context E for features (B, K), with the matrix E (K, n)."""
    if context.is_floating_point():
        return context.to(embedding.dtype) @ embedding
    return F.embedding(context, embedding)


class ConvNet(Recorded, nn.Module):
    """A convolutional network (B, n_in, H, W) -> (B, n_out, H, W), as in Glow's couplings.

    A 3x3 convolution, a 1x1 convolution for each further width, and a 3x3 convolution (Kingma and Dhariwal 2018,
    section 3.3). The output is initially zero.

    Args:
        n_in: number of input channels.
        hidden: channels of the hidden layers, at least one.
        n_out: number of output channels.
        activation: relu | tanh | swish.
        classes: the size K of the context, see `MLP`. Each class or feature has a bias of the first hidden layer.
            None: no context.
        size: (H, W) of the images, for a bias of the first hidden layer at each pixel. None: no such bias.
    """

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        activation: str = "relu",
        classes: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.first = InformedConv(n_in, hidden[0], classes, size)
        self.middle = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(hidden))
        self.last = zero(nn.Conv2d(hidden[-1], n_out, 3, padding="same"))
        self.activation = ACTIVATIONS[activation]()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns (B, n_out, H, W) for x (B, n_in, H, W) and, with classes, a context (B,) or (B, K)."""
        if (parts := self.plain_parts()) is not None and is_faster(x, len(parts[-1])):
            found: Tensor = ConvColumns.apply(x, self.first.places, *parts)  # type: ignore[no-untyped-call]
            return found
        h = self.first(x, context)
        for layer in self.middle:
            h = layer(self.activation(h))
        y: Tensor = self.last(self.activation(h))
        return y

    def plain_parts(self) -> list[Tensor] | None:
        """Returns the weight and the bias of one layer after another.

        Returns None for a context, hooks, replaced layers, and other activations than relu.
        """
        layers = (self.first, *self.middle, self.last)
        if type(self.activation) is not nn.ReLU or is_hooked(self.activation):
            return None
        if type(self.first) is not InformedConv or self.first.embedding is not None:
            return None
        if any(type(one) not in (nn.Conv2d, InformedConv) or is_hooked(one) or one.bias is None for one in layers):
            return None
        sides = (3, *(1 for _ in self.middle), 3)
        if not all(_keeps_size(layer, side) for layer, side in zip(layers, sides, strict=True)):
            return None
        return [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]


def _keeps_size(layer: nn.Conv2d, side: int) -> bool:
    """Whether a layer is an ordinary convolution of side x side pixels, padded by zeros to the size of its inputs."""
    ordinary = layer.groups == 1 and layer.stride == layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return ordinary and layer.kernel_size == (side, side) and layer.padding in ("same", (side // 2, side // 2))


class ResidualNet(Recorded, nn.Module):
    """A residual convolutional network (B, n_in, H, W) -> (B, n_out, H, W), as in Real NVP's couplings.

    A 3x3 convolution, a residual block h + W2 * f(W1 * f(h)) for each width, and a 3x3 convolution (Dinh et al. 2017,
    section 4.1, with the pre-activation blocks of He et al. 2016). The output is initially zero.

    Args:
        n_in: number of input channels.
        hidden: channels of each block, all equal.
        n_out: number of output channels.
        activation, classes, size: as in `ConvNet`.
        batch_norm: puts a batch normalization before each activation in a block.

    Raises:
        ConfigError: blocks of different widths.
    """

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        activation: str = "relu",
        classes: int | None = None,
        size: tuple[int, int] | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        width = one_width(hidden)
        self.first = InformedConv(n_in, width, classes, size)
        self.blocks = nn.ModuleList(Block(width, activation, batch_norm) for _ in hidden)
        self.activation = ACTIVATIONS[activation]()
        self.last = zero(nn.Conv2d(width, n_out, 3, padding="same"))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns (B, n_out, H, W) for x (B, n_in, H, W) and, with classes, a context (B,) or (B, K)."""
        h = self.first(x, context)
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.last(self.activation(h))
        return y


class Block(nn.Sequential):
    """A residual block h + W2 * f(n(W1 * f(n(h)))), where n is a batch normalization or the identity."""

    def __init__(self, width: int, activation: str, batch_norm: bool) -> None:
        def half() -> list[nn.Module]:
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            return [*norm, ACTIVATIONS[activation](), nn.Conv2d(width, width, 3, padding="same")]

        super().__init__(*half(), *half())

    def forward(self, h: Tensor) -> Tensor:
        """Returns (B, width, H, W) for h of the same shape."""
        change: Tensor = super().forward(h)  # type: ignore[no-untyped-call]
        return h + change


class InformedConv(Recorded, nn.Conv2d):
    """The convolution W * x + b + E[context] + P, with a bias E for the context and a bias P for each pixel.

    Args:
        n_in: number of input channels.
        n_out: number of output channels.
        classes: the size of the context, see `embedded`. None: no E.
        size: (H, W) of the images. None: no P.
    """

    def __init__(self, n_in: int, n_out: int, classes: int | None, size: tuple[int, int] | None) -> None:
        super().__init__(n_in, n_out, 3, padding="same")
        self.embedding = None if classes is None else nn.Parameter(torch.zeros(classes, n_out))
        self.places = None if size is None else nn.Parameter(torch.zeros(1, n_out, *size))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns (B, n_out, H, W) for x (B, n_in, H, W) and, with classes, a context (B,) or (B, K)."""
        # channels_last is faster, but vmap does not support it
        y = super().forward(x if transforms_active() else x.contiguous(memory_format=torch.channels_last))
        if self.embedding is not None:
            assert context is not None
            y = y + embedded(context, self.embedding).unsqueeze(-1).unsqueeze(-1)
        return y if self.places is None else y + self.places
