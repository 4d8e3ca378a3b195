"""Conditioners: the networks that compute the parameters of a coupling or of an autoregressive map."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.recorded import Recorded

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "swish": nn.SiLU}


def zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer, its answer zero: a coupling begins as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(Recorded, nn.Sequential):
    """(B, n_in) -> (B, n_out), zero at its start, so that a coupling begins as the identity.

    Args:
        hidden: widths.
        activation: relu | tanh | swish.
        classes: how many there are of the labels (B,), which enter one-hot; None takes none.
        dropout: the share of the hidden units that training drops.
    """

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
            # inside the activation, so that the names of the weights are the same with and without it
            activate = ACTIVATIONS[activation]()
            body += [nn.Linear(a, b), nn.Sequential(activate, nn.Dropout(dropout)) if dropout else activate]
        super().__init__(*body, zero(nn.Linear(sizes[-1], n_out)))
        self.classes = classes

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out) of x (B, n_in); labels (B,) where there are classes."""
        x = with_label(x, label, self.classes)
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y


def one_width(hidden: Sequence[int]) -> int:
    """The width of residual blocks.

    Raises:
        ConfigError: there is not exactly one width.
    """
    if len(set(hidden)) != 1:
        raise ConfigError(
            f"model.hidden={list(hidden)}: the blocks of a residual network are all of one width, as in [32,32]"
        )
    return hidden[0]


def with_label(x: Tensor, label: Tensor | None, classes: int | None) -> Tensor:
    """x (B, n) and the labels (B,) one-hot, (B, n + classes); x where there are no classes."""
    if classes is None:
        return x
    assert label is not None
    # not F.one_hot, which vmap refuses
    return torch.cat([x, F.embedding(label, torch.eye(classes, dtype=x.dtype, device=x.device))], 1)


class ConvNet(Recorded, nn.Module):
    """(B, n_in, H, W) -> (B, n_out, H, W): 3x3, then 1x1 for each further width, then 3x3; zero at its start.

    The network of Glow's couplings (Kingma and Dhariwal 2018, section 3.3).

    Args:
        hidden: channels of the hidden layers, at least one.
        activation: relu | tanh | swish.
        classes: how many there are of the labels (B,), each of which shifts the first hidden layer; None takes none.
        size: (H, W), for a shift of the first hidden layer at each place; None for a network that is the same at all.
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

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out, H, W) of x (B, n_in, H, W); labels (B,) where there are classes."""
        h = self.first(x, label)
        for layer in self.middle:
            h = layer(self.activation(h))
        y: Tensor = self.last(self.activation(h))
        return y


class ResidualNet(Recorded, nn.Module):
    """(B, n_in, H, W) -> (B, n_out, H, W): 3x3, a residual block h + W2 * f(W1 * f(h)) for each width, 3x3.

    The network of Real NVP's couplings (Dinh et al. 2017, section 4.1; pre-activation blocks of He et al. 2016), zero
    at its start. With `batch_norm` every convolution of a block has one before it.

    Args:
        hidden: the channels, the same for every block.
        activation, classes, size: as in `ConvNet`.

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

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out, H, W) of x (B, n_in, H, W); labels (B,) where there are classes."""
        h = self.first(x, label)
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.last(self.activation(h))
        return y


class Block(nn.Sequential):
    """h + W2 * f(n(W1 * f(n(h)))), n batch normalisation or nothing."""

    def __init__(self, width: int, activation: str, batch_norm: bool) -> None:
        def half() -> list[nn.Module]:
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            return [*norm, ACTIVATIONS[activation](), nn.Conv2d(width, width, 3, padding="same")]

        super().__init__(*half(), *half())

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, H, W) of h, of the same shape."""
        change: Tensor = super().forward(h)  # type: ignore[no-untyped-call]
        return h + change


class InformedConv(Recorded, nn.Conv2d):
    """W * x + b + E[label] + P, E one vector of channels for each class, P one for each place of an image."""

    def __init__(self, n_in: int, n_out: int, classes: int | None, size: tuple[int, int] | None) -> None:
        super().__init__(n_in, n_out, 3, padding="same")
        self.embedding = None if classes is None else nn.Parameter(torch.zeros(classes, n_out))
        self.places = None if size is None else nn.Parameter(torch.zeros(1, n_out, *size))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out, H, W) of x (B, n_in, H, W); labels (B,) where there are classes."""
        # only a matter of speed, and refused by vmap
        y = super().forward(x if transforms_active() else x.contiguous(memory_format=torch.channels_last))
        if self.embedding is not None:
            assert label is not None
            y = y + F.embedding(label, self.embedding).unsqueeze(-1).unsqueeze(-1)
        return y if self.places is None else y + self.places
